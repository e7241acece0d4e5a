"""The whole captioning pipeline against the bare engine that is fed prepared images.

    python benchmarks/bulk_pipeline.py [IMAGES] [--checkpoint DIR] [--cores ENGINE,REST] [--engine.type ...]

Draws scenes into webdataset tars, captions them through the whole pipeline (read, prepare, caption, write;
the start of the worker is left out) and with the engine alone, in turns, other scenes every time. Prints
images per second of both and the ratio (aim: 0.95 or more), and CPU seconds of the process that holds the
engine: on a machine with other work these say what the pipeline costs it, and the clock what the rest takes.

scenes-base, the default, says next to nothing, so it shows the pipeline at its worst: name a captioner.
--cores 0,1 keeps the engine on core 0, preparation and coordinator on core 1. Against a server (start it with
`captioner serve scenes-base`): --engine.type server --engine.urls http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from captioner.config import load
from captioner.engines import make_engine
from captioner.lab import grid as scenes
from captioner.pipeline.coordinator import Coordinator
from captioner.pipeline.local import Inline, LocalPool
from captioner.pipeline.output import Output
from captioner.pipeline.watch import Watch
from captioner.pipeline.worker import Settings, Worker
from captioner.progress import Progress
from captioner.runs import checkpoint_path
from captioner.sources.source import open_source, read_shard
from captioner.views import prepare

SHARDS = 8
TURNS = 2


class Timed(LocalPool):
    """A pool of one worker: puts its processes on their cores, and notes time and CPU time from its start."""

    cores: tuple[int, int] | None = None
    ready = spent = 0.0

    def poll(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]:
        found = super().poll(seconds)
        if not self.ready and any(event == ("ready",) for _, event in found):
            self.engine = psutil.Process(self._running[0][0].pid)
            if self.cores:
                self.engine.cpu_affinity(
                    [self.cores[0]]
                )  # of its main thread: what it starts now inherits it
                for child in self.engine.children(recursive=True):
                    child.cpu_affinity([self.cores[1]])
            self.ready, self.spent = time.monotonic(), -_cpu(self.engine)
        return found

    def close(self) -> None:
        self.spent += _cpu(self.engine)
        super().close()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    words = sys.argv[1:]
    count = int(words.pop(0)) if words and words[0].isdigit() else 256
    options = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
    if (named := options.pop("cores", None)) is not None:
        engine, rest = map(int, named.split(","))
        Timed.cores = engine, rest
        os.sched_setaffinity(0, [rest])
    checkpoint = checkpoint_path(options.pop("checkpoint", "scenes-base"))
    config = load(None, options)
    settings = Settings(config, checkpoint, "", "")
    processes = config.caption.prepare_processes if config.caption.prepare_processes is not None else 1
    spent = {"pipeline": [0.0, 0.0], "bare engine": [0.0, 0.0]}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(TURNS):
            out = Path(folder, f"out-{turn}")
            out.mkdir()
            output = Output(out)
            watch = Watch(config.caption, output, shards=SHARDS, images=count, bar=Progress())
            settings = replace(settings, out=out)
            pool = Timed(settings, processes)
            source = write(Path(folder, f"a-{turn}"), count, 2 * turn * count)
            Coordinator(pool, 1, iter(open_source(source)), settings, output, watch).run()
            add(spent["pipeline"], time.monotonic() - pool.ready, pool.spent)
            assert output.tally.rows == count and output.tally.failed == 0, output.tally
            add(
                spent["bare engine"],
                *bare(settings, write(Path(folder, f"b-{turn}"), count, (2 * turn + 1) * count)),
            )
    for name, (seconds, cpu) in spent.items():
        print(f"{name:12} {TURNS * count / seconds:8.2f} images/s {cpu:8.1f} s of CPU at the engine")
    (wall, cpu), (bare_wall, bare_cpu) = spent.values()
    print(f"ratio        {bare_wall / wall:8.3f}          {bare_cpu / cpu:8.3f}   ({processes} prepare)")


def add(to: list[float], *values: float) -> None:
    to[:] = (a + b for a, b in zip(to, values, strict=True))


def bare(settings: Settings, source: str) -> tuple[float, float]:
    """Seconds, and CPU seconds, of the engine alone, all its images prepared before."""
    before = os.sched_getaffinity(0)
    if Timed.cores:
        os.sched_setaffinity(0, [Timed.cores[0]])
    engine = make_engine(settings.checkpoint, settings.config)
    spec = engine.renderer.spec
    items = [item for shard in open_source(source) for item in read_shard(shard)]
    cuts = [prepare(item.image, spec) for item in items if item.image is not None]
    worker = Worker(settings, engine, Inline(2), lambda: None, lambda event: None)
    started, worked = time.monotonic(), time.process_time()
    assert len(worker.caption(cuts)) == len(cuts)
    spent = time.monotonic() - started, time.process_time() - worked
    engine.close()
    os.sched_setaffinity(0, before)
    return spent


def write(folder: Path, count: int, first: int) -> str:
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for index in range(first + shard * count // SHARDS, first + (shard + 1) * count // SHARDS):
                buffer = io.BytesIO()
                scenes.draw(scenes.sample("test", index), index).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{index:06d}.png")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return f"{folder}/*.tar"


if __name__ == "__main__":
    main()
