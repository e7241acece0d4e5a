"""Images of any supported data set, shard after shard: what bulk captioning reads.

A *spec* names the data set, :func:`open_source` cuts it into shards, :func:`read_shard` streams the images of
one. Everything that is read is hostile until checked: a member, row or file that holds no image that can be
used becomes an :class:`Item` with its reason, and nothing is ever extracted to disk.

========================================  ============================================================
spec                                      what is read
========================================  ============================================================
``FOLDER``                                images below it; ``.txt``/``.caption`` files beside them
``LIST.txt``                              a path a line, relative to the list
``A.tar`` ``DIR/*.tar`` ``{000..999}.tar``  webdataset shards, also a folder that holds only tars
``A.parquet`` ``DIR/*.parquet``           image bytes, ``{bytes, path}`` or paths; also a folder of them
``hf:PATH_OR_NAME[:SPLIT]``               a Hugging Face data set on disk or on the hub
========================================  ============================================================
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from captioner.errors import DataError
from captioner.formats.folder import image_keys, is_image_name, no_images, sidecar, walk_images
from captioner.views import MAX_BYTES

MAX_TEXT = 1 << 20  # bytes of a caption or of metadata in a tar
BLOCK = 512  # bytes: what a tar consists of
BATCH = 16  # rows of a table in memory at once: they hold whole images
MAX_LOST = 1 << 20  # rows: what a damaged file says of its size is not believed beyond
LINE = 1 << 16  # bytes of a line of a file list
LISTS = (".txt", ".lst", ".list")
IMAGE_COLUMNS = ("image", "img", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "content")
PATH_COLUMNS = ("image_path", "path", "file_name", "filename", "filepath", "file", "image", "img")
KEY_COLUMNS = ("key", "__key__", "id", "uid", "image_id", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "txt")


@dataclass(frozen=True)
class Item:
    """One image as it lies in the source."""

    key: str  # unchanged from the source: webdataset key, relative path, key column or file/row
    image: bytes | Path | None  # encoded bytes or the file; None where there is no image to read
    caption: str | None = None  # what the source itself says beside the image
    error: str | None = None  # why there is no image


@dataclass(frozen=True)
class ShardRef:
    """An input shard, the unit of resume; plain values only, so that it goes to other processes and JSON."""

    index: int  # 0.. in an order that is the same every time
    name: str  # such as "000012.tar", "part-3.parquet", "files-00004"
    kind: str  # folder, list, webdataset, parquet, hf
    location: str  # a path, or JSON of what the reader needs
    start: int = 0  # first row, for sources cut by rows
    rows: int | None = None  # None: not known without reading


class _Cut(NamedTuple):
    """A shard before it has its number."""

    name: str
    location: str
    start: int = 0
    rows: int | None = None


def open_source(spec: str, *, shard_rows: int = 256) -> Iterator[ShardRef]:
    """The shards of a data set; see the module for what ``spec`` may be. No image is read.

    A tar is one shard; Parquet files are cut at row groups, the others at ``shard_rows``. Folders and lists
    are walked as the iterator is asked. Raises :class:`DataError` for a spec that names nothing readable.
    """
    try:
        kind, cuts = _cuts(spec, shard_rows)
        first = next(cuts, None)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=spec) from error
    if first is None:
        raise no_images(Path(spec)) if kind == "folder" else DataError("nothing to read here", where=spec)
    return (
        ShardRef(index, cut.name.format(index=index), kind, *cut[1:])
        for index, cut in enumerate(chain([first], cuts))
    )


def read_shard(shard: ShardRef) -> Iterator[Item]:
    """The images of a shard in order, streaming; each member, row or file of it is accounted for by an item.

    Of images with one key the first counts, the others are errors. Raises :class:`DataError` only where
    nothing of the shard can be read, and where a remote data set breaks off.
    """
    seen: set[str] = set()
    for item in _READERS[shard.kind](shard):
        if item.error is None and item.key in seen:
            item = Item(item.key, None, error="another image of this shard has the same key")
        try:
            item.key.encode("utf-8")
        except UnicodeEncodeError:
            key = item.key.encode("utf-8", "backslashreplace").decode()
            item = Item(key, None, error="its name is not UTF-8")
        if item.error is None:
            seen.add(item.key)
        yield item


# ---------------------------------------------------------------- what a spec names


def _cuts(spec: str, shard_rows: int) -> tuple[str, Iterator[_Cut]]:
    if shard_rows < 1:
        raise ValueError(f"shards of {shard_rows} rows")
    if spec.startswith("hf:"):
        return "hf", _hf_cuts(spec, shard_rows)
    if spec.startswith("scenes:") or "://" in spec:
        mend = "render scenes first (captioner scenes), copy remote data to a disk first"
        raise DataError("not a data set on this machine", where=spec, mend=mend)
    path = Path(os.path.abspath(spec))  # other processes may work elsewhere
    if not path.exists() and re.search(r"[*?\[{]", spec):
        files = _matches(str(path))
    elif path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "hf", _hf_cuts(f"hf:{path}", shard_rows)
        files = _tables_only(path)
        if not files:
            return "folder", _folder_cuts(path, shard_rows)
    elif path.is_file():
        if path.suffix.lower() in LISTS:
            return "list", _list_cuts(path, shard_rows)
        files = [path]
    else:
        raise DataError("no such file or folder", where=spec, mend="name a data set: docs/formats.md")
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return "webdataset", (_Cut(_plain(file.name), str(file)) for file in files)
    if kinds == {".parquet"}:
        return "parquet", _parquet_cuts(files, shard_rows)
    raise DataError(
        f"neither tars nor Parquet files: {', '.join(sorted(kinds))}",
        where=spec,
        mend="name a folder of images, a list of them (LIST.txt), *.tar or *.parquet",
    )


def _plain(name: str) -> str:
    """A name that ``str.format`` leaves as it is."""
    return name.replace("{", "{{").replace("}", "}}")


def _matches(pattern: str) -> list[Path]:
    """The files of a pattern with ``*``, ``?``, ``[…]``, ``{000..999}`` and ``{a,b}``."""
    files: list[Path] = []
    missing = []
    for name in _braces(pattern):
        if glob.has_magic(name):
            files += map(Path, sorted(glob.glob(name, recursive=True)))
        elif os.path.isfile(name):
            files.append(Path(name))
        else:
            missing.append(name)
    if missing:
        raise DataError(
            f"{len(missing):,} of the files are not there, the first: {missing[0]}",
            where=pattern,
            mend="restore them, or name those that are there with *",
        )
    if not files:
        raise DataError("no file matches", where=pattern)
    return files


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        parts = [f"{n:0{len(numbers[1])}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        parts = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + part + rest for part in parts for rest in _braces(after)]


def _tables_only(path: Path) -> list[Path]:
    """The tars or Parquet files of a folder that has no images beside them, else nothing."""
    files = []
    for entry in os.scandir(path):
        if entry.name.startswith(".") or entry.name == "metadata.parquet":
            continue
        if is_image_name(entry.name) or entry.is_dir():
            return []
        if entry.name.lower().endswith((".tar", ".parquet")):
            files.append(Path(entry.path))
    return sorted(files)


# ---------------------------------------------------------------- folders and lists


def _folder_cuts(path: Path, shard_rows: int) -> Iterator[_Cut]:
    pairs = walk_images(path)
    while chunk := list(islice(pairs, shard_rows)):
        names = [name for _, name in chunk]
        whole = [name for key, name in chunk if key == name]  # what the key of the others is, their name says
        where = {"root": str(path), "names": names, "whole": whole}
        yield _Cut("files-{index:05d}", json.dumps(where), rows=len(names))


def _read_files(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    whole = set(where["whole"])
    for name in where["names"]:
        key = name if name in whole else os.path.splitext(name)[0]
        path = Path(where["root"], name)
        yield Item(key, path, _beside(path.parent / PurePosixPath(key).name))


def _list_cuts(path: Path, shard_rows: int) -> Iterator[_Cut]:
    with path.open("rb") as file:
        rows, begin, start = 0, 0, 0
        while line := file.readline(LINE):
            if line.strip():
                rows += 1
            if rows == shard_rows:
                yield _Cut("files-{index:05d}", json.dumps({"list": str(path), "byte": begin}), start, rows)
                start, begin, rows = start + rows, file.tell(), 0
        if rows:
            yield _Cut("files-{index:05d}", json.dumps({"list": str(path), "byte": begin}), start, rows)


def _read_list(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    home = os.path.dirname(where["list"])
    lines: list[str] = []
    try:
        with open(where["list"], "rb") as file:
            file.seek(where["byte"])
            while len(lines) < (shard.rows or 0) and (line := file.readline(LINE)):
                if line.strip():
                    lines.append(os.fsdecode(line.removeprefix(b"\xef\xbb\xbf").strip(b"\r\n")))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where["list"]) from error
    paths = [os.path.normpath(os.path.join(home, line)) for line in lines]
    names = [
        os.path.relpath(path, home) if path.startswith(os.path.join(home, "")) else path.lstrip("/")
        for path in paths
    ]
    for key, path in zip(image_keys(names), paths, strict=True):
        if "\0" in path or not os.path.basename(path):
            yield Item(key, None, error="not a file name")
        else:
            yield Item(key, Path(path), _beside(Path(os.path.splitext(path)[0])))


def _beside(stem: Path) -> str | None:
    """The caption file of an image; one that cannot be read does not keep the image from being read."""
    try:
        return sidecar(stem, errors="replace")
    except DataError:
        return None


# ---------------------------------------------------------------- webdataset


def _read_tar(shard: ShardRef) -> Iterator[Item]:
    path = Path(shard.location)
    try:
        if not path.is_file():
            raise DataError("not a file" if path.exists() else "no such file", where=str(path))
        file = path.open("rb")
        # A stream is never sought back, so that no header can lead the reader in a circle.
        tar = tarfile.open(fileobj=file, mode="r|", encoding="utf-8")  # noqa: SIM115
    except (OSError, tarfile.TarError) as error:
        mend = "a compressed tar wants to be unpacked: gunzip"
        raise DataError(f"not a tar that can be read: {error}", where=str(path), mend=mend) from error
    with file, tar:
        damage = yield from _samples(tar)
        damage = damage or _after_end(path, tar.offset)
    if damage:
        yield Item(shard.name, None, error=damage)


def _samples(tar: tarfile.TarFile) -> Generator[Item, None, str | None]:
    """The samples of a tar: adjacent members with one key. Returns what is wrong with the tar, or None."""
    key, parts = None, _Sample()
    damage = None
    while True:
        try:
            member = tar.next()
            if member is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            problem = _problem(member)
            if problem:
                yield Item(member.name, None, error=problem)
                continue
            name, extension = _split(member.name)
            if not name or not member.isreg():
                continue  # webdataset, too, passes over folders and names without key or extension
            if name != key:
                yield from parts.items(key)
                key, parts = name, _Sample()
            parts.add(tar, member, extension)
        except Exception as error:  # the boundary: broken headers make tarfile raise what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            damage = f"the tar is damaged: {reason[:200]}"
            break
    yield from parts.items(key)
    return damage


class _Sample:
    """The members of one key."""

    def __init__(self) -> None:
        self.image: bytes | None = None
        self.caption: str | None = None
        self.errors: list[str] = []
        self.others: list[str] = []

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
        last = extension.rpartition(".")[2].lower()
        if is_image_name(f"x.{last}"):
            if self.image is not None:
                self.errors.append(f"another image of the sample: {extension}")
            elif member.size > MAX_BYTES:
                self.errors.append(f"file too large: {member.size:,} bytes, limit {MAX_BYTES:,}")
            else:
                try:
                    self.image = _bytes(tar, member)
                except Exception:
                    self.errors.append("the tar ends inside this image")
                    raise
        elif last in ("txt", "caption", "json") and member.size <= MAX_TEXT:
            text = _bytes(tar, member).decode("utf-8", "replace")
            if last == "json":
                self.caption = self.caption or _json_caption(text)
            else:
                self.caption = text.strip()
        self.others.append(extension)

    def items(self, key: str | None) -> Iterator[Item]:
        if key is None:
            return
        if self.image is not None:
            yield Item(key, self.image, self.caption)
        elif not self.errors:
            yield Item(key, None, error=f"no image in the sample, but {', '.join(self.others)[:100]}")
        for error in self.errors:
            yield Item(key, None, error=error)


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream is not None else b""


def _json_caption(text: str) -> str | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    caption = values.get("caption") if isinstance(values, dict) else None
    return caption if isinstance(caption, str) else None


def _problem(member: tarfile.TarInfo) -> str | None:
    if member.isdir():
        return None
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the folder"
    if not member.name.rpartition("/")[2]:
        return "it has no name"
    if member.islnk() or member.issym():
        return "a link, not a file"
    if not member.isreg() or member.issparse() or member.size < 0:
        return "not a plain file"
    return None


def _split(name: str) -> tuple[str, str]:
    """(key, extension) as webdataset has them: cut at the base name's first dot; ("", "") for neither."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension) if stem and dot else ("", "")


