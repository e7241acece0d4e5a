"""Captions against reference captions: CIDEr-D, BLEU-1 to 4, ROUGE-L, and METEOR without synonyms.

BLEU's n-gram matches and METEOR's alignment are NLTK's, the longest common subsequence is RapidFuzz's.
CIDEr-D is written here: of the libraries that have it one ships 100 MB of Java, the other needs torch.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
from nltk.stem import PorterStemmer
from nltk.translate.bleu_score import closest_ref_length, modified_precision
from nltk.translate.meteor_score import meteor_score
from nltk.util import everygrams
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from rapidfuzz.distance import LCSseq

from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate
from captioner.judges.words import words
from captioner.sources.captions import read_table

ORIGIN = "https://cocodataset.org/#download (captions_*.json), or write JSONL rows {key, references: [...]}"
Tokens = Sequence[str]
Each = Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], Array]  # captions, references -> [N]
ORDERS = (1, 2, 3, 4)  # words of an n-gram
CIDER_SIGMA = 6.0  # width of the length penalty, in words
ROUGE_BETA = 1.2  # COCO's weight of recall against precision
# a caption's words are stemmed anew for each of its references
_STEMMER = SimpleNamespace(stem=lru_cache(1 << 16)(PorterStemmer().stem))


class _CocoCaption(BaseModel):
    image_id: int
    caption: str


class CocoCaptions(BaseModel):
    """COCO's ``captions_*.json``; other fields are not read."""

    annotations: list[_CocoCaption]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Row(BaseModel):
    key: str = Field(validation_alias=AliasChoices("key", "example_id"))
    references: Annotated[list[str], BeforeValidator(_listed)] = Field(
        min_length=1, validation_alias=AliasChoices("references", "description")
    )


def read_references(path: Path, captions: Mapping[str, str]) -> tuple[dict[str, list[str]], int]:
    """References of every captioned image, by caption key, and how many images the file knows.

    ``path`` is COCO's ``captions_*.json`` (caption keys end in the image number), a caption table in CSV or
    TSV, or JSONL of ``{"key", "references"}`` or of DOCCI's ``{"example_id", "description"}``. DataError for
    a missing or unfit file, and for captioned images without a reference.
    """
    if not path.is_file():
        raise files.missing(path.parent, path.name, ORIGIN)
    known: dict[str, list[str]] = {}
    if path.suffix == ".json":
        coco = files.read_json(path, CocoCaptions).annotations
        keys = files.numbers(captions, "references")
        for row in coco:
            if row.image_id in keys:
                known.setdefault(keys[row.image_id], []).append(row.caption)
        annotated = len({row.image_id for row in coco})
    elif path.suffix in (".csv", ".tsv"):
        for told in read_table(path):
            if told.get("text"):
                known.setdefault(os.path.splitext(told["file_name"])[0], []).append(told["text"])
        annotated = len(known)
    else:
        for line in files.read_jsonl(path, _Row):
            known.setdefault(line.key, []).extend(line.references)
        annotated = len(known)
    files.check_known(captions.keys() - known.keys(), "references", path)
    return {key: known[key] for key in captions}, annotated


def cider(captions: Mapping[str, str], path: Path) -> Scores:
    """CIDEr-D (Vedantam et al. 2015), 0 to 10; ``path`` as of :func:`read_references`."""
    return _mean("cider", captions, path, cider_d)


