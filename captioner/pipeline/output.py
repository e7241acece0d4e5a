"""The output of a captioning job: one Parquet file per input shard, a manifest, a journal of what is done.

A shard is done when its file is there. The journal holds a line of counts per finished shard, so that
neither resuming nor the closing line reads the rows again; lines that a kill has cost are counted anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.errors import DataError, RunError
from captioner.files import atomic_write_json, atomic_write_text, remove_dir, writing
from captioner.pipeline.mirror import Mirror
from captioner.records import CaptionRow, read_parquet
from captioner.runs import Shards
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
WORK = ".work"  # logs of the shards underway
LEASES = ".leases"  # of machines that share the work
OLD = ".old"  # parts of an input that has changed since
REMOVING = ".removing"
JSONL = "captions.jsonl"
PAGE = "report.html"
PAGE_STATE = ".page.json"
THUMBNAILS = ".thumbnails"  # of the images that the page shows
TEXT = ".txt"
BOUND = ("shard_rows", "checkpoint", "config")  # what a job cannot change underway


@dataclass
class Tally:
    """Counts of rows."""

    rows: int = 0
    failed: int = 0
    cut: int = 0  # ended by the token limit
    tokens: int = 0
    world: int = 0  # of the failed ones: by no fault of the image
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
                tally.world += row.fault == "world"
                reasons[row.error.split(":")[0]] += 1
        tally.reasons = dict(reasons)
        return tally

    def add(self, other: Tally, sign: int = 1) -> None:
        for name in ("rows", "failed", "cut", "tokens", "world"):
            setattr(self, name, getattr(self, name) + sign * getattr(other, name))
        reasons = Counter(self.reasons)
        reasons.update({reason: sign * n for reason, n in other.reasons.items()})
        self.reasons = dict(+reasons)


class Log:
    """The rows of a shard underway, appended as they come, so that a kill costs seconds of work.

    Whoever works on the shard writes: its worker, or, while it has none, the coordinator.
    """

    def __init__(self, out: Path, index: int):
        self.path = out / WORK / f"{index:05d}.jsonl"

    def add(self, rows: Iterable[tuple[int, CaptionRow]], **note: Any) -> None:
        """Append numbered rows, and a note."""
        lines = [json.dumps([number, row.model_dump()]) for number, row in rows]
        self.path.parent.mkdir(exist_ok=True)
        with writing(self.path), self.path.open("ab") as file:
            # a line that a kill cut has no end; the next one begins anew
            file.write(
                "".join(f"\n{line}" for line in [*lines, *([json.dumps(note)] if note else [])]).encode()
            )

    def read(self) -> tuple[dict[int, CaptionRow], list[dict[str, Any]]]:
        """The rows by number, and the notes."""
        rows: dict[int, CaptionRow] = {}
        notes = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            try:
                entry = json.loads(line)
                if isinstance(entry, dict):
                    notes.append(entry)
                else:
                    rows[int(entry[0])] = CaptionRow.model_validate(entry[1])  # the last: tried again
            except (ValueError, TypeError, LookupError):
                continue  # a line that a kill cut
        return rows, notes

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Output:
    """The folder of a job; see :func:`claim`. ``done`` holds the numbers of the published shards.

    Workers publish; their coordinator keeps the journal, where a shard's ``mark`` says what it was made of.
    """

    def __init__(self, out: Path, mirror: Mirror | None = None):
        """``mirror``: the store that gets what is published."""
        self.out, self.shards, self.mirror = out, Shards(out, CaptionRow), mirror
        self.done: set[int] = set()
        self.tally = Tally()
        self.tallies: dict[int, tuple[Tally, str]] = {}  # of the shards that can be tried again; and its mark
        self._load()

    def _load(self) -> None:
        """Read listing and journal; count shards anew that are published and have no line."""
        published = {int(shard.stem) for shard in caption_shards(self.out)}
        journal = self.out / JOURNAL
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) if journal.is_file() else []
        last = {}
        for line, index, tally, mark in _entries(lines):
            if index in published:
                last[index] = line, tally, mark  # the last one: a shard that was tried again has two
        for index, (_, tally, mark) in last.items():
            self._count(index, tally, mark)
        if [line for line, _, _ in last.values()] != lines:
            atomic_write_text(journal, "".join(line for line, _, _ in last.values()))
        for index in sorted(published - self.done):
            self.enter(index, Tally.of(self.shards.read(index)))

    def enter(self, index: int, tally: Tally, mark: str = "") -> None:
        """Note in the journal that a shard is published, also in the store."""
        if self.mirror:
            self.mirror.part(self.shards.path(index))
        line = json.dumps({"shard": index, **asdict(tally), "mark": mark}) + "\n"
        with (self.out / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(line)
        self._count(index, tally, mark)

    def _count(self, index: int, tally: Tally, mark: str) -> None:
        self.done.add(index)
        self.tally.add(tally)
        if tally.failed:
            self.tallies[index] = tally, mark

    def retry(self, every: bool) -> int:
        """Take up the shards with rows that failed by a fault of the world, or by any. Returns their count.

        What is published stays until better rows take its place; the good ones are its log.
        """
        again = [index for index, (tally, _) in self.tallies.items() if tally.failed if every or tally.world]
        for index in again:
            log, rows = Log(self.out, index), self.shards.read(index)
            log.remove()
            log.add((n, r) for n, r in enumerate(rows) if not (r.fault == "world" or (every and r.error)))
            self.done.discard(index)
            self.tally.add(self.tallies.pop(index)[0], -1)
        return len(again)


def _entries(lines: Iterable[str]) -> Iterator[tuple[str, int, Tally, str]]:
    """(line, shard, tally, mark) of each whole line of a journal."""
    for line in lines:
        try:
            entry = json.loads(line) if line.endswith("\n") else {}
            yield (
                line,
                int(entry.pop("shard")),
                Tally(**{k: v for k, v in entry.items() if k != "mark"}),
                str(entry.get("mark", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that a kill cut


# ---------------------------------------------------------------- an input that changed


class Old:
    """What was published of an input that has changed since: its parts keep the captions of equal images."""

    def __init__(self, out: Path):
        self.out, self.dir = out, out / OLD
        self.index = self.dir / "known.sqlite"

    def put_away(self) -> None:
        """Move what is published here, journal first. Where a kill cuts this short, it is begun again."""
        home = self.dir / str(len(list(self.dir.glob("[0-9]*"))))
        home.mkdir(parents=True)
        journal = self.out / JOURNAL
        if journal.is_file():
            atomic_write_text(home / JOURNAL, journal.read_text(encoding="utf-8"))
        for part in caption_shards(self.out):
            os.rename(part, home / part.name)
        for path in (journal, self.out / PAGE_STATE, *(self.out / WORK).glob("*.jsonl")):
            path.unlink(missing_ok=True)

    def take_back(self, output: Output, marks: Sequence[str]) -> None:
        """Publish again, under whatever number, the parts whose shards are as they were; index the rest."""
        where: dict[str, tuple[Path, Tally]] = {}
        for home in self.dir.glob("[0-9]*"):
            journal = home / JOURNAL
            for _, index, tally, mark in _entries(
                journal.open(encoding="utf-8") if journal.is_file() else ()
            ):
                if mark and (part := home / f"{index:05d}.parquet").is_file():
                    where[mark] = part, tally
        for index, mark in enumerate(marks):
            if index not in output.done and mark in where:
                part, tally = where.pop(mark)
                os.rename(part, output.shards.path(index))
                output.enter(index, tally, mark)
        self.index.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.index)) as database:
            database.execute("CREATE TABLE known (id PRIMARY KEY, row) WITHOUT ROWID")
            rows = ((r.id, r.model_dump_json()) for r in self._rows() if r.caption is not None)
            database.executemany("INSERT OR IGNORE INTO known VALUES (?, ?)", rows)
            database.commit()

    def _rows(self) -> Iterator[CaptionRow]:
        for home in sorted(self.dir.glob("[0-9]*")):
            for part in caption_shards(home):
                yield from read_parquet(part, CaptionRow)

    def remove(self) -> None:
        """When the new input is captioned: what is left of the old one goes, with its text files."""
        for row in self._rows():
            _remove_text(self.out, row.key)
        remove_dir(self.dir)


def check_free(out: Path) -> None:
    """Raise RunError where ``out`` holds something that no caption job wrote."""
    if (out / MANIFEST).is_file() or not out.exists():
        return
    if not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir()):
        raise RunError("the output holds something else", where=str(out), fix="name a new --out, or empty it")


def stored_job(out: Path) -> dict[str, Any]:
    """The manifest of the job that began ``out``; empty where there is none. RunError if it is broken."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return {}
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        fix = "name a new --out, or start over with --redo"
        raise RunError("the job's manifest cannot be read", where=str(manifest), fix=fix) from error