def _after_end(path: Path, offset: int) -> str | None:
    """What is wrong behind the last member, None for the zeros that end a tar: tarfile stops at any header
    that it cannot read and says nothing."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            return "the tar is cut off"
        while block:
            if block.strip(b"\0"):
                return f"the tar is damaged, or goes on behind its end, at byte {offset:,}"
            block = file.read(1 << 20)
    return None


# ---------------------------------------------------------------- tables: Parquet and Hugging Face data sets


class _Columns(NamedTuple):
    image: str  # of bytes, of {bytes, path}, or of paths
    key: str | None
    caption: str | None


def _columns(schema: Any, where: str) -> _Columns:
    """Which columns of an Arrow schema hold what; DataError where none holds images."""
    import pyarrow as pa

    kinds = {field.name: field.type for field in schema if schema.names.count(field.name) == 1}

    def binary(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(binary(field.type) and field.name == "bytes" for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def text(kind: Any) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    named = [name for name in IMAGE_COLUMNS if name in kinds and binary(kinds[name])]
    structs = [name for name, kind in kinds.items() if pa.types.is_struct(kind) and binary(kind)]
    paths = [name for name in PATH_COLUMNS if name in kinds and text(kinds[name])]
    image = next(iter(named + structs + paths), None)
    if image is None:
        raise DataError(
            f"no column of images among {', '.join(list(kinds)[:20])}",
            where=where,
            mend="image bytes in a column `image`, or paths of image files in a column `path`",
        )
    keys = [k for k in (*KEY_COLUMNS, *paths[:1]) if k in kinds and (text(kinds[k]) or _whole(kinds[k]))]
    captions = [name for name in CAPTION_COLUMNS if name in kinds and text(kinds[name])]
    return _Columns(image, next(iter(keys), None), next(iter(captions), None))


def _whole(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind))


def _row(batch: Any, row: int, columns: _Columns, fallback: str, home: Path) -> Item:
    """One row of an Arrow batch; a cell that cannot be read is the error of its row only."""
    key = fallback
    try:
        if columns.key is not None:
            value = batch.column(columns.key)[row].as_py()
            key = fallback if value is None or value == "" else str(value)
        image = _cell(batch.column(columns.image)[row].as_py(), home)
        caption = batch.column(columns.caption)[row].as_py() if columns.caption else None
    except (ValueError, OSError) as error:  # text that is not UTF-8, a remote file that is gone
        return Item(key, None, error=f"the row cannot be read: {' '.join(str(error).split())[:200]}")
    if isinstance(image, bytes) and len(image) > MAX_BYTES:
        return Item(key, None, error=f"file too large: {len(image):,} bytes, limit {MAX_BYTES:,}")
    return Item(key, image, caption, None if image is not None else "no image in the row")


def _cell(value: Any, home: Path) -> bytes | Path | None:
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.rpartition("::")[2].startswith("hf://"):  # streamed from the hub
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(value, "rb") as file:
            return file.read(MAX_BYTES + 1)
    if not isinstance(value, str) or "\0" in value or not value or "://" in value:
        raise ValueError(f"{value!r} is no path of a file")
    return home / value


def _parquet_cuts(files: Sequence[Path], shard_rows: int) -> Iterator[_Cut]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = os.path.commonpath([file.parent for file in files])
    for file in files:
        name = _plain(file.relative_to(root).as_posix())
        try:
            about = pq.read_metadata(file)
            sizes = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        except (OSError, pa.ArrowException):
            yield _Cut(name, str(file))  # reading it says what is wrong
            continue
        start = rows = 0
        for i, size in enumerate(sizes):
            rows += size
            if rows >= shard_rows or (i == len(sizes) - 1 and rows):
                yield _Cut(name, str(file), start, rows)
                start, rows = start + rows, 0


def _read_parquet(shard: ShardRef) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(shard.location)
    try:
        # so that a page is in memory at once, not the column of a row group
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    columns = _columns(schema, str(path))
    end = shard.start + shard.rows if shard.rows is not None else sum(sizes)
    row = 0
    with file:
        for group, size in enumerate(sizes):
            if shard.start <= row < end:
                yield from _row_group(file, group, row, size, columns, shard)
            row += size


def _row_group(
    file: Any, group: int, first: int, size: int, columns: _Columns, shard: ShardRef
) -> Iterator[Item]:
    import pyarrow as pa

    stem, home = shard.name.removesuffix(".parquet"), Path(shard.location).parent
    done, reason = 0, "fewer rows than the file says"
    try:
        wanted = [name for name in dict.fromkeys(columns) if name]
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted, use_threads=False):
            for i in range(batch.num_rows):
                yield _row(batch, i, columns, f"{stem}/{first + done:08d}", home)
                done += 1
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
    for lost in range(done, min(size, done + MAX_LOST)):
        key = f"{stem}/{first + lost:08d}"
        yield Item(key, None, error=f"the rest of the row group cannot be read: {reason}")


def _hf_cuts(spec: str, shard_rows: int) -> Iterator[_Cut]:
    name = spec.removeprefix("hf:")
    split = None
    if not Path(name).exists() and ":" in name:
        name, _, split = name.rpartition(":")
    if Path(name).is_dir():
        name = os.path.abspath(name)
    if any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
        split, dataset = _saved(name, split)
        where = json.dumps({"saved": name, "split": split})
        for start in range(0, len(dataset), shard_rows):
            yield _Cut(f"{split}-{{index:05d}}", where, start, min(shard_rows, len(dataset) - start))
        return
    split, stream = _stream(name, split)
    for i in range(stream.num_shards):
        yield _Cut(
            f"{split}-{i:05d}",
            json.dumps({"name": name, "split": split, "part": i, "parts": stream.num_shards}),
        )


@lru_cache(maxsize=4)
def _saved(path: str, split: str | None) -> tuple[str, Any]:
    """(split, data set) that ``save_to_disk`` wrote; memory-mapped, so a shard costs what it reads."""
    import datasets

    with _loading(path):
        found = datasets.load_from_disk(path)
    if not isinstance(found, datasets.DatasetDict):
        return split or "train", found.with_format("arrow")
    name = _choose(split, list(found), path)
    return name, found[name].with_format("arrow")


@lru_cache(maxsize=4)
def _stream(name: str, split: str | None) -> tuple[str, Any]:
    """(split, streamed data set): a folder in a form that `datasets` knows, or a data set of the hub."""
    import datasets

    with _loading(name):
        found = datasets.load_dataset(name, streaming=True)
        chosen = _choose(split, list(found), name)
        return chosen, found[chosen].with_format("arrow")


@contextmanager
def _loading(where: str) -> Iterator[None]:
    """A boundary: `datasets` raises errors of many libraries for a data set that is not there or broken."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"not a data set that can be loaded: {reason}", where=where, mend="hf:PATH_OR_NAME[:SPLIT]"
        ) from error


