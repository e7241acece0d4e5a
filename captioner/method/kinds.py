"""What a statement about a photograph is about, and what would make it false: English word lists. Pure text.

The kinds are those of a round's ledger for photographs (the scenes know their own):

==========  ================================================================
kind        statements such as
==========  ================================================================
text        a sign reading "STOP"
style       a black-and-white photograph, blurry background, seen from above
count       three cups, a pair of shoes
relation    a cat under a table, a tree on the left
action      a man riding a horse; also posture and state: a closed door
color       a red mug
material    a wooden chair; also pattern: a striped shirt
size        a tall tower; also shape: a round table
scene       a kitchen, outdoors at night
object      a dog; whatever else is there
==========  ================================================================

A statement that is of several kinds has the first of this order: what can be wrong with it in most ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from captioner.method import words

KINDS = ("object", "color", "material", "size", "count", "relation", "action", "text", "scene", "style")

_QUOTED = re.compile(r"""["“]([^"”\n]+)["”]|(?<!\w)'([^'\n]+)'(?!\w)""")
_TEXT = re.compile(
    r"\b(?:the (?:word|words|letter|letters|number|text)|reads|reading [\"“']|says|labell?ed|spell(?:s|ing)|"
    r"lettering|inscription|captioned|caption)\b"
    r"|\b(?:letter|number|numeral|digit) (?:[a-z]|\d+)\b",
    re.IGNORECASE,
)
_STYLE = re.compile(
    r"\b(?:(?:black[- ]and[- ]white|sepia|grayscale|monochrome|stock|aerial|colou?r|blurry|vintage) "
    r"(?:photo|photograph|image|picture|shot|view)s?|black[- ]and[- ]white|photograph(?:y|s)?|photos?|"
    r"illustration|sketch|cartoon|anime|3d render|digital art|watercolou?r|oil painting|engraving|screenshot|"
    r"close[- ]?up|macro|wide[- ]angle|panoram\w+|fish-?eye|bokeh|depth of field|out of focus|in focus|"
    r"blur(?:ry|red)?|over-?exposed|under-?exposed|grainy|(?:seen|viewed|shot|taken) from|"
    r"(?:low|high|eye)[- ](?:angle|level)|bird'?s[- ]eye|top[- ]down|"
    r"(?:soft|bright|dim|natural|dramatic|warm|"
    r"harsh|studio|artificial) (?:light|lighting)|backlit|silhouette[ds]?|symmetrical|monochrome|grayscale|"
    r"composition|minimalist)\b",
    re.IGNORECASE,
)
_NUMBER = "|".join(words.COUNTS.split()[1:])
_COUNT = re.compile(
    rf"(?<![-\w.:])(?:(?:{_NUMBER}|[2-9]|1\d|[2-9]\d)(?![-\w.:/%°]| (?:o'clock|of the|am|pm|years?)\b)|"
    r"(?:an? )?(?:pair|couple|trio|dozen|single|group|handful|bunch) of|several|multiple|many|numerous|"
    r"(?:exactly|only|just) one|a single)(?=\s+\w)",
    re.IGNORECASE,
)
_RELATION = re.compile(rf"\b(?:{words.RELATIONS})\b", re.IGNORECASE)
_CLOTHES = "|".join(words.CLOTHES.split())
_WORN = re.compile(
    rf"\b(?:in|with) (?:an? |the |his |her |their )?(?:[\w-]+ ){{0,3}}(?:{_CLOTHES})\b", re.IGNORECASE
)
_WEAK_RELATION = re.compile(
    r"\w\s+(?:on|in|at|by|beneath|through|across|onto|into|upon|within)\s+\w", re.IGNORECASE
)
_ING = re.compile(
    r"\b(?!(?:" + "|".join(words.THINGS_IN_ING.split()) + r")s?\b)[a-z]{2,}ing\b", re.IGNORECASE
)
# a thing that such a word follows is not the first part of another thing's name
_BEHIND_A_THING = re.compile(
    r"\w+ing|\w+ed|is|are|was|were|has|have|and|or|but|while|of|to|by|on|in|at|with|from|into|onto|over|under|near|"
    r"next|behind|beside|below|beneath|above|between|around|along|across|through|against|inside|outside|toward|"
    r"towards|that|which|who|whose|as|for|\w*(?:sit|stand|lie|hang|rest|hold|wear|ride|run|walk|show|cover|float|"
    r"rise|read|play|look|eat|fly|jump|lead|fill|line|hold)s?",
    re.IGNORECASE,
)


