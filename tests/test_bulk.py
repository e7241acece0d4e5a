"""Bulk captioning: killed anywhere, in any part, it ends with the rows of an undisturbed job."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner.config import Config, TripwireConfig
from captioner.engines import CaptionRequest, QuestionBatch, YesNo, make_engine
from captioner.engines.hf import HFEngine
from captioner.method.tool import Rules
from captioner.pipeline import local
from captioner.pipeline.local import Inline, LocalPool
from captioner.pipeline.output import Output, Tally
from captioner.pipeline.watch import Tripwires
from captioner.pipeline.worker import Settings, Worker
from captioner.records import Candidate, CaptionRow
from captioner.runs import Run
from captioner.sources.folder import read_captions
from captioner.statements import normalise, split_statements, without
from captioner.views import prepare
from loops import cli
from tests.test_caption import FLAGS, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
KILLS = 13  # of a job over each kind of input
SAMPLED = ["--caption.sampling.temperature", "1.0"]  # so that captions differ from image to image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=1)


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """PNG files of noise; every tenth is a copy of the first."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    found[9::10] = [found[0]] * len(found[9::10])
    return found


def write_tars(folder: Path, shards: int = 6, rows: int = 5) -> str:
    folder.mkdir()
    images = iter(pictures(shards * rows))
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for row in range(rows):
                data = next(images) if (shard, row) != (2, 1) else b"no image"
                info = tarfile.TarInfo(f"{shard:03d}{row:03d}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return f"{folder}/*.tar"


def write_table(path: Path, rows: int = 26, group: int = 4) -> str:
    table = pa.table({"key": [f"row-{i}" for i in range(rows)], "image": pictures(rows, seed=1)})
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def words(source: str | Path, out: Path, checkpoint: Path, *more: str) -> list[str]:
    return ["caption", str(source), "--out", str(out), "--checkpoint", str(checkpoint), *FLAGS, *more]


def rows(out: Path) -> list[CaptionRow]:
    return list(read_captions(out))


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / ".status.json").read_text(encoding="utf-8"))


class Zygote:
    """Starts jobs without their imports; see tests/zygote.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # select must see every line that is there
        )

    def start(self, command: list[str]) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        return int(self.process.stdout.readline())

    def ended(self, seconds: float | None) -> int | None:
        """The exit code, None if the job still runs after so many seconds."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return int(self.process.stdout.readline()) if ready else None


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    found.start(["--version"])  # once it has its imports
    assert found.ended(120) == 0
    yield found
    found.process.kill()
    found.process.wait()


def children(pid: int) -> list[int]:
    """The processes that a job started; none where it has ended."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in found.split()]


# ---------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_job_killed_anywhere_ends_with_the_same_rows(
    kind: str, tmp_path: Path, checkpoint: Path, zygote: Zygote
) -> None:
    source = write_tars(tmp_path / "tars") if kind == "webdataset" else write_table(tmp_path / "a.parquet")
    started = time.monotonic()
    zygote.start(words(source, tmp_path / "whole", checkpoint, *SAMPLED, "--max-failed", "1"))
    assert zygote.ended(60) == 0
    lasts = time.monotonic() - started
    whole = rows(tmp_path / "whole")
    assert len(whole) == len({row.key for row in whole}) == (30 if kind == "webdataset" else 26)
    assert len({row.caption for row in whole}) > 15
    dice, kills, jobs = random.Random(7), 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed-{jobs}"
        command = words(source, out, checkpoint, *SAMPLED, "--max-failed", "1")
        jobs += 1
        code = None
        while code != 0:
            pid = zygote.start(command)
            # a job that went some way is killed earlier, so that most kills meet it at work
            code = zygote.ended(dice.uniform(0.0, lasts) if kills < KILLS else 60)
            if code is None:
                if dice.random() < 0.5:  # the job alone: its workers have to notice
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.killpg(pid, signal.SIGKILL)
                kills += 1
                assert zygote.ended(10) in (-signal.SIGKILL, 0)
            else:
                assert code == 0
        assert rows(out) == whole
        assert {f.name for f in out.glob("*.parquet")} == {
            f.name for f in (tmp_path / "whole").glob("*.parquet")
        }
        assert Output(out).tally == Output(tmp_path / "whole").tally


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(tmp_path: Path, checkpoint: Path, zygote: Zygote) -> None:
    source = write_tars(tmp_path / "tars", shards=96)
    flags = [*SAMPLED, "--max-failed", "1", "--workers", "2"]
    assert cli.main(words(source, tmp_path / "whole", checkpoint, *SAMPLED, "--max-failed", "1")) == 0
    deaths = 0
    for attempt in range(10):  # a worker that is killed when its work is done is not missed
        out = tmp_path / f"out-{attempt}"
        pid = zygote.start(words(source, out, checkpoint, *flags))
        killed: set[int] = set()
        while (code := zygote.ended(0.005)) is None:
            fresh = set(children(pid)) - killed
            if fresh and len(killed) < 3 and list(out.glob("*.parquet")):
                os.kill(min(fresh), signal.SIGKILL)
                killed.add(min(fresh))
        assert code == 0
        assert rows(out) == rows(tmp_path / "whole")
        found = status(out)
        assert found["state"] == "done"
        deaths = sum(worker["deaths"] for worker in found["workers"].values())
        assert deaths <= len(killed)
        if deaths:
            break
    assert deaths


POISON = b""  # bytes of the image that kills the process that works on it


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly_prepare(source: Path, *args: Any) -> Any:
    if source.read_bytes() == POISON:
        end()
    return prepare(source, *args)


def deadly_sample(self: HFEngine, requests: Iterator[CaptionRequest], *args: Any) -> Any:
    def watched() -> Iterator[CaptionRequest]:
        for request in requests:
            if request.sample_id == hashlib.sha256(POISON).hexdigest():
                end()
            yield request

    return sample(self, watched(), *args)


sample = HFEngine.sample


def poisoned_job(
    where: str,
    home: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    images: int,
    poison: int,
    processes: int,
) -> list[str]:
    """The words of a job of which one image ends what touches it; the undisturbed one is in ``whole``."""
    source = home / "images"
    source.mkdir()
    for number, data in enumerate(pictures(images)):
        (source / f"{number}.png").write_bytes(data)
    flags = ["--max-failed", "1", "--engine.max_num_seqs", "2"]
    assert cli.main(words(source, home / "whole", checkpoint, *flags)) == 0
    monkeypatch.setattr(sys.modules[__name__], "POISON", (source / f"{poison}.png").read_bytes())
    if where == "prepare":
        monkeypatch.setattr("captioner.views.prepare", deadly_prepare)
        flags += ["--caption.prepare_processes", str(processes)]
    else:
        monkeypatch.setattr(HFEngine, "sample", deadly_sample)
    return words(source, home / "out", checkpoint, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["prepare", "caption"])
def test_poison_becomes_a_row(
    where: str, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = poisoned_job(where, tmp_path, checkpoint, monkeypatch, images=8, poison=5, processes=2)
    assert cli.main(job) == 0
    found = {row.key: row for row in rows(tmp_path / "out")}
    bad = found.pop("5")
    assert bad.caption is None and bad.error is not None and "died" in bad.error
    assert found == {row.key: row for row in rows(tmp_path / "whole") if row.key != "5"}
    deaths = sum(worker["deaths"] for worker in status(tmp_path / "out")["workers"].values())
    assert deaths == (0 if where == "prepare" else 3)  # once at work, twice alone


@pytest.mark.slow
@pytest.mark.parametrize("where", ["prepare", "caption"])
def test_a_stalled_worker_is_killed_and_what_stalled_it_becomes_a_row(
    where: str, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs (it sleeps) is not known to be dead: nothing but the silence tells."""
    job = poisoned_job(where, tmp_path, checkpoint, monkeypatch, images=6, poison=3, processes=1)
    monkeypatch.setattr(sys.modules[__name__], "end", lambda: time.sleep(600))
    assert cli.main([*job, "--caption.stall", "3", "--caption.attempts", "1"]) == 0
    found = {row.key: row for row in rows(tmp_path / "out")}
    bad = found.pop("3")
    assert bad.caption is None and bad.error == "1 workers died at this image: nothing heard from it for 3 s"
    assert found == {row.key: row for row in rows(tmp_path / "whole") if row.key != "3"}
    assert status(tmp_path / "out")["workers"]["0"]["deaths"] >= 2  # once at work, once alone


def test_every_worker_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker's process finds in CUDA_VISIBLE_DEVICES, before any library looks there."""

    def work(settings: Settings, executor: Any, receive: Any, emit: Any) -> None:
        emit(("sees", os.environ.get(local.DEVICES), receive()))

    monkeypatch.setattr(local, "work", work)

    def seen(visible: str | None, device: str = "auto", workers: int = 3) -> list[str | None]:
        if visible is not None:
            monkeypatch.setenv(local.DEVICES, visible)
        config = Config.model_validate({"model": {"device": device}})
        pool = LocalPool(Settings(config, Path(), "m", "c"), 0)
        found: dict[int, str | None] = {}
        try:
            for number in range(workers):
                pool.start(number)
                pool.send(number, number)
            while len(found) < workers:
                for number, event in pool.poll(1.0):
                    if event[0] == "sees":
                        assert event[2] == number
                        found[number] = event[1]
        finally:
            pool.close()
        return [found[number] for number in range(workers)]

    assert seen("3,GPU-5e3d") == ["3", "GPU-5e3d", "3"]  # more workers than devices share them
    assert seen("3,GPU-5e3d", device="cpu") == ["3,GPU-5e3d"] * 3
    assert seen("") == [""] * 3  # none is to be used
    monkeypatch.delenv(local.DEVICES)
    monkeypatch.setattr(local, "devices", lambda: ["0", "1"])
    assert seen(None, workers=2) == ["0", "1"]


def test_the_last_words_of_a_worker_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it speaks and ends while others are waited for."""

    def work(settings: Settings, executor: Any, receive: Any, emit: Any) -> None:
        emit(("refused", "what", "where", "fix"))

    def others(connections: Any, seconds: float) -> list[Any]:
        for process, _ in pool._running.values():
            process.join()
        return []

    monkeypatch.setattr(local, "work", work)
    monkeypatch.setattr(local, "wait", others)
    pool = LocalPool(Settings(Config(), Path(), "m", "c"), 0)
    try:
        pool.start(0)
        events = pool.poll(1.0)
    finally:
        pool.close()
    assert events == [(0, ("refused", "what", "where", "fix")), (0, ("died", "exit code 0"))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["killed", "died", "closed", "orphaned"])
def test_what_a_worker_has_started_ends_with_it(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processes of vLLM, which would keep the memory of the device from the next worker.

    Whether a process runs is read in /proc. An orphan's coordinator sleeps until it is killed.
    """

    def work(settings: Settings, executor: Any, receive: Any, emit: Any) -> None:
        engine = subprocess.Popen(["sleep", "600"])
        emit(("started", os.getpid(), engine.pid))
        receive()

    monkeypatch.setattr(local, "work", work)

    def coordinate(connection: Any) -> None:
        pool = LocalPool(Settings(Config(), Path(), "m", "c"), 0)
        pool.start(0)
        while not (events := pool.poll(1.0)):
            pass
        [(_, (_, worker, engine))] = events
        connection.send((worker, engine))
        if end == "killed":
            pool.kill(0)
        elif end == "died":
            os.kill(worker, signal.SIGKILL)
        elif end == "closed":
            pool.close()
        else:
            time.sleep(600)
        while end != "closed" and not pool.poll(1.0):
            pass

    ours, theirs = multiprocessing.Pipe()
    coordinator = multiprocessing.get_context("fork").Process(target=coordinate, args=(theirs,))
    coordinator.start()
    worker, engine = ours.recv()
    if end == "orphaned":
        assert alive(worker) and alive(engine)
        coordinator.kill()
    coordinator.join()
    assert coordinator.exitcode == (-signal.SIGKILL if end == "orphaned" else 0)
    late = time.monotonic() + 30
    while (alive(worker) or alive(engine)) and time.monotonic() < late:
        time.sleep(0.05)
    assert not alive(worker) and not alive(engine)


@pytest.mark.slow
def test_a_shard_of_many_names_reaches_the_worker(tmp_path: Path, checkpoint: Path) -> None:
    """More names than the pipe to a worker has room for: neither side waits for the other."""
    source = tmp_path / "images"
    source.mkdir()
    for number in range(24_000):
        (source / f"an-empty-file-with-a-name-of-40-letters-{number:05d}.png").touch()
    done = subprocess.run(
        [
            sys.executable, "-c", "import sys; from loops import cli; sys.exit(cli.main(sys.argv[1:]))",
            *words(source, tmp_path / "out", checkpoint, "--caption.shard_rows", "8000", "--max-failed", "1"),
        ],
        cwd=ROOT, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = rows(tmp_path / "out")
    assert len(found) == 24_000 and {row.error for row in found} == {"empty file"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ends processes by SIGALRM")
def test_an_image_that_takes_for_ever_is_a_row(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its process busy without an end; the deadline ends the process, not the worker."""
    job = poisoned_job("prepare", tmp_path, checkpoint, monkeypatch, images=6, poison=3, processes=1)
    monkeypatch.setattr(sys.modules[__name__], "end", lambda: time.sleep(600))
    assert cli.main([*job, "--caption.prepare_seconds", "2"]) == 0
    found = {row.key: row for row in rows(tmp_path / "out")}
    assert found.pop("3").error == "took longer than 2 s to read"
    assert found == {row.key: row for row in rows(tmp_path / "whole") if row.key != "3"}
    assert status(tmp_path / "out")["workers"]["0"]["deaths"] == 0


def test_workers_that_only_die_end_the_job(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HFEngine, "sample", broken)
    monkeypatch.setattr("captioner.pipeline.coordinator.DEATHS", 3)
    assert cli.main(words(write_table(tmp_path / "a.parquet"), tmp_path / "out", checkpoint)) == 2
    assert "3 workers died, and no caption came" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.slow
def test_prepared_elsewhere_means_the_same(tmp_path: Path, checkpoint: Path) -> None:
    """Processes that prepare, other batches and another number of workers change no row."""
    source = write_table(tmp_path / "a.parquet", rows=12)
    assert cli.main(words(source, tmp_path / "one", checkpoint, *SAMPLED)) == 0
    more = ["--caption.prepare_processes", "2", "--engine.max_num_seqs", "5", "--workers", "2"]
    assert cli.main(words(source, tmp_path / "two", checkpoint, *SAMPLED, *more)) == 0
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_a_shard_that_cannot_be_read_is_named_and_not_skipped(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tars(tmp_path / "tars", shards=3)
    good = (tmp_path / "tars" / "001.tar").read_bytes()
    (tmp_path / "tars" / "001.tar").write_bytes(b"\1" * len(good))
    out = tmp_path / "out"
    assert cli.main(words(source, out, checkpoint, "--max-failed", "1")) == 3
    assert "001.tar" in capsys.readouterr().err and status(out)["state"] == "incomplete"
    assert sorted(path.name for path in out.glob("*.parquet")) == ["00000.parquet", "00002.parquet"]
    (tmp_path / "tars" / "001.tar").write_bytes(good)
    assert cli.main(words(source, out, checkpoint, "--max-failed", "1")) == 0
    assert len(rows(out)) == 15 and status(out)["state"] == "done"


@pytest.mark.slow
def test_a_cluster_of_two_nodes_writes_the_same_rows(tmp_path: Path, checkpoint: Path) -> None:
    """Its tasks prepare the images; a worker is killed, a node lost, and what began there is ended here."""
    source = write_tars(tmp_path / "tars", shards=40)
    flags = [*SAMPLED, "--max-failed", "1"]
    assert cli.main(words(source, tmp_path / "whole", checkpoint, *flags)) == 0
    out = tmp_path / "out"
    there = ["--workers", "2", "--caption.prepare_processes", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray_nodes", *words(source, out, checkpoint, *flags, *there)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=400,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # among what Ray says
    found = json.loads(line)
    tasks = ["fine", "no image", "crashed"]
    wanted = {"code": 0, "nodes": [2, 1], "killed": 1, "tasks": tasks, "in order": True}
    assert found == wanted, done.stderr[-3000:]
    assert rows(out) == rows(tmp_path / "whole")
    assert 1 <= sum(worker["deaths"] for worker in status(out)["workers"].values()) <= 3
    for shard in ("00001", "00005"):
        (out / f"{shard}.parquet").unlink()
    assert cli.main(words(source, out, checkpoint, *flags)) == 0
    assert rows(out) == rows(tmp_path / "whole")


# ---------------------------------------------------------------- names, disks, signals


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("0001", "0001"), ("a/x", "A/X"), ("a", "a.txt/b"), ("gr\u00fcn", "gru\u0308n")]
)
def test_equal_names_are_an_error_before_any_text_is_written(
    first: str, second: str, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two tars; the second image would have got the first one's file."""
    one, two = pictures(2)
    for name, key, data in (("0.tar", first, one), ("1.tar", second, two)):
        with tarfile.open(tmp_path / name, "w") as tar:
            # a dot in the last part would end the key; in a folder it does not
            tar.addfile(*member(f"{key}.png", data))
    out = tmp_path / "out"
    job = words(f"{tmp_path}/*.tar", out, checkpoint)
    assert cli.main([*job, "--format", "txt"]) == 2
    message = capsys.readouterr().err
    assert "want one file name" in message and repr(first) in message and repr(second) in message
    assert not list(out.rglob("*.txt")) and len(rows(out)) == 2
    assert cli.main([*job, "--format", "jsonl"]) == 0


def test_bad_keys_are_rows_and_their_job_can_be_redone(tmp_path: Path, checkpoint: Path) -> None:
    keys = ["a.b", "../evil", "a%2Eb", "/abs", "c" * 300, "d"]
    table = pa.table({"key": keys, "image": pictures(len(keys))})
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    job = words(tmp_path / "a.parquet", out, checkpoint, "--format", "txt", "--max-failed", "1")
    for more in ([], ["--redo"]):
        assert cli.main([*job, *more]) == 0
        assert {path.name for path in out.glob("*.txt")} == {"a.b.txt", "a%2Eb.txt", "d.txt"}
        found = {row.key: row for row in rows(out)}
        assert [key for key in keys if found[key].error] == ["../evil", "/abs"]
        assert found["../evil"].error == "its key leads out of the folder"
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.slow
def test_a_redo_that_is_cut_short_is_finished_by_the_next_job(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_table(tmp_path / "a.parquet"), tmp_path / "out"
    job = words(source, out, checkpoint, "--format", "txt")
    assert cli.main(job) == 0
    removed: list[Path] = []
    unlink = Path.unlink

    def cut_short(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".parquet" and self.parent == out:
            if removed:
                raise KeyboardInterrupt
            removed.append(self)
        unlink(self, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", cut_short)
        assert cli.main([*job, "--redo"]) == 130
    assert removed and list(out.glob("*.parquet"))
    assert cli.main(words(source, out, checkpoint)) == 0
    assert len(rows(out)) == 26 and not list(out.glob("*.txt")) and not (out / ".removing").exists()


FULL = """
import resource, sys
import captioner.pipeline.output
from loops import cli
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit stands for a full disk")
def test_a_disk_that_is_full_is_told_and_the_job_goes_on(tmp_path: Path, checkpoint: Path) -> None:
    source, out = write_tars(tmp_path / "tars"), tmp_path / "out"
    job = words(source, out, checkpoint, "--max-failed", "1")
    assert cli.main([*job[:3], str(tmp_path / "whole"), *job[4:]]) == 0
    for limit, code in ((1000, 2), (0, 0)):
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(limit), *job],
            cwd=ROOT,
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr[-2000:]
        assert ("the disk refuses: File too large" in done.stderr) == (code == 2)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert rows(out) == rows(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EROFS])
def test_a_disk_that_cannot_be_locked_or_written_is_told(
    number: int,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf" if number != errno.EROFS else "os.replace", refuse)
    assert cli.main(words(write_table(tmp_path / "a.parquet"), tmp_path / "out", checkpoint)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert ("no locks on this file system" if number != errno.EROFS else "the disk refuses") in message


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_job_and_it_goes_on(
    number: signal.Signals, tmp_path: Path, checkpoint: Path, zygote: Zygote
) -> None:
    source, out = write_tars(tmp_path / "tars", shards=96), tmp_path / "out"
    job = words(source, out, checkpoint, "--max-failed", "1")
    pid = zygote.start(job)
    while not list(out.glob("*.parquet")):
        assert zygote.ended(0.01) is None
    workers = children(pid)
    os.kill(pid, number)
    assert zygote.ended(60) == 128 + number
    assert status(out)["state"] == "interrupted"
    assert not any(map(alive, workers))
    zygote.start(job)
    assert zygote.ended(60) == 0
    assert len(rows(out)) == 480 and status(out)["state"] == "done"


def test_passwords_of_servers_are_printed_and_stored_nowhere(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_table(tmp_path / "a.parquet"), tmp_path / "out"
    url = "http://somebody:s3cret@127.0.0.1:9/v1"
    flags = ["--engine.type", "server", "--engine.urls", url, "--engine.wait", "0"]
    assert cli.main(words(source, out, checkpoint, *flags)) == 2
    assert cli.main(words(source, out, checkpoint, *flags, "--dry-run")) == 0
    assert cli.main(words(source, out, checkpoint, *flags, "--engine.retries", "many")) == 2
    printed = "".join(capsys.readouterr())
    assert "http://***@127.0.0.1:9/v1" in printed
    Run.open(tmp_path / "run", Config.model_validate({"engine": {"urls": [url]}}))
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"s3cret" in text for text in [printed.encode(), *texts])


# ---------------------------------------------------------------- what is written beside the rows


def caption_row(number: int, caption: str | None = None, **more: Any) -> CaptionRow:
    made: dict[str, Any] = dict(
        id=str(number),
        key=str(number),
        caption=caption,
        finish_reason="stop",
        tokens=5,
        model="m",
        config="c",
    )
    return CaptionRow(**made | more)


def test_a_journal_without_its_last_lines_is_fixed(tmp_path: Path) -> None:
    output = Output(tmp_path)
    for shard in range(4):
        made = [caption_row(shard, "x"), caption_row(9, error="too small: 1 px")]
        output.shards.write(shard, made)
        output.enter(shard, Tally.of(made))
    journal = tmp_path / ".shards.jsonl"
    whole = journal.read_text()
    for cut in (0, 10, len(whole) - 1, len(whole) - len(whole) // 4):
        journal.write_text(whole[:cut])
        again = Output(tmp_path)
        assert again.tally == output.tally == Tally(8, 4, 0, 40, 0, {"too small": 4})
        assert again.done == {0, 1, 2, 3} and len(journal.read_text().splitlines()) == 4
    (tmp_path / "00002.parquet").unlink()  # its line is of no use any more
    assert Output(tmp_path).done == {0, 1, 3} and Output(tmp_path).tally.rows == 6


def test_the_status_file_and_prometheus_say_what_is_done(tmp_path: Path, checkpoint: Path) -> None:
    source, out = write_tars(tmp_path / "tars"), tmp_path / "out"
    flags = ["--max-failed", "1", "--caption.prometheus", str(tmp_path / "job.prom")]
    assert cli.main(words(source, out, checkpoint, *flags)) == 0
    found = status(out)
    assert found["images"] == {"total": 30, "before": 0, "done": 30, "failed": 1}
    assert found["shards"] == {"total": 6, "done": 6} and found["state"] == "done"
    assert found["workers"]["0"]["images"] == 30 and found["images_per_s"] > 0 and found["tokens_per_s"] > 0
    assert found["workers"]["0"]["images_per_s"] == found["images_per_s"]  # of the one worker
    lines = dict(
        line.rsplit(" ", 1) for line in (tmp_path / "job.prom").read_text().splitlines() if line[0] != "#"
    )
    assert lines["captioner_images_done"] == "30" and lines["captioner_images_failed"] == "1"
    assert lines["captioner_running"] == "0" and lines['captioner_worker_images{worker="0"}'] == "30"
    assert lines['captioner_worker_deaths{worker="0"}'] == "0"
    assert float(lines['captioner_worker_images_per_second{worker="0"}']) == found["images_per_s"]


def test_another_job_cannot_use_the_output(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one is a process that sleeps while it holds the lock."""
    out = tmp_path / "out"
    assert cli.main(words("scenes:test:2", out, checkpoint)) == 0
    before = rows(out)
    code = (
        f"import time; from pathlib import Path; from captioner.runs import lock\n"
        f"held = lock(Path({str(out)!r})); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for more in ([], ["--redo"]):
            assert cli.main(words("scenes:test:2", out, checkpoint, *more)) == 2
            assert "another process works in this output" in capsys.readouterr().err
            assert rows(out) == before
    finally:
        holder.kill()
        holder.wait()


def test_estimate_names_the_slowest_stage_and_writes_nothing(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_table(tmp_path / "a.parquet")
    assert cli.main(words(source, tmp_path / "out", checkpoint, "--estimate", "6")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("6 images sampled, 0 of them failed, 6 tokens a caption")
    assert printed.count("<- slowest") == 1 and "26 images: " in printed and "device-hours" in printed
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["read", "prepare", "caption"]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- quality


@pytest.mark.slow
def test_verified_captions_have_columns_and_refuted_statements_go(tmp_path: Path) -> None:
    source = "scenes:test:6"
    checkpoint_flags = ["--checkpoint", "scenes-base", "--caption.sampling.max_tokens", "60"]
    plain, out, dropped = tmp_path / "plain", tmp_path / "out", tmp_path / "dropped"
    base = ["caption", source, *checkpoint_flags, "--caption.prepare_processes", "0"]
    assert cli.main([*base, "--out", str(plain)]) == 0
    assert cli.main([*base, "--out", str(out), "--verify"]) == 0
    found = rows(out)
    assert [row.caption for row in found] == [row.caption for row in rows(plain)]
    assert all(row.p_yes and len(row.p_yes) == len(row.statements or []) for row in found)
    assert all(row.p_yes is None for row in rows(plain))
    every = sorted(p for row in found for p in row.p_yes or [])
    middle = every[len(every) // 2]
    assert cli.main([*base, "--out", str(dropped), "--drop-refuted", "--caption.drop", str(middle)]) in (0, 3)
    for before, after in zip(found, rows(dropped), strict=True):
        assert (after.statements, after.p_yes) == (before.statements, before.p_yes) or after.caption is None
        pairs = zip(before.statements or [], before.p_yes or [], strict=True)
        refuted = {normalise(text) for text, p in pairs if p < middle}
        assert after.caption == (without(before.caption or "", refuted.__contains__) or None)
    assert any(a.caption != b.caption for a, b in zip(found, rows(dropped), strict=True))


def test_of_several_captions_the_one_with_the_most_confirmed_statements_stays(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen as by hand, from the same samples and answers of the engine."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number, data in enumerate(pictures(6)):
        (images / f"{number}.png").write_bytes(data)
    flags = [*SAMPLED, "--caption.sampling.max_tokens", "20", "--max-failed", "1", "--caption.best_of", "3"]
    assert cli.main(words(images, out, checkpoint, *flags)) == 2
    assert "add --verify" in capsys.readouterr().err and not out.exists()
    assert cli.main(words(images, out, checkpoint, *flags, "--verify")) == 0
    config = Config()
    engine = make_engine(checkpoint, config)
    sampling = config.caption.sampling.model_copy(update={"temperature": 1.0, "max_tokens": 20})
    found = rows(out)
    chosen = []
    for row in found:
        path = images / f"{row.key}.png"
        [candidates] = engine.sample([CaptionRequest(row.key, path, row.id)], 3, sampling)
        lists = [split_statements(candidate.text) for candidate in candidates]
        asked = [Rules().decompose(text).text for texts in lists for text in texts]
        [answers] = engine.p_yes([QuestionBatch(path, asked)])
        said = iter(answer.p_yes for answer in answers)
        p_yes = [[next(said) for _ in texts] for texts in lists]
        scores = [sum(p - 0.5 for p in values) for values in p_yes]
        chosen.append(scores.index(max(scores)))
        assert (row.caption, row.statements) == (candidates[chosen[-1]].text, lists[chosen[-1]])
        assert row.p_yes == pytest.approx(p_yes[chosen[-1]], abs=1e-5)
    assert len(found) == 6 and len(set(chosen)) > 1


def test_a_caption_without_answers_gives_way_to_one_with() -> None:
    def judged(*samples: tuple[str, float]) -> CaptionRow:
        """The row of an image with these captions, each one statement and P(yes)."""
        candidates = [
            Candidate(
                sample="s", key="k", k=k, text=text, finish_reason="stop", mean_logprob=0.0, tokens=1, seed=0
            )
            for k, (text, _) in enumerate(samples)
        ]
        answers = [YesNo(p, 1.0) for text, p in samples if text]
        engine: Any = SimpleNamespace(
            renderer=SimpleNamespace(spec=None),
            sample=lambda *args: iter([candidates]),
            p_yes=lambda batches: iter([answers]),
        )
        settings = Settings(Config(), Path(), "m", "c", verify=True)
        [row] = Worker(settings, engine, Inline(2), lambda: None, lambda event: None).caption([(Any, "s")])
        return row

    assert judged(("red", 0.2), ("blue", 0.9), ("green", 0.9)).caption == "blue"
    assert judged(("red", math.nan), ("blue", 0.1)).caption == "blue"
    assert judged(("", 0.0), ("blue", 0.1)).caption == "blue"
    assert judged(("", 0.0), ("blue", math.nan)).error == "the verifier gave no answer"
    assert judged(("", 0.0), ("", 0.0)).error == "the model wrote no caption"


def test_tripwires_trip_and_only_then() -> None:
    config = TripwireConfig(rows=100)

    def judged(texts: list[str | None], **more: Any) -> str:
        wires = Tripwires(config)
        return "; ".join(wires.see(caption_row(i, text, **more) for i, text in enumerate(texts)))

    good = [f"red circle {i}, blue square" for i in range(100)]
    assert judged(good) == ""
    assert "one and the same caption: 'a'" in judged(["a"] * 5 + good[5:])
    assert "refuse to caption" in judged([f"I'm sorry, I cannot see {i}" for i in range(3)] + good[3:])
    assert judged([f"a sign that says I'm sorry, {i}" for i in range(3)] + good[3:]) == ""
    assert "cut by the token limit" in judged(good, finish_reason="length")
    loops = [f"{i} a red ball on a red ball on a red ball on a red ball on a red ball" for i in range(5)]
    assert "repeat themselves" in judged(loops + good[5:])
    empty = [caption_row(i, error="the model wrote no caption") for i in range(3)]
    assert "are empty" in "; ".join(
        Tripwires(config).see(empty + [caption_row(i, t) for i, t in enumerate(good[3:])])
    )
    wires = Tripwires(config)
    assert wires.see(caption_row(i, t) for i, t in enumerate(good)) == []
    late = wires.see(caption_row(i, t, tokens=12) for i, t in enumerate(good))
    assert late == ["captions became 12 tokens long on average; they were 5"]
    copies = [caption_row(0, "a") for _ in range(50)] + [
        caption_row(i, t) for i, t in enumerate(good[50:], 1)
    ]
    assert Tripwires(config).see(copies) == []  # of one image
    colors = [f"a red ball {i}, a blue ball, a red cube, a blue cube, a large ring" for i in range(100)]
    assert judged(colors) == ""


def test_a_tripwire_stops_the_job_and_it_goes_on(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_table(tmp_path / "a.parquet"), tmp_path / "out"
    flags = words(source, out, checkpoint, "--caption.tripwires.rows", "10")
    assert cli.main([*flags, "--caption.tripwires.action", "stop"]) == 3
    assert "are cut by the token limit" in capsys.readouterr().err and status(out)["state"] == "stopped"
    assert cli.main(flags) == 0
    assert len(rows(out)) == 26 and "tripwire: " in capsys.readouterr().err
