"""Folders: image folders with or without captions in, caption data sets out.

In: images anywhere below a folder, captions in ``metadata.parquet``, ``metadata.jsonl`` or ``metadata.csv``
(``file_name`` plus ``text``, ``prose``, ``facts``, ``questions``) or in ``.txt``/``.caption`` files beside
the images.
Out: Parquet shards of caption rows, and from them one JSON Lines file or one text file per image.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import DataError
from captioner.records import CaptionRow, read_parquet

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp"),
        *("tif", "tiff", "jp2", "avif", "ppm", "pgm", "pnm", "ico"),
    )
)
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.parquet", "metadata.jsonl", "metadata.csv")
NO_SUCH_NAME = {
    errno.EEXIST: "a file and a folder want the same name",
    errno.ENOTDIR: "a file and a folder want the same name",
    errno.EISDIR: "a file and a folder want the same name",
    errno.ENAMETOOLONG: "the key is too long for a file name",
}
COLUMNS = ("file_name", "text", "prose", "facts", "questions")


@dataclass(frozen=True)
class ImageRow:
    """An image of a folder; ``key`` is its relative path without extension, ``facts`` a JSON string."""

    key: str
    path: Path
    caption: str | None = None
    prose: str | None = None
    facts: str | None = None
    questions: list[dict[str, Any]] | None = None


def read_folder(path: Path, *, captions: bool = True) -> list[ImageRow]:
    """The images below ``path``, sorted by key, joined with their captions; no image is opened.

    Images of one folder that differ in their extension only keep it in their keys. Hidden files and linked
    folders are passed over. ``captions=False`` reads no caption file. Raises :class:`DataError` for a missing
    or empty folder, unreadable caption files, and rows that name an image twice or one that is not there.
    """
    pairs = list(walk_images(path))
    if not pairs:
        raise no_images(path)
    for _, name in pairs:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                "a file name is not UTF-8", where=f"{path}: {name!r}", mend="rename the file"
            ) from error
    rows = _metadata(path, {name for _, name in pairs}) if captions else {}
    images = []
    for key, name in pairs:
        row = rows.get(name, {})
        caption = row.get("text")
        if captions and caption is None:
            caption = sidecar(path / key)
        images.append(
            ImageRow(key, path / name, caption, row.get("prose"), row.get("facts"), row.get("questions"))
        )
    return sorted(images, key=lambda image: image.key)


def read_captions(path: Path) -> Iterator[CaptionRow]:
    """The rows of a caption data set, shard after shard; :class:`DataError` where there are none."""
    shards = caption_shards(path)
    if not shards:
        raise DataError(
            "no caption rows here",
            where=str(path),
            mend="name the folder that `captioner caption --out` wrote",
        )
    for shard in shards:
        yield from read_parquet(shard, CaptionRow)


def caption_shards(path: Path) -> list[Path]:
    """The published shards of a caption data set in order: ``00000.parquet`` and so on."""
    shards = [shard for shard in path.glob("*.parquet") if re.fullmatch(r"\d{5,}", shard.stem)]
    return sorted(shards, key=lambda shard: int(shard.stem))


def write_jsonl(
    rows: Iterable[CaptionRow], path: Path, more: Callable[[CaptionRow], dict[str, Any]] = lambda row: {}
) -> int:
    """Write one JSON object per row, failures included, and publish the file by rename. Returns the count.

    ``more`` gives further fields of a row.
    """
    count = 0
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json_line(row.model_dump() | more(row)))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def json_line(values: dict[str, Any]) -> str:
    """A line of a JSON Lines file; no reader takes a character inside it for a line's end."""
    text = json.dumps(values, ensure_ascii=False)
    for character in "\x85\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


def write_sidecars(rows: Iterable[CaptionRow], folder: Path) -> int:
    """Write ``KEY.txt`` below ``folder`` for every row with a caption: one line, no newline at its end.

    A caption's own line breaks become spaces. Raises :class:`DataError` for a key that would leave
    the folder. Returns the count of files.
    """
    count = 0
    for row in rows:
        if row.caption is not None:
            write_sidecar(folder, row.key, row.caption)
            count += 1
    return count


