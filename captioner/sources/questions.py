"""Yes/no question files beside their images: VQAv2, GQA, POPE, and any with image, question and answer.

Read from ``.json``, ``.jsonl`` and ``.parquet``; the form is told by what the file holds:

- plain rows: ``image`` (or ``image_id``, ``file_name``), ``question`` (or ``text``, ``statement``),
  ``answer`` (or ``label``, ``multiple_choice_answer``), and where given ``kind`` (or ``category``,
  ``question_type``, ``answer_type``) and ``stratum``. POPE's files are such rows, their name has the stratum.
- VQAv2: an object with ``annotations``, whose ``questions`` file lies beside it.
- GQA: an object of question id -> row with ``imageId``, ``types``.

Images are looked up below the file's folder: by path, name, stem, or the number that ends the stem.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from captioner.errors import DataError, Refused
from captioner.sources.folder import ImageRow, read_folder

FORMS = (".json", ".jsonl", ".parquet")
IMAGE = ("image", "image_id", "imageId", "file_name")
QUESTION = ("question", "text", "statement")
ANSWER = ("answer", "label", "multiple_choice_answer")
KIND = ("kind", "category", "question_type", "answer_type")
STRATA = ("random", "popular", "adversarial")  # of POPE, by file name
LONGEST = 1000  # characters of a question
YES_NO = {"yes": "yes", "no": "no", "true": "yes", "false": "no", "1": "yes", "0": "no"}

OTHER_ANSWER = "not a yes/no question"  # nothing wrong with the row
NO_IMAGE = "no such image"
TWO_IMAGES = "several images of that name"
NO_TEXT = "no question"
TOO_LONG = f"question longer than {LONGEST} characters"
NO_ANSWER = "no answer"
NO_ROW = "not an object"
TWICE = "asked before of the same image"


def read(path: Path, max_bad: float = 1.0) -> tuple[list[ImageRow], dict[str, int]]:
    """Images with their yes/no questions, and counts: rows read, used, and left out by reason.

    Raises DataError for a file that cannot be read or holds no such rows, Refused where more than
    ``max_bad`` of the rows are bad (rows with other answers than yes and no are passed over, not bad).
    """
    images = read_folder(path.parent, captions=False)
    names = _names(images, path.parent)
    stratum = next((name for name in STRATA if re.search(rf"(?<![a-z]){name}", path.stem)), "")
    asked: dict[str, dict[str, dict[str, str]]] = {}
    reasons: Counter[str] = Counter()
    rows = 0
    for row in _rows(path):
        rows += 1
        found = _question(row, names, stratum)
        if isinstance(found, str):
            reasons[found] += 1
            continue
        key, question = found
        if question["question"] in asked.setdefault(key, {}):
            reasons[TWICE] += 1
            continue
        asked[key][question["question"]] = question
    bad = reasons.total() - reasons[OTHER_ANSWER]
    if bad > max_bad * rows:
        listed = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common() if reason != OTHER_ANSWER)
        raise Refused(
            f"{bad} of {rows} rows cannot be used ({listed}), the limit is {max_bad:.0%}",
            where=str(path),
            fix="fix the rows, put the images beside the file, or raise --max_failed",
        )
    used = [
        replace(image, questions=list(asked[image.key].values())) for image in images if asked.get(image.key)
    ]
    questions = sum(len(each.questions or []) for each in used)
    return used, {"rows": rows, "questions": questions, **dict(reasons)}


def is_question_file(path: Path) -> bool:
    """Whether a file holds questions with answers; no more than its beginning is read but of ``.json``."""
    if path.suffix not in FORMS or not path.is_file():
        return False
    if path.suffix == ".json":
        with path.open("rb") as file:
            return (
                re.search(rb'"(?:answers?|label|multiple_choice_answer|questions)"', file.read(1 << 16))
                is not None
            )
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = set(pq.read_schema(path).names)
        except (OSError, pa.ArrowException):
            return True  # reading it says what is wrong
    else:
        row = next((row for row in islice(_lines(path), 100) if isinstance(row, dict)), {})
        names = set(row)
    return bool(names & {*QUESTION} and names & {*ANSWER})


def find(folder: Path) -> Path | None:
    """The one question file of a folder, None where there is none. Raises :class:`DataError` for several."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if is_question_file(path) and "_questions" not in path.name.lower()
    ]
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(f"{len(files)} question files: {names}", where=str(folder), fix="name one of them")
    return next(iter(files), None)


