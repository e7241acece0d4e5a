"""One worker of a captioning job: an engine and what keeps it fed.

A thread reads shards and hands every image to other processes, which decode it and cut its views; the engine
pulls what is ready. One stream of requests goes through all shards, so the engine never drains between two.
Whatever a worker says is an *event*, a plain tuple; see :class:`captioner.pipeline.coordinator.Coordinator`.
"""

from __future__ import annotations

import itertools
import math
import queue
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from captioner.config import Config, SamplingConfig
from captioner.engines import CaptionRequest, Engine, QuestionBatch, make_engine
from captioner.errors import DataError, UserError, masked, printable
from captioner.method import tool
from captioner.pipeline.prepare import GIB, Gate, Limits
from captioner.records import Candidate, CaptionRow
from captioner.sources.source import Item, ShardRef, read_shard
from captioner.statements import split_statements
from captioner.views import BadImage, Cut

T = TypeVar("T")
FLUSH = "flush"  # to a worker: no further shard for now, caption what you have
KNOWN = 10_000  # captions that a worker remembers for copies of their images
VERIFIED_TOGETHER = 8  # images whose questions are asked in one go
SAID_TOGETHER = 64  # rows
SAID_AFTER = 0.5  # seconds


class Executor(Protocol):
    """Where images are prepared: processes of this machine, or of a cluster."""

    crashed: tuple[type[Exception], ...]  # what a future raises where its process died
    ahead: int  # images that are prepared before the engine asks for them
    processes: int  # 0: the worker itself prepares them

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]: ...
    def alone(self, work: Callable[..., T], *args: Any) -> Future[T]: ...


@dataclass(frozen=True)
class Settings:
    """What every worker of a job is made with; picklable."""

    config: Config
    checkpoint: Path
    model: str  # hash of the checkpoint, for the rows
    settings: str  # hash of the settings, for the rows
    verify: bool = False
    drop_refuted: bool = False
    workers: int = 1  # on one machine

    @property
    def sampling(self) -> SamplingConfig:
        sampling = self.config.caption.sampling
        return sampling.model_copy(update={"seed": self.config.seed + sampling.seed})


@dataclass(frozen=True)
class Task:
    """A shard to caption."""

    shard: ShardRef
    skip: frozenset[int] = frozenset()  # numbers of the images whose rows are there
    singly: int = 0  # caption this many alone and one after the other, then stop: one of them killed a worker


@dataclass(frozen=True)
class _Entry:
    """An image on its way to the engine."""

    shard: int
    number: int
    item: Item
    prepared: Future[tuple[Cut, str]] | None
    size: int = 0  # bytes of it that wait in memory


@dataclass
class _Waiting:
    """An image that the engine works on, and the rows that want its caption."""

    sha: str
    picture: Cut
    places: list[_Entry] = field(default_factory=list)


def work(
    settings: Settings, executor: Executor, receive: Callable[[], Any], emit: Callable[[Any], None]
) -> None:
    """Caption the tasks that come in until None does. Never raises: what goes wrong is an event."""
    # The threads that feed the engine must not hold it up for the 5 ms that Python gives each by default.
    sys.setswitchinterval(0.0005)
    try:
        engine = make_engine(settings.checkpoint, settings.config)
        emit(("ready",))
        try:
            Worker(settings, engine, executor, receive, emit).run()
        finally:
            engine.close()
    except UserError as error:
        emit(("refused", error.what, error.where, error.mend))
    except Exception:  # the boundary of the process: the coordinator records it
        emit(("broken", traceback.format_exc()))


