"""captioner golden --round N [--rethreshold KEEP]: sample, verify, and write golden captions and pairs.

Four stages of a round: `candidates` (the captioner samples), `claims` (the verifier answers one question per
statement), `golden` and `pairs` (derived from the claims, no model). A killed stage continues at its first
missing shard. `--rethreshold` makes the last two anew from the claims that are there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from captioner import golden, pairs, prompts, scenes
from captioner.config import Config
from captioner.engines import make_engine
from captioner.errors import ConfigError, Refused, RunError
from captioner.formats import SCENES, parse_scenes, resolve
from captioner.formats.folder import ImageRow, read_folder
from captioner.records import Candidate, Claim, Failed, Golden, Pair, RecordT
from captioner.runs import Run, Shards, Stage, hash_path, progress, remove_dir
from captioner.tool import Rules, Statement, Tool
from captioner.views import BadImage, load_image

if TYPE_CHECKING:
    from PIL import Image

    from captioner.engines import Engine
    from loops.cli import Args

RowT = TypeVar("RowT", Candidate, Claim)
STAGES = ("candidates", "claims", "golden", "pairs")
NO_STATEMENT = "no statement in any sample that looking could check"
CHANGED = "changed since it was sampled"
NOT_FINITE = "the verifier gave no number"


@dataclass(frozen=True)
class Plan:
    """What a round of golden captions is made of."""

    number: int
    source: str  # of the images
    captioner: Path
    verifier: Path


class Output(Generic[RecordT]):
    """Shards of a stage's rows beside those of the images it failed on; the rows' file is written last."""

    def __init__(self, folder: Path, record: type[RecordT]):
        self.rows = Shards(folder, record)
        self.failed = Shards(folder / "failed", Failed)

    def write(self, index: int, rows: list[RecordT], failed: list[Failed]) -> None:
        self.failed.write(index, failed)
        self.rows.write(index, rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rethreshold",
        type=float,
        metavar="KEEP",
        help="derive golden captions and pairs anew with golden.keep = KEEP (0..1); no model runs",
    )


def run(config: Config, args: Args) -> int:
    """Raises RunError where the round cannot start, Refused (exit 3) where too many images failed."""
    keep: float | None = args.rethreshold
    if keep is not None:
        if args.redo:
            raise ConfigError("--rethreshold keeps what --redo would remove", mend="give one of them")
        drop = config.golden.drop
        if not drop <= keep < 1:
            raise ConfigError(
                f"--rethreshold {keep} does not lie between golden.drop {drop} and 1",
                mend=f"give both thresholds, as in --rethreshold {keep} --golden.drop {keep}",
            )
        config = config.model_copy(update={"golden": config.golden.model_copy(update={"keep": keep})})
    run = Run.open(args.run_dir, config, create=False)
    plan = plan_round(run, args.round)
    counts = make_golden(run, plan, config, redo=args.redo, rethreshold=keep is not None)
    print(f"round {plan.number}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


def plan_round(run: Run, number: int) -> Plan:
    """Raises RunError where the round before is unfinished or this round has no verifier."""
    if number > 1 and not (run.path / f"round-{number - 1}" / "gate.json").is_file():
        raise RunError(
            f"round {number - 1} has not been done",
            where=str(run.path / f"round-{number - 1}"),
            mend=f"captioner iterate --round {number - 1} --run {run.path}",
        )
    captioner = run.current_captioner(number)
    qa = run.stage_dir(f"round-{number}/qa")
    if not (qa / "stage.json").is_file():
        raise RunError(
            f"round {number} has no verifier",
            where=str(qa),
            mend=f"captioner qa --round {number} --run {run.path}",
        )
    return Plan(number, round_source(run.config.golden.images, number), captioner, qa / "captioner")


def round_source(source: str, number: int) -> str:
    """The images of round ``number``: of scenes each round takes its own part, a folder serves all rounds."""
    if not source.startswith(SCENES):
        return source
    split, count, offset = parse_scenes(source)
    return f"{SCENES}{split}:{count}:{offset + (number - 1) * count}"


def make_golden(run: Run, plan: Plan, config: Config, *, redo: bool, rethreshold: bool) -> dict[str, int]:
    """All four stages, each from where it stands; returns the counts of the closing line."""
    home = run.stage_dir(f"round-{plan.number}")
    if rethreshold and not (home / "claims" / "stage.json").is_file():
        raise RunError(
            "there are no claims to apply a threshold to",
            where=str(home / "claims"),
            mend=f"captioner golden --round {plan.number} --run {run.path}",
        )
    folder = resolve(plan.source, run)
    images = read_folder(folder, captions=False)
    tool = Rules(kind_of=scenes.kind_of if plan.source.startswith(SCENES) else None)
    _candidates(run, plan, config, folder, images, redo)
    _claims(run, plan, config, images, tool)
    ledger = Shards(home / "claims", Claim)
    if rethreshold or not (home / "golden" / "stage.json").is_file():
        apply_thresholds(ledger, config)
    _golden(run, plan, config, len(images), rethreshold)
    return _pairs(run, plan, config, len(images))


# ---------------------------------------------------------------- the stages that run a model


def _candidates(
    run: Run, plan: Plan, config: Config, folder: Path, images: list[ImageRow], redo: bool
) -> None:
    settings = config.golden
    section = {
        **settings.model_dump(mode="json", include={"samples", "sampling", "shard_rows"}),
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("caption"),
    }
    inputs = {"captioner": plan.captioner, "images": folder}
    stage = run.stage(f"round-{plan.number}/candidates", section, inputs, redo)
    if redo:  # what derives from the old candidates goes with them
        for name in STAGES[:0:-1]:
            remove_dir(run.stage_dir(f"round-{plan.number}/{name}"))
    if stage.done:
        return
    output = Output(stage.dir, Candidate)
    sampling = settings.sampling.model_copy(update={"seed": config.seed + settings.sampling.seed})

    def work(
        engine: Engine, part: list[ImageRow], advance: Callable[[], None]
    ) -> tuple[list[Candidate], list[Failed]]:
        from captioner.engines import CaptionRequest

        failed: list[Failed] = []

        def requests() -> Iterator[CaptionRequest]:
            for row, image, sample in _load(part, failed, advance):
                yield CaptionRequest(row.key, image, sample)

        rows: list[Candidate] = []
        for sampled in engine.sample(requests(), settings.samples, sampling):
            rows += sampled
            advance()
        return rows, failed

    parts = _parts(images, settings.shard_rows)
    _fill(output, "sampling", parts, plan.captioner, config, work)
    rows = output.rows.read_all()
    counts = {
        "images": len(images),
        "candidates": len(rows),
        "cut": sum(r.finish_reason != "stop" for r in rows),
    }
    _finish(stage, run, counts, len(images))


def _claims(run: Run, plan: Plan, config: Config, images: list[ImageRow], tool: Tool) -> None:
    settings = config.golden
    home = run.stage_dir(f"round-{plan.number}")
    section = {
        "max_questions": settings.max_questions,
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("question"),
        "tool": type(tool).__name__,
    }
    inputs = {"verifier": plan.verifier, "candidates": home / "candidates"}
    stage = run.stage(f"round-{plan.number}/claims", section, inputs)
    if stage.done:
        return
    output = Output(stage.dir, Claim)
    candidates = by_key(Shards(home / "candidates", Candidate).read_all())
    verifier = hash_path(plan.verifier)

    def work(
        engine: Engine, part: list[ImageRow], advance: Callable[[], None]
    ) -> tuple[list[Claim], list[Failed]]:
        from captioner.engines import QuestionBatch

        failed: list[Failed] = []
        asked: list[tuple[Candidate, list[Statement]]] = []  # of each image that the engine was given

        def requests() -> Iterator[QuestionBatch]:
            for row, image, sample in _load([row for row in part if row.key in candidates], failed, advance):
                first = candidates[row.key][0]
                statements = golden.select(candidates[row.key], tool, settings.max_questions).asked
                if first.sample == sample and statements:
                    asked.append((first, statements))
                    yield QuestionBatch(image, [tool.decompose(each.text).text for each in statements])
                else:
                    reason = NO_STATEMENT if first.sample == sample else CHANGED
                    failed.append(Failed(sample=sample, key=row.key, reason=reason))
                    advance()

        rows: list[Claim] = []
        for number, answers in enumerate(engine.p_yes(requests())):
            candidate, statements = asked[number]
            if all(isfinite(answer.p_yes) for answer in answers):
                rows += golden.claims(candidate, statements, answers, tool, verifier, settings)
            else:
                failed.append(Failed(sample=candidate.sample, key=candidate.key, reason=NOT_FINITE))
            advance()
        return rows, failed

    parts = _parts(images, settings.shard_rows)
    _fill(output, "verifying", parts, plan.verifier, config, work)
    rows = output.rows.read_all()
    selections = [golden.select(each, tool, settings.max_questions) for each in candidates.values()]
    counts = {
        "images": len(images),
        "claims": len(rows),
        "uncheckable": sum(selection.uncheckable for selection in selections),
        "over_limit": sum(selection.over_limit for selection in selections),
    }
    mass = sum(row.label_mass for row in rows) / len(rows) if rows else None
    _finish(stage, run, counts, len(images), {"mean_label_mass": mass})


def _load(
    part: list[ImageRow], failed: list[Failed], advance: Callable[[], None]
) -> Iterator[tuple[ImageRow, Image.Image, str]]:
    """(row, image, sha256) of each image that can be read; the others go to ``failed``."""
    for row in part:
        try:
            image, sample = load_image(row.path)
        except BadImage as error:
            failed.append(Failed(sample="", key=row.key, reason=error.reason))
            advance()
            continue
        yield row, image, sample


def _fill(
    output: Output[RecordT],
    description: str,
    parts: list[list[ImageRow]],
    checkpoint: Path,
    config: Config,
    work: Callable[[Engine, list[ImageRow], Callable[[], None]], tuple[list[RecordT], list[Failed]]],
) -> None:
    """Make the missing shards; the model is loaded only if there are any."""
    missing = [index for index in range(len(parts)) if not output.rows.has(index)]
    if not missing:
        return
    total = sum(len(parts[index]) for index in missing)
    with _engine(checkpoint, config) as engine, progress(description, total) as bar:
        for index in missing:
            rows, failed = work(engine, parts[index], bar.advance)
            output.write(index, rows, failed)


@contextmanager
def _engine(checkpoint: Path, config: Config) -> Iterator[Engine]:
    """The one model in memory: captioner and verifier are never loaded together."""
    engine = make_engine(checkpoint, config)
    try:
        yield engine
    finally:
        engine.close()


# ---------------------------------------------------------------- the stages that derive


def apply_thresholds(ledger: Shards[Claim], config: Config) -> None:
    """Bring the ledger's verdicts up to the thresholds: whoever reads it sees what the captions follow."""
    for index in range(_count(ledger)):
        rows = ledger.read(index)
        judged = golden.judge(rows, config.golden)
        if judged != rows:
            ledger.write(index, judged)


