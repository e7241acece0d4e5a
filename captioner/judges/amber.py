"""AMBER's generative task (Wang et al. 2023, arXiv:2311.07397): objects named, true, and likely hallucinated.

The benchmark takes words for the same where spaCy's vectors are alike by more than 0.8. Which spaCy model is
installed then changes the score, so words are the same here only where AMBER's own ``relation.json`` says so;
``similar`` brings the vectors back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from textblob.en.taggers import PatternTagger

from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate
from captioner.judges.words import singular, tokens

ORIGIN = "https://github.com/junyangwang0410/AMBER (folder data)"
COLUMNS = ("captions", "nouns", "false", "hallucinating", "true objects", "covered", "targets", "hit")
Similar = Callable[[str, str], bool]
_TAGGER = PatternTagger()
_LEADS = ("DT", "JJ", "JJR", "JJS", "CD", "PRP$", "POS", ",", ".", ":")  # tags of what leads up to a noun


class _Annotation(BaseModel):
    id: int
    type: str
    truth: list[str] | str
    hallu: list[str] = []


@dataclass(frozen=True)
class Rules:
    """What AMBER's files say of words, in small letters.

    ``associated`` are the words of an object; ``safe`` words are never hallucinated.
    """

    associated: Mapping[str, Sequence[str]]
    vocabulary: frozenset[str]
    safe: frozenset[str]


def read_rules(folder: Path) -> Rules:
    """``relation.json`` and ``safe_words.txt``; DataError where one is missing."""
    raw = files.read_json(files.find(folder, "relation.json", ORIGIN), dict[str, list[str]])
    associated = {word.lower(): [each.lower() for each in others] for word, others in raw.items()}
    safe = files.read_text(files.find(folder, "safe_words.txt", ORIGIN)).lower().split("\n")
    vocabulary = frozenset(associated).union(*associated.values())
    return Rules(associated, vocabulary, frozenset(word.strip() for word in safe))


def nouns_in(caption: str, vocabulary: frozenset[str]) -> list[str]:
    """Nouns of the caption that AMBER's vocabulary holds, every mention, in order.

    The tagger knows each word's usual kind and takes "bear" and "sink" for verbs. So a word behind an
    article, adjective, number or mark is a noun too, unless a noun follows, as in "an orange chair".
    """
    tagged = _TAGGER.tag(" ".join(tokens(caption)))
    kinds = [".", *(tag for _, tag in tagged), "."]
    nouns = [
        singular(word, vocabulary)
        for (word, tag), before, after in zip(tagged, kinds, kinds[2:], strict=False)
        if tag.startswith("NN") or (before in _LEADS and not after.startswith("NN"))
    ]
    return [noun for noun in nouns if noun in vocabulary]


def amber(captions: Mapping[str, str], folder: Path, *, similar: Similar | None = None) -> Scores:
    """AMBER's generative scores; keys end in the image's number, as ``AMBER_12``.

    ``chair``: share of the nouns that name nothing true. ``cover``: share of the true objects named. ``hal``:
    share of the captions with a false noun. ``cog``: share of the annotated likely hallucinations named.
    """
    rules = read_rules(folder)
    path = files.find(folder, "annotations.json", ORIGIN)
    known = {
        row.id: (row.truth, row.hallu)
        for row in files.read_json(path, list[_Annotation])
        if row.type == "generative" and isinstance(row.truth, list)
    }
    images = files.numbers(captions, "amber")
    files.check_known([images[each] for each in images.keys() - known.keys()], "amber", path)
    rows = {}
    for image, key in images.items():
        rows[key] = count(captions[key], *known[image], rules, similar)
    lower = ("chair", "hal", "cog")
    return tabulate("amber", rows, _metrics, columns=COLUMNS, annotated=len(known), lower_is_better=lower)


def count(
    caption: str, truth: Sequence[str], targets: Sequence[str], rules: Rules, similar: Similar | None = None
) -> dict[str, float]:
    """One caption's row. A noun stands for the first object that it names, as in the benchmark's code."""
    true, likely = _names(truth, rules), _names(targets, rules)
    nouns = nouns_in(caption, rules.vocabulary)
    covered: set[int | None] = set()
    hit: set[int | None] = set()
    wrong = 0
    for noun in nouns:
        if noun in rules.safe:
            continue
        place = _same(noun, true)
        if place is None:
            hit |= {_same(noun, likely), _alike(noun, likely, similar)}
            place = _alike(noun, true, similar)
        covered.add(place)
        wrong += place is None
    return {
        "captions": 1,
        "nouns": len(nouns),
        "false": wrong,
        "hallucinating": int(wrong > 0),
        "true objects": len(truth),
        "covered": len(covered - {None}),
        "targets": len(targets),
        "hit": len(hit - {None}),
    }


def _names(objects: Sequence[str], rules: Rules) -> list[tuple[str, int]]:
    """Words that stand for each object, with its place: first all associated words, then the objects' own."""
    own = [word.lower() for word in objects]
    associated = [(each, i) for i, word in enumerate(own) for each in rules.associated.get(word, ())]
    return associated + [(word, i) for i, word in enumerate(own)]


def _same(noun: str, names: Sequence[tuple[str, int]]) -> int | None:
    return next((place for word, place in names if word == noun), None)


def _alike(noun: str, names: Sequence[tuple[str, int]], similar: Similar | None) -> int | None:
    return next((place for word, place in names if similar and similar(noun, word)), None)


def _metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {
        "chair": ratio(sums["false"], sums["nouns"]),
        "cover": ratio(sums["covered"], sums["true objects"]),
        "hal": ratio(sums["hallucinating"], sums["captions"]),
        "cog": ratio(sums["hit"], sums["targets"]),
    }
