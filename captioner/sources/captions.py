"""Caption tables and text files as people have them: encoding, delimiter and columns are found out.

A table is CSV, TSV, JSON Lines, JSON or Parquet with a column that names images and one that holds captions.
JSON may also be COCO's captions (``images`` and ``annotations``) or LLaVA's conversations (ShareGPT4V and
others): there the caption is the first answer, of several captions of an image the longest.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from captioner.errors import DataError

TABLES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet")
WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
DELIMITERS = ",;\t|"
FOREIGN = 0.3  # share of letters beyond ASCII above which a text that is not Unicode is not Latin-1 either
SAMPLE = 50  # rows by which columns and delimiters are told
MAX_CELL = 1 << 20  # characters

# By the first that is there; compared without case, with `_` for blanks and dashes.
FILE = (
    *("file_name", "filename", "image_path", "img_path", "image_file", "image_filename", "image_name"),
    *("file_path", "filepath", "path", "image", "img", "file", "photo", "picture", "name", "key"),
    *("image_id", "id"),
)
TEXT = (
    *("text", "caption", "prompt", "description", "image_caption", "long_caption", "detailed_caption"),
    *("gpt4v_caption", "alt_text", "alttext", "alt", "sentence", "comment", "captions", "label", "title"),
)
OTHERS = ("prose", "facts", "questions", "split")
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class NoCaptionTable(DataError):
    """A table whose columns name no images or hold no captions."""


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, UTF-16 or UTF-32 by its mark, UTF-16 by its zeros, UTF-8, else Windows-1252.

    Marks are stripped. Raises ValueError for what is none of these, and for control characters.
    """
    mark, encoding = next(((mark, name) for mark, name in BOMS if data.startswith(mark)), (b"", "utf-8"))
    if not mark and b"\0" in data[:4096]:
        encoding = "utf-16-le" if data[1:4096:2].count(0) >= data[0:4096:2].count(0) else "utf-16-be"
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError:
        if mark or encoding != "utf-8":
            raise
        text = data.decode("cp1252")
        letters = [character for character in text if character.isalpha() or character > "\x7f"]
        if sum(character > "\x7f" for character in letters) > FOREIGN * len(letters):
            raise ValueError("neither UTF-8, UTF-16 nor Latin-1") from None
    if found := re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
        raise ValueError(f"it holds control characters such as {found[0]!r}, so it is not text")
    return text.removeprefix("\ufeff")


def read_text(path: Path) -> str:
    """The text of a file, see :func:`decode_text`. Raises :class:`DataError` where it cannot be read."""
    try:
        return decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="save it as UTF-8") from error