def _golden(run: Run, plan: Plan, config: Config, images: int, redo: bool) -> None:
    settings = config.golden
    home = run.stage_dir(f"round-{plan.number}")
    section = settings.model_dump(mode="json", include={"keep", "drop", "abstain", "max_tokens"})
    inputs = {"candidates": home / "candidates", "claims": home / "claims"}
    if redo:
        remove_dir(home / "pairs")
    stage = _derived(run, plan, "golden", section, inputs, redo)
    if stage.done:
        return
    output = Output(stage.dir, Golden)
    candidates, ledger = Shards(home / "candidates", Candidate), Shards(home / "claims", Claim)
    missing = [index for index in range(_count(ledger)) if not output.rows.has(index)]
    count_tokens = _token_counter(plan.captioner) if missing else len
    for index in missing:
        samples = Counter(row.key for row in candidates.read(index))
        rows: list[Golden] = []
        failed: list[Failed] = []
        for key, claims in by_key(ledger.read(index)).items():
            made = golden.build(claims, samples[key], settings, count_tokens)
            if isinstance(made, Golden):
                rows.append(made)
            else:
                failed.append(Failed(sample=claims[0].sample, key=key, reason=made))
        output.write(index, rows, failed)
    captions = output.rows.read_all()
    counts = {"images": images, "golden": len(captions), **verdict_counts(ledger.read_all())}
    _finish(stage, run, counts, images)


