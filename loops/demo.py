"""captioner demo [--seeds N]: the whole story on the embedded scenes, minutes on a laptop CPU.

SFT, two rounds of self-correction with their gates, an evaluation of every captioner, captions of the test
images, and the report. The same command continues a killed demo. ``--seeds 3`` does it three times, each
with other scenes and other random numbers, in seed-0, seed-1, ... of the run directory, and ends with one
table over the seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from captioner.config import Config
from captioner.errors import Refused
from captioner.files import atomic_write_json
from captioner.judges import metrics
from captioner.judges.appoint import known_facts
from captioner.judges.base import Said
from captioner.judges.facts import FactsJudge
from captioner.judges.metrics import Counts
from captioner.lab import grid as scenes
from captioner.progress import console
from captioner.runs import Run, RunDir
from captioner.sources import resolve
from captioner.sources.folder import read_folder
from captioner.statements import split_statements
from loops import caption, evaluate, iterate, report, sft
from loops.stages import StagePlan

TOML = Path(__file__).with_name("demo.toml")  # the command line reads it where no other is named
ROUNDS = (1, 2)
Baselines = dict[str, list[Counts]]  # counts of captions that no training made, by name


def plan(run: Run) -> list[StagePlan]:
    """What the first stage reads, is made with and writes; the others build on it."""
    return [*sft.plan(run), StagePlan("", {}, outputs=[run.path / "captions", run.path / "report.html"])]


def demo(run: RunDir, config: Config, *, seeds: int = 1, gpus: int = 2, redo: bool = False) -> Path:
    """Make every stage from where it stands, with two rounds; returns the table, evaluation.json.

    A round that its gate refuses ends the rounds, not the demo.

    Args:
        run: Run directory; made if it does not exist.
        config: Settings; loops/demo.toml where the command names no file.
        seeds: Number of runs, with seeds 0 to N-1.
        gpus: Processes of the stages that train or sample.
        redo: Remove the results of the stages and make them anew.
    """
    home = Run.path_of(run)
    if seeds > 1:
        over_seeds(config, home, seeds, redo=redo, gpus=gpus)
    else:
        run_once(config, home, redo=redo, gpus=gpus)
    return home / "evaluation.json"


def run_once(config: Config, home: Path, *, redo: bool, gpus: int) -> None:
    """One run, from SFT to the report."""
    times: dict[str, float] = {}
    started = time.monotonic()
    with _timed(times, "sft"):
        sft.sft(home, config, redo=redo, gpus=gpus)
    run = Run.open(home, config, create=False)
    for number in ROUNDS:
        with _timed(times, f"round {number}"):
            promoted = _round(run, number, redo, gpus)
        if not promoted:
            break
    with _timed(times, "evaluation"):
        # the table is printed at the end, where it is looked for
        summary = evaluate.score(run, evaluate.run_entries(run, config), config.evaluate.data).summary
        summary["baselines"] = _scored(baselines(run), config)
        atomic_write_json(run.path / "evaluation.json", summary)
    with _timed(times, "captions"):
        out = run.path / "captions"
        folder, checkpoint = str(resolve(config.evaluate.data, run)), str(run.newest_captioner())
        caption.caption(run, config, folder, out=out, format="jsonl", checkpoint=checkpoint, redo=redo)
    with _timed(times, "report"):
        report.report(run, config)
    evaluate.print_table(summary)
    print(f"captions: {out / 'captions.jsonl'}")
    print(f"report:   {run.path / 'report.html'}")
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    print(f"demo done in {time.monotonic() - started:.0f} s ({parts})")


def over_seeds(config: Config, home: Path, seeds: int, *, redo: bool, gpus: int) -> None:
    """The demo once per seed, then the table over seeds: images and seeds are both resampled."""
    counts, trivial, accuracies = list[list[list[Counts]]](), list[Baselines](), list[dict[str, Any]]()
    summary: dict[str, Any] = {}
    for seed in range(seeds):
        settings = config.model_copy(update={"seed": config.seed + seed})
        run_once(settings, home / f"seed-{seed}", redo=redo, gpus=gpus)
        run = Run.open(home / f"seed-{seed}", settings, create=False)
        summary, of_seed, _ = evaluate.score(run, _kept(run, settings), config.evaluate.data)
        counts.append(of_seed)
        trivial.append(baselines(run))
        last = run.path / f"round-{ROUNDS[-1]}" / "qa" / "accuracy.json"
        accuracies += [json.loads(last.read_text(encoding="utf-8"))] if last.is_file() else []
    names = [one["name"] for one in summary["captioners"]]
    pooled = _pooled(names, counts, config.evaluate.bootstrap)
    data = f"{config.evaluate.data}, {seeds} seeds"
    pooled |= {"data": data, "images": summary["images"], "judge": summary["judge"]}
    same = {name: [each[name] for each in trivial] for name in trivial[0] if all(name in x for x in trivial)}
    pooled["baselines"] = [
        {"name": name, "metrics": _json(metrics.evaluate_runs(of, resamples=config.evaluate.bootstrap))}
        for name, of in same.items()
    ]
    atomic_write_json(home / "evaluation.json", pooled)
    evaluate.print_table(pooled)
    _print_verifier(accuracies)
    print(f"table: {home / 'evaluation.json'}")


def baselines(run: Run) -> Baselines:
    """What needs no training: base and SFT without the kinds of statements that round 1's verifier distrusts.

    Counts by name. What the rounds gain has to be seen beside this. Empty where no kind is distrusted.
    """
    config = run.config
    decision = run.path / "round-1" / "verifier.json"
    distrusted = json.loads(decision.read_text(encoding="utf-8"))["distrusted"] if decision.is_file() else {}
    if not distrusted:
        return {}
    folder = resolve(config.evaluate.data, run)
    images = read_folder(folder)
    judge = FactsJudge(known_facts(config, folder, images))
    found = {}
    for entry in evaluate.run_entries(run, config)[:2]:
        _, rows = evaluate.caption(run, entry, folder, images)
        kept = [
            row.model_copy(update={"caption": without(row.caption, entry.prose, distrusted)})
            for row in rows
            if row.caption is not None
        ]
        name = f"{entry.name}, {' and '.join(sorted(distrusted))} statements deleted"
        found[name] = judge.count(Said(name, kept))
    return found


def without(caption: str, prose: bool, kinds: Collection[str]) -> str:
    """A caption of a scene, in shorthand, without the statements of some kinds."""
    statements = scenes.parse_prose(caption) if prose else split_statements(caption)
    return ", ".join(text for text in statements if text and scenes.kind_of(text) not in kinds)


def _scored(counts: Baselines, config: Config) -> list[dict[str, Any]]:
    again = {"resamples": config.evaluate.bootstrap, "seed": config.seed}
    return [{"name": name, "metrics": _json(metrics.evaluate(of, **again))} for name, of in counts.items()]


def _kept(run: Run, config: Config) -> list[evaluate.Entry]:
    """Base, SFT, and what the run had after each round: a refused round leaves the captioner before it."""
    entries = evaluate.run_entries(run, config)[:2]
    kept = [evaluate.Entry(f"round {n}", run.current_captioner(n + 1)) for n in ROUNDS]
    return entries + kept


def _pooled(names: Sequence[str], counts: list[list[list[Counts]]], resamples: int) -> dict[str, Any]:
    """Means over seeds, and what changed from each captioner to the next and from SFT to the last."""
    columns = [list(column) for column in zip(*counts, strict=True)]  # [captioner][seed]
    captioners = [
        {"name": name, "metrics": _json(metrics.evaluate_runs(column, resamples=resamples))}
        for name, column in zip(names, columns, strict=True)
    ]
    steps = [(at - 1, at) for at in range(1, len(names))] + [(1, len(names) - 1)]
    differences = [
        {
            "from": names[a],
            "to": names[b],
            "metrics": _json(metrics.difference_runs(columns[a], columns[b], resamples=resamples)),
        }
        for a, b in steps
    ]
    return {"captioners": captioners, "differences": differences}


def _json(intervals: dict[str, metrics.Interval]) -> dict[str, Any]:
    return {name: interval.to_json() for name, interval in intervals.items()}


def _print_verifier(accuracies: Sequence[dict[str, Any]]) -> None:
    """Held-out accuracy of the last round's verifier by kind of question: mean and range over seeds."""
    table = Table(title=f"Verifier of round {ROUNDS[-1]}, held-out accuracy", box=box.SIMPLE_HEAD)
    for title in ("Questions", "Mean", "Least", "Most"):
        table.add_column(title, justify="left" if title == "Questions" else "right")
    for name in accuracies[0] if accuracies else ():
        scores = [each[name]["accuracy"] for each in accuracies if name in each]
        table.add_row(name, *(f"{value:.3f}" for value in (fmean(scores), min(scores), max(scores))))
    console().print(table)


def _round(run: Run, number: int, redo: bool, gpus: int) -> bool:
    """Whether the round was promoted. Raises Refused where neither its gate nor an alarm stopped it."""
    gate, alarm = (run.path / f"round-{number}" / name for name in ("gate.json", "dpo/alarm.json"))
    try:
        iterate.run_round(run, number, redo=redo, gpus=gpus)
    except Refused as refusal:
        stopped = gate if gate.is_file() else alarm
        if not stopped.is_file() or json.loads(stopped.read_text(encoding="utf-8")).get("promoted"):
            raise
        print(f"{refusal}\nthe demo goes on with {run.newest_captioner()}")
        return False
    return True


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Wall time of a stage in seconds, printed when it ends."""
    start = time.monotonic()
    yield
    times[name] = time.monotonic() - start
    print(f"-- {name}: {times[name]:.0f} s", flush=True)
