"""Do rounds three and four still help, and what do the length budget and the gate prevent?

Per seed the SFT captioner goes through four rounds with a length budget for golden captions, and with
the first seeds (``UNBOUND_SEEDS``) once more without, which costs as much again. Every round starts from
the one before, whatever its gate says; what the gate says is noted, and *gated* is the captioner that
`captioner iterate --rounds 1-4` keeps: that before the first refusal. Of it, *better* says in what share
of the seeds its F1 on the test scenes is above the SFT captioner's, *worse* what share of its promoted
rounds had a lower F1 on the gate's scenes than the captioner they replaced.

Why a round gets worse: what it learns from does (precision and recall of its golden captions), because its
verifier does (accuracy on planted claims) or its samples do (precision, share that repeats itself).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.errors import Refused
from captioner.files import atomic_write_json
from captioner.judges import facts, metrics
from captioner.records import Candidate, Golden
from captioner.runs import Run, Shards, input_of
from captioner.sources.folder import read_folder
from loops import golden, iterate, qa, sft
from loops.studies._arms import Metrics, scores

COLUMNS = {
    "better": "better",
    "worse": "worse",
    "promoted": "promoted",
    "stopped": "stopped by alarm, linter or too many failures",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "ended": "ended",
    "repeated": "repeated",
    "looping": "looping",
    "tokens": "tokens",
    "golden_precision": "precision of its golden captions",
    "golden_recall": "their recall",
    "verifier": "its verifier's accuracy",
    "samples_precision": "precision of its samples",
    "samples_repeating": "samples that repeat a statement",
}
START = PAIRED = "SFT captioner"
ROUNDS = (1, 2, 3, 4)
UNBOUND = 10_000  # tokens: no budget
UNBOUND_SEEDS = 1


def measure(config: Config, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    base = work / "base"
    sft.sft(base, config)
    qa.qa(base, config)
    golden.golden(base, config)  # the claims of round 1 are the same with and without a budget
    run = Run.open(base, config, create=False)
    start = scores(run, START, run.captioner_dir(0))
    yield START, _shown(start)
    budgets = {"budget": config.golden.max_tokens}
    if config.seed < UNBOUND_SEEDS:
        budgets["no budget"] = UNBOUND
    for name, budget in budgets.items():
        settings = config.model_copy(
            update={"golden": config.golden.model_copy(update={"max_tokens": budget})}
        )
        if not (work / name).is_dir():
            of_budget = shutil.ignore_patterns("golden", "pairs")
            shutil.copytree(base, work / f".{name}", dirs_exist_ok=True, ignore=of_budget)
            (work / f".{name}").rename(work / name)
        yield from _chain(Run.open(work / name, settings, create=False), name, start)


def _chain(run: Run, name: str, start: Metrics) -> Iterator[tuple[str, dict[str, float]]]:
    """Every round, promoted or not; then the captioner that a gated run would hold."""
    kept, refused, lower = start, False, list[float]()
    for number in ROUNDS:
        gate = run.path / f"round-{number}" / "gate.json"
        gate.unlink(missing_ok=True)  # of a killed study: it is said anew
        try:
            iterate.run_round(run, number)
        except Refused as refusal:
            print(refusal)
            if not gate.is_file():  # there is no captioner to go on from
                yield f"{name}, round {number}", {"stopped": 1.0, "promoted": 0.0}
                break
        said = json.loads(gate.read_text(encoding="utf-8"))
        refused = refused or not said["promoted"]
        atomic_write_json(gate, said | {"promoted": True})  # the chain goes on
        now = scores(run, f"round {number}", run.captioner_dir(number))
        if not refused:
            kept = now
            lower.append(float((said["difference"]["f1"]["value"] or 0.0) < 0))
        more = {"promoted": float(said["promoted"]), "stopped": 0.0}
        yield f"{name}, round {number}", _shown(now) | _learned_from(run, number) | more
    better = float(kept["f1"] > start["f1"])
    share = {"worse": sum(lower) / len(lower)} if lower else {}
    yield f"{name}, gated", _shown(kept) | {"better": better, "promoted": float(len(lower))} | share


def _shown(found: Metrics) -> Metrics:
    return {name: value for name, value in found.items() if name in COLUMNS}


def _learned_from(run: Run, number: int) -> Metrics:
    """What a round's golden captions, verifier and samples were like, by the facts of its scenes."""
    home = run.stage_dir(f"round-{number}")
    images = input_of(home / "candidates", "images")
    assert images is not None
    known = {row.key: facts.read(row.facts) for row in read_folder(images)}

    def judged(rows: Sequence[Golden] | Sequence[Candidate]) -> dict[str, metrics.Interval]:
        one = [
            metrics.count(r.key, r.text, known[r.key], finish_reason="stop", tokens=r.tokens) for r in rows
        ]
        return metrics.evaluate(one, resamples=100)

    learned = judged(Shards(home / "golden", Golden).read_all())
    samples = Shards(home / "candidates", Candidate).read_all()
    verifier: dict[str, Any] = json.loads((home / "verifier.json").read_text(encoding="utf-8"))
    found = {f"golden_{name}": learned[name].value for name in ("precision", "recall")}
    found["verifier"] = verifier["planted"]["all"]["accuracy"]
    found["samples_precision"] = judged(samples)["precision"].value
    found["samples_repeating"] = sum(each.repeats > 0 for each in samples) / len(samples)
    return found