def _pairs(run: Run, plan: Plan, config: Config, images: int) -> dict[str, int]:
    home = run.stage_dir(f"round-{plan.number}")
    inputs = {name: home / name for name in STAGES[:3]}
    stage = _derived(run, plan, "pairs", config.pairs.model_dump(mode="json"), inputs, False)
    candidates, ledger = Shards(home / "candidates", Candidate), Shards(home / "claims", Claim)
    captions, output = Shards(home / "golden", Golden), Shards(stage.dir, Pair)
    reasons: Counter[str] = Counter()
    for index in range(_count(ledger)):
        golden_of = {row.key: row for row in captions.read(index)}
        claims_of = by_key(ledger.read(index))
        rows: list[Pair] = []
        for key, sampled in by_key(candidates.read(index)).items():
            made = pairs.build(golden_of.get(key), sampled, claims_of.get(key, []), config.pairs)
            if not made:
                reasons[pairs.why_none(golden_of.get(key), sampled)] += 1
            rows += made
        if not output.has(index):
            output.write(index, rows)
    claims = ledger.read_all()
    counts = {
        "images": images,
        "candidates": len(candidates.read_all()),
        "claims": len(claims),
        **verdict_counts(claims),
        "pairs": len(output.read_all()),
        "failed": sum(_failures(home / name).total() for name in STAGES[:3]),
    }
    if not stage.done:
        stage.finish(counts, without_pair=dict(reasons))
    return counts