def claim(out: Path, job: dict[str, Any], marks: Sequence[str], mirror: Mirror | None = None) -> Output:
    """Make ``out`` this job's output; RunError where another checkpoint or config began it.

    ``marks`` are those of the input's shards. Where the input has changed, what is published of shards that
    are as they were stays, and what was captioned of the others is found by the content of the images.
    """
    before = stored_job(out)
    changed = [name for name in BOUND if before and before.get(name) != job[name]]
    if changed:
        what = f"this output was begun with another {' and '.join(changed)}"
        fix = "name a new --out, or start over with --redo"
        raise RunError(what, where=str(out / MANIFEST), fix=fix)
    if mirror and before and before.get("input") != job["input"]:
        what = "the input has changed, and the parts in the store are those of another"
        raise RunError(what, where=mirror.address, fix="name a new --out")
    out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    shutil.rmtree(out / LEASES, ignore_errors=True)
    old = Old(out)
    if before and before.get("input") != job["input"]:
        old.put_away()
    if before != job:
        atomic_write_json(out / MANIFEST, job)
    output = Output(out, mirror)
    if old.dir.is_dir():
        old.take_back(output, marks)
    return output


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
                    fix = "leave --format txt out: the rows are all there, in Parquet files or with jsonl"
                    raise DataError(what, where=str(out / name), fix=fix)
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
            _remove_text(out, row.key)
    clear_leftovers(out)
    for folder in (WORK, OLD, LEASES, THUMBNAILS):
        shutil.rmtree(out / folder, ignore_errors=True)
    names = (out / name for name in (JSONL, PAGE, PAGE_STATE, STATUS, LISTING, JOURNAL, MANIFEST, REMOVING))
    for path in [*caption_shards(out), *names]:
        path.unlink(missing_ok=True)


def _remove_text(out: Path, key: str) -> None:
    if not leads_out(key) and not long_name(key):
        with suppress(NotADirectoryError, DataError):  # no file of this job is there
            sidecar_path(out, key).unlink(missing_ok=True)


def clear_leftovers(out: Path) -> None:
    """Half a shard or manifest that a killed job left behind."""
    for path in out.glob(".*.part-*"):
        if path.is_file():
            path.unlink(missing_ok=True)
