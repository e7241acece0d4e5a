"""Processes: those that train together, those that end with their parent, and signals that end one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from captioner.errors import Ended


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among those."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes: rank 0, or the only one."""
    return rank() == 0


def end_with(parent: int, end: Callable[[], None]) -> None:
    """``end`` this process when its parent has gone, however it went.

    A pipe would not tell: the parent's other children hold it open, too.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


# Knows all that its parent has started, down to the last child, and kills it once the parent is gone.
_GUARD = """
import os, sys, time, psutil
parent, left = psutil.Process(int(sys.argv[1])), []
while os.getppid() == parent.pid:
    try:
        left = [each for each in parent.children(recursive=True) if each.pid != os.getpid()]
    except psutil.Error:
        break
    time.sleep(0.5)
for each in left:
    try:
        each.kill()
    except psutil.Error:
        pass
"""


def guard() -> subprocess.Popen[bytes]:
    """A process that kills what this one has started when this one is gone, however it went.

    For processes that are not written here and would keep a GPU's memory. Kill it when they have ended.
    """
    words = [sys.executable, "-c", _GUARD, str(os.getpid())]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)


@contextmanager
def ending() -> Generator[None, None, None]:
    """SIGTERM and SIGHUP raise Ended meanwhile, so that what is open is closed; the second one ends at once.

    A signal that is ignored (nohup) stays so. Nothing happens outside the main thread.
    """

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
