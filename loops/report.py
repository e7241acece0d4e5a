"""captioner report: one self-contained HTML page about a run.

Scores with intervals, verifier accuracy, the claims of the first images of each round from sample to golden
caption, captions before and after, training curves. No model runs: it shows what the run directory holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.errors import RunError
from captioner.records import Candidate, CaptionRow, Claim, Golden
from captioner.report import report
from captioner.report.report import Curve, Example, Report, RoundReport
from captioner.runs import Run, Shards, atomic_write_text
from captioner.sources.folder import ImageRow, read_folder
from captioner.views import BadImage, load_image

EXAMPLES = 12  # images shown of each round


def run(config: Config, args: argparse.Namespace) -> int:
    """Write report.html into the run directory. Raises RunError where there is nothing to show."""
    run = Run.open(args.run_dir, config, create=False)
    page = collect(run)
    if not (page.evaluation or page.rounds or page.curves):
        raise RunError("nothing to report yet", where=str(run.path), mend=f"captioner sft --run {run.path}")
    target = run.path / "report.html"
    atomic_write_text(target, report.render_html(page))
    print(f"report of {len(page.rounds)} rounds, {target.stat().st_size / 1e6:.1f} MB: {target}")
    return 0


def collect(run: Run) -> Report:
    """What the run directory holds, as far as it has come."""
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
    return Report(
        title=f"Run {about.get('name', run.path.name)}",
        evaluation=_json(run.path / "evaluation.json"),
        rounds=[_round(run, home) for home in homes],
        curves=curves,
        about=shown,
    )


def _round(run: Run, home: Path) -> RoundReport:
    return RoundReport(
        number=int(home.name[6:]),
        accuracy=_json(home / "qa" / "accuracy.json"),
        gate=_json(home / "gate.json"),
        verifier=_json(home / "verifier.json"),
        examples=_examples(run, home),
    )


def _examples(run: Run, home: Path) -> list[Example]:
    """The first images of the round, in key order: not a choice of good ones."""
    manifest = _json(home / "candidates" / "stage.json")
    folder = home / "candidates" / manifest["input_paths"]["images"] if manifest else None
    if folder is None or not folder.is_dir():
        return []
    samples, claims = Shards(home / "candidates", Candidate), Shards(home / "claims", Claim)
    said = [row for row in (samples.read_all() if samples.dir.is_dir() else [])]
    asked = [row for row in (claims.read_all() if claims.dir.is_dir() else [])]
    golden_shards = Shards(home / "golden", Golden)
    golden = {row.key: row.text for row in (golden_shards.read_all() if golden_shards.dir.is_dir() else [])}
    captions = [
        _captions(run.path / name) for name in (_json(home / "evaluation.json") or {}).get("examples", [])
    ]
    before, after = captions if len(captions) == 2 else ({}, {})
    examples = []
    for row in read_folder(folder)[:EXAMPLES]:
        image = _thumbnail(row)
        if image is None:
            continue
        examples.append(
            Example(
                key=row.key,
                image=image,
                samples=[c.text for c in said if c.key == row.key],
                claims=[c for c in asked if c.key == row.key],
                golden=golden.get(row.key),
                before=before.get(row.key),
                after=after.get(row.key),
                facts=row.facts,
            )
        )
    return examples


def _thumbnail(row: ImageRow) -> str | None:
    """None for an image that cannot be read: its round recorded why."""
    try:
        return report.thumbnail(load_image(row.path)[0])
    except BadImage:
        return None


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
        curves += report.curves_of(name if part == "." else f"{name} {part}", rows)
    return curves


def _line(file: Path, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RunError("a line is not JSON", where=str(file), mend="remove that line") from error


def _json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    if not path.is_file():
        return None
    return _line(path, path.read_text(encoding="utf-8"))
