"""captioner demo: the whole story on the embedded scenes, minutes on a laptop CPU.

SFT, two rounds of self-correction with their gates, an evaluation of every captioner, captions of the test
images, and the report. The same command continues a killed demo.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from captioner.config import Config
from captioner.errors import Refused
from captioner.formats import resolve
from captioner.runs import Run, atomic_write_json
from loops import caption, evaluate, iterate, report, sft
from loops.iterate import arguments

TOML = Path(__file__).with_name("demo.toml")  # the command line reads it where no other is named
ROUNDS = (1, 2)


def run(config: Config, args: argparse.Namespace) -> int:
    """Every stage from where it stands. A round that its gate refuses ends the rounds, not the demo."""
    times: dict[str, float] = {}
    started = time.monotonic()
    with _timed(times, "sft"):
        sft.run(config, arguments(sft, args))
    run = Run.open(args.run_dir, config, create=False)
    for number in ROUNDS:
        with _timed(times, f"round {number}"):
            promoted = _round(run, number, args)
        if not promoted:
            break
    with _timed(times, "evaluation"):
        # the table is printed at the end, where it is looked for
        summary, _ = evaluate.evaluate(run, evaluate.run_entries(run, config), config.evaluate.data)
        atomic_write_json(run.path / "evaluation.json", summary)
    with _timed(times, "captions"):
        out = run.path / "captions"
        folder = resolve(config.evaluate.data, run)
        words = [
            str(folder),
            "--out",
            str(out),
            "--format",
            "jsonl",
            "--checkpoint",
            str(run.newest_captioner()),
        ]
        caption.run(config, arguments(caption, args, words))
    with _timed(times, "report"):
        report.run(config, arguments(report, args))
    evaluate.print_table(summary)
    print(f"captions: {out / 'captions.jsonl'}")
    print(f"report:   {run.path / 'report.html'}")
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    print(f"demo done in {time.monotonic() - started:.0f} s ({parts})")
    return 0


def _round(run: Run, number: int, args: argparse.Namespace) -> bool:
    """Whether the round was promoted. Raises Refused where it failed for another reason than its gate."""
    gate = run.path / f"round-{number}" / "gate.json"
    try:
        iterate.run_round(run, number, args)
    except Refused as refusal:
        if not gate.is_file() or json.loads(gate.read_text(encoding="utf-8"))["promoted"]:
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
