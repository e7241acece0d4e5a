"""Images of any supported data set, shard after shard: what bulk captioning reads.

A *spec* names the data set, :func:`open_source` cuts it into shards, :func:`read_shard` streams the images of
one. Everything that is read is hostile until checked: a member, row or file that holds no image that can be
used becomes an :class:`Item` with its reason, and nothing is ever extracted to disk.

========================================  ============================================================
spec                                      what is read
========================================  ============================================================
``FOLDER``                                images below it; ``.txt``/``.caption`` files beside them
``PHOTO.jpg``                             one image
``LIST.txt``                              a path a line, relative to the list
``CAPTIONS.csv`` ``.tsv`` ``.jsonl`` ``.json``  the images that a caption table names
``A.tar`` ``DIR/*.tar`` ``{000..999}.tar``  webdataset shards, also a folder that holds only tars
``A.parquet`` ``DIR/*.parquet``           image bytes, ``{bytes, path}`` or paths; also a folder of them
``hf:PATH_OR_NAME[:SPLIT]``               a Hugging Face data set on disk or on the hub
``s3://BUCKET/…``                         the same tars, Parquet files and lists in an object store
========================================  ============================================================
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from captioner.errors import DataError
from captioner.sources.captions import TABLES
from captioner.sources.files import folder_cuts, list_cuts, read_files, read_list
from captioner.sources.folder import is_image_name, leads_out, no_images
from captioner.sources.hf import hf_cuts, is_saved, read_hf
from captioner.sources.items import Cut, Item, ShardRef
from captioner.sources.places import is_remote, matching, place, stamp
from captioner.sources.rows import read_photo, read_rows, table_cuts
from captioner.sources.tables import parquet_cuts, read_parquet
from captioner.sources.tars import read_tar

__all__ = ["Item", "ShardRef", "open_source", "read_shard"]

LISTS = (".txt", ".lst", ".list")


def open_source(
    spec: str, *, shard_rows: int = 256, index: Path | None = None, others: Counter[str] | None = None
) -> Iterator[ShardRef]:
    """The shards of a data set; see the module for what ``spec`` may be. No image is read.

    A tar is one shard; Parquet files are cut at row groups, the others at ``shard_rows``. Folders and lists
    are walked as the iterator is asked; the listing of a folder goes to ``index``, which other processes
    read the shards from (None = a file that ends with this process), and ``others`` counts its files that are
    not taken for images, by extension.
    Raises :class:`DataError` for a spec that names nothing readable.
    """
    try:
        kind, cuts = _cuts(spec, shard_rows, index, others)
        first = next(cuts, None)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=spec) from error
    if first is None:
        raise no_images(Path(spec)) if kind == "folder" else DataError("nothing to read here", where=spec)
    every = enumerate(chain([first], cuts))
    return (ShardRef(n, cut.name, kind, *cut[1:4], cut.mark or _mark(cut)) for n, cut in every)


def _mark(cut: Cut) -> str:
    """Of a file: its name, size, time of change and part; of anything else what is known of its place."""
    try:
        of = stamp(place(cut.location))
    except (OSError, ValueError):
        of = [cut.location]
    return hashlib.sha256(json.dumps([cut.name, *of, cut.start, cut.rows]).encode()).hexdigest()


def read_shard(shard: ShardRef) -> Iterator[Item]:
    """The images of a shard in order, streaming; each member, row or file of it is accounted for by an item.

    Of images with one key the first counts, the others are errors. Raises :class:`DataError` only where
    nothing of the shard can be read, and where a remote data set breaks off. Keys are UTF-8 and lead nowhere.
    """
    seen: set[str] = set()
    for item in READERS[shard.kind](shard):
        if item.error is None and leads_out(item.key):
            item = Item(item.key, None, error="its key leads out of the folder")
        if item.error is None and item.key in seen:
            item = Item(item.key, None, error="another image of this shard has the same key")
        try:
            item.key.encode("utf-8")
        except UnicodeEncodeError:
            key = item.key.encode("utf-8", "backslashreplace").decode()
            item = Item(key, None, error="its name is not UTF-8")
        if item.error is None:
            seen.add(item.key)
        yield item


# ---------------------------------------------------------------- what a spec names


def _cuts(
    spec: str, shard_rows: int, index: Path | None, others: Counter[str] | None
) -> tuple[str, Iterator[Cut]]:
    if shard_rows < 1:
        raise ValueError(f"shards of {shard_rows} rows")
    if spec.startswith("hf:"):
        return "hf", hf_cuts(spec, shard_rows)
    if is_remote(spec):
        files = [file for name in _braces(spec) for file in matching(name)]
        if len(files) == 1 and files[0].suffix.lower() in LISTS:
            return "list", list_cuts(files[0], shard_rows)
        return _packed(files, spec, shard_rows)
    if spec.startswith("scenes:") or "://" in spec:
        fix = "render scenes first (captioner scenes); of the network, s3://… and hf:… are read"
        raise DataError("not a data set on this machine", where=spec, fix=fix)
    path = Path(os.path.abspath(spec))  # other processes may work elsewhere
    if not path.exists() and re.search(r"[*?\[{]", spec):
        files = _matches(str(path))
    elif path.is_dir():
        if is_saved(path):
            return "hf", hf_cuts(f"hf:{path}", shard_rows)
        files = _tables_only(path)
        if not files:
            return "folder", folder_cuts(path, shard_rows, index, others)
    elif path.is_file():
        if path.suffix.lower() in LISTS:
            return "list", list_cuts(path, shard_rows)
        if is_image_name(path.name):
            return "photo", iter([Cut(path.name, str(path), rows=1)])
        if path.suffix.lower() in TABLES and path.suffix.lower() != ".parquet":
            return "captions", table_cuts(path, shard_rows)
        files = [path]
    else:
        raise DataError("no such file or folder", where=spec, fix="name a data set: docs/formats.md")
    return _packed(files, spec, shard_rows)


def _packed(files: list[Path], spec: str, shard_rows: int) -> tuple[str, Iterator[Cut]]:
    """Tars or Parquet files."""
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return "webdataset", (Cut(file.name, str(file)) for file in files)
    if kinds == {".parquet"}:
        return "parquet", parquet_cuts(files, shard_rows)
    raise DataError(
        f"neither tars nor Parquet files: {', '.join(sorted(kinds))}",
        where=spec,
        fix="name a folder of images, a list of them (LIST.txt), *.tar or *.parquet",
    )


def _matches(pattern: str) -> list[Path]:
    """The files of a pattern with ``*``, ``?``, ``[…]``, ``{000..999}`` and ``{a,b}``."""
    files: list[Path] = []
    missing = []
    for name in _braces(pattern):
        if glob.has_magic(name):
            files += map(Path, sorted(glob.glob(name, recursive=True)))
        elif os.path.isfile(name):
            files.append(Path(name))
        else:
            missing.append(name)
    if missing:
        raise DataError(
            f"{len(missing):,} of the files are not there, the first: {missing[0]}",
            where=pattern,
            fix="restore them, or name those that are there with *",
        )
    if not files:
        raise DataError("no file matches", where=pattern)
    return files


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        parts = [f"{n:0{len(numbers[1])}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        parts = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + part + rest for part in parts for rest in _braces(after)]


def _tables_only(path: Path) -> list[Path]:
    """The tars or Parquet files of a folder that has no images beside them, else nothing."""
    files = []
    for entry in os.scandir(path):
        if entry.name.startswith(".") or entry.name == "metadata.parquet":
            continue
        if is_image_name(entry.name) or entry.is_dir():
            return []
        if entry.name.lower().endswith((".tar", ".parquet")):
            files.append(Path(entry.path))
    return sorted(files)


READERS: dict[str, Callable[[ShardRef], Iterator[Item]]] = {
    "folder": read_files,
    "list": read_list,
    "photo": read_photo,
    "captions": read_rows,
    "webdataset": read_tar,
    "parquet": read_parquet,
    "hf": read_hf,
}
