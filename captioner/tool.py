"""The tool LLM: merge sampled captions into statements and turn each statement into a question.

:class:`Rules` is the embedded default. It knows no vocabulary but a few word lists, so it serves any
shorthand caption. In doubt claims stay apart: "two cats" and "a cat", "cats" and "cat" are different ones.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from captioner import prompts

# A quotation opens where no word stands before it, so 12" and dogs' open none, and closes on the same line.
_QUOTED = r"""(?<!\w)"[^"\n]*"|“[^”\n]*”|(?<!\w)'[^'\n]*'(?!\w)"""
_BRACKETED = r"\([^()\n]*\)|\[[^\[\]\n]*\]"
_ABBREVIATIONS = ("st", "mr", "mrs", "ms", "dr", "vs", "e.g", "i.e", "etc", "approx", "ca")
_ABBREVIATED = rf"\b(?:{'|'.join(map(re.escape, _ABBREVIATIONS))}|[a-z])\.(?=\s)"
_SPLIT = re.compile(
    rf"(?P<protected>{_QUOTED}|{_BRACKETED}|\d[.,]\d|{_ABBREVIATED})|(?P<end>[.!?]+(?=\s|$)|[,;\n，、；。！？])",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+", re.MULTILINE)
_QUOTED_OR_ARTICLE = re.compile(rf"(?P<quoted>{_QUOTED})|^(?:[aA]n?|[tT]he)\s+(?=\w)|\b(?:an?|the)\s+(?=\w)")
_EDGES = " \t\r\n.,;:!?-–—"

# Opinion, intention, mood, and what is known about a picture rather than seen in it.
_UNCHECKABLE = re.compile(
    r"\b(?:beautiful(?:ly)?|stunning|gorgeous|lovely|amazing|breathtaking|impressive|masterpiece|"
    r"award[- ]winning|(?:high|best|top)[- ]quality|trending|famous|well[- ]known|expensive|delicious|"
    r"cozy|serene|peaceful|nostalgic|"
    r"mood|atmosphere|ambiance|vibe|feeling|evok\w+|convey\w*|symboli[sz]\w+|suggest\w*|represent(?:s|ing)|"
    r"probably|perhaps|possibly|presumably|might be|may be|seems?|seemingly|appears to|"
    r"(?:taken|shot|captured|photographed|painted|made|created) (?:in|on|by|with|at|during)|"
    r"photo(?:graph)? by|copyright|photographer|camera model|iso \d+|f/\d)",
    re.IGNORECASE,
)

# Coarse kinds, first match wins; a source of images that knows better passes its own function.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"\b(?:{words})\b", re.IGNORECASE))
    for kind, words in (
        ("background", "background|backdrop"),
        ("relation", "(?:left|right) of|above|below|under|behind|in front of|beside|next to|between|inside"),
        ("color", "red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y|cyan|magenta|beige"),
        ("size", "tiny|small|little|large|big|huge|tall|short|wide|narrow"),
        ("shape", "circle|round|square|rectangular|triangle|triangular|star|ring|oval|plus"),
    )
)


@dataclass(frozen=True)
class Statement:
    """One thing that captions state, in the wording most of them use."""

    text: str
    candidates: tuple[int, ...]  # indices of the captions that state it, rising


@dataclass(frozen=True)
class Question:
    text: str
    expected: str  # "yes" or "no": the answer that confirms the statement


class Tool(Protocol):
    """What the golden loop asks of a tool LLM."""

    def merge(self, captions: Sequence[str]) -> list[Statement]: ...
    def checkable(self, statement: str) -> bool: ...
    def decompose(self, statement: str) -> Question: ...
    def kind(self, statement: str) -> str: ...


def split_statements(caption: str) -> list[str]:
    """Statements of a caption in order, without the punctuation around them.

    Commas, semicolons, line breaks and sentence ends separate; those in quotations, brackets, numbers ("3.5",
    "1,000") and after abbreviations do not. A quotation mark or bracket that never closes protects nothing.
    """
    caption = _BULLET.sub("", caption)
    parts = (caption[start:stop] for start, stop, _ in statement_spans(caption))
    return [" ".join(part.split()).strip(_EDGES) for part in parts]


