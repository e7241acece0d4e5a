"""Hands shards to the workers of a machine or a cluster, and brings them back when they die.

A task names a place, and workers publish what they make of it, so no rows wait here and no message is large.
What is known of a shard underway lies in its log: a worker that dies loses nothing but what it had in hand,
the rest of its shards is tried one image at a time, and an image at which workers died ``attempts`` times
becomes a row with that error. Where workers run is the business of the :class:`Pool`.

Events of a worker: ``("ready",)``, ``("had", shard, count)`` (rows of before), ``("rows", shard, rows)`` (a
few numbered ones, for whoever watches), ``("read", shard)`` (send another), ``("published", shard, tally)``,
``("trying", shard, number, key)``, ``("stopped", shard)`` (after so many tries), ``("waiting", why)``,
``("unreadable", shard, reason)``, ``("refused", what, where, fix)``, ``("broken", traceback)``; and of its
pool ``("died", reason)``.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from captioner.errors import RunError, UserError
from captioner.pipeline.leases import Leases
from captioner.pipeline.output import Log, Output, Tally
from captioner.pipeline.watch import Watch
from captioner.pipeline.worker import FLUSH, Settings, Task, ahead, failed_row
from captioner.sources.source import ShardRef

STARTS = 3  # times that a worker may die before it is ready
DEATHS = 20  # workers that may die one after the other without a caption in between
UNREAD = 2  # shards that a worker is handed ahead
POLL = 0.2  # seconds
LOOK = 1.0  # seconds between two looks at what other machines work on


class Pool(Protocol):
    """Where workers run."""

    def start(self, worker: int) -> None: ...
    def send(self, worker: int, message: Any) -> None: ...
    def poll(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]: ...
    def kill(self, worker: int) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Shard:
    """A shard underway."""

    ref: ShardRef
    begun: bool = False  # by this command
    trying: tuple[int, str] | None = None  # number and key of the image that is tried alone
    strikes: Counter[int] = field(default_factory=Counter)  # number -> workers that died at it; -1: reading


@dataclass
class _Worker:
    ready: bool = False
    shards: dict[int, _Shard] = field(default_factory=dict)
    unread: int = 0
    streaming: bool = False  # it waits for further shards
    alone: bool = False  # it tries the images of a shard one by one
    starts: int = 0
    heard: float = 0.0
    why: str = ""  # the last exception of it


class Coordinator:
    """Runs a job on a pool; ``lost`` lists the shards that could not be read, with the reason."""

    def __init__(
        self,
        pool: Pool,
        workers: int,
        shards: Iterator[ShardRef],
        settings: Settings,
        output: Output,
        watch: Watch,
        leases: Leases | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``leases``: other machines work on the same shards."""
        self.leases, self.clock = leases, clock
        self.elsewhere: deque[ShardRef] = deque()  # that another machine has claimed
        self._looked = -LOOK
        self.pool, self.settings, self.output, self.watch = pool, settings, output, watch
        self.limits = settings.config.caption
        self.workers = {number: _Worker() for number in range(workers)}
        self.fresh = shards
        self.again: deque[_Shard] = deque()  # to be tried image by image
        self.back: deque[_Shard] = deque()  # to go on as usual
        self.lost: list[tuple[str, str]] = []
        self._deaths = 0  # since the last caption
        self._singly = 4 * ahead(settings.config)  # more than any engine has in hand
        self._next: _Shard | None = None
        self._advance()

    def run(self) -> None:
        """Until every shard is published or lost. Raises what a worker refuses, RunError if none starts."""
        try:
            for number in self.workers:
                self._start(number)
            while self._left():
                self._hand_out()
                for number, event in self.pool.poll(POLL):
                    self._handle(number, event)
                self._kill_stalled()
                self.watch.tick()
                if self.leases:
                    self.leases.beat()
        finally:
            self.pool.close()
            if self.leases:
                self.leases.close()

    def _left(self) -> bool:
        if self._next is None and self.elsewhere and self.clock() - self._looked > LOOK:
            self._looked = self.clock()
            self._look_elsewhere()
        busy = any(worker.shards for worker in self.workers.values())
        return bool(self._next or self.again or busy or self.elsewhere)

    # ---- giving

    def _advance(self) -> None:
        if self.back:
            self._next = self.back.popleft()
            return
        self._next = None
        for ref in self.fresh:
            if ref.index in self.output.done:
                continue
            if self.leases is None or self.leases.claim(ref.index):
                self._next = self._begin(ref)
                return
            self.elsewhere.append(ref)

    def _begin(self, ref: ShardRef) -> _Shard:
        """A shard with what its log says of workers that died at it."""
        notes = Log(self.output.out, ref.index).read()[1]
        return _Shard(ref, strikes=Counter(int(note["strike"]) for note in notes if "strike" in note))

    def _look_elsewhere(self) -> None:
        """Of the shards that others claimed: pass over what is published, take over what the dead left."""
        assert self.leases
        for _ in range(len(self.elsewhere)):
            ref = self.elsewhere.popleft()
            if self.output.shards.has(ref.index):
                continue
            if self.leases.claim(ref.index):
                self._next = self._begin(ref)
                return
            self.elsewhere.append(ref)

    def _start(self, number: int) -> None:
        self.workers[number] = _Worker(starts=self.workers[number].starts, heard=self.clock())
        self.pool.start(number)

    def _hand_out(self) -> None:
        for number, worker in self.workers.items():
            if not worker.ready or worker.alone:
                continue
            if self.again and not worker.shards:
                if worker.streaming:
                    self.pool.send(number, FLUSH)
                worker.alone, worker.streaming = True, False
                self._give(number, self.again.popleft(), self._singly)
                continue
            while self._next and worker.unread < UNREAD:
                shard = self._next
                self._next = None
                self._advance()
                worker.streaming = True
                self._give(number, shard)
            if not self._next and worker.streaming:
                worker.streaming = False
                self.pool.send(number, FLUSH)

    def _give(self, number: int, shard: _Shard, singly: int = 0) -> None:
        worker = self.workers[number]
        if not worker.shards:
            worker.heard = self.clock()
        worker.shards[shard.ref.index] = shard
        worker.unread += 1
        self.pool.send(number, Task(shard.ref, singly))

    # ---- taking

    def _handle(self, number: int, event: tuple[Any, ...]) -> None:
        worker, kind = self.workers[number], event[0]
        worker.heard = self.clock()
        if kind == "ready":
            worker.ready, worker.starts = True, 0
            self.watch.worker(number, "ready")
        elif kind == "refused":
            raise UserError(event[1], where=event[2], fix=event[3])
        elif kind == "broken":
            worker.why = event[1].strip().splitlines()[-1]
            self.watch.say(f"worker {number} failed:\n{event[1]}")
        elif kind == "died":
            self._died(number, worker.why or event[1])
        elif kind == "read":
            worker.unread -= 1
        elif kind == "waiting":
            self.watch.say(event[1])
        elif (shard := worker.shards.get(event[1])) is not None:  # None: it was left out meanwhile
            self._take(number, shard, event)

    def _take(self, number: int, shard: _Shard, event: tuple[Any, ...]) -> None:
        """What a worker says of a shard."""
        worker, kind = self.workers[number], event[0]
        if kind == "had":
            self.watch.had(0 if shard.begun else event[2])
            shard.begun = True
        elif kind == "rows":
            if shard.trying and shard.trying[0] in {n for n, _ in event[2]}:
                shard.trying = None
            rows = [row for _, row in event[2]]
            if any(row.error is None for row in rows):
                self._deaths = 0
            self.watch.rows(number, rows)
        elif kind == "trying":
            shard.trying = event[2], event[3]
        elif kind == "published":
            self._leave(worker, shard)
            self.output.enter(shard.ref.index, event[2], shard.ref.mark)
            self._release(shard)
        elif kind == "stopped":  # nothing died: the rest may come as usual
            self._leave(worker, shard)
            self._go_on(shard)
        elif kind == "unreadable":
            self._leave(worker, shard)
            self._lose(shard, event[2])

    def _release(self, shard: _Shard) -> None:
        if self.leases:
            self.leases.release(shard.ref.index)

    def _go_on(self, shard: _Shard) -> None:
        self.back.append(shard)
        if self._next is None:
            self._advance()

    def _leave(self, worker: _Worker, shard: _Shard) -> None:
        if worker.shards.pop(shard.ref.index, None) is not None and worker.alone:
            worker.alone, worker.unread = False, 0

    def _lose(self, shard: _Shard, reason: str) -> None:
        self.lost.append((shard.ref.name, reason))
        self._release(shard)
        self.watch.say(f"shard {shard.ref.name} is left out: {reason}")

    # ---- deaths

    def _died(self, number: int, reason: str) -> None:
        worker = self.workers[number]
        self.watch.worker(number, "died")
        self.watch.say(f"worker {number} died ({reason}); it is started anew")
        self._deaths += 1
        if self._deaths >= DEATHS:
            fix = "see their messages above; the same command goes on where the job stopped"
            raise RunError(f"{DEATHS} workers died, and no caption came: {reason}", fix=fix)
        if not worker.ready:
            worker.starts += 1
            if worker.starts >= STARTS:
                raise RunError(
                    f"a worker died {STARTS} times before it was ready: {reason}",
                    fix="see its messages above; try one image with --estimate 1",
                )
        for shard in worker.shards.values():
            if self._untold(shard):
                continue
            if worker.alone:
                self._strike(shard, reason)
            else:
                self.again.append(shard)
        self._start(number)

    def _untold(self, shard: _Shard) -> bool:
        """Whether a worker published this shard and died before it said so: its log is gone then. A shard
        that is tried again has its part as well, but a log beside it."""
        index = shard.ref.index
        if not self.output.shards.has(index) or Log(self.output.out, index).path.is_file():
            return False
        self.output.enter(index, Tally.of(self.output.shards.read(index)), shard.ref.mark)
        self._release(shard)
        return True

    def _strike(self, shard: _Shard, reason: str) -> None:
        """A worker died that tried images of this shard alone: at the one it tried, or reading the next."""
        number, key = shard.trying or (-1, "")
        shard.strikes[number] += 1
        shard.trying = None
        log = Log(self.output.out, shard.ref.index)
        log.add((), strike=number)  # a job that is begun again knows of it
        if shard.strikes[number] < self.limits.attempts:
            self.again.append(shard)
        elif number < 0:
            self._lose(shard, f"{self.limits.attempts} workers died while they read it: {reason}")
        else:
            error = f"{self.limits.attempts} workers died at this image: {reason}"
            row = failed_row(self.settings, key, error)
            log.add([(number, row)])
            self.watch.rows(None, [row])
            self._go_on(shard)

    def _kill_stalled(self) -> None:
        for number, worker in self.workers.items():
            if worker.ready and worker.shards and self.clock() - worker.heard > self.limits.stall:
                worker.why = f"nothing heard from it for {self.limits.stall:.0f} s"
                worker.heard = self.clock()
                self.pool.kill(number)
