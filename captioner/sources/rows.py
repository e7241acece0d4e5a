"""One photograph, and the images that a caption table names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from captioner.errors import DataError
from captioner.sources.captions import finder, not_text, read_table
from captioner.sources.folder import ImageRow, sidecar, walk_images
from captioner.sources.items import Cut, Item, ShardRef


def read_photo(shard: ShardRef) -> Iterator[Item]:
    path = Path(shard.location)
    yield Item(path.stem, path, sidecar(path.with_suffix(""), errors="replace"))


def table_cuts(table: Path, shard_rows: int) -> Iterator[Cut]:
    """Shards of the rows of a caption table."""
    rows = len(_read(str(table), table.stat().st_mtime_ns))
    for start in range(0, rows, shard_rows):
        name = f"{table.stem}-{start // shard_rows:05d}"
        yield Cut(name, str(table), start, min(shard_rows, rows - start))


def read_rows(shard: ShardRef) -> Iterator[Item]:
    table = Path(shard.location)
    rows = _read(str(table), table.stat().st_mtime_ns)
    for row in rows[shard.start : shard.start + (shard.rows or 0)]:
        yield Item(row.key, None if row.error else row.path, row.caption, row.error)


@lru_cache(maxsize=1)
def _read(table: str, stamp: int) -> list[ImageRow]:
    return table_rows(Path(table))


def table_rows(
    table: Path, named: Mapping[str, str] | None = None, split: str | None = None
) -> list[ImageRow]:
    """The images that a caption table names, by paths from its folder, with their captions.

    ``named`` as in :func:`captioner.sources.captions.read_table`; ``split`` takes the rows that have it in
    their column ``split``. An image that is not there is the error of its row.
    """
    rows = read_table(table, named)
    if split:
        rows = [row for row in rows if row.get("split") == split]
        if not rows:
            raise DataError(f"no row has {split!r} in a column split", where=str(table))
    home, find = table.parent, None
    found: list[ImageRow] = []
    for row in rows:
        cell, where = str(row.get("file_name", "")), f"{table.name}, row {row['row']}"
        path = home / cell
        if not os.path.isfile(path):
            find = find or finder([name for _, name in walk_images(home)], str(home))
            path = home / (find(cell) or cell)
        error = not_text(row, where)
        if not os.path.isfile(path):
            error = f"the image {cell!r} is not there ({where})"
        key = os.path.splitext(os.path.relpath(path, home))[0].replace("../", "")
        about = {name: row.get(name) for name in ("prose", "facts", "questions")}
        found.append(ImageRow(key if cell else where, path, row.get("text"), **about, error=error))
    return found
