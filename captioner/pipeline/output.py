"""The output of a captioning job: one Parquet file per input shard, a manifest, a journal of what is done.

A shard is done when its file is there. The journal holds a line of counts per finished shard, so that
neither resuming nor the closing line reads the rows again; lines that a kill has cost are counted anew.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.errors import DataError, RunError
from captioner.records import CaptionRow, read_parquet
from captioner.runs import Shards, atomic_write_json, atomic_write_text
from captioner.sources.folder import (
    caption_shards,
    leads_out,
    long_name,
    read_captions,
    sidecar_path,
    write_sidecars,
)

MANIFEST = ".job.json"  # hidden, all of them, so that `datasets` loads the folder as it is
JOURNAL = ".shards.jsonl"
STATUS = ".status.json"
LISTING = ".listing.jsonl"  # of a folder: keys and names, which shards are places in
REMOVING = ".removing"
JSONL = "captions.jsonl"
TEXT = ".txt"
BOUND = ("input", "checkpoint", "config")  # what a job cannot change underway


@dataclass
class Tally:
    """Counts of rows."""

    rows: int = 0
    failed: int = 0
    cut: int = 0  # ended by the token limit
    tokens: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # of the failed ones, up to their first colon

    @classmethod
    def of(cls, rows: Iterable[CaptionRow]) -> Tally:
        tally, reasons = cls(), Counter[str]()
        for row in rows:
            tally.rows += 1
            tally.cut += row.finish_reason == "length"
            tally.tokens += row.tokens or 0
            if row.error is not None:
                tally.failed += 1
                reasons[row.error.split(":")[0]] += 1
        tally.reasons = dict(reasons)
        return tally

    def add(self, other: Tally) -> None:
        for name in ("rows", "failed", "cut", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons = dict(Counter(self.reasons) + Counter(other.reasons))


class Output:
    """The folder of a job; see :func:`claim`. ``done`` holds the numbers of the published shards."""

    def __init__(self, out: Path):
        self.out, self.shards = out, Shards(out, CaptionRow)
        self.done: set[int] = set()
        self.tally = Tally()
        self._load()

    def _load(self) -> None:
        """Read listing and journal; count shards anew that are published and have no line."""
        published = {int(shard.stem) for shard in caption_shards(self.out)}
        journal = self.out / JOURNAL
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) if journal.is_file() else []
        good = []
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith("\n") else {}
                index, tally = entry.pop("shard"), Tally(**entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that a kill cut
            if index in published and index not in self.done:
                good.append(line)
                self.done.add(index)
                self.tally.add(tally)
        if good != lines:
            atomic_write_text(journal, "".join(good))
        for index in sorted(published - self.done):
            self._enter(index, Tally.of(self.shards.read(index)))

    def publish(self, index: int, rows: Sequence[CaptionRow]) -> None:
        """Publish the rows of a shard by rename, then note it in the journal."""
        self.shards.write(index, rows)
        self._enter(index, Tally.of(rows))

    def _enter(self, index: int, tally: Tally) -> None:
        with (self.out / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"shard": index, **asdict(tally)}) + "\n")
        self.done.add(index)
        self.tally.add(tally)


def check_free(out: Path) -> None:
    """Raise RunError where ``out`` holds something that no caption job wrote."""
    if (out / MANIFEST).is_file() or not out.exists():
        return
    if not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir()):
        raise RunError(
            "the output holds something else", where=str(out), mend="name a new --out, or empty it"
        )


def stored_job(out: Path) -> dict[str, Any]:
    """The manifest of the job that began ``out``; empty where there is none. RunError if it is broken."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return {}
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        mend = "name a new --out, or start over with --redo"
        raise RunError("the job's manifest cannot be read", where=str(manifest), mend=mend) from error


def claim(out: Path, job: dict[str, Any]) -> Output:
    """Make ``out`` this job's output; RunError where another input, checkpoint or config began it."""
    before = stored_job(out)
    changed = [name for name in BOUND if before and before.get(name) != job[name]]
    if changed:
        if before.get("shard_rows") != job["shard_rows"]:  # cuts the same input into other shards
            changed = ["shard_rows" if name == "input" else name for name in changed]
        what = f"this output was begun with another {' and '.join(changed)}"
        mend = "name a new --out, or start over with --redo"
        raise RunError(what, where=str(out / MANIFEST), mend=mend)
    out.mkdir(parents=True, exist_ok=True)
    if before != job:
        atomic_write_json(out / MANIFEST, job)
    clear_leftovers(out)
    return Output(out)


def write_texts(out: Path) -> None:
    """Write ``KEY.txt`` for every caption; DataError, and no file, where two would have one name.

    Names that differ in case alone are one for many file systems. A caption whose key is too long for a file
    name has none, which is told.
    """
    long = 0
    with closing(sqlite3.connect("")) as database:  # a file of its own, for the memory of millions of names
        database.execute("CREATE TABLE places (name PRIMARY KEY, key, folder)")
        for row in read_captions(out):
            if row.caption is None or leads_out(row.key):
                continue
            if long_name(row.key):
                long += 1
                continue
            path = PurePosixPath(unicodedata.normalize("NFC", f"{row.key}{TEXT}").casefold())
            places = [(str(folder), "", True) for folder in path.parents[:-1]] + [(str(path), row.key, False)]
            for name, key, folder in places:
                had = database.execute("SELECT key, folder FROM places WHERE name = ?", [name]).fetchone()
                if had and not (folder and had[1]):
                    what = f"the keys {had[0]!r} and {row.key!r} want one file name"
                    mend = "leave --format txt out: the rows are all there, in Parquet files or with jsonl"
                    raise DataError(what, where=str(out / name), mend=mend)
                if not had:
                    database.execute("INSERT INTO places VALUES (?, ?, ?)", [name, key or row.key, folder])
    rows = read_captions(out)
    write_sidecars((row for row in rows if not leads_out(row.key) and not long_name(row.key)), out)
    if long:
        print(
            f"{long:,} captions have no text file: their keys are too long for a file name", file=sys.stderr
        )


def half_removed(out: Path) -> bool:
    """Whether a :func:`remove` was cut short."""
    return (out / REMOVING).exists()


def remove(out: Path) -> None:
    """Remove what a job wrote, and nothing else. Where a kill cuts it short, the next job goes on with it."""
    if out.is_dir():
        atomic_write_text(out / REMOVING, "")
    for shard in caption_shards(out):
        try:
            rows = read_parquet(shard, CaptionRow)
        except DataError:
            rows = []  # a broken shard: its text files stay and are overwritten
        for row in rows:
            if not leads_out(row.key) and not long_name(row.key):
                with suppress(NotADirectoryError, DataError):  # no file of this job is there
                    sidecar_path(out, row.key).unlink(missing_ok=True)
    clear_leftovers(out)
    names = (out / name for name in (JSONL, STATUS, LISTING, JOURNAL, MANIFEST, REMOVING))
    for path in [*caption_shards(out), *names]:
        path.unlink(missing_ok=True)


def clear_leftovers(out: Path) -> None:
    """Half a shard or manifest that a killed job left behind."""
    for path in out.glob(".*.part-*"):
        if path.is_file():
            path.unlink(missing_ok=True)
