"""What every judge of captions does: it compares two captioners on the same images, and names its kind.

``facts``: exact, where it is known what is in the images. ``checked``: claims that people answered.
``verifier``: a question answerer that did not make what the captioner learned from. ``none``: nobody tells
what is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from captioner.judges import metrics
from captioner.judges.metrics import Counts, Interval
from captioner.records import CaptionRow
from captioner.statements import comparable_statements

Kind = Literal["facts", "checked", "verifier", "none"]


@dataclass(frozen=True)
class Said:
    """The captions of one captioner, one row per image; failed rows are not judged."""

    name: str
    rows: Sequence[CaptionRow]
    prose: bool = False  # it was asked for prose, as the base is

    @property
    def captions(self) -> dict[str, CaptionRow]:
        """The rows with a caption, by key."""
        return {row.key: row for row in self.rows if row.caption is not None}


@dataclass(frozen=True)
class Comparison:
    """Two captioners on the same images: scores and after - before, with 95 % intervals.

    ``difference`` also has ``even_recall``: recall where the longer caption of each image is cut to as many
    statements as the shorter has.
    """

    judge: Kind
    before: Mapping[str, Interval]
    after: Mapping[str, Interval]
    difference: Mapping[str, Interval]
    notes: tuple[str, ...] = ()  # what the judge's word rests on, a line each


class Judge(Protocol):
    """Tells what is true of images."""

    kind: Kind
    notes: tuple[str, ...]

    def count(self, said: Said) -> list[Counts]:
        """The counts of each caption; expected ones where the judge gives probabilities."""
        ...

    def compare(self, before: Said, after: Said, *, resamples: int = 2000, seed: int = 0) -> Comparison:
        """Both captioners, paired by image. Raises DataError where their images differ."""
        ...


class NoJudge:
    """Counts length, endings and repetition, and knows nothing of truth."""

    kind: Kind = "none"

    def __init__(self, why: str):
        self.notes: tuple[str, ...] = (why,)

    def count(self, said: Said) -> list[Counts]:
        return [counted(row, None) for row in said.captions.values()]

    def compare(self, before: Said, after: Said, *, resamples: int = 2000, seed: int = 0) -> Comparison:
        return compared(self, before, after, resamples=resamples, seed=seed)


def counted(row: CaptionRow, known: metrics.Facts | None, *, prose: bool = False) -> Counts:
    """The counts of a caption by what is known of its image."""
    text, tokens = row.caption or "", row.tokens or 0
    return metrics.count(row.key, text, known, finish_reason=row.finish_reason, tokens=tokens, prose=prose)


def compared(judge: Judge, before: Said, after: Said, *, resamples: int, seed: int) -> Comparison:
    """The comparison that a judge's counts give."""
    old, new = judge.count(before), judge.count(after)
    change = metrics.difference(old, new, resamples=resamples, seed=seed)
    one, other = map(judge.count, evenly(before, after))
    even = metrics.difference(one, other, resamples=resamples, seed=seed)
    return Comparison(
        judge.kind,
        metrics.evaluate(old, resamples=resamples, seed=seed),
        metrics.evaluate(new, resamples=resamples, seed=seed),
        {**change, "even_recall": even["recall"]},
        judge.notes,
    )


def evenly(before: Said, after: Said) -> tuple[Said, Said]:
    """Both with the longer caption of each image cut behind as many statements as the shorter has."""
    one, other = before.captions, after.captions
    cut: tuple[list[CaptionRow], list[CaptionRow]] = [], []
    for key in [key for key in one if key in other]:
        both = [comparable_statements(row.caption or "") for row in (one[key], other[key])]
        length = min(map(len, both))
        for side, row, said in zip(cut, (one[key], other[key]), both, strict=True):
            side.append(row.model_copy(update={"caption": ", ".join(said[:length])}))
    return replace(before, rows=cut[0]), replace(after, rows=cut[1])
