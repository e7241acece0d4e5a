"""What an image may cost on its way to the engine: seconds of a process, and memory of the machine."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from captioner import views
from captioner.config import CaptionConfig
from captioner.views import BadImage, Cut, ViewSpec

GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Picklable: whatever process prepares an image is held to them."""

    seconds: float | None  # that a process may take; it is ended where it does not end. None: no limit
    share: int  # bytes that each process may take at any time
    most: int  # bytes that one process of the machine may take at a time, beside the others
    lock: str  # file that the one process holds

    @classmethod
    def of(cls, config: CaptionConfig, processes: int) -> Limits:
        """Half of ``caption.memory`` is for one large image, a quarter for what each process has in hand, the
        last quarter for encoded images that wait (see :class:`Gate`). With 0 ``processes`` images are
        prepared by the worker itself, which no deadline may end."""
        half = int(config.memory * GIB) // 2
        lock = os.path.join(tempfile.gettempdir(), f"captioner-{os.getuid()}.large-image")
        seconds = config.prepare_seconds if processes else None
        return cls(seconds, half // 2 // max(cores(), processes), half, lock)

    def prepare(self, source: bytes | Path, spec: ViewSpec, reduced: bool) -> tuple[Cut, str]:
        """``views.prepare`` within the limits; ends this process, by SIGALRM, where it takes too long."""
        self._alarm()
        try:
            return views.prepare(source, spec, reduced, self.room)
        finally:
            self._alarm(0)

    def _alarm(self, seconds: float | None = None) -> None:
        # Nothing in Python is asked: a decoder that loops inside one call of C would not hear it.
        if self.seconds is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, self.seconds if seconds is None else seconds)

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Wait until there is room for so many bytes. Raises BadImage where there never is."""
        if size > self.most:
            raise BadImage(
                f"takes {size / GIB:.1f} GiB to read, half of caption.memory is {self.most / GIB:.1f} GiB"
            )
        if size <= self.share:
            yield
            return
        with open(self.lock, "a") as file:
            self._alarm(0)  # the time that others take is not its own
            fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it with the process
            self._alarm()
            yield


class Gate:
    """Bounds the bytes of what is on its way: whoever brings more waits; what is too large passes alone."""

    def __init__(self, most: int):
        self.most, self.held = most, 0
        self._free = threading.Condition()

    def enter(self, size: int) -> None:
        with self._free:
            self._free.wait_for(lambda: not self.held or self.held + size <= self.most)
            self.held += size

    def leave(self, size: int) -> None:
        with self._free:
            self.held -= size
            self._free.notify_all()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
