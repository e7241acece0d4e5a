"""The language of the scenes: captions, questions, and what they mean. Every answer is executed on the scene.

A caption is atomic statements between commas, in English that needs no key: `brick background`,
`teapot top left`, `large teapot`, `heart sticker on teapot`, `two lemons`, `teapot left of banana`.
Two of a kind look alike, so of two statements that differ in one value at most one is true: each noun has one
size, one sticker and one count, each place one noun, and a noun two places only where there are two of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cache

from captioner.lab.scenes.things import (
    BACKGROUNDS,
    CATEGORY_OF,
    COMPANION,
    NOUNS,
    PLACES,
    SIZES,
    STICKERS,
    UNCOUNTED,
    USUAL_STICKER,
    Scene,
    Thing,
    plural,
)

KINDS = ("object", "size", "sticker", "count", "relation", "background")
QUESTIONS_PER_KIND = {"object": 4, "size": 3, "sticker": 4, "count": 1, "relation": 3, "background": 1}
NOUN_OF_PLURAL = {plural(noun): noun for noun in NOUNS}
RELATIONS = ("left of", "above")
SHARE_OF_MALFORMED = 0.04

# ---------------------------------------------------------------- facts


def statements(scene: Scene) -> list[str]:
    """Every fact, one atomic statement each: the complete caption. Relations follow from places: left out."""
    facts = [f"{scene.background} background"]
    for noun in scene.counts():
        facts += _about(scene, noun)
    return facts


def _about(scene: Scene, noun: str) -> list[str]:
    """What there is to say about the things of one noun."""
    things = scene.named(noun)
    if not things:
        return []
    facts = [f"two {plural(noun)}"] if len(things) > 1 else []
    facts += [f"{noun} {thing.place}" for thing in things] + [f"{things[0].size} {noun}"]
    return facts + ([f"{things[0].sticker} sticker on {noun}"] if things[0].sticker else [])


def relations(scene: Scene) -> list[str]:
    """True relations between nouns that occur once. In other columns is beside, in other rows above."""
    counts = scene.counts()
    single = [thing for thing in scene.things if counts[thing.noun] == 1]
    return [
        f"{a.noun} {words} {b.noun}"
        for a in single
        for b in single
        for words in RELATIONS
        if _before(a, b, words)
    ]


def _before(a: Thing, b: Thing, words: str) -> bool:
    return a.column < b.column if words == "left of" else a.row < b.row


def execute(statement: str, scene: Scene) -> bool | None:
    """Whether a statement holds in a scene; None where it cannot be parsed.

    A relation between nouns holds where it holds for all their things.
    """
    text = normalise(statement)
    if text is None:
        return None
    kind = kind_of(text)
    if kind == "background":
        return text == f"{scene.background} background"
    if kind == "relation":
        match = _RELATION.fullmatch(text)
        assert match
        first, words, last = scene.named(match[1]), match[2], scene.named(match[3])
        return bool(first and last) and all(_before(a, b, words) for a in first for b in last)
    return text in _about(scene, subject_of(text))


# ---------------------------------------------------------------- captions


def shorthand(scene: Scene, index: int = 0, named: float = 1.0) -> str:
    """A caption. ``named`` 1: complete, in reading order. Below 1: as people write, drawn by ``index``.

    People name a fact with that probability, whether the picture shows it or not, and things in any order,
    with at most two relations.
    """
    if named >= 1:
        return ", ".join(statements(scene))
    rng = random.Random(f"caption {index}")
    groups = [[f"{scene.background} background"], *(_about(scene, noun) for noun in scene.counts())]
    related = relations(scene)
    groups += [[text] for text in rng.sample(related, min(2, len(related)))]
    while True:
        rng.shuffle(groups)
        said = [text for group in groups for text in group if rng.random() < named]
        if said:
            return ", ".join(said)


def prose(scene: Scene, index: int = 0) -> str:
    """A partial caption in whole sentences: things and details are left out."""
    rng = random.Random(f"prose {index}")
    things = [thing for thing in scene.things if rng.random() < 0.7] or list(scene.things[:1])
    phrases = []
    for thing in things:
        size = f"{thing.size} " if rng.random() < 0.8 else ""
        sticker = f" with a {thing.sticker} sticker" if thing.sticker and rng.random() < 0.8 else ""
        phrases.append(f"a {size}{thing.noun}{sticker} at the {thing.place}")
    opening = rng.choice(["The picture shows", "There is", "We can see"])
    ending = f" on a {scene.background} background" if rng.random() < 0.7 else ""
    return f"{opening} {' and '.join(filter(None, [', '.join(phrases[:-1]), phrases[-1]]))}{ending}."


# ---------------------------------------------------------------- questions


def questions(scene: Scene, index: int = 0) -> list[dict[str, str]]:
    """Yes/no questions, as many "no" as "yes" for each kind, negatives in strata; then open ones.

    A yes/no question is a statement. Columns: question, answer, kind, stratum.
    """
    rng = random.Random(f"questions {index}")
    rows: dict[str, dict[str, str]] = {}
    for kind in KINDS:
        for _ in range(QUESTIONS_PER_KIND[kind]):
            positive, negative = ask(rng, scene, kind, True), ask(rng, scene, kind, False)
            if positive and negative and not {positive["question"], negative["question"]} & set(rows):
                rows |= {row["question"]: row for row in (positive, negative)}
    return [*rows.values(), *open_questions(scene)]


def ask(rng: random.Random, scene: Scene, kind: str, true: bool) -> dict[str, str] | None:
    """One yes/no question of a kind; None where the scene has none (no sticker, no relation)."""
    if true:
        texts = (
            relations(scene) if kind == "relation" else [t for t in statements(scene) if kind_of(t) == kind]
        )
        return _question(rng.choice(texts), "yes", kind, "positive") if texts else None
    if kind == "sticker" and not any(thing.sticker for thing in scene.things):
        return None
    if kind == "count" and max(scene.counts().values()) < 2:
        return None
    for _ in range(20):
        text, stratum = _NEGATIVES[kind](rng, scene)
        if stratum == "malformed" or execute(text, scene) is False:
            return _question(text, "no", kind, stratum)
    return None


def open_questions(scene: Scene) -> list[dict[str, str]]:
    """What is asked for by name: `what is at top left?` -> `teapot`, `where is teapot?` -> `top left`."""
    rows = [_question("what background?", scene.background, "background", "open")]
    for place in PLACES:
        thing = scene.at(place)
        rows.append(_question(f"what is at {place}?", thing.noun if thing else "nothing", "object", "open"))
    for noun, count in scene.counts().items():
        thing = scene.named(noun)[0]
        if count == 1:
            rows.append(_question(f"where is {noun}?", thing.place, "object", "open"))
        rows.append(_question(f"what size is {noun}?", thing.size, "size", "open"))
        rows.append(_question(f"what sticker is on {noun}?", thing.sticker or "none", "sticker", "open"))
        if noun not in UNCOUNTED:
            rows.append(_question(f"how many {plural(noun)}?", ("one", "two")[count - 1], "count", "open"))
    return rows


def _question(question: str, answer: str, kind: str, stratum: str) -> dict[str, str]:
    return {"question": question, "answer": answer, "kind": kind, "stratum": stratum}


def _noun(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A noun for a false statement: of the scene, what usually comes with one of its things, or any."""
    draw, present = rng.random(), rng.choice(scene.things).noun
    if draw < 0.5:
        return present, "swap"
    companion = COMPANION.get(present)
    if draw < 0.65 and companion and not scene.named(companion):
        return companion, "adversarial"
    return rng.choice(NOUNS), "absent"


