"""Hugging Face data sets: saved to disk, or streamed from a folder or from the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from captioner.errors import DataError
from captioner.sources.items import Cut, Item, ShardRef
from captioner.sources.tables import BATCH, columns_of, row_item

SAVED = ("state.json", "dataset_dict.json")  # one of them is in what `save_to_disk` wrote


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in SAVED)


def hf_cuts(spec: str, shard_rows: int) -> Iterator[Cut]:
    name = spec.removeprefix("hf:")
    split = None
    if not Path(name).exists() and ":" in name:
        name, _, split = name.rpartition(":")
    if Path(name).is_dir():
        name = os.path.abspath(name)
    if is_saved(Path(name)):
        split, dataset = _saved(name, split)
        where = json.dumps({"saved": name, "split": split})
        for index, start in enumerate(range(0, len(dataset), shard_rows)):
            yield Cut(f"{split}-{index:05d}", where, start, min(shard_rows, len(dataset) - start))
        return
    split, stream = _stream(name, split)
    for i in range(stream.num_shards):
        yield Cut(
            f"{split}-{i:05d}",
            json.dumps({"name": name, "split": split, "part": i, "parts": stream.num_shards}),
        )


@lru_cache(maxsize=4)
def _saved(path: str, split: str | None) -> tuple[str, Any]:
    """(split, data set) that ``save_to_disk`` wrote; memory-mapped, so a shard costs what it reads."""
    import datasets

    with _loading(path):
        found = datasets.load_from_disk(path)
    if not isinstance(found, datasets.DatasetDict):
        return split or "train", found.with_format("arrow")
    name = _choose(split, list(found), path)
    return name, found[name].with_format("arrow")


@lru_cache(maxsize=4)
def _stream(name: str, split: str | None) -> tuple[str, Any]:
    """(split, streamed data set): a folder in a form that `datasets` knows, or a data set of the hub."""
    import datasets

    with _loading(name):
        found = datasets.load_dataset(name, streaming=True)
        chosen = _choose(split, list(found), name)
        return chosen, found[chosen].with_format("arrow")


@contextmanager
def _loading(where: str) -> Iterator[None]:
    """A boundary: `datasets` raises errors of many libraries for a data set that is not there or broken."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"not a data set that can be loaded: {reason}", where=where, fix="hf:PATH_OR_NAME[:SPLIT]"
        ) from error


def _choose(split: str | None, splits: list[str], where: str) -> str:
    wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if wanted not in splits:
        fix = f"name one of them: hf:{where}:SPLIT"
        raise DataError(f"no split {wanted!r} among {', '.join(splits)}", where=where, fix=fix)
    return wanted


def read_hf(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    if "saved" in where:
        split, dataset = _saved(where["saved"], where["split"])
        stop = shard.start + (shard.rows or 0)
        tables = (dataset[at : min(at + BATCH, stop)] for at in range(shard.start, stop, BATCH))
        home, stem, remote = Path(where["saved"]), split, False
    else:
        split, stream = _stream(where["name"], where["split"])
        part = stream.shard(num_shards=where["parts"], index=where["part"])
        tables = part.iter(batch_size=BATCH)
        home, stem, remote = Path(where["name"]), shard.name, not os.path.isdir(where["name"])
    row = shard.start
    with _loading(shard.name):
        for table in tables:
            columns = columns_of(table.schema, shard.name)
            for i in range(table.num_rows):
                yield row_item(table, i, columns, f"{stem}/{row:08d}", home, remote)
                row += 1
