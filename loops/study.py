"""captioner study NAME [--seeds N]: a claim of the method as a table, over seeds, with intervals.

Each seed has other scenes and other random numbers. Every finished arm is stored in
``RUN/NAME/seed-S/results.json``, so the same command continues a killed study.
Intervals are Student's t over seeds, 95 %.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

from captioner.config import Config, load
from captioner.errors import ConfigError
from captioner.runs import atomic_write_json, atomic_write_text

HOME = Path(__file__).with_name("studies")
STUDIES = tuple(sorted(file.stem for file in HOME.glob("[a-z]*.py")))
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
UNKNOWN = "–"

Results = dict[str, dict[str, float]]  # arm -> metric -> value


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*STUDIES, "all"], help="which claim")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table here, too")


def plan(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    return {"studies": _names(args), "seeds": args.seeds, "writes": str(args.run_dir)}


def run(config: Config, args: argparse.Namespace) -> None:
    if args.seeds < 1:
        raise ConfigError(f"{args.seeds} seeds", mend="--seeds 3")
    tables = []
    for name in _names(args):
        study = importlib.import_module(f"loops.studies.{name}")
        toml = HOME / f"{name}.toml"
        settings = load(toml, {}, config) if toml.is_file() and config == Config() else config
        results = [measure(study, settings, args.run_dir / name, seed) for seed in range(args.seeds)]
        tables.append(table(study, name, results))
        print(tables[-1])
    if args.out:
        atomic_write_text(args.out, "\n".join(tables))


def _names(args: argparse.Namespace) -> Sequence[str]:
    return STUDIES if args.name == "all" else (args.name,)


def measure(study: ModuleType, config: Config, home: Path, seed: int) -> Results:
    """Every arm of one seed, those measured before from their file."""
    work = home / f"seed-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"seed": config.seed + seed})
    done = work / "results.json"
    if done.is_file():
        stored = json.loads(done.read_text(encoding="utf-8"))
        if stored["config"] != config.model_dump(mode="json"):
            mend = "name another --run DIR, or restore the settings"
            raise ConfigError("this study was begun with other settings", where=str(done), mend=mend)
        results: Results = stored["arms"]
        if stored["complete"]:
            return results
    else:
        results = {}

    def store(complete: bool) -> None:
        content = {"config": config.model_dump(mode="json"), "arms": results, "complete": complete}
        atomic_write_json(done, content)

    for arm, metrics in study.measure(config, work):
        results[arm] = {key: float(value) for key, value in metrics.items()}
        store(complete=False)
        print(f"seed {seed}: {arm} done", flush=True)
    store(complete=True)
    return results


def table(study: ModuleType, name: str, results: Sequence[Results]) -> str:
    """The study as Markdown: mean over seeds and 95 % interval; against ``study.PAIRED``, paired by seed."""
    seeds = f"{len(results)} seed" + "s" * (len(results) > 1)
    question = (study.__doc__ or "").split("\n\n")[0].strip()
    lines = [
        f"## {name}",
        "",
        question,
        "",
        f"`captioner study {name} --seeds {len(results)}`: {seeds}; mean (95 % interval).",
    ]
    lines += _rows(study.COLUMNS, results)
    base = getattr(study, "PAIRED", None)
    if base and len(results) > 1:
        lines += [
            "",
            f"Difference to *{base}*, paired by seed:",
            *_rows(study.COLUMNS, [_minus(one, base) for one in results]),
        ]
    return "\n".join([*lines, ""])


def _minus(results: Results, base: str) -> Results:
    return {
        arm: {key: value - results[base][key] for key, value in metrics.items() if key in results[base]}
        for arm, metrics in results.items()
        if arm != base
    }


def _rows(columns: Mapping[str, str], results: Sequence[Results]) -> list[str]:
    arms = list(dict.fromkeys(arm for one in results for arm in one))
    lines = ["", "| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in arms:
        cells = [interval([one[arm][key] for one in results if key in one.get(arm, {})]) for key in columns]
        if set(cells) != {UNKNOWN}:
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t) as text."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return UNKNOWN
    mean = fmean(known)
    if len(known) == 1:
        return _number(mean)
    t = T_975[len(known) - 2] if len(known) - 2 < len(T_975) else 1.96
    half = t * stdev(known) / math.sqrt(len(known))
    return f"{_number(mean)} ({_number(mean - half)} to {_number(mean + half)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"
