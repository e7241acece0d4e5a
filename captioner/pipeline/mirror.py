"""An output in an object store: what a job publishes is put there as it is published.

The job works in a folder of this machine, where logs, journal and lock are files; the store is given whole
objects. A put may only create (``If-None-Match: *``), as there is no rename: where somebody else's part
stands, the job stops. On another machine the folder is filled from the store first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captioner.errors import RunError
from captioner.files import atomic_file
from captioner.records import CaptionRow, read_parquet
from captioner.sources.places import Unreachable, answering, place

FIRST, THEN = ".job.json", (".shards.jsonl", ".status.json", ".page.json", "report.html")


def work_folder(address: str, named: str | None) -> Path:
    """Where a job works whose output has an address: the same folder every time."""
    if named is not None:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "captioner" / hashlib.sha256(address.encode()).hexdigest()[:16]


class Mirror:
    """The objects of an output. Raises RunError where the store gives no answer, or has another job's."""

    def __init__(self, address: str, out: Path):
        self.address, self.out = address.rstrip("/"), out
        there: Any = place(self.address)
        self._fs, self._path = there.fs, there.path

    @contextmanager
    def _asking(self) -> Generator[None, None, None]:
        try:
            with answering(self.address):
                yield
        except (Unreachable, FileNotFoundError) as error:
            fix = "the same command goes on when it answers; is the bucket there, and may you write?"
            raise RunError(f"the object store refuses: {error}", where=self.address, fix=fix) from error

    def pull(self) -> None:
        """Bring what a job on another machine has put there, if any, its manifest last."""
        with self._asking():
            self._fs.invalidate_cache()
            found = self._fs.ls(self._path) if self._fs.exists(f"{self._path}/{FIRST}") else []
            names = {name.rpartition("/")[2] for name in found}
            wanted = [name for name in names if name.endswith(".parquet") or name in THEN]
            for name in [*sorted(wanted), *names & {FIRST}]:
                if not (self.out / name).exists():
                    with atomic_file(self.out / name) as part:
                        self._fs.get_file(f"{self._path}/{name}", str(part))

    def part(self, path: Path) -> None:
        """Put a published part. One that stands there is replaced by one that has all its captions."""
        there = f"{self._path}/{path.name}"
        with self._asking():
            try:
                self._fs.pipe_file(there, path.read_bytes(), mode="create")
                return
            except FileExistsError:
                pass
            with atomic_file(self.out / f".theirs-{path.name}") as theirs:
                self._fs.get_file(there, str(theirs))
                said = {
                    (row.key, row.id, row.caption) for row in read_parquet(theirs, CaptionRow) if row.caption
                }
            (self.out / f".theirs-{path.name}").unlink(missing_ok=True)
            if not said <= {(row.key, row.id, row.caption) for row in read_parquet(path, CaptionRow)}:
                what, fix = "another job has put other captions there", "name a new --out"
                raise RunError(what, where=f"{self.address}/{path.name}", fix=fix)
            self._fs.pipe_file(there, path.read_bytes())

    def rest(self) -> None:
        """Put what is replaced as the job goes: manifest, journal, status and page."""
        with self._asking():
            for name in (FIRST, *THEN):
                if (self.out / name).is_file():
                    self._fs.pipe_file(f"{self._path}/{name}", (self.out / name).read_bytes())
