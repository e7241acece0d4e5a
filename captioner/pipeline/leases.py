"""Who works on which shard, where several machines share an output: files on the file system that they share.

A claim is a file that only one can create. Whoever holds claims counts up a number in a file of its own; who
sees that number stand still for ``expire`` seconds of its own clock takes the claims over. No clock of
another machine is read, and no time of a file. Should two hold a shard for a moment, both write the same
rows, and one of two equal parts stays.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from captioner.files import atomic_write_text

EXPIRE = 120.0  # seconds without a beat after which a holder counts as dead
BEAT = 10.0  # seconds between two beats


class Leases:
    """Claims on shards, held by this process."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic, expire: float = EXPIRE):
        self.folder, self._clock, self._expire = folder, clock, expire
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._count, self._beaten = 0, -BEAT
        self._seen: dict[str, tuple[str, float]] = {}  # holder -> its number, and when it was new here
        folder.mkdir(parents=True, exist_ok=True)
        self.beat()

    def beat(self) -> None:
        """Show that this process lives; to be called often, acts every BEAT seconds."""
        if self._clock() - self._beaten >= BEAT:
            self._beaten, self._count = self._clock(), self._count + 1
            atomic_write_text(self._beat_file(self.name), str(self._count))

    def _beat_file(self, holder: str) -> Path:
        return self.folder / f"beat-{holder}"

    def claim(self, shard: int) -> bool:
        """Whether the shard is this process's now."""
        path = self.folder / f"{shard:05d}"
        for _ in range(2):
            with suppress(FileExistsError):
                with open(path, "x", encoding="utf-8") as file:
                    file.write(self.name)
                return True
            holder = self._holder(path)
            if holder == self.name:
                return True
            if not self._dead(holder):
                return False
            self._take_over(path, holder)
        return False

    @staticmethod
    def _holder(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except OSError:
            return ""

    def _dead(self, holder: str) -> bool:
        try:
            number = self._beat_file(holder or "nobody").read_text(encoding="utf-8")
        except OSError:
            number = "gone"
        before, since = self._seen.get(holder, ("", 0.0))
        if number != before:
            self._seen[holder] = number, self._clock()
            return False
        return self._clock() - since > self._expire

    def _take_over(self, path: Path, holder: str) -> None:
        """Remove a dead holder's claim; one that another has taken over meanwhile is put back."""
        mine = path.with_name(f".{path.name}-{self.name}")
        with suppress(OSError):
            os.rename(path, mine)
            if self._holder(mine) != holder:
                os.link(mine, path)
            mine.unlink()

    def release(self, shard: int) -> None:
        """Give a claim back: the shard is published, or cannot be read."""
        (self.folder / f"{shard:05d}").unlink(missing_ok=True)

    def close(self) -> None:
        """This process claims nothing more."""
        self._beat_file(self.name).unlink(missing_ok=True)
