"""Input and output in an object store: a real server (moto's) on this machine, and a real client."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import CaptionConfig
from captioner.errors import DataError, RunError
from captioner.pipeline.local import Inline
from captioner.pipeline.mirror import Mirror
from captioner.pipeline.prepare import Preparation
from captioner.sources.folder import read_captions
from captioner.sources.places import Unreachable, gone, matching, open_bytes, place
from captioner.sources.source import open_source, read_shard
from captioner.views import BadImage
from tests import test_resume
from tests.test_resume import SPEC, Job, png

s3fs = pytest.importorskip("s3fs", reason="the extra s3 is not installed")
moto = pytest.importorskip("moto.server", reason="moto is not installed")
job = test_resume.job  # a fixture


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    found = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def bucket(server: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Puts a local file into a bucket of this test, and says its address."""
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    name = request.node.name.split("[")[0].replace("_", "-")[:60].strip("-")
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.makedirs(name, exist_ok=True)

    def put(path: Path, key: str) -> str:
        store.put_file(str(path), f"{name}/{key}")
        return f"s3://{name}/{key}"

    return put


def tar(path: Path, images: range) -> Path:
    with tarfile.open(path, "w") as file:
        for number in images:
            data = png(number) if number != 3 else b"no image"
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def written(home: Path) -> dict[str, list[Path]]:
    """The same images as tars, as Parquet with bytes and with paths, and as a list, with what these name."""
    names = [f"{n}.png" for n in range(8)]
    for number, name in enumerate(names):
        (home / name).write_bytes(png(number))
    tars = [tar(home / f"{i}.tar", range(5 * i, 5 * i + 5)) for i in range(2)]
    table = pa.table({"key": names, "image": [png(n) for n in range(8)]})
    pq.write_table(table, home / "bytes.parquet", row_group_size=3)
    cells = [*names, "../up.png", "/etc/hostname", "hf://x/y.png", "s3://other/x.png", "gone.png"]
    pq.write_table(pa.table({"path": cells}), home / "paths.parquet", row_group_size=5)
    (home / "list.txt").write_text("\n".join([*names, "s3://other/x.png", "gone.png"]))
    files = [home / name for name in names]
    return {
        "tars": tars,
        "bytes": [home / "bytes.parquet"],
        "paths": [home / "paths.parquet", *files],
        "list": [home / "list.txt", *files],
    }


