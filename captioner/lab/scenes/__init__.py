"""Table-top scenes whose facts are known: draw, caption, question, parse, judge. No torch."""

from captioner.lab.scenes.judging import LABORATORY, claims, judge, rows, write
from captioner.lab.scenes.language import (
    KINDS,
    execute,
    kind_of,
    normalise,
    open_questions,
    parse,
    parse_prose,
    prose,
    questions,
    relations,
    shorthand,
    statements,
    swaps,
)
from captioner.lab.scenes.pictures import SIZE_PX, draw
from captioner.lab.scenes.things import (
    BACKGROUNDS,
    NOUNS,
    PLACES,
    SIZES,
    SPLITS,
    STICKERS,
    Scene,
    Split,
    Thing,
    group_of,
    plural,
    sample,
)

__all__ = [
    "BACKGROUNDS", "KINDS", "LABORATORY", "NOUNS", "PLACES", "SIZES", "SIZE_PX", "SPLITS", "STICKERS",
    "Scene", "Split", "Thing", "claims", "draw", "execute", "group_of", "judge", "kind_of", "normalise",
    "open_questions", "parse", "parse_prose", "plural", "prose", "questions", "relations", "rows",
    "sample", "shorthand", "statements", "swaps", "write",
]  # fmt: skip
