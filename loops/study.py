"""captioner study NAME [--seeds N]: a claim of the method as a table, over seeds, with intervals.

Each seed has other scenes and other random numbers. Every finished arm is stored in
``RUN/NAME/seed-S/results.json``, so the same command continues a killed study.
Intervals are Student's t over seeds, 95 %.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Literal, get_args

from captioner.config import Config, load
from captioner.errors import ConfigError
from captioner.files import atomic_write_json, atomic_write_text
from captioner.runs import Run, RunDir
from loops.stages import StagePlan

HOME = Path(__file__).with_name("studies")
Name = Literal["golden", "judge", "loss", "rounds", "tuning", "views", "all"]
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
UNKNOWN = "–"

Results = dict[str, dict[str, float]]  # arm -> metric -> value


def plan(run: Run, name: Name, out: Path | None = None) -> list[StagePlan]:
    """What is written."""
    outputs = [run.path / each for each in _names(name)] + ([out] if out else [])
    return [StagePlan("", {}, outputs=outputs)]


def study(run: RunDir, config: Config, name: Name, *, seeds: int = 3, out: Path | None = None) -> list[str]:
    """Measure a claim on scenes over seeds; returns the tables, as Markdown.

    Args:
        run: Directory that holds what is measured.
        config: Settings; where none but `seed` differs from its default, those of the study are taken.
        name: Which claim.
        seeds: Number of seeds, from `seed` on.
        out: Write the table to this file, too.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} must be at least 1", fix="--seeds 3")
    home = Run.path_of(run)
    tables = []
    for each in _names(name):
        measured = importlib.import_module(f"loops.studies.{each}")
        toml = HOME / f"{each}.toml"
        plain = config.model_copy(update={"seed": 0}) == Config()
        settings = load(toml, {}, config) if toml.is_file() and plain else config
        results = [measure(measured, settings, home / each, seed) for seed in range(seeds)]
        tables.append(table(measured, each, results, settings.seed))
        print(tables[-1])
    if out:
        atomic_write_text(out, "\n".join(tables))
    return tables


def _names(name: str) -> Sequence[str]:
    return get_args(Name)[:-1] if name == "all" else (name,)


def measure(study: ModuleType, config: Config, home: Path, seed: int) -> Results:
    """Every arm of one seed, those measured before from their file."""
    work = home / f"seed-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"seed": config.seed + seed})
    done = work / "results.json"
    if done.is_file():
        stored = json.loads(done.read_text(encoding="utf-8"))
        if stored["config"] != config.model_dump(mode="json"):
            fix = "name another --run DIR, or restore the settings"
            raise ConfigError("this study was begun with other settings", where=str(done), fix=fix)
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


def table(study: ModuleType, name: str, results: Sequence[Results], seed: int = 0) -> str:
    """The study as Markdown: mean over seeds and 95 % interval; against ``study.PAIRED``, paired by seed."""
    seeds = f"{len(results)} seed" + "s" * (len(results) > 1)
    question = (study.__doc__ or "").split("\n\n")[0].strip()
    first = f"--seed {seed} " if seed else ""
    lines = [
        f"## {name}",
        "",
        question,
        "",
        f"`captioner study {name} {first}--seeds {len(results)}`: {seeds}; mean (95 % interval).",
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
