"""One worker of a captioning job: an engine and what keeps it fed.

A thread reads shards and hands every image to other processes, which decode it and cut its views; the engine
pulls what is ready. One stream of requests goes through all shards, so the engine never drains between two.
Whatever a worker says is an *event*, a plain tuple; see :class:`captioner.pipeline.coordinator.Coordinator`.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import sqlite3
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner.config import Config, SamplingConfig
from captioner.engines import NO_ANSWER, CaptionRequest, Engine, QuestionBatch, make_engine
from captioner.errors import DataError, RunError, UserError, masked, printable
from captioner.method.verifier import without_refuted
from captioner.pipeline.check import Checker, Mark
from captioner.pipeline.output import Log, Old, Tally
from captioner.pipeline.page import Thumbnails
from captioner.pipeline.prepare import GIB, Executor, Gate, Preparation
from captioner.records import Candidate, CaptionRow
from captioner.runs import Shards
from captioner.sources.places import gone, is_remote, place
from captioner.sources.source import Item, ShardRef, read_shard
from captioner.statements import split_statements
from captioner.views import BadImage, Cut

FLUSH = "flush"  # to a worker: no further shard for now, caption what you have
KNOWN = 10_000  # captions that a worker remembers for copies of their images
VERIFIED_TOGETHER = 8  # images whose questions are asked in one go
SAID_TOGETHER = 64  # rows
SAID_AFTER = 0.5  # seconds
UNANSWERED = 32  # images in a row without an answer, at which a worker stops


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
    out: Path = Path()  # where the parts are published
    verifier: Path | None = None  # run whose verifier is asked; None = the captioner itself

    @property
    def sampling(self) -> SamplingConfig:
        sampling = self.config.caption.sampling
        return sampling.model_copy(update={"seed": self.config.seed + sampling.seed})


@dataclass(frozen=True)
class Task:
    """A shard to caption."""

    shard: ShardRef
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
class _Shard:
    """A shard that this worker has in hand."""

    log: Log
    have: set[int]  # numbers of the images whose rows are in the log, or on their way there
    count: int | None = None  # its images, once it was read to its end


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
            worker = Worker(settings, engine, executor, receive, emit)
            try:
                worker.run()
            finally:
                worker.close()
        finally:
            engine.close()
    except UserError as error:
        emit(("refused", error.what, error.where, error.fix))
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
        self._asked: dict[str, _Waiting] = {}  # the same, by sha256
        self._known: OrderedDict[str, CaptionRow] = OrderedDict()
        self._rows: dict[int, list[tuple[int, CaptionRow]]] = {}
        self._said = time.monotonic()
        self._checker = Checker(engine, settings.config, settings.verifier if settings.verify else None)
        self._shards: dict[int, _Shard] = {}
        self._output = Shards(settings.out, CaptionRow)
        self._thumbnails = Thumbnails(settings.out)
        self._unanswered = 0  # images one after the other
        old = Old(settings.out).index
        self._old = (
            sqlite3.connect(f"{old.absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False)
            if old.is_file()
            else None
        )
        self._images = Preparation(
            settings.config.caption, executor, engine.renderer.spec, lambda text: emit(("waiting", text))
        )
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

    def _open(self, task: Task) -> _Shard:
        """A shard with the rows that it has; what failed by a fault of the world is tried again."""
        shard = task.shard
        log = Log(self.settings.out, shard.index)
        have = {number for number, row in log.read()[0].items() if row.fault != "world"}
        self._wait_for(shard)
        self._shards[shard.index] = opened = _Shard(log, have)
        self._emit(("had", shard.index, len(have)))
        return opened

    def _wait_for(self, shard: ShardRef) -> bool:
        """Wait until what a shard lies on is there; whether it was gone."""
        lies = os.path.isabs(shard.location) or is_remote(shard.location)
        if not lies or os.path.exists(shard.location) or not gone(place(shard.location)):
            return False
        self._images.wait_for(place(shard.location))
        return True

    def _items(self, shard: ShardRef) -> Iterator[tuple[int, Item]]:
        """The numbered images of a shard; where its store breaks off, it is read on when that is back."""
        seen = 0
        while True:
            try:
                for number, item in enumerate(read_shard(shard)):
                    if number >= seen:
                        seen = number + 1
                        yield number, item
                return
            except DataError:
                if not self._wait_for(shard):
                    raise

    def _read(self, task: Task) -> None:
        index, count = task.shard.index, 0
        have = frozenset(self._open(task).have)
        try:
            for number, item in self._items(task.shard):
                count += 1
                if number not in have:
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
            self._shards.pop(index)
            self._emit(("stopped", index))
        else:
            self._emit(("read", index))
            self._ended(index, count)

    def _try(self, task: Task) -> int | None:
        """Caption up to ``task.singly`` images, each announced; the shard's count if none is left."""
        count = tried = 0
        have = frozenset(self._open(task).have)
        for number, item in self._items(task.shard):
            count += 1
            if number in have:
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
        return _Entry(index, number, item, self._images.begin(item.image), size)

    # ---- captioning

    def _caption(self) -> None:
        """Caption what comes through the queue until None does."""
        for each, row in self._answered(self._requests(), self._pending):
            del self._asked[each.sha]
            self._answered_by(row)
            if row.caption is not None:
                self._thumbnails.offer(row.id, each.picture)
            if row.fault != "world":
                self._known[each.sha] = row
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
            for entry in each.places:
                self._row(entry, row)
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
                if entry[0] == "end":
                    self._ended(*entry[1:])
                else:
                    self._emit(entry)
                continue
            try:
                picture, sha = self._prepared(entry)
            except BadImage as error:
                self._row(entry, self._failed(error.reason, world=error.world))
                continue
            finally:
                self._gate.leave(entry.size)
            if sha in self._known:
                self._known.move_to_end(sha)
                self._row(entry, self._known[sha])
            elif sha in self._asked:
                self._asked[sha].places.append(entry)
            elif row := self._old_row(sha):
                self._row(entry, row)
            else:
                self._asked[sha] = _Waiting(sha, picture, [entry])
                self._pending.append(self._asked[sha])
                yield CaptionRequest(entry.item.key, picture, sha)

    def _prepared(self, entry: _Entry) -> tuple[Cut, str]:
        if entry.prepared is None or entry.item.image is None:
            raise BadImage(entry.item.error or "no image", entry.item.world)
        return self._images.finish(entry.item.image, entry.prepared)

    def _old_row(self, sha: str) -> CaptionRow | None:
        """The row of an image that was captioned before the input changed."""
        if self._old is None:
            return None
        found = self._old.execute("SELECT row FROM known WHERE id = ?", [sha]).fetchone()
        return CaptionRow.model_validate_json(found[0]) if found else None

    def _answered_by(self, row: CaptionRow) -> None:
        """RunError where image after image gets no answer: the fault is none of theirs."""
        self._unanswered = self._unanswered + 1 if row.fault == "world" else 0
        if self._unanswered >= UNANSWERED:
            self._flush()
            raise RunError(
                f"{UNANSWERED} images one after the other got no answer: {row.error}",
                where=", ".join(self.settings.config.engine.urls),
                fix="repair the server; the same command tries these images again and goes on",
            )

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
            QuestionBatch(each.picture, [self._checker.question(text) for text in texts])
            for each, texts in zip(waiting, asked, strict=True)
            if texts
        ]
        answers = iter(self._checker.engine.p_yes(batches)) if batches else iter(())
        rows = []
        for each, candidates, lists, texts in zip(waiting, group, stated, asked, strict=True):
            marks = self._checker.mark(texts, next(answers)) if texts else {}
            # the most statements that are likely true, less those that are likely not; equal ones: the first
            scores = [sum(marks[text].score for text in statements) for statements in lists]
            said = [candidate.text.strip() != "" for candidate in candidates]
            judged = [yes and not math.isnan(score) for yes, score in zip(said, scores, strict=True)]
            best = max(range(len(scores)), key=lambda k: (judged[k], said[k], scores[k]))
            rows.append(self._judged(each.sha, candidates[best], lists[best], marks))
        return rows

    def _judged(
        self, sha: str, candidate: Candidate, statements: list[str], marks: dict[str, Mark]
    ) -> CaptionRow:
        """The row of a verified caption; ``statements`` has those that were dropped, too."""
        row = self._outcome(sha, candidate)
        if row.error is not None:
            return row
        if any(math.isnan(marks[text].p_yes) for text in statements):
            return self._failed("the verifier gave no answer", sha, world=True)
        told: dict[str, Any] = {"statements": statements, "p_yes": [marks[text].p_yes for text in statements]}
        if self._checker.verifier is not None:
            told["p_true"] = [marks[text].p_true for text in statements]
            told["verdicts"] = [marks[text].verdict for text in statements]
        row = row.model_copy(update=told)
        if not self.settings.drop_refuted:
            return row
        left = without_refuted(candidate.text, [text for text in statements if marks[text].verdict == "drop"])
        if not left:
            why = {"error": "every statement was refuted", "fault": "image"}
            return row.model_copy(update={"caption": None, "finish_reason": None, **why})
        return row.model_copy(update={"caption": left})

    def _outcome(self, sha: str, candidate: Candidate) -> CaptionRow:
        if candidate.finish_reason.startswith("error: "):
            reason = candidate.finish_reason.removeprefix("error: ")
            return self._failed(reason, sha, world=reason.startswith(NO_ANSWER))
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

    def _failed(self, reason: str, sha: str = "", world: bool = False) -> CaptionRow:
        return failed_row(self.settings, "", reason, sha, world)

    def close(self) -> None:
        """End what the worker started itself."""
        self._checker.close()

    # ---- saying

    def _row(self, entry: _Entry, row: CaptionRow) -> None:
        row = row.model_copy(update={"key": entry.item.key})
        self._rows.setdefault(entry.shard, []).append((entry.number, row))
        late = time.monotonic() - self._said > SAID_AFTER
        if late or sum(map(len, self._rows.values())) >= SAID_TOGETHER:
            self._flush()

    def _flush(self) -> None:
        """Write the rows at hand where no kill can take them, tell of them, publish what is whole."""
        rows, self._rows, self._said = self._rows, {}, time.monotonic()
        for index, new in rows.items():
            shard = self._shards[index]
            shard.log.add(new)
            shard.have.update(number for number, _ in new)
            self._emit(("rows", index, new))
            self._publish(index)

    def _ended(self, index: int, count: int) -> None:
        self._shards[index].count = count
        self._publish(index)

    def _publish(self, index: int) -> None:
        shard = self._shards[index]
        if shard.count is None or len(shard.have) < shard.count:
            return
        rows, _ = shard.log.read()
        del self._shards[index]
        if len(rows) < shard.count:  # a worker of a job that was killed went on for a moment, and published
            self._emit(("stopped", index))
            return
        self._output.write(index, [rows[number] for number in range(shard.count)])
        shard.log.remove()
        self._emit(("published", index, Tally.of(rows.values())))


def ahead(config: Config) -> int:
    """Images that are prepared ahead: the engine's next batch while it works on one, and some in work."""
    return config.engine.max_num_seqs + 16


def failed_row(settings: Settings, key: str, reason: str, sha: str = "", world: bool = False) -> CaptionRow:
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
        fault="world" if world else "image",
    )
