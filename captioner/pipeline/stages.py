"""The images of a stage: captioned, or asked about; decoded once, ahead of the engine, by other processes.

with images(engine, config) as pictures:
    for row, said in caption_images(engine, rows, 4, sampling, pictures): ...
    for row, answered in ask(engine, rows, questions, pictures): ...
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from captioner.config import Config, SamplingConfig
from captioner.engines import CaptionRequest, Engine, QuestionBatch, YesNo
from captioner.pipeline.local import executor
from captioner.pipeline.prepare import Preparation, cores
from captioner.processes import world_size
from captioner.records import Candidate, Failed
from captioner.sources.folder import EXTRA_SUFFIXES
from captioner.views import BadImage, Cut


class Row(Protocol):
    """An image of a data set, such as :class:`captioner.sources.folder.ImageRow`."""

    @property
    def key(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def error(self) -> str | None: ...  # why there is no such image


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Answered:
    """An image and the answers to its questions; ``picture`` serves for further ones."""

    sample: str  # sha256 of the image bytes
    picture: Cut
    answers: list[YesNo]


@contextmanager
def images(
    engine: Engine, config: Config, processes: int | None = None
) -> Generator[Preparation, None, None]:
    """What prepares images for an engine; its processes end with the block. 0 processes: the engine's own.

    Raises RunError, as long as it is used, where the images' disk is gone for ``caption.outage`` seconds.
    """
    if processes is None:
        processes = config.caption.prepare_processes
    if processes is None:  # where processes are not forked, they would run a caller's script again
        processes = max(1, cores() // world_size() - 1) if sys.platform == "linux" else 0
    hands = executor(processes, config.engine.max_num_seqs + processes)
    try:
        yield Preparation(config.caption, hands, engine.renderer.spec)
    finally:
        hands.close()


def caption_images(
    engine: Engine, rows: Iterable[RowT], n: int, sampling: SamplingConfig, pictures: Preparation
) -> Iterator[tuple[RowT, list[Candidate] | Failed]]:
    """``n`` captions of every image, or why there are none: every row once, those that fail a little late."""
    shown: deque[RowT] = deque()
    failed: _Failures[RowT] = _Failures()

    def requests() -> Iterator[CaptionRequest]:
        for row, picture, sample in load(rows, pictures, failed.add):
            shown.append(row)
            yield CaptionRequest(row.key, picture, sample)

    for candidates in engine.sample(requests(), n, sampling):
        yield from failed.all()
        row, error = shown.popleft(), next((each.error for each in candidates if each.error), None)
        if error:  # of an image with fewer captions than the others no votes can be counted
            yield row, Failed(sample=candidates[0].sample, key=row.key, reason=error)
        else:
            yield row, candidates
    yield from failed.all()


def ask(
    engine: Engine,
    rows: Iterable[RowT],
    questions: Callable[[RowT], Sequence[str]],
    pictures: Preparation,
) -> Iterator[tuple[RowT, Answered | Failed]]:
    """The answers to the questions about every image (texts of the user's turn), as :func:`caption_images`.

    An answer that a server could not give is NaN.
    """
    shown: deque[tuple[RowT, str, Cut]] = deque()
    failed: _Failures[RowT] = _Failures()

    def requests() -> Iterator[QuestionBatch]:
        for row, picture, sample in load(rows, pictures, failed.add):
            shown.append((row, sample, picture))
            yield QuestionBatch(picture, list(questions(row)))

    for answers in engine.p_yes(requests()):
        yield from failed.all()
        row, sample, picture = shown.popleft()
        yield row, Answered(sample, picture, answers)
    yield from failed.all()


def load(
    rows: Iterable[RowT], pictures: Preparation, failed: Callable[[RowT, str], None]
) -> Iterator[tuple[RowT, Cut, str]]:
    """(row, picture, sha256 of its bytes) of each image that can be read; ``failed`` hears of the others."""

    def readable() -> Iterator[RowT]:
        for row in rows:
            if row.error:
                failed(row, row.error)
            else:
                yield row

    for row, ready in pictures.ahead(readable(), lambda row: row.path):
        if isinstance(ready, BadImage):
            failed(row, EXTRA_SUFFIXES.get(row.path.suffix.lower(), ready.reason))
        else:
            yield row, *ready


class _Failures(Generic[RowT]):
    """Rows without a picture, until they are told of."""

    def __init__(self) -> None:
        self._rows: list[tuple[RowT, Failed]] = []

    def add(self, row: RowT, reason: str) -> None:
        self._rows.append((row, Failed(sample="", key=row.key, reason=reason)))

    def all(self) -> list[tuple[RowT, Failed]]:
        told, self._rows = self._rows, []
        return told
