"""Jobs that are killed again and again: whether they end with the rows of an undisturbed one.

    python benchmarks/kills.py [KILLS] [local|ray ...]

For webdataset and Parquet, on two workers of this machine and on a local Ray cluster of two nodes: SIGKILL
meets the job KILLS (25) times, in turn its own process, its whole group and one of its workers; every third
time at any moment, else after it published a part. The engine is `hf` on a tiny model.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.test_bulk import SAMPLED, Zygote, rows, words, write_table, write_tars
from tests.test_caption import write_checkpoint

SHARDS, ROWS = 12, 3
LONGEST = 1200.0  # seconds that a job may take
Workers = Callable[[int], list[int]]  # of a job


@dataclass
class Found:
    """What became of the jobs over one kind of input."""

    kills: int = 0
    late: int = 0  # after the first published part
    jobs: int = 0
    different: int = 0  # from the undisturbed one


def kill(job: int, how: int, workers: list[int]) -> None:
    if how == 2 and workers:
        os.kill(workers[0], signal.SIGKILL)
    elif how == 1:
        os.killpg(job, signal.SIGKILL)
    else:
        os.kill(job, signal.SIGKILL)


def disturb(
    zygote: Zygote, command: list[str], out: Path, dice: random.Random, found: Found, of: Workers
) -> None:
    """Run a command once, and kill it or a worker in the middle."""
    job = zygote.start(command)
    before, late = len(list(out.glob("*.parquet"))), found.kills % 3 != 0
    parts, delay = before + dice.randint(1, 3), dice.uniform(0.0, 0.3 if late else 3.0)
    started = time.monotonic()
    while zygote.ended(0.01) is None:
        published = len(list(out.glob("*.parquet")))
        if late and published < parts:
            continue
        if not late and time.monotonic() - started < delay:
            continue
        if late:
            time.sleep(delay)
        kill(job, found.kills % 3 if late else 0, of(job))
        found.kills += 1
        found.late += bool(list(out.glob("*.parquet")))
        code = zygote.ended(LONGEST)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"a killed job ended with {code}: {' '.join(command)}")
        return


def jobs(
    zygote: Zygote, source: str, home: Path, checkpoint: Path, flags: list[str], kills: int, of: Workers
) -> Found:
    dice, found = random.Random(11), Found()
    flags = [*SAMPLED, "--max-failed", "1", *flags]
    zygote.start(words(source, home / "whole", checkpoint, *SAMPLED, "--max-failed", "1"))
    assert zygote.ended(LONGEST) == 0
    whole = rows(home / "whole")
    for number in count():
        out = home / f"killed-{number}"
        command = words(source, out, checkpoint, *flags)
        for _ in range(4):
            if found.kills < kills:
                disturb(zygote, command, out, dice, found, of)
        zygote.start(command)
        assert zygote.ended(LONGEST) == 0
        found.jobs += 1
        found.different += rows(out) != whole
        if found.kills >= kills:
            return found
    raise AssertionError


def children(job: int) -> list[int]:
    """The processes that a job of this machine has started."""
    try:
        return [process.pid for process in psutil.Process(job).children()]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def cluster() -> Iterator[tuple[list[str], Workers]]:
    """Two nodes on this machine; the flags of a job there, and its workers."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80_000_000}
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)

    def actors(job: int) -> list[int]:
        every = psutil.Process().children(recursive=True)
        return [process.pid for process in every if "ray::_Actor" in " ".join(process.cmdline())]

    try:
        yield ["--runner", "ray", "--caption.ray_address", nodes.address], actors
    finally:
        nodes.shutdown()


@contextmanager
def local() -> Iterator[tuple[list[str], Workers]]:
    yield ["--runner", "local"], children


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        checkpoint = write_checkpoint(home / "tiny", seed=1)
        sources = {
            "webdataset": write_tars(home / "tars", SHARDS, ROWS),
            "parquet": write_table(home / "a.parquet", SHARDS * ROWS, ROWS),
        }
        for runner in sys.argv[2:] or ["local", "ray"]:
            with {"local": local, "ray": cluster}[runner]() as (flags, of):
                zygote = Zygote()
                for kind, source in sources.items():
                    place = home / f"{runner}-{kind}"
                    flags = [*flags, "--workers", "2"]
                    found = jobs(zygote, source, place, checkpoint, flags, kills, of)
                    print(f"{runner:6} {kind:11} {found}", flush=True)
                    wrong += found.different
                zygote.process.kill()
                zygote.process.wait()
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
