"""Jobs that are begun again: after faults of the world, with another input, by several machines at once.

The engine is a spy without a model: it says what each image's bytes are, and notes what it is asked about.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner import views
from captioner.config import CaptionConfig, Config, SamplingConfig, ViewsConfig
from captioner.engines import NO_ANSWER, CaptionRequest, QuestionBatch, YesNo
from captioner.errors import RunError
from captioner.pipeline import stages
from captioner.pipeline.leases import Leases
from captioner.pipeline.local import Inline
from captioner.pipeline.output import Log, Output
from captioner.pipeline.prepare import Preparation
from captioner.records import Candidate, CaptionRow
from captioner.sources.folder import ImageRow, read_captions, read_folder
from captioner.sources.source import open_source
from captioner.views import BadImage, Cut, ViewSpec
from loops import cli

ROOT = Path(__file__).resolve().parent.parent
JOIN = ["--caption.join", "true"]
FLAGS = ["--caption.shard_rows", "4", "--caption.prepare_processes", "0", "--max-failed", "1"]


class Spy:
    """Says "caption of SHA". In ``home``: `asked` gets the keys, and other files make it fail."""

    renderer = SimpleNamespace(spec=ViewSpec(ViewsConfig(), 64, 16))

    def __init__(self, home: Path):
        self.home = home

    def sample(self, requests: Iterator[CaptionRequest], n: int, sampling: SamplingConfig) -> Iterator[Any]:
        for request in requests:
            with (self.home / "asked").open("a") as file:
                file.write(request.key + "\n")
            made = dict(finish_reason="stop", mean_logprob=0.0, tokens=3, seed=0)
            made["text"] = f"caption of {request.sample_id[:12]}"
            if (self.home / "no-answer").exists() and request.key in (self.home / "no-answer").read_text():
                made |= dict(finish_reason=f"error: {NO_ANSWER}the server answers 500", text="")
            if (self.home / "silent").exists() and request.key in (self.home / "silent").read_text():
                made["text"] = ""
            if (self.home / "deadly").exists() and request.key == (self.home / "deadly").read_text():
                (self.home / "deadly").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            yield [Candidate(sample=request.sample_id, key=request.key, k=k, **made) for k in range(n)]

    def close(self) -> None:
        pass


class Job:
    """A caption job with a spy for an engine, over a folder of images."""

    def __init__(self, home: Path):
        self.home, self.images, self.out = home, home / "images", home / "out"
        (home / "checkpoint").mkdir()
        (home / "checkpoint" / "weights").write_bytes(b"none")

    def run(self, *more: str, source: str | Path | None = None) -> int:
        (self.home / "asked").write_text("")
        return cli.main(self.words(*more, source=source))

    def words(self, *more: str, source: str | Path | None = None) -> list[str]:
        words = ["caption", str(source or self.images), "--out", str(self.out), *FLAGS, *more]
        return [*words, "--checkpoint", str(self.home / "checkpoint")]

    @property
    def asked(self) -> list[str]:
        return (self.home / "asked").read_text().split("\n")[:-1]

    @property
    def rows(self) -> dict[str, CaptionRow]:
        return {row.key: row for row in read_captions(self.out)}

    def picture(self, name: str, seed: int) -> None:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("captioner.pipeline.worker.make_engine", lambda *args: Spy(tmp_path))
    made = Job(tmp_path)
    for number in range(10):
        made.picture(f"{number}.png", number)
    return made


# ---------------------------------------------------------------- whose fault it is


def test_faults_of_the_world_are_tried_again_and_those_of_images_are_not(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.home / "no-answer").write_text("3 7")
    (job.home / "silent").write_text("5")
    (job.images / "8.png").write_bytes(b"no image")
    (job.images / "9.png").unlink()
    (job.images / "9.png").symlink_to(job.home / "nowhere")
    assert job.run() == 0
    faults = {key: row.fault for key, row in job.rows.items() if row.error}
    assert faults == {"3": "world", "5": "image", "7": "world", "8": "image", "9": "world"}
    assert "3 images failed by no fault of theirs" in capsys.readouterr().out
    (job.home / "no-answer").unlink()
    assert job.run() == 0
    assert sorted(job.asked) == ["3", "7"]  # the file that is not there gives nothing to ask about
    assert {key for key, row in job.rows.items() if row.error} == {"5", "8", "9"}
    (job.home / "silent").unlink()
    assert job.run() == 0 and job.asked == []
    assert job.run("--retry-failed") == 0 and job.asked == ["5"]
    assert Output(job.out).tally.failed == 2 and len(job.rows) == 10


@pytest.mark.slow
def test_a_server_that_answers_nobody_stops_the_job_and_spoils_no_row(job: Job) -> None:
    for number in range(100, 200):
        job.picture(f"{number}.png", number)
    (job.home / "no-answer").write_text(" ".join(str(n) for n in range(200)))
    assert job.run() == 2
    assert 32 <= len(job.asked) < 60  # not all the others
    (job.home / "no-answer").unlink()
    assert job.run() == 0
    assert len(job.rows) == 110 and not any(row.error for row in job.rows.values())


SPEC = ViewSpec(ViewsConfig(), 64, 16)


def test_a_disk_that_is_gone_is_waited_for(job: Job) -> None:
    """With a clock of its own: the disk is back when the third wait is over."""
    waits: list[float] = []
    said: list[str] = []
    away = job.home / "unmounted"

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            job.images.rmdir()
            away.rename(job.images)

    paths = sorted(job.images.iterdir())
    images = Preparation(CaptionConfig(), Inline(2), SPEC, said.append, sleep)
    ready = images.ahead(paths, lambda path: path)
    found = [next(ready)]
    job.images.rename(away)
    job.images.mkdir()  # the empty folder that a mount leaves
    found += ready
    assert [path for path, _ in found] == paths
    assert not any(isinstance(result, BadImage) for _, result in found)
    assert len(waits) == 3 and waits == sorted(waits) and len(said) == 3 and "looking again in" in said[0]


def test_a_disk_that_stays_away_stops_the_job(job: Job) -> None:
    images = Preparation(CaptionConfig(outage=0), Inline(2), SPEC, sleep=lambda seconds: None)
    paths = sorted(job.images.iterdir())
    shutil.rmtree(job.images)
    with pytest.raises(RunError, match="the input has been gone"):
        list(images.ahead(paths, lambda path: path))


def test_one_file_that_is_gone_is_no_outage(job: Job) -> None:
    images = Preparation(CaptionConfig(outage=0), Inline(2), SPEC, sleep=lambda seconds: None)
    paths = sorted(job.images.iterdir())
    paths[4].unlink()
    results = [result for _, result in images.ahead(paths, lambda path: path)]
    bad = [result for result in results if isinstance(result, BadImage)]
    assert len(results) == 10 and [(each.reason, each.world) for each in bad] == [("no such file", True)]


# ---------------------------------------------------------------- another input


def test_what_is_new_or_changed_is_captioned_and_nothing_else(job: Job) -> None:
    assert job.run("--format", "txt") == 0 and len(job.asked) == 10
    before = job.rows
    job.picture("55.png", 55)  # in the middle of the listing, so that every later shard holds other images
    stat = (job.images / "3.png").stat()
    job.picture("3.png", 33)
    os.utime(job.images / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    (job.images / "0.png").unlink()
    (job.images / "7.png").rename(job.images / "70.png")
    os.utime(job.images / "8.png")  # touched, and the same
    assert job.run("--format", "txt") == 0
    assert sorted(job.asked) == ["3", "55"]
    after = job.rows
    assert set(after) == {"1", "2", "3", "4", "5", "55", "6", "70", "8", "9"}
    assert after["70"].caption == before["7"].caption and after["3"].caption != before["3"].caption
    assert {path.stem for path in job.out.glob("*.txt")} == set(after)
    assert not (job.out / ".old").exists()


def test_a_moved_input_is_no_change(job: Job) -> None:
    assert job.run() == 0
    times = {path: path.stat().st_mtime_ns for path in job.out.glob("*.parquet")}
    job.images.rename(job.home / "elsewhere")
    assert job.run(source=job.home / "elsewhere") == 0
    assert job.asked == [] and times == {path: path.stat().st_mtime_ns for path in times}


def write_tar(path: Path, seeds: range) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            info = tarfile.TarInfo(f"{seed}.png")
            info.size = len(png(seed))
            tar.addfile(info, io.BytesIO(png(seed)))


def test_a_tar_more_leaves_the_parts_of_the_others(job: Job) -> None:
    for number in (1, 2):
        write_tar(job.home / f"tars/{number}.tar", range(number * 10, number * 10 + 5))
    source = f"{job.home}/tars/*.tar"
    assert job.run(source=source) == 0
    parts = [path.read_bytes() for path in sorted(job.out.glob("*.parquet"))]
    write_tar(job.home / "tars/0.tar", range(5))
    assert job.run(source=source) == 0
    assert job.asked == [str(seed) for seed in range(5)]
    assert [path.read_bytes() for path in sorted(job.out.glob("*.parquet"))][1:] == parts
    assert job.run(source=source) == 0 and job.asked == []


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("step", ["rename", "replace"])
def test_a_change_that_is_cut_short_costs_no_caption(
    job: Job, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each of the steps in which the parts of the old input are put away and taken back."""
    assert job.run() == 0
    job.picture("55.png", 55)
    real = getattr(os, step)
    for allowed in range(8):
        count = 0

        def cut_short(*args: Any, allowed: int = allowed, **more: Any) -> None:
            nonlocal count
            count += 1
            if count > allowed:
                raise KeyboardInterrupt
            real(*args, **more)

        with monkeypatch.context() as patched:
            patched.setattr(os, step, cut_short)
            patched.setattr("captioner.pipeline.coordinator.Coordinator.run", interrupted)
            job.run()
    assert job.run() == 0
    assert job.asked in (["55"], [])  # it may have been captioned before a cut
    assert len(job.rows) == 11 and all(row.caption for row in job.rows.values())


