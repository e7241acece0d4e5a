"""What is written is read back by datasets, webdataset, pandas, DuckDB and by the layouts' own rules."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tomllib
from collections import Counter
from pathlib import Path

import datasets
import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner.errors import ConfigError
from captioner.layouts import writers
from captioner.layouts.budget import counter, fit
from captioner.records import CaptionRow
from captioner.runs import Shards
from captioner.sources import resolve
from captioner.sources.folder import read_captions, read_folder
from captioner.sources.source import open_source, read_shard
from captioner.statements import split_statements
from loops import cli
from tests import tiny

CAPTIONS = {
    "a": 'red circle, sign reading "a, b", 3.5 m',
    "sub/b.v2": "line\nbreak\u2028and\u0085more\r\n, größer, 猫",
    "sub/deep/c": "{simple|white} background, C:\\path, <b>, 'quoted', 100 %",
    "d.jpg": "of the jpg",
    "d.png": "of the png",
}
ONE_LINE = {key: " ".join(text.split()) for key, text in CAPTIONS.items()}


def encoded(number: int, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 4), (number, 0, 0)).save(file, kind, **options)
    return file.getvalue()


def caption_row(key: str, data: bytes, text: str | None, error: str | None = None) -> CaptionRow:
    return CaptionRow(
        id=hashlib.sha256(data).hexdigest(),
        key=key,
        caption=text,
        finish_reason="stop" if text else None,
        tokens=len((text or "").split()) if text else None,
        model="m",
        config="c",
        error=error,
    )


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """(images, captions): five captioned images, one that failed, one that is not captioned yet."""
    images, out = tmp_path / "images", tmp_path / "captions"
    rows = []
    for i, (key, text) in enumerate(CAPTIONS.items()):
        kind = "JPEG" if key.endswith("jpg") else "PNG"
        path = images / (key if key.startswith("d.") else f"{key}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i, kind))
        rows.append(caption_row(key, path.read_bytes(), text))
    (images / "bad.png").write_bytes(b"")
    (images / "new.png").write_bytes(encoded(99))
    shards = Shards(out, CaptionRow)
    out.mkdir()
    shards.write(0, rows[3:])  # in another order than the images
    shards.write(1, [*rows[:3], caption_row("bad", b"", None, "empty file")])
    return images, out


def convert(data: tuple[Path, Path], form: str, out: Path, *more: str) -> int:
    images, captions = data
    words = ["data", "convert", str(captions), "--images", str(images), "--to", form, "--out", str(out)]
    return cli.main([*words, *more])


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- captions alone


@pytest.mark.parametrize("suffix", ["txt", "caption"])
def test_sidecars(data: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "out"
    assert convert(data, suffix, out) == 0
    assert {name: (out / name).read_text(encoding="utf-8") for name in files(out)} == {
        f"{key}.{suffix}": text for key, text in ONE_LINE.items()
    }
    for name in files(out):
        (data[0] / name).write_bytes((out / name).read_bytes())
    found = {row.key: row.caption for row in read_folder(data[0])}
    assert {key: found[key] for key in ONE_LINE} == ONE_LINE
    items = {item.key: item.caption for s in open_source(str(data[0])) for item in read_shard(s)}
    assert items == found


def test_jsonl_is_read_by_pandas_and_duckdb(data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert convert(data, "jsonl", out) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 6  # no separator of any script inside a line
    frame = pandas.read_json(out, lines=True)
    good = frame[frame["error"].isna()]
    assert dict(zip(good["key"], good["caption"], strict=True)) == CAPTIONS and len(frame) == 6
    rows = duckdb.sql(f"SELECT key, caption FROM read_json('{out}') WHERE error IS NULL").fetchall()
    assert dict(rows) == CAPTIONS


def test_the_captioners_own_parquet_is_read_by_pandas_and_duckdb(data: tuple[Path, Path]) -> None:
    frame = pandas.read_parquet(data[1])
    assert set(frame["key"]) == {*CAPTIONS, "bad"} and frame["error"].notna().sum() == 1
    assert duckdb.sql(f"SELECT count(*) FROM '{data[1]}/*.parquet' WHERE caption IS NOT NULL").fetchall() == [
        (5,)
    ]


# ---------------------------------------------------------------- with images


def test_imagefolder_is_read_by_datasets(data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(data, "imagefolder", out) == 0
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "c")
    )
    assert {row["key"]: row["text"] for row in rows} == ONE_LINE
    assert {row["key"]: row["image"].size for row in rows} == {
        key: (8 + i, 4) for i, key in enumerate(CAPTIONS)
    }
    assert {row.key: row.caption for row in read_folder(out)} == ONE_LINE
    assert files(out) == {*("metadata.jsonl", "a.png", "sub/b.v2.png", "sub/deep/c.png", "d.jpg", "d.png")}


def test_kohya_follows_its_rules(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Images straight below each image_dir, the caption is the first line of STEM.txt, wildcards are off."""
    (data[0] / "a.png").write_bytes(encoded(0))
    out = tmp_path / 'with "quotes" \\ and größe'
    assert convert(data, "kohya", out) == 0
    config = tomllib.loads((out / "dataset.toml").read_text(encoding="utf-8"))
    assert config["general"] == {"caption_extension": ".txt", "enable_wildcard": False}
    found = {}
    for subset in config["datasets"][0]["subsets"]:
        for path in Path(subset["image_dir"]).iterdir():
            if path.suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
                lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
                found[path.read_bytes()] = lines[0].strip()
                assert len(lines) == 1
    assert found == {
        encoded(i, "JPEG" if key == "d.jpg" else "PNG"): ONE_LINE[key] for i, key in enumerate(CAPTIONS)
    }


