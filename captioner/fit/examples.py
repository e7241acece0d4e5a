"""What is learned from: images with what is said of them, or with preference pairs. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.records import Pair


@dataclass(frozen=True)
class Target:
    """One thing to learn of an image; ``text`` None is the soft prompt, or the caption prompt without one."""

    text: str | None
    answer: str
    silent: tuple[tuple[int, int], ...] = ()  # characters of the answer that are read and not learned


@dataclass(frozen=True)
class TrainingImages:
    """Images and what is learned of each.

    ``draw(index, rng)`` gives the targets of an image; it may choose among them with ``rng`` and nothing
    else. ``multi_view_share`` is the share of the *batches* that show all views, evenly spread: a mixed batch
    would pad its short rows to six views' length.
    """

    keys: Sequence[str]
    paths: Sequence[Path]
    draw: Callable[[int, random.Random], Sequence[Target]]
    multi_view_share: float = 1.0

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class PairedImages:
    """Preference pairs, the image of each key, and verdicts by key and normalised statement."""

    pairs: Sequence[Pair]
    paths: Mapping[str, Path]
    verdicts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of images."""
        return len({pair.key for pair in self.pairs})


def by_image(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs of each image that have the same chosen caption, in order of first appearance."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.key, pair.chosen), []).append(pair)
    return list(groups.values())
