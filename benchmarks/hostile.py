"""Hostile files through a worker of a bulk job: whether each image is a row, in what time and memory.

    python benchmarks/hostile.py [MUTATED]

A thousand (or MUTATED) broken images in one tar, 40 hostile tars, 40 hostile Parquet files and the largest
images that are allowed. Each source is captioned in a process of its own by an engine that says one thing of
all.
"""

from __future__ import annotations

import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioner.config import Config, ViewsConfig
from captioner.pipeline.local import Processes
from captioner.pipeline.worker import Settings, Task, Worker
from captioner.records import Candidate
from captioner.sources.folder import read_captions
from captioner.sources.source import open_source, read_shard
from captioner.views import ViewSpec
from tests.test_folders import tar
from tests.test_hostile import mutated, originals
from tests.test_source import header, pax, png

MEMORY, SECONDS = 2048, 60  # MiB and seconds that a source may take, but for the thousand


class AtOnce:
    renderer = SimpleNamespace(spec=ViewSpec(ViewsConfig(), 448, 28))

    def sample(self, requests: Any, n: int, sampling: Any) -> Iterator[list[Candidate]]:
        for request in requests:
            made: dict[str, Any] = dict(finish_reason="stop", mean_logprob=0.0, tokens=1, seed=0, text="a")
            yield [Candidate(sample=request.sample_id, key=request.key, k=0, **made)]


def caption(source: Path, out: Path) -> None:
    """What a worker does of the source."""
    out.mkdir()
    shards = list(open_source(str(source), index=out / ".listing"))
    messages = iter([*map(Task, shards), None])
    engine: Any = AtOnce()
    hands = Processes(1, 80)
    settings = Settings(Config(), source, "m", "c", out=out)
    Worker(settings, engine, hands, lambda: next(messages), lambda event: None).run()
    hands.close()


def tars(home: Path) -> Iterator[Path]:
    dice = random.Random(0)
    images = [(f"{i}.png", png(i)) for i in range(20)]
    whole = tar(*images)
    huge = [b"\x80" + (1 << bits).to_bytes(11, "big") for bits in (33, 60, 80)]
    lies = [header("x.png", size, kind) for size in huge for kind in KINDS]
    lies += [pax(b"size=%d" % size) + header("x.png", b"%011o\0" % 0) for size in (1 << 60, -1024, 10**30)]
    lies += [pax(b"path=../../up.png") + header("x.png", b"%011o\0" % 0), bytes(5000), b"\xff" * 5120]
    lies += [pax(b"a=b") * 3000, header("l.png", b"%011o\0" % 0, tarfile.SYMTYPE)]
    for number in range(40):
        if number < len(lies):
            data = whole[:10240] + lies[number] + whole[10240:]
        elif number % 2:
            data = whole[: dice.randrange(513, len(whole))]
        else:
            flipped = bytearray(whole)
            for _ in range(50):
                flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
            data = bytes(flipped)
        path = home / f"tar-{number:02d}.tar"
        path.write_bytes(data)
        yield path


KINDS = (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE)


def tables(home: Path) -> Iterator[Path]:
    dice = random.Random(1)
    keys = [str(i) for i in range(40)]
    cells = [
        "hf://d/a.png",
        "s3://b::hf://x",
        "file:///etc/hostname::hf://x",
        "/dev/zero",
        "../x.png",
        "a\0b",
    ]
    for number in range(40):
        path = home / f"table-{number:02d}.parquet"
        if number < len(cells):
            paths = [cells[number] if i == 7 else "none.png" for i in range(40)]
            pq.write_table(pa.table({"key": keys, "path": paths}), path, row_group_size=10)
        else:
            odd = ["../evil", "\x1b[31m", "a" * 5000, "", "/x"][number % 5]
            columns = {"key": [*keys[:7], odd, *keys[8:]], "image": [png(i) for i in range(40)]}
            pq.write_table(pa.table(columns), path, row_group_size=10)
            data = bytearray(path.read_bytes())
            for _ in range(number - len(cells)):
                data[dice.randrange(4, len(data) - (0 if number % 4 == 0 else 2000))] ^= 1 << dice.randrange(
                    8
                )
            path.write_bytes(data)
        yield path


def large(home: Path) -> Iterator[Path]:
    """Near the limit of 178 megapixels."""
    for number, (mode, form) in enumerate(
        [("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("F", "TIFF"), ("RGB", "JPEG")]
    ):
        folder = home / f"large-{number}-{mode.replace(';', '')}-{form}"
        folder.mkdir()
        Image.new(mode, (13_000, 13_000)).save(folder / f"x.{form.lower()}")
        yield folder


def measure(source: Path, out: Path) -> tuple[float, float, int]:
    """Seconds, MiB at most of one process, exit code."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            caption(source, out)
            code = 0
        except BaseException as error:
            print(f"{source.name}: {type(error).__name__} {error}", file=sys.stderr)
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    return time.monotonic() - started, used.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def items(source: Path) -> int:
    """Images and failures that reading the source tells of; none where it is told as a whole."""
    try:
        return sum(1 for shard in open_source(str(source)) for _ in read_shard(shard))
    except Exception:
        return 0


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        whole = originals()
        thousand = home / "mutated.tar"
        thousand.write_bytes(tar(*((f"{i:04d}.png", mutated(i, whole)) for i in range(count))))
        kinds = {"mutated": [thousand], "tars": tars(home), "tables": tables(home), "large": large(home)}
        for kind, sources in kinds.items():
            taken, peaks, bad, rows = [], [], [], 0
            for source in sources:
                out = home / f"out-{source.name}"
                seconds, memory, code = measure(source, out)
                made = sum(1 for _ in read_captions(out)) if any(out.glob("*.parquet")) else 0
                rows += made
                taken.append(seconds)
                peaks.append(memory)
                if (
                    code
                    or made != items(source)
                    or memory > MEMORY
                    or (kind != "mutated" and seconds > SECONDS)
                ):
                    bad.append(f"{source.name}: exit {code}, {made} rows of {items(source)}, {seconds:.0f} s")
            print(
                f"{kind:8} {len(taken):3} sources, {rows:5} rows, at most {max(taken):5.1f} s and "
                f"{max(peaks):6.0f} MiB, {len(bad)} wrong"
            )
            for line in bad:
                print(f"  {line}")


if __name__ == "__main__":
    main()
