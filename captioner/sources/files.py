"""Folders and lists of image files, with a caption file beside each."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path, PurePosixPath

from captioner.errors import DataError
from captioner.sources.folder import EXTRA_SUFFIXES, image_keys, sidecar, walk_images
from captioner.sources.items import Cut, Item, ShardRef
from captioner.sources.places import gone, is_remote, open_bytes, place
from captioner.views import FORMATS

LINE = 1 << 16  # bytes of a line of a file list


def folder_cuts(
    path: Path, shard_rows: int, index: Path | None = None, others: Counter[str] | None = None
) -> Iterator[Cut]:
    """Shards of the images below a folder, walked as they are asked for.

    A shard is a place in a listing of the folder, which this writes to ``index`` as it goes, so that a shard
    of any size is a few bytes for whoever hands it on. Without ``index`` it is gone with this process.
    """
    index = index or Path(_scratch(), f"listing-{next(_LISTINGS)}.jsonl")
    pairs = walk_images(path, others)
    with index.open("w", encoding="ascii") as listing:  # json escapes what is no ASCII, surrogates too
        for number in count():
            begin, chunk = listing.tell(), list(islice(pairs, shard_rows))
            if not chunk:
                return
            lines = "".join(json.dumps([*pair, *_stamp(path / pair[1])]) + "\n" for pair in chunk)
            listing.write(lines)
            listing.flush()
            where = {"root": str(path), "listing": str(index), "byte": begin}
            mark = hashlib.sha256(lines.encode()).hexdigest()
            yield Cut(f"files-{number:05d}", json.dumps(where), rows=len(chunk), mark=mark)


def _stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of change) of a file, which tell that it is another now; (-1, -1) where there is none."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


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
        key, name, *_ = json.loads(line)
        path = Path(where["root"], name)
        reason = EXTRA_SUFFIXES.get(path.suffix.lower())
        if reason and not (reason.startswith("HEIC") and "HEIF" in FORMATS):
            yield Item(key, None, error=reason)
        else:
            yield Item(key, path, _beside(path.parent / PurePosixPath(key).name))


def _lines_at(path: str, byte: int, rows: int) -> list[bytes]:
    """``rows`` lines of a listing that are not blank, from a byte on."""
    lines: list[bytes] = []
    try:
        with open_bytes(place(path)) as file:
            file.seek(byte)
            while len(lines) < rows and (line := file.readline(LINE)):
                if line.strip():
                    lines.append(line)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=path) from error
    return lines


def list_cuts(path: Path, shard_rows: int) -> Iterator[Cut]:
    """Shards of the files that a list names, found by the byte at which their lines begin."""
    with open_bytes(path) as file:
        rows, begin, start, mark = 0, 0, 0, hashlib.sha256()
        while line := file.readline(LINE):
            if line.strip():
                rows += 1
                # a store is not asked about each of millions of objects
                found = () if is_remote(str(path)) else _stamp(Path(_named(str(path), line)))
                mark.update(json.dumps([line.decode("latin-1"), *found]).encode())
            if rows == shard_rows:
                yield _lines(path, begin, start, rows, shard_rows, mark.hexdigest())
                start, begin, rows, mark = start + rows, file.tell(), 0, hashlib.sha256()
        if rows:
            yield _lines(path, begin, start, rows, shard_rows, mark.hexdigest())


def _lines(path: Path, begin: int, start: int, rows: int, shard_rows: int, mark: str) -> Cut:
    where = json.dumps({"list": str(path), "byte": begin})
    return Cut(f"files-{start // shard_rows:05d}", where, start, rows, mark)


def _named(listing: str, line: bytes) -> str:
    """The path in a line of a list, relative to which it is."""
    name, home = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf").strip(b"\r\n")), os.path.dirname(listing)
    if is_remote(listing):
        scheme = listing[: listing.index("://") + 3]
        whole = name if name.startswith(scheme) else f"{home}/{name}"
        return scheme + os.path.normpath(whole.removeprefix(scheme))
    return os.path.normpath(os.path.join(home, name))


def read_list(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    home = os.path.dirname(where["list"])
    found = _lines_at(where["list"], where["byte"], shard.rows or 0)
    remote = is_remote(where["list"])
    paths = [_named(where["list"], line) for line in found]
    names = [
        path.removeprefix(os.path.join(home, ""))
        if path.startswith(os.path.join(home, ""))
        else path.lstrip("/")
        for path in paths
    ]
    for key, path in zip(image_keys(names), paths, strict=True):
        if "\0" in path or not os.path.basename(path):
            yield Item(key, None, error="not a file name")
        elif remote and place(path).drive != place(where["list"]).drive:
            yield Item(key, None, error="an object of another bucket than the list's")
        elif remote:
            yield Item(key, place(path))
        elif _nowhere(path):
            yield Item(key, None, error="no such folder", world=True)
        else:
            yield Item(key, Path(path), _beside(Path(os.path.splitext(path)[0])))


def _nowhere(path: str) -> bool:
    """Whether the folder of a file is not there, and its disk is: a line of a list may say anything, and no
    job is to wait for that."""
    folder = os.path.dirname(path)
    if os.path.isdir(folder):
        return False
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return not gone(Path(folder, "file"))


def _beside(stem: Path) -> str | None:
    """The caption file of an image; one that cannot be read does not keep the image from being read."""
    try:
        return sidecar(stem, errors="replace")
    except DataError:
        return None
