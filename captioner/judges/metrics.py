"""Caption metrics with bootstrap intervals over images: counting, and what corpora of counts say.

Nothing here loads torch. A caption becomes a row of counts (:class:`Counts`); every corpus metric is a
function of the *sums* of those rows (micro average: each statement and each fact weighs the same), so a
bootstrap resample is one row of a weight matrix and all resamples are one matrix product.

Shapes: N images, R resamples, C count columns (``COLUMNS``), S runs (seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from captioner.errors import DataError
from captioner.laboratory import Facts
from captioner.statements import comparable_statements, repeats

Array = NDArray[np.float64]

COLUMNS = (
    "captions",  # 1 per caption
    "statements",  # all statements, repeated ones included
    "repeated",  # statements that say again what this caption said before
    "unparsed",  # statements the parser does not understand: neither true nor false
    "true",  # distinct parsed statements that hold
    "false",  # distinct parsed statements that do not
    "hallucinating",  # 1 where the caption holds a false statement
    "facts",
    "recalled",
    "ended",  # 1 where the caption ended with the end token
    "tokens",
)
_AT = {name: i for i, name in enumerate(COLUMNS)}
METRICS = (
    "precision",
    "recall",
    "f1",
    "hallucinated",
    "hallucinating_captions",
    "parsed",
    "ended",
    "repeated",
    "tokens",
)
NEED_FACTS = frozenset(METRICS[:6])
HIGHER_IS_BETTER = frozenset({"precision", "recall", "f1", "parsed", "ended"})


@dataclass(frozen=True)
class Counts:
    """One caption's counts, or expected counts; ``judged`` is false where nothing tells what is true.

    ``groups`` holds (hits, total) by metric and grouping, e.g. ``groups["recall by size"]["small"]``.
    """

    key: str
    judged: bool
    values: tuple[float, ...]  # in the order of COLUMNS
    groups: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    def __getitem__(self, column: str) -> float:
        return self.values[_AT[column]]


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval; NaN where the metric is undefined (no statement, no fact)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """NaN becomes null: JSON knows no NaN."""
        return {k: None if math.isnan(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, row: Mapping[str, float | None]) -> Interval:
        return cls(
            **{k: math.nan if row[k] is None else float(row[k] or 0) for k in ("value", "low", "high")}
        )


def count(
    key: str,
    caption: str,
    known: Facts | None,
    *,
    finish_reason: str | None,
    tokens: int,
    prose: bool = False,
) -> Counts:
    """Counts of one caption; ``known`` is what is known of its image, None for nothing.

    Repeated statements count once for precision; statements of which nothing tells whether they hold are
    neither true nor false, and lower ``parsed`` instead.
    """
    said = comparable_statements(caption)
    row = dict.fromkeys(COLUMNS, 0.0)
    row |= {"captions": 1, "statements": len(said), "repeated": repeats(said)}
    row |= {"ended": int(finish_reason == "stop"), "tokens": tokens}
    if known is None:
        return Counts(key, False, tuple(row.values()))
    judged = known.judge(caption, prose=prose)
    row |= {"unparsed": judged.unparsed, "true": judged.true, "false": judged.false}
    row |= {
        "hallucinating": min(1.0, max(0.0, judged.false)),
        "facts": judged.facts,
        "recalled": judged.recalled,
    }
    groups: dict[str, Mapping[str, tuple[float, float]]] = {
        "precision by kind": {kind: (true, true + false) for kind, (true, false) in judged.by_kind.items()},
        "precision by size": judged.precision_by_size,
        "recall by kind": judged.recall_by_kind,
        "recall by size": judged.recall_by_size,
        "recall by rarity": judged.recall_by_group,
    }
    return Counts(key, True, tuple(row.values()), groups)


def _matrix(rows: Sequence[Counts]) -> Array:
    return np.array([r.values for r in rows], dtype=np.float64).reshape(len(rows), len(COLUMNS))


def _ratio(top: Array, bottom: Array) -> Array:
    """0/0 is undefined (NaN), never 0 or 1."""
    return np.divide(top, bottom, out=np.full(np.shape(bottom), np.nan), where=bottom > 0)


def from_sums(sums: Array) -> dict[str, Array]:
    """Corpus metrics from summed counts. sums: [..., C] -> every metric of METRICS as [...]."""
    at = {name: sums[..., i] for name, i in _AT.items()}
    said = at["true"] + at["false"]
    # a judge's corrected counts may leave their range by chance
    true, recalled = np.clip(at["true"], 0, said), np.clip(at["recalled"], 0, np.maximum(at["facts"], 0))
    precision, recall = _ratio(true, said), _ratio(recalled, at["facts"])
    return {
        "precision": precision,
        "recall": recall,
        "f1": np.where(precision + recall == 0, 0.0, _ratio(2 * precision * recall, precision + recall)),
        "hallucinated": _ratio(said - true, said),
        "hallucinating_captions": _ratio(at["hallucinating"], np.where(at["facts"] > 0, at["captions"], 0)),
        "parsed": _ratio(said, said + at["unparsed"]),
        "ended": _ratio(at["ended"], at["captions"]),
        "repeated": _ratio(at["repeated"], at["statements"]),
        "tokens": _ratio(at["tokens"], at["captions"]),
    }


def resample_weights(images: int, resamples: int, seed: int) -> Array:
    """How often each image is drawn in each bootstrap resample: [R, N], each row sums to N."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def _interval(value: float, draws: Array) -> Interval:
    """Percentile interval, 95 %; undefined draws (an empty denominator) are left out."""
    draws = draws[~np.isnan(draws)]
    if math.isnan(value) or not draws.size:
        return Interval(float(value), math.nan, math.nan)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def evaluate(rows: Sequence[Counts], *, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """Every metric of one captioner with its 95 % interval over images (Efron & Tibshirani 1993, ch. 13)."""
    return evaluate_runs([rows], resamples=resamples, seed=seed)


def evaluate_runs(
    runs: Sequence[Sequence[Counts]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Mean over S runs (seeds) of every metric. Runs and images are both resampled, so the interval holds
    the spread between seeds as well; with one run it is the interval over images alone."""
    values, draws = _draw(runs, resamples, seed)
    return {name: _interval(values[name], draws[name]) for name in METRICS}


def difference(
    before: Sequence[Counts], after: Sequence[Counts], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """after - before on the same images, paired: both see the same resamples. Keys in any order."""
    return difference_runs([before], [after], resamples=resamples, seed=seed)


def difference_runs(
    before: Sequence[Sequence[Counts]],
    after: Sequence[Sequence[Counts]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Mean over S runs of after - before; run s of one side is paired with run s of the other."""
    if len(before) != len(after) or not before:
        raise DataError(f"{len(before)} runs cannot be paired with {len(after)}", fix="give one of each seed")
    old, old_draws = _draw(before, resamples, seed)
    new, new_draws = _draw(after, resamples, seed)
    _same_keys(before[0], after[0])
    return {name: _interval(new[name] - old[name], new_draws[name] - old_draws[name]) for name in METRICS}


def _same_keys(one: Sequence[Counts], other: Sequence[Counts]) -> None:
    a, b = {r.key for r in one}, {r.key for r in other}
    if a != b or len(a) != len(one) or len(b) != len(other):
        odd = sorted(a ^ b)[:3]
        raise DataError(
            "captioners are compared on different images",
            where=", ".join(odd) or "a repeated key",
            fix="caption the same images with each of them",
        )


def _draw(
    runs: Sequence[Sequence[Counts]], resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, Array]]:
    """Mean metrics over S runs, and their R bootstrap draws. The draws depend on (S, N, R, seed) alone, which
    is what pairs two captioners."""
    if not runs or not runs[0]:
        raise DataError("no captions to evaluate", fix="check that the data set is not empty")
    for rows in runs[1:]:
        _same_keys(runs[0], rows)
    order = [sorted(rows, key=lambda r: r.key) for rows in runs]
    counts = np.stack([_matrix(rows) for rows in order])  # [S, N, C]
    weights = resample_weights(counts.shape[1], resamples, seed)  # [R, N]
    each = from_sums(np.einsum("rn,snc->rsc", weights, counts))  # every metric [R, S]
    picks = np.random.default_rng([seed, 1]).multinomial(
        len(runs), np.full(len(runs), 1 / len(runs)), resamples
    )
    share = picks / len(runs)  # [R, S], rows sum to 1
    whole = from_sums(counts.sum(1))  # every metric [S]
    means = {name: float(np.mean(value)) for name, value in whole.items()}
    return means, {name: np.where(share > 0, value * share, 0).sum(1) for name, value in each.items()}


def breakdown(
    rows: Sequence[Counts], *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Each grouping of ``Counts.groups`` with its intervals: {"recall by size": {"small": Interval}, ...}."""
    weights = resample_weights(len(rows), resamples, seed)  # [R, N]
    result: dict[str, dict[str, Interval]] = {}
    for grouping in sorted({name for row in rows for name in row.groups}):
        table = [row.groups.get(grouping, {}) for row in rows]
        result[grouping] = {}
        for group in dict.fromkeys(name for row in table for name in row):
            pairs = np.array(
                [row.get(group, (0, 0)) for row in table], dtype=np.float64
            )  # [N, 2]: hits, total
            draws = weights @ pairs
            value = _ratio(pairs.sum(0)[:1], pairs.sum(0)[1:])
            result[grouping][group] = _interval(float(value[0]), _ratio(draws[:, 0], draws[:, 1]))
    return result
