"""A balanced set of yes/no questions from captions: what they state, and the same made false.

Every true statement of an image goes with one false statement of its kind, so that yes and no are equally
many in each image and in each kind. False ones come from

- ``swap``: one word or phrase of the statement changed (:func:`captioner.method.kinds.swaps`),
- ``popular``, ``adversarial`` and ``random``: a thing that the caption does not name, one of those that most
  captions name, that most often stand beside what this one names, or any (POPE, arXiv 2305.10355),
- ``similar`` and ``other``: a statement of an image with a similar caption, or of any.

A model that never sees the images must not tell them apart. So false statements are chosen such that every
word stands in true and in false ones equally often, and pairs that a classifier of words alone, fitted to
other images, still tells apart with most confidence leave (adversarial filtering, arXiv 1808.05326). What it
reaches on the rest is reported.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from captioner.method import kinds
from captioner.method.shorthand import shorthand
from captioner.statements import normalise, visible

LONGEST = 16  # words of a statement
CANDIDATES = 12  # false statements that one is chosen from
ROUNDS = 4  # of choosing false statements again, and of pairs leaving
FOLDS = 5
NEIGHBOURS = 4  # images with similar captions
OTHERS = 12  # and with any
LEAVE = 0.3  # share of the pairs that may leave for what their words tell
FAIR = 0.55  # blind accuracy above which pairs leave
# what may well be there although no caption names it
BACKDROP = frozenset(
    (
        *("wall", "window", "door", "roof", "stairs", "tree", "grass", "house", "table", "chair", "shirt"),
        *("trousers", "shoe", "jacket", "cloud", "sun", "river", "mountain", "street", "water", "man"),
        *("woman", "hat", "lamp", "glass", "curtain", "rug", "book"),
    )
)


@dataclass(frozen=True)
class Pair:
    """A true statement of an image, and what it may be asked against."""

    key: str
    kind: str
    true: str
    candidates: tuple[tuple[str, str], ...]  # (false statement, stratum)
    chosen: int = 0

    @property
    def false(self) -> tuple[str, str]:
        return self.candidates[self.chosen]


@dataclass(frozen=True)
class Asked:
    """The questions of each image, and what a model without the images reaches on them."""

    questions: dict[str, list[dict[str, str]]]
    blind_before: float  # accuracy of words alone, false statements drawn at random
    blind: float  # and as they are
    by_kind: dict[str, tuple[int, float]]  # kind -> questions, blind accuracy
    by_stratum: dict[str, int]
    left_out: int  # pairs that left because their words told the answer


def ask(captions: Mapping[str, str], per_image: int = 16, seed: int = 0) -> Asked:
    """At most ``per_image`` questions about each image, given its caption by its key.

    Blind accuracy is that of a logistic regression on words and pairs of words, cross-validated by image;
    1/2 is chance. NaN where there are too few images to tell.
    """
    pairs = _pairs(captions, max(1, per_image // 2), seed)
    rng = random.Random(seed)
    pairs = [replace(pair, chosen=rng.randrange(len(pair.candidates))) for pair in pairs]
    before = float(np.mean(_right(pairs, _blind(pairs, seed)))) if pairs else float("nan")
    pairs, left_out = _balance(pairs, seed)
    told = _blind(pairs, seed + 1)  # other folds than those that chose
    right = _right(pairs, told)
    kinds_of = np.array([pair.kind for pair in pairs])
    by_kind = {
        kind: (2 * int((kinds_of == kind).sum()), float(right[kinds_of == kind].mean()))
        for kind in kinds.KINDS
        if (kinds_of == kind).any()
    }
    questions: dict[str, list[dict[str, str]]] = {}
    for pair in pairs:
        text, stratum = pair.false
        questions.setdefault(pair.key, []).extend(
            {"question": said, "answer": answer, "kind": pair.kind, "stratum": which}
            for said, answer, which in ((pair.true, "yes", "positive"), (text, "no", stratum))
        )
    for own in questions.values():
        rng.shuffle(own)
    strata = Counter(pair.false[1] for pair in pairs)
    blind = float(right.mean()) if pairs else float("nan")
    return Asked(questions, before, blind, by_kind, dict(strata), left_out)


# ---------------------------------------------------------------- statements, true and false


@dataclass(frozen=True)
class _Told:
    """What a caption says."""

    statements: list[str]
    bare: frozenset[str]  # of the statements, the things that it only names
    words: frozenset[str]
    things: frozenset[str]


def _told(caption: str) -> _Told:
    said = [text for text in shorthand(caption) if visible(text) and 1 <= len(text.split()) <= LONGEST]
    things = kinds.named_objects(caption)
    named = {normalise(text) for text in said}
    bare = [word for word, _ in things if word not in named]
    return _Told(
        said + bare, frozenset(bare), frozenset(_words(caption)), frozenset(first for _, first in things)
    )


def _words(text: str) -> set[str]:
    """The words of a text, plural and singular alike, and the first of each word's group."""
    found = {word.rstrip("s") or word for word in re.findall(r"[\w-]+", text.casefold())}
    return found | {kinds.first_of(word) for word in re.findall(r"[\w-]+", text.casefold())}


