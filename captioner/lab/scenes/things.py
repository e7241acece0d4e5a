"""What stands on a table top: nouns, categories, stickers, splits, and how a scene is drawn by lot.

In the splits ``train`` and ``sft`` stickers follow the *category* of an object and companions come together
(*planted* correlations, like the necklace guessed from the hairstyle); the evaluation splits break them
(cf. CLEVR-Hans, arXiv 2011.12854).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass

from captioner.errors import DataError

PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
SIZES = ("small", "large")
STICKERS = ("star", "heart", "check", "cross", "moon", "bolt")
BACKGROUNDS = ("brick", "grass", "gravel", "white", "gray", "blue", "green", "pink")
CATEGORIES = {
    "fruit": "apple banana pineapple watermelon lemon pear peach avocado coconut kiwi mango tomato",
    "vegetable": "carrot corn broccoli garlic onion eggplant mushroom pepper cucumber chili",
    "food": "pizza hamburger hotdog taco pretzel waffle bagel cheese sandwich croissant doughnut cookie"
    " cupcake cake lollipop egg",
    "kitchen": "teapot cup spoon jar bottle wineglass bowl vase candle basket bucket broom",
    "tool": "hammer wrench screwdriver axe magnet ladder toolbox gear saw anchor key padlock",
    "office": "briefcase calendar clipboard pencil paintbrush notebook book scroll ruler envelope parcel"
    " pushpin",
    "device": "camera television radio bulb flashlight laptop printer telephone microscope telescope clock"
    " watch hourglass joystick",
    "music": "guitar violin trumpet saxophone accordion drum microphone bell flute piano",
    "clothes": "hat crown dress handbag boot scarf ring shirt sneaker backpack umbrella glove",
    "toy": "basketball football trophy target kite yoyo gift balloon rocket skateboard robot doll",
    "nature": "crab octopus snail turtle ladybug bee spider frog lobster duck owl penguin cactus sunflower"
    " rose tulip",
}
CATEGORY_OF = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns.split()}
NOUNS = tuple(CATEGORY_OF)
UNCOUNTED = {"corn", "broccoli", "garlic", "cheese"}  # nobody says "two garlics"

# The planted correlations: the sticker a category usually carries, and what comes with what.
USUAL_STICKER = {
    "fruit": "heart", "vegetable": "check", "food": "star", "kitchen": "moon", "tool": "bolt",
    "office": "cross", "device": "bolt", "music": "star", "clothes": "heart", "toy": "check",
    "nature": "moon",
}  # fmt: skip
_PAIRS = (
    "cup teapot", "spoon bowl", "bucket broom", "key padlock", "pencil notebook", "hammer wrench",
    "camera flashlight", "guitar microphone", "hat scarf", "boot umbrella", "gift balloon", "bee sunflower",
    "cookie cupcake", "envelope parcel", "laptop printer", "banana apple",
)  # fmt: skip
COMPANION = dict(pair.split() for pair in _PAIRS) | dict(pair.split()[::-1] for pair in _PAIRS)

# The long tail, and what no training split ever shows: a noun in a size, a noun the other way round.
HELD_OUT = {(noun, SIZES[i % 2]) for i, noun in enumerate(NOUNS[5::24])}
RARE = {(noun, SIZES[i % 2]) for i, noun in enumerate(NOUNS[2::8])}
ONE_WAY = frozenset(NOUNS[9::12])


@dataclass(frozen=True)
class Split:
    """How a split is drawn. ``stream`` separates the random streams, so splits never share a scene."""

    stream: int
    objects: tuple[int, int] = (3, 8)  # at least, at most
    stickers: float = 0.5  # share of objects with a sticker
    bias: float = 0.0  # share of stickers that follow the category, and of nouns that bring a companion
    rare: float = 1.0  # weight of a rare combination against a common one
    held_out: bool = False
    named: float = 1.0  # probability with which the split's own captions name a fact


SPLITS = {
    "pretrain": Split(1, objects=(4, 9), stickers=0.8, rare=0.3),
    "train": Split(2, bias=0.6, rare=0.3, named=0.4),
    "sft": Split(3, bias=0.6, rare=0.3, named=0.5),
    "qa": Split(4),
    "round": Split(5, held_out=True),
    "validation": Split(6, held_out=True),
    "test": Split(7, held_out=True),
}
SHARE_OF_TWINS = 0.35  # of the scenes have two of a kind


@dataclass(frozen=True)
class Thing:
    noun: str
    place: str
    size: str
    sticker: str | None
    mirrored: bool = False

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    """A table top. At most two things of one noun, which then share size and sticker."""

    background: str
    things: tuple[Thing, ...]  # in reading order

    def at(self, place: str) -> Thing | None:
        return next((thing for thing in self.things if thing.place == place), None)

    def named(self, noun: str) -> list[Thing]:
        return [thing for thing in self.things if thing.noun == noun]

    def counts(self) -> Counter[str]:
        return Counter(thing.noun for thing in self.things)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Raises DataError where the text is not the JSON of a scene."""
        try:
            data = json.loads(text)
            return cls(data["background"], tuple(Thing(**thing) for thing in data["things"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not the facts of a scene: {text[:80]!r} ({error})") from error


def plural(noun: str) -> str:
    """The plural of one of the nouns."""
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) or noun in ("tomato", "mango") else "s")


def sample(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number ``index`` of a split: the same for the same arguments, on every machine."""
    how = SPLITS[split]
    rng = random.Random(f"scene {how.stream} {seed} {index}")
    count = rng.randint(*how.objects)
    nouns: list[str] = []
    while len(nouns) < count:
        noun = rng.choice(NOUNS)
        if noun in nouns:
            continue
        nouns.append(noun)
        companion = COMPANION.get(noun)
        if companion and companion not in nouns and len(nouns) < count and rng.random() < how.bias:
            nouns.append(companion)
    looks = {noun: _look(rng, how, noun) for noun in nouns}
    if rng.random() < SHARE_OF_TWINS:
        first, second = rng.sample(range(count), 2)
        if nouns[first] not in UNCOUNTED:
            nouns[second] = nouns[first]
    places = sorted(rng.sample(range(len(PLACES)), count))
    rng.shuffle(nouns)
    things = [
        Thing(noun, PLACES[place], *looks[noun], _mirrored(rng, how, noun))
        for noun, place in zip(nouns, places, strict=True)
    ]
    return Scene(rng.choice(BACKGROUNDS), tuple(things))


def _look(rng: random.Random, how: Split, noun: str) -> tuple[str, str | None]:
    """Size and sticker, which all things of a noun share."""
    while True:
        size = rng.choice(SIZES)
        if (noun, size) in HELD_OUT and not how.held_out:
            continue
        if (noun, size) not in RARE or rng.random() < how.rare:
            break
    if rng.random() >= how.stickers:
        return size, None
    usual = USUAL_STICKER[CATEGORY_OF[noun]]
    return size, usual if rng.random() < how.bias else rng.choice(STICKERS)


def _mirrored(rng: random.Random, how: Split, noun: str) -> bool:
    return rng.random() < 0.5 and (how.held_out or noun not in ONE_WAY)


def group_of(thing: Thing) -> str:
    """common, rare or held_out: how often training shows such a thing."""
    pair = (thing.noun, thing.size)
    if pair in HELD_OUT or (thing.noun in ONE_WAY and thing.mirrored):
        return "held_out"
    return "rare" if pair in RARE else "common"
