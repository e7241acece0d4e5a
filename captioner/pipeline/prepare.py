"""Images on their way to an engine: read, decoded and cut by other processes, ahead, within limits.

What one image may cost is bounded: seconds of a process, memory of the machine. For a disk that is gone the
job waits.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenacity import RetryCallState, RetryError, Retrying, retry_if_result, stop_after_delay, wait_exponential

from captioner import views
from captioner.config import CaptionConfig
from captioner.errors import RunError
from captioner.sources.places import gone
from captioner.views import BadImage, Cut, ViewSpec

T = TypeVar("T")
GIB = 1 << 30
LONGEST_WAIT = 60.0  # seconds between two looks at a disk that is gone


class Executor(Protocol):
    """Where images are prepared: processes of this machine, or of a cluster."""

    crashed: tuple[type[Exception], ...]  # what a future raises where its process died
    ahead: int  # images that are prepared before the engine asks for them
    processes: int  # 0: the worker itself prepares them

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]: ...
    def alone(self, work: Callable[..., T], *args: Any) -> Future[T]: ...
    def close(self) -> None: ...


class Preparation:
    """Has images prepared by an executor; ``say`` hears what is waited for, every time."""

    def __init__(
        self,
        config: CaptionConfig,
        executor: Executor,
        spec: ViewSpec,
        say: Callable[[str], None] = lambda text: None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.config, self.executor, self.spec = config, executor, spec
        self._say, self._sleep = say, sleep
        self._limits = Limits.of(config, executor.processes)

    def begin(self, image: bytes | Path) -> Future[tuple[Cut, str]]:
        return self.executor.submit(*self._work(image))

    def _work(self, image: bytes | Path) -> tuple[Any, ...]:
        return self._limits.prepare, image, self.spec, self.config.reduced_decode

    def finish(self, image: bytes | Path, begun: Future[tuple[Cut, str]]) -> tuple[Cut, str]:
        """The views of an image and its sha256; BadImage where it has none or keeps killing what reads it."""
        try:
            return self._result(image, begun)
        except BadImage as error:
            if isinstance(image, bytes) or not error.world:
                raise
            if gone(image):
                self.wait_for(image)
            elif not image.exists():
                raise  # one file, not its disk
        return self._result(image, self.begin(image))  # the disk is back, or has never been away

    def _result(self, image: bytes | Path, begun: Future[tuple[Cut, str]]) -> tuple[Cut, str]:
        try:
            return begun.result()
        except self.executor.crashed:  # by this image, or by another that the process had in hand
            pass
        for _ in range(self.config.attempts):
            try:
                return self.executor.alone(*self._work(image)).result()
            except self.executor.crashed as error:
                if str(error) == signal.SIGALRM.name:
                    raise BadImage(f"took longer than {self.config.prepare_seconds:g} s to read") from None
        raise BadImage(f"the process that reads it died {self.config.attempts} times")

    def wait_for(self, path: Path) -> None:
        """Return once there is a disk under a file; RunError after ``caption.outage`` seconds without one."""

        def tell(state: RetryCallState) -> None:
            wait = state.next_action.sleep if state.next_action else 0.0
            self._say(f"{path.parent} is gone, or empty, or gives no answer: looking again in {wait:.0f} s")

        looks = Retrying(
            retry=retry_if_result(bool),
            wait=wait_exponential(max=LONGEST_WAIT),
            stop=stop_after_delay(self.config.outage),
            before_sleep=tell,
            sleep=self._sleep,
        )
        try:
            looks(gone, path)
        except RetryError as error:
            what = f"the input has been gone for {self.config.outage:.0f} s"
            fix = "mount it again; the same command goes on where the job stopped"
            raise RunError(what, where=str(path.parent), fix=fix) from error

    def ahead(
        self, items: Iterable[T], image: Callable[[T], bytes | Path]
    ) -> Iterator[tuple[T, tuple[Cut, str] | BadImage]]:
        """Every item with its views and its sha256, or why it has none, in order; prepared ahead.

        ``image`` raises BadImage where an item has none.
        """
        begun: deque[tuple[T, Future[tuple[Cut, str]] | BadImage]] = deque()

        def begin(item: T) -> Future[tuple[Cut, str]] | BadImage:
            try:
                return self.begin(image(item))
            except BadImage as error:
                return error

        def first() -> tuple[T, tuple[Cut, str] | BadImage]:
            item, future = begun.popleft()
            if isinstance(future, BadImage):
                return item, future
            try:
                return item, self.finish(image(item), future)
            except BadImage as error:
                return item, error

        for item in items:
            begun.append((item, begin(item)))
            if len(begun) > self.executor.ahead:
                yield first()
        while begun:
            yield first()


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
        if not isinstance(source, bytes | Path):
            source = views.read_bytes(source)  # from a store, whose client has time limits of its own
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
