"""Captioned images in the layouts that trainers of image generators read.

:func:`join` brings a data set's images and their caption rows together again; each writer of :func:`layouts`
writes them below an empty folder. Which file is which: docs/formats.md. Captions are one line everywhere;
what cannot be written as the layout demands is skipped with its reason, never renamed beyond what is said.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import tarfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from captioner.errors import DataError
from captioner.records import CaptionRow
from captioner.sources.folder import NO_SUCH_NAME, json_line, one_line, sidecar_path
from captioner.sources.source import open_source, read_shard
from captioner.sources.tables import BATCH
from captioner.views import FORMATS, BadImage, read_bytes

SHARD_ROWS = 10_000
SHARD_BYTES = 1 << 30
ROW_GROUP = 96  # rows with images
SUFFIX = {"JPEG2000": ".jp2", "TIFF": ".tif", "JPEG": ".jpg", "MPO": ".jpg"}
KOHYA_SUFFIXES = (".jpg", ".png", ".webp", ".bmp")  # what sd-scripts look for
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
EXIF_ORIENTATION = 0x0112

Skipped = Counter  # reason -> images


@dataclass(frozen=True)
class Captioned:
    """An image with its caption, one line, and that caption within each token budget (None: none fits)."""

    row: CaptionRow
    caption: str
    lengths: Mapping[str, str | None]  # column such as "caption_75" -> text
    image: bytes
    suffix: str  # of its file: ".jpg"
    width: int  # pixels, upright
    height: int

    @property
    def text(self) -> str:
        """What layouts with one caption per image hold: the first budget's, else the whole."""
        return next(iter(self.lengths.values()), self.caption) or ""

    @property
    def columns(self) -> dict[str, Any]:
        """What is said of the image beside its bytes."""
        about = {"key": self.row.key, "id": self.row.id, "caption": self.caption, **self.lengths}
        return about | {"width": self.width, "height": self.height, "model": self.row.model}


Lengths = Mapping[str, Callable[[str], str]]  # column -> what repairs a caption to its budget


def repaired(caption: str, lengths: Lengths) -> dict[str, str | None]:
    """The caption within each budget; None where no statement fits."""
    return {column: fit(caption) or None for column, fit in lengths.items()}


# ---------------------------------------------------------------- images and captions


def join(
    rows: Iterable[CaptionRow], images: str, lengths: Lengths, skipped: Skipped[str], index: Path
) -> Iterator[Captioned]:
    """Every captioned row with its image from the source ``images``, in the order of the source.

    Joined by key, and checked by the sha256 of the image; in whatever order the two come, memory stays flat:
    the rows wait in a database at ``index``, which the caller removes. Rows without caption are passed over;
    captions that do not find their image are counted in ``skipped``.
    """
    with closing(sqlite3.connect(index)) as database:
        database.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=OFF;")
        database.execute("CREATE TABLE captions (key, id, row, PRIMARY KEY (key, id)) WITHOUT ROWID")
        database.executemany(
            "INSERT OR IGNORE INTO captions VALUES (?, ?, ?)",
            ((row.key, row.id, row.model_dump_json()) for row in rows if row.caption is not None),
        )
        for shard in open_source(images):
            for item in read_shard(shard):
                found = dict(database.execute("SELECT id, row FROM captions WHERE key = ?", [item.key]))
                if not found or item.image is None:
                    continue
                try:
                    data = item.image if isinstance(item.image, bytes) else read_bytes(item.image)
                    sha = hashlib.sha256(data).hexdigest()
                    if sha not in found:
                        continue
                    captioned = _captioned(CaptionRow.model_validate_json(found[sha]), data, lengths)
                except BadImage:  # it could be read when it was captioned
                    continue
                database.execute("DELETE FROM captions WHERE key = ? AND id = ?", [item.key, sha])
                if captioned.text:
                    yield captioned
                else:
                    skipped["no statement fits the budget"] += 1
        [[left]] = database.execute("SELECT count(*) FROM captions")
    if left:
        skipped["its image is not in the source, or is another now"] += left


def _captioned(row: CaptionRow, data: bytes, lengths: Lengths) -> Captioned:
    suffix, width, height = _header(data)
    caption = one_line(row.caption or "")
    return Captioned(row, caption, repaired(caption, lengths), data, suffix, width, height)