def meteor(captions: Mapping[str, str], path: Path) -> Scores:
    """METEOR (Lavie & Agarwal 2007) with exact and stemmed matches, 0 to 1."""

    def each(said: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Array:
        return np.array(
            [
                meteor_score(refs, own, stemmer=_STEMMER, wordnet=_NoSynonyms())
                for own, refs in zip(said, references, strict=True)
            ]
        )

    return _mean("meteor", captions, path, each)


def rouge_l(captions: Mapping[str, str], path: Path) -> Scores:
    """ROUGE-L (Lin 2004) in COCO's form: best precision and best recall over the references, beta 1.2."""

    def one(said: Tokens, references: Sequence[Tokens]) -> float:
        common = [(LCSseq.similarity(said, ref), len(ref)) for ref in references]
        precision = max(length for length, _ in common) / max(len(said), 1)
        recall = max(length / max(size, 1) for length, size in common)
        if precision == 0:
            return 0.0
        return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)

    def each(said: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Array:
        return np.array([one(own, refs) for own, refs in zip(said, references, strict=True)])

    return _mean("rouge_l", captions, path, each)


def bleu(captions: Mapping[str, str], path: Path) -> Scores:
    """BLEU-1 to BLEU-4 of the corpus (Papineni et al. 2002): no smoothing, the closest reference's length."""
    found, annotated = read_references(path, captions)
    rows: dict[str, dict[str, float]] = {}
    for key, caption in captions.items():
        said, references = words(caption), [words(ref) for ref in found[key]]
        row = {"length": len(said), "reference length": closest_ref_length(references, len(said))}
        for n in ORDERS:
            # NLTK's denominator is at least 1, so the true number of n-grams is counted here
            row[f"matches {n}"] = modified_precision(references, said, n).numerator
            row[f"total {n}"] = max(len(said) - n + 1, 0)
        rows[key] = row
    columns = [
        "length",
        "reference length",
        *(f"{what} {n}" for n in ORDERS for what in ("matches", "total")),
    ]
    return tabulate("bleu", rows, _bleu, columns=columns, annotated=annotated)


def _bleu(sums: Mapping[str, Array]) -> dict[str, Array]:
    brevity = np.exp(np.minimum(0, 1 - ratio(sums["reference length"], sums["length"])))
    logs = np.zeros(np.shape(brevity))
    result = {}
    with np.errstate(divide="ignore"):  # no match at all: log 0 = -inf, and BLEU is 0
        for n in ORDERS:
            logs = logs + np.log(ratio(sums[f"matches {n}"], sums[f"total {n}"]))
            result[f"bleu{n}"] = brevity * np.exp(logs / n)
    return result


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Array:
    """CIDEr-D of each of N captions: [N], 0 to 10.

    An n-gram's weight is its count times the log of N over the number of images whose references hold it, so
    the score depends on all N images; of one image alone it is undefined (NaN).
    """
    images = len(captions)
    if images < 2:
        return np.full(images, np.nan)
    counted = [[_ngrams(ref) for ref in refs] for refs in references]
    held = Counter(ngram for refs in counted for ngram in set[Tokens]().union(*refs))

    def weigh(counts: Counter[Tokens]) -> tuple[dict[Tokens, float], list[float]]:
        vector = {ngram: count * math.log(images / max(held[ngram], 1)) for ngram, count in counts.items()}
        squares = [sum(v * v for ngram, v in vector.items() if len(ngram) == n) for n in ORDERS]
        return vector, [math.sqrt(square) for square in squares]

    scores = np.zeros(images)
    for i, said in enumerate(captions):
        own, own_norms = weigh(_ngrams(said))
        for ref, counts in zip(references[i], counted[i], strict=True):
            other, norms = weigh(counts)
            shared = [0.0] * len(ORDERS)
            for ngram in own.keys() & other.keys():
                shared[len(ngram) - 1] += min(own[ngram], other[ngram]) * other[ngram]
            cosines = [s / (a * b) for s, a, b in zip(shared, own_norms, norms, strict=True) if a * b > 0]
            # the reference code counts bigrams for the length, so one word and none are equally long
            apart = max(len(said) - 1, 0) - max(len(ref) - 1, 0)
            penalty = math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))
            scores[i] += 10 * penalty * sum(cosines) / len(ORDERS) / len(references[i])
    return scores


def _ngrams(said: Tokens) -> Counter[Tokens]:
    return Counter(everygrams(said, max_len=ORDERS[-1])) if said else Counter()


class _NoSynonyms:
    """Stands for WordNet, which is a download: no word has a synonym."""

    def synsets(self, word: str) -> Iterable[str]:
        return ()


def _mean(name: str, captions: Mapping[str, str], path: Path, each: Each) -> Scores:
    """Scores whose corpus value is the mean over images; an undefined image is left out of it."""
    found, annotated = read_references(path, captions)
    keys = sorted(captions)
    values = each(
        [words(captions[key]) for key in keys], [[words(ref) for ref in found[key]] for key in keys]
    )
    rows = {
        key: {"sum": value, "images": 1} if value == value else {}
        for key, value in zip(keys, map(float, values), strict=True)
    }
    return tabulate(
        name,
        rows,
        lambda sums: {name: ratio(sums["sum"], sums["images"])},
        columns=("sum", "images"),
        annotated=annotated,
    )
