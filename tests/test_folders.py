"""Sixty small folders as people have them: each is read, or refused with the right reason."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from captioner.errors import DataError
from captioner.sources import resolve
from captioner.sources.folder import load_row, read_folder
from captioner.views import BadImage

Files = dict[str, bytes | str]


@cache
def picture(form: str = "JPEG", color: str = "teal") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(data, form)
    return data.getvalue()


JPG, PNG = picture(), picture("PNG")
CUT = JPG[: len(JPG) // 2]  # a JPEG that ends in the middle
TWO = {"cat.jpg": JPG, "dog.jpg": JPG}
CAT, DOG = "a grey cat, yawning", "Hund für Größe"
BOTH = {"cat": CAT, "dog": DOG}
ROWS = [("cat.jpg", CAT), ("dog.jpg", DOG)]


def table(
    delimiter: str = ",", header: str = "file_name,text", encoding: str = "utf-8", end: str = "\n"
) -> bytes:
    quoted = [f'{name}{delimiter}"{text}"' for name, text in ROWS]
    lines = ([header.replace(",", delimiter)] if header else []) + quoted
    return (end.join(lines) + end).encode(encoding)


def lines(**columns: str) -> str:
    """JSON Lines of the rows, with other names for their columns."""
    file, text = columns.get("file", "file_name"), columns.get("text", "text")
    return "".join(json.dumps({file: name, text: said}) + "\n" for name, said in ROWS)


def parquet(**columns: list[Any]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


def tar(*members: tuple[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return data.getvalue()


COCO = {
    "images": [{"id": 7, "file_name": "cat.jpg"}, {"id": 8, "file_name": "dog.jpg"}],
    "annotations": [
        {"image_id": 7, "caption": "a cat"},
        {"image_id": 7, "caption": CAT},
        {"image_id": 8, "caption": DOG},
    ],
}
LLAVA = [
    {
        "id": name,
        "image": name,
        "conversations": [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": said},
        ],
    }
    for name, said in ROWS
]

# name -> files, source, what becomes of each image (its caption, None for none, "! reason"), or a refusal
CASES: dict[str, tuple[Files, str, dict[str, str | None] | str]] = {
    # ---- encodings
    "csv utf-8": ({**TWO, "metadata.csv": table()}, "", BOTH),
    "csv with a byte order mark, as Excel writes": (
        {**TWO, "metadata.csv": table(encoding="utf-8-sig")},
        "",
        BOTH,
    ),
    "csv utf-16 with a mark": ({**TWO, "metadata.csv": table("\t", encoding="utf-16")}, "", BOTH),
    "csv utf-16 big-endian without a mark": ({**TWO, "metadata.csv": table(encoding="utf-16-be")}, "", BOTH),
    "csv latin-1": ({**TWO, "metadata.csv": table(encoding="latin-1")}, "", BOTH),
    "csv windows line ends": ({**TWO, "metadata.csv": table(end="\r\n")}, "", BOTH),
    "csv old mac line ends": ({**TWO, "metadata.csv": table(end="\r")}, "", BOTH),
    "jsonl with a byte order mark": ({**TWO, "metadata.jsonl": b"\xef\xbb\xbf" + lines().encode()}, "", BOTH),
    "jsonl utf-16": ({**TWO, "metadata.jsonl": lines().encode("utf-16")}, "", BOTH),
    "csv in shift-jis": (
        {**TWO, "metadata.csv": "file_name,text\ncat.jpg,これは猫の写真です\n".encode("shift-jis")},
        "",
        "neither UTF-8, UTF-16 nor Latin-1|cp?1252|codec",
    ),
    # ---- delimiters
    "semicolons": ({**TWO, "captions.csv": table(";")}, "", BOTH),
    "semicolons and a byte order mark": ({**TWO, "captions.csv": table(";", encoding="utf-8-sig")}, "", BOTH),
    "tabs in a csv": ({**TWO, "captions.csv": table("\t")}, "", BOTH),
    "a tsv": ({**TWO, "captions.tsv": table("\t")}, "", BOTH),
    "pipes": ({**TWO, "results.csv": table("|", "image_name,comment")}, "", BOTH),
    "excel's sep line": ({**TWO, "captions.csv": b"sep=;\r\n" + table(";", end="\r\n")}, "", BOTH),
    "commas nobody quoted": (
        {**TWO, "captions.csv": f"file_name,text\ncat.jpg,{CAT}\ndog.jpg,{DOG}\n"},
        "",
        BOTH,
    ),
    "commas nobody quoted in the first column": (
        {**TWO, "metadata.csv": f"text,file_name\n{CAT},cat.jpg\n"},
        "",
        "row 1 has 3 cells for 2 columns",
    ),
    "a quote that never closes": (
        {**TWO, "metadata.csv": 'file_name,text\ncat.jpg,"a'},
        "",
        "cannot be read",
    ),
    "a line break in a quoted caption": (
        {"cat.jpg": JPG, "captions.csv": 'file,text\ncat.jpg,"a cat,\nyawning"\n'},
        "",
        {"cat": "a cat,\nyawning"},
    ),
    # ---- columns
    "no header": ({**TWO, "captions.csv": table(header="")}, "", BOTH),
    "a column caption": ({**TWO, "metadata.csv": table(header="file_name,caption")}, "", BOTH),
    "a column prompt": ({**TWO, "metadata.csv": table(header="image,prompt")}, "", BOTH),
    "capitals and blanks": ({**TWO, "data.csv": table(header="File Name,Image Caption")}, "", BOTH),
    "image and description": ({**TWO, "metadata.jsonl": lines(file="image", text="description")}, "", BOTH),
    "columns by name": ({**TWO, "liste.csv": table(header="Datei,Text")}, "?file=Datei", BOTH),
    "columns by name, of captions": ({**TWO, "l.csv": table(header="file,Satz")}, "?text=Satz", BOTH),
    "no such column": (
        {**TWO, "metadata.csv": table()},
        "?text=Satz",
        "no column 'Satz' among file_name, text",
    ),
    "no column of captions": (
        {**TWO, "metadata.csv": table(header="file_name,width")},
        "",
        "no column of captions",
    ),
    "a table of something else": (
        {**TWO, "prices.csv": "date,price\n1,2\n", "cat.txt": CAT, "dog.txt": DOG},
        "",
        BOTH,
    ),
    "two tables": ({**TWO, "a.csv": table(), "b.csv": table()}, "", "2 caption tables of one folder"),
    "two tables, one named": ({**TWO, "a.csv": table(), "b.csv": table()}, "a.csv", BOTH),
    "a workbook": ({**TWO, "captions.xlsx": b"PK\3\4"}, "", {"cat": None, "dog": None}),
    "parquet of paths": (
        {**TWO, "captions.parquet": parquet(image_path=["cat.jpg", "dog.jpg"], caption=[CAT, DOG])},
        "",
        BOTH,
    ),
    "coco captions": ({**TWO, "captions_val.json": json.dumps(COCO)}, "", BOTH),
    "llava conversations": ({**TWO, "chat.json": json.dumps(LLAVA)}, "chat.json", BOTH),
    # ---- how rows name images
    "back slashes": ({"a/cat.jpg": JPG, "c.csv": "image,text\na\\cat.jpg,a cat\n"}, "", {"a/cat": "a cat"}),
    "dot slash": ({"cat.jpg": JPG, "c.csv": "image,text\n./cat.jpg,a cat\n"}, "", {"cat": "a cat"}),
    "the folder's own name": (
        {"cat.jpg": JPG, "c.csv": "image,text\nset/cat.jpg,a cat\n"},
        "",
        {"cat": "a cat"},
    ),
    "a path of another machine": (
        {"cat.jpg": JPG, "c.csv": "image,text\nC:\\Users\\me\\cat.jpg,a cat\n"},
        "",
        {"cat": "a cat"},
    ),
    "another case": ({"IMG_1.JPG": JPG, "c.csv": "image,text\nimg_1.jpg,a cat\n"}, "", {"IMG_1": "a cat"}),
    "no extension": ({"cat.jpg": JPG, "c.csv": "id,text\ncat,a cat\n"}, "", {"cat": "a cat"}),
    "decomposed letters": (
        {"größe.jpg": JPG, "c.csv": "image,text\ngro\u0308ße.jpg,a cat\n"},
        "",
        {"größe": "a cat"},
    ),
    "an image that is not there": (
        {"cat.jpg": JPG, "c.csv": "image,text\ncat.jpg,a cat\ncow.jpg,a cow\n"},
        "",
        {"cat": "a cat", "cow.jpg": "! the image 'cow.jpg' is not in the folder"},
    ),
    "an image named twice": (
        {"cat.jpg": JPG, "c.csv": "image,text\ncat.jpg,a cat\ncat.jpg,no cat\n"},
        "",
        {"cat": "a cat", "cat.jpg (c.csv, row 2)": "! the image 'cat.jpg' is named twice"},
    ),
    # ---- sidecars
    "txt": ({**TWO, "cat.txt": CAT, "dog.txt": DOG}, "", BOTH),
    "txt with a byte order mark": (
        {"cat.jpg": JPG, "cat.txt": b"\xef\xbb\xbfa cat\r\n"},
        "",
        {"cat": "a cat"},
    ),
    "txt in utf-16 and latin-1": (
        {**TWO, "cat.txt": CAT.encode("utf-16"), "dog.txt": DOG.encode("latin-1")},
        "",
        BOTH,
    ),
    "TXT and caption": ({**TWO, "cat.TXT": CAT, "dog.caption": DOG}, "", BOTH),
    "an empty txt": ({"cat.jpg": JPG, "cat.txt": " \n"}, "", {"cat": None}),
    "a txt that is no text": (
        {"cat.jpg": JPG, "cat.txt": b"\0\1\2"},
        "",
        {"cat": "! its caption file cannot be read"},
    ),
    # ---- images
    "broken images": (
        {"cut.jpg": CUT, "empty.jpg": b"", "text.png": b"not an image", "good.png": PNG},
        "",
        {"cut": "! cannot be decoded", "empty": "! empty file", "text": "! not an image", "good": None},
    ),
    "heic, jxl and raw": (
        {"a.heic": b"\0\0\0\x18ftypheic", "b.jxl": b"\xff\x0a", "c.CR2": b"II*\0", "d.jpg": JPG},
        "",
        {
            "a": "! (?:HEIC|cannot be decoded|not an image)",
            "b": "! JPEG XL",
            "c": "! a camera's raw file",
            "d": None,
        },
    ),
    "a photograph beside its raw file": (
        {"a.jpg": JPG, "a.nef": b"II*\0", "a.txt": "a cat"},
        "",
        {"a": "a cat", "a.nef": "! a camera's raw file"},
    ),
    "no images": ({"read me.md": "nothing"}, "", "no images in this folder"),
    # ---- folders in folders
    "a table in each split": (
        {
            f"{s}/{name}": data
            for s in ("train", "val")
            for name, data in {**TWO, "metadata.csv": table()}.items()
        },
        "",
        {f"{split}/{key}": text for split in ("train", "val") for key, text in BOTH.items()},
    ),
    "one split": (
        {
            f"{s}/{name}": data
            for s in ("train", "val")
            for name, data in {**TWO, "metadata.csv": table()}.items()
        },
        "#val",
        BOTH,
    ),
    "a column split": (
        {**TWO, "all.csv": f"image;caption;split\ncat.jpg;{CAT};train\ndog.jpg;{DOG};val\n"},
        "all.csv#val",
        {"dog": DOG},
    ),
    "no such split": ({**TWO}, "#test", "no split 'test'"),
    # ---- packed
    "a tar": ({"a.tar": tar(("cat.jpg", JPG), ("cat.txt", CAT.encode()))}, "a.tar", {"cat": CAT}),
    "a folder of tars": (
        {
            "a.tar": tar(("cat.jpg", JPG), ("cat.json", json.dumps({"caption": CAT}).encode())),
            "b.tar": tar(("x.txt", b"")),
        },
        "",
        {"cat": CAT, "x": "! no image in the sample"},
    ),
    "parquet of bytes": (
        {"a.parquet": parquet(image=[JPG, PNG], key=["cat", "../dog"], text=[CAT, DOG])},
        "a.parquet",
        {"cat": CAT, "../dog": "! its (?:name is hidden|key leads out of the folder)"},
    ),
    "a list": (
        {**TWO, "dog.txt": DOG, "set.lst": "dog.jpg\nno.jpg\n"},
        "set.lst",
        {"dog": DOG, "no": "! no such file"},
    ),
    "one photograph": ({**TWO, "dog.txt": DOG}, "dog.jpg", {"dog": DOG}),
}


def write(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def outcome(source: str, cache: Path) -> dict[str, str | None]:
    """What becomes of every image of a source, as training finds it."""
    found = {}
    for row in read_folder(resolve(source, cache=cache)):
        try:
            load_row(row)
            found[row.key] = row.caption
        except BadImage as error:
            found[row.key] = f"! {error.reason}"
    return found


@pytest.mark.parametrize("name", CASES)
def test_folders_as_people_have_them(tmp_path: Path, name: str) -> None:
    files, source, expected = CASES[name]
    root = write(tmp_path / "set", files)
    whole = f"{root}{source}" if source[:1] in ("", "?", "#") else str(root / source)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            outcome(whole, tmp_path / "cache")
        return
    found = outcome(whole, tmp_path / "cache")
    assert found.keys() == expected.keys()
    for key, text in expected.items():
        if text and text.startswith("! "):
            assert re.match(text, found[key] or "")
        else:
            assert found[key] == text


def test_sixty_of_them() -> None:
    assert len(CASES) >= 60


# ---------------------------------------------------------------- subsets


@pytest.fixture
def many(tmp_path: Path) -> Callable[[str], set[str]]:
    files: Files = {f"{i % 3}/{i}.jpg": JPG for i in range(30)}
    files |= {f"{i % 3}/{i}.txt": f"number {i}" for i in range(30)}
    root = write(tmp_path / "photos", files)
    packed = tar(*((f"{i}.jpg", JPG) for i in range(30)))
    write(tmp_path, {"all.tar": packed})
    return partial(_keys, root, tmp_path / "cache")


def _keys(root: Path, cache: Path, more: str) -> set[str]:
    source = f"{root}{more}" if more[0] in "?#" else f"{root.parent}/{more}"
    folder = resolve(source, cache=cache)
    rows = read_folder(folder)
    assert all(row.caption == f"number {row.path.stem}" for row in rows if root.name in source)
    return {row.key for row in rows}


@pytest.mark.parametrize("base", ["", "all.tar"])
def test_a_count_is_a_seeded_subset_and_parts_are_disjoint(
    many: Callable[[str], set[str]], base: str
) -> None:
    first = many(f"{base}?count=12&seed=1")
    assert len(first) == 12 and first == many(f"{base}?count=12&seed=1")
    assert first != many(f"{base}?count=12&seed=2")
    second, third = many(f"{base}?count=12&seed=1&part=2"), many(f"{base}?count=12&seed=1&part=3")
    assert (len(second), len(third), len(first | second | third)) == (12, 6, 30)
    with pytest.raises(DataError, match="only 30 images"):
        many(f"{base}?count=12&seed=1&part=4")


@pytest.mark.parametrize(
    ("more", "message"), [("?count=0", "whole number"), ("?cuont=3", "no setting 'cuont'")]
)
def test_settings_that_are_none(many: Callable[[str], set[str]], more: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        many(more)


def test_a_changed_source_is_gathered_again(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {**TWO, "c.csv": table()})
    first = resolve(f"{root}/c.csv", cache=tmp_path / "cache")
    assert resolve(f"{root}/c.csv", cache=tmp_path / "cache") == first
    (root / "c.csv").write_bytes(table().replace(b"grey", b"brown"))
    second = resolve(f"{root}/c.csv", cache=tmp_path / "cache")
    assert second != first and read_folder(second)[0].caption == CAT.replace("grey", "brown")
    assert os.path.islink(second / "cat.jpg") and (root / "cat.jpg").read_bytes() == JPG


def test_a_folder_is_read_where_it_lies(tmp_path: Path) -> None:
    root = write(tmp_path / "what?#1", TWO)  # a name that looks like settings
    assert resolve(str(root), cache=tmp_path / "cache") == root
    assert not (tmp_path / "cache").exists()
