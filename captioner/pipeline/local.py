"""Workers and the preparation of images as processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from captioner.pipeline.worker import Executor, Settings, ahead, work
from captioner.processes import end_with

T = TypeVar("T")
DEVICES = "CUDA_VISIBLE_DEVICES"


def devices() -> list[str]:
    """The CUDA devices of this machine, as ``CUDA_VISIBLE_DEVICES`` names them; found without torch."""
    named = os.environ.get(DEVICES)
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i in range(sum(p.name[6:].isdigit() for p in Path("/dev").glob("nvidia[0-9]*")))]


class Died(Exception):
    """A process ended at the one image that it had in hand; the message names the signal."""


class Inline:
    """Prepares images where it is asked to: in the reading thread of the worker."""

    crashed: tuple[type[Exception], ...] = ()
    processes = 0

    def __init__(self, ahead: int):
        self.ahead = ahead

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # as any executor does
            future.set_exception(error)
        return future

    alone = submit

    def close(self) -> None:
        """There is nothing to end."""


class Processes:
    """Prepares images in processes. One that dies breaks the pool: a new one takes its place."""

    crashed: tuple[type[Exception], ...] = (BrokenProcessPool, Died)

    def __init__(self, processes: int, ahead: int):
        self.processes, self.ahead = processes, ahead
        self._lock = threading.Lock()
        self._pool = self._new(processes)
        self._pool.submit(int).result()  # forks all of them now, while this process is small

    def _new(self, processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            processes, mp_context=_forking(), initializer=_leave_with, initargs=(os.getpid(),)
        )

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        with self._lock:
            try:
                return self._pool.submit(function, *args)
            except BrokenProcessPool:
                self._pool = self._new(self.processes)
                return self._pool.submit(function, *args)

    def alone(self, function: Callable[..., T], *args: Any) -> Future[T]:
        ours, theirs = _forking().Pipe(duplex=False)
        process = _forking().Process(target=_call, args=(os.getpid(), theirs, function, args))  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        future: Future[T] = Future()
        try:
            result, error = ours.recv()
        except EOFError:
            process.join()
            result, error = None, Died(_reason(process.exitcode))
        process.join()
        ours.close()
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class LocalPool:
    """Worker processes of this machine, one per device; see :class:`captioner.pipeline.coordinator.Pool`."""

    def __init__(self, settings: Settings, processes: int):
        self._arguments = settings, processes
        self._devices = devices() if settings.config.model.device in ("auto", "cuda") else []
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}

    def start(self, worker: int) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        device = self._devices[worker % len(self._devices)] if self._devices else None
        process = context.Process(  # type: ignore[attr-defined]
            target=_main, args=(theirs, os.getpid(), device, *self._arguments), name=f"worker-{worker}"
        )
        process.start()
        theirs.close()
        self._running[worker] = process, ours

    def send(self, worker: int, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead, as poll will say
            self._running[worker][1].send(message)

    def poll(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]:
        found: list[tuple[int, tuple[Any, ...]]] = []
        ready = wait([connection for _, connection in self._running.values()], seconds)
        for worker, (process, connection) in list(self._running.items()):
            alive = process.is_alive()  # before the pipe is emptied: what it said last comes first
            try:
                # a dead one may have spoken after the wait; poll is true at the end, too: then recv tells
                while (connection in ready or not alive) and connection.poll():
                    found.append((worker, connection.recv()))
            except (EOFError, OSError):
                alive = False
            if not alive:
                self.kill(worker)
                process.join()
                del self._running[worker]
                connection.close()
                found.append((worker, ("died", _reason(process.exitcode))))
        return found

    def kill(self, worker: int) -> None:
        """End a worker and what it started: an engine's own processes would keep the memory of the device."""
        process = self._running[worker][0]
        process.kill()
        assert process.pid  # 0 would be our own group
        with contextlib.suppress(ProcessLookupError):  # all gone, or no group yet
            os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        for worker in self._running:
            self.kill(worker)
        for process, connection in self._running.values():
            process.join()
            connection.close()
        self._running = {}


def executor(processes: int, ahead: int) -> Executor:
    """Where a worker of this machine has its images prepared; 0 processes = in the worker itself."""
    return Processes(processes, ahead) if processes else Inline(ahead)


def _main(
    connection: Connection, parent: int, device: str | None, settings: Settings, processes: int
) -> None:
    os.setpgid(0, 0)  # it ends with all that it starts; and a terminal's ^C is the coordinator's business
    _end_with(parent)
    if device is not None:
        os.environ[DEVICES] = device
    lock = threading.Lock()

    def emit(event: Any) -> None:
        with lock:
            connection.send(event)

    work(settings, executor(processes, ahead(settings.config)), connection.recv, emit)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for threads


def _call(parent: int, connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _leave_with(parent)
    try:
        connection.send((function(*args), None))
    except Exception as error:  # as any executor does
        connection.send((None, error))


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone; its group may be that of whoever started the command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent, lambda: os._exit(1))


def _end_with(parent: int) -> None:
    """End the process group when this process's parent is gone."""
    end_with(parent, lambda: os.killpg(0, signal.SIGKILL))


def _forking() -> BaseContext:
    """For processes that never use what a fork breaks (CUDA, OpenMP): they start at once, and a script that
    has no ``if __name__ == "__main__"`` is not run again by each."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _context() -> BaseContext:
    """fork starts at once, but a child cannot use CUDA or OpenMP threads that its parent has begun to use."""
    torch = sys.modules.get("torch")
    busy = torch is not None and (torch.get_num_threads() > 1 or torch.cuda.is_initialized())
    forks = sys.platform == "linux" and not busy
    return multiprocessing.get_context("fork" if forks else "spawn")


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
