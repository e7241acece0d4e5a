"""Every kind of data set is read shard by shard, keys unchanged, and whatever is hostile is accounted for."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from captioner.errors import DataError
from captioner.sources import tables, tars
from captioner.sources.source import Item, ShardRef, open_source, read_shard


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade % 256).save(file, "PNG")
    return file.getvalue()


def read(spec: object, **options: int) -> list[Item]:
    """All items, through shards that have been to JSON and back."""
    shards = [ShardRef(**json.loads(json.dumps(asdict(s)))) for s in open_source(str(spec), **options)]
    assert [s.index for s in shards] == list(range(len(shards)))
    for shard in shards:
        assert pickle.loads(pickle.dumps(shard)) == shard
    found = [(shard, list(read_shard(shard))) for shard in shards]
    assert all(shard.rows in (None, len(items)) for shard, items in found)
    assert all(len(shard.location) < 1000 for shard in shards)
    return [item for _, items in found for item in items]


def good(items: list[Item]) -> list[str]:
    assert all((item.error is None) == (item.image is not None) for item in items)
    return [item.key for item in items if item.error is None]


def bad(items: list[Item]) -> dict[str, str]:
    return {item.key: item.error for item in items if item.error is not None}


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def memory_of_reading(path: Path) -> tuple[int, int]:
    """(images, kilobytes that reading them adds to the peak of a process) of the one shard in ``path``."""
    code = (
        "import sys, pyarrow.parquet\n"
        "from captioner.sources.source import open_source, read_shard\n"
        "def peak():\n"
        "    [line] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "    return int(line.split()[1])\n"
        "[shard] = open_source(sys.argv[1])\n"
        "before = peak()\n"
        "print(sum(item.error is None for item in read_shard(shard)), peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True, timeout=240
    )
    count, kilobytes = map(int, done.stdout.split())
    return count, kilobytes


# ---------------------------------------------------------------- folders and lists


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for i, name in enumerate(("b.png", "a.PNG", "sub/a.jpg", "sub/a.png", "sub/deep/größe.webp")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (root / "b.txt").write_text("a caption\n")
    (root / "sub/a.jpg.caption").write_bytes(b"bad \xff text")
    (root / "notes.md").write_text("no image")
    return root


def test_a_folder(folder: Path) -> None:
    items = read(folder, shard_rows=2)
    assert [i.key for i in items] == ["a", "b", "sub/a.jpg", "sub/a.png", "sub/deep/größe"]
    assert items[0].image == folder / "a.PNG" and items[4].image == folder / "sub/deep/größe.webp"
    assert [i.caption for i in items] == [None, "a caption", "bad ÿ text", None, None]
    assert [s.rows for s in open_source(str(folder), shard_rows=2)] == [2, 2, 1]
    assert next(open_source(str(folder))).name == "files-00000"


def test_a_folder_is_walked_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}").mkdir()
        (tmp_path / f"{i:02d}/x.png").write_bytes(b"")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    shards = open_source(str(tmp_path), shard_rows=2)
    assert next(shards).rows == 2 and len(listed) < 6
    assert sum(s.rows or 0 for s in shards) == 18 and len(listed) > 20


def test_a_list(folder: Path) -> None:
    lines = [
        "b.png",
        "",
        "sub/../a.PNG",
        "gone.png",
        "sub/a.jpg",
        "sub/a.png",
        "b.png",
        "a\0b.png",
        "/",
        "/x.png",
    ]
    names = folder / "list.txt"
    names.write_text("\ufeff" + "\r\n".join(lines))
    items = read(names, shard_rows=5)
    assert [i.key for i in items[:5]] == ["b", "a", "gone", "sub/a.jpg", "sub/a.png"]
    assert items[0].image == folder / "b.png" and items[0].caption == "a caption"
    assert items[5] == Item("b", folder / "b.png", "a caption")  # of another shard than the first
    assert [i.error for i in items[6:8]] == ["not a file name"] * 2
    assert items[8] == Item("x", Path("/x.png"))
    assert bad(read(names))["b"] == "another image of this shard has the same key"
    (folder / "sub" / "up.lst").write_text("../b.png\n" * 2)
    first, second = read(folder / "sub" / "up.lst")
    assert first.key == f"{folder}/b"[1:] and second.error == "another image of this shard has the same key"


@pytest.mark.skipif(sys.platform == "darwin", reason="that file system refuses such names")
def test_names_that_are_not_utf8_are_rows(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    [item] = read(tmp_path)
    assert item == Item("\\udcff", None, error="its name is not UTF-8")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no such file"),
        ("scenes:test:3", "render scenes"),
        ("*.tar", "no file matches"),
        ("{000..002}.tar", "3 of the files are not there"),
        ("empty", "no images"),
        ("empty.txt", "nothing to read"),
        ("a.zip", "neither tars nor Parquet"),
        ("hf:nowhere", "can be loaded"),
    ],
)
def test_specs_that_name_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "a.zip").write_text("")
    with pytest.raises(DataError, match=message):
        open_source(spec)


# ---------------------------------------------------------------- webdataset


def test_tars_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    rows = [("sub.dir/000", "jpg"), ("./001", "png"), ("two words", "webp"), ("003", "b.jpg")]
    for shard in range(3):
        members = []
        for i, (key, extension) in enumerate(rows):
            name = f"{key}x{shard}"
            members += [
                (f"{name}.{extension}", png(i)),
                (f"{name}.json", b'{"caption": "from json"}'),
                *([(f"{name}.txt", f"größe {i}\n".encode())] if i else []),
            ]
        tar(tmp_path / f"{shard:03d}.tar", [*members, ("README", b"x"), ("._y.jpg", b"x")])
    items = read(tmp_path)
    theirs = list(webdataset.WebDataset([str(p) for p in sorted(tmp_path.glob("*.tar"))], shardshuffle=False))
    assert good(items) == [sample["__key__"] for sample in theirs] and not bad(items)
    for item, sample in zip(items, theirs, strict=True):
        assert item.image in sample.values()
    assert [i.caption for i in items[:3]] == ["from json", "größe 1", "größe 2"]
    for spec in ("*.tar", "{000..002}.tar", "00{0,1,2}.tar"):
        assert read(tmp_path / spec) == items
    assert len(read(tmp_path / "001.tar")) == 4
    assert [s.name for s in open_source(str(tmp_path / "{000..001}.tar"))] == ["000.tar", "001.tar"]


def test_hostile_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_BYTES", 1000)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:

        def add(name: str, data: bytes = png()) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))

        add("../up.jpg")
        add("a/../../up.jpg")
        add("/etc/absolute.jpg")
        for name, kind in (("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)):
            file.addfile(special(f"{name}.jpg", kind, "/etc/passwd"))
        for name, kind in (("c", tarfile.CHRTYPE), ("b", tarfile.BLKTYPE), ("f", tarfile.FIFOTYPE)):
            file.addfile(special(f"{name}.jpg", kind))
        file.addfile(special("dir.jpg", tarfile.DIRTYPE))
        file.addfile(special("s.jpg", tarfile.GNUTYPE_SPARSE))
        add("same.jpg", png(1))
        add("same.png", png(2))
        add("big.jpg", b"x" * 1001)
        add("text.txt", b"no image here")
        add("same.jpg", png(3))
        add("deep.jpg", png(4))
        add("deep.json", b"[" * 100_000)
        add("last.jpg", png(5))
    items = read(path)
    assert good(items) == ["same", "deep", "last"] and items[-1].image == png(5)
    reasons = {(i.key, (i.error or "").split(":")[0]) for i in items if i.error}
    assert reasons == {
        ("../up.jpg", "its name leads out of the folder"),
        ("a/../../up.jpg", "its name leads out of the folder"),
        ("/etc/absolute.jpg", "its name leads out of the folder"),
        ("l.jpg", "a link, not a file"),
        ("h.jpg", "a link, not a file"),
        ("c.jpg", "not a plain file"),
        ("b.jpg", "not a plain file"),
        ("f.jpg", "not a plain file"),
        ("s.jpg", "not a plain file"),
        ("same", "another image of the sample"),
        ("same", "another image of this shard has the same key"),
        ("big", "file too large"),
        ("text", "no image in the sample, but txt"),
    }
    assert len(items) == 3 + len(reasons)


def test_a_tar_cut_anywhere_is_accounted_for(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", [(f"{i}.png", png(i)) for i in range(4)]).read_bytes()
    path = tmp_path / "cut.tar"
    for length in (0, 100, 512, 600, 1024, 1500, 1024 * 3, 1024 * 3 + 512, 1024 * 4, len(whole)):
        path.write_bytes(whole[:length])
        if length < 512:
            with pytest.raises(DataError, match="not a tar"):
                read(path)
            continue
        items = read(path)
        complete = min(4, (length + 512 - len(png()) % 512) // 1024)
        assert good(items)[: length // 1024] == [str(i) for i in range(min(4, length // 1024))], length
        assert len(good(items)) <= complete + 1
        assert (items[-1].key == "cut.tar") == (length < len(whole)), length


def test_a_damaged_header_does_not_end_the_tar_unseen(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [(f"{i}.png", png(i)) for i in range(4)])
    data = bytearray(path.read_bytes())
    data[1024 * 2 + 20] ^= 0xFF  # the third header: its checksum is wrong now
    path.write_bytes(data)
    items = read(path)
    assert good(items) == ["0", "1", "3"] and "damaged" in bad(items)["x.tar"]
    path.write_bytes(tar(tmp_path / "y.tar", [("a.png", png())]).read_bytes() * 2)  # joined with cat
    items = read(path)
    assert good(items) == ["a"] and "goes on behind its end" in bad(items)["x.tar"]
    path.write_bytes(__import__("gzip").compress(path.read_bytes()))
    with pytest.raises(DataError, match="gunzip"):
        read(path)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\0" * 7 + b"\xff" * 4, b"\xff" * 11 + b"\x00", b"77777777777\0"]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_that_lie(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """Negative sizes would send a reader that seeks back into a circle, huge ones make it allocate."""
    good_one = tar(tmp_path / "x.tar", [("a.png", png()), ("b.png", png())]).read_bytes()
    header = bytearray(good_one[:512])
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "y.tar"
    path.write_bytes(good_one[:1024] + bytes(header) + good_one[1024:])
    items = read(path)
    assert good(items) == ["a", "b"] or (good(items)[0] == "a" and bad(items))


def test_headers_upon_headers(tmp_path: Path) -> None:
    pax = tarfile.TarInfo("p")
    pax.type, pax.size = tarfile.XHDTYPE, 12
    block = pax.tobuf(tarfile.USTAR_FORMAT) + b"12 path=a.b\n".ljust(512, b"\0")
    start = tar(tmp_path / "x.tar", [("a.png", png())]).read_bytes()[:1024]
    path = tmp_path / "y.tar"
    path.write_bytes(start + block * 5000 + start + b"\0" * 1024)
    items = read(path)
    assert good(items)[:1] == ["a"] and "more than 16 headers" in bad(items)["y.tar"]
    assert len(items) < 400  # one row for each stretch, not for each header


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header whose size field is ``size`` as it stands, with a good checksum."""
    block = bytearray(special(name, kind).tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(text: bytes) -> bytes:
    """An extended header with one record."""
    record = next(r for n in range(99) if len(r := b"%d %s\n" % (n, text)) == n)
    return header("p", b"%011o\0" % len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0")


def test_a_size_beyond_the_file_costs_its_member_and_no_time(tmp_path: Path) -> None:
    """2^60 bytes, of the member itself or by an extended header: a reader that skips them reads for hours."""
    one, *others = (tar(tmp_path / f"{i}.tar", [(f"{i}.png", png(i))]).read_bytes()[:1024] for i in range(3))
    huge = b"\x80" + (1 << 60).to_bytes(11, "big")
    lies = {
        "a member": header("x.png", huge),
        "no image": header("x.bin", huge),
        "pax": pax(b"size=%d" % (1 << 60)) + header("x.png", b"%011o\0" % 0),
        "negative pax": pax(b"size=-1024") + header("x.png", b"%011o\0" % 0),
        "a pax header itself": header("p", huge, tarfile.XHDTYPE),
        "a long name": header("p", huge, tarfile.GNUTYPE_LONGNAME),
        "a sparse map": header("s.png", huge, tarfile.GNUTYPE_SPARSE),
    }
    for what, lie in lies.items():
        path = tmp_path / "x.tar"
        path.write_bytes(one + lie + b"".join(others) + bytes(1024))
        items = read(path)
        assert good(items) == ["0", "1", "2"], what
        assert "damaged" in bad(items)["x.tar"], what


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_members_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    header = tarfile.TarInfo("000000.png")
    header.size = 1
    with path.open("wb") as file:
        for i in range(100_000):
            header.name = f"{i:06d}.png"
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + b"x".ljust(512, b"\0"))
        file.write(b"\0" * 1024)
    count, kilobytes = memory_of_reading(path)
    assert count == 100_000 and kilobytes < 40_000  # the keys; headers kept would be 200 MB


# ---------------------------------------------------------------- Parquet


def table(path: Path, columns: dict[str, pa.Array], **options: int) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_bytes(tmp_path: Path) -> None:
    rows = 50
    images = [png(i) if i % 10 else None for i in range(rows)]
    columns = {
        "key": pa.array([f"k{i}" if i != 7 else None for i in range(rows)]),
        "image": pa.array(images, pa.binary()),
        "text": pa.array([f"caption {i}" for i in range(rows)]),
        "other": pa.array(range(rows)),
    }
    path = table(tmp_path / "part.parquet", columns, row_group_size=10)
    items = read(path, shard_rows=15)
    assert [i.image for i in items] == images and items[3].caption == "caption 3"
    assert [s.rows for s in open_source(str(path), shard_rows=15)] == [20, 20, 10]
    assert items[7].key == "part/00000007" and items[8].key == "k8"
    assert set(bad(items).values()) == {"no image in the row"} and len(bad(items)) == 5
    assert read(tmp_path, shard_rows=15) == read(tmp_path / "*.parquet", shard_rows=15) == items


@pytest.mark.parametrize("column", ["image", "jpg", "photo"])
def test_parquet_as_datasets_write_it(tmp_path: Path, column: str) -> None:
    if column == "jpg":
        cells = pa.array([png(1), b""], pa.large_binary())
    else:
        cells = pa.array([{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": None}])
    items = read(table(tmp_path / "a.parquet", {column: cells, "id": pa.array([5, 6])}))
    assert [i.key for i in items] == ["5", "6"] and items[0].image == png(1)
    assert items[1].image == b"" if column == "jpg" else items[1].error == "no image in the row"


def test_parquet_with_paths(tmp_path: Path) -> None:
    paths = ["sub/a.png", "/abs/b.png", None, "a\0b", "http://x/y.png", "sub/a.png"]
    items = read(table(tmp_path / "a.parquet", {"path": pa.array(paths)}))
    assert [i.image for i in items] == [tmp_path / "sub/a.png", *[None] * 5]
    assert [i.key for i in items][:3] == ["sub/a.png", "/abs/b.png", "a/00000002"]
    assert "leads out of" in (items[1].error or "")
    assert "same key" in (items[5].error or "") and "is an address" in (items[4].error or "")


def test_parquet_without_images_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column of images among x"):
        read(table(tmp_path / "a.parquet", {"x": pa.array([1])}))
    twice = pa.table([pa.array([b"x"]), pa.array([b"y"])], names=["image", "image"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column of images"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    [shard] = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_shard(shard))


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    columns = {"image": pa.array([os.urandom(100) for _ in range(30)])}
    path = table(tmp_path / "a.parquet", columns, row_group_size=10, use_dictionary=False)
    about = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[about.data_page_offset : about.data_page_offset + 300] = b"\xff" * 300
    path.write_bytes(data)
    items = read(path, shard_rows=10)
    assert len(items) == 30 and [i.error is None for i in items] == [True] * 10 + [False] * 10 + [True] * 10


def test_text_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    keys = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfeb")]
    )
    items = read(table(tmp_path / "a.parquet", {"key": keys, "image": pa.array([b"1", b"2"])}))
    assert [i.key for i in items] == ["a/00000000", "b"] and "cannot be read" in (items[0].error or "")


# ---------------------------------------------------------------- Hugging Face data sets


def hf_rows() -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "file_name": datasets.Value("string"), "text": datasets.Value("string")}
    )
    rows = [
        {"image": {"bytes": png(i), "path": None}, "file_name": f"f{i}", "text": f"t{i}"} for i in range(5)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def test_hf_saved_to_disk(tmp_path: Path) -> None:
    hf_rows().save_to_disk(tmp_path / "one")
    want = [Item(f"f{i}", png(i), f"t{i}") for i in range(5)]
    assert read(tmp_path / "one", shard_rows=2) == read(f"hf:{tmp_path / 'one'}") == want
    assert [s.rows for s in open_source(f"hf:{tmp_path / 'one'}", shard_rows=2)] == [2, 2, 1]
    parts = datasets.DatasetDict({"train": hf_rows(), "test": hf_rows().select([3])})
    parts.save_to_disk(tmp_path / "two")
    assert read(f"hf:{tmp_path / 'two'}:test") == want[3:4] and read(f"hf:{tmp_path / 'two'}") == want
    with pytest.raises(DataError, match="no split 'val' among train, test"):
        open_source(f"hf:{tmp_path / 'two'}:val")


def test_hf_streamed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(2):
        hf_rows().to_parquet(tmp_path / f"set/train-{i:05d}-of-00002.parquet")
    items = read(f"hf:{tmp_path / 'set'}")
    assert [s.name for s in open_source(f"hf:{tmp_path / 'set'}:train")] == ["train-00000", "train-00001"]
    assert [i.image for i in items] == [png(i) for i in range(5)] * 2 and items[6].key == "f1"
    (folder / "sub/a.jpg.caption").unlink()  # which `datasets` would take for an image
    items = read(f"hf:{folder}")  # as an imagefolder
    assert len(items) == 5 and all(isinstance(i.image, Path) and i.image.is_file() for i in items)


ADDRESSES = (
    "hf://d/a.png",
    "s3://b/k::hf://d/a.png",
    "file:///etc/hostname::hf://d/a.png",
    "github://o:r@main/a.png",
    "simplecache::http://x/y.png",
    "zip://a.png::hf://d/b",
    "http://x/y",
)


def test_cells_of_a_table_open_nothing_but_files_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address in a cell is the failed row of that cell; the others of its shard are read."""
    import fsspec

    monkeypatch.setattr(fsspec, "open", lambda *args, **more: pytest.fail(f"opened {args}"))
    (tmp_path / "in").mkdir()
    cells = [*ADDRESSES, "../x.png", "a/../../x.png", "/etc/hostname", "in.png", str(tmp_path / "in/in.png")]
    items = read(table(tmp_path / "in" / "a.parquet", {"path": pa.array(cells)}))
    assert [item.image is not None for item in items] == [False] * 10 + [True, False]
    assert "same key" in (items[-1].error or "")  # of one file by two names
    assert all("is an address" in (item.error or "") for item in items[: len(ADDRESSES)])


def test_images_of_the_hub_are_fetched_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    asked = []
    monkeypatch.setattr(fsspec, "open", lambda path, mode: asked.append(path) or io.BytesIO(b"remote"))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    batch = pa.table({"image": pa.array([{"path": path} for path in ADDRESSES], kind)})
    columns = tables.columns_of(batch.schema, "x")
    items = [
        tables.row_item(batch, i, columns, str(i), Path("/"), remote=True) for i in range(len(ADDRESSES))
    ]
    assert [i.image for i in items] == [b"remote", *[None] * 6]
    assert asked == ["hf://d/a.png"]


def test_keys_that_lead_out_are_failed_rows(tmp_path: Path) -> None:
    keys = ["a", "../evil", "/abs", "b/../../c", "a\0b", "d"]
    items = read(table(tmp_path / "a.parquet", {"key": pa.array(keys), "image": pa.array([png()] * 6)}))
    assert good(items) == ["a", "d"]
    assert bad(items) == dict.fromkeys(keys[1:5], "its key leads out of the folder")


def test_a_task_names_a_place_and_no_names(tmp_path: Path) -> None:
    """However many rows a shard of a folder has, what goes to the worker is small."""
    for i in range(3000):
        (tmp_path / f"a-file-name-of-a-usual-length-{i:06d}.png").touch()
    [shard] = open_source(str(tmp_path), shard_rows=5000)
    assert len(pickle.dumps(shard)) < 1000
    items = list(read_shard(shard))
    assert len(items) == 3000 and items[2999].key == "a-file-name-of-a-usual-length-002999"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    images = pa.array([os.urandom(200_000) for _ in range(300)], pa.binary())
    path = table(tmp_path / "x.parquet", {"image": images}, row_group_size=300, write_batch_size=8)
    count, kilobytes = memory_of_reading(path)
    assert count == 300 and kilobytes < 30_000  # the row group has 60 MB
