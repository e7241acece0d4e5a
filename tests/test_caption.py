"""captioner caption: every image a row, resumable after a kill, its outputs readable by others."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from captioner.config import Config, SamplingConfig, ViewsConfig
from captioner.engines import CaptionRequest
from captioner.pipeline.local import Inline
from captioner.pipeline.output import PAGE
from captioner.pipeline.worker import Settings, Task, Worker
from captioner.records import Candidate, CaptionRow
from captioner.sources.folder import read_captions, read_folder
from captioner.sources.source import open_source
from captioner.views import Cut, ViewSpec, prepare
from loops import cli
from tests import tiny
from tests.test_views import png_header

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 6
SHARD_ROWS = 4
HIDDEN = {".job.json", ".listing.jsonl", ".lock", ".page.json", ".shards.jsonl", ".status.json"}
FLAGS = [
    "--caption.sampling.max_tokens",
    str(TOKENS),
    "--caption.shard_rows",
    str(SHARD_ROWS),
    "--engine.max_num_seqs",
    "3",
    "--caption.prepare_processes",
    "0",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=1)


def write_checkpoint(path: Path, seed: int) -> Path:
    """A tiny captioner that says no end and no space when greedy, so that every image gets a caption."""
    words = tiny.tiny_checkpoint(path, seed=seed).tokenizer
    silent = [i for i in range(len(words)) if not words.decode([i], skip_special_tokens=True).strip()]
    weights = load_file(path / "model.safetensors")
    [embedding] = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[embedding][silent] = 0.0  # a logit of zero is never the largest of four hundred
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten small pictures in two folders; two of them in one shard hold the same bytes."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(10):
        path = root / ("a" if number < 5 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (root / "a" / "1.png").write_bytes((root / "a" / "0.png").read_bytes())
    return root


def caption(source: Path | str, out: Path, checkpoint: Path, *more: str) -> int:
    return cli.main(
        ["caption", str(source), "--out", str(out), "--checkpoint", str(checkpoint), *FLAGS, *more]
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    """The files of an output that others read; its page tells times, too."""
    return {name: data for name, data in files(folder).items() if name[0] != "." and name != PAGE}


# ---------------------------------------------------------------- outputs


def test_parquet_is_read_by_datasets(
    images: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    out = tmp_path / "out"
    assert caption(images, out, checkpoint) == 0
    shards = [f"0000{number}.parquet" for number in range(3)]
    assert sorted(name for name in files(out) if "/" not in name) == [*sorted(HIDDEN), *shards, PAGE]
    rows = list(read_captions(out))
    assert [row.key for row in rows] == [row.key for row in read_folder(images)]
    assert all(row.caption and row.error is None and row.tokens <= TOKENS for row in rows)
    assert len({(row.model, row.config) for row in rows}) == 1
    closing = capsys.readouterr().out.strip()
    assert closing.startswith("10 of 10 images captioned") and "\n" not in closing
    table = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["caption"] == [row.caption for row in rows]
    assert table.column_names == list(CaptionRow.model_fields)


def test_jsonl_and_txt_say_the_same(images: Path, tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    assert caption(images, out, checkpoint, "--format", "jsonl") == 0
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [CaptionRow(**row) for row in rows] == list(read_captions(out))
    assert (
        caption(images, out, checkpoint, "--format", "txt") == 0
    )  # the rows are there: only the form is new
    texts = {name: text.decode() for name, text in files(out).items() if name.endswith(".txt")}
    assert texts == {f"{row['key']}.txt": " ".join(row["caption"].split()) for row in rows}


class Spy:
    """An engine that notes what it is asked for and says "red circle", or nothing where it is silent."""

    renderer = SimpleNamespace(spec=ViewSpec(ViewsConfig(), 64, 16))

    def __init__(self, *silent: str):
        self.silent, self.asked = silent, list[str]()
        self.alive: list[weakref.ref[Cut]] = []
        self.most = 0

    def sample(self, requests: Iterator[CaptionRequest], n: int, sampling: SamplingConfig) -> Iterator[Any]:
        for request in requests:
            self.asked.append(request.key)
            text = " \n" if request.key in self.silent else "red circle"
            made = dict(finish_reason="stop", mean_logprob=0.0, tokens=1, seed=0, text=text)
            yield [Candidate(sample=request.sample_id, key=request.key, k=k, **made) for k in range(n)]


def spied(images: Path, spy: Spy, ahead: int = 4) -> dict[str, CaptionRow]:
    """Rows that a worker makes of a folder with a spy for an engine."""
    settings = Settings(Config(), images, "m", "c", out=images.parent / "spied")
    settings.out.mkdir()
    shards = list(open_source(str(images), shard_rows=SHARD_ROWS))
    messages = iter([*map(Task, shards), None])
    events: list[Any] = []
    Worker(settings, spy, Inline(ahead), lambda: next(messages), events.append).run()
    published = [(event[1], event[2].rows) for event in events if event[0] == "published"]
    assert published == [(0, 4), (1, 4), (2, 2)]
    return {row.key: row for row in read_captions(settings.out)}


def test_equal_bytes_are_captioned_once(images: Path) -> None:
    (images / "b" / "9.png").write_bytes((images / "a" / "0.png").read_bytes())  # in another shard
    spy = Spy()
    rows = spied(images, spy)
    assert "a/0" in spy.asked and not {"a/1", "b/9"} & set(spy.asked) and len(spy.asked) == 8
    assert len(rows) == 10 and rows["a/0"].id == rows["a/1"].id == rows["b/9"].id
    assert {row.caption for row in rows.values()} == {"red circle"}


def test_images_are_prepared_no_further_ahead_than_asked(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Cut]] = []
    most = 0

    def watched(*args: Any) -> tuple[Cut, str]:
        nonlocal most
        found = prepare(*args)
        made.append(weakref.ref(found[0]))
        most = max(most, sum(ref() is not None for ref in made))
        return found

    monkeypatch.setattr("captioner.views.prepare", watched)
    spied(images, Spy(), ahead=2)
    assert len(made) == 10 and most <= 5  # in the queue, before it, behind it, at the engine and its answer


def test_an_image_without_caption_is_a_failed_row(images: Path) -> None:
    rows = spied(images, Spy("b/7"))
    assert [(row.key, row.error) for row in rows.values() if row.caption is None] == [
        ("b/7", "the model wrote no caption")
    ]
    assert len(rows) == 10 and {row.caption for row in rows.values()} == {None, "red circle"}


def test_captions_do_not_depend_on_shards_or_batches(images: Path, tmp_path: Path, checkpoint: Path) -> None:
    sampling = ["--caption.sampling.temperature", "1.0"]
    assert caption(images, tmp_path / "one", checkpoint, *sampling) == 0
    other = ["--caption.shard_rows", "100", "--engine.max_num_seqs", "64"]
    assert caption(images, tmp_path / "two", checkpoint, *sampling, *other) == 0
    one, two = (list(read_captions(tmp_path / name)) for name in ("one", "two"))
    assert one == two and len({row.caption for row in one}) > 5


def test_scenes_are_captioned(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    assert caption("scenes:test:3", out, checkpoint, "--format", "txt") == 0
    assert (out / "images" / "000000.txt").is_file()
    assert len(list(read_captions(out))) == 3
    assert caption("scenes:test:3", out, checkpoint) == 0


def test_captions_of_a_few_images_are_printed(
    images: Path,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert caption(images, tmp_path / "out", checkpoint) == 0
    said = {row.key: row.caption for row in read_captions(tmp_path / "out")}
    monkeypatch.chdir(images)
    photos = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))[:2]
    one, two = (name.removesuffix(".png") for name in photos)
    words = ["--checkpoint", str(checkpoint), *FLAGS]
    capsys.readouterr()
    before = files(images)
    assert cli.main(["caption", photos[0], *words]) == 0
    assert capsys.readouterr().out == f"{said[one]}\n"
    assert cli.main(["caption", *photos, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{Path(key).name}: {said[key]}" for key in (one, two)]
    assert cli.main(["caption", f"{images}?count=2", *words]) == 0
    keys = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert len(keys) == 2 and set(keys) <= said.keys() and files(images) == before
    (tmp_path / "cut.png").write_bytes((images / photos[0]).read_bytes()[:60])
    assert cli.main(["caption", str(tmp_path / "cut.png"), *words]) == 3
    assert cli.main(["caption", *photos, "--out", str(tmp_path / "o"), *words]) == 2
    assert "2 sources for one output" in capsys.readouterr().err
    (tmp_path / "images.csv").write_text("file_name\n" + "\n".join(str(images / name) for name in photos))
    assert cli.main(["caption", str(tmp_path / "images.csv"), *words]) == 2
    assert "images.csv?count=8" in capsys.readouterr().err


def test_a_part_of_a_source_is_captioned_and_goes_on(images: Path, tmp_path: Path, checkpoint: Path) -> None:
    out, source = tmp_path / "out", f"{images}?count=3&seed=1"
    assert caption(source, out, checkpoint) == 0
    keys = {row.key for row in read_captions(out)}
    assert len(keys) == 3
    assert caption(source, out, checkpoint) == 0
    assert caption(f"{images}?count=3&seed=1&part=2", tmp_path / "second", checkpoint) == 0
    assert not keys & {row.key for row in read_captions(tmp_path / "second")}
    words = ["data", "convert", str(out), "--images", source, "--to", "imagefolder"]
    assert cli.main([*words, "--out", str(tmp_path / "set")]) == 0
    assert {row.key for row in read_folder(tmp_path / "set")} == keys


# ---------------------------------------------------------------- real photographs and broken files


def photographs() -> list[Image.Image]:
    """Photographs that ship with scikit-image, read without importing it."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None, "pip install scikit-image"
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png")
    return [Image.open(Path(spec.origin).parent / "data" / name) for name in names]


