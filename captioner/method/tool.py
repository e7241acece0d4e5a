"""The tool LLM: rewrite captions, merge sampled ones into statements, turn each statement into a question.

:class:`Rules` is the embedded default. It knows no vocabulary but a few word lists, so it serves any
shorthand caption. In doubt claims stay apart: "two cats" and "a cat", "cats" and "cat" are different ones.
:class:`captioner.method.llm.LLM` asks a model on a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from captioner import prompts
from captioner.engines import NoAnswer
from captioner.method import kinds
from captioner.method.shorthand import shorthand
from captioner.statements import normalise, split_statements, visible

KINSHIP = 4


@dataclass(frozen=True)
class Statement:
    """One thing that captions state, in the wording most of them use."""

    text: str
    candidates: tuple[int, ...]  # indices of the captions that state it, rising


@dataclass(frozen=True)
class Question:
    text: str
    expected: str  # "yes" or "no": the answer that confirms the statement


class ToolFailed(Exception):
    """The tool LLM gave no good answer in all its tries; the message is the reason."""


class Tool(Protocol):
    """What the golden loop asks of a tool LLM. All may raise :class:`ToolFailed` for one image or caption."""

    def prepare(self, images: Sequence[Sequence[str]]) -> None:
        """Answer for many images, given the captions of each; ``merge`` and the others then find it done."""

    def reformulate(self, captions: Iterable[str]) -> Iterator[str | NoAnswer]:
        """Shorthand for each caption, in order."""

    def close(self) -> None: ...
    def merge(self, captions: Sequence[str]) -> list[Statement]: ...
    def checkable(self, statement: str) -> bool: ...
    def decompose(self, statement: str) -> Question: ...
    def kind(self, statement: str) -> str: ...
    def slot(self, statement: str) -> str: ...


class Rules:
    """The embedded tool LLM: deterministic rules, no model.

    ``kind_of`` gives the kind of a statement where the source of the images knows it exactly (the scenes do);
    without it :mod:`captioner.method.kinds` tells it. ``slot_of`` gives what only one statement can hold of.
    All answer "" where they do not know.
    """

    def __init__(
        self, kind_of: Callable[[str], str] | None = None, slot_of: Callable[[str], str] | None = None
    ):
        self._kind_of, self._slot_of = kind_of, slot_of

    def prepare(self, images: Sequence[Sequence[str]]) -> None:
        """Nothing: rules take no time."""

    def close(self) -> None:
        """Nothing is held."""

    def reformulate(self, captions: Iterable[str]) -> Iterator[str | NoAnswer]:
        """The checkable statements of each caption, see :func:`captioner.method.shorthand.shorthand`."""
        for caption in captions:
            kept = [statement for statement in shorthand(caption) if self.checkable(statement)]
            yield ", ".join(kept) or NoAnswer("nothing in the caption can be seen")

    def merge(self, captions: Sequence[str]) -> list[Statement]:
        """The union of the captions' statements without near-duplicates, in their natural order.

        The order is the one that contradicts the fewest captions, and what shares words stands together. So
        what belongs together stays together, which it does not when all are sorted by their median position.
        Statements that exclude each other share a place, those of most captions first.
        """
        wordings: dict[str, Counter[str]] = {}
        stated: dict[str, set[int]] = {}
        places: dict[str, dict[str, None]] = {}
        sequences: list[list[str]] = []
        for index, caption in enumerate(captions):
            sequence = []
            for text in split_statements(caption):
                key = normalise(text)
                wordings.setdefault(key, Counter())[text] += 1
                stated.setdefault(key, set()).add(index)
                sequence.append(self.slot(key) or key)
                places.setdefault(sequence[-1], {})[key] = None
            sequences.append(list(dict.fromkeys(sequence)))
        # Counter.most_common keeps first-seen order among equals, so the wording is deterministic.
        return [
            Statement(wordings[key].most_common(1)[0][0], tuple(sorted(stated[key])))
            for place in _interleave(sequences)
            for key in sorted(places[place], key=lambda key: -len(stated[key]))
        ]

    def checkable(self, statement: str) -> bool:
        """Whether looking can confirm it.

        Where the language of the captions is known, text that it cannot produce cannot: a verifier says yes
        to nonsense of a form that it was not taught.
        """
        return visible(statement) and (self._kind_of is None or self._kind_of(statement) != "")

    def decompose(self, statement: str) -> Question:
        """One yes/no question; a negated statement ("no people") keeps its form, so "yes" confirms it."""
        return Question(prompts.load("question", statement=statement), "yes")

    def kind(self, statement: str) -> str:
        if self._kind_of is not None:
            return self._kind_of(statement)
        return kinds.kind_of(statement)

    def slot(self, statement: str) -> str:
        return self._slot_of(statement) if self._slot_of is not None else ""


def _kinship(one: str, other: str) -> int:
    return KINSHIP * len(set(one.split()) & set(other.split()))


def _interleave(sequences: Sequence[Sequence[str]]) -> list[str]:
    """One order of all statements: those of most sequences first, each goes where it contradicts fewest.

    A place costs every sequence that says the statement on the other side of one already placed (greedy
    insertion of a Kemeny consensus); a word in common with a neighbour counts as KINSHIP sequences.
    """
    count = Counter(key for sequence in sequences for key in sequence)
    before: Counter[tuple[str, str]] = Counter()
    follows: Counter[tuple[str, str]] = Counter()
    for sequence in sequences:
        for at, key in enumerate(sequence):
            before.update((key, later) for later in sequence[at + 1 :])
            follows.update((earlier, key) for earlier in sequence[max(at - 1, 0) : at])
    merged: list[str] = []
    for key in sorted(count, key=count.__getitem__, reverse=True):  # stable: first seen, first placed
        kin = [_kinship(key, other) for other in merged]
        parted = [0, *(_kinship(one, other) for one, other in pairwise(merged)), 0]
        agreement = sum(before[key, other] - before[other, key] for other in merged)
        places = [(agreement + sum(kin[:1]), 0, 0)]
        for at, other in enumerate(merged):
            agreement += 2 * (before[other, key] - before[key, other])
            near = sum(kin[at : at + 2]) - parted[at + 1]
            places.append((agreement + near, follows[other, key], -at - 1))
        merged.insert(-max(places)[2], key)
    return merged
