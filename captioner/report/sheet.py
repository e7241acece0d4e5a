"""Captioners beside each other: every score of each with its interval, and the paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from captioner.config import Config
from captioner.errors import ConfigError
from captioner.judges import sets
from captioner.judges.base import Said
from captioner.judges.metrics import Array, Interval
from captioner.judges.scores import Scores, difference, ratio, tabulate
from captioner.progress import console
from captioner.report.report import cell

CAPTIONS = "captions"  # what most benchmarks are given
COLUMNS = {
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "hallucinated": "Halluc-\ninated",
    "ended": "Ended",
    "tokens": "Tokens",
}
SIDES = 3  # captioners of which every two have a column of differences


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside the numbers that every caption has."""

    against: Mapping[str, Path] = field(default_factory=dict)  # benchmark -> its annotations
    prefer: bool = False

    @property
    def answers(self) -> bool:
        """Whether the benchmarks are given something else than captions."""
        from captioner.judges import registry  # NLTK takes three seconds, which --help has no time for

        return any(registry.BENCHMARKS[name].given != CAPTIONS for name in self.against)


NOTHING = Wanted()


def parse(given: Iterable[str]) -> dict[str, Path]:
    """Benchmarks and their annotations, from ``NAME=PATH`` each. Raises ConfigError for others.

    One that reads captions does not go with one that reads answers: a file holds one of them.
    """
    given = list(given)
    if not given:
        return {}
    from captioner.judges import registry

    found = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or not path:
            raise ConfigError(f"{each!r} names no annotations", fix="--against NAME=PATH, as chair=coco")
        registry.of(name)
        found[name] = Path(path)
    kinds = {registry.BENCHMARKS[name].given: name for name in found}
    if len(kinds) > 1:
        reads = "; ".join(f"{name} reads {kind}" for kind, name in kinds.items())
        raise ConfigError(f"one file holds one of them: {reads}", fix="give the command once for each")
    return found


def score(
    config: Config,
    said: Sequence[Said],
    pairs: Sequence[tuple[Said, Said]],
    images: Mapping[str, Path],
    wanted: Wanted,
) -> list[dict[str, Any]]:
    """Every score of the captioners, for evaluation.json; ``images`` are the files by key, where known."""
    count = None
    if config.evaluate.tokenizer:
        from captioner.layouts import budget

        count, _ = budget.counter(config.evaluate.tokenizer, budget.UNLIMITED)
    captions = {side.name: {key: row.caption or "" for key, row in side.captions.items()} for side in said}
    names = [(one.name, other.name) for one, other in pairs]
    tables = [{side.name: sets.describe(side, count) for side in said}]
    tables += [_scored(config, name, path, captions) for name, path in wanted.against.items()]
    if config.evaluate.clip:
        from captioner.judges import clip

        device = "cpu" if config.model.device == "auto" else config.model.device
        model = clip.Contrastive(Path(config.evaluate.clip), device)
        tables.append({side: clip.clip(own, images, model) for side, own in captions.items()})
    found = [_beside(each, names, config) for each in tables]
    return found + [_preferred(config, captions, pair, images) for pair in names if wanted.prefer]


def score_answers(config: Config, sources: Sequence[str], wanted: Wanted) -> list[dict[str, Any]]:
    """The same of what benchmarks are given that read no captions."""
    named = sets.names(sources)
    given = dict(zip(named, map(sets.read, sources), strict=True))
    pairs = list(combinations(named, 2))
    return [
        _beside(_scored(config, name, path, given), pairs, config) for name, path in wanted.against.items()
    ]


def _scored(
    config: Config, name: str, path: Path, given: Mapping[str, Mapping[str, Any]]
) -> dict[str, Scores]:
    """Of one benchmark, by captioner; what needs a language model asks the tool LLM."""
    from captioner.judges import llm, registry

    if name != "fixed_budget":
        return {side: registry.score(name, own, path) for side, own in given.items()}
    engine = llm.engine_of(config.tool, name)
    try:
        options = {"answerer": llm.Reader(engine), "seed": config.seed}
        return {side: registry.score(name, own, path, **options) for side, own in given.items()}
    finally:
        engine.close()