# ---------------------------------------------------------------- within a shard


def test_a_worker_that_dies_in_a_shard_loses_what_it_had_in_hand(job: Job) -> None:
    for number in range(10, 100):
        job.picture(f"{number}.png", number)
    (job.home / "deadly").write_text("90")
    flags = ["--caption.shard_rows", "1000", "--engine.max_num_seqs", "1"]
    assert job.run(*flags) == 0
    times = Counter(job.asked)
    assert len(job.rows) == 100 and not any(row.error for row in job.rows.values())
    assert set(times) == set(job.rows) and sum(times.values()) <= 100 + 65  # rows are written 64 at a time


JOB = """
import sys
from pathlib import Path
import captioner.pipeline.worker as worker
from tests.test_resume import Spy
worker.make_engine = lambda *args: Spy(Path(sys.argv[1]))
from loops import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def start(job: Job, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOB, str(job.home), *job.words(*more)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_part_that_its_worker_did_not_tell_of_is_not_made_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies behind the second publication, and before its word."""
    remove = Log.remove

    def deadly(self: Log) -> None:
        remove(self)
        if self.path.stem == "00001" and not (job.home / "dead").exists():
            (job.home / "dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Log, "remove", deadly)
    assert job.run() == 0 and (job.home / "dead").exists()
    assert all(Counter(job.asked)[str(n)] == 1 for n in range(8)) and len(job.rows) == 10
    assert Output(job.out).tally.rows == 10


@pytest.mark.slow
def test_a_job_that_is_killed_in_a_shard_keeps_its_rows(job: Job) -> None:
    for number in range(10, 3000):
        job.picture(f"{number}.png", number)
    (job.home / "asked").write_text("")
    flags = ["--caption.shard_rows", "5000"]
    process = start(job, *flags)
    log = job.out / ".work" / "00000.jsonl"
    while not (log.is_file() and log.stat().st_size > 50_000):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not list(job.out.glob("*.parquet"))
    before = len(job.asked)
    assert job.run(*flags) == 0
    assert len(job.rows) == 3000 and len(job.asked) < 3000 - before + 300
    assert not any(row.error for row in job.rows.values())


# ---------------------------------------------------------------- several machines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_claims_pass_from_the_dead_to_the_living(tmp_path: Path) -> None:
    """Each has a clock of its own, and the two clocks have nothing to do with each other."""
    one, two = Clock(), Clock()
    two.now = 1e6
    first, second = Leases(tmp_path, one, expire=100), Leases(tmp_path, two, expire=100)
    assert first.claim(3) and not second.claim(3) and second.claim(4) and first.claim(3)
    for _ in range(30):  # both live on: nothing changes hands
        one.now += 50
        two.now += 50
        first.beat()
        second.beat()
        assert not first.claim(4) and not second.claim(3)
    two.now += 99  # the first one is silent from here on
    assert not second.claim(3)
    two.now += 2
    assert second.claim(3) and not first.claim(3)
    second.release(3)
    assert first.claim(3)


def test_a_claim_of_somebody_unknown_expires(tmp_path: Path) -> None:
    clock = Clock()
    leases = Leases(tmp_path, clock, expire=100)
    (tmp_path / "00007").write_text("another machine")
    assert not leases.claim(7)
    clock.now += 101
    assert leases.claim(7)


@pytest.mark.slow
def test_machines_that_join_share_the_shards(job: Job) -> None:
    """Two commands at once; a third finds nothing to do. No image is captioned twice."""
    for number in range(10, 120):
        job.picture(f"{number}.png", number)
    (job.home / "asked").write_text("")
    both = [start(job, *JOIN) for _ in range(2)]
    ends = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert Counter(job.asked) == Counter(str(number) for number in range(120))
    assert len(job.rows) == 120 and len(list(job.out.glob("*.parquet"))) == 30
    assert job.run(*JOIN) == 0 and job.asked == []
    assert job.run(*JOIN, "--redo") == 2
    assert job.run() == 0 and job.asked == []


# ---------------------------------------------------------------- every file of a folder


def test_every_file_of_a_folder_is_accounted_for(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pillow_heif")
    Image.open(io.BytesIO(png(1))).resize((64, 64)).save(job.images / "phone.HEIC", "HEIF")
    (job.images / "new.jxl").write_bytes(b"\xff\x0a rest")
    for name in ("raw.dng", "a.md", "b.md", "film.mp4"):
        (job.images / name).write_text("no image by its name, or none that is read")
    (job.images / "3.txt").write_text("a caption of 3.png, which is no image")
    assert job.run() == 0
    rows = job.rows
    assert rows["phone"].caption and len(rows) == 13
    assert "JPEG XL" in (rows["new"].error or "") and "raw file" in (rows["raw"].error or "")
    assert "3 files are not taken for images, by their extension: 2 .md, 1 .mp4" in capsys.readouterr().out


def test_without_its_library_a_photograph_of_a_phone_is_a_row_that_names_it(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.heic", "HEIF")
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from pathlib import Path; from captioner.views import BadImage, load_image\n"
        "try: load_image(Path(sys.argv[1]))\n"
        "except BadImage as error: print(error.reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.heic")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "HEIC, for which pillow-heif is missing (pip install 'captioner[heif]')\n", (
        done.stderr
    )


def test_rows_of_a_table_that_changed_are_found_by_their_bytes(job: Job) -> None:
    path = job.home / "a.parquet"
    columns = {"key": [str(n) for n in range(20)], "image": [png(n) for n in range(20)]}
    pq.write_table(pa.table(columns), path, row_group_size=5)
    assert job.run(source=path) == 0
    columns["image"][7] = png(77)
    pq.write_table(pa.table(columns), path, row_group_size=10)
    assert job.run(source=path) == 0
    assert job.asked == ["7"] and len(list(open_source(str(path), shard_rows=4))) == 2
    assert len(job.rows) == 20


# ---------------------------------------------------------------- the images of a stage


class Asked(Spy):
    """Answers yes with the first letter's number in a question, and one more about the view "b"."""

    def p_yes(self, requests: Iterator[QuestionBatch]) -> Iterator[list[YesNo]]:
        for batch in requests:
            assert isinstance(batch.image, Cut) and batch.image.size == (8, 8)
            yield [YesNo(ord(text[0]) / 256 + (batch.view == "b"), 1.0) for text in batch.questions]


def test_the_images_of_a_stage_are_decoded_once_by_others(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """For captions once, for all questions once, and not by the engine's process."""
    decoded = job.home / "decoded"
    real = views.prepare

    def noted(source: Path, *args: Any) -> Any:
        with decoded.open("a") as file:
            file.write(f"{os.getpid()} {source.stem}\n")
        return real(source, *args)

    monkeypatch.setattr(views, "prepare", noted)
    (job.images / "4.png").write_bytes(b"no image")
    (job.home / "no-answer").write_text("6")
    rows = read_folder(job.images)
    engine: Any = Asked(job.home)
    config = Config(caption=CaptionConfig(prepare_processes=2))
    with stages.images(engine.renderer.spec, config, len(rows)) as pictures:
        ready = stages.prepared(rows, pictures)
        said = {
            image.row: (image, own)
            for image, own in stages.caption_images(engine, ready, 2, SamplingConfig())
        }
        seen = [line.split() for line in decoded.read_text().splitlines()]
        assert sorted(key for _, key in seen) == [str(n) for n in range(10)]
        assert str(os.getpid()) not in {pid for pid, _ in seen}

        def questions(image: stages.Prepared[ImageRow]) -> list[tuple[str, str]]:
            key = image.row.key  # of two views and of none
            return [] if key == "5" else [("b", f"{key}b"), (stages.ALL, key), ("b", "a")]

        again = stages.ask(engine, stages.prepared(rows, pictures), questions)
        # what is asked about them next needs no decoding, whatever came before
        twice = stages.ask(engine, (image for image, _ in again), lambda image: [(stages.ALL, "z")])
        answered = {image.row: (image, own) for image, own in twice}
        assert decoded.read_text().count("\n") == 20
        once = {
            image.row: own for image, own in stages.ask(engine, stages.prepared(rows, pictures), questions)
        }
    assert set(said) == set(answered) == set(once) == set(rows)
    bad = {row.key: image.reason for row, (image, own) in said.items() if not own}
    assert bad == {
        "4": "not an image of a known format",
        "6": f"error: {NO_ANSWER}the server answers 500",
    }
    shas = {row.key: hashlib.sha256(row.path.read_bytes()).hexdigest() for row in rows}
    for row, (_, own) in said.items():
        assert [(c.key, c.k, c.sample) for c in own] == [
            (row.key, k, shas[row.key]) for k in range(2) if row.key not in bad
        ]
    for row, (image, own) in answered.items():
        assert bool(image.reason) == (row.key == "4") and image.sample == shas[row.key] * (row.key != "4")
        assert [each.p_yes for each in own] == [ord("z") / 256] * (row.key != "4")
    for row, replies in once.items():
        asked = [] if row.key in ("4", "5") else [f"b {row.key}", f"all {row.key}", "b a"]
        assert [each.p_yes for each in replies] == [
            ord(text.split()[1][0]) / 256 + (text[0] == "b") for text in asked
        ]
