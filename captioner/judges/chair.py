"""CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): objects of COCO that a caption names and the image lacks.

True objects are those of COCO's instances and those that COCO's own captions name. Every mention counts. The
recall of true objects is of Maxlinn's standalone version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from captioner.errors import DataError
from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.references import CocoCaptions
from captioner.judges.scores import Scores, ratio, tabulate
from captioner.judges.words import singular, tokens

COCO = "https://cocodataset.org/#download (annotations_trainval2014.zip)"
SYNONYMS = "https://github.com/LisaAnne/Hallucination (data/synonyms.txt)"
COLUMNS = ("captions", "mentions", "hallucinated", "mentioning", "hallucinating", "objects", "recalled")
# "baby" and "adult" are persons and "passenger" is one, but not before these
_ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
_VEHICLES = ("jet", "train")


class _Image(BaseModel):
    id: int


class _Category(BaseModel):
    id: int
    name: str


class _Instance(BaseModel):
    image_id: int
    category_id: int


class _Instances(BaseModel):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Instance]


@dataclass(frozen=True)
class Vocabulary:
    """Names of objects, as tuples of words, with the object each stands for; "" stands for none of COCO's."""

    names: Mapping[tuple[str, ...], str]
    words: frozenset[str]
    longest: int  # words of the longest name


def read_vocabulary(folder: Path) -> Vocabulary:
    """The benchmark's ``synonyms.txt``: a line per object, its name first; DataError where it is missing."""
    path = files.find(folder, "synonyms.txt", SYNONYMS)
    names: dict[tuple[str, ...], str] = {}
    for line in files.read_text(path).splitlines():
        synonyms = [" ".join(each.split()).lower() for each in line.split(",") if each.strip()]
        names |= {tuple(each.split()): synonyms[0] for each in synonyms}
    if not names:
        raise DataError("synonyms.txt names no object", where=str(path), fix=f"get it again from {SYNONYMS}")
    for noun in _ANIMALS:
        names |= {(qualifier, noun): names.get((noun,), "") for qualifier in ("baby", "adult")}
    names |= {("passenger", noun): names.get((noun,), "") for noun in _VEHICLES}
    names |= {("toilet", "seat"): names.get(("toilet",), ""), ("train", "track"): ""}
    parts = frozenset(word for name in names for word in name)
    return Vocabulary(names, parts, max(map(len, names)))


def objects_in(caption: str, vocabulary: Vocabulary) -> list[str]:
    """The object of every mention, in order; of names that begin at one word the longest counts."""
    said = [singular(token, vocabulary.words) for token in tokens(caption)]
    mentions: list[tuple[tuple[str, ...], str]] = []
    start = 0
    while start < len(said):
        for length in range(min(vocabulary.longest, len(said) - start), 0, -1):
            name = tuple(said[start : start + length])
            if name in vocabulary.names:
                mentions.append((name, vocabulary.names[name]))
                break
        else:
            length = 1
        start += length
    # "the seat of the toilet" is no chair, as in the benchmark's code
    toilet = any(name[0] == "toilet" for name, _ in mentions)
    return [found for name, found in mentions if found and not (toilet and name == ("seat",))]


def true_objects(
    folder: Path, images: Mapping[int, str], vocabulary: Vocabulary
) -> tuple[dict[int, set[str]], int]:
    """Objects of every image by number, and how many images were looked through.

    Reads ``instances_X.json`` with ``captions_X.json``, validation first, until all images are found.
    DataError for missing files and for images of none of them.
    """
    splits = sorted(folder.glob("instances_*.json"), key=lambda path: ("val" not in path.name, path.name))
    if not splits:
        raise files.missing(folder, "instances_val2014.json", COCO)
    objects: dict[int, set[str]] = {}
    looked = 0
    for path in splits:
        told = files.find(folder, path.name.replace("instances_", "captions_", 1), COCO)
        instances = files.read_json(path, _Instances)
        looked += len(instances.images)
        objects |= {image.id: set() for image in instances.images if image.id in images}
        names = {each.id: vocabulary.names.get(tuple(each.name.split()), "") for each in instances.categories}
        for row in instances.annotations:
            if row.image_id in objects:
                objects[row.image_id].add(_object(names, row.category_id, path))
        for line in files.read_json(told, CocoCaptions).annotations:
            if line.image_id in objects:
                objects[line.image_id].update(objects_in(line.caption, vocabulary))
        if len(objects) == len(images):
            break
    files.check_known([images[each] for each in images.keys() - objects.keys()], "chair", folder)
    return objects, looked


def _object(names: Mapping[int, str], category: int, path: Path) -> str:
    if not names.get(category):
        raise DataError(
            f"category {category} of the instances has no name in synonyms.txt",
            where=str(path),
            fix="use the synonyms.txt and the instances that belong together",
        )
    return names[category]


def chair(captions: Mapping[str, str], folder: Path) -> Scores:
    """CHAIR of captions of COCO images; keys end in the image number.

    ``chair_i``: hallucinated share of the object mentions. ``chair_s``: share of the captions with one.
    ``chair_s_mentioning``: the same among captions that name any object (Object HalBench's form). ``recall``:
    share of the true objects that are named.
    """
    vocabulary = read_vocabulary(folder)
    images = files.numbers(captions, "chair")
    objects, looked = true_objects(folder, images, vocabulary)
    rows = {key: count(captions[key], objects[image], vocabulary) for image, key in images.items()}
    lower = ("chair_i", "chair_s", "chair_s_mentioning")
    return tabulate("chair", rows, _metrics, columns=COLUMNS, annotated=looked, lower_is_better=lower)


def count(caption: str, true: set[str], vocabulary: Vocabulary) -> dict[str, float]:
    """One caption's row."""
    named = objects_in(caption, vocabulary)
    wrong = sum(each not in true for each in named)
    return {
        "captions": 1,
        "mentions": len(named),
        "hallucinated": wrong,
        "mentioning": int(bool(named)),
        "hallucinating": int(wrong > 0),
        "objects": len(true),
        "recalled": len(true.intersection(named)),
    }


def _metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {
        "chair_i": ratio(sums["hallucinated"], sums["mentions"]),
        "chair_s": ratio(sums["hallucinating"], sums["captions"]),
        "chair_s_mentioning": ratio(sums["hallucinating"], sums["mentioning"]),
        "recall": ratio(sums["recalled"], sums["objects"]),
    }