def _beside(scores: Mapping[str, Scores], pairs: Sequence[tuple[str, str]], config: Config) -> dict[str, Any]:
    resamples, seed = config.evaluate.bootstrap, config.seed
    first = next(iter(scores.values()))
    changes = [
        (one, other, difference(scores[one], scores[other], resamples=resamples, seed=seed))
        for one, other in pairs
    ]
    return {
        "name": first.name,
        "annotated": first.annotated,
        "lower_is_better": sorted(first.lower_is_better),
        "captioners": [
            {"name": name, "metrics": one.to_json(resamples=resamples, seed=seed)["metrics"]}
            for name, one in scores.items()
        ],
        "differences": [
            {"from": one, "to": other, "metrics": {name: x.to_json() for name, x in change.items()}}
            for one, other, change in changes
        ],
    }


def _preferred(
    config: Config,
    captions: Mapping[str, Mapping[str, str]],
    pair: tuple[str, str],
    images: Mapping[str, Path],
) -> dict[str, Any]:
    """How often the tool LLM prefers the second captioner."""
    from captioner.judges import llm

    engine = llm.engine_of(config.tool, "--prefer")
    try:
        told = llm.prefer(engine, captions[pair[0]], captions[pair[1]], images)
    finally:
        engine.close()
    rows = {key: {"asked": 1.0} | ({str(answer): 1.0} if answer else {}) for key, answer in told.items()}
    scores = tabulate("prefer", rows, _wins, columns=("asked", "first", "second", "tie"), annotated=len(rows))
    return _beside({f"{pair[1]} over {pair[0]}": scores}, [], config)


def _wins(sums: Mapping[str, Array]) -> dict[str, Array]:
    answered = sums["first"] + sums["second"] + sums["tie"]
    return {
        "win rate": ratio(sums["second"] + sums["tie"] / 2, answered),
        "ties": ratio(sums["tie"], answered),
        "answered": ratio(answered, sums["asked"]),
    }


# ---------------------------------------------------------------- tables


def print_table(summary: Mapping[str, Any]) -> None:
    """Every captioner with its 95 % intervals, then what each step changed, paired."""
    out = console()
    judge = summary["judge"]
    images = (
        f"{summary['data']}, {summary['images']} images, judge: {judge['kind']}; 95 % bootstrap intervals"
    )
    table = Table(title=images, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("Captioner", min_width=9, max_width=16)
    for label in COLUMNS.values():
        table.add_column(label, justify="right", no_wrap=True)
    for one in [*summary["captioners"], *summary.get("baselines", [])]:
        cells = (cell(name, one["metrics"][name], short=True) for name in COLUMNS)
        table.add_row(one["name"], *(f"{value}\n[dim]{span}[/dim]" for value, span in cells))
    out.print(table)
    for note in judge["notes"]:
        out.print(f"{judge['kind']}: {note}", highlight=False)
    for step in summary["differences"]:
        parts = []
        for name in ("precision", "recall", "hallucinated"):
            x = Interval.from_json(step["metrics"][name])
            if x.value == x.value:  # not NaN: the metric is defined for both
                parts.append(f"{name} {x.value * 100:+.1f} ({x.low * 100:+.1f} to {x.high * 100:+.1f})")
        if parts:
            out.print(f"{step['from']} to {step['to']}, points: {', '.join(parts)}", highlight=False)


def print_scores(scores: Sequence[Mapping[str, Any]]) -> None:
    """A table of each score: a row per metric, a column per captioner and difference."""
    for each in scores:
        table = Table(title=each["name"], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("metric", no_wrap=True)
        changes = each["differences"]
        if len(each["captioners"]) > SIDES:
            changes = [one for one in changes if one["from"] == each["captioners"][0]["name"]]
        columns = [(one["name"], one["metrics"], "") for one in each["captioners"]]
        columns += [(f"{one['to']} - {one['from']}", one["metrics"], "+") for one in changes]
        for name, _, _ in columns:
            table.add_column(name, justify="right")
        for metric in columns[0][1]:
            cells = (_cell(Interval.from_json(metrics[metric]), sign) for _, metrics, sign in columns)
            table.add_row(metric, *cells)
        console().print(table)


def _cell(x: Interval, sign: str) -> str:
    if x.value != x.value:
        return "-"
    form = f"{sign}.{3 if abs(x.value) < 10 else 1}f"
    span = "" if x.low != x.low else f"\n[dim]{x.low:{form}} to {x.high:{form}}[/dim]"
    return f"{x.value:{form}}{span}"