def save_good(root: Path) -> int:
    forms = {
        "jpg": {}, "png": {}, "webp": {}, "gif": {}, "bmp": {}, "tif": {"compression": "tiff_lzw"},
    }  # fmt: skip
    count = 0
    for number, photo in enumerate(photographs()):
        rgb = photo.convert("RGB")
        for suffix, options in forms.items():
            rgb.save(root / f"{number}-{suffix}.{suffix}", **options)
        rgb.convert("CMYK").save(root / f"{number}-cmyk.jpeg")
        sixteen = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
        Image.fromarray(sixteen).save(root / f"{number}-16bit.png")
        count += len(forms) + 2
    return count


def save_bad(root: Path) -> dict[str, str]:
    """Ten broken files; returns the reason that each of them should get."""
    photo = photographs()[0]
    good = {}
    for suffix in ("png", "jpg", "webp", "gif"):
        photo.convert("RGB").save(root / f"whole.{suffix}")
        good[suffix] = (root / f"whole.{suffix}").read_bytes()
        (root / f"whole.{suffix}").unlink()
    flipped = bytearray(good["png"])
    flipped[5000:5200] = bytes(200)
    (root / "bad-zero.jpg").write_bytes(b"")
    (root / "bad-text.png").write_text("<html>404 Not Found</html>")
    (root / "bad-cut.jpg").write_bytes(good["jpg"][: len(good["jpg"]) // 2])
    (root / "bad-cut.webp").write_bytes(good["webp"][: len(good["webp"]) // 2])
    (root / "bad-cut.gif").write_bytes(good["gif"][:40])
    (root / "bad-flipped.png").write_bytes(flipped)
    (root / "bad-bomb.png").write_bytes(png_header(40_000, 40_000))
    Image.new("RGB", (1, 1)).save(root / "bad-pixel.bmp")
    Image.new("L", (30_000, 200)).save(root / "bad-wide.png")
    (root / "bad-link.tif").symlink_to(root / "nowhere")
    return {
        "bad-zero": "empty file",
        "bad-text": "not an image of a known format",
        "bad-cut.jpg": "cannot be decoded: image file is truncated",
        "bad-cut.webp": "cannot be decoded",
        "bad-cut.gif": "not an image of a known format",
        "bad-flipped": "cannot be decoded",
        "bad-bomb": "too many pixels",
        "bad-pixel": "too small: 1 x 1 px",
        "bad-wide": "too large: 30000 x 200 px",
        "bad-link": "no such file",
    }


@pytest.mark.slow
def test_real_photographs_among_broken_files(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photographs"
    root.mkdir()
    good, bad = save_good(root), save_bad(root)
    assert len(bad) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert caption(root, tmp_path / "out", checkpoint, "--max-failed", "0.1") == 3
    printed = capsys.readouterr()
    assert f"{good} of {good + 10} images captioned, 10 failed (" in printed.out
    assert (
        "10 of 50 images failed, more than max_failed = 10.0%" in printed.err
        and "Traceback" not in printed.err
    )
    rows = {row.key: row for row in read_captions(tmp_path / "out")}
    for key, reason in bad.items():
        assert rows[key].caption is None and rows[key].error.startswith(reason), rows[key]
    fine = [row for key, row in rows.items() if key not in bad]
    assert len(fine) == good == 40
    assert all(row.caption and row.error is None and row.id for row in fine)
    assert caption(root, tmp_path / "out", checkpoint, "--max-failed", "0.2") == 0  # at the limit: allowed


# ---------------------------------------------------------------- resuming


KILLED = """
import os, signal, sys
from captioner.pipeline.output import Output
from loops import cli

def die(self, index, *rest):
    (self.out / ".00001.parquet.part-1").write_bytes(b"half a shard")
    os.kill(os.getpid(), signal.SIGKILL)
Output.enter = die
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_with_the_same_rows(
    images: Path, tmp_path: Path, checkpoint: Path
) -> None:
    sampling = ["--caption.sampling.temperature", "1.0", "--format", "txt"]
    assert caption(images, tmp_path / "whole", checkpoint, *sampling) == 0
    out = tmp_path / "killed"
    flags = ["caption", str(images), "--out", str(out), "--checkpoint", str(checkpoint), *FLAGS, *sampling]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *flags], cwd=ROOT, timeout=120, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    before = files(out)
    assert {"00000.parquet", ".00001.parquet.part-1"} <= set(before)
    assert (out / ".shards.jsonl").is_file() is False
    assert cli.main(flags) == 0
    assert visible(out) == visible(tmp_path / "whole")
    assert files(out)["00000.parquet"] == before["00000.parquet"]
    assert json.loads((out / ".status.json").read_text())["state"] == "done"
    assert "9 captions at random" in (out / PAGE).read_text()  # two of the ten are copies


def test_a_finished_job_loads_no_model(
    images: Path,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert caption(images, tmp_path / "out", checkpoint) == 0
    before = files(tmp_path / "out")
    monkeypatch.setattr("captioner.models.model.load", lambda *a, **k: pytest.fail("loaded"))
    assert caption(images, tmp_path / "out", checkpoint) == 0
    assert files(tmp_path / "out") == before
    assert "10 of them before" in capsys.readouterr().out


def test_another_job_is_refused_and_redone(
    images: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    write_checkpoint(other, seed=2)
    assert caption(images, out, checkpoint, "--format", "txt") == 0
    before = files(out)
    (out / "mine.md").write_text("not the job's")
    changes = {
        "config": (images, checkpoint, ["--caption.sampling.max_tokens", "5"]),
        "shard_rows": (images, checkpoint, ["--caption.shard_rows", "3"]),
        "checkpoint": (images, other, []),
    }
    for what, (source, model, flags) in changes.items():
        assert caption(source, out, model, *flags) == 2
        message = capsys.readouterr().err
        assert f"another {what}\n" in message and "--redo" in message and "new --out" in message
    (images / "a" / "0.png").unlink()
    assert files(out) == before | {"mine.md": b"not the job's"}
    assert caption(images, out, other, "--redo", "--format", "txt") == 0
    after = files(out)
    assert "a/0.txt" not in after and after["mine.md"] == b"not the job's"
    assert after["00000.parquet"] != before["00000.parquet"]


def test_outputs_and_inputs_that_will_not_do(
    images: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "no such file or folder": (tmp_path / "nowhere", tmp_path / "out", checkpoint),
        "no images in this folder": (tmp_path / "empty", tmp_path / "out", checkpoint),
        "the output holds something else": (images, images, checkpoint),
        "no such checkpoint directory": (images, tmp_path / "out", tmp_path / "nowhere"),
    }
    for message, (source, out, model) in cases.items():
        before = files(images)
        assert caption(source, out, model) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert files(images) == before and not (tmp_path / "out").exists()
    assert (
        cli.main(["caption", str(images), "--out", str(tmp_path / "out"), "--run", str(tmp_path / "norun")])
        == 2
    )
    assert "captioner sft --run" in capsys.readouterr().err


def test_a_dry_run_touches_nothing(images: Path, tmp_path: Path, checkpoint: Path) -> None:
    assert caption(images, tmp_path / "out", checkpoint, "--dry-run") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_captioning_imports_no_training_library() -> None:
    code = (
        "import sys, loops.caption, captioner.engines.hf, captioner.models.model\n"
        "assert not {'adapters', 'trl', 'peft', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


# ---------------------------------------------------------------- captioner data


def test_stats_and_convert(
    images: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "bad.jpg").write_bytes(b"")
    (images / "a" / "0.txt").write_text("red circle, blue square")
    assert cli.main(["data", "stats", str(images)]) == 0
    printed = capsys.readouterr().out
    assert "images     11 (10 .png, 1 .jpg)" in printed and "copies     1 " in printed
    assert "captions   1, 1 different" in printed and "1 empty file" in printed
    out = tmp_path / "out"
    assert caption(images, out, checkpoint, "--max-failed", "1") == 0
    assert cli.main(["data", "stats", str(out)]) == 0
    assert "rows       11" in capsys.readouterr().out
    assert cli.main(["data", "convert", str(out), "--out", str(tmp_path / "c.jsonl")]) == 0
    assert len((tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()) == 11
    assert cli.main(["data", "convert", str(out), "--to", "txt", "--out", str(tmp_path / "texts")]) == 0
    assert len(files(tmp_path / "texts")) == 10
    assert cli.main(["data", "convert", str(out), "--to", "txt", "--out", str(tmp_path / "texts")]) == 2
    assert cli.main(["data", "convert", str(images), "--out", str(tmp_path / "d.jsonl")]) == 2
    assert not (tmp_path / "d.jsonl").exists()