def test_simpletuner_follows_its_rules(data: tuple[Path, Path], tmp_path: Path) -> None:
    """A table indexed by the path below instance_data_dir, with sizes, and a default text cache."""
    out = tmp_path / "out"
    assert convert(data, "simpletuner", out) == 0
    images, texts = json.loads((out / "multidatabackend.json").read_text())
    assert images["caption_strategy"] == images["metadata_backend"] == "parquet"
    assert texts["dataset_type"] == "text_embeds" and texts["default"] is True
    where = images["parquet"]
    assert where["identifier_includes_extension"] is True
    frame = pandas.read_parquet(where["path"]).set_index(where["filename_column"])
    captions = frame[where["caption_column"]]
    assert all(isinstance(text, str) and text for text in captions)
    found = {}
    for path in Path(images["instance_data_dir"]).rglob("*"):
        if path.is_file():
            name = str(path).replace(images["instance_data_dir"], "").lstrip("/")
            found[frame.loc[name, "key"]] = captions[name]
            with Image.open(path) as image:
                size = (frame.loc[name, where["width_column"]], frame.loc[name, where["height_column"]])
                assert image.size == size
    assert found == ONE_LINE


def test_webdataset_is_read_by_webdataset(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "SHARD_ROWS", 2)
    out = tmp_path / "out"
    assert convert(data, "webdataset", out) == 0
    assert files(out) == {"00000.tar", "00001.tar", "00002.tar"}
    urls = [str(out / name) for name in sorted(files(out))]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    about = {row["json"]["key"]: row for row in rows}
    assert {key: row["txt"] for key, row in about.items()} == ONE_LINE
    assert {key: row["__key__"] for key, row in about.items()} == {
        "a": "a", "sub/b.v2": "sub/b%2Ev2", "sub/deep/c": "sub/deep/c", "d.jpg": "d%2Ejpg", "d.png": "d%2Epng"
    }  # fmt: skip
    assert all((row.get("png") or row.get("jpg")).size == (row["json"]["width"], 4) for row in rows)
    items = [item for shard in open_source(str(out)) for item in read_shard(shard)]
    assert {item.key: item.caption for item in items} == {row["__key__"]: row["txt"] for row in rows}
    assert {hashlib.sha256(item.image).hexdigest() for item in items} == {row["json"]["id"] for row in rows}


