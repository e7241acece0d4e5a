"""How a caption compares with its scene, exactly; and scenes as an image folder."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from captioner.errors import DataError
from captioner.lab.scenes.language import (
    KINDS,
    execute,
    kind_of,
    normalise,
    parse,
    parse_prose,
    prose,
    questions,
    shorthand,
    statements,
    subject_of,
    swaps,
)
from captioner.lab.scenes.pictures import draw
from captioner.lab.scenes.things import PLACES, SPLITS, Scene, Thing, group_of, sample
from captioner.laboratory import Judgement, Laboratory

Shares = dict[str, tuple[int, int]]


def judge(caption: str, facts: str | Scene, prose: bool = False) -> Judgement:
    """Exact precision and recall of a caption. ``facts`` is the scene or its JSON.

    Relations count for precision only: places imply them, so they are no facts of their own.
    """
    scene = facts if isinstance(facts, Scene) else Scene.from_json(facts)
    parsed = parse_prose(caption) if prose else parse(caption)
    known = [text for text in parsed if text is not None]
    stated = dict.fromkeys(known)
    result = Judgement(len(parsed), len(parsed) - len(known), len(known) - len(stated))
    holds = {text: bool(execute(text, scene)) for text in stated}
    true = Counter(kind_of(text) for text, right in holds.items() if right)
    false = Counter(kind_of(text) for text, right in holds.items() if not right)
    result.true, result.false = true.total(), false.total()
    result.by_kind = {kind: (true[kind], false[kind]) for kind in KINDS if true[kind] + false[kind]}
    wanted = {text: text in stated for text in statements(scene)}
    result.facts, result.recalled = len(wanted), sum(wanted.values())
    result.precision_by_size = _tally((thing.size, hit) for thing, hit in _owned(scene, holds))
    result.recall_by_kind = _tally((kind_of(text), hit) for text, hit in wanted.items())
    result.recall_by_size = _tally((thing.size, hit) for thing, hit in _owned(scene, wanted))
    result.recall_by_group = _tally((group_of(thing), hit) for thing, hit in _owned(scene, wanted))
    return result


def _owned(scene: Scene, hits: dict[str, bool]) -> Iterator[tuple[Thing, bool]]:
    """The thing that each statement is first about, if the scene has it: of two, the one at its place."""
    for text, hit in hits.items():
        things = scene.named(subject_of(text))
        exact = [thing for thing in things if text == f"{thing.noun} {thing.place}"]
        if things:
            yield (exact or things)[0], hit


def _tally(hits: Iterable[tuple[str, bool]]) -> Shares:
    counts: Shares = {}
    for name, hit in hits:
        some, total = counts.get(name, (0, 0))
        counts[name] = (some + int(hit), total + 1)
    return counts


# ---------------------------------------------------------------- writing an image folder


def stream_of(split: str, index: int, seed: int = 0) -> int:
    """The number that drawing and wording of a scene are seeded with: no two splits share one."""
    return SPLITS[split].stream * 100_000_000_000 + seed * 100_000_000 + index


def rows(
    split: str, count: int, offset: int = 0, seed: int = 0
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Pictures with their metadata row. Raises DataError for an unknown split.

    ``text`` is partial in the splits whose captions people "wrote" (train, sft), else complete.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r} of the scenes", fix=f"one of {', '.join(SPLITS)}")
    for index in range(offset, offset + count):
        scene, stream = sample(split, index, seed), stream_of(split, index, seed)
        yield (
            draw(scene, stream),
            {
                "file_name": f"images/{index:06d}.png",
                "text": shorthand(scene, stream, SPLITS[split].named),
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


def claims(statements: Sequence[str], facts: str, rng: random.Random) -> list[dict[str, Any]]:
    """See :meth:`captioner.laboratory.Laboratory.claims`."""
    scene = Scene.from_json(facts)
    stated = [(text, "stated") for text in statements]
    stated += [(text, "swap") for each in statements for text in swaps(normalise(each) or "", rng)]
    found: dict[str, dict[str, Any]] = {}
    for text, stratum in stated:
        known = normalise(text)
        if known is not None and known not in found:
            answer = "yes" if execute(known, scene) else "no"
            found[known] = {"question": known, "answer": answer, "kind": kind_of(known), "stratum": stratum}
    return list(found.values())


@dataclass(frozen=True)
class _Facts:
    scene: Scene

    def holds(self, statement: str) -> bool | None:
        return execute(statement, self.scene)

    def judge(self, caption: str, *, prose: bool = False) -> Judgement:
        return judge(caption, self.scene, prose)


class _TableTop:
    """See :class:`captioner.laboratory.Laboratory`."""

    def __init__(self) -> None:
        self.splits: Collection[str] = SPLITS
        self.directions: Mapping[str, str] = {place: place for place in PLACES}
        self.write, self.kind_of, self.claims = write, kind_of, claims

    def slot_of(self, statement: str) -> str:
        """None: what contradicts what follows from the words, see :mod:`language`."""
        return ""

    def read(self, facts: str) -> _Facts | None:
        ours = facts.startswith('{"background"') and '"things":' in facts
        return _Facts(Scene.from_json(facts)) if ours else None


LABORATORY: Laboratory = _TableTop()