def _no_object(rng: random.Random, scene: Scene) -> tuple[str, str]:
    noun, stratum = _noun(rng, scene)
    place = rng.choice(PLACES)
    if rng.random() < 0.6:
        place = rng.choice(scene.things).place
    elif stratum == "swap" and scene.at(place) is None:
        stratum = "empty"
    if rng.random() < SHARE_OF_MALFORMED:
        return f"{noun} {noun}", "malformed"
    return f"{noun} {place}", stratum


def _no_size(rng: random.Random, scene: Scene) -> tuple[str, str]:
    if rng.random() < 0.7:
        thing = rng.choice(scene.things)
        return f"{SIZES[1 - SIZES.index(thing.size)]} {thing.noun}", "swap"
    noun, stratum = _noun(rng, scene)
    return f"{rng.choice(SIZES)} {noun}", stratum


def _no_sticker(rng: random.Random, scene: Scene) -> tuple[str, str]:
    carriers = [thing for thing in scene.things if thing.sticker]
    others = [thing for thing in scene.things if not thing.sticker]
    draw, kind = rng.random(), rng.choice(STICKERS)
    if draw < 0.45:
        return f"{kind} sticker on {rng.choice(carriers).noun}", "random"
    if draw < 0.6:
        thing = rng.choice(scene.things)
        return f"{USUAL_STICKER[CATEGORY_OF[thing.noun]]} sticker on {thing.noun}", "adversarial"
    if draw < 0.85 and others:
        return f"{rng.choice(carriers).sticker} sticker on {rng.choice(others).noun}", "swap"
    return f"{kind} sticker on {_noun(rng, scene)[0]}", "absent"


def _no_count(rng: random.Random, scene: Scene) -> tuple[str, str]:
    noun = _noun(rng, scene)[0] if rng.random() < 0.3 else rng.choice(scene.things).noun
    while noun in UNCOUNTED:
        noun = rng.choice(NOUNS)
    return f"two {plural(noun)}", "swap" if scene.named(noun) else "absent"