def _pairs(captions: Mapping[str, str], per_image: int, seed: int) -> list[Pair]:
    told = {key: _told(caption) for key, caption in captions.items()}
    texts = [
        quoted for caption in captions.values() for quoted in re.findall(r'["“]([^"”\n]{2,40})["”]', caption)
    ]
    absent, similar, everyone = _Absent(told), _similar(captions), list(told.values())
    asked: Counter[str] = Counter()
    found = []
    for key, own in told.items():
        rng = random.Random(f"{seed} {key}")
        made = []
        near = [told[other] for other in similar[key]]
        far = [one for one in rng.sample(everyone, min(OTHERS, len(everyone))) if one is not own]
        for statement in own.statements:
            for kind, candidates in _false(statement, own, absent, near, far, texts, rng):
                chosen = rng.sample(candidates, min(CANDIDATES, len(candidates)))
                made.append(Pair(key, kind, statement, tuple(chosen)))
        rng.shuffle(made)
        used: set[str] = set()
        others = 0  # than objects, which there are most of
        for pair in sorted(made, key=lambda pair: (pair.kind == "object", asked[pair.kind])):
            full = pair.kind == "object" and len(used) >= max(2, 2 * others)
            if len(used) < per_image and pair.true not in used and not full:
                used.add(pair.true)
                others += pair.kind != "object"
                asked[pair.kind] += 1
                found.append(pair)
    return found


