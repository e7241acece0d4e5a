"""Folders: image folders with or without captions in, caption data sets out.

In: images anywhere below a folder; captions in a table of any folder (``metadata.*``, else the one table that
names images and holds captions, see :mod:`captioner.sources.captions`), or in ``.txt``/``.caption`` files
beside the images.
Out: Parquet shards of caption rows, and from them one JSON Lines file or one text file per image.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from captioner.errors import DataError
from captioner.records import CaptionRow, read_parquet
from captioner.sources.captions import (
    TABLES,
    WORKBOOKS,
    finder,
    is_caption_table,
    not_text,
    read_table,
    read_text,
)
from captioner.views import BadImage, load_image

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp"),
        *("tif", "tiff", "jp2", "avif", "ppm", "pgm", "pnm", "ico"),
    )
)
# Images that Pillow reads with a package more, or not at all: they are rows all the same, with this reason.
EXTRA_SUFFIXES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ""),  # the decoder says what is missing
    ".jxl": "JPEG XL: save it as PNG or JPEG",
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw"),
        "a camera's raw file: develop it to JPEG",
    ),
    ".psd": "a Photoshop file: export it as PNG or JPEG",
    ".svg": "a drawing of vectors: export it as PNG",
}
CAPTION_SUFFIXES = (".txt", ".caption", ".TXT", ".Txt", ".CAPTION")
METADATA = ("metadata.parquet", "metadata.jsonl", "metadata.csv")
FAILED = "failed.jsonl"  # beside gathered images: `key` and `error` of those that could not be
NO_SUCH_NAME = {
    errno.EEXIST: "a file and a folder want the same name",
    errno.ENOTDIR: "a file and a folder want the same name",
    errno.EISDIR: "a file and a folder want the same name",
    errno.ENAMETOOLONG: "the key is too long for a file name",
}


@dataclass(frozen=True)
class ImageRow:
    """An image of a folder; ``key`` is its relative path without extension, ``facts`` a JSON string."""

    key: str
    path: Path
    caption: str | None = None
    prose: str | None = None
    facts: str | None = None
    questions: list[dict[str, Any]] | None = None
    error: str | None = None  # why there is no such image, or no caption that could be read


def read_folder(
    path: Path, *, captions: bool = True, named: Mapping[str, str] | None = None
) -> list[ImageRow]:
    """The images below ``path``, sorted by key, joined with their captions; no image is opened.

    Images of one folder that differ in their extension only keep it in their keys. Hidden files and linked
    folders are passed over. ``captions=False`` reads no caption file; ``named`` as in ``read_table``. What a
    caption file gets wrong about one image is the ``error`` of its row. Raises :class:`DataError` for a
    missing or empty folder, and for tables that cannot be read or are several of one folder.
    """
    pairs = list(walk_images(path))
    failed = _failed(path)
    if not pairs and not failed:
        raise no_images(path)
    joined = join_tables(path, [name for _, name in pairs], named) if captions else Joined({}, [])
    images = [*failed, *joined.ghosts]
    for key, name in pairs:
        row = joined.rows.get(name, {})
        caption, error = row.get("text"), row.get("error")
        if not _is_utf8(name):
            key, error = (
                key.encode("utf-8", "backslashreplace").decode(),
                "its file name is not UTF-8: rename it",
            )
        elif captions and caption is None and error is None:
            try:
                caption = sidecar(path / key)
            except DataError as problem:
                error = f"its caption file {problem.what}"
        about = (row.get("prose"), row.get("facts"), row.get("questions"))
        images.append(ImageRow(key, path / name, caption, *about, error))
    return sorted(images, key=lambda image: image.key)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _failed(path: Path) -> list[ImageRow]:
    """What could not be gathered into the folder."""
    file = path / FAILED
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    rows = [json.loads(line) for line in lines if line]
    return [ImageRow(row["key"], path / row["key"], error=row["error"]) for row in rows]


def load_row(row: ImageRow) -> tuple[Image.Image, str]:
    """The image of a row and its sha256 hex, as :func:`captioner.views.load_image`. Raises BadImage."""
    if row.error:
        raise BadImage(row.error)
    try:
        return load_image(row.path)
    except BadImage as error:
        raise BadImage(EXTRA_SUFFIXES.get(row.path.suffix.lower()) or error.reason) from error


def read_captions(path: Path) -> Iterator[CaptionRow]:
    """The rows of a caption data set, shard after shard; :class:`DataError` where there are none."""
    shards = caption_shards(path)
    if not shards:
        raise DataError(
            "no caption rows here",
            where=str(path),
            fix="name the folder that `captioner caption --out` wrote",
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


def link_image(row: ImageRow, folder: Path, out: Path) -> str:
    """Put the image of a row of ``folder`` below ``out``, and return its path there.

    It is a second name of the same file where the file system allows that, else a copy.
    """
    name = row.path.relative_to(folder)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(row.path), out / name)
    except OSError:  # another file system
        shutil.copyfile(row.path, out / name)
    return name.as_posix()


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
            fix="choose another format, or rename the image or its folder",
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
    if not leads_out(key):
        path = folder / name.with_name(f"{name.name}{suffix}")
        if path.parent.resolve().is_relative_to(folder.resolve()):  # a linked folder may lead out, too
            return path
    raise DataError(f"the key {key!r} leads out of the folder", where=str(folder))


def leads_out(key: str) -> bool:
    """Whether a key names no file below a folder."""
    name = PurePosixPath(key)
    return not name.parts or name.is_absolute() or ".." in name.parts or "\0" in key


def long_name(key: str, suffix: str = ".txt") -> bool:
    """Whether a key is longer than file systems let the name of a file be."""
    return any(len(os.fsencode(part)) > 255 for part in PurePosixPath(key + suffix).parts)


def walk_images(path: Path, others: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """(key, relative path) of every image below ``path``, folder after folder, sorted inside each.

    ``others`` counts, by extension, the files that are neither images by their name nor captions of images.
    Only the names of one folder are in memory. Raises :class:`DataError` for a folder that cannot be listed.
    """
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise DataError(what, where=str(path), fix="name a folder of images, or scenes:SPLIT:COUNT")

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot be listed: {error.strerror}", where=str(error.filename)) from error

    for directory, folders, files in os.walk(path, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = "" if directory == str(path) else f"{Path(directory).relative_to(path).as_posix()}/"
        shown = [name for name in sorted(files) if not name.startswith(".")]
        names = [prefix + name for name in shown if is_image_name(name)]
        if others is not None:
            rest = (name for name in shown if not is_image_name(name) and name not in METADATA)
            suffixes = (os.path.splitext(name)[1].lower() for name in rest)
            others.update(suffix for suffix in suffixes if suffix not in CAPTION_SUFFIXES)
        yield from zip(image_keys(names), names, strict=True)


def is_image_name(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMAGE_SUFFIXES or suffix in EXTRA_SUFFIXES


def image_keys(names: Sequence[str]) -> list[str]:
    """A key for each name: without its extension, or whole where that is another's name or key, too.

    Of a photograph and its raw file or HEIC, the photograph is without.
    """
    taken = set(names)
    stems = {name: os.path.splitext(name)[0] if is_image_name(name) else name for name in taken}
    shared = Counter(stems.values())
    plain = Counter(stem for name, stem in stems.items() if not _is_extra(name))

    def alone(name: str) -> bool:
        stem = stems[name]
        return shared[stem] == 1 or (plain[stem] == 1 and not _is_extra(name))

    return [stems[name] if alone(name) and stems[name] not in taken else name for name in names]


def _is_extra(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTRA_SUFFIXES


def no_images(path: Path) -> DataError:
    return DataError(
        "no images in this folder",
        where=str(path),
        fix=f"image files end in one of {' '.join(sorted(IMAGE_SUFFIXES))}",
    )


def sidecar(stem: Path, errors: str = "strict") -> str | None:
    """The caption in ``STEM.txt`` or ``STEM.caption``, None if there is neither or it is empty.

    ``errors="replace"`` takes any bytes for text. Raises :class:`DataError` for a file that is not text.
    """
    for path in (stem.with_name(stem.name + suffix) for suffix in CAPTION_SUFFIXES):
        if os.path.isfile(path):  # also false for a name too long to be one
            try:
                return read_text(path).strip() or None
            except DataError:
                if errors != "replace":
                    raise
                return path.read_text(encoding="utf-8", errors="replace").strip() or None
    return None


# ---------------------------------------------------------------- caption tables


class Joined(NamedTuple):
    """What the tables of a folder say: of each image by its name, and of images that are not there."""

    rows: dict[str, dict[str, Any]]
    ghosts: list[ImageRow]


def join_tables(path: Path, names: Sequence[str], named: Mapping[str, str] | None = None) -> Joined:
    """The rows of the caption tables of a folder and those below it; a table is of the images below it."""
    rows: dict[str, dict[str, Any]] = {}
    ghosts: list[ImageRow] = []
    for table in caption_tables(path, named)[0]:
        home = table.parent.relative_to(path).as_posix()
        prefix = "" if home == "." else f"{home}/"
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        _join(table, prefix, finder(below, str(table.parent)), read_table(table, named), rows, ghosts)
    return Joined(rows, ghosts)


def _join(
    table: Path,
    prefix: str,
    find: Callable[[str], str | None],
    found: list[dict[str, Any]],
    rows: dict[str, dict[str, Any]],
    ghosts: list[ImageRow],
) -> None:
    for row in found:
        cell, where = row.get("file_name"), f"{table.name}, row {row['row']}"
        if cell is None or cell != cell:  # a table's missing number is not equal to itself
            ghosts.append(ImageRow(f"{prefix}{where}", table, error=f"no file_name ({where})"))
            continue
        name = find(str(cell))
        if name is None:
            what = f"the image {str(cell)!r} is not in the folder, or several are of that name ({where})"
            ghosts.append(ImageRow(f"{prefix}{cell}", table.parent / str(cell), error=what))
        elif prefix + name in rows:
            ghosts.append(
                ImageRow(
                    f"{prefix}{name} ({where})", table, error=f"the image {name!r} is named twice ({where})"
                )
            )
        else:
            error = not_text(row, where)
            rows[prefix + name] = row | ({"error": error, "text": None} if error else {})


def caption_tables(path: Path, named: Mapping[str, str] | None = None) -> tuple[list[Path], dict[str, str]]:
    """The caption table of each folder that has one, and why others are not read, by file name.

    ``metadata.*`` comes first, and must be a caption table; any other is one if its columns say so. Raises
    :class:`DataError` for two in one folder.
    """
    tables: list[Path] = []
    others: dict[str, str] = {}
    for directory, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = [
            Path(directory, name) for name in sorted(files) if not name.startswith(".") and name != FAILED
        ]
        found = [file for file in here if file.name in METADATA]
        if not found:
            for file in here:
                suffix = file.suffix.lower()
                if suffix in WORKBOOKS:
                    others[file.name] = "a workbook: save it as CSV"
                elif suffix in TABLES and (suffix != ".json" or re.match("metadata|captions?", file.name)):
                    reason = None if suffix == ".json" else is_caption_table(file, named)
                    if reason is None:
                        found.append(file)
                    else:
                        others[file.name] = reason
        if len(found) > 1:
            raise DataError(
                f"{len(found)} caption tables of one folder, one is wanted",
                where=", ".join(map(str, found)),
                fix="keep one of them, or name it as the source",
            )
        tables += found
    return tables, others