def _header(data: bytes) -> tuple[str, int, int]:
    """(suffix, width, height) of an encoded image, upright; its pixels were decoded when it was captioned."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
                suffix = SUFFIX.get(image.format or "", f".{(image.format or '').lower()}")
    except Exception as error:  # the boundary: hostile headers
        raise BadImage("its header cannot be read") from error
    return (suffix, height, width) if turned else (suffix, width, height)


# ---------------------------------------------------------------- folders of images


def _place(row: Captioned, folder: Path, skipped: Skipped[str], sidecar: str = "") -> str | None:
    """Write the image, and its caption beside it; returns its path below ``folder``, None where it cannot be.

    The file is named by the key, which keeps an extension of its own only where two images need it.
    """
    short = row.row.key.removesuffix(row.suffix)
    if any(part.startswith((".", "__")) for part in PurePosixPath(row.row.key).parts):
        skipped["trainers pass over hidden names"] += 1
        return None
    try:
        for stem in dict.fromkeys((short, row.row.key)):
            path = sidecar_path(folder, stem, row.suffix)
            beside = path.with_suffix(sidecar) if sidecar else path
            if path.exists() or beside.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row.image)
            if sidecar:
                beside.write_text(row.text, encoding="utf-8")
            return path.relative_to(folder).as_posix()
        skipped["another image has its file name"] += 1
    except DataError:
        skipped["its key leads out of the folder"] += 1
    except OSError as error:
        if error.errno not in NO_SUCH_NAME:
            raise
        skipped[NO_SUCH_NAME[error.errno]] += 1
    return None


def imagefolder(rows: Iterator[Captioned], out: Path, skipped: Skipped[str]) -> int:
    """Images and ``metadata.jsonl`` with ``file_name`` and ``text``, which `datasets` loads."""
    count = 0
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            name = _place(row, out, skipped)
            if name is not None:
                about = row.columns
                file.write(json_line({"file_name": name, "text": about.pop("caption"), **about}))
                count += 1
    return count


def kohya(rows: Iterator[Captioned], out: Path, skipped: Skipped[str], home: Path) -> int:
    """Images with a ``.txt`` each and ``dataset.toml`` for sd-scripts' ``--dataset_config``.

    sd-scripts read a directory without those below it, so that each directory is a subset; they take the
    first line of a caption file. Wildcards are off, therefore ``{a|b}`` in a caption stays what it says.
    """
    directories: dict[str, int] = {}
    for row in rows:
        if row.suffix not in KOHYA_SUFFIXES:
            skipped[f"sd-scripts read no {row.suffix} files"] += 1
            continue
        name = _place(row, out, skipped, ".txt")
        if name is not None:
            directory = PurePosixPath(name).parent.as_posix()
            directories[directory] = directories.get(directory, 0) + 1
    lines = ["[general]", 'caption_extension = ".txt"', "enable_wildcard = false", "", "[[datasets]]"]
    for directory in sorted(directories):
        path = json.dumps(str(home / directory), ensure_ascii=False).replace("\x7f", "\\u007f")
        lines += ["", "  [[datasets.subsets]]", f"  image_dir = {path}"]
    (out / "dataset.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum(directories.values())


def simpletuner(rows: Iterator[Captioned], out: Path, skipped: Skipped[str], home: Path) -> int:
    """Images, ``captions.parquet`` and ``multidatabackend.json`` that reads the captions from it.

    SimpleTuner's text files hold one caption per line; a table has no such rule, and it knows sizes.
    """
    lengths: list[str] = []

    def table() -> Iterator[dict[str, Any]]:
        for row in rows:
            lengths[:] = row.lengths
            name = _place(row, out / "images", skipped)
            if name is not None:
                yield {"filename": name, **row.columns}

    (out / "images").mkdir()
    count = _write_table(table(), out / "captions.parquet", SHARD_ROWS)
    captions = {
        "path": str(home / "captions.parquet"),
        "filename_column": "filename",
        "caption_column": (lengths or ["caption"])[0],
        "width_column": "width",
        "height_column": "height",
        "identifier_includes_extension": True,
    }
    images = {
        "id": "captioner",
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": str(home / "images"),
        "caption_strategy": "parquet",
        "metadata_backend": "parquet",
        "parquet": captions,
        "cache_dir_vae": str(home / "cache" / "vae"),
    }
    texts = {
        "id": "captioner-text",
        "type": "local",
        "dataset_type": "text_embeds",
        "default": True,
        "cache_dir": str(home / "cache" / "text"),
    }
    (out / "multidatabackend.json").write_text(json.dumps([images, texts], indent=2) + "\n")
    return count


# ---------------------------------------------------------------- shards


def _shards(rows: Iterable[Captioned]) -> Iterator[tuple[int, Iterator[Captioned]]]:
    """Number and rows of each output shard: at most SHARD_ROWS, and about SHARD_BYTES of images."""
    number = count = size = 0

    def shard(row: Captioned) -> int:
        nonlocal number, count, size
        if count == SHARD_ROWS or size >= SHARD_BYTES:
            number, count, size = number + 1, 0, 0
        count, size = count + 1, size + len(row.image)
        return number

    return groupby(rows, key=shard)


class _Names:
    """Names that were given out, in a database so that memory stays flat."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE names (name PRIMARY KEY, times)")

    def unique(self, name: str) -> str:
        """The name; with a number behind it where another had it, in any case of its letters."""
        same = unicodedata.normalize("NFC", name).casefold()
        add = "INSERT INTO names VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times"
        [[times]] = self._database.execute(add, [same])
        return name if times == 1 else f"{name}%23{times}"