def write_sidecar(folder: Path, key: str, caption: str, suffix: str = ".txt") -> None:
    """Write one caption file and publish it by rename; errors as :func:`write_sidecars`."""
    path = sidecar_path(folder, key, suffix)
    temporary = path.with_name(".sidecar.tmp")  # short: the longest file name has no room for more
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(one_line(caption), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in NO_SUCH_NAME:
            raise
        raise DataError(
            NO_SUCH_NAME[error.errno],
            where=str(path),
            mend="choose another format, or rename the image or its folder",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def one_line(caption: str) -> str:
    """The caption with every run of white space, line breaks of any script included, as one space."""
    return " ".join(caption.split())


def sidecar_path(folder: Path, key: str, suffix: str = ".txt") -> Path:
    """Where a file of ``key`` is written; :class:`DataError` if that lies outside ``folder``."""
    name = PurePosixPath(key)
    if name.parts and not name.is_absolute() and ".." not in name.parts and "\0" not in key:
        path = folder / name.with_name(f"{name.name}{suffix}")
        if path.parent.resolve().is_relative_to(folder.resolve()):  # a linked folder may lead out, too
            return path
    raise DataError(f"the key {key!r} leads out of the folder", where=str(folder))


def walk_images(path: Path) -> Iterator[tuple[str, str]]:
    """(key, relative path) of every image below ``path``, folder after folder, sorted inside each.

    Only the names of one folder are in memory. Raises :class:`DataError` for a folder that cannot be listed.
    """
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise DataError(what, where=str(path), mend="name a folder of images, or scenes:SPLIT:COUNT")

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot be listed: {error.strerror}", where=str(error.filename)) from error

    for directory, folders, files in os.walk(path, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = "" if directory == str(path) else f"{Path(directory).relative_to(path).as_posix()}/"
        names = [prefix + name for name in sorted(files) if not name.startswith(".") and is_image_name(name)]
        yield from zip(image_keys(names), names, strict=True)


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def image_keys(names: Sequence[str]) -> list[str]:
    """A key for each name: without its extension, or whole where that is another's name or key, too."""
    taken = set(names)
    stems = {name: os.path.splitext(name)[0] if is_image_name(name) else name for name in taken}
    shared = Counter(stems.values())
    return [stems[name] if shared[stems[name]] == 1 and stems[name] not in taken else name for name in names]


def no_images(path: Path) -> DataError:
    return DataError(
        "no images in this folder",
        where=str(path),
        mend=f"image files end in one of {' '.join(sorted(IMAGE_SUFFIXES))}",
    )


def sidecar(stem: Path, errors: str = "strict") -> str | None:
    """The caption in ``STEM.txt`` or ``STEM.caption``, None if there is neither.

    ``errors`` as in ``open``. Raises :class:`DataError` for a file that cannot be read.
    """
    for suffix in CAPTION_SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        if os.path.isfile(path):  # also false for a name too long to be one
            try:
                return path.read_text(encoding="utf-8", errors=errors).strip()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"caption file cannot be read: {error}", where=str(path), mend="save it as UTF-8"
                ) from error
    return None


def _metadata(path: Path, names: set[str]) -> dict[str, dict[str, Any]]:
    """Rows of the folder's metadata file by file name; empty where there is none."""
    files = [path / name for name in METADATA if (path / name).is_file()]
    if not files:
        return {}
    if len(files) > 1:
        raise DataError(
            f"{len(files)} metadata files, one is wanted",
            where=", ".join(str(file) for file in files),
            mend="keep one of them",
        )
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(_read_rows(files[0]), 1):
        name = row.get("file_name")
        where = f"{files[0]}, row {number}"
        if not isinstance(name, str):
            raise DataError("no file_name", where=where, mend="name the image in the column file_name")
        if name in rows:
            raise DataError(f"the image {name!r} is named twice", where=where, mend="keep one row per image")
        if name not in names:
            raise DataError(
                f"the image {name!r} is not in the folder",
                where=where,
                mend="file_name is the path relative to the folder, extension included",
            )
        for column in ("text", "prose", "facts"):
            if row.get(column) is not None and not isinstance(row[column], str):
                raise DataError(f"{column} is not text: {row[column]!r}", where=where)
        rows[name] = row
    return rows


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            columns = [name for name in pq.read_schema(file).names if name in COLUMNS]
            return list(pq.read_table(file, columns=columns).to_pylist())
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix == ".csv":
                return [
                    {name: value for name, value in row.items() if name in COLUMNS and value}
                    for row in csv.DictReader(lines, strict=True)
                ]
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=str(file)) from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError("a line is no JSON object", where=str(file))
    return rows
