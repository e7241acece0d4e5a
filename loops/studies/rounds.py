"""Do rounds three and four still help, and what do the length budget and the gate prevent?

Per seed the SFT captioner goes through four rounds, once with a length budget for golden captions and once
without. Every round starts from the one before, whatever its gate says; what the gate says is noted, and
*gated* is the captioner that a run with the gate ends with: that before the first refusal. The golden
captions' own precision and recall tell whether a round gets worse because what it learns from does.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner import metrics
from captioner.config import Config
from captioner.errors import Refused
from captioner.formats.folder import read_folder
from captioner.metrics import Counts
from captioner.records import Golden
from captioner.runs import Run, Shards, atomic_write_json
from loops import evaluate, iterate, sft
from loops.iterate import arguments

COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "ended": "ended",
    "repeated": "repeated",
    "tokens": "tokens",
    "golden_precision": "precision of its golden captions",
    "golden_recall": "their recall",
    "promoted": "promoted",
    "stopped": "stopped by alarm, linter or too many failures",
}
START = PAIRED = "SFT captioner"
ROUNDS = (1, 2, 3, 4)
UNBOUND = 10_000  # tokens: no budget


def measure(config: Config, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    base = work / "sft-run"
    sft.run(config, arguments(sft, Namespace(run_dir=base, redo=False)))
    run = Run.open(base, config, create=False)
    yield START, _scores(run, run.captioner_dir(0))
    for name, budget in (("budget", config.golden.max_tokens), ("no budget", UNBOUND)):
        golden = config.golden.model_copy(update={"max_tokens": budget})
        settings = config.model_copy(update={"golden": golden})
        if not (work / name).is_dir():
            shutil.copytree(base, work / f".{name}", dirs_exist_ok=True)
            (work / f".{name}").rename(work / name)
        yield from _chain(Run.open(work / name, settings, create=False), name)


def _chain(run: Run, name: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Every round, promoted or not; then the captioner that a gated run would hold."""
    args = Namespace(run_dir=run.path, redo=False)
    gated, refused = _scores(run, run.captioner_dir(0)), False
    for number in ROUNDS:
        gate = run.path / f"round-{number}" / "gate.json"
        try:
            iterate.run_round(run, number, args)
        except Refused as refusal:
            print(refusal)
            if not gate.is_file():  # there is no captioner to go on from
                yield f"{name}, round {number}", {"stopped": 1.0, "promoted": 0.0}
                break
        said = json.loads(gate.read_text(encoding="utf-8"))
        promoted = said.get("by_gate", said["promoted"])
        refused = refused or not promoted
        atomic_write_json(gate, said | {"promoted": True, "by_gate": promoted})  # the chain goes on
        scores = _scores(run, run.captioner_dir(number))
        gated = gated if refused else scores
        more = {"promoted": float(promoted), "stopped": 0.0}
        yield f"{name}, round {number}", scores | _golden(run, number) | more
    yield f"{name}, gated", gated


def _scores(run: Run, checkpoint: Path) -> dict[str, float]:
    summary, _ = evaluate.evaluate(run, [evaluate.Entry("", checkpoint)], run.config.evaluate.data)
    found: dict[str, Any] = summary["captioners"][0]["metrics"]
    return {key: found[key]["value"] for key in COLUMNS if key in found and found[key]["value"] is not None}


def _golden(run: Run, number: int) -> dict[str, float]:
    """Precision and recall of a round's golden captions against the facts of its scenes."""
    home = run.stage_dir(f"round-{number}")
    images = evaluate.round_images(home)
    assert images is not None
    facts = {row.key: row.facts for row in read_folder(images)}
    rows: list[Counts] = [
        metrics.count(each.key, each.text, facts[each.key], finish_reason="stop", tokens=each.tokens)
        for each in Shards(home / "golden", Golden).read_all()
    ]
    scores = metrics.evaluate(rows, resamples=100)
    return {f"golden_{name}": scores[name].value for name in ("precision", "recall")}
