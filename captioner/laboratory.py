"""Laboratories: sources of images whose facts are known exactly. Ours comes in as any plug-in does.

A plug-in offers an object of the protocol :class:`Laboratory` as an entry point of the group
``captioner.laboratories``, in its ``pyproject.toml``::

    [project.entry-points."captioner.laboratories"]
    rooms = "rooms.captions:LABORATORY"

Then ``rooms:SPLIT:COUNT[:OFFSET]`` names images of it wherever images are named, and the exact judge, the
planted claims of a round and the report know what is true of them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from captioner.errors import DataError

GROUP = "captioner.laboratories"
OURS = EntryPoint("scenes", "captioner.lab.grid:LABORATORY", GROUP)


@dataclass
class Judgement:
    """How one caption compares with what is known of its image. Counts are of distinct statements;
    expected counts where only probabilities are known."""

    statements: int  # all, repeated and unparsed ones included
    unparsed: int  # neither true nor false, as far as is known
    duplicates: int
    true: float = 0
    false: float = 0
    facts: float = 0
    recalled: float = 0
    by_kind: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # kind -> (true, false)
    # size of the object that a statement is about -> (true, all); about nothing that is there: none
    precision_by_size: dict[str, tuple[int, int]] = field(default_factory=dict)
    recall_by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> (recalled, facts)
    recall_by_size: dict[str, tuple[int, int]] = field(default_factory=dict)  # object size -> the same
    recall_by_group: dict[str, tuple[int, int]] = field(default_factory=dict)  # common/rare/... -> the same


class Facts(Protocol):
    """What is known of one image."""

    def holds(self, statement: str) -> bool | None:
        """Whether a statement is true; None where nothing tells."""
        ...

    def judge(self, caption: str, *, prose: bool = False) -> Judgement:
        """A caption in shorthand, or in prose, against the facts."""
        ...


class Laboratory(Protocol):
    """A source of images with known facts and a language of captions of its own."""

    splits: Collection[str]
    directions: Mapping[str, str]  # its words for places in the picture -> plain ones, such as `top left`

    def write(self, split: str, count: int, folder: Path, *, offset: int = 0, seed: int = 0) -> None:
        """Make an image folder with captions, facts and questions; the same for the same arguments."""
        ...

    def read(self, facts: str) -> Facts | None:
        """The facts of an image from its metadata; None where another wrote them."""
        ...

    def kind_of(self, statement: str) -> str:
        """The kind of fact that a statement of its language states; "" for what is none."""
        ...

    def slot_of(self, statement: str) -> str:
        """What only one statement can hold of an image; "" where statements do not exclude each other."""
        ...

    def claims(self, statements: Sequence[str], facts: str, rng: random.Random) -> list[dict[str, Any]]:
        """Yes/no questions (question, answer, kind, stratum) about an image: the statements of its captions
        as they stand and with a word changed, as far as the facts tell."""
        ...


@dataclass(frozen=True)
class Part:
    """Images of a laboratory: ``count`` of a split from number ``offset`` on."""

    laboratory: Laboratory
    scheme: str
    split: str
    count: int
    offset: int = 0

    def next(self, times: int) -> str:
        """The source that lies so many times its own length behind this one."""
        return f"{self.scheme}:{self.split}:{self.count}:{self.offset + times * self.count}"


@cache
def laboratories() -> dict[str, Laboratory]:
    """Every laboratory by its scheme."""
    return {entry.name: entry.load() for entry in (OURS, *entry_points(group=GROUP))}


def plainly(statement: str) -> str:
    """A statement with the words that laboratories have for places put plainly, such as `top left`."""
    words = {word: plain for each in laboratories().values() for word, plain in each.directions.items()}
    pattern = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.sub(
        rf"\b(?:{pattern})\b", lambda match: words[match[0].lower()], statement, flags=re.IGNORECASE
    )


def of_source(source: str) -> Laboratory | None:
    """The laboratory that a source names by its scheme, if it names one."""
    scheme, colon, _ = source.partition(":")
    return laboratories().get(scheme) if colon else None


def parse(source: str) -> Part | None:
    """What ``SCHEME:SPLIT:COUNT[:OFFSET]`` names; None for the sources of others.

    Raises DataError where a laboratory has no such images.
    """
    laboratory = of_source(source)
    if laboratory is None:
        return None
    scheme, split, *numbers = source.split(":")
    form = f"{scheme}:SPLIT:COUNT"
    fix = f"write {form} or {form}:OFFSET; splits: {', '.join(laboratory.splits)}"
    if split not in laboratory.splits:
        raise DataError(f"no {scheme} split {split!r}", where=source, fix=fix)
    if len(numbers) not in (1, 2) or not all(number.isdecimal() for number in numbers):
        raise DataError("COUNT and OFFSET are whole numbers", where=source, fix=fix)
    count, offset = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
    if count < 1:
        raise DataError(f"no {scheme} asked for", where=source, fix=fix)
    return Part(laboratory, scheme, split, count, offset)
