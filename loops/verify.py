"""captioner verify SET --out DIR [--verifier RUN] [--flag]: check captions that somebody else wrote.

Alt-text, a teacher's captions, another tool's, your own training set: every statement of every caption is
asked about its image by the verifier of a run (by default that of --run). OUT then holds `claims/` (what was
stated and answered) and `verdicts/` (what is believed, and why), row by row, and `captions/`: the captions
without their refuted statements, the rest word for word. With --flag no caption is changed; its verdicts
stand beside it. A killed command continues where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from captioner import prompts
from captioner.config import Config
from captioner.errors import DataError
from captioner.files import hash_path
from captioner.method import rounds, verdicts
from captioner.method.claims import NOT_FINITE
from captioner.method.verifier import Verifier, settings_of, without_refuted
from captioner.pipeline import stages
from captioner.pipeline.stages import Output, Prepared
from captioner.records import CaptionRow, Claim, Failed, Verdict
from captioner.runs import Run, RunDir, Shards
from captioner.sources import resolve
from captioner.sources.folder import ImageRow, read_folder
from loops.stages import StagePlan

if TYPE_CHECKING:
    from captioner.engines import Engine

NO_CAPTION = "no caption"
ALL_REFUTED = "every statement was refuted"


def plan(run: Run, source: str, out: Path, verifier: Path | None = None) -> list[StagePlan]:
    """What is read and written."""
    inputs: dict[str, Path | str] = {"captions": source, "the verifier": settings_of(verifier or run.path)}
    return [StagePlan("", inputs, outputs=[out / name for name in ("claims", "verdicts", "captions")])]


def verify(
    run: RunDir,
    config: Config,
    source: str,
    *,
    out: Path,
    verifier: Path | None = None,
    flag: bool = False,
    redo: bool = False,
) -> dict[str, int]:
    """Check captions that somebody else wrote; returns what was counted.

    Args:
        run: Run directory whose verifier is asked where no other is named.
        config: Settings; `views`, `engine`, `model` and `golden.shard_rows` are read.
        source: Images with captions: a folder, a table, tars, and what else training takes.
        out: Folder of the results.
        verifier: Another run, or the `verifier` folder of one.
        flag: Leave the captions as they are, with their verdicts beside them.
        redo: Ask everything anew.

    Raises:
        RunError: there is no verifier.
        Refused: more than `max_failed` of the rows could not be checked.
    """
    checker = Verifier.load(verifier or (run.path if isinstance(run, Run) else Path(run)))
    home = Run.open(out, config)
    folder = resolve(source, home)
    rows = read_folder(folder)
    if not any(map(_caption, rows)):
        raise DataError("no image has a caption", where=source, fix="see docs/formats.md for the forms")
    _ask(home, config, checker, folder, rows, redo)
    counts = _judge(home, config, checker, rows, flag, redo)
    print("verify: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + f": {out}")
    return counts


def _caption(row: ImageRow) -> str:
    return row.caption or row.prose or ""


def _ask(
    home: Run, config: Config, checker: Verifier, folder: Path, rows: list[ImageRow], redo: bool
) -> None:
    """The ledger of the set, ``claims/``."""
    section = {
        "shard_rows": config.golden.shard_rows,
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("question"),
        "temperature": checker.settings.temperature,
    }
    stage = home.stage("claims", section, {"captions": folder, "verifier": checker.checkpoint}, redo)
    if stage.done:
        return
    output = Output(stage.dir, Claim)
    captioned = [row if _caption(row) else replace(row, error=NO_CAPTION) for row in rows]
    parts = rounds.parts(captioned, config.golden.shard_rows)
    stages.fill(output, "verifying", parts, checker.checkpoint, config, partial(_claims, checker))
    claims = output.rows.read_all()
    rounds.finish(stage, home, {"images": len(rows), "claims": len(claims)}, len(rows))


def _claims(
    checker: Verifier, engine: Engine, images: Iterable[Prepared[ImageRow]]
) -> Iterator[tuple[ImageRow, list[Claim] | Failed]]:
    def statements(row: ImageRow) -> list[str]:
        return checker.statements(_caption(row))

    def questions(image: Prepared[ImageRow]) -> list[tuple[str, str]]:
        return [(stages.ALL, checker.question(text)) for text in statements(image.row)]

    for image, answers in stages.ask(engine, images, questions):
        if not all(isfinite(answer.p_yes) for answer in answers):
            image = image.refused(NOT_FINITE)
        if image.reason:
            yield image.row, image.failed()
        else:
            yield image.row, checker.claims(image.sample, image.row.key, statements(image.row), answers)


def _judge(
    home: Run, config: Config, checker: Verifier, rows: Sequence[ImageRow], flag: bool, redo: bool
) -> dict[str, int]:
    """``verdicts/`` and ``captions/``; no model."""
    section = {"settings": checker.settings, "flag": flag}
    stage = home.stage("verdicts", section, {"claims": home.path / "claims"}, redo)
    ledger, output = Shards(home.path / "claims", Claim), Shards(stage.dir, Verdict)
    captions = Shards(home.path / "captions", CaptionRow)
    shards = [ledger.read(index) for index in range(rounds.shard_count(ledger.dir))]
    claims = [claim for shard in shards for claim in shard]
    weighed = verdicts.weigh(claims, 1, checker.settings.tells, checker.settings.distrusted)
    judged = iter(verdicts.judge(weighed, checker.thresholds))
    reasons = {row.key: row.reason for row in Shards(ledger.dir / "failed", Failed).read_all()}
    counts: Counter[str] = Counter()
    parts = rounds.parts(list(rows), config.golden.shard_rows)
    for index, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        own = [next(judged) for _ in shard]
        of = rounds.by_key(own)
        written = [_row(row, of.get(row.key, []), reasons.get(row.key), checker, flag) for row in part]
        if not stage.done:
            output.write(index, [Verdict.of(claim) for claim in own])
            captions.write(index, written)
        counts.update(claim.verdict for claim in own)
        counts["changed"] += sum(
            made.caption != _caption(row)
            for made, row in zip(written, part, strict=True)
            if made.error is None
        )
        counts["all refuted"] += sum(made.error == ALL_REFUTED for made in written)
    found = {
        "captions": len(rows),
        "statements": len(claims),
        "confirmed": counts["keep"],
        "refuted": counts["drop"],
        "undecided": counts["abstain"],
        "captions changed": counts["changed"],
        "refuted wholly": counts["all refuted"],
        "failed": len(reasons),
    }
    if not stage.done:
        stage.finish(found)
    return found


def _row(
    row: ImageRow, claims: Sequence[Claim], reason: str | None, checker: Verifier, flag: bool
) -> CaptionRow:
    """The caption of an image as it leaves; ``claims`` are its own, judged."""
    caption = _caption(row)
    refuted = [claim.text for claim in claims if claim.verdict == "drop"]
    left = caption if flag else without_refuted(caption, refuted)
    error = reason or (ALL_REFUTED if caption and not left else None)
    return CaptionRow(
        id=claims[0].sample if claims else hash_path(row.path) if row.path.is_file() else "",
        key=row.key,
        caption=None if error else left,
        finish_reason=None,
        tokens=None,
        model="",
        config=checker.hash,
        error=error,
        statements=[claim.text for claim in claims],
        p_yes=[claim.p_yes for claim in claims],
        p_true=[claim.p_true for claim in claims],
        verdicts=[claim.verdict for claim in claims],
    )