def read_table(path: Path, named: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The rows of a caption table: ``row`` (its number), ``file_name``, and what there is of ``text``,
    ``prose``, ``facts``, ``questions`` and ``split``.

    ``named`` gives the columns by name: ``file`` the one of images, ``text`` the one of captions. Raises
    :class:`DataError` for a file that cannot be read, :class:`NoCaptionTable` where a column is missing.
    """
    try:
        names, rows = _read(path)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read: {reason}", where=str(path), fix="save it as UTF-8") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError("a line is not a JSON object", where=f"{path}, row {number}")
    columns = _columns(path, names, named or {})
    return [
        {"row": n, **{ours: row[name] for ours, name in columns.items() if row.get(name) not in (None, "")}}
        for n, row in rows
    ]


def is_caption_table(path: Path, named: Mapping[str, str] | None = None) -> str | None:
    """None where the file is a table of captions, else why it is not; only its first rows are read."""
    try:
        if path.suffix.lower() == ".parquet":
            names, packed = _text_columns(path)
            if packed:
                return "its images are in it"
        elif path.suffix.lower() in (".csv", ".tsv", ".tab"):
            names = _csv(_head(path), strict=False)[0]
        else:
            row = json.loads(next(filter(str.strip, _head(path).split("\n")), ""))
            names = list(row) if isinstance(row, dict) else []
        if not _columns(path, names, named or {}).keys() & {"text", "prose", "questions"}:
            return "it holds facts, no captions"
    except NoCaptionTable as error:
        return error.what
    except Exception as error:  # the boundary: any file may lie in a folder
        return " ".join(str(error).split())[:100] or type(error).__name__
    return None


def not_text(row: Mapping[str, Any], where: str) -> str | None:
    """What is wrong with the cells of a row that ought to be text, None for nothing."""
    wrong = [name for name in ("text", "prose", "facts") if not isinstance(row.get(name, ""), str)]
    return f"{wrong[0]} is not text: {row[wrong[0]]!r} ({where})" if wrong else None


# ---------------------------------------------------------------- columns


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().casefold())


def _columns(path: Path, names: list[str], named: Mapping[str, str]) -> dict[str, str]:
    """Our columns -> those of the table."""
    plain = {_plain(name): name for name in reversed(names) if name is not None}
    found = {name: plain[name] for name in OTHERS if name in plain}
    for ours, known, flag in (("file_name", FILE, "file"), ("text", TEXT, "text")):
        if flag in named:
            if _plain(named[flag]) not in plain:
                raise NoCaptionTable(
                    f"no column {named[flag]!r} among {', '.join(names[:20])}",
                    where=str(path),
                    fix=f"name one that is there: SOURCE?{flag}=COLUMN",
                )
            found[ours] = plain[_plain(named[flag])]
        elif column := next((plain[name] for name in known if name in plain), None):
            found[ours] = column
    listed = ", ".join(map(str, names[:20])) or "none"
    if "file_name" not in found:
        raise NoCaptionTable(
            f"no file_name: no column that names images among {listed}",
            where=str(path),
            fix="call it file_name, or name it: SOURCE?file=COLUMN",
        )
    if not found.keys() & {"text", "prose", "facts", "questions"}:
        raise NoCaptionTable(
            f"no column of captions among {listed}",
            where=str(path),
            fix="call it text or caption, or name it: SOURCE?text=COLUMN",
        )
    return found


# ---------------------------------------------------------------- forms


def _read(path: Path) -> tuple[list[str], list[tuple[int, Any]]]:
    """The columns of a table, and its rows with their numbers, from 1."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        names, _ = _text_columns(path)
        return names, list(enumerate(_parquet(path, names), 1))
    text = decode_text(path.read_bytes())
    if suffix in (".csv", ".tsv", ".tab"):
        header, lines = _csv(text)
        return header, list(lines)
    rows: list[tuple[int, Any]] = []
    if suffix == ".json":
        rows = list(enumerate(_json(text), 1))
    else:
        for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
    sample = [row for _, row in rows[:SAMPLE] if isinstance(row, dict)]
    return list(dict.fromkeys(name for row in sample for name in row)), rows


def _head(path: Path) -> str:
    """The first lines of a text file."""
    with path.open("rb") as file:
        data = file.read(1 << 16)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data
    if len(data) == 1 << 16 and not wide:
        data = data[: data.rfind(b"\n") + 1] or data
    return decode_text(data)


def _text_columns(path: Path) -> tuple[list[str], bool]:
    """The columns of a Parquet file that hold no bytes, and whether others do. Raises ValueError for none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def packed(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(packed(field.type) for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    try:
        schema = pq.read_schema(path)
        names = [field.name for field in schema if not packed(field.type)]
        return names, len(names) < len(schema)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _parquet(path: Path, names: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        known = [name for name in names if _plain(name) in (*FILE, *TEXT, *OTHERS)]
        rows: list[dict[str, Any]] = pq.read_table(path, columns=known).to_pylist()
        return rows
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _csv(text: str, strict: bool = True) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Header and rows of CSV text; where it has no header, the first column is images, the last captions.

    A row with more cells than the header has a caption with unquoted delimiters, if that column is the last.
    """
    if match := re.match(r"sep=(.)\r?\n", text):  # which Excel writes
        delimiter, text = match[1], text[match.end() :]
    else:
        delimiter = _delimiter(text)
    csv.field_size_limit(MAX_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    rows = (cells for cells in lines if any(cell.strip() for cell in cells))
    first = next(rows, [])
    header = [cell.strip() for cell in first]
    begun = []
    if len(header) > 1 and _is_image(header[0]):
        header, begun = ["file_name", *(f"column {i}" for i in range(2, len(header))), "text"], [first]
    return header, _cells(header, chain(begun, rows), delimiter)


def _cells(
    header: list[str], rows: Iterable[list[str]], delimiter: str
) -> Iterator[tuple[int, dict[str, str]]]:
    for number, cells in enumerate(rows, 1):
        if len(cells) > len(header):
            if _plain(header[-1]) not in (*TEXT, "prose"):
                what = f"row {number} has {len(cells)} cells for {len(header)} columns"
                raise ValueError(f"{what}: quote captions that hold {delimiter!r}")
            cells = [*cells[: len(header) - 1], delimiter.join(cells[len(header) - 1 :])]
        yield number, dict(zip(header, (cell.strip() for cell in cells), strict=False))


def _delimiter(text: str) -> str:
    """The delimiter by which the first line has the most columns that are known, then the most columns."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def known(delimiter: str) -> tuple[bool, int, int]:
        cells = next(csv.reader([first], delimiter=delimiter), [])
        names = [_plain(cell) for cell in cells]
        wanted = sum(name in (*FILE, *TEXT, *OTHERS) for name in names)
        return bool(cells) and _is_image(cells[0]) and len(cells) > 1, wanted, len(cells)

    return max(DELIMITERS, key=known)


def _is_image(name: str) -> bool:
    return bool(
        re.search(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf]|jxl|jfif)$", name.strip(), re.IGNORECASE)
    )


def _json(text: str) -> Iterable[Any]:
    data = json.loads(text)
    if (
        isinstance(data, dict)
        and isinstance(data.get("images"), list)
        and isinstance(data.get("annotations"), list)
    ):
        return _coco(data)
    if not isinstance(data, list):
        raise ValueError("neither a list of rows nor COCO's images and annotations")
    if any(isinstance(row, dict) and "conversations" in row for row in data[:SAMPLE]):
        return [_conversation(row) for row in data]
    return data


def _coco(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {image["id"]: image["file_name"] for image in data["images"] if isinstance(image, dict)}
    longest: dict[str, str] = {}
    for each in data["annotations"]:
        caption, name = each.get("caption"), names.get(each.get("image_id"))
        if isinstance(caption, str) and isinstance(name, str) and len(caption) > len(longest.get(name, "")):
            longest[name] = " ".join(caption.split())
    return [{"file_name": name, "text": caption} for name, caption in longest.items()]


def _conversation(row: Any) -> Any:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        return row
    said = [turn for turn in row["conversations"] if isinstance(turn, dict)]
    answers = [turn.get("value") for turn in said if turn.get("from") in ("gpt", "assistant")]
    return {"file_name": row.get("image"), "text": next(iter(answers), None)}


# ---------------------------------------------------------------- which image a row names


def finder(names: Iterable[str], folder: str) -> Callable[[str], str | None]:
    """What finds the image that a table's cell names among ``names`` (paths relative to ``folder``).

    Exactly, else without regard to case, Unicode form, ``\\``, ``./``, the folder's own name in front, the
    extension, or the directories; None where none is meant, or several.
    """
    exact = list(names)
    known = set(exact)
    forms: list[
        dict[str, str | None]
    ] = []  # whole path, without extension, base name, that without extension

    def find(cell: str) -> str | None:
        if cell in known:
            return cell
        if not forms:
            forms.extend({} for _ in range(4))
            for name in exact:
                plain = _same(name)
                base = os.path.basename(plain)
                for form, way in zip(forms, (plain, _stem(plain), base, _stem(base)), strict=True):
                    form[way] = name if way not in form else None
        path = _same(re.sub(r"^(?:\./)+", "", cell.strip().replace("\\", "/")))
        home = _same(os.path.basename(os.path.abspath(folder)))
        elsewhere = path.startswith("/") or path[1:2] == ":"  # where it lay on another machine
        for way in dict.fromkeys((path, path.removeprefix(f"{home}/"), path.rpartition(f"/{home}/")[2])):
            bare = os.path.basename(way) if elsewhere or "/" not in way else None
            for form, said in zip(forms, (way, way, bare, bare), strict=True):
                found = said and (form.get(said) or (form.get(_stem(said)) if _is_image(said) else None))
                if found:
                    return found
        return None

    return find


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
