"""The one language of captions: split a caption into statements and compare statements. Pure text.

Every function takes time linear in its text, whatever the text is: captions come from models and from files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

# A quotation opens where no word stands before it, so 12" and dogs' open none, and closes on the same line.
# What opens inside it does not belong to it: a row of marks that never close is read once, not once each.
_QUOTED = r"""(?<!\w)"[^"\n]*"|“[^“”\n]*”|(?<!\w)'[^'\n]*'(?!\w)"""
_BRACKETED = r"\([^()\n]*\)|\[[^\[\]\n]*\]"
_ABBREVIATIONS = ("st", "mr", "mrs", "ms", "dr", "vs", "e.g", "i.e", "etc", "approx", "ca")
_ABBREVIATED = rf"\b(?:{'|'.join(map(re.escape, _ABBREVIATIONS))}|[a-z])\.(?=\s)"
_SPLIT = re.compile(
    r"(?P<bullet>^[ \t]*+(?:[-*•]|\d++[.)])[ \t]++)|"
    rf"(?P<protected>{_QUOTED}|{_BRACKETED}|\d[.,]\d|{_ABBREVIATED})|"
    r"(?P<sentence>(?<![.!?])[.!?]++(?=\s|$)|[。！？])|(?P<part>[,;\n，、；])",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTED_OR_ARTICLE = re.compile(rf"(?P<quoted>{_QUOTED})|^(?:[aA]n?|[tT]he)\s+(?=\w)|\b(?:an?|the)\s+(?=\w)")
_DENIALS = {"no", "not", "without", "never", "none", "nobody", "nothing"}
EDGES = " \t\r\n.,;:!?-–—"

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


def visible(statement: str) -> bool:
    """Whether its words allow that it can be seen: opinions and origins cannot, quoted words can."""
    return not _UNCHECKABLE.search(re.sub(_QUOTED, " ", statement))


def split_statements(caption: str) -> list[str]:
    """Statements of a caption in order, without the punctuation around them.

    Commas, semicolons, line breaks, bullets and sentence ends separate; those in quotations, brackets and
    numbers ("3.5", "1,000") and after abbreviations do not. A quotation mark or bracket that never closes
    protects nothing.
    """
    parts = (caption[start:stop] for start, stop, _ in statement_spans(caption))
    return [" ".join(part.split()).strip(EDGES) for part in parts]


def statement_spans(caption: str) -> list[tuple[int, int, int]]:
    """(start, stop, end) of every statement: without the space around it; up to ``end`` with the mark that
    ends its sentence, if one does."""
    found, start = [], 0
    ends = [(match.start(), match.end(), match.lastgroup == "sentence") for match in _separators(caption)]
    for stop, after, ends_sentence in [*ends, (len(caption), len(caption), False)]:
        text = caption[start:stop]
        if any(map(str.isalnum, text)):
            begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
            found.append((begin, end, after if ends_sentence else end))
        start = after
    return found


def _separators(caption: str) -> Iterator[re.Match[str]]:
    return (match for match in _SPLIT.finditer(caption) if match.lastgroup != "protected")


def without(caption: str, gone: Callable[[str], bool]) -> str:
    """The caption without its ``gone`` statements (asked in comparable form); the rest is kept word for word.

    A statement leaves with the separator behind it, the last one of a sentence with the one before it, so
    that the sentence keeps its end.
    """
    spans = statement_spans(caption)
    leave = [gone(normalise(caption[start:stop])) for start, stop, _ in spans]
    last = max((i for i, leaves in enumerate(leave) if not leaves), default=-1)
    cuts: list[tuple[int, int]] = []
    before = -1  # where what stays of this sentence ends
    for i, ((start, stop, end), leaves) in enumerate(zip(spans, leave, strict=True)):
        if leaves and end > stop and before >= 0:
            cuts.append((before, stop))
        elif leaves and i > last:
            cuts.append((spans[i - 1][2] if i else 0, len(caption)))
        elif leaves:
            cuts.append((start, spans[i + 1][0]))
        before = -1 if end > stop else before if leaves else stop
    text, at = "", 0
    for start, stop in sorted(cuts):
        text, at = text + caption[at:start], max(at, stop)
    return text + caption[at:]


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
    text = " ".join(text.split()).strip(EDGES)
    text = _QUOTED_OR_ARTICLE.sub(lambda match: match["quoted"] or "", text)
    return " ".join(text.casefold().replace("-", " ").split())


def comparable_statements(caption: str) -> list[str]:
    """The statements of a caption, each in the form in which near-duplicates are equal."""
    return list(_comparable(caption))


@lru_cache(1 << 14)  # a judge reads the same captions many times
def _comparable(caption: str) -> tuple[str, ...]:
    return tuple(normalise(statement) for statement in split_statements(caption))


def entails(statement: str, other: str) -> bool:
    """Whether a normalised statement says all that another says: its words in their order, no other denial.

    "shiny red cup on table" entails "red cup"; "no cup" does not, nor does "table on cup" entail "cup on
    table".
    """
    words, wanted = statement.split(), other.split()
    if set(words) & _DENIALS != set(wanted) & _DENIALS:
        return False
    rest = iter(words)
    return all(word in rest for word in wanted)


def mask(text: str) -> tuple[str, Callable[[str], str]]:
    """The text with one sign for each quotation, bracket, number and abbreviation in which nothing separates,
    and what puts them back."""
    kept: list[str] = []

    def put(match: re.Match[str]) -> str:
        if match.lastgroup != "protected":
            return match[0]
        kept.append(match[0])
        return f"\x01{len(kept) - 1}\x02"

    masked = _SPLIT.sub(put, text.replace("\x01", " ").replace("\x02", " "))
    return masked, lambda part: re.sub("\x01(\\d+)\x02", lambda match: kept[int(match[1])], part)


def repeats(statements: Sequence[str]) -> int:
    """How many of a caption's comparable statements were said before, or go round in a circle themselves."""
    distinct = set(statements)
    return len(statements) - len(distinct) + sum(map(_goes_round, distinct))


def loops(caption: str) -> bool:
    """Whether more than half of the statements of a caption are repeats."""
    said = comparable_statements(caption)
    return 2 * repeats(said) > len(said)


def _goes_round(statement: str) -> bool:
    """Whether one to eight words in it follow themselves three times or more."""
    words = re.findall(r"\w+", statement)
    for period in range(1, 9):
        same = 0  # words in a row that equal the word one period before
        for word, before in zip(words[period:], words, strict=False):
            same = same + 1 if word == before else 0
            if same == 3 * period:
                return True
    return False
