"""Resident memory of a captioning job as it grows, with an engine that answers at once.

    python benchmarks/bulk_memory.py [--full]

Runs the coordinator and a worker in one process over 10^4 and then 10^5 rows (10^6 with --full), each in a
process of its own, and prints the peak of its resident memory (aim: within 5 % of each other) and rows/s.
"""

from __future__ import annotations

import io
import multiprocessing
import queue
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from captioner.config import Config, ViewsConfig
from captioner.pipeline import worker as workers
from captioner.pipeline.coordinator import Coordinator
from captioner.pipeline.local import Inline
from captioner.pipeline.output import Output
from captioner.pipeline.watch import Watch
from captioner.pipeline.worker import Settings, Worker
from captioner.progress import Progress
from captioner.records import Candidate
from captioner.sources.source import Item, ShardRef
from captioner.views import ViewSpec

SHARD_ROWS = 1000


class AtOnce:
    """An engine that answers at once."""

    renderer = SimpleNamespace(spec=ViewSpec(ViewsConfig(levels=(1,)), 16, 16))

    def sample(self, requests: Iterator[Any], n: int, sampling: Any) -> Iterator[list[Candidate]]:
        for request in requests:
            text = f"red circle, blue square, {request.sample_id}"
            yield [
                Candidate(
                    sample=request.sample_id, key=request.key, k=0, text=text, finish_reason="stop",
                    mean_logprob=0.0, tokens=20, seed=0,
                )
            ]  # fmt: skip


class InThread:
    """A pool of one worker, a thread of this process."""

    def __init__(self, settings: Settings):
        self.settings, self.inbox, self.outbox = settings, queue.Queue[Any](), queue.Queue[Any](64)

    def start(self, number: int) -> None:
        engine: Any = AtOnce()
        made = Worker(self.settings, engine, Inline(16), self.inbox.get, self.outbox.put)
        self.outbox.put(("ready",))
        threading.Thread(target=made.run, daemon=True).start()

    def send(self, number: int, message: Any) -> None:
        self.inbox.put(message)

    def poll(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]:
        try:
            return [(0, self.outbox.get(timeout=seconds))]
        except queue.Empty:
            return []

    def kill(self, number: int) -> None: ...

    def close(self) -> None:
        self.inbox.put(None)


def pixels(number: int) -> bytes:
    buffer = io.BytesIO()
    color = (number % 256, number // 256 % 256, number // 65536)
    Image.new("RGB", (16, 16), color).save(buffer, "BMP")
    return buffer.getvalue()


def read(shard: ShardRef) -> Iterator[Item]:
    for number in range(shard.start, shard.start + SHARD_ROWS):
        yield Item(f"{number:09d}", pixels(number))


def job(rows: int, answer: Any) -> None:
    workers.read_shard = read  # the images of a source that needs no disk
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Config(), Path(), "m", "c", out=Path(folder))
        output = Output(Path(folder))
        shards = (
            ShardRef(i, str(i), "made", "", i * SHARD_ROWS, SHARD_ROWS) for i in range(rows // SHARD_ROWS)
        )
        watch = Watch(settings.config.caption, output, shards=rows // SHARD_ROWS, images=rows, bar=Progress())
        started = time.monotonic()
        Coordinator(InThread(settings), 1, shards, settings, output, watch).run()
        seconds = time.monotonic() - started
        assert output.tally.rows == rows and output.tally.failed == 0
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rows / seconds))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    peaks = []
    for rows in (10_000, 100_000, *([1_000_000] if "--full" in sys.argv else [])):
        answer = context.Queue()
        process = context.Process(target=job, args=(rows, answer))
        process.start()
        peak, rate = answer.get()
        process.join()
        peaks.append(peak)
        print(f"{rows:9,} rows: {peak:6.1f} MiB at most, {rate:,.0f} rows/s")
    print(f"ratio of the last to the first: {peaks[-1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