def test_no_two_images_have_one_name_in_webdataset(tmp_path: Path) -> None:
    """Keys that are equal, that differ in case, and those that escapes would make equal."""
    keys = ["a.b", "a%2Eb", "x", "x", "X", "x"]
    rows = [
        writers.Captioned(
            CaptionRow(
                id=str(i), key=key, caption=f"c{i}", finish_reason="stop", tokens=1, model="m", config="c"
            ),
            f"c{i}", {}, b"image %d" % i, ".png", 4, 4,
        )
        for i, key in enumerate(keys)
    ]  # fmt: skip
    assert writers.webdataset(iter(rows), tmp_path, Counter()) == 6
    found = list(webdataset.WebDataset([str(tmp_path / "00000.tar")], shardshuffle=False))
    assert [row["__key__"] for row in found] == ["a%2Eb", "a%252Eb", "x", "x%232", "X%233", "x%234"]
    assert [row["png"] for row in found] == [row.image for row in rows]


def test_parquet_is_read_by_datasets_pandas_and_duckdb(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "SHARD_ROWS", 3)
    out = tmp_path / "out"
    assert convert(data, "parquet", out) == 0
    assert files(out) == {"part-00000.parquet", "part-00001.parquet"}
    rows = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["image"], datasets.Image)
    assert {row["key"]: row["caption"] for row in rows} == ONE_LINE
    assert all(row["image"].size == (row["width"], row["height"]) for row in rows)
    frame = pandas.read_parquet(out)
    shas = [hashlib.sha256(cell["bytes"]).hexdigest() for cell in frame["image"]]
    assert shas == list(frame["id"]) and len(frame) == 5
    found = duckdb.sql(f"SELECT key, caption, image.bytes FROM '{out}/*.parquet'").fetchall()
    assert {key: text for key, text, _ in found} == ONE_LINE
    items = {item.key: item for shard in open_source(str(out)) for item in read_shard(shard)}
    assert {key: item.caption for key, item in items.items()} == ONE_LINE


def test_hf_is_read_by_datasets(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "SHARD_ROWS", 2)
    out = tmp_path / "out"
    assert convert(data, "hf", out) == 0
    rows = datasets.load_from_disk(str(out))
    assert {row["key"]: row["caption"] for row in rows} == ONE_LINE
    assert all(row["image"].size == (row["width"], row["height"]) for row in rows)
    assert not any(name.startswith(".") for name in files(out))
    items = {item.key: item for shard in open_source(str(out)) for item in read_shard(shard)}
    assert {key: item.caption for key, item in items.items()} == ONE_LINE


