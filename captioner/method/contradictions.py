"""Which statements about one image exclude each other: rules over English word lists. Pure text.

Two statements contradict each other if they are about the same thing and give it different values of
something it has once: a color, a material, a size, a posture, a place, a number, a text; or the image another
scene or style; or if one denies what the other states. In doubt they do not: a light blue cup may be the blue
one, a red cup on a table and a blue one on a shelf are two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from captioner.method import kinds, words
from captioner.statements import normalise

# Families of words of which a thing, or the image, has one value; each by one of its words.
_ONCE = {
    "color": ("red",),
    "material": ("wooden", "striped"),
    "size": ("big", "tall", "long", "wide", "thick", "round"),
    "action": ("sitting", "open", "empty", "wet", "lit", "parked", "folded"),
    "scene": ("indoors", "daytime", "sunny", "kitchen", "summer"),
    "style": ("photograph", "black-and-white", "close-up", "horizontal"),
}
_FAMILIES = {(kind, member): kinds.family(kind, member) for kind, of in _ONCE.items() for member in of}
_WHOLE = ("scene", "style")  # properties of the image
_ALIASES = (
    (re.compile(r"\bblack and white\b"), "black-and-white"),
    (re.compile(r"\bcolou?r (?=(?:photo|photograph|picture|image)s?\b)"), "colorful "),
    (re.compile(r"\bclose up\b"), "close-up"),
)
_NUMBERS = {word: number for number, word in enumerate(words.COUNTS.split(), 1)}
_DENIAL = re.compile(r"(?:no|without(?: any)?|not any) (?=\w)")
_QUOTED = re.compile(r"[\"“']([^\"”'\n]+)[\"”']")
_JOINING = "a an the is are was were be of with in on at to its his her their it there that single just only"
_SMALL = frozenset(_JOINING.split())
_OPPOSITES = [tuple(map(normalise, pair)) for pair in words.OPPOSITES]
_RELATIONS = [re.compile(rf"(?<![\w-])(?:{one}|{other})(?![\w-])") for one, other in _OPPOSITES]
# Things that come together: of others in the plural some may be so and some be otherwise.
_PARTS = "eye ear lip tooth hand leg wing paw whisker shoe boot glove wall curtain"
_SETS = frozenset(_PARTS.split())
Value = tuple[str, str, str]  # kind, member of the family, the thing that has it ("": the image)


@dataclass(frozen=True)
class Read:
    """What a statement says, as far as the rules read it."""

    text: str  # in comparable form
    things: frozenset[str]  # its words without values, numbers and words that join
    values: tuple[tuple[Value, frozenset[str]], ...]
    number: int | None
    denied: bool
    quoted: frozenset[str]
    many: frozenset[str]  # things in the plural


def conflict(one: str, other: str) -> bool:
    """Whether two statements about one image cannot both hold."""
    a, b = read(one), read(other)
    if a.text == b.text or (a.denied and b.denied):
        return False
    if a.denied or b.denied:
        no, yes = (a, b) if a.denied else (b, a)
        stated = dict(no.values).items() <= dict(yes.values).items()
        return bool(no.things) and no.things <= yes.things and stated
    return _counts(a, b) or _values(a, b) or _quotes(a, b) or _relations(a, b)


def may_be_two(one: str, other: str) -> bool:
    """Whether a caption that states both may speak of two things: a red cup and a blue one.

    Not so for numbers, denials and what the whole image is.
    """
    a, b = read(one), read(other)
    whole = any(value[0] in _WHOLE for value in _different(a, b))
    return not (whole or a.denied or b.denied or _counts(a, b))


@lru_cache(maxsize=8192)
def read(statement: str) -> Read:
    """Take a statement apart."""
    text = normalise(statement)
    for pattern, word in _ALIASES:
        text = pattern.sub(word, text)
    quoted, plain = frozenset(_QUOTED.findall(text)), _QUOTED.sub(" ", text)
    denied = _DENIAL.match(plain) is not None
    tokens = re.findall(r"[\w-]+", _DENIAL.sub("", plain, count=1) if denied else plain)
    numbers = [number for token in tokens if (number := _number(token))]
    named = [
        (at, key, family[token])
        for key, family in _FAMILIES.items()
        for at, token in enumerate(tokens)
        if token in family
    ]
    taken = {at for at, *_ in named}
    things = {
        at: kinds.singular(token)
        for at, token in enumerate(tokens)
        if at not in taken and token not in _SMALL and not _number(token)
    }
    values: dict[Value, set[str]] = {}
    for at, (kind, member), group in named:
        owner = "" if kind in _WHOLE else _owner(at, tokens, things, taken)
        values.setdefault((kind, member, owner), set()).add(group)
    return Read(
        text,
        frozenset(things.values()) - {"and"},
        tuple((value, frozenset(groups)) for value, groups in values.items()),
        numbers[0] if len(numbers) == 1 else None,
        denied,
        quoted,
        frozenset(thing for at, thing in things.items() if tokens[at] != thing),
    )


def _number(token: str) -> int:
    written = token.isdecimal() and token.isascii() and len(token) < 4
    return int(token) if written else _NUMBERS.get(token, 0)


def _owner(at: int, tokens: list[str], things: dict[int, str], taken: set[int]) -> str:
    """What has the value named at a place: the thing behind it, else the nearest before it."""
    behind = at + 1
    while behind < len(tokens) and (behind in taken or tokens[behind] == "and"):
        behind += 1
    if behind in things and tokens[behind] != "and":
        while behind + 1 in things and tokens[behind + 1] != "and":  # "red coffee cup": the cup
            behind += 1
        return things[behind]
    return next((things[place] for place in range(at - 1, -1, -1) if place in things), "")


def _about_one(a: Read, b: Read) -> bool:
    """Whether all that one names, the other names too."""
    return a.things <= b.things or b.things <= a.things


def _counts(a: Read, b: Read) -> bool:
    """Two numbers of one thing; of some of them there may be fewer."""
    if a.number is None or b.number is None or a.number == b.number or not (a.things and b.things):
        return False
    few, many = (a, b) if a.number < b.number else (b, a)
    return few.things <= many.things and set(few.values) <= set(many.values)


def _different(a: Read, b: Read) -> Iterator[Value]:
    """What both have a value of, and none in common."""
    others = dict(b.values)
    for value, groups in a.values:
        some = value[2] in (a.many | b.many) - _SETS
        if value in others and not some and not groups & others[value]:
            pairs = [(x, y) for x in groups for y in others[value]]
            if not any({f"{x}-{y}", f"{y}-{x}"} & kinds.TOO_NEAR for x, y in pairs):
                yield value


def _values(a: Read, b: Read) -> bool:
    """One thing, and exactly one of its properties differs."""
    same = (a.number or 1) == (b.number or 1) and (a.quoted == b.quoted or not (a.quoted and b.quoted))
    return same and len(list(_different(a, b))) == 1 and _about_one(a, b)


def _quotes(a: Read, b: Read) -> bool:
    """One sign, two texts, neither a part of the other."""
    one, other = (" ".join(sorted(each.quoted)) for each in (a, b))
    same = bool(a.things) and a.things == b.things and a.values == b.values
    return bool(one and other) and same and one not in other and other not in one


def _relations(a: Read, b: Read) -> bool:
    """One thing in two places, or two things the other way round."""
    for pattern in _RELATIONS:
        first, second = pattern.search(a.text), pattern.search(b.text)
        if first and second:
            left, right = (
                (_side(match.string[: match.start()]), _side(match.string[match.end() :]))
                for match in (first, second)
            )
            if first[0] == second[0] and all(left) and left == right[::-1] and left != right:
                return True
            if first[0] != second[0] and left == right and any(left):
                return True
    return False


def _side(text: str) -> frozenset[str]:
    return frozenset(kinds.singular(word) for word in re.findall(r"[\w-]+", text) if word not in _SMALL)