def statement_spans(caption: str) -> list[tuple[int, int, int]]:
    """(start, stop, end) of every statement: without the space around it; up to ``end`` with the mark that
    ends its sentence, if one does."""
    spans, start = [], 0
    ends = [(match.start(), match.end()) for match in _SPLIT.finditer(caption) if match["end"]]
    for stop, after in [*ends, (len(caption), len(caption))]:
        text = caption[start:stop]
        if any(map(str.isalnum, text)):
            begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
            ends_sentence = caption[stop:after].strip(",;\n，、；")
            spans.append((begin, end, after if ends_sentence else end))
        start = after
    return spans


def is_one_statement(text: str) -> bool:
    """Whether a text stays one statement among others: nothing in it separates, all that opens closes."""
    opened = re.search(r"""[(\[“]|(?<!\w)["']""", re.sub(f"{_QUOTED}|{_BRACKETED}", " ", text))
    parts = [normalise(part) for part in split_statements(f"x, {text}, y")]
    return opened is None and parts == ["x", normalise(text), "y"]


def normalise(statement: str) -> str:
    """The form in which near-duplicates are equal: no case, hyphens, articles, edge punctuation, extra space.

    Articles inside quotations and at the end ("letter A") are words, not articles, and stay.
    """
    text = unicodedata.normalize("NFKC", statement)
    text = " ".join(text.split()).strip(_EDGES)
    text = _QUOTED_OR_ARTICLE.sub(lambda match: match["quoted"] or "", text)
    return " ".join(text.casefold().replace("-", " ").split())


class Rules:
    """The embedded tool LLM: deterministic rules, no model.

    ``kind_of`` gives the kind of a statement where the source of the images knows it exactly (the scenes do);
    without it the kind is guessed from word lists. Both answer "" where they do not know.
    """

    def __init__(self, kind_of: Callable[[str], str] | None = None):
        self._kind_of = kind_of

    def merge(self, captions: Sequence[str]) -> list[Statement]:
        """The union of the captions' statements without near-duplicates, in their natural order.

        Each statement stands right after the one it follows in the caption that brings it; the longest
        caption comes first and gives the frame. So what belongs together stays together, which it does not
        when all are sorted by their median relative position.
        """
        wordings: dict[str, Counter[str]] = {}
        stated: dict[str, set[int]] = {}
        sequences: list[list[str]] = []
        for index, caption in enumerate(captions):
            sequence = []
            for text in split_statements(caption):
                key = normalise(text)
                wordings.setdefault(key, Counter())[text] += 1
                stated.setdefault(key, set()).add(index)
                sequence.append(key)
            sequences.append(list(dict.fromkeys(sequence)))
        # Counter.most_common keeps first-seen order among equals, so the wording is deterministic.
        return [
            Statement(wordings[key].most_common(1)[0][0], tuple(sorted(stated[key])))
            for key in _interleave(sequences)
        ]

    def checkable(self, statement: str) -> bool:
        """Whether looking can confirm it: opinions and origins cannot be seen, quoted words can."""
        return not _UNCHECKABLE.search(re.sub(_QUOTED, " ", statement))

    def decompose(self, statement: str) -> Question:
        """One yes/no question; a negated statement ("no people") keeps its form, so "yes" confirms it."""
        return Question(prompts.load("question", statement=statement), "yes")

    def kind(self, statement: str) -> str:
        if self._kind_of is not None:
            return self._kind_of(statement)
        return next((kind for kind, words in _KINDS if words.search(statement)), "")


def _interleave(sequences: Sequence[Sequence[str]]) -> list[str]:
    merged: list[str] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        for position, key in enumerate(sequence):
            if key not in merged:
                after = merged.index(sequence[position - 1]) + 1 if position else 0
                merged.insert(after, key)
    return merged