def kind_of(statement: str) -> str:
    """The kind of a statement, one of ``KINDS``; ``object`` where nothing says otherwise."""
    if _QUOTED.search(statement) or _TEXT.search(statement):
        return "text"
    if _STYLE.search(statement):
        return "style"
    if _COUNT.search(statement):
        return "count"
    if _RELATION.search(statement):
        return "relation"
    if _ING.search(statement) or _known("action").search(statement):
        return "action"
    if _WEAK_RELATION.search(_WORN.sub(" ", statement)) and not _known("scene").search(statement):
        return "relation"
    for kind in ("color", "material", "size", "scene"):
        if _known(kind).search(statement):
            return kind
    return "object"


def swaps(statement: str, kind: str | None = None, texts: Sequence[str] = ()) -> list[str]:
    """Statements that differ from ``statement`` in one word or phrase of ``kind`` and exclude it.

    Where the first is true, the others are false if no second thing of that sort is in the image: the caller
    knows the rest of the caption, and leaves out what it says. ``kind`` is by default that of the statement;
    ``texts`` are quotations to put in place of a quoted one. Empty where nothing can be swapped.
    """
    kind = kind or kind_of(statement)
    if kind == "text":
        made = _text_swaps(statement, texts)
    elif kind == "relation":
        made = _relation_swaps(statement)
    elif kind == "count":
        made = _count_swaps(statement)
    else:
        made = _word_swaps(statement, kind)
    return [text for text in dict.fromkeys(made) if text != statement]


def swapped_words(statement: str, other: str) -> set[str]:
    """The words of ``other`` that are not in ``statement``: a caption that says one may make it true."""
    return set(re.findall(r"[\w-]+", other.lower())) - set(re.findall(r"[\w-]+", statement.lower()))


def named_objects(text: str) -> list[tuple[str, str]]:
    """The things of the word lists that a text names: (the word it has, in the singular; its group's word).

    Each once, in order. A noun that only tells what kind of thing another is ("train" of a train platform)
    is none.
    """
    found: dict[str, str] = {}
    for match in _known("object").finditer(text):
        word = singular(match[0].lower())
        behind = re.match(r"\s+([\w-]+)", text[match.end() :])
        before = re.search(r"([\w-]+)\s+$", text[: match.start()])
        last = behind is None or bool(_BEHIND_A_THING.fullmatch(behind[1]))
        if word in _FIRST["color"] and match[0].lower() == word:  # an orange, or orange clouds
            last &= before is not None and before[1].lower() in ("an", "one", "the")
        if last and word in _FIRST["object"]:
            found.setdefault(word, _FIRST["object"][word])
    return list(found.items())


def objects(text: str) -> list[str]:
    """The things that a text names, as their group's word, each once, in order; see named_objects."""
    return list(dict.fromkeys(first for _, first in named_objects(text)))


def first_of(word: str) -> str:
    """The word that stands for all that mean the same as ``word``; itself where none is known."""
    word = word.lower()
    for kind in ("object", "color", "material", "size", "action", "scene", "style"):
        one = singular(word) if kind == "object" else word
        if one in _FIRST[kind]:
            return _FIRST[kind][one]
    return word


def all_objects() -> list[str]:
    """Every thing of the word lists, by its group's first word."""
    return list(dict.fromkeys(_FIRST["object"].values()))


# ---------------------------------------------------------------- families


def _families(table: str) -> list[list[list[str]]]:
    """Families of groups of words: a family a line."""
    return [[group.split("/") for group in line.split()] for line in table.split("\n") if line.strip()]


_TABLES = {
    "color": _families(words.COLORS),
    "material": _families(words.MATERIALS),
    "size": _families(words.SIZES),
    "action": _families(words.ACTIONS),
    "scene": _families(words.SCENES),
    "style": _families(words.STYLES),
    "object": _families(words.OBJECTS),
}
_IRREGULAR = dict(pair.split(":") for pair in words.IRREGULAR.split())
_PLURAL = {one: many for many, one in _IRREGULAR.items()}
_SAME = frozenset(words.SAME_PLURAL.split())
TOO_NEAR = frozenset(words.TOO_NEAR.split())
_FIRST = {
    kind: {word: group[0] for family in families for group in family for word in group}
    for kind, families in _TABLES.items()
}


def family(kind: str, member: str) -> dict[str, str]:
    """The words of the family of ``kind`` that has ``member``: each with the first word of its group."""
    found = next(family for family in _TABLES[kind] for group in family if member in group)
    return {word: group[0] for group in found for word in group}


