"""Benchmarks' annotation files: found, read and checked, and joined to captions.

They come from outside: every row is validated, and nothing but text, JSON and Parquet is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from captioner.errors import DataError

T = TypeVar("T")


def missing(folder: Path, name: str, origin: str) -> DataError:
    """The error of a missing annotation file: which file, where it comes from, into which folder."""
    return DataError(
        f"the annotation file {name} is missing",
        where=str(folder),
        fix=f"get {name} from {origin} and put it into {folder}",
    )


def find(folder: Path, name: str, origin: str) -> Path:
    """The file ``name`` of the folder; DataError where it is missing."""
    path = folder / name
    if not path.is_file():
        raise missing(folder, name, origin)
    return path


def find_one(folder: Path, pattern: str, origin: str) -> Path:
    """The one file of the folder that matches; DataError for none and for several."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise missing(folder, pattern, origin)
    if len(found) > 1:
        raise DataError(
            f"{len(found)} files match {pattern}",
            where=", ".join(map(str, found[:3])),
            fix="keep one of them in the folder",
        )
    return found[0]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the annotation file: {error}", where=str(path)) from error


def read_json(path: Path, kind: type[T]) -> T:
    """The file's JSON, checked against ``kind``; DataError names the first place that does not fit."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _unfit(path, error) from error


def read_jsonl(path: Path, kind: type[T]) -> list[T]:
    """The file's lines, each checked against ``kind``; empty lines are passed over."""
    adapter, rows = TypeAdapter(kind), []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(adapter.validate_json(line))
            except ValidationError as error:
                raise _unfit(path, error, f" line {number}") from error
    return rows


def _unfit(path: Path, error: Exception, place: str = "") -> DataError:
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        reason = " ".join([".".join(map(str, first["loc"])), first["msg"]]).strip()
    return DataError(
        f"the annotation file is not as its benchmark publishes it: {reason}",
        where=f"{path}{place}",
        fix="get the file again from where the benchmark publishes it",
    )


def number(key: str) -> int | None:
    """The number at the end of a key: 310196 of ``val/COCO_val2014_000000310196.jpg``, 12 of ``AMBER_12``."""
    stem = re.sub(r"\.(?:jpe?g|png|webp)$", "", key.rsplit("/", 1)[-1], flags=re.IGNORECASE)
    found = re.search(r"[0-9]{1,18}$", stem)
    return int(found.group()) if found else None


def numbers(captions: Mapping[str, str], benchmark: str) -> dict[int, str]:
    """Caption keys by their image number; DataError for keys without one, and for two keys of one image."""
    by_number: dict[int, str] = {}
    for key in captions:
        found = number(key)
        if found is None or found in by_number:
            reason = (
                "ends in no image number" if found is None else f"is the same image as {by_number[found]}"
            )
            raise DataError(
                f"{benchmark}: a caption's key {reason}",
                where=key,
                fix="name each caption after its image file, as the benchmark names the image",
            )
        by_number[found] = key
    return by_number


def check_known(keys: Collection[str], benchmark: str, where: Path) -> None:
    """DataError that names the captioned images of which the annotation files know nothing."""
    if keys:
        named = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        raise DataError(
            f"{benchmark}: {len(keys)} captioned images are not in the annotation files: {named}",
            where=str(where),
            fix="caption images of the benchmark, and leave others out of the caption file",
        )