@pytest.mark.parametrize("form", ["webdataset", "parquet", "hf", "imagefolder"])
def test_captions_of_any_source_find_their_images(data: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    """Converted, the output of one conversion is the source of the next, under its own keys."""
    assert convert(data, form, tmp_path / "first") == 0
    rows = []
    for shard in open_source(str(tmp_path / "first")):
        for item in read_shard(shard):
            blob = item.image if isinstance(item.image, bytes) else item.image.read_bytes()
            rows.append(caption_row(item.key, blob, f"new {len(rows)}"))
    (tmp_path / "again").mkdir()
    Shards(tmp_path / "again", CaptionRow).write(0, rows)
    assert len(rows) == 5
    assert convert((tmp_path / "first", tmp_path / "again"), "parquet", tmp_path / "second") == 0
    frame = pandas.read_parquet(tmp_path / "second")
    assert dict(zip(frame["key"], frame["caption"], strict=True)) == {row.key: row.caption for row in rows}


def test_what_cannot_be_written_is_counted(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, captions = data
    (images / "a.png").write_bytes(encoded(50))  # not what was captioned
    (images / "sub/deep/c.png").unlink()
    Image.new("L", (4, 4)).save(images / "e.gif")
    row = caption_row("e", (images / "e.gif").read_bytes(), "a gif")
    Shards(captions, CaptionRow).write(2, [row])
    assert convert(data, "kohya", tmp_path / "out") == 3  # more than 5 %
    printed = capsys.readouterr()
    assert "3 rows, 3 failed" in printed.out and "1 sd-scripts read no .gif files" in printed.out
    assert "2 its image is not in the source" in printed.out and "max_failed" in printed.err
    assert convert(data, "webdataset", tmp_path / "again", "--max-failed", "1") == 0
    assert convert(data, "kohya", tmp_path / "out") == 2  # it exists
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_hostile_keys_write_nothing_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of a Parquet file may be anything."""
    keys = ["../up", "/etc/up", "a/../../up", "x" * 300, "a\0b", ".hidden", "ok", "ok/below", "ok.png/below"]
    blobs = [encoded(i) for i in range(len(keys))]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"key": keys, "image": blobs}), tmp_path / "in/a.parquet")
    (tmp_path / "captions").mkdir()
    rows = [caption_row(key, blob, f"t{i}") for i, (key, blob) in enumerate(zip(keys, blobs, strict=True))]
    Shards(tmp_path / "captions", CaptionRow).write(0, rows)
    before = files(tmp_path)
    for form in ("imagefolder", "kohya", "simpletuner", "webdataset", "txt"):
        out = tmp_path / "deep" / form
        assert convert((tmp_path / "in", tmp_path / "captions"), form, out, "--max-failed", "1") == 0
        written = {path for path in files(tmp_path) - before if not path.startswith("deep/")}
        assert written == set(), form
        line, *reasons = capsys.readouterr().out.splitlines()
        count, skipped = int(line.split()[0]), int(line.split()[2])
        assert count + skipped == 9 and skipped == sum(int(reason.split()[0]) for reason in reasons)
        if form == "webdataset":
            with tarfile.open(out / "00000.tar") as tar:
                names = tar.getnames()
            assert not any(name.startswith("/") or ".." in name.split("/") for name in names)


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[writers.EXIF_ORIENTATION] = 6
    assert writers._header(encoded(0, "JPEG", exif=exif)) == (".jpg", 4, 8)
    assert writers._header(encoded(0, "WEBP")) == (".webp", 8, 4)
    assert writers._header(encoded(0, "TIFF")) == (".tif", 8, 4)


def test_convert_wants_images_and_captions(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, captions = data
    words = ["data", "convert", str(captions), "--to", "hf", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2 and "--images" in capsys.readouterr().err
    assert cli.main(words[:-2]) == 2 and "--out" in capsys.readouterr().err
    assert convert((images, images), "hf", tmp_path / "out") == 2
    assert "no caption rows" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert convert((images, images), "jsonl", tmp_path / "out") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"images", "captions"}


def test_scenes_are_found_again(tmp_path: Path) -> None:
    """`captioner caption scenes:…` renders into its output; the same name finds them there."""
    captions = tmp_path / "captions"
    images = read_folder(resolve("scenes:test:2", cache=captions / ".scenes"))
    rows = [caption_row(image.key, image.path.read_bytes(), "a scene") for image in images]
    Shards(captions, CaptionRow).write(0, rows)
    words = ["data", "convert", str(captions), "--to", "parquet", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--images", "scenes:test:2"]) == 0
    assert len(pandas.read_parquet(tmp_path / "out")) == 2


# ---------------------------------------------------------------- filter and stats


def test_filter(data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = data[1]
    same = [caption_row(f"s{i}", encoded(20 + i), "a dog") for i in range(3)]
    cut = caption_row("cut", encoded(30), "a very").model_copy(update={"finish_reason": "length"})
    Shards(captions, CaptionRow).write(2, [*same, cut])
    words = ["data", "filter", str(captions), "--out", str(tmp_path / "out"), "--ended", "--max-repeats", "2"]
    assert cli.main(words) == 0
    assert "5 rows kept, 3 said of more than 2 images, 1 " in capsys.readouterr().out
    assert Counter(row.key for row in read_captions(tmp_path / "out")) == Counter(list(CAPTIONS))
    assert cli.main(words) == 2


@pytest.mark.parametrize("form", ["webdataset", "parquet", "hf"])
def test_stats_of_any_data_set(
    data: tuple[Path, Path], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(data, form, tmp_path / "out") == 0
    assert cli.main(["data", "stats", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "images     5 (5 packed)" in printed and "captions   5, 5 different" in printed


# ---------------------------------------------------------------- token budgets


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("caption", "budget", "want"),
    [
        ("red circle, blue square, dot", 9, "red circle, blue square, dot"),
        ("red circle, blue square, dot", 4, "red circle, blue square"),
        ("red circle, blue square, dot", 3, "red circle"),
        ("red circle, blue square, dot", 1, "dot"),
        ("a dog runs. A cat sleeps. It rains", 6, "a dog runs. A cat sleeps."),
        ('sign "a, b, c", dot', 3, "dot"),
        ("one two three", 2, ""),
        ("one two three, a", 2, "a"),
        ("  red circle ,\n blue ", 2, "red circle"),
        ("", 0, ""),
    ],
)
def test_fit(caption: str, budget: int, want: str) -> None:
    assert fit(caption, budget, words) == want


@given(st.text(alphabet='ab ,.;"(\n。', max_size=60), st.integers(0, 30))
def test_fit_drops_whole_statements_only(caption: str, budget: int) -> None:
    for count in (words, len, lambda text: len(set(text))):  # the last is not what a longer text has more of
        kept = fit(caption, budget, count)
        assert kept in caption and (count(kept) <= budget or kept == "")
        statements, rest = split_statements(caption), split_statements(kept)
        at = [i for i in range(len(statements) + 1) if statements[i : i + len(rest)] == rest]
        assert at and (rest or not kept.strip() or kept == caption)


def test_budgets_are_counted_with_the_targets_tokenizer(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "tokenizer"
    tiny.tokenizer().save_pretrained(where)
    count, budget = counter(where, 12)
    assert budget == 12 and count("red circle") == len(tiny.tokenizer().encode("red circle"))
    two = ("--tokenizer", str(where), "--max-tokens", "12", "--tokenizer", str(where), "--max-tokens", "30")
    assert convert(data, "parquet", tmp_path / "out", *two, "--max-failed", "1") == 0
    frame = pandas.read_parquet(tmp_path / "out")
    for column, limit in (("caption_12", 12), ("caption_30", 30)):
        for whole, text in zip(frame["caption"], frame[column], strict=True):
            assert text is None or pandas.isna(text) or (count(text) <= limit and text in whole)
    assert (frame["caption_30"].fillna("").str.len() >= frame["caption_12"].fillna("").str.len()).all()
    assert convert(data, "txt", tmp_path / "texts", *two[:4], "--max-failed", "1") == 0
    assert 0 < len(files(tmp_path / "texts")) <= 5
    assert all(count((tmp_path / "texts" / name).read_text()) <= 12 for name in files(tmp_path / "texts"))
    assert convert(data, "jsonl", tmp_path / "c.jsonl", *two) == 0
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert all({"caption_12", "caption_30"} <= set(row) for row in rows)
    capsys.readouterr()
    for wrong in (two[:2] + two[:4], two[:4] * 2, ("--tokenizer", str(tmp_path)), ("--max-tokens", "3")):
        assert convert(data, "jsonl", tmp_path / "d.jsonl", *wrong) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_tokenizer_says_what_its_model_takes(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "no-limit")
    limit = tokenizer.model_max_length
    if limit > 1 << 20:
        with pytest.raises(ConfigError, match="names no limit"):
            counter(tmp_path / "no-limit")
    config = json.loads((tmp_path / "no-limit/tokenizer_config.json").read_text())
    (tmp_path / "no-limit/tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    assert counter(tmp_path / "no-limit")[1] == 77 - tokenizer.num_special_tokens_to_add()
    with pytest.raises(ConfigError, match="budget of 0"):
        counter(tmp_path / "no-limit", 0)
