"""Tables: the columns that hold images, keys and captions; Parquet files, cut at their row groups."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captioner.errors import DataError
from captioner.sources.items import Cut, Item, ShardRef
from captioner.sources.places import Unreachable, open_bytes, place
from captioner.views import MAX_BYTES

BATCH = 16  # rows of a table in memory at once: they hold whole images
MAX_LOST = 1 << 20  # rows: what a damaged file says of its size is not believed beyond
IMAGE_COLUMNS = ("image", "img", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "content")
PATH_COLUMNS = ("image_path", "path", "file_name", "filename", "filepath", "file", "image", "img")
KEY_COLUMNS = ("key", "__key__", "id", "uid", "image_id", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "txt")


class Columns(NamedTuple):
    image: str  # of bytes, of {bytes, path}, or of paths
    key: str | None
    caption: str | None


def columns_of(schema: Any, where: str) -> Columns:
    """Which columns of an Arrow schema hold what; DataError where none holds images."""
    import pyarrow as pa

    kinds = {field.name: field.type for field in schema if schema.names.count(field.name) == 1}

    def binary(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(binary(field.type) and field.name == "bytes" for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def text(kind: Any) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    named = [name for name in IMAGE_COLUMNS if name in kinds and binary(kinds[name])]
    structs = [name for name, kind in kinds.items() if pa.types.is_struct(kind) and binary(kind)]
    paths = [name for name in PATH_COLUMNS if name in kinds and text(kinds[name])]
    image = next(iter(named + structs + paths), None)
    if image is None:
        raise DataError(
            f"no column of images among {', '.join(list(kinds)[:20])}",
            where=where,
            fix="image bytes in a column `image`, or paths of image files in a column `path`",
        )
    keys = [k for k in (*KEY_COLUMNS, *paths[:1]) if k in kinds and (text(kinds[k]) or _whole(kinds[k]))]
    captions = [name for name in CAPTION_COLUMNS if name in kinds and text(kinds[name])]
    return Columns(image, next(iter(keys), None), next(iter(captions), None))


def _whole(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind))


def row_item(batch: Any, row: int, columns: Columns, fallback: str, home: Path, remote: bool = False) -> Item:
    """One row of an Arrow batch; a cell that cannot be read is the error of its row only.

    Paths lead to files below ``home``; those of a ``remote`` source, also to files of the hub.
    """
    key = fallback
    try:
        if columns.key is not None:
            value = batch.column(columns.key)[row].as_py()
            key = fallback if value is None or value == "" else str(value)
        image = _cell(batch.column(columns.image)[row].as_py(), home, remote)
        caption = batch.column(columns.caption)[row].as_py() if columns.caption else None
    except Exception as error:  # the boundary: text that is not UTF-8, a file of the hub that is gone, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        world = isinstance(error, OSError)
        return Item(key, None, error=f"the row cannot be read: {reason[:200]}", world=world)
    if columns.key == columns.image and not isinstance(image, bytes | None):  # where it lies is no name
        key = os.path.relpath(str(image), str(home))
    if isinstance(image, bytes) and len(image) > MAX_BYTES:
        return Item(key, None, error=f"file too large: {len(image):,} bytes, limit {MAX_BYTES:,}")
    return Item(key, image, caption, None if image is not None else "no image in the row")


def _cell(value: Any, home: Path, remote: bool) -> bytes | Path | None:
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or "\0" in value or not value:
        raise ValueError(f"{value!r} is not the path of a file")
    if remote and value.startswith("hf://") and "::" not in value:
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(value, "rb") as file:
            return file.read(MAX_BYTES + 1)
    # whoever wrote the table does not choose which files of this machine, or of the network, are opened
    if "://" in value or "::" in value:
        raise ValueError(f"{value!r} is an address, and the data set is not one of the hub")
    if not Path(os.path.normpath(os.path.join(str(home), value))).is_relative_to(os.path.normpath(str(home))):
        raise ValueError(f"{value!r} leads out of {home}")
    return home / value


def parquet_cuts(files: Sequence[Path], shard_rows: int) -> Iterator[Cut]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = os.path.commonpath([str(file.parent) for file in files])
    for file in files:
        name = os.path.relpath(str(file), root)
        try:
            with open_bytes(file) as opened:
                about = pq.read_metadata(opened)
            sizes = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        except Unreachable:
            raise
        except (OSError, pa.ArrowException):
            yield Cut(name, str(file))  # reading it says what is wrong
            continue
        start = rows = 0
        for i, size in enumerate(sizes):
            rows += size
            if rows >= shard_rows or (i == len(sizes) - 1 and rows):
                yield Cut(name, str(file), start, rows)
                start, rows = start + rows, 0


def read_parquet(shard: ShardRef) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = place(shard.location)
    try:
        # so that a page is in memory at once, not the column of a row group
        opened = open_bytes(path)
        file = pq.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    columns = columns_of(schema, str(path))
    end = shard.start + shard.rows if shard.rows is not None else sum(sizes)
    row = 0
    with opened, file:
        for group, size in enumerate(sizes):
            if shard.start <= row < end:
                yield from _row_group(file, group, row, size, columns, shard)
            row += size


def _row_group(
    file: Any, group: int, first: int, size: int, columns: Columns, shard: ShardRef
) -> Iterator[Item]:
    import pyarrow as pa

    stem, home = shard.name.removesuffix(".parquet"), place(shard.location).parent
    done, reason = 0, "fewer rows than the file says"
    try:
        wanted = [name for name in dict.fromkeys(columns) if name]
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted, use_threads=False):
            for i in range(batch.num_rows):
                yield row_item(batch, i, columns, f"{stem}/{first + done:08d}", home)
                done += 1
    except Unreachable as error:
        raise DataError("cannot be read to its end", where=str(error)) from error
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
    for lost in range(done, min(size, done + MAX_LOST)):
        key = f"{stem}/{first + lost:08d}"
        yield Item(key, None, error=f"the rest of the row group cannot be read: {reason}")
