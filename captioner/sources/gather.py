"""Any data set as the image folder that training reads: what is not one is laid out as one, once.

A source is what :func:`captioner.sources.source.open_source` takes, a caption table, or a folder, with more
behind it: ``SOURCE#SPLIT?count=20000&seed=1&part=2&text=COLUMN&file=COLUMN``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from captioner.errors import DataError
from captioner.files import atomic_dir
from captioner.sources.captions import TABLES, is_caption_table
from captioner.sources.folder import (
    FAILED,
    METADATA,
    NO_SUCH_NAME,
    ImageRow,
    json_line,
    read_folder,
    sidecar_path,
)
from captioner.sources.items import ShardRef
from captioner.sources.rows import table_rows
from captioner.sources.source import open_source, read_shard

NUMBERS = ("count", "seed", "part")
NAMES = ("text", "file")


@dataclass(frozen=True)
class Spec:
    """A source of images and what is taken of it."""

    base: str  # folder, list, tars, tables, `hf:NAME`
    split: str | None = None  # of a Hugging Face data set, a table's column `split`, or a folder below
    count: int | None = None  # images; None = all
    seed: int = 0  # of the order they are drawn in
    part: int = 1  # which `count` of that order: the second is disjoint from the first
    text: str | None = None  # column of captions
    file: str | None = None  # column of image files

    @property
    def named(self) -> dict[str, str]:
        return {name: value for name in NAMES if (value := getattr(self, name))}


def parse(source: str) -> Spec:
    """What a source names. Raises :class:`DataError` for words behind ``?`` that are none of its settings."""
    fix = "SOURCE?count=20000&seed=1&part=2&text=COLUMN&file=COLUMN, each if wanted"
    base, given = source, ""
    if not os.path.exists(source):
        match = re.fullmatch(r"(?s)(.*)\?((?:[a-z]+=[^&]*)(?:&[a-z]+=[^&]*)*)", source)
        base, given = (match[1], match[2]) if match else (source, "")
    settings: dict[str, Any] = dict(parse_qsl(given, keep_blank_values=True))
    for name, value in settings.items():
        if name not in NUMBERS + NAMES:
            raise DataError(f"a source has no setting {name!r}", where=source, fix=fix)
        if name in NUMBERS:
            if not value.isdecimal() or (name != "seed" and int(value) < 1):
                raise DataError(f"{name} is a whole number", where=source, fix=fix)
            settings[name] = int(value)
    split = None
    if "#" in base and not os.path.exists(base):
        base, _, split = base.rpartition("#")
    return Spec(base, split or None, **settings)


def part_of_round(source: str, number: int) -> str:
    """The source of round ``number``: one with a count gives each round its next part, others serve all."""
    spec = parse(source)
    return f"{source}&part={number + spec.part - 1}" if spec.count and number > 1 else source


def is_image_folder(spec: Spec) -> bool:
    """Whether the source is read where it lies: a folder of images, or nothing that is there."""
    if spec.count or spec.split or spec.named or spec.base.startswith("hf:"):
        return False
    if not os.path.exists(spec.base):
        return not re.search(r"[*?\[{]", spec.base)
    return os.path.isdir(spec.base) and next(open_source(spec.base)).kind == "folder"


def gather(source: str, home: Path) -> Path:
    """The image folder that ``source`` becomes below ``home``, made if it is not there yet.

    Image files are linked, packed images are written, with their captions in ``metadata.jsonl``; what could
    not be is in ``failed.jsonl``. The folder's name changes with what is in the source. Raises
    :class:`DataError` for a source that cannot be read.
    """
    spec = parse(source)
    name = re.sub(r"\W+", "-", Path(spec.base.removeprefix("hf:")).name).strip("-") or "images"
    rows = _files(spec)
    shards = [] if rows is not None else list(open_source(_base(spec)))
    told = [[row.key, row.caption, row.prose, row.facts, row.questions, row.error] for row in rows or []]
    stamps = [[shard.name, shard.start, shard.rows, *_stamp(shard.location)] for shard in shards]
    digest = hashlib.sha256(json.dumps([asdict(spec), told, stamps]).encode()).hexdigest()
    folder = home / f"{name[:60]}-{digest[:12]}"
    if not folder.is_dir():
        with atomic_dir(folder) as part:
            _write(_link(rows, spec) if rows is not None else _unpack(shards, spec), part)
    return folder


def _base(spec: Spec) -> str:
    return f"{spec.base}:{spec.split}" if spec.split and spec.base.startswith("hf:") else spec.base


def _stamp(path: str) -> list[Any]:
    try:
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    except (OSError, ValueError):  # the location of some shards is JSON
        return []


# ---------------------------------------------------------------- image files


def _files(spec: Spec) -> list[ImageRow] | None:
    """The rows of a source whose images are files of their own, None for packed ones."""
    path = Path(spec.base)
    suffix = path.suffix.lower()
    packed = suffix == ".parquet" and is_caption_table(path, spec.named)
    if path.is_file() and suffix in TABLES and not packed:
        return table_rows(path, spec.named, spec.split)
    if path.is_dir() and spec.split and (path / spec.split).is_dir():
        path = path / spec.split
    elif path.is_dir() and spec.split and (path / "dataset_dict.json").is_file():
        return None
    elif spec.split and not spec.base.startswith("hf:"):
        fix = (
            "SOURCE#SPLIT names a folder in SOURCE, a value of a table's column split, or a split of hf:NAME"
        )
        raise DataError(f"no split {spec.split!r}", where=spec.base, fix=fix)
    if path.is_dir() and next(open_source(str(path))).kind == "folder":
        return read_folder(path, named=spec.named)
    return None


def _link(rows: list[ImageRow], spec: Spec) -> Iterator[ImageRow]:
    chosen = _chosen((row.key for row in rows), spec)
    return (row for row in rows if chosen is None or row.key in chosen)


# ---------------------------------------------------------------- packed images


class Packed(NamedTuple):
    """An image of a tar or table, as it lies there."""

    key: str
    image: bytes
    caption: str | None


def _unpack(shards: list[ShardRef], spec: Spec) -> Iterator[ImageRow | Packed]:
    keys = (item.key for shard in shards for item in read_shard(shard))
    chosen = _chosen(keys, spec)
    for shard in shards:
        for item in read_shard(shard):
            if chosen is not None and item.key not in chosen:
                continue
            if isinstance(item.image, bytes):
                yield Packed(item.key, item.image, item.caption)
            else:
                path = item.image or Path(item.key)
                yield ImageRow(item.key, path, item.caption, error=item.error)


def _chosen(keys: Iterator[str], spec: Spec) -> frozenset[str] | None:
    """The keys of the part that is wanted, None for all: in the order of a hash of key and seed."""
    if spec.count is None:
        return None
    last = spec.count * spec.part
    order = nsmallest(last, ((_hash(spec.seed, key), key) for key in keys))
    part = order[last - spec.count :]
    if not part:
        raise DataError(
            f"only {len(order):,} images, so there is no part {spec.part} of {spec.count:,}",
            where=spec.base,
            fix="a smaller count, or fewer parts",
        )
    return frozenset(key for _, key in part)


def _hash(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()[:12]


# ---------------------------------------------------------------- the folder


def _write(rows: Iterator[ImageRow | Packed], out: Path) -> None:
    """Links and files, metadata.jsonl and failed.jsonl."""
    metadata = (out / METADATA[1]).open("w", encoding="utf-8")
    failed = (out / FAILED).open("w", encoding="utf-8")
    with metadata, failed:
        for row in rows:
            try:
                told = {name: value for name, value in _place(row, out).items() if value is not None}
                if len(told) > 1:
                    metadata.write(json_line(told))
            except DataError as error:
                failed.write(json_line({"key": row.key, "error": error.what}))
    for name in (METADATA[1], FAILED):
        if not (out / name).stat().st_size:
            (out / name).unlink()


def _place(row: ImageRow | Packed, out: Path) -> dict[str, Any]:
    """Lay an image out; what metadata.jsonl says of it. Raises DataError where it has no place."""
    if isinstance(row, Packed):
        path = _free(out, row.key, _suffix(row.image))
        path.write_bytes(row.image)
        return {"file_name": path.relative_to(out).as_posix(), "text": row.caption}
    if row.error:
        raise DataError(row.error)
    if not row.path.is_file():
        raise DataError("not a regular file" if row.path.exists() else "no such file")
    path = _free(out, row.key, row.path.suffix)
    os.symlink(os.path.abspath(row.path), path)
    about = {"text": row.caption, "prose": row.prose, "facts": row.facts, "questions": row.questions}
    return {"file_name": path.relative_to(out).as_posix(), **about}


def _free(out: Path, key: str, suffix: str) -> Path:
    if any(part.startswith(".") for part in key.split("/")):
        raise DataError("its name is hidden")
    path = sidecar_path(out, key, suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = os.path.lexists(path)
    except OSError as error:
        if error.errno not in NO_SUCH_NAME:
            raise
        raise DataError(NO_SUCH_NAME[error.errno]) from error
    if taken:
        raise DataError("another image has its name")
    return path


def _suffix(data: bytes) -> str:
    """The suffix of an encoded image by its first bytes; whatever else it is, a decoder finds out."""
    marks = ((b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))
    found = next((suffix for mark, suffix in marks if data.startswith(mark)), None)
    if data[8:12] == b"WEBP":
        found = ".webp"
    if data[4:8] == b"ftyp":
        found = ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
    return found or ".jpg"