def webdataset(rows: Iterator[Captioned], out: Path, skipped: Skipped[str]) -> int:
    """Tars of ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``; the latter has the whole row, the key included.

    In webdataset a key ends at the first dot of its last part: there, ``.`` becomes ``%2E`` (and ``%`` is
    ``%25``). The second image of a key, or of one that differs in case alone, gets ``%232`` behind it.
    """
    count = 0
    names = _Names()
    for number, shard in _shards(rows):
        with tarfile.open(out / f"{number:05d}.tar", "w", encoding="utf-8") as tar:
            for row in shard:
                folder, slash, base = row.row.key.rpartition("/")
                stem = names.unique(folder + slash + base.replace("%", "%25").replace(".", "%2E"))
                try:
                    sidecar_path(out, stem)
                except DataError:
                    skipped["its key leads out of the folder"] += 1
                    continue
                about = json.dumps(row.columns, ensure_ascii=False).encode()
                for suffix, data in ((row.suffix, row.image), (".json", about), (".txt", row.text.encode())):
                    info = tarfile.TarInfo(stem + suffix)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                count += 1
    return count


def parquet(rows: Iterator[Captioned], out: Path, skipped: Skipped[str]) -> int:
    """Shards with ``image`` as ``{bytes, path}``: `datasets` loads them with decoded images."""
    return sum(_write_table(_with_image(shard), out / f"part-{n:05d}.parquet") for n, shard in _shards(rows))


def hf(rows: Iterator[Captioned], out: Path, skipped: Skipped[str]) -> int:
    """A data set for ``datasets.load_from_disk``."""
    import datasets
    import pyarrow as pa

    count, parts = 0, out / ".parts"  # Arrow files that are memory-mapped while the data set is written
    parts.mkdir()
    for number, shard in _shards(rows):
        with (parts / f"{number:05d}.arrow").open("wb") as sink:
            writer = None
            for table in _tables(_with_image(shard)):
                writer = writer or pa.ipc.new_stream(sink, table.schema)
                writer.write_table(table)
                count += len(table)
            if writer:
                writer.close()
    files = sorted(parts.iterdir())
    if files:
        datasets.disable_progress_bars()
        whole = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
        whole.save_to_disk(out)
    for file in files:
        file.unlink()
    parts.rmdir()
    return count


def _with_image(rows: Iterable[Captioned]) -> Iterator[dict[str, Any]]:
    for row in rows:
        path = f"{PurePosixPath(row.row.key).name}{row.suffix}"
        yield {"image": {"bytes": row.image, "path": path}, **row.columns}


def _tables(rows: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Arrow tables of a few rows each, with what `datasets` wants to know of the columns."""
    import datasets
    import pyarrow as pa

    waiting = iter(rows)
    schema = None
    while chunk := list(islice(waiting, BATCH)):
        if schema is None:
            kinds = {"image": datasets.Image(), "width": datasets.Value("int64")}
            kinds["height"] = kinds["width"]
            text = datasets.Value("string")
            schema = datasets.Features({name: kinds.get(name, text) for name in chunk[0]}).arrow_schema
        yield pa.Table.from_pylist(chunk, schema=schema)


def _write_table(rows: Iterable[dict[str, Any]], path: Path, group: int = ROW_GROUP) -> int:
    """Write rows to a Parquet file, ``group`` of them in memory at once; returns their count."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    tables = _tables(rows)
    while chunk := list(islice(tables, group // BATCH)):
        table = pa.concat_tables(chunk)
        writer = writer or pq.ParquetWriter(path, table.schema, write_batch_size=BATCH)  # pages to stream
        writer.write_table(table)
        count += len(table)
    if writer:
        writer.close()
    return count


def layouts(home: Path) -> dict[str, Callable[[Iterator[Captioned], Path, Skipped[str]], int]]:
    """The writers by name; each returns how many images it wrote. ``home`` is where the folder will lie."""
    return {
        "imagefolder": imagefolder,
        "kohya": partial(kohya, home=home),
        "simpletuner": partial(simpletuner, home=home),
        "webdataset": webdataset,
        "parquet": parquet,
        "hf": hf,
    }
