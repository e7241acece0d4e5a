"""Image folders are read with their captions or refused with a reason; caption rows are written safely."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import laboratory
from captioner.config import Config
from captioner.errors import DataError
from captioner.records import CaptionRow
from captioner.runs import Run, Shards
from captioner.sources import resolve
from captioner.sources.folder import (
    read_captions,
    read_folder,
    sidecar_path,
    write_jsonl,
    write_sidecars,
)

METADATA = [
    {
        "file_name": "a.png",
        "text": "red circle",
        "prose": "A circle.",
        "facts": "{}",
        "questions": [{"question": "q"}],
    },
    {"file_name": "sub/b.jpg", "text": "Blau, größer", "prose": None, "facts": None, "questions": None},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("a.png", "sub/b.jpg", "sub/deep/c.v2.PNG", ".hidden/x.png", ".y.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, "PNG")
    (root / "notes.md").write_text("not an image")
    return root


def row(key: str, caption: str | None = "a caption") -> CaptionRow:
    error = "empty file" if caption is None else None
    return CaptionRow(
        id="0", key=key, caption=caption, finish_reason=None, tokens=None, model="m", config="c", error=error
    )


def write_metadata(root: Path, form: str, rows: list[dict]) -> None:
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    elif form == "jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    else:
        lines = ["file_name,text", *(f'{r["file_name"]},"{r["text"]}"' for r in rows)]
        (root / "metadata.csv").write_text("\r\n".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- reading


def test_keys_paths_and_order(folder: Path) -> None:
    rows = read_folder(folder)
    assert [r.key for r in rows] == ["a", "sub/b", "sub/deep/c.v2"]
    assert rows[2].path == folder / "sub" / "deep" / "c.v2.PNG"
    assert all(r.caption is None and r.questions is None for r in rows)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_metadata_is_joined(folder: Path, form: str) -> None:
    write_metadata(folder, form, METADATA)
    a, b, c = read_folder(folder)
    assert (a.caption, b.caption, c.caption) == ("red circle", "Blau, größer", None)
    if form != "csv":
        assert (a.prose, a.facts, a.questions) == ("A circle.", "{}", [{"question": "q"}])
        assert (b.prose, b.facts, b.questions) == (None, None, None)


def test_sidecars_are_joined_and_metadata_wins(folder: Path) -> None:
    (folder / "sub/b.txt").write_text("from text\n", encoding="utf-8")
    (folder / "sub/deep/c.v2.caption").write_text("from caption")
    (folder / "a.txt").write_text("lost")
    write_metadata(folder, "jsonl", [{"file_name": "a.png", "text": "won"}])
    assert [r.caption for r in read_folder(folder)] == ["won", "from text", "from caption"]
    assert [r.caption for r in read_folder(folder, captions=False)] == [None] * 3


def test_images_that_differ_in_extension_keep_it(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "a.txt").write_text("whose?")
    (folder / "a.jpg.txt").write_text("of the jpg")
    rows = read_folder(folder)
    assert [(r.key, r.caption) for r in rows[:2]] == [("a.jpg", "of the jpg"), ("a.png", None)]
    (folder / "a.jpg.png").write_bytes(b"x")  # its stem is another image's name
    assert [r.key for r in read_folder(folder)][:3] == ["a.jpg", "a.jpg.png", "a.png"]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images"):
        read_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="not a folder"):
        read_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([METADATA[0], METADATA[0]], r"'a.png' is named twice \(metadata.jsonl, row 2\)"),
        ([{"file_name": "z.png", "text": "?"}], r"'z.png' is not in the folder.*row 1"),
        ([{"file_name": "../other/a.png", "text": "?"}], "is not in the folder"),
        ([{"file_name": "notes.md", "text": "?"}], "is not in the folder"),
        ([{"file_name": "a.png", "text": "?"}, {"text": "?"}], "no file_name .*row 2"),
        ([{"file_name": "a.png", "text": 7}], "text is not text: 7"),
    ],
)
def test_rows_that_do_not_join_are_rows_with_a_reason(folder: Path, rows: list, message: str) -> None:
    write_metadata(folder, "jsonl", rows)
    [error] = [row.error for row in read_folder(folder) if row.error]
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png",\n', "cannot be read"),
        ("metadata.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("metadata.csv", b'file_name,text\r\na.png,"open', "cannot be read"),
        ("metadata.csv", b"text,file_name\r\nhigh, wide,a.png", "row 1 has 3 cells for 2 columns"),
        ("metadata.parquet", b"PAR1 no", "cannot be read"),
        ("metadata.jsonl", b'["a.png"]\n', "not a JSON object"),
        ("metadata.jsonl", b'{"text": "?"}', "no column that names images among text"),
        ("metadata.csv", b"file_name,width\r\na.png,3", "no column of captions among file_name, width"),
    ],
)
def test_broken_caption_tables(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=f"(?s){message}.*{name}"):
        read_folder(folder)
    assert len(read_folder(folder, captions=False)) == 3


def test_a_sidecar_that_is_no_text_is_its_rows_reason(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert [row.error is not None for row in read_folder(folder)] == [True, False, False]


def test_one_metadata_file_is_wanted(folder: Path) -> None:
    write_metadata(folder, "jsonl", METADATA)
    write_metadata(folder, "csv", METADATA)
    with pytest.raises(DataError, match="2 caption tables of one folder"):
        read_folder(folder)


def test_linked_folders_are_not_followed(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    assert len(read_folder(folder)) == 3


@pytest.mark.skipif(sys.platform == "darwin", reason="that file system refuses such names")
def test_a_name_that_is_not_utf8(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/\xff.png", "wb"):
        pass
    assert [row.key for row in read_folder(folder) if "not UTF-8" in (row.error or "")] == ["\\udcff"]


# ---------------------------------------------------------------- scenes


def test_scenes_are_rendered_once(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", Config())
    path = resolve("scenes:test:3:10", run)
    assert path == run.path / "data" / "test-3-10"
    rows = read_folder(path)
    assert len(rows) == 3 and all(r.caption and r.facts and r.questions for r in rows)
    stamp = rows[0].path.stat().st_mtime_ns
    assert resolve("scenes:test:3:10", run) == path and rows[0].path.stat().st_mtime_ns == stamp
    assert resolve("scenes:test:2:10", None, cache=tmp_path / "cache") == tmp_path / "cache" / "test-2-10"
    assert resolve(str(tmp_path)) == tmp_path
    assert [p.name for p in path.parent.iterdir()] == ["test-3-10"]


def test_scenes_offset_starts_there(tmp_path: Path) -> None:
    long, short = (read_folder(resolve(s, cache=tmp_path)) for s in ("scenes:test:3", "scenes:test:1:2"))
    assert long[2].caption == short[0].caption and long[2].key == short[0].key


@pytest.mark.parametrize(
    "source",
    [
        f"scenes:{rest}"
        for rest in ("", "no:3", "test", "test:0", "test:-1", "test:1:x", "test:1:2:3", "test:²")
    ],
)
def test_scenes_that_do_not_exist(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=source):
        resolve(source, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sources_of_a_laboratory() -> None:
    part = laboratory.parse("scenes:sft:5:7")
    assert part is not None and (part.split, part.count, part.offset) == ("sft", 5, 7)
    assert part.next(2) == "scenes:sft:5:17"
    assert laboratory.parse("photographs/2026") is None and laboratory.parse("s3://bucket/photos") is None


# ---------------------------------------------------------------- writing


def test_captions_come_back_in_order(tmp_path: Path) -> None:
    shards = Shards(tmp_path, CaptionRow)
    rows = [row("a"), row("b", None), row("größe/c", "größer")]
    shards.write(1, rows[2:])
    shards.write(0, rows[:2])
    (tmp_path / "other.parquet").write_bytes(b"somebody else's")
    assert list(read_captions(tmp_path)) == rows
    with pytest.raises(DataError, match="no caption rows"):
        list(read_captions(tmp_path / "nowhere"))


def test_jsonl_holds_every_row(tmp_path: Path) -> None:
    rows = [row("a", 'line\nbreak "quoted" größer \u2028'), row("b", None)]
    assert write_jsonl(rows, tmp_path / "out.jsonl") == 2
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and [CaptionRow(**json.loads(line)) for line in lines[:2]] == rows
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_sidecars_mirror_the_folder(tmp_path: Path) -> None:
    rows = [row("a", "one\ntwo\n"), row("b/c.v2", "größer"), row("bad", None)]
    assert write_sidecars(rows, tmp_path) == 2
    files = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"a.txt": b"one two", "b/c.v2.txt": "größer".encode()}
    written = read_captions_of(tmp_path)
    assert written == {"a": "one two", "b/c.v2": "größer"}


def read_captions_of(root: Path) -> dict[str, str | None]:
    """What read_folder makes of sidecars beside images of the same keys."""
    for key in ("a", "b/c.v2"):
        (root / f"{key}.png").write_bytes(b"x")
    return {r.key: r.caption for r in read_folder(root)}


@pytest.mark.parametrize("key", ["../a", "a/../../b", "/etc/a", "", "..", ".", "a/\0b"])
def test_keys_that_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="leads out of the folder"):
        write_sidecars([row(key)], tmp_path / "out")


def test_a_linked_folder_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match="leads out"):
        write_sidecars([row("link/a")], tmp_path / "out")
    assert not (tmp_path / "a.txt").exists()


def test_longest_names_and_clashes(tmp_path: Path) -> None:
    assert write_sidecars([row("x" * 251)], tmp_path) == 1
    with pytest.raises(DataError, match="same name"):
        write_sidecars([row("a"), row("a.txt/b")], tmp_path)


@given(st.text(alphabet=st.sampled_from("ab./\\\0 ~"), max_size=12))
def test_no_key_leads_out(key: str) -> None:
    root = Path("/root-of-the-test/out")
    try:
        path = sidecar_path(root, key)
    except DataError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(root) and path.name.endswith(".txt")


def test_formats_import_no_heavy_library() -> None:
    code = (
        "import sys, captioner.sources.folder, captioner.views\n"
        "assert not {'torch', 'adapters', 'trl', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