def _choose(split: str | None, splits: list[str], where: str) -> str:
    wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if wanted not in splits:
        mend = f"name one of them: hf:{where}:SPLIT"
        raise DataError(f"no split {wanted!r} among {', '.join(splits)}", where=where, mend=mend)
    return wanted


def _read_hf(shard: ShardRef) -> Iterator[Item]:
    where = json.loads(shard.location)
    if "saved" in where:
        split, dataset = _saved(where["saved"], where["split"])
        stop = shard.start + (shard.rows or 0)
        tables = (dataset[at : min(at + BATCH, stop)] for at in range(shard.start, stop, BATCH))
        home, stem = Path(where["saved"]), split
    else:
        split, stream = _stream(where["name"], where["split"])
        part = stream.shard(num_shards=where["parts"], index=where["part"])
        tables = part.iter(batch_size=BATCH)
        home, stem = Path(where["name"]), shard.name
    row = shard.start
    with _loading(shard.name):
        for table in tables:
            columns = _columns(table.schema, shard.name)
            for i in range(table.num_rows):
                yield _row(table, i, columns, f"{stem}/{row:08d}", home)
                row += 1


_READERS: dict[str, Callable[[ShardRef], Iterator[Item]]] = {
    "folder": _read_files,
    "list": _read_list,
    "webdataset": _read_tar,
    "parquet": _read_parquet,
    "hf": _read_hf,
}
