"""Claims whose answers are known, from what a user has: facts, or captions and questions of photographs.

What is true comes from a reference (its caption, its questions answered "yes") and, where the captioner said
it too, in the words of its samples. What is false are true claims with one word or phrase swapped, and claims
of other images; only such as nothing said about the image supports. Pure functions, no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.files import row_seed
from captioner.laboratory import Laboratory
from captioner.method import kinds, qa
from captioner.sources.folder import ImageRow
from captioner.statements import normalise, split_statements, visible

VOTES = 2  # samples that must state what a reference states
SWAPS = 3  # false claims made of a true one
GAP = 1  # words that a caption may put between two of a claim
_PARTING = """and or but while with without no not of from"""
_JOINING = """a an the is are was were be being in on at to by it its there this that"""
_BREAKS, _SMALL = frozenset(_PARTING.split()), frozenset(_JOINING.split())


@dataclass(frozen=True)
class Reference:
    """An image of which something is known."""

    key: str
    path: Path
    true: Sequence[str]  # statements that hold
    false: Sequence[str] = ()  # statements that do not
    samples: Sequence[str] = field(default_factory=list)  # captions of the captioner


def reference_of(row: ImageRow, samples: Sequence[str] = ()) -> Reference | None:
    """What an image's caption and yes/no statements tell; None where it has neither."""
    asked = [q for q in row.questions or [] if qa.is_yes_no(q) and not q["question"].rstrip().endswith("?")]
    true = [text for text in split_statements(row.caption or row.prose or "") if visible(text)]
    true += [question["question"] for question in asked if question["answer"] == "yes"]
    false = [question["question"] for question in asked if question["answer"] == "no"]
    return Reference(row.key, row.path, true, false, samples) if true or false else None


def from_references(
    known: Sequence[Reference], count: int, seed: int, kind_of: Callable[[str], str] = kinds.kind_of
) -> list[ImageRow]:
    """At most ``count`` claims about each image, over all images of every kind as many true as false ones.

    Strata: ``stated`` (by the reference, and by ``VOTES`` samples where there are samples), ``swap``, ``other
    image``, ``answered`` (a question of the user's that says "no").
    """
    true = [_true(each) for each in known]
    asked: list[list[qa.Question]] = []
    for index, each in enumerate(known):
        rng = random.Random(row_seed(seed, "planted", each.key))
        others = [text for at, texts in enumerate(true) if at != index for text in texts]
        false = [*_swapped(true[index], each), *_others(rng.sample(others, min(len(others), 40)), each)]
        false += [(text, "answered") for text in each.false]
        answered: dict[str, qa.Question] = {}
        for text, answer, stratum in (
            *((text, "yes", "stated") for text in true[index]),
            *((text, "no", stratum) for text, stratum in false),
        ):
            question = {"question": text, "answer": answer, "kind": kind_of(text), "stratum": stratum}
            answered.setdefault(normalise(text), question)
        asked.append(_drawn(list(answered.values()), count, rng))
    return [
        ImageRow(each.key, each.path, questions=[dict(question) for question in own])
        for each, own in zip(known, qa.balance(asked, seed), strict=True)
        if own
    ]


def _drawn(questions: list[qa.Question], count: int, rng: random.Random) -> list[qa.Question]:
    """At most ``count``, as many true as false ones where there are."""
    sides = [[q for q in questions if q["answer"] == answer] for answer in qa.ANSWERS]
    half = min(count // 2, max(map(len, sides)))
    return [question for side in sides for question in rng.sample(side, min(half, len(side)))]


def _true(known: Reference) -> list[str]:
    """What reference and samples both state, in the samples' words; without samples, what it states."""
    if not known.samples:
        return list(dict.fromkeys(known.true))
    votes: dict[str, list[str]] = {}
    for sample in known.samples:
        for key, text in {normalise(text): text for text in split_statements(sample)}.items():
            votes.setdefault(key, []).append(text)
    needed = min(VOTES, len(known.samples))
    often = [texts[0] for texts in votes.values() if len(texts) >= needed]
    return [text for text in often if visible(text) and any(says(line, text) for line in known.true)]


def _swapped(true: Sequence[str], known: Reference) -> Iterator[tuple[str, str]]:
    """True claims with something exchanged that nobody says of the image."""
    heard = _heard(known)
    for text in true:
        made = [other for other in kinds.swaps(text) if not _words(other) - _words(text) & heard]
        rng = random.Random(row_seed(0, known.key, text))
        for other in rng.sample(made, min(SWAPS, len(made))):
            if not any(says(line, other) for line in (*known.true, *known.samples)):
                yield other, "swap"


def _others(texts: Sequence[str], known: Reference) -> Iterator[tuple[str, str]]:
    """Claims of other images about things that nobody names in this one."""
    heard = _heard(known)
    for text in texts:
        words = _words(text)
        if words and not words & heard and not set(kinds.objects(text)) & set(_objects(known)):
            yield text, "other image"


def _heard(known: Reference) -> set[str]:
    return {word for line in (*known.true, *known.samples) for word in _words(line)}


def _objects(known: Reference) -> list[str]:
    return [name for line in (*known.true, *known.samples) for name in kinds.objects(line)]


def _words(text: str) -> set[str]:
    return {_stem(word) for word in re.findall(r"\w+", normalise(text))} - _SMALL - _BREAKS


def _stem(word: str) -> str:
    """Singular and plural, and the forms of a verb, mostly agree."""
    return re.sub(r"(?:ing|es|ed|s)$", "", word) if len(word) > 4 else word.rstrip("s") or word


def says(text: str, claim: str) -> bool:
    """Whether a caption says a claim: its words in their order, at most ``GAP`` others between two of them.

    Never across a word that parts two things (``_BREAKS``), unless the claim has it too: "a cup and a blue
    bowl" does not say "blue cup". Cautious: much that a reader would find said is not found.
    """
    wanted = [_stem(word) for word in re.findall(r"\w+", normalise(claim)) if word not in _SMALL]
    return bool(wanted) and any(_in_order(line, wanted) for line in split_statements(text))


def _in_order(line: str, wanted: Sequence[str]) -> bool:
    words = [_stem(word) for word in re.findall(r"\w+", normalise(line)) if word not in _SMALL]
    for start, word in enumerate(words):
        if word != wanted[0] or (start and words[start - 1] in ("no", "not", "without")):
            continue
        at, place = start, 1
        while place < len(wanted):
            near = words[at + 1 : at + 2 + GAP]
            if wanted[place] not in near or set(near[: near.index(wanted[place])]) & _BREAKS:
                break
            at, place = at + 1 + near.index(wanted[place]), place + 1
        if place == len(wanted):
            return True
    return False


# ---------------------------------------------------------------- from facts


def from_facts(
    lab: Laboratory, statements: Sequence[str], facts: str, count: int, rng: random.Random
) -> list[qa.Question]:
    """At most ``count`` claims about an image of a laboratory, of every kind as many true as false ones.

    From the statements of its captions as they stand and with one word changed; its facts judge all of them,
    and what they cannot judge is no claim.
    """
    return qa.draw_balanced(lab.claims(statements, facts, rng), count, rng)
