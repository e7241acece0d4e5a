"""The images of a stage: captioned, or asked about; decoded once, ahead of the engine, by other processes.

with images(engine.renderer.spec, config, len(rows)) as pictures:
    for image, candidates in caption_images(engine, prepared(rows, pictures), 4, sampling): ...
    for image, answers in ask(engine, prepared(rows, pictures), questions): ...

:func:`fill` does so for a stage of a run, from its first missing shard on.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from captioner.config import Config, SamplingConfig
from captioner.engines import CaptionRequest, Engine, QuestionBatch, YesNo, make_engine
from captioner.fit import distributed
from captioner.pipeline.local import DEVICES, devices, executor
from captioner.pipeline.prepare import Preparation, cores
from captioner.processes import world_size
from captioner.progress import Progress, progress
from captioner.records import Candidate, Failed, RecordT
from captioner.runs import Shards
from captioner.sources.folder import EXTRA_SUFFIXES
from captioner.views import BadImage, Cut, ViewSpec

ALL = "all"  # the view of a question that is asked about all of them


class Row(Protocol):
    """An image of a data set, such as :class:`captioner.sources.folder.ImageRow`."""

    @property
    def key(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def error(self) -> str | None: ...  # why there is no such image


RowT = TypeVar("RowT", bound=Row)
RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class Prepared(Generic[RowT]):
    """An image that an engine can be shown, or the reason why it cannot."""

    row: RowT
    picture: Cut | None
    sample: str  # sha256 of the image bytes; "" where they could not be read
    reason: str = ""  # why there is no picture

    def refused(self, reason: str) -> Prepared[RowT]:
        """The same image, which no engine is to see."""
        return replace(self, picture=None, reason=reason)

    def failed(self) -> Failed:
        return Failed(sample=self.sample, key=self.row.key, reason=self.reason)


@contextmanager
def images(spec: ViewSpec, config: Config, count: int) -> Generator[Preparation, None, None]:
    """What prepares ``count`` images for an engine, in processes that end with the block.

    ``caption.prepare_processes`` says how many; 0: the engine's own process does it.
    Raises RunError, as long as it is used, where the images' disk is gone for ``caption.outage`` seconds.
    """
    processes = config.caption.prepare_processes
    if processes is None:  # where processes are not forked, they would run a caller's script again
        processes = max(1, cores() // world_size() - 1) if sys.platform == "linux" else 0
    processes = min(processes, count)
    hands = executor(processes, config.engine.max_num_seqs + processes)
    try:
        yield Preparation(config.caption, hands, spec)
    finally:
        hands.close()


def prepared(rows: Iterable[RowT], pictures: Preparation) -> Iterator[Prepared[RowT]]:
    """Every image in order, read, decoded and cut ahead of whoever takes it."""

    def place(row: RowT) -> Path:
        if row.error:
            raise BadImage(row.error)
        return row.path

    for row, ready in pictures.ahead(rows, place):
        if isinstance(ready, BadImage):
            known = None if row.error else EXTRA_SUFFIXES.get(row.path.suffix.lower())
            yield Prepared(row, None, "", known or ready.reason)
        else:
            yield Prepared(row, *ready)


def caption_images(
    engine: Engine, images: Iterable[Prepared[RowT]], n: int, sampling: SamplingConfig
) -> Iterator[tuple[Prepared[RowT], list[Candidate]]]:
    """Every image with ``n`` captions, or with none and the reason why; those without come a little late."""

    def request(image: Prepared[RowT]) -> list[CaptionRequest]:
        return [CaptionRequest(image.row.key, image.picture, image.sample)] if image.picture else []

    for image, said in _served(images, request, lambda asked: engine.sample(asked, n, sampling)):
        error = next((each.error for own in said for each in own if each.error), None)
        if error:  # of an image with fewer captions than the others no votes can be counted
            yield image.refused(error), []
        else:
            yield image, [each for own in said for each in own]


def ask(
    engine: Engine,
    images: Iterable[Prepared[RowT]],
    questions: Callable[[Prepared[RowT]], Sequence[tuple[str, str]]],
) -> Iterator[tuple[Prepared[RowT], list[YesNo]]]:
    """Every image with the answers to its questions; those that nothing is asked about come a little late.

    A question is the view it is asked about (:data:`ALL`, or the tag of one) and the text of the user's turn.
    An answer that a server could not give is NaN.
    """
    places: deque[list[int]] = deque()  # of the questions about each image in the order of its requests

    def request(image: Prepared[RowT]) -> list[QuestionBatch]:
        if image.picture is None or not (asked := questions(image)):
            return []
        views = sorted({view for view, _ in asked})
        of_view = [[at for at, each in enumerate(asked) if each[0] == view] for view in views]
        places.append([at for own in of_view for at in own])
        return [
            QuestionBatch(image.picture, [asked[at][1] for at in own], view)
            for view, own in zip(views, of_view, strict=True)
        ]

    for image, replies in _served(images, request, engine.p_yes):
        flat = [answer for own in replies for answer in own]
        at = dict(zip(places.popleft() if replies else (), flat, strict=True))
        yield image, [at[number] for number in range(len(flat))]


def _served(
    images: Iterable[Prepared[RowT]],
    request: Callable[[Prepared[RowT]], list[RequestT]],
    serve: Callable[[Iterator[RequestT]], Iterator[AnswerT]],
) -> Iterator[tuple[Prepared[RowT], list[AnswerT]]]:
    """Each image with the answers to its requests; one that has none comes when an answer is there."""
    shown: deque[tuple[Prepared[RowT], int]] = deque()
    aside: deque[Prepared[RowT]] = deque()

    def requests() -> Iterator[RequestT]:
        for image in images:
            if made := request(image):
                shown.append((image, len(made)))
                yield from made
            else:
                aside.append(image)

    answers = serve(requests())
    for first in answers:
        while aside:
            yield aside.popleft(), []
        image, count = shown.popleft()
        yield image, [first, *islice(answers, count - 1)]
    while aside:
        yield aside.popleft(), []


# ---------------------------------------------------------------- stages in shards


class Output(Generic[RecordT]):
    """Shards of a stage's rows; where ``apart``, beside those of the images it failed on, written first."""

    def __init__(self, folder: Path, record: type[RecordT], apart: bool = True):
        self.rows = Shards(folder, record)
        self.failed = Shards(folder / "failed", Failed) if apart else None

    def write(self, index: int, made: Sequence[list[RecordT] | Failed]) -> None:
        """``made``: of each image of the shard its rows, or why it has none."""
        if self.failed:
            self.failed.write(index, [each for each in made if isinstance(each, Failed)])
        self.rows.write(index, [row for each in made if not isinstance(each, Failed) for row in each])


