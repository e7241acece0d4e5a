"""Captions of any maker: read from the file they come in, and told by numbers that need no judge.

Shapes: N captions, C columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from captioner.errors import DataError
from captioner.judges.base import Said
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate
from captioner.method import kinds
from captioner.method.shorthand import is_plain
from captioner.records import CaptionRow
from captioner.sources.captions import TABLES, finder, read_table
from captioner.sources.folder import (
    ImageRow,
    caption_shards,
    is_image_name,
    read_captions,
    read_folder,
)
from captioner.sources.gather import Spec, parse
from captioner.sources.source import open_source, read_shard
from captioner.statements import comparable_statements, repeats, split_statements

NAME = "captions"  # of the scores of :func:`describe`
COLUMNS = (
    *("captions", "empty", "ended", "told how they ended", "distinct", "words", "statements", "repeated"),
    *("unseen", "understood", "tokens", "counted in tokens"),
)
SHOWN = 3  # images named in a message


def read(source: str) -> dict[str, Any]:
    """What a file or folder says of each image, by key; ``SOURCE?file=COLUMN&text=COLUMN`` names columns.

    A caption table, an image folder with captions, tars, Parquet with images, or a Hugging Face data set; no
    image is opened. Keys are images' paths without extension. An image without text has "". Raises DataError
    for a source that cannot be read, is empty, or names an image twice.
    """
    spec = parse(source)
    path = Path(spec.base)
    if path.is_file() and path.suffix.lower() in TABLES:
        rows = read_table(path, spec.named)
        pairs: Iterable[tuple[str, Any]] = ((str(row["file_name"]), row.get("text", "")) for row in rows)
    else:
        pairs = ((row.key, row.caption or row.prose or "") for row in _images(spec))
    found: dict[str, Any] = {}
    for name, text in pairs:
        key = _key(name)
        if key in found:
            fix = "keep one caption of each image"
            raise DataError(f"the image {key} is named twice", where=source, fix=fix)
        found[key] = text
    if not found:
        raise DataError("there are no captions", where=source, fix="check that the file is not empty")
    return found


def _images(spec: Spec) -> Iterable[ImageRow]:
    shards = open_source(spec.base)
    first = next(shards)
    if first.kind == "folder":
        return read_folder(Path(spec.base), named=spec.named)
    every = [first, *shards]
    items = (item for shard in every for item in read_shard(shard))
    return (ImageRow(item.key, Path(item.key), item.caption) for item in items)


def _key(name: str) -> str:
    plain = name.strip().replace("\\", "/").removeprefix("./")
    return plain.rpartition(".")[0] if is_image_name(plain) else plain


def said(sources: Sequence[str]) -> list[Said]:
    """The captions of each source as those of a captioner, see :func:`names`."""
    return [Said(name, _rows(source)) for name, source in zip(names(sources), sources, strict=True)]


def names(sources: Sequence[str]) -> list[str]:
    """What captioners are called: as their files and folders are, with a number where two are called so."""
    seen: Counter[str] = Counter()
    found = []
    for source in sources:
        path = Path(parse(source).base)
        name = path.stem if path.is_file() else path.resolve().name
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return found


def _rows(source: str) -> list[CaptionRow]:
    path = Path(parse(source).base)
    if caption_shards(path):
        return list(read_captions(path))
    found = read(source)
    odd = [key for key, text in found.items() if not isinstance(text, str)]
    if odd:
        fix = "name its column: SOURCE?text=COLUMN"
        raise DataError(f"the caption of {odd[0]} is not text", where=source, fix=fix)
    return [_row(key, text) for key, text in found.items()]


def _row(key: str, text: str) -> CaptionRow:
    return CaptionRow(id="", key=key, caption=text, finish_reason=None, tokens=None, model="", config="")


def placed(side: Said, folder: Path, images: Sequence[ImageRow]) -> Said:
    """The captions under the keys of the images; DataError names captions of images that are not there."""
    names = {row.path.relative_to(folder).as_posix(): row.key for row in images}
    find = finder(names, str(folder))
    keys = {row.key: find(row.key) for row in side.rows}
    lost = [key for key, name in keys.items() if name is None]
    if lost:
        what = f"{side.name}: {len(lost)} captions are of images that are not there: {_named(lost)}"
        raise DataError(what, where=str(folder), fix="name their images with --images")
    return replace(
        side, rows=[row.model_copy(update={"key": names[keys[row.key] or ""]}) for row in side.rows]
    )


def alike(sides: Sequence[Said]) -> tuple[list[Said], list[str]]:
    """The captioners on the images that none of them failed on, and notes on those left out.

    Raises DataError where one of them has no row of an image that another has.
    """
    first = sides[0]
    known = {row.key for row in first.rows}
    for side in sides[1:]:
        own = {row.key for row in side.rows}
        if own != known:
            parts = [
                f"{len(only)} only in {name}: {_named(only)}"
                for name, only in ((first.name, known - own), (side.name, own - known))
                if only
            ]
            raise DataError(
                f"{first.name} and {side.name} are of different images: {'; '.join(parts)}",
                fix="caption the same images with both; --images DATA joins names that differ in form",
            )
    failed = {side.name: known - side.captions.keys() for side in sides}
    lost = set().union(*failed.values())
    if not known - lost:
        raise DataError("no image has a caption by every captioner", fix="look at the errors of the rows")
    notes = [f"{name}: {len(keys)} images failed, left out for all" for name, keys in failed.items() if keys]
    if len(known) - len(lost) == 1:
        notes.append("one image: a difference may be chance, and no interval tells")
    return [replace(side, rows=[r for r in side.rows if r.key not in lost]) for side in sides], notes


def _named(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---------------------------------------------------------------- numbers that need no judge


def describe(side: Said, count: Callable[[str], int] | None = None) -> Scores:
    """How long, finished, repetitive, alike and well-formed the captions are.

    ``count`` gives the tokens of a text by the image generator's tokenizer; without it they are those that
    the captioner generated, where its rows tell. ``distinct`` weighs a caption 1 over how many are the same.
    """
    same = Counter(row.caption for row in side.captions.values())
    rows = {
        key: _counts(row, count) | {"distinct": 1 / same[row.caption]} for key, row in side.captions.items()
    }
    lower = ("empty", "repeated", "not plain")
    return tabulate(NAME, rows, _metrics, columns=COLUMNS, annotated=len(side.rows), lower_is_better=lower)


def _counts(row: CaptionRow, count: Callable[[str], int] | None) -> dict[str, float]:
    text = row.caption or ""
    statements, comparable = split_statements(text), comparable_statements(text)
    tokens = count(text) if count else row.tokens
    return {
        "captions": 1,
        "empty": not statements,
        "ended": row.finish_reason == "stop",
        "told how they ended": row.finish_reason is not None,
        "words": len(text.split()),
        "statements": len(statements),
        "repeated": repeats(comparable),
        "unseen": sum(not is_plain(each) for each in statements),
        "understood": sum(map(_understood, statements)),
        "tokens": tokens or 0,
        "counted in tokens": tokens is not None,
    }


def _understood(statement: str) -> bool:
    """Whether the rules know what it is about: a thing they have a word for, or a kind of fact."""
    return kinds.kind_of(statement) != "object" or bool(kinds.objects(statement))


def _metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
    captions, statements = sums["captions"], sums["statements"]
    return {
        "empty": ratio(sums["empty"], captions),
        "ended": ratio(sums["ended"], sums["told how they ended"]),
        "repeated": ratio(sums["repeated"], statements),
        "not plain": ratio(sums["unseen"], statements),
        "understood": ratio(sums["understood"], statements),
        "distinct": ratio(sums["distinct"], captions),
        "statements": ratio(statements, captions),
        "words": ratio(sums["words"], captions),
        "tokens": ratio(sums["tokens"], sums["counted in tokens"]),
    }
