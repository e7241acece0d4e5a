"""captioner report: one self-contained HTML page about a run.

A verdict, scores with intervals, where the claims of each round went, how far the verifier can be believed,
and every image with its samples, claims, golden caption and the captions of all captioners. No model runs:
the page shows what the run directory holds.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from captioner import views
from captioner.config import Config, ViewsConfig
from captioner.errors import RunError
from captioner.files import atomic_write_text
from captioner.judges import facts
from captioner.method import verdicts
from captioner.progress import progress
from captioner.records import Candidate, CaptionRow, Claim, Golden, Planted, Record, Unasked
from captioner.report import report as html
from captioner.report.report import ClaimShown, Curve, ImageShown, Report, RoundShown, Truth
from captioner.runs import Run, RunDir, Shards, input_of
from captioner.sources import resolve
from captioner.sources.folder import ImageRow, read_folder
from captioner.views import BadImage, load_image
from loops.stages import StagePlan

VIEW_PX = 448  # of a view: boxes on the picture hardly depend on it
IMAGES = 2000  # of each part of the page: a thumbnail is about 10 kB
RecordT = TypeVar("RecordT", bound=Record)


def plan(run: Run) -> list[StagePlan]:
    """What is read and written."""
    return [StagePlan("", {"run": run.path / "run.json"}, outputs=[run.path / "report.html"])]


def report(run: RunDir, config: Config, *, images: int = IMAGES) -> Path:
    """Write report.html into the run directory; returns it.

    Args:
        run: Run directory with at least one stage.
        config: Settings; `views` is read.
        images: Images of each part of the page at most.

    Raises:
        RunError: there is nothing to show yet.
    """
    run = Run.open(run, config, create=False)
    page = collect(run, images)
    if not (page.evaluation or page.rounds or page.curves):
        raise RunError("nothing to report yet", where=str(run.path), fix=f"captioner sft --run {run.path}")
    target = run.path / "report.html"
    atomic_write_text(target, html.render_html(page))
    print(f"{html.verdict(page)}")
    print(f"report of {len(page.images)} images, {target.stat().st_size / 1e6:.1f} MB: {target}")
    return target


def collect(run: Run, images: int = IMAGES) -> Report:
    """What the run directory holds, as far as it has come; of every part at most ``images`` images."""
    about = _json(run.path / "run.json") or {}
    homes = sorted(
        (path for path in run.path.glob("round-*") if path.name[6:].isdigit()),
        key=lambda path: int(path.name[6:]),
    )
    curves = _curves(run.path / "sft", "SFT")
    for home in homes:
        for stage in ("qa", "dpo"):
            curves += _curves(home / stage, f"{home.name.replace('-', ' ')} {stage}")
    shown = {name: str(about[name]) for name in ("created", "git_commit", "config_hash") if about.get(name)}
    shown["versions"] = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    evaluation = _json(run.path / "evaluation.json")
    pictures = _held_out(run, evaluation, images) if evaluation else []
    for home in homes:
        pictures += _of_round(run, home, images)
    return Report(
        title=f"Run {about.get('name', run.path.name)}",
        evaluation=evaluation,
        rounds=[_round(home) for home in homes],
        images=pictures,
        curves=curves,
        about=shown,
    )


def _round(home: Path) -> RoundShown:
    flow: dict[str, Counter[str]] = defaultdict(Counter)
    for claim in verdicts.read(home):
        flow[claim.kind][claim.verdict] += 1
    unasked = len(_rows(home / "claims" / "unasked", Unasked))
    if unasked:
        flow["never asked"]["unasked"] = unasked
    planted = _rows(home / "planted", Planted)
    return RoundShown(
        number=int(home.name[6:]),
        accuracy=_json(home / "qa" / "accuracy.json"),
        gate=_json(home / "gate.json"),
        verifier=_json(home / "verifier.json"),
        flow={kind: dict(counts) for kind, counts in sorted(flow.items(), key=lambda x: -x[1].total())},
        answers=[(row.p_yes, row.answer == "yes") for row in planted],
    )


def _held_out(run: Run, evaluation: Mapping[str, Any], limit: int) -> list[ImageShown]:
    """The images that the captioners were evaluated on, with the caption of each."""
    made = [(str(one["name"]), _captions(run.path / one["captions"])) for one in evaluation["captioners"]]
    folder = resolve(str(evaluation["data"]), run)
    return _pictures(
        run,
        "held-out",
        read_folder(folder)[:limit] if folder.is_dir() else [],
        lambda row: {"captions": [(name, said[row.key]) for name, said in made if row.key in said]},
    )


def _of_round(run: Run, home: Path, limit: int) -> list[ImageShown]:
    """The first images of a round in key order, not a choice of good ones."""
    folder = input_of(home / "candidates", "images")
    if folder is None or not folder.is_dir():
        return []
    samples, claims = _by_key(_rows(home / "candidates", Candidate)), _by_key(verdicts.read(home))
    golden = {row.key: row.text for row in _rows(home / "golden", Golden)}
    examples = (_json(home / "evaluation.json") or {}).get("examples", [])
    names = ("before", "after")[: len(examples)]
    captions = [(name, _captions(run.path / one)) for name, one in zip(names, examples, strict=True)]

    def shown(row: ImageRow) -> dict[str, Any]:
        truth = _truth(row)
        return {
            "captions": [(name, said[row.key]) for name, said in captions if row.key in said],
            "samples": [each.text for each in samples.get(row.key, [])],
            "claims": [_claim(each, truth) for each in claims.get(row.key, [])],
            "golden": golden.get(row.key),
        }

    return _pictures(run, home.name.replace("-", " "), read_folder(folder)[:limit], shown)


def _pictures(run: Run, part: str, rows: Sequence[ImageRow], about: Any) -> list[ImageShown]:
    config = run.config.views.over(ViewsConfig())
    found = []
    with progress(f"thumbnails, {part}", len(rows)) as bar:
        for row in rows:
            bar.advance()
            try:
                image = load_image(row.path)[0]
            except BadImage:  # its stage recorded why
                continue
            plan = views.plan(*image.size, config, size=VIEW_PX, factor=1)
            found.append(
                ImageShown(
                    key=row.key,
                    part=part,
                    thumbnail=html.thumbnail(image),
                    width=image.width,
                    height=image.height,
                    views=[(view.tag, view.box) for view in plan],
                    truth=_truth(row),
                    **about(row),
                )
            )
    return found


def _truth(row: ImageRow) -> Truth:
    """What the known facts of an image say of a statement."""
    known = facts.read(row.facts)
    if known is None:
        return lambda statement: None
    return known.holds


def _claim(claim: Claim, truth: Truth) -> ClaimShown:
    return ClaimShown(
        text=claim.text,
        kind=claim.kind,
        question=claim.question,
        p_yes=claim.p_yes,
        verdict=claim.verdict,
        why=claim.why,
        votes=len(claim.candidates),
        truth=truth(claim.text),
    )


def _rows(folder: Path, record: type[RecordT]) -> list[RecordT]:
    return Shards(folder, record).read_all() if folder.is_dir() else []


def _by_key(rows: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        found[row.key].append(row)
    return found


def _captions(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {row.key: row.caption for row in Shards(folder, CaptionRow).read_all() if row.caption is not None}


def _curves(stage: Path, name: str) -> list[Curve]:
    """Curves of every metrics.jsonl of a stage."""
    curves: list[Curve] = []
    for file in sorted(stage.rglob("metrics.jsonl")):
        part = file.parent.relative_to(stage).as_posix()
        rows = [_line(file, line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        curves += html.curves_of(name if part == "." else f"{name} {part}", rows)
    return curves


def _line(file: Path, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RunError("a line is not JSON", where=str(file), fix="remove that line") from error


def _json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    if not path.is_file():
        return None
    return _line(path, path.read_text(encoding="utf-8"))
