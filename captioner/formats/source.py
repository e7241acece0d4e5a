"""Images of a data set, shard after shard: folders, webdataset tars and Parquet files."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import DataError
from captioner.formats.folder import IMAGE_SUFFIXES, read_folder


@dataclass(frozen=True)
class Item:
    """One image as it lies in the source."""

    key: str
    image: bytes | Path | None
    caption: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ShardRef:
    """An input shard, the unit of resume."""

    index: int
    name: str
    kind: str
    location: str
    start: int = 0
    rows: int | None = None


def open_source(spec: str, *, shard_rows: int = 256) -> Iterator[ShardRef]:
    """The shards of a data set; :class:`DataError` where there is none."""
    files = sorted(glob.glob(spec)) if not Path(spec).is_dir() else []
    if not files:
        images = read_folder(Path(spec), captions=False)
        for index, at in enumerate(range(0, len(images), shard_rows)):
            part = [[image.key, str(image.path)] for image in images[at : at + shard_rows]]
            yield ShardRef(index, f"files-{index:05d}", "folder", json.dumps(part), rows=len(part))
        return
    if all(file.endswith(".tar") for file in files):
        yield from (ShardRef(i, Path(file).name, "webdataset", file) for i, file in enumerate(files))
        return
    import pyarrow.parquet as pq

    index = 0
    for file in files:
        rows = pq.read_metadata(file).num_rows
        for start in range(0, rows, shard_rows):
            count = min(shard_rows, rows - start)
            yield ShardRef(index, Path(file).name, "parquet", file, start, count)
            index += 1


def read_shard(shard: ShardRef) -> Iterator[Item]:
    """The images of a shard in order."""
    if shard.kind == "folder":
        yield from (Item(key, Path(path)) for key, path in json.loads(shard.location))
    elif shard.kind == "webdataset":
        try:
            with tarfile.open(shard.location) as tar:
                for member in tar:
                    if Path(member.name).suffix in IMAGE_SUFFIXES:
                        stream = tar.extractfile(member)
                        assert stream is not None
                        yield Item(member.name.partition(".")[0], stream.read())
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"not a tar that can be read: {error}", where=shard.location) from error
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(shard.location, columns=["key", "image"]).slice(shard.start, shard.rows)
        yield from (Item(row["key"], row["image"]) for row in rows.to_pylist())
