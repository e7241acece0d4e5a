"""Scores of one captioner: a row of sums per image, and metrics that are a function of the summed rows.

So an image's own value, the corpus value and every bootstrap resample come from one formula. What is
undefined (no reference, no claim, no question) is NaN, never 0.

Shapes: N images, C columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from captioner.errors import DataError
from captioner.judges.metrics import Array, Interval, _interval, _ratio, resample_weights

Formula = Callable[[Mapping[str, Array]], dict[str, Array]]  # sums by column [...] -> every metric [...]
ratio = _ratio


@dataclass(frozen=True)
class Scores:
    """What one benchmark says of one captioner.

    ``counts`` is [N, C], a row per key of ``keys`` (rising) and a column per name of ``columns``.
    ``annotated`` is how many images the annotation files know: the captions may be of some of them.
    """

    name: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    counts: Array
    formula: Formula
    lower_is_better: frozenset[str]
    annotated: int

    def corpus(self) -> dict[str, float]:
        """Every metric of all images together."""
        return {name: float(value) for name, value in self._metrics(self.counts.sum(0)).items()}

    def per_image(self) -> dict[str, dict[str, float]]:
        """Every metric of each image alone, by key."""
        table = self._metrics(self.counts)
        return {
            key: {name: float(values[row]) for name, values in table.items()}
            for row, key in enumerate(self.keys)
        }

    def intervals(self, *, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
        """Every metric with its 95 % bootstrap interval over images."""
        draws = self._draws(resamples, seed)
        return {name: _interval(value, draws[name]) for name, value in self.corpus().items()}

    def to_json(self, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
        """The corpus values for a report; NaN becomes null."""
        intervals = self.intervals(resamples=resamples, seed=seed)
        return {
            "name": self.name,
            "images": len(self.keys),
            "annotated": self.annotated,
            "metrics": {name: interval.to_json() for name, interval in intervals.items()},
        }

    def _metrics(self, sums: Array) -> dict[str, Array]:
        return self.formula({name: sums[..., i] for i, name in enumerate(self.columns)})

    def _draws(self, resamples: int, seed: int) -> dict[str, Array]:
        return self._metrics(resample_weights(len(self.keys), resamples, seed) @ self.counts)


def tabulate(
    name: str,
    rows: Mapping[str, Mapping[str, float]],
    formula: Formula,
    *,
    columns: Sequence[str],
    annotated: int,
    lower_is_better: Sequence[str] = (),
) -> Scores:
    """Scores of rows of sums by image key; a column that a row lacks is 0. DataError for no row at all."""
    if not rows:
        raise DataError(f"{name}: no captions to score", fix="check that the caption file is not empty")
    keys = tuple(sorted(rows))
    counts = np.array([[rows[key].get(column, 0) for column in columns] for key in keys], dtype=np.float64)
    return Scores(name, keys, tuple(columns), counts, formula, frozenset(lower_is_better), annotated)


def difference(before: Scores, after: Scores, *, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """after - before of every metric, paired: both captioners see the same resampled images.

    DataError where the two are of different benchmarks or images.
    """
    if before.name != after.name:
        raise DataError(f"scores of {before.name} cannot be compared with scores of {after.name}")
    if odd := sorted(set(before.keys) ^ set(after.keys)):
        raise DataError(
            f"{before.name}: the captioners are compared on different images",
            where=", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else ""),
            fix="caption the same images with each of them",
        )
    old, new = before._draws(resamples, seed), after._draws(resamples, seed)
    start, end = before.corpus(), after.corpus()
    return {name: _interval(end[name] - start[name], new[name] - old[name]) for name in start}