def singular(word: str) -> str:
    """The singular of an English noun, by rules; another word may lose its last letter."""
    if word in _SAME or word in _PLURAL:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if re.search(r"(?:ss|sh|ch|x|to)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def plural(word: str) -> str:
    """The plural of a noun, of which the last word counts."""
    first, space, word = word.rpartition(" ")
    if space:
        return f"{first} {plural(word)}"
    if word in _SAME or word in _IRREGULAR:
        return word
    if word in _PLURAL:
        return _PLURAL[word]
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return word + ("es" if re.search(r"(?:s|sh|ch|x|to)$", word) else "s")


@cache
def _known(kind: str) -> re.Pattern[str]:
    """The words of a kind, of things the plurals too."""
    known = set(_FIRST[kind])
    if kind == "object":
        known |= {plural(word) for word in known}
    listed = sorted(map(re.escape, known), key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(listed)})(?![\w-])", re.IGNORECASE)


# ---------------------------------------------------------------- swaps


def _word_swaps(statement: str, kind: str) -> Iterator[str]:
    for match in _known(kind).finditer(_unquoted(statement)):
        said = match[0].lower()
        one = singular(said) if kind == "object" and said not in _FIRST[kind] else said
        for family in _TABLES[kind]:
            for own in (group for group in family if one in group):
                for group in family:
                    if group is not own and not {f"{own[0]}-{group[0]}", f"{group[0]}-{own[0]}"} & TOO_NEAR:
                        other = plural(group[0]) if one != said else group[0]
                        yield _put(statement, match.start(), match.end(), other)


def _relation_swaps(statement: str) -> Iterator[str]:
    found = _unquoted(statement)
    taken = [match.span() for match in _WORN.finditer(found)]  # "in a red coat" is no place
    for pair in words.OPPOSITES:
        for said, other in (pair, pair[::-1]):
            for match in re.finditer(rf"(?<![\w-]){said}(?![\w-])", found, re.IGNORECASE):
                if not any(start < match.end() and match.start() < end for start, end in taken):
                    taken.append(match.span())
                    yield _put(statement, match.start(), match.end(), other)
    by_length = sorted((word, at) for at, group in enumerate(words.PLACES) for word in group)
    for said, at in sorted(by_length, key=lambda each: -len(each[0])):
        for match in re.finditer(
            rf"(?<=\w ){said}(?= (?:an?|the|his|her|its|their) \w)", found, re.IGNORECASE
        ):
            if not any(start < match.end() and match.start() < end for start, end in taken):
                taken.append(match.span())
                for place, group in enumerate(words.PLACES):
                    if place != at and {said, group[0]} != {"in", "next to"}:
                        yield _put(statement, *match.span(), group[0])


def _count_swaps(statement: str) -> Iterator[str]:
    numbers = words.COUNTS.split()
    for match in _COUNT.finditer(_unquoted(statement)):
        said = match[0].lower()
        if said in numbers:
            at = numbers.index(said)
            near = [*range(max(1, at - 2), at), *range(at + 1, min(at + 3, len(numbers)))]
            yield from (_put(statement, *match.span(), numbers[other]) for other in near)
        elif said.isdecimal():
            yield from (
                _put(statement, *match.span(), str(int(said) + step))
                for step in (1, 2, -1)
                if int(said) + step > 1
            )
        elif said.endswith(("pair of", "couple of")):
            yield from (_put(statement, *match.span(), number) for number in ("three", "four", "five"))


def _text_swaps(statement: str, texts: Sequence[str]) -> Iterator[str]:
    for match in _QUOTED.finditer(statement):
        group = 1 if match[1] is not None else 2
        said = match[group]
        digits = "".join(str((int(c) + 3) % 10) if c.isdecimal() and c.isascii() else c for c in said)
        others = [digits, *texts, *words.SIGN_WORDS]
        for other in others:
            if other.casefold() != said.casefold():
                yield statement[: match.start(group)] + other + statement[match.end(group) :]


def _unquoted(statement: str) -> str:
    """The statement with spaces for its quotations; every other character stays where it is."""
    return _QUOTED.sub(lambda match: " " * len(match[0]), statement)


def _put(statement: str, start: int, end: int, other: str) -> str:
    """The statement with ``other`` in that place, its case and the article before it as they should be."""
    said, before = statement[start:end], statement[:start]
    if said[:1].isupper():
        other = other[:1].upper() + other[1:]
    article = re.search(r"\b([Aa])n?(\s+)$", before)
    if article:
        n = "n" if other[:1].lower() in "aeiou" and not other.lower().startswith(("uni", "one")) else ""
        before = before[: article.start()] + article[1] + n + article[2]
    return before + other + statement[end:]