SPECS = {"tars": "d/{0,1}.tar", "bytes": "d/byte?.parquet", "paths": "d", "list": "d/list.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SPECS))
def test_a_job_over_a_store_has_the_rows_of_a_local_one(
    kind: str, job: Job, bucket: Any, tmp_path: Path
) -> None:
    """Two workers that were forked; what leads out of the folder, or to another bucket, is a failed row."""
    home = tmp_path / "d"
    home.mkdir()
    addresses = [bucket(path, f"{kind}/d/{path.name}") for path in written(home)[kind]]
    local = str(tmp_path / SPECS[kind]) if kind != "paths" else str(home / "paths.parquet")
    assert job.run("--workers", "2", source=local) == 0
    wanted, job.out = job.rows, tmp_path / "remote"
    there = f"{addresses[0].partition('/d/')[0]}/{SPECS[kind]}"
    assert job.run("--workers", "2", source=there) == 0
    found = job.rows
    assert {key: (row.id, row.caption) for key, row in found.items() if row.caption} == {
        key: (row.id, row.caption) for key, row in wanted.items() if row.caption
    }
    assert len(found) == len(wanted) == {"tars": 10, "bytes": 8, "paths": 13, "list": 10}[kind]
    assert job.run(source=there) == 0 and not any(row.caption for row in found.values() if row.error)
    assert set(job.asked) == set()  # unchanged: nothing is captioned again


def test_what_changed_in_a_store_is_captioned_and_nothing_else(job: Job, bucket: Any, tmp_path: Path) -> None:
    for number in range(2):
        address = bucket(
            tar(tmp_path / f"{number}.tar", range(10 * number, 10 * number + 3)), f"{number}.tar"
        )
    spec = address.replace("1.tar", "*.tar")
    assert job.run(source=spec) == 0 and len(job.rows) == 6
    bucket(tar(tmp_path / "1.tar", range(11, 14)), "1.tar")
    assert job.run(source=spec) == 0
    assert job.asked == ["013"] and set(job.rows) == {"000", "001", "002", "011", "012", "013"}


@pytest.mark.parametrize(
    "spec", ["s3://b/x.tar::file:///etc/hostname", "s3://nowhere-at-all/x.tar", "gs://b/x.tar", "s3://"]
)
def test_addresses_that_are_none_are_errors(spec: str, bucket: Any) -> None:
    with pytest.raises(DataError):
        list(open_source(spec))


def test_a_store_that_breaks_off_is_no_fault_of_an_image(bucket: Any, server: Any, tmp_path: Path) -> None:
    """The server stops between two members of a tar larger than what is read ahead."""
    rest = os.urandom(20 << 20)
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, data in (("0.png", png(0)), ("1.bin", rest), ("2.png", png(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    address = bucket(tmp_path / "a.tar", "a.tar")
    [shard] = open_source(address)
    items = read_shard(shard)
    assert next(items).key == "0"
    _, port = server.get_host_and_port()
    server.stop()
    try:
        with pytest.raises(DataError, match="cannot be read to its end"):
            list(items)
        with pytest.raises(DataError):
            list(read_shard(shard))
    finally:
        server._port = port
        server.start()
    assert [item.key for item in read_shard(shard)] == ["0", "1", "2"]


def test_a_store_that_gives_no_answer_is_waited_for(bucket: Any, server: Any, tmp_path: Path) -> None:
    """With a clock of its own: the server is back when the second wait is over."""
    waits: list[float] = []
    (tmp_path / "a.png").write_bytes(png(0))
    paths = [place(bucket(tmp_path / "a.png", f"{number}.png")) for number in range(4)]
    _, port = server.get_host_and_port()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            server._port = port
            server.start()

    images = Preparation(CaptionConfig(), Inline(1), SPEC, sleep=sleep)
    ready = images.ahead(paths, lambda path: path)
    found = [next(ready)]
    server.stop()
    found += ready
    assert [path for path, _ in found] == paths and len(waits) == 2
    assert not any(isinstance(result, BadImage) for _, result in found)
    assert gone(place("s3://no-such-bucket-at-all/x.png"))


def test_conditional_puts_create_only_once(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    path = place(bucket(tmp_path / "a", "a"))
    with pytest.raises(FileExistsError):
        path.fs.pipe_file(path.path, b"b", mode="create")  # type: ignore[attr-defined]
    assert open_bytes(path).read() == b"a"
    with pytest.raises((Unreachable, OSError)):
        open_bytes(place(str(path) + "-not-there"))
    assert [found.name for found in matching(f"{str(path)[:-1]}*")] == ["a"]


# ---------------------------------------------------------------- output

KILLED = """
import os, signal, sys
from captioner.pipeline.mirror import Mirror
part = Mirror.part

def deadly(self, path):
    if path.stem != "00001":
        return part(self, path)
    if when == "behind":
        part(self, path)
    os.kill(os.getpid(), signal.SIGKILL)

Mirror.part = deadly
when = sys.argv[1]
""" + test_resume.JOB.replace("sys.argv[1]", "sys.argv[2]").replace("sys.argv[2:]", "sys.argv[3:]")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_output_in_a_store_of_a_job_that_is_killed_at_a_put(
    when: str, job: Job, bucket: Any, tmp_path: Path
) -> None:
    """The same command goes on, and one on another machine; the rows are those of a local job."""
    assert job.run() == 0
    wanted = job.rows
    there = bucket(tmp_path / "checkpoint" / "weights", f"{when}/x").removesuffix("/x")
    store = s3fs.S3FileSystem()
    job.out = there  # type: ignore[assignment]
    here = ["--caption.work", str(tmp_path / "work"), "--workers", "2"]
    command = [sys.executable, "-c", KILLED, when, str(job.home), *job.words(*here)]
    assert subprocess.run(command, cwd=test_resume.ROOT, check=False).returncode == -signal.SIGKILL
    assert job.run(*here) == 0

    def rows() -> dict[str, Any]:
        found = tmp_path / "found"
        shutil.rmtree(found, ignore_errors=True)
        store.invalidate_cache()
        store.get(store.glob(f"{there}/*.parquet"), str(found) + "/")
        return {row.key: row for row in read_captions(found)}

    assert rows() == wanted
    assert {"report.html", ".job.json"} <= {name.rpartition("/")[2] for name in store.ls(there, refresh=True)}
    elsewhere = ["--caption.work", str(tmp_path / "elsewhere")]
    assert job.run(*elsewhere) == 0 and job.asked == []
    store.rm(f"{there}/00002.parquet")
    shutil.rmtree(tmp_path / "elsewhere")
    assert job.run(*elsewhere) == 0 and set(job.asked) == {"8", "9"}
    assert rows() == wanted


@pytest.mark.slow
def test_two_jobs_do_not_write_into_one_store(
    job: Job, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.out = Path(bucket(tmp_path / "checkpoint" / "weights", "out/x").removesuffix("/x"))
    assert job.run("--caption.work", str(tmp_path / "a")) == 0
    assert job.run("--caption.work", str(tmp_path / "b"), "--seed", "5") == 2  # other settings
    assert "begun with another config" in capsys.readouterr().err
    mirror = Mirror(str(job.out).replace(":/", "://"), tmp_path / "a")
    mirror.part(tmp_path / "a" / "00000.parquet")  # as a command does whose last one was killed
    with pytest.raises(RunError, match="another job has put other captions there"):
        shutil.copy(tmp_path / "a" / "00001.parquet", tmp_path / "a" / "00000.parquet")
        mirror.part(tmp_path / "a" / "00000.parquet")
    job.picture("new.png", 77)
    assert job.run("--caption.work", str(tmp_path / "a")) == 2
    assert "the input has changed" in capsys.readouterr().err
    assert job.run("--redo") == job.run("--format", "txt") == 2
