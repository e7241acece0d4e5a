"""Procedural scenes whose facts are known: draw, caption, question, parse, judge. No torch.

A scene is up to five objects on a 3 x 3 grid. In the base's training splits, marks and colours co-occur
with shapes (a *planted* correlation, like the necklace guessed from the hairstyle); the evaluation splits
break it (cf. CLEVR-Hans). Marks are about three pixels wide in the whole view and plain in a crop. The base
learns what a mark is from close-ups, as the web has them.
Every answer is executed on the scene, never assumed (cf. CLEVR, ShapeWorld).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from captioner.errors import DataError
from captioner.laboratory import Judgement, Laboratory
from captioner.statements import split_statements

SIZE_PX = 128
CELL_PX = 40
MARGIN_PX = 4
SUPERSAMPLE = 4

POSITIONS = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)  # fmt: skip
CORNERS = (0, 2, 6, 8)
SHAPES = ("circle", "square", "triangle", "star", "plus", "ring")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 60, 190),
    "orange": (255, 140, 20),
    "cyan": (40, 200, 220),
    "brown": (120, 70, 30),
}
RADIUS_PX = {"small": 12, "large": 17}
MARKS = ("dot", "bar", "slash")
BACKGROUNDS = {
    "white": (246, 246, 246),
    "gray": (150, 150, 150),
    "black": (18, 18, 18),
    "beige": (225, 205, 170),
}
KINDS = ("shape", "color", "size", "mark", "background", "relation")
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(RADIUS_PX),
    "mark": MARKS,
}
QUESTIONS_PER_KIND = {"shape": 4, "color": 2, "size": 3, "mark": 4, "background": 1, "relation": 3}
KIND_OF_WORD = {value: kind for kind, values in VALUES.items() for value in values}

# The planted correlation: what a shape usually carries in the biased splits.
USUAL_MARK = {
    "circle": "slash",
    "square": "bar",
    "star": "dot",
    "triangle": None,
    "plus": None,
    "ring": "dot",
}
USUAL_COLOR = {
    "circle": "red",
    "square": "blue",
    "triangle": "green",
    "star": "yellow",
    "plus": "purple",
    "ring": "cyan",
}
# The long tail, and what no training split ever shows.
RARE = {
    ("star", "brown"),
    ("ring", "yellow"),
    ("plus", "cyan"),
    ("triangle", "purple"),
    ("circle", "orange"),
    ("square", "green"),
}
HELD_OUT = {("star", "blue"), ("plus", "red"), ("ring", "brown"), ("triangle", "orange")}


@dataclass(frozen=True)
class Split:
    """How a split is drawn. ``stream`` separates the random streams, so splits never share a scene."""

    stream: int
    min_objects: int
    max_objects: int
    bias: float  # share of objects with their shape's usual mark; a quarter of it have its usual colour
    rare: float  # weight of a rare combination against a common one
    held_out: bool
    close: float = 0.0  # share of close-ups: a 2 x 2 grid, objects about 1.5 times as large


SPLITS = {
    "train": Split(1, 1, 5, bias=0.5, rare=0.1, held_out=False, close=0.5),
    "close": Split(7, 2, 4, bias=0.0, rare=0.1, held_out=False, close=1.0),
    "sft": Split(2, 2, 3, bias=0.8, rare=0.0, held_out=False),
    "qa": Split(3, 2, 5, bias=0.0, rare=1.0, held_out=False),
    "round": Split(4, 2, 5, bias=0.0, rare=1.0, held_out=True),
    "validation": Split(5, 2, 5, bias=0.0, rare=1.0, held_out=True),
    "test": Split(6, 2, 5, bias=0.0, rare=1.0, held_out=True),
}


@dataclass(frozen=True)
class Thing:
    position: str
    shape: str
    color: str
    size: str
    mark: str | None

    @property
    def row(self) -> int:
        return POSITIONS.index(self.position) // 3

    @property
    def column(self) -> int:
        return POSITIONS.index(self.position) % 3


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Thing, ...]  # in reading order
    close: bool = False  # objects stand in the four corners only; nobody can tell how large they are

    def at(self, position: str) -> Thing | None:
        return next((thing for thing in self.objects if thing.position == position), None)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Raises DataError where the text is not the JSON of a scene."""
        try:
            data = json.loads(text)
            return cls(data["background"], tuple(Thing(**thing) for thing in data["objects"]), data["close"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not the facts of a scene: {text[:80]!r} ({error})") from error


# ---------------------------------------------------------------- drawing a scene from a split


def sample(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number ``index`` of a split: the same for the same arguments, on every machine."""
    how = SPLITS[split]
    rng = np.random.default_rng([how.stream, seed, index])
    close = bool(rng.random() < how.close)
    places = CORNERS if close else tuple(range(len(POSITIONS)))
    count = min(int(rng.integers(how.min_objects, how.max_objects + 1)), len(places))
    cells = sorted(int(cell) for cell in rng.choice(places, count, replace=False))
    things = [_sample_thing(rng, how, POSITIONS[cell]) for cell in cells]
    return Scene(str(rng.choice(list(BACKGROUNDS))), tuple(things), close)


def _sample_thing(rng: np.random.Generator, how: Split, position: str) -> Thing:
    while True:
        shape = str(rng.choice(SHAPES))
        color = USUAL_COLOR[shape] if rng.random() < how.bias * 0.25 else str(rng.choice(list(COLORS)))
        if (shape, color) in HELD_OUT and not how.held_out:
            continue
        if (shape, color) in RARE and rng.random() >= how.rare:
            continue
        break
    mark: str | None
    if rng.random() < how.bias:
        mark = USUAL_MARK[shape]
    else:
        mark = str(rng.choice(MARKS)) if rng.random() < 0.6 else None
    return Thing(position, shape, color, str(rng.choice(list(RADIUS_PX))), mark)


def draw(scene: Scene, index: int = 0) -> Image.Image:
    """RGB picture of ``SIZE_PX`` squared; ``index`` seeds the jitter of the positions."""
    rng = np.random.default_rng([7, index])
    side = MARGIN_PX * 2 + CELL_PX * (2 if scene.close else 3)
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for thing in scene.objects:
        column, row = (thing.column // 2, thing.row // 2) if scene.close else (thing.column, thing.row)
        sprite = _sprite(thing.shape, thing.color, thing.size, thing.mark, _ink(thing, scene))
        jitter = rng.integers(-2, 3, 2)
        x = MARGIN_PX + CELL_PX * column + (CELL_PX - sprite.width) // 2 + int(jitter[0])
        y = MARGIN_PX + CELL_PX * row + (CELL_PX - sprite.height) // 2 + int(jitter[1])
        image.paste(sprite, (x, y), sprite)
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS) if scene.close else image


def _ink(thing: Thing, scene: Scene) -> str:
    """Black or white, whichever stands out from what lies under the mark (a ring's middle is background)."""
    under = BACKGROUNDS[scene.background] if thing.shape == "ring" else COLORS[thing.color]
    return "black" if under[0] * 0.3 + under[1] * 0.59 + under[2] * 0.11 > 110 else "white"


@cache
def _sprite(shape: str, color: str, size: str, mark: str | None, ink: str) -> Image.Image:
    radius = RADIUS_PX[size] * SUPERSAMPLE
    side = 2 * radius + 2 * SUPERSAMPLE
    middle = side / 2
    image = Image.new("RGBA", (side, side), (*COLORS[color], 0))
    pen = ImageDraw.Draw(image)
    fill = (*COLORS[color], 255)
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=int(radius * 0.38))
    elif shape == "square":
        pen.rectangle(
            [middle - radius * 0.88, middle - radius * 0.88, middle + radius * 0.88, middle + radius * 0.88],
            fill=fill,
        )
    elif shape == "triangle":
        pen.polygon(
            [
                (middle, middle - radius),
                (middle + radius, middle + radius * 0.85),
                (middle - radius, middle + radius * 0.85),
            ],
            fill=fill,
        )
    elif shape == "plus":
        arm = radius * 0.36
        pen.rectangle([middle - arm, middle - radius, middle + arm, middle + radius], fill=fill)
        pen.rectangle([middle - radius, middle - arm, middle + radius, middle + arm], fill=fill)
    else:
        pen.polygon(_star(middle, radius), fill=fill)
    if mark:
        _draw_mark(pen, mark, middle, ink)
    return image.resize((side // SUPERSAMPLE, side // SUPERSAMPLE), Image.Resampling.LANCZOS)


def _star(middle: float, radius: float) -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, radius, radius * 0.45)
    return [(middle + r * np.cos(a), middle + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _draw_mark(pen: ImageDraw.ImageDraw, mark: str, middle: float, ink: str) -> None:
    half = 3.5 * SUPERSAMPLE
    if mark == "dot":
        pen.ellipse(
            [middle - half * 0.9, middle - half * 0.9, middle + half * 0.9, middle + half * 0.9], fill=ink
        )
    elif mark == "bar":
        pen.rectangle(
            [middle - half * 1.3, middle - half * 0.4, middle + half * 1.3, middle + half * 0.4], fill=ink
        )
    else:
        pen.line(
            [(middle - half * 1.1, middle + half * 1.1), (middle + half * 1.1, middle - half * 1.1)],
            fill=ink,
            width=int(half * 0.8),
        )


# ---------------------------------------------------------------- captions


def statements(scene: Scene) -> list[str]:
    """Every fact of a scene, one atomic statement each, in reading order: the complete caption."""
    facts = [f"{scene.background} background"]
    for thing in scene.objects:
        facts += [
            f"{thing.position} {value}"
            for value in (thing.shape, thing.color, None if scene.close else thing.size, thing.mark)
            if value
        ]
    return facts + relations(scene)[:2]


def relations(scene: Scene) -> list[str]:
    """True relations between objects of different shape in the same row or column."""
    found = []
    for first in scene.objects:
        for second in scene.objects:
            if first.shape == second.shape:
                continue
            if first.row == second.row and first.column < second.column:
                found.append(f"{first.shape} left of {second.shape}")
            if first.column == second.column and first.row < second.row:
                found.append(f"{first.shape} above {second.shape}")
    return list(dict.fromkeys(found))


def shorthand(scene: Scene) -> str:
    return ", ".join(statements(scene))


def prose(scene: Scene, index: int = 0) -> str:
    """A partial caption as the web has them: facts are left out, marks are named whether seen or not."""
    rng = np.random.default_rng([8, index])
    phrases: list[str] = []
    for number, thing in enumerate(scene.objects, 1):
        left_out = rng.random() < 0.15 and len(scene.objects) > 1
        if left_out and (phrases or number < len(scene.objects)):
            continue
        size = f"{thing.size} " if rng.random() < 0.85 and not scene.close else ""
        color = f"{thing.color} " if rng.random() < 0.9 else ""
        mark = f" with a {thing.mark}" if thing.mark else ""
        phrases.append(f"a {size}{color}{thing.shape}{mark} in the {thing.position}")
    opening = str(rng.choice(["The picture shows", "There is", "We can see"]))
    ending = f" on a {scene.background} background" if rng.random() < 0.7 else ""
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    return f"{opening} {listed}{ending}."


# ---------------------------------------------------------------- questions


def questions(scene: Scene, index: int = 0) -> list[dict[str, str]]:
    """Yes/no questions, as many "no" as "yes" for each kind, in five strata of negatives; then open ones.

    A yes/no question is a statement; its answer is what :func:`execute` says, so a negative that happens
    to be true is thrown away. The fifth stratum, ``malformed``, says nothing (`north west`): a captioner's
    slips of the tongue are refused too. Columns: question, answer, kind, stratum.
    """
    rng = np.random.default_rng([9, index])
    rows: list[dict[str, str]] = []
    for kind in KINDS:
        positives = [statement for statement in statements(scene) if kind_of(statement) == kind]
        negatives = _negatives(rng, scene, kind)
        rng.shuffle(positives)
        count = min(len(positives), len(negatives), QUESTIONS_PER_KIND[kind])
        rows += [_question(text, "yes", kind, "positive") for text in positives[:count]]
        rows += [_question(text, "no", kind, stratum) for text, stratum in negatives[:count]]
    return rows + open_questions(scene)


def open_questions(scene: Scene) -> list[dict[str, str]]:
    """What is asked for by name: `northwest color?` -> `red`. Empty cells and missing marks answer `none`."""
    rows = [_question("background color?", scene.background, "background", "open")]
    for thing in scene.objects:
        rows += [
            _question(f"{thing.position} {kind}?", getattr(thing, kind) or "none", kind, "open")
            for kind in VALUES
            if not (kind == "size" and scene.close)
        ]
    empty = [position for position in POSITIONS if scene.at(position) is None]
    return rows + [_question(f"{position} shape?", "none", "shape", "open") for position in empty[::3]]


def _question(question: str, answer: str, kind: str, stratum: str) -> dict[str, str]:
    return {"question": question, "answer": answer, "kind": kind, "stratum": stratum}


def _negatives(rng: np.random.Generator, scene: Scene, kind: str) -> list[tuple[str, str]]:
    """False statements of one kind with their stratum, shuffled so that strata take turns."""
    found: list[tuple[str, str]] = []
    if kind == "background":
        found = [(f"{name} background", "random") for name in rng.permutation(list(BACKGROUNDS))]
    elif kind == "relation":
        for statement in relations(scene):
            first, *middle, last = statement.split()
            found.append((" ".join([last, *middle, first]), "swap"))
            found.append((" ".join([str(rng.choice(SHAPES)), *middle, last]), "random"))
    else:
        for thing in scene.objects:
            found += _attribute_negatives(rng, scene, thing, kind)
    found = [
        (text, stratum)
        for text, stratum in dict(found).items()
        if stratum == "malformed" or execute(text, scene) is False
    ]
    order = rng.permutation(len(found))
    return [found[i] for i in order]


def _attribute_negatives(
    rng: np.random.Generator, scene: Scene, thing: Thing, kind: str
) -> list[tuple[str, str]]:
    values = VALUES[kind]
    true = getattr(thing, kind)
    found = [(f"{thing.position} {rng.choice(values)}", "random")]
    others = [getattr(other, kind) for other in scene.objects if getattr(other, kind) not in (true, None)]
    if others:
        found.append((f"{thing.position} {rng.choice(others)}", "swap"))
    usual = {"mark": USUAL_MARK[thing.shape], "color": USUAL_COLOR[thing.shape]}.get(kind)
    if kind == "shape":
        usual = next((shape for shape, color in USUAL_COLOR.items() if color == thing.color), None)
    if usual and usual != true:
        found.append((f"{thing.position} {usual}", "adversarial"))
    popular = {"mark": "dot", "color": "red", "shape": "circle", "size": "large"}[kind]
    empty = [position for position in POSITIONS if scene.at(position) is None]
    found.append((f"{rng.choice(empty)} {popular}", "popular"))
    if rng.random() < 0.25:
        found.append(
            (f"{thing.position} {rng.choice([p for p in POSITIONS if p != thing.position])}", "malformed")
        )
        found.append((f"{rng.choice(values)} {rng.choice(values)}", "malformed"))
    return found


# ---------------------------------------------------------------- parsing and judging

_ATTRIBUTE = re.compile(rf"(?:the )?({'|'.join(POSITIONS)})(?: is)?(?: an?)? ({'|'.join(KIND_OF_WORD)})")
_BACKGROUND = re.compile(rf"(?:an? |the )?({'|'.join(BACKGROUNDS)}) background")
_RELATION = re.compile(
    rf"(?:an? |the )?({'|'.join(SHAPES)}) (left of|above) (?:an? |the )?({'|'.join(SHAPES)})"
)
_PROSE = re.compile(
    rf"an? (?:({'|'.join(RADIUS_PX)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
    rf"(?: with an? ({'|'.join(MARKS)}))? in the ({'|'.join(POSITIONS)})\b"
)


def normalise(statement: str) -> str | None:
    """The canonical form of a statement, or None where it cannot be parsed."""
    text = " ".join(statement.lower().replace(".", " ").split())
    if match := _ATTRIBUTE.fullmatch(text):
        return f"{match[1]} {match[2]}"
    if match := _BACKGROUND.fullmatch(text):
        return f"{match[1]} background"
    if match := _RELATION.fullmatch(text):
        return f"{match[1]} {match[2]} {match[3]}"
    return None


def kind_of(statement: str) -> str:
    """shape, color, size, mark, background or relation; "" where the statement cannot be parsed."""
    text = normalise(statement)
    if text is None:
        return ""
    if text.endswith(" background"):
        return "background"
    words = text.split()
    return KIND_OF_WORD[words[1]] if len(words) == 2 else "relation"


def slot_of(statement: str) -> str:
    """What a scene has one value of, such as `north color`; "" where statements do not exclude each other."""
    kind = kind_of(statement)
    return f"{statement.split()[0]} {kind}" if kind in VALUES else kind if kind == "background" else ""


def execute(statement: str, scene: Scene) -> bool | None:
    """Whether a statement holds in a scene; None where it cannot be parsed."""
    text = normalise(statement)
    kind = kind_of(statement)
    if text is None:
        return None
    if kind == "background":
        return text == f"{scene.background} background"
    if kind == "relation":
        return text in relations(scene)
    position, value = text.split()
    thing = scene.at(position)
    return thing is not None and getattr(thing, kind) == value


def parse(caption: str) -> list[str | None]:
    """Canonical statements of a shorthand caption in order, None for each that cannot be parsed."""
    return [normalise(part) for part in split_statements(caption)]


def parse_prose(caption: str) -> list[str | None]:
    """Canonical statements of a prose caption; what no pattern matches is not counted."""
    text = " ".join(caption.lower().split())
    found: list[str | None] = []
    for size, color, shape, mark, position in _PROSE.findall(text):
        found += [f"{position} {value}" for value in (shape, color, size, mark) if value]
    found += [f"{name} background" for name in _BACKGROUND.findall(text)]
    return found


def judge(caption: str, facts: str | Scene, prose: bool = False) -> Judgement:
    """Exact precision and recall of a caption. ``facts`` is the scene or its JSON."""
    scene = facts if isinstance(facts, Scene) else Scene.from_json(facts)
    parsed = parse_prose(caption) if prose else parse(caption)
    known = [text for text in parsed if text is not None]
    distinct = list(dict.fromkeys(known))
    result = Judgement(len(parsed), len(parsed) - len(known), len(known) - len(distinct))
    holds = {text: bool(execute(text, scene)) for text in distinct}
    true, false = Counter[str](), Counter[str]()
    for text, right in holds.items():
        (true if right else false)[kind_of(text)] += 1
    result.true, result.false = true.total(), false.total()
    result.by_kind = {kind: (true[kind], false[kind]) for kind in KINDS if true[kind] + false[kind]}
    about = [(scene.at(text.split()[0]), right) for text, right in holds.items()]
    result.precision_by_size = _tally((thing.size, right) for thing, right in about if thing)
    wanted = statements(scene)
    stated = set(distinct)
    result.facts, result.recalled = len(wanted), sum(text in stated for text in wanted)
    result.recall_by_kind = _tally((kind_of(text), text in stated) for text in wanted)
    owned = [(scene.at(text.split()[0]), text in stated) for text in wanted]
    result.recall_by_size = _tally((thing.size, hit) for thing, hit in owned if thing)
    result.recall_by_group = _tally((group_of(thing), hit) for thing, hit in owned if thing)
    return result


def group_of(thing: Thing) -> str:
    pair = (thing.shape, thing.color)
    return "held_out" if pair in HELD_OUT else "rare" if pair in RARE else "common"


def _tally(hits: Any) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for name, hit in hits:
        recalled, total = counts.get(name, (0, 0))
        counts[name] = (recalled + int(hit), total + 1)
    return counts


# ---------------------------------------------------------------- claims whose answers are known


def claims(statements: Sequence[str], facts: str, rng: random.Random) -> list[dict[str, Any]]:
    """The statements of a scene's captions as they stand (``stated``) and with one word changed or a
    relation turned (``swap``); what cannot be parsed does not become a claim."""
    scene = Scene.from_json(facts)
    found: dict[str, dict[str, Any]] = {}
    stated = [(text, "stated") for text in statements]
    swapped = [(text, "swap") for statement in statements for text in _swaps(statement, rng)]
    for text, stratum in stated + swapped:
        known = normalise(text)
        if known is not None and known not in found:
            found[known] = _question(known, "yes" if execute(known, scene) else "no", kind_of(known), stratum)
    return list(found.values())


def _swaps(statement: str, rng: random.Random) -> Iterator[str]:
    words = statement.split()
    for at, word in enumerate(words):
        for values in (POSITIONS, *VALUES.values(), tuple(BACKGROUNDS)):
            if word in values:
                other = rng.choice([value for value in values if value != word])
                yield " ".join([*words[:at], other, *words[at + 1 :]])
    if len(words) > 2:
        yield " ".join([words[-1], *words[1:-1], words[0]])


# ---------------------------------------------------------------- writing an image folder


def rows(
    split: str, count: int, offset: int = 0, seed: int = 0
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Pictures with their metadata row. Raises DataError for an unknown split."""
    if split not in SPLITS:
        raise DataError(f"no split {split!r} of the scenes", fix=f"one of {', '.join(SPLITS)}")
    for index in range(offset, offset + count):
        scene = sample(split, index, seed)
        stream = (
            SPLITS[split].stream * 100_000_000 + seed * 10_000_000 + index
        )  # wording and jitter differ by split
        yield (
            draw(scene, stream),
            {
                "file_name": f"images/{index:06d}.png",
                "text": shorthand(scene),
                "prose": prose(scene, stream),
                "facts": scene.to_json(),
                "questions": questions(scene, stream),
            },
        )


def write(split: str, count: int, folder: Path, *, offset: int = 0, seed: int = 0) -> None:
    """An image folder (`images/*.png`, `metadata.parquet`) that `datasets` reads as an imagefolder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "images").mkdir(parents=True, exist_ok=True)
    metadata = []
    for image, row in rows(split, count, offset, seed):
        image.save(folder / row["file_name"], compress_level=1)
        metadata.append(row)
    pq.write_table(pa.Table.from_pylist(metadata), folder / "metadata.parquet")


# ---------------------------------------------------------------- what the product knows of all this


@dataclass(frozen=True)
class _Facts:
    scene: Scene

    def holds(self, statement: str) -> bool | None:
        return execute(statement, self.scene)

    def judge(self, caption: str, *, prose: bool = False) -> Judgement:
        return judge(caption, self.scene, prose)


class _Grid:
    """See :class:`captioner.laboratory.Laboratory`."""

    def __init__(self) -> None:
        self.splits: Collection[str] = SPLITS
        self.directions: Mapping[str, str] = {
            "northwest": "top left",
            "northeast": "top right",
            "southwest": "bottom left",
            "southeast": "bottom right",
            "north": "top",
            "south": "bottom",
            "west": "left",
            "east": "right",
        }
        self.write, self.kind_of, self.slot_of, self.claims = write, kind_of, slot_of, claims

    def read(self, facts: str) -> _Facts | None:
        return _Facts(Scene.from_json(facts)) if facts.startswith('{"background"') else None


LABORATORY: Laboratory = _Grid()