class Worker:
    """Runs tasks on an engine; see :func:`work`."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        executor: Executor,
        receive: Callable[[], Any],
        emit: Callable[[Any], None],
    ):
        self.settings, self.engine, self.executor = settings, engine, executor
        self._receive, self._emit = receive, emit
        self._queue: queue.Queue[_Entry | tuple[Any, ...] | Exception | None] = queue.Queue(
            max(2, executor.ahead)
        )
        self._pending: deque[_Waiting] = deque()  # asked of the engine, in order
        self._open: dict[str, _Waiting] = {}  # the same, by sha256
        self._known: OrderedDict[str, CaptionRow] = OrderedDict()
        self._rows: dict[int, list[tuple[int, CaptionRow]]] = {}
        self._said = time.monotonic()
        self._rules = tool.Rules()
        self._limits = Limits.of(settings.config.caption, executor.processes)
        self._gate = Gate(int(settings.config.caption.memory * GIB) // 4 // settings.workers)

    def run(self) -> None:
        message = self._receive()
        while message is not None:
            if message == FLUSH:
                message = self._receive()
            elif message.singly:
                self._singly(message)
                message = self._receive()
            else:
                message = self._stream(message)

    # ---- reading

    def _stream(self, task: Task) -> Any:
        """Caption this task and those that follow, as one stream; returns the message that ended it."""
        after: list[Any] = []
        threading.Thread(target=self._feed, args=(task, after), daemon=True).start()
        self._caption()
        return after[0]

    def _feed(self, message: Any, after: list[Any]) -> None:
        """Read tasks and start to prepare their images, as far ahead as the queue is long."""
        try:
            while isinstance(message, Task):
                self._read(message)
                message = self._receive()
            after.append(message)
            self._queue.put(None)
        except Exception as error:  # raised again where the engine asks for images
            self._queue.put(error)

    def _read(self, task: Task) -> None:
        index, count = task.shard.index, 0
        try:
            for number, item in enumerate(read_shard(task.shard)):
                count += 1
                if number not in task.skip:
                    self._queue.put(self._entry(index, number, item))
        except DataError as error:
            self._queue.put(("unreadable", index, str(error)))
        else:
            self._queue.put(("end", index, count))
        self._emit(("read", index))

    def _singly(self, task: Task) -> None:
        index = task.shard.index
        try:
            count = self._try(task)
        except DataError as error:
            self._emit(("unreadable", index, str(error)))
            return
        if count is None:
            self._emit(("stopped", index))
        else:
            self._emit(("read", index))
            self._emit(("end", index, count))

    def _try(self, task: Task) -> int | None:
        """Caption up to ``task.singly`` images, each announced; the shard's count if none is left."""
        count = tried = 0
        for number, item in enumerate(read_shard(task.shard)):
            count += 1
            if number in task.skip:
                continue
            if tried == task.singly:
                return None
            tried += 1
            self._emit(("trying", task.shard.index, number, item.key))
            self._queue.put(self._entry(task.shard.index, number, item))
            self._queue.put(None)
            self._caption()
        return count

    def _entry(self, index: int, number: int, item: Item) -> _Entry:
        if item.image is None:
            return _Entry(index, number, item, None)
        size = len(item.image) if isinstance(item.image, bytes) else 0
        self._gate.enter(size)
        return _Entry(index, number, item, self.executor.submit(*self._work(item.image)), size)

    def _work(self, image: bytes | Path) -> tuple[Any, ...]:
        reduced = self.settings.config.caption.reduced_decode
        return self._limits.prepare, image, self.engine.renderer.spec, reduced

    # ---- captioning

    def _caption(self) -> None:
        """Caption what comes through the queue until None does."""
        for each, row in self._answered(self._requests(), self._pending):
            del self._open[each.sha]
            self._known[each.sha] = row
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
            for place in each.places:
                self._row(place, row)
        self._flush()

    def _answered(
        self, requests: Iterator[CaptionRequest], pending: deque[_Waiting]
    ) -> Iterator[tuple[_Waiting, CaptionRow]]:
        """What was asked for and its row (without a key), in the order of the requests."""
        found = self.engine.sample(requests, self.settings.config.caption.best_of, self.settings.sampling)
        together = VERIFIED_TOGETHER if self.settings.verify else 1
        while group := list(itertools.islice(found, together)):
            waiting = [pending.popleft() for _ in group]
            yield from zip(waiting, self._outcomes(waiting, group), strict=True)

    def caption(self, images: Sequence[tuple[Cut, str]]) -> list[CaptionRow]:
        """Rows, without keys, of prepared images and their sha256."""
        pending = deque(_Waiting(sha, picture) for picture, sha in images)
        requests = (CaptionRequest(sha, picture, sha) for picture, sha in images)
        return [row for _, row in self._answered(requests, pending)]

    def _requests(self) -> Iterator[CaptionRequest]:
        while (entry := self._queue.get()) is not None:
            if isinstance(entry, Exception):
                raise entry
            if isinstance(entry, tuple):
                self._emit(entry)
                continue
            try:
                picture, sha = self._prepared(entry)
            except BadImage as error:
                self._row(entry, self._failed(error.reason))
                continue
            finally:
                self._gate.leave(entry.size)
            if sha in self._known:
                self._known.move_to_end(sha)
                self._row(entry, self._known[sha])
            elif sha in self._open:
                self._open[sha].places.append(entry)
            else:
                self._open[sha] = _Waiting(sha, picture, [entry])
                self._pending.append(self._open[sha])
                yield CaptionRequest(entry.item.key, picture, sha)

    def _prepared(self, entry: _Entry) -> tuple[Cut, str]:
        """The views of an image and its sha256; BadImage where it has none or keeps killing what reads it."""
        if entry.prepared is None or entry.item.image is None:
            raise BadImage(entry.item.error or "no image")
        try:
            return entry.prepared.result()
        except self.executor.crashed:  # by this image, or by another that the process had in hand
            tries = self.settings.config.caption.attempts
            for _ in range(tries):
                try:
                    return self.executor.alone(*self._work(entry.item.image)).result()
                except self.executor.crashed as error:
                    if str(error) == signal.SIGALRM.name:
                        seconds = self.settings.config.caption.prepare_seconds
                        raise BadImage(f"took longer than {seconds:g} s to read") from None
            raise BadImage(f"the process that reads it died {tries} times") from None

    # ---- outcomes

    def _outcomes(
        self, waiting: Sequence[_Waiting], group: Sequence[list[Candidate]]
    ) -> Iterable[CaptionRow]:
        if not self.settings.verify:
            pairs = zip(waiting, group, strict=True)
            return [self._outcome(each.sha, candidates[0]) for each, candidates in pairs]
        stated = [[split_statements(c.text) for c in candidates] for candidates in group]
        asked = [list(dict.fromkeys(itertools.chain(*lists))) for lists in stated]
        batches = [
            QuestionBatch(each.picture, [self._rules.decompose(text).text for text in texts])
            for each, texts in zip(waiting, asked, strict=True)
            if texts
        ]
        answers = iter(self.engine.p_yes(batches)) if batches else iter(())
        rows = []
        for each, candidates, lists, texts in zip(waiting, group, stated, asked, strict=True):
            p_yes = {t: a.p_yes for t, a in zip(texts, next(answers), strict=True)} if texts else {}
            # the most statements that are likely true, less those that are likely not; equal ones: the first
            scores = [sum(p_yes[text] - 0.5 for text in statements) for statements in lists]
            said = [candidate.text.strip() != "" for candidate in candidates]
            judged = [yes and not math.isnan(score) for yes, score in zip(said, scores, strict=True)]
            best = max(range(len(scores)), key=lambda k: (judged[k], said[k], scores[k]))
            rows.append(self._judged(each.sha, candidates[best], lists[best], p_yes))
        return rows

    def _judged(
        self, sha: str, candidate: Candidate, statements: list[str], p_yes: dict[str, float]
    ) -> CaptionRow:
        """The row of a verified caption; ``statements`` has those that were dropped, too."""
        row = self._outcome(sha, candidate)
        if row.error is not None:
            return row
        if any(math.isnan(p_yes[text]) for text in statements):
            return self._failed("the verifier gave no answer", sha)
        row = row.model_copy(update={"statements": statements, "p_yes": [p_yes[text] for text in statements]})
        if not self.settings.drop_refuted:
            return row
        kept = [text for text in statements if p_yes[text] >= self.settings.config.caption.drop]
        if not kept:
            update = {"caption": None, "finish_reason": None, "error": "every statement was refuted"}
            return row.model_copy(update=update)
        return row if len(kept) == len(statements) else row.model_copy(update={"caption": ", ".join(kept)})

    def _outcome(self, sha: str, candidate: Candidate) -> CaptionRow:
        if candidate.finish_reason.startswith("error: "):
            return self._failed(candidate.finish_reason.removeprefix("error: "), sha)
        if not candidate.text.strip():
            return self._failed("the model wrote no caption", sha)
        return CaptionRow(
            id=sha,
            key="",
            caption=candidate.text,
            finish_reason=candidate.finish_reason,
            tokens=candidate.tokens,
            model=self.settings.model,
            config=self.settings.settings,
        )

    def _failed(self, reason: str, sha: str = "") -> CaptionRow:
        return failed_row(self.settings, "", reason, sha)

    # ---- saying

    def _row(self, place: _Entry, row: CaptionRow) -> None:
        row = row.model_copy(update={"key": place.item.key})
        self._rows.setdefault(place.shard, []).append((place.number, row))
        late = time.monotonic() - self._said > SAID_AFTER
        if late or sum(map(len, self._rows.values())) >= SAID_TOGETHER:
            self._flush()

    def _flush(self) -> None:
        for index, rows in self._rows.items():
            self._emit(("rows", index, rows))
        self._rows, self._said = {}, time.monotonic()


def ahead(config: Config) -> int:
    """Images that are prepared ahead: the engine's next batch while it works on one, and some in work."""
    return config.engine.batch_size + 16


def failed_row(settings: Settings, key: str, reason: str, sha: str = "") -> CaptionRow:
    """The row of an image without a caption."""
    return CaptionRow(
        id=sha,
        key=key,
        caption=None,
        finish_reason=None,
        tokens=None,
        model=settings.model,
        config=settings.settings,
        error=printable(masked(reason)),
    )
