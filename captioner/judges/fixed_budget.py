"""Questions answered from the caption alone, at fixed lengths.

The questions and the credit are CaptionQA's (arXiv:2511.21025); plain accuracy is Prism's form (CapRL,
arXiv:2509.22647). Longer captions answer more questions, so captions are first cut to the same number of
words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter, ValidationError

from captioner.errors import DataError
from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate
from captioner.statements import statement_spans

ORIGIN = (
    "https://huggingface.co/datasets/Borise/CaptionQA (a split's Parquet files, or the same rows as JSONL)"
)
BUDGETS = (50, 100, 200)  # words
SILENT = "Cannot answer from the caption"
SILENCE_BONUS = 0.05
_OPENER = re.compile(
    r"(?:is|are|was|were|do|does|did|have|has|had|can|could|will|would|should|shall|may|might|must) "
)
_COUNTS = ("questions", "answered", "right", "silent", "credit", "words", "captions")


class _Question(BaseModel):
    question: str
    choices: list[str]
    answer: str


class _Image(BaseModel):
    id: str
    questions: list[_Question]


@dataclass(frozen=True)
class CaptionQuestion:
    """What an answerer is asked: it sees the caption, never the image."""

    caption: str
    question: str
    choices: tuple[str, ...]


class Answerer(Protocol):
    """A text model, or whatever stands for one."""

    def answer(self, asked: Sequence[CaptionQuestion]) -> Sequence[int | None]:
        """The place of the chosen one of ``choices`` for each question, in order.

        None where no answer could be had. Such a question counts as unanswered, never as wrong.
        """
        ...


def cut(caption: str, budget: int) -> str:
    """The whole statements at the caption's start that have at most ``budget`` words together.

    Where the first statement alone is longer, its first words. Words are what white space separates.
    """
    end = 0
    for _, stop, after in statement_spans(caption):
        for place in (after, stop):
            if len(caption[:place].split()) <= budget:
                end = place
                break
        else:
            break
    return caption[:end].strip() if end else " ".join(caption.split()[:budget])


def options(question: _Question) -> tuple[str, ...]:
    """The choices, with "cannot answer" where CaptionQA adds it: to all but yes/no questions."""
    said = [choice.lower() for choice in question.choices]
    closed = any("yes" in each for each in said) and any("no" in each for each in said)
    if closed or _OPENER.match(question.question.strip().lower()):
        return tuple(question.choices)
    return (*question.choices, SILENT)


def read_questions(folder: Path) -> dict[str, list[_Question]]:
    """Questions of every image from the ``*.parquet`` or ``*.jsonl`` files of the folder (or one such file).

    DataError where there is none, and for a question whose answer is not exactly one of at least two choices.
    """
    paths = [folder] if folder.is_file() else sorted([*folder.glob("*.parquet"), *folder.glob("*.jsonl")])
    if not paths:
        raise files.missing(folder, "*.parquet", ORIGIN)
    images: dict[str, list[_Question]] = {}
    for path in paths:
        rows = _read_table(path) if path.suffix == ".parquet" else files.read_jsonl(path, _Image)
        for row in rows:
            images.setdefault(row.id, []).extend(row.questions)
            for each in row.questions:
                if len(each.choices) < 2 or each.choices.count(each.answer) != 1:
                    raise DataError(
                        f"the answer to {each.question!r} is not one of at least two choices",
                        where=f"{path}, {row.id}",
                        fix="leave the question out",
                    )
    return images


def _read_table(path: Path) -> list[_Image]:
    """Without the images, which the table holds as well."""
    try:
        table = pq.read_table(path, columns=["id", "questions"])
        return TypeAdapter(list[_Image]).validate_python(table.to_pylist())
    except (OSError, KeyError, pa.ArrowException, ValidationError) as error:
        raise DataError(
            f"cannot read columns id and questions: {error}",
            where=str(path),
            fix=f"get it again from {ORIGIN}",
        ) from error


def fixed_budget(
    captions: Mapping[str, str],
    folder: Path,
    *,
    answerer: Answerer,
    budgets: Sequence[int] = BUDGETS,
    seed: int = 0,
) -> Scores:
    """Per budget: ``score`` (CaptionQA's credit), ``accuracy``, ``silent``, ``answered`` and ``words``.

    A right answer earns 1, "cannot answer" 1/K + 0.05 of K choices, a wrong one 0. Budget 0 asks without a
    caption: what can be guessed. Choices are shuffled by ``seed``, image and question, so some of the images
    are asked as all of them would be.
    """
    questions = read_questions(folder)
    files.check_known(captions.keys() - questions.keys(), "fixed_budget", folder)
    rows: dict[str, dict[str, float]] = {key: {} for key in captions}
    asked: list[CaptionQuestion] = []
    places: list[tuple[str, int, _Question]] = []
    for budget in budgets:
        for key in sorted(captions):
            text = cut(captions[key], budget)
            _add(rows[key], budget, captions=1, words=len(text.split()))
            for i, question in enumerate(questions[key]):
                shown = list(options(question))
                random.Random(f"{seed}/{key}/{i}").shuffle(shown)
                asked.append(CaptionQuestion(text, question.question, tuple(shown)))
                places.append((key, budget, question))
    replies = answerer.answer(asked)
    if len(replies) != len(asked):
        raise DataError(f"{len(asked)} questions were asked and {len(replies)} answers came back")
    for (key, budget, question), one, reply in zip(places, asked, replies, strict=True):
        _add(rows[key], budget, **_credit(question, one, reply))
    columns = [f"{budget} {name}" for budget in budgets for name in _COUNTS]

    def metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
        return {name: value for budget in budgets for name, value in _metrics(sums, budget).items()}

    return tabulate("fixed_budget", rows, metrics, columns=columns, annotated=len(questions))


def _credit(question: _Question, asked: CaptionQuestion, reply: int | None) -> dict[str, float]:
    """What one answer counts; a reply that is none of the choices is none."""
    if reply is None or not 0 <= reply < len(asked.choices):
        return {"questions": 1}
    said = asked.choices[reply]
    row: dict[str, float] = {"questions": 1, "answered": 1}
    if said == SILENT and len(asked.choices) > len(question.choices):
        return row | {"silent": 1, "credit": 1 / len(question.choices) + SILENCE_BONUS}
    right = int(said == question.answer)
    return row | {"right": right, "credit": right}


def _add(row: dict[str, float], budget: int, **counts: float) -> None:
    for name, value in counts.items():
        row[f"{budget} {name}"] = row.get(f"{budget} {name}", 0) + value


def _metrics(sums: Mapping[str, Array], budget: int) -> dict[str, Array]:
    at = {name: sums[f"{budget} {name}"] for name in _COUNTS}
    return {
        f"score at {budget}": ratio(at["credit"], at["answered"]),
        f"accuracy at {budget}": ratio(at["right"], at["answered"]),
        f"silent at {budget}": ratio(at["silent"], at["answered"]),
        f"answered at {budget}": ratio(at["answered"], at["questions"]),
        f"words at {budget}": ratio(at["words"], at["captions"]),
    }