def _false(
    statement: str,
    own: _Told,
    absent: _Absent,
    similar: Sequence[_Told],
    others: Sequence[_Told],
    texts: Sequence[str],
    rng: random.Random,
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """By kind, the false statements that a true one may go with."""
    short = statement in own.bare
    for kind in ("object",) if short else kinds.KINDS:
        quoted = rng.sample(texts, min(len(texts), 8)) if kind == "text" else ()
        made = [
            (other, "swap")
            for other in kinds.swaps(statement, kind, quoted)
            if not _said(statement, other, own)
        ]
        if short:
            made = [(text, stratum) for text, stratum in made if not {*_objects(text)} & BACKDROP]
            made += absent.of(own, rng)
        elif kind == _kind_of(statement):
            made += [
                (other, stratum)
                for stratum, ones in (("other", others), ("similar", similar))
                for one in ones
                for other in one.statements
                if other not in one.bare and _kind_of(other) == kind and _foreign(other, own)
            ]
        made = [(text, stratum) for text, stratum in dict(made).items() if text not in own.statements]
        if made:
            yield kind, made


def _said(statement: str, other: str, own: _Told) -> bool:
    """Whether the caption itself says what the swap put in, so that it may be true."""
    new = kinds.swapped_words(statement, other)
    return bool(new) and {kinds.first_of(word) for word in new} <= own.words


def _foreign(statement: str, own: _Told) -> bool:
    """Whether a statement names a thing that this image's caption does not, and that would be named."""
    things = set(_objects(statement))
    return bool(things - own.things - BACKDROP) and not things & own.things & BACKDROP


class _Absent:
    """Things that captions name, by how many do and beside what."""

    def __init__(self, told: Mapping[str, _Told]):
        self.count: Counter[str] = Counter()
        self.beside: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for one in told.values():
            self.count.update(one.things)
            for thing in one.things:
                self.beside[thing].update(one.things - {thing})
        self.all = kinds.all_objects()

    def of(self, own: _Told, rng: random.Random) -> list[tuple[str, str]]:
        """Things that this caption does not name, with the strata they are of."""
        near: Counter[str] = Counter()
        for thing in own.things:
            near.update(self.beside[thing])

        def free(names: Iterable[str]) -> list[str]:
            return [name for name in names if name not in own.things | BACKDROP and name not in own.words]

        popular = free(name for name, _ in self.count.most_common(40))[:6]
        adversarial = free(name for name, _ in near.most_common(30))[:4]
        others = rng.sample(self.all, 8)
        return [
            *((name, "random") for name in free(others)[:2]),
            *((name, "popular") for name in popular),
            *((name, "adversarial") for name in adversarial),
        ]


def _similar(captions: Mapping[str, str]) -> dict[str, list[str]]:
    """The images with the most similar captions, by the words they share (TF-IDF)."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    keys = list(captions)
    if len(keys) < 2 or not any(re.search(r"\w\w", caption) for caption in captions.values()):
        return {key: [] for key in keys}
    vectors = TfidfVectorizer(token_pattern=r"\w\w+").fit_transform(list(captions.values()))
    count = min(NEIGHBOURS + 1, len(keys))
    near = (
        NearestNeighbors(n_neighbors=count, metric="cosine")
        .fit(vectors)
        .kneighbors(vectors, return_distance=False)
    )
    return {key: [keys[j] for j in near[i] if j != i] for i, key in enumerate(keys)}


_kind_of = lru_cache(maxsize=1 << 16)(kinds.kind_of)
_objects = lru_cache(maxsize=1 << 16)(kinds.objects)


# ---------------------------------------------------------------- what words alone tell


def _balance(pairs: list[Pair], seed: int) -> tuple[list[Pair], int]:
    """The pairs with false statements whose words stand in true ones as often, and how many pairs left."""
    pairs = _choose(pairs, seed)
    before, may_leave = len(pairs), int(LEAVE * len(pairs))
    for turn in range(ROUNDS):
        told = _blind(pairs, seed + 20 + turn)
        if told is None or may_leave < 1 or _right(pairs, told).mean() <= FAIR:
            break
        margin = told[0::2] - told[1::2]
        go = set(np.argsort(-margin)[: max(1, may_leave // (ROUNDS - turn))].tolist())
        may_leave -= len(go)
        pairs = [pair for i, pair in enumerate(pairs) if i not in go]
    return pairs, before - len(pairs)


def _choose(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs with the false statements that leave each word as often in true as in false ones.

    By coordinate descent on the sum over words and pairs of words of (times in true - times in false)^2 over
    the times in true. No image gets a statement twice.
    """
    grams = {text: _grams(text) for pair in pairs for text, _ in (*pair.candidates, (pair.true, ""))}
    times = Counter(gram for pair in pairs for gram in grams[pair.true])
    weight = {gram: 1 / (1 + times[gram]) for own in grams.values() for gram in own}
    more = Counter(times)  # times in true statements beyond those in false ones
    for pair in pairs:
        more.subtract(grams[pair.false[0]])
    chosen = [pair.chosen for pair in pairs]
    taken: Counter[tuple[str, str]] = Counter((pair.key, pair.false[0]) for pair in pairs)
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        for i in rng.sample(range(len(pairs)), len(pairs)):
            pair = pairs[i]
            held = pair.candidates[chosen[i]][0]
            more.update(grams[held])
            taken[pair.key, held] -= 1
            free = [j for j, (text, _) in enumerate(pair.candidates) if not taken[pair.key, text]] or [
                chosen[i]
            ]

            def gain(j: int, pair: Pair = pair) -> float:
                return sum(weight[gram] * (2 * more[gram] - 1) for gram in grams[pair.candidates[j][0]])

            chosen[i] = max(free, key=gain)
            held = pair.candidates[chosen[i]][0]
            more.subtract(grams[held])
            taken[pair.key, held] += 1
    return [replace(pair, chosen=j) for pair, j in zip(pairs, chosen, strict=True)]


def _grams(text: str) -> list[str]:
    said = re.findall(r"[\w'-]+", text.casefold())
    return list(dict.fromkeys([*said, *(f"{one} {other}" for one, other in pairwise(said))]))


def _blind(pairs: Sequence[Pair], seed: int) -> Any:
    """P(yes) by words alone of each pair's true and false statement in turn, cross-validated by image.

    None where there are too few images.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    keys = sorted({pair.key for pair in pairs})
    if len(keys) < FOLDS:
        return None
    order = random.Random(seed).sample(range(len(keys)), len(keys))
    fold = {key: order[i] % FOLDS for i, key in enumerate(keys)}
    asked = [text for pair in pairs for text in (pair.true, pair.false[0])]
    of = np.repeat([fold[pair.key] for pair in pairs], 2)
    answers = np.tile([1, 0], len(pairs))
    words = CountVectorizer(analyzer=_grams, binary=True).fit_transform(asked)
    told = np.full(len(asked), 0.5)
    for number in range(FOLDS):
        inside, outside = of != number, of == number
        if inside.any() and outside.any():
            model = LogisticRegression(solver="liblinear").fit(words[inside], answers[inside])
            told[outside] = model.predict_proba(words[outside])[:, 1]
    return told


def _right(pairs: Sequence[Pair], told: Any) -> Any:
    """For each pair the share of its two questions that words alone answer rightly; NaN where unknown."""
    if told is None:
        return np.full(len(pairs), np.nan)
    true, false = told[0::2], told[1::2]
    return ((true > 0.5) + 0.5 * (true == 0.5) + (false < 0.5) + 0.5 * (false == 0.5)) / 2