def _no_relation(rng: random.Random, scene: Scene) -> tuple[str, str]:
    related = relations(scene)
    words = rng.choice(RELATIONS)
    if rng.random() < 0.6 and related:
        match = _RELATION.fullmatch(rng.choice(related))
        assert match
        return f"{match[3]} {match[2]} {match[1]}", "swap"
    first, last = rng.choice(scene.things).noun, rng.choice(scene.things).noun
    if rng.random() < 0.5:
        return f"{first} {words} {last}", "random"
    other = _noun(rng, scene)[0] if rng.random() < 0.5 else rng.choice(NOUNS)
    return (f"{other} {words} {last}" if rng.random() < 0.5 else f"{first} {words} {other}"), "absent"


def _no_background(rng: random.Random, scene: Scene) -> tuple[str, str]:
    return f"{rng.choice(BACKGROUNDS)} background", "random"


_NEGATIVES: dict[str, Callable[[random.Random, Scene], tuple[str, str]]] = {
    "object": _no_object,
    "size": _no_size,
    "sticker": _no_sticker,
    "count": _no_count,
    "relation": _no_relation,
    "background": _no_background,
}

# ---------------------------------------------------------------- parsing

_NOUN, _PLURAL = "|".join(NOUNS), "|".join(NOUN_OF_PLURAL)
_PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_SIZE, _STICKER = "|".join(SIZES), "|".join(STICKERS)
_OBJECT = re.compile(rf"({_NOUN})(?: is)?(?: at| in| on)? ({_PLACE})")
_SIZED = re.compile(rf"({_SIZE}) ({_NOUN})|({_NOUN}) is ({_SIZE})")
_STUCK = re.compile(rf"({_STICKER})(?: sticker)? on ({_NOUN})|({_NOUN}) with ({_STICKER})(?: sticker)?")
_COUNT = re.compile(rf"two ({_PLURAL})")
_RELATION = re.compile(rf"({_NOUN}) (?:is )?(left of|above) ({_NOUN})")
_BACKGROUND = re.compile(rf"({'|'.join(BACKGROUNDS)}) background")
_PROSE = re.compile(
    rf"an? (?:({_SIZE}) )?({_NOUN})\b(?: with an? ({_STICKER}) sticker)?(?: (?:at|in) the ({_PLACE})\b)?"
)


def normalise(statement: str) -> str | None:
    """The canonical form of a statement, or None where it cannot be parsed."""
    return _read(statement)[0]


def kind_of(statement: str) -> str:
    """One of ``KINDS``; "" where the statement cannot be parsed."""
    return _read(statement)[1]


def subject_of(statement: str) -> str:
    """The noun that a statement is first about; "" for backgrounds and what cannot be parsed."""
    return _read(statement)[2]


@cache
def _read(statement: str) -> tuple[str | None, str, str]:
    """Canonical form, kind and subject."""
    words = statement.lower().replace(".", " ").split()
    text = " ".join(word for word in words if word not in ("a", "an", "the"))
    if match := _OBJECT.fullmatch(text):
        return f"{match[1]} {match[2]}", "object", match[1]
    if match := _SIZED.fullmatch(text):
        return f"{match[1] or match[4]} {match[2] or match[3]}", "size", match[2] or match[3]
    if match := _STUCK.fullmatch(text):
        noun = match[2] or match[3]
        return f"{match[1] or match[4]} sticker on {noun}", "sticker", noun
    if match := _COUNT.fullmatch(text):
        return text, "count", NOUN_OF_PLURAL[match[1]]
    if match := _RELATION.fullmatch(text):
        return f"{match[1]} {match[2]} {match[3]}", "relation", match[1]
    if match := _BACKGROUND.fullmatch(text):
        return text, "background", ""
    return None, "", ""


def swaps(statement: str, rng: random.Random) -> Iterator[str]:
    """A canonical statement with one of its values changed, each in turn, and a relation turned around."""
    for values in (NOUNS, PLACES, SIZES, STICKERS, BACKGROUNDS, tuple(NOUN_OF_PLURAL)):
        for match in re.finditer(rf"\b(?:{'|'.join(sorted(values, key=len, reverse=True))})\b", statement):
            changed = rng.choice([value for value in values if value != match[0]])
            text = normalise(statement[: match.start()] + changed + statement[match.end() :])
            if text is not None:  # `left` is a place and half a relation
                yield text
    if related := _RELATION.fullmatch(statement):
        yield f"{related[3]} {related[2]} {related[1]}"


def parse(caption: str) -> list[str | None]:
    """Canonical statements of a shorthand caption in order, None for each that cannot be parsed."""
    return [normalise(part) for part in re.split(r"[,;\n]", caption) if part.strip()]


def parse_prose(caption: str) -> list[str | None]:
    """Canonical statements of a prose caption; what no pattern matches is not counted."""
    return list(_prose_statements(" ".join(caption.lower().split())))


def _prose_statements(text: str) -> Iterator[str]:
    for size, noun, sticker, place in _PROSE.findall(text):
        if place:
            yield f"{noun} {place}"
        if size:
            yield f"{size} {noun}"
        if sticker:
            yield f"{sticker} sticker on {noun}"
    yield from (f"{name} background" for name in _BACKGROUND.findall(text))
