"""Folders and lists of image files, with a caption file beside each."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path, PurePosixPath

from captioner.errors import DataError
from captioner.sources.folder import image_keys, sidecar, walk_images
from captioner.sources.items import Cut, Item, ShardRef

LINE = 1 << 16  # bytes of a line of a file list


def folder_cuts(path: Path, shard_rows: int, index: Path | None = None) -> Iterator[Cut]:
    """Shards of the images below a folder, walked as they are asked for.

    A shard is a place in a listing of the folder, which this writes to ``index`` as it goes, so that a shard
    of any size is a few bytes for whoever hands it on. Without ``index`` it is gone with this process.
    """
    index = index or Path(_scratch(), f"listing-{next(_LISTINGS)}")
    pairs = walk_images(path)
    with index.open("w", encoding="ascii") as listing:  # json escapes what is no ASCII, surrogates too
        for number in count():
            begin, chunk = listing.tell(), list(islice(pairs, shard_rows))
            if not chunk:
                return
            lines = "".join(json.dumps(pair) + "\n" for pair in chunk)
            listing.write(lines)
            listing.flush()
            where = {"root": str(path), "listing": str(index), "byte": begin}
            mark = hashlib.sha256(lines.encode()).hexdigest()
            yield Cut(f"files-{number:05d}", json.dumps(where), rows=len(chunk), mark=mark)


_LISTINGS = count()


@cache
def _scratch() -> str:
    """A directory that is gone with this process."""
    folder = tempfile.mkdtemp(prefix="captioner-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read_files(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    for line in _lines_at(where["listing"], where["byte"], shard.rows or 0):
        key, name = json.loads(line)
        path = Path(where["root"], name)
        yield Item(key, path, _beside(path.parent / PurePosixPath(key).name))


def _lines_at(path: str, byte: int, rows: int) -> list[bytes]:
    """``rows`` lines of a listing that are not blank, from a byte on."""
    lines: list[bytes] = []
    try:
        with open(path, "rb") as file:
            file.seek(byte)
            while len(lines) < rows and (line := file.readline(LINE)):
                if line.strip():
                    lines.append(line)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    return lines


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
    found = _lines_at(where["list"], where["byte"], shard.rows or 0)
    lines = [os.fsdecode(line.removeprefix(b"\xef\xbb\xbf").strip(b"\r\n")) for line in found]
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
