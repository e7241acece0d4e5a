"""The whole captioning pipeline against the bare engine that is fed prepared images.

    python benchmarks/bulk_pipeline.py [IMAGES] [--section.field VALUE ...]

Draws scenes into webdataset tars, captions them through the whole pipeline (read, prepare, caption, write;
the start of the worker is left out) and with the engine alone, in turns. Prints images per second of both and
the ratio (aim: 0.95 or more). On one core preparation and engine share it, so the ratio holds the cost of
preparation too; with cores of its own for preparation it measures what the pipeline itself costs.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from captioner import scenes
from captioner.bulk.coordinator import Coordinator
from captioner.bulk.local import Inline, LocalPool
from captioner.bulk.output import Output
from captioner.bulk.watch import Watch
from captioner.bulk.worker import Settings, Worker
from captioner.config import load
from captioner.formats.source import open_source, read_shard
from captioner.runs import Progress, checkpoint_path
from captioner.views import prepare

SHARDS = 8


class Timed(LocalPool):
    """A pool that notes when its first worker was ready."""

    ready = 0.0

    def poll(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]:
        found = super().poll(seconds)
        if not self.ready and any(event == ("ready",) for _, event in found):
            self.ready = time.monotonic()
        return found


def main() -> None:
    words = sys.argv[1:]
    count = int(words.pop(0)) if words and words[0].isdigit() else 256
    config = load(None, dict(zip((w[2:] for w in words[::2]), words[1::2], strict=True)))
    settings = Settings(config, checkpoint_path("scenes-base"), "", "")
    processes = config.caption.prepare_processes if config.caption.prepare_processes is not None else 1
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder), count)
        spent = {"pipeline": 0.0, "bare engine": 0.0}
        for turn in range(2):
            out = Path(folder, f"out-{turn}")
            out.mkdir()
            output = Output(out)
            watch = Watch(config.caption, output, shards=SHARDS, images=count, bar=Progress())
            pool = Timed(settings, processes)
            Coordinator(pool, 1, iter(open_source(source)), settings, output, watch).run()
            spent["pipeline"] += time.monotonic() - pool.ready
            assert output.tally.rows == count and output.tally.failed == 0, output.tally
            spent["bare engine"] += bare(settings, source)
    for name, seconds in spent.items():
        print(f"{name:12} {2 * count / seconds:8.2f} images/s")
    print(f"ratio        {spent['bare engine'] / spent['pipeline']:8.3f}   ({processes} processes prepare)")


def bare(settings: Settings, source: str) -> float:
    """Seconds of the engine alone, all its images prepared before."""
    from captioner.engines import make_engine

    engine = make_engine(settings.checkpoint, settings.config)
    spec = engine.renderer.spec
    items = [item for shard in open_source(source) for item in read_shard(shard)]
    cuts = [prepare(item.image, spec) for item in items if item.image is not None]
    worker = Worker(settings, engine, Inline(2), lambda: None, lambda event: None)
    started = time.monotonic()
    assert len(worker.caption(cuts)) == len(cuts)
    return time.monotonic() - started


def write(folder: Path, count: int) -> str:
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for index in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                buffer = io.BytesIO()
                scenes.draw(scenes.sample("test", index), index).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{index:06d}.png")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return f"{folder}/*.tar"


if __name__ == "__main__":
    main()
