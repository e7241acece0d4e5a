"""Boxes that people drew -> exact yes/no questions, statements and captions. COCO's instances.

What is asked is what boxes tell: which of the classes are there, how many, and on which side of each other.
COCO's annotators looked for every class in every image, so that a class without a box is absent.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from captioner.errors import DataError
from captioner.method import words
from captioner.method.kinds import plural

MOST = 9  # of a class that are counted
APART = 0.02  # share of the image's side by which boxes must lie apart to be on different sides


@dataclass
class Boxes:
    """The boxes of an image: class -> (left, top, right, bottom) each, in shares of the image's sides."""

    of: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    crowds: set[str] = field(default_factory=set)  # classes with a box around many, which cannot be counted

    def count(self, name: str) -> int | None:
        """How many there are; None where that is not known."""
        found = len(self.of.get(name, ()))
        return None if name in self.crowds or found > MOST else found


@dataclass(frozen=True)
class Annotated:
    """What is known about an image: true statements, a caption of them, and questions."""

    facts: list[str]
    caption: str
    questions: list[dict[str, str]]


def read_coco(path: Path) -> tuple[dict[str, Boxes], list[str]]:
    """The boxes of each image by its file name, and the names of all classes. Raises :class:`DataError`."""
    fix = "name instances_*.json of COCO: images, categories, annotations with bbox"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {each["id"]: str(each["name"]) for each in data["categories"]}
        sizes = {
            each["id"]: (str(each["file_name"]), each["width"], each["height"]) for each in data["images"]
        }
        images = {name: Boxes() for name, _, _ in sizes.values()}
        for each in data["annotations"]:
            name, width, height = sizes[each["image_id"]]
            x, y, w, h = (float(value) for value in each["bbox"])
            own, thing = images[name], names[each["category_id"]]
            own.of.setdefault(thing, []).append((x / width, y / height, (x + w) / width, (y + h) / height))
            if each.get("iscrowd"):
                own.crowds.add(thing)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise DataError(f"no boxes that can be read: {error!r}", where=str(path), fix=fix) from error
    return images, sorted(set(names.values()))


def annotate(
    images: Mapping[str, Boxes], classes: Sequence[str], per_image: int = 16, seed: int = 0
) -> Iterator[tuple[str, Annotated]]:
    """What is known about each image, with at most ``per_image`` questions, half of them answered by yes."""
    seen = Counter(name for boxes in images.values() for name in boxes.of)
    beside: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for boxes in images.values():
        for one, other in combinations(sorted(boxes.of), 2):
            beside[one][other] += 1
            beside[other][one] += 1
    for file_name, boxes in images.items():
        rng = random.Random(f"{seed} {file_name}")
        counted, placed = list(_counts(boxes)), list(_places(boxes))
        pairs = [
            *_presence(boxes, classes, seen, beside, rng),
            *((true, false, "count", "swap") for true, false in counted),
            *((true, false, "relation", "swap") for true, false in placed),
        ]
        asked: list[dict[str, str]] = []
        for true, false, kind, stratum in rng.sample(pairs, min(len(pairs), per_image // 2)):
            asked.append({"question": true, "answer": "yes", "kind": kind, "stratum": "positive"})
            asked.append({"question": false, "answer": "no", "kind": kind, "stratum": stratum})
        rng.shuffle(asked)
        named = {text.split(" ", 1)[1] for text, _ in counted}
        uncounted = [name for name in boxes.of if name not in named and plural(name) not in named]
        facts = [*(text for text, _ in counted), *uncounted, *(true for true, _ in placed)]
        yield file_name, Annotated(facts, ", ".join(facts), asked)


def _presence(
    boxes: Boxes,
    classes: Sequence[str],
    seen: Mapping[str, int],
    beside: Mapping[str, Counter[str]],
    rng: random.Random,
) -> Iterator[tuple[str, str, str, str]]:
    """Each class that is there against one that is not: popular, beside these elsewhere, or any (POPE)."""
    absent = [name for name in classes if name not in boxes.of]
    near: Counter[str] = Counter()
    for name in boxes.of:
        near.update(beside[name])
    orders = {
        "popular": sorted(absent, key=lambda name: -seen.get(name, 0)),
        "adversarial": sorted(absent, key=lambda name: -near[name]),
        "random": rng.sample(absent, len(absent)),
    }
    used: set[str] = set()
    for at, name in enumerate(rng.sample(sorted(boxes.of), len(boxes.of))):
        stratum = list(orders)[at % 3]
        other = next((each for each in orders[stratum] if each not in used), None)
        if other is not None:
            used.add(other)
            yield name, other, "object", stratum


def _counts(boxes: Boxes) -> Iterator[tuple[str, str]]:
    """ "two dogs", and what it is not."""
    numbers = words.COUNTS.split()
    for name in boxes.of:
        count = boxes.count(name)
        if count:
            other = count + 1 if count == 1 or len(name) % 2 else count - 1  # either, but always the same
            yield _counted(numbers[count - 1], name), _counted(numbers[other - 1], name)


def _counted(number: str, name: str) -> str:
    return f"{number} {name if number == 'one' else plural(name)}"


def _places(boxes: Boxes) -> Iterator[tuple[str, str]]:
    """ "dog to the left of the cat", and what it is not, of things of which there is one each."""
    single = [name for name in boxes.of if boxes.count(name) == 1]
    for one, other in combinations(single, 2):
        a, b = boxes.of[one][0], boxes.of[other][0]
        if a[2] + APART < b[0] or b[2] + APART < a[0]:
            first, last = (one, other) if a[0] < b[0] else (other, one)
            yield f"{first} to the left of the {last}", f"{first} to the right of the {last}"
        elif a[3] + APART < b[1] or b[3] + APART < a[1]:
            first, last = (one, other) if a[1] < b[1] else (other, one)
            yield f"{first} above the {last}", f"{first} below the {last}"


def as_metadata(file_name: str, known: Annotated) -> dict[str, Any]:
    """The row of metadata.jsonl."""
    return {"file_name": file_name, "text": known.caption, "questions": known.questions}