def read_any(data: Path, max_bad: float = 1.0) -> tuple[list[ImageRow], dict[str, int]]:
    """Images with their questions: of a question file, a folder's own tables, or the question file in it.

    The counts are empty where no file was read; errors as :func:`read`.
    """
    rows = [] if data.is_file() else read_folder(data)
    if any(row.questions for row in rows):
        return rows, {}
    file = data if data.is_file() else find(data)
    return (rows, {}) if file is None else read(file, max_bad)


def _question(
    row: Any, names: Mapping[str, ImageRow | None], stratum: str
) -> tuple[str, dict[str, str]] | str:
    """(image key, question) of a row, or why it is left out."""
    if not isinstance(row, Mapping):
        return NO_ROW
    answer, text = _first(row, ANSWER), _first(row, QUESTION)
    if answer == "":
        return NO_ANSWER
    said = YES_NO.get(answer.lower().rstrip("."))
    if said is None or row.get("answer_type") in ("number", "other"):
        return OTHER_ANSWER
    if not any(map(str.isalnum, text)):
        return NO_TEXT
    if len(text) > LONGEST:
        return TOO_LONG
    name = _first(row, IMAGE)
    image = names.get(name, names.get(name.lstrip("0") or "0") if name.isdecimal() else None)
    if image is None:
        return TWO_IMAGES if name in names else NO_IMAGE
    types = row.get("types")  # GQA: structural, semantic, detailed
    kind = _first(types, ("semantic",)) if isinstance(types, Mapping) else _first(row, KIND)
    where = _first(row, ("stratum",)) or stratum or ("positive" if said == "yes" else "negative")
    return image.key, {"question": text, "answer": said, "kind": kind, "stratum": where}


def _first(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The first of these columns that holds text, a number or a truth value, as text; "" where none does."""
    values = (row.get(column) for column in columns)
    return next((" ".join(str(v).split()) for v in values if isinstance(v, str | int) and str(v).strip()), "")


def _names(images: list[ImageRow], home: Path) -> dict[str, ImageRow | None]:
    """Every name an image may be called by; None for a name that several share."""
    names: dict[str, ImageRow | None] = {}
    for image in images:
        path = image.path.relative_to(home)
        number = re.search(r"(?:^|\D)0*(\d+)$", path.stem)
        called = {path.as_posix(), path.name, path.stem, *([number[1]] if number else [])}
        for name in called:
            names[name] = image if name not in names else None
    return names


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = {*IMAGE, *QUESTION, *ANSWER, *KIND, "stratum", "types"}
        try:
            columns = [name for name in pq.read_schema(path).names if name in wanted]
            yield from pq.read_table(path, columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        return
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    if path.suffix != ".json":
        raise DataError("not a question file", where=str(path), fix=f"use one of {', '.join(FORMS)}")
    try:
        yield from _objects(path, json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _unreadable(path, error) from error
        yield from _lines(path)  # POPE calls its JSON Lines .json
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _lines(path: Path) -> Iterator[Any]:
    """One row a line; a line that is not JSON is a bad row."""
    try:
        with path.open(encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    yield None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _objects(path: Path, data: Any) -> Iterator[Any]:
    if isinstance(data, Mapping) and isinstance(data.get("annotations"), list):
        asked = _vqa_questions(path)
        for row in data["annotations"]:
            known = isinstance(row, Mapping) and isinstance(row.get("question_id"), int)
            yield {**row, "question": asked.get(row["question_id"])} if known else None
    elif isinstance(data, Mapping) and isinstance(data.get("questions"), list):
        fix = "name the *annotations.json file; the questions are found beside it"
        raise DataError("questions without answers", where=str(path), fix=fix)
    elif isinstance(data, Mapping):
        yield from data.values()
    elif isinstance(data, list):
        yield from data
    else:
        raise DataError("neither rows nor an object of rows", where=str(path))


def _vqa_questions(path: Path) -> dict[int, str]:
    """Question id -> text, from the questions file of the same subset (``train2014``) beside ``path``."""
    subset = re.search(r"(?:train|val|test)\d{4}", path.name)
    files = [file for file in sorted(path.parent.glob("*questions*.json")) if file != path]
    files = [file for file in files if subset is None or subset[0] in file.name]
    if len(files) != 1:
        raise DataError(
            f"{len(files)} question files belong to these annotations",
            where=str(path),
            fix="put one *questions*.json of the same subset beside it",
        )
    try:
        rows = json.loads(files[0].read_text(encoding="utf-8"))["questions"]
        return {row["question_id"]: row["question"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(files[0], error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot be read: {error}", where=str(path))
