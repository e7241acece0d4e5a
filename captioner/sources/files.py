"""Folders and lists of image files, with a caption file beside each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path, PurePosixPath

from captioner.errors import DataError
from captioner.sources.folder import image_keys, sidecar, walk_images
from captioner.sources.items import Cut, Item, ShardRef

LINE = 1 << 16  # bytes of a line of a file list


def folder_cuts(path: Path, shard_rows: int) -> Iterator[Cut]:
    """Shards of the images below a folder, walked as they are asked for."""
    pairs = walk_images(path)
    for index in count():
        if not (chunk := list(islice(pairs, shard_rows))):
            return
        names = [name for _, name in chunk]
        whole = [name for key, name in chunk if key == name]  # what the key of the others is, their name says
        where = {"root": str(path), "names": names, "whole": whole}
        yield Cut(f"files-{index:05d}", json.dumps(where), rows=len(names))


def read_files(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    whole = set(where["whole"])
    for name in where["names"]:
        key = name if name in whole else os.path.splitext(name)[0]
        path = Path(where["root"], name)
        yield Item(key, path, _beside(path.parent / PurePosixPath(key).name))


def list_cuts(path: Path, shard_rows: int) -> Iterator[Cut]:
    """Shards of the files that a list names, found by the byte at which their lines begin."""
    with path.open("rb") as file:
        rows, begin, start = 0, 0, 0
        while line := file.readline(LINE):
            rows += bool(line.strip())
            if rows == shard_rows:
                yield _lines(path, begin, start, rows, shard_rows)
                start, begin, rows = start + rows, file.tell(), 0
        if rows:
            yield _lines(path, begin, start, rows, shard_rows)


def _lines(path: Path, begin: int, start: int, rows: int, shard_rows: int) -> Cut:
    where = json.dumps({"list": str(path), "byte": begin})
    return Cut(f"files-{start // shard_rows:05d}", where, start, rows)


def read_list(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    home = os.path.dirname(where["list"])
    lines: list[str] = []
    try:
        with open(where["list"], "rb") as file:
            file.seek(where["byte"])
            while len(lines) < (shard.rows or 0) and (line := file.readline(LINE)):
                if line.strip():
                    lines.append(os.fsdecode(line.removeprefix(b"\xef\xbb\xbf").strip(b"\r\n")))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where["list"]) from error
    paths = [os.path.normpath(os.path.join(home, line)) for line in lines]
    names = [
        os.path.relpath(path, home) if path.startswith(os.path.join(home, "")) else path.lstrip("/")
        for path in paths
    ]
    for key, path in zip(image_keys(names), paths, strict=True):
        if "\0" in path or not os.path.basename(path):
            yield Item(key, None, error="not a file name")
        else:
            yield Item(key, Path(path), _beside(Path(os.path.splitext(path)[0])))


def _beside(stem: Path) -> str | None:
    """The caption file of an image; one that cannot be read does not keep the image from being read."""
    try:
        return sidecar(stem, errors="replace")
    except DataError:
        return None