def fill(
    output: Output[RecordT],
    description: str,
    parts: Sequence[Sequence[RowT]],
    checkpoint: Path,
    config: Config,
    work: Callable[[Engine, Iterator[Prepared[RowT]]], Iterator[tuple[RowT, list[RecordT] | Failed]]],
    prompt: str | None = None,
) -> None:
    """Make the missing shards, of several processes each its share; the model is loaded only for that.

    ``work`` gives the rows of every image, or why there are none, in any order. The images of all shards are
    prepared as one stream. ``hf`` captions and answers shard by shard: its last digits depend on which images
    go together, and so a killed stage ends with the same rows. The others would run dry between two shards.
    """
    missing = [index for index in range(len(parts)) if not output.rows.has(index)]
    distributed.barrier()  # before the first is written
    own = distributed.share_out(missing)
    if own:
        total = sum(len(parts[index]) for index in own)
        with (
            opened(checkpoint, config, prompt) as engine,
            images(engine.renderer.spec, config, total) as pictures,
            progress(description, total) as bar,
        ):
            ready = prepared((row for index in own for row in parts[index]), pictures)
            for together in [[index] for index in own] if config.engine.type == "hf" else [own]:
                count = sum(len(parts[index]) for index in together)
                _write(output, parts, together, work(engine, islice(ready, count)), bar)
    distributed.barrier()


def _write(
    output: Output[RecordT],
    parts: Sequence[Sequence[RowT]],
    indices: Iterable[int],
    found: Iterator[tuple[RowT, list[RecordT] | Failed]],
    bar: Progress,
) -> None:
    """Publish each of these shards as soon as all its images are there."""
    made: dict[int, list[RecordT] | Failed] = {}
    for index in indices:
        while not all(id(row) in made for row in parts[index]):
            row, rows = next(found)
            made[id(row)] = rows
            bar.advance()
        output.write(index, [made.pop(id(row)) for row in parts[index]])
    assert next(found, None) is None and not made


@contextmanager
def opened(checkpoint: Path, config: Config, prompt: str | None = None) -> Generator[Engine, None, None]:
    """The one model in memory: captioner and verifier are never loaded together."""
    if config.engine.type != "hf":
        _make_room()
    engine = make_engine(checkpoint, config, prompt)
    try:
        yield engine
    finally:
        engine.close()


def _make_room() -> None:
    """vLLM takes the first GPU that it sees, and most of its memory.

    Of several processes each sees its own; what an earlier training of this process keeps of it is let go.
    """
    _own_device()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@cache
def _own_device() -> None:
    found = devices()
    if world_size() > 1 and found:
        os.environ[DEVICES] = found[int(os.environ.get("LOCAL_RANK", "0")) % len(found)]


def meeting(config: Config) -> str:
    """The device through which the processes of a stage speak: those that hold no model need no GPU."""
    return config.model.device if config.engine.type == "hf" else "cpu"