def _derived(
    run: Run, plan: Plan, name: str, section: dict[str, object], inputs: dict[str, Path], redo: bool
) -> Stage:
    try:
        return run.stage(f"round-{plan.number}/{name}", section, inputs, redo)
    except RunError as error:
        if "stale" not in error.what:
            raise
        raise RunError(
            error.what,
            where=error.where,
            mend=f"--rethreshold {run.config.golden.keep} derives anew, --redo samples and asks anew, too",
        ) from error


def _token_counter(checkpoint: Path) -> Callable[[str], int]:
    """Tokens of a caption, the end token included. Reads the tokenizer's files only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids) + 1


# ---------------------------------------------------------------- rows and counts


def by_key(rows: Iterable[RowT]) -> dict[str, list[RowT]]:
    """Rows of each image, which stand together, in order."""
    return {key: list(group) for key, group in groupby(rows, key=lambda row: row.key)}


def verdict_counts(claims: Iterable[Claim]) -> dict[str, int]:
    verdicts = Counter(claim.verdict for claim in claims)
    return {"kept": verdicts["keep"], "dropped": verdicts["drop"], "abstained": verdicts["abstain"]}


def _parts(images: list[ImageRow], size: int) -> list[list[ImageRow]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _count(shards: Shards[RecordT]) -> int:
    return len(list(shards.dir.glob("[0-9]*.parquet")))


def _failures(folder: Path) -> Counter[str]:
    return Counter(row.reason for row in Shards(folder / "failed", Failed).read_all())


def _finish(
    stage: Stage, run: Run, counts: dict[str, int], images: int, metrics: dict[str, object] | None = None
) -> None:
    """Publish the stage, unless more images failed up to here than the limit allows."""
    reasons = _failures(stage.dir)
    before = STAGES[: STAGES.index(stage.dir.name)]
    failed = reasons.total() + sum(_failures(stage.dir.parent / name).total() for name in before)
    if failed > run.config.max_failed * images:
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise Refused(
            f"{failed} of {images} images failed ({listed}), the limit is {run.config.max_failed:.0%}",
            where=str(stage.dir),
            mend="look at failed/ there; --max-failed raises the limit",
        )
    stage.finish({**counts, "failed": reasons.total()}, metrics, failed_reasons=dict(reasons))
