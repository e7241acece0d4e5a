"""Ray: workers as actors, preparation of images as tasks of a cluster. The only place that imports ray.

Not Ray Data: its datasets are rows, and giving every input shard its own output would need a ``groupby``, a
barrier that publishes nothing before everything is captioned; nor could it say which image killed an actor.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray

T = TypeVar("T")
WAIT = 1.0  # seconds that an actor waits for something to say


def connect(address: str | None) -> None:
    """Join a cluster, or begin one on this machine."""
    if not ray.is_initialized():
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS"), log_to_driver=True, logging_level="warning"
        )


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def _apply(function: Callable[..., T], *args: Any) -> T:
    """What a task does; Ray itself takes plain functions only, no methods."""
    return function(*args)


class RayTasks:
    """Prepares images in tasks on any node; a task that kills its process takes no other with it."""

    crashed: tuple[type[Exception], ...] = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,  # of a node that died before the engine took it
    )

    processes = 1  # each task is one

    def __init__(self, ahead: int):
        self.ahead = ahead
        # once more, because its node may have died
        self._remote = ray.remote(num_cpus=1, max_retries=1)(_apply)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        return self._remote.remote(function, *args).future()  # type: ignore[no-any-return]

    alone = submit

    def close(self) -> None:
        """Tasks end by themselves."""


@ray.remote
class _Actor:
    """Runs ``work`` in a thread; ``poll`` brings what it says."""

    def __init__(self, work: Callable[..., None], settings: Any, executor: Callable[[], Any]):
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.early: dict[int, Any] = {}  # messages that came before those sent before them
        self.taken = 0
        self.lock = threading.Lock()
        self.outbox: queue.Queue[Any] = queue.Queue(1000)
        arguments = (settings, executor(), self.inbox.get, self.outbox.put)
        self.thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.thread.start()

    def send(self, number: int, message: Any) -> None:
        """Message ``number``, from 0: Ray runs the calls of an actor with several threads in any order."""
        with self.lock:
            self.early[number] = message
            while self.taken in self.early:
                self.inbox.put(self.early.pop(self.taken))
                self.taken += 1

    def poll(self) -> list[Any] | None:
        """What was said since, None after the last word."""
        said: list[Any] = []
        try:
            said.append(self.outbox.get(timeout=WAIT))
            while True:
                said.append(self.outbox.get_nowait())
        except queue.Empty:
            return said or ([] if self.thread.is_alive() or not self.outbox.empty() else None)


class RayPool:
    """Actors, one per worker; see :class:`captioner.pipeline.coordinator.Pool`.

    An actor that finds no room waits until the cluster has some (and so makes an autoscaler act); the others
    work meanwhile. One that died, or whose node did, is started anew wherever there is room.
    """

    def __init__(
        self,
        work: Callable[..., None],
        settings: Any,
        executor: Callable[[], Any],
        *,
        gpus_each: float,
    ):
        # With a GPU or without, an actor keeps no core to itself: those that it kept could prepare no images,
        # and where actors had them all, each would wait for its images for ever.
        room = {"num_gpus": gpus_each, "num_cpus": 0} if gpus_each else {"scheduling_strategy": "SPREAD"}
        self._make = _Actor.options(  # type: ignore[attr-defined]
            max_restarts=0, max_concurrency=2, **room
        )
        self._arguments = work, settings, executor
        self._actors: dict[int, Any] = {}
        self._sent: dict[int, int] = {}  # worker -> messages, since it was started
        self._polls: dict[Any, int] = {}  # the answer that is waited for -> worker

    def start(self, worker: int) -> None:
        self._actors[worker], self._sent[worker] = self._make.remote(*self._arguments), 0
        self._ask(worker)

    def _ask(self, worker: int) -> None:
        self._polls[self._actors[worker].poll.remote()] = worker

    def send(self, worker: int, message: Any) -> None:
        self._actors[worker].send.remote(self._sent[worker], message)
        self._sent[worker] += 1

    def poll(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]:
        ready, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=seconds)
        found: list[tuple[int, tuple[Any, ...]]] = []
        for answer in ready:
            worker = self._polls.pop(answer)
            try:
                said = ray.get(answer)
            except ray.exceptions.RayError as error:
                said, reason = None, str(error).strip().splitlines()[0]
            else:
                reason = "it ended"
            if said is None:
                self.kill(worker)
                found.append((worker, ("died", reason)))
            else:
                found += [(worker, event) for event in said]
                self._ask(worker)
        return found

    def kill(self, worker: int) -> None:
        ray.kill(self._actors[worker])

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._polls = {}, {}
