"""What every kind of source is read as: shards, and the images of a shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Item:
    """One image as it lies in the source."""

    key: str  # unchanged from the source: webdataset key, relative path, key column or file/row
    image: bytes | Path | None  # encoded bytes or the file; None where there is no image to read
    caption: str | None = None  # what the source itself says beside the image
    error: str | None = None  # why there is no image
    world: bool = False  # the fault is not the image's: a disk or a network failed


@dataclass(frozen=True)
class ShardRef:
    """An input shard, the unit of resume; plain values only, so that it goes to other processes and JSON."""

    index: int  # 0.. in an order that is the same every time
    name: str  # such as "000012.tar", "part-3.parquet", "files-00004"
    kind: str  # folder, list, webdataset, parquet, hf
    location: str  # a path, or JSON of what the reader needs: a place, however many rows lie there
    start: int = 0  # first row, for sources cut by rows
    rows: int | None = None  # None: not known without reading
    mark: str = ""  # changes when what lies there does, as far as its listing tells


class Cut(NamedTuple):
    """A shard before it has its number."""

    name: str
    location: str
    start: int = 0
    rows: int | None = None
    mark: str = ""
