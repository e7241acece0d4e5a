"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, by how absent ones were chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from captioner.errors import DataError
from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate

ORIGIN = "https://github.com/AoiDragon/POPE (folder output/coco)"
SPLITS = ("random", "popular", "adversarial")
COUNTS = ("questions", "positive", "negative", "tp", "fp", "tn", "malformed")
_ANSWER = re.compile(r"\b(?:yes|no|not)\b|n't\b", re.IGNORECASE)


class Question(BaseModel):
    """A line of ``coco_pope_SPLIT.json``."""

    question_id: int
    image: str
    text: str
    label: Literal["yes", "no"]


def read_questions(folder: Path, split: str) -> list[Question]:
    """The questions of a split: the one file of the folder that ends in ``pope…_SPLIT.json``."""
    return files.read_jsonl(files.find_one(folder, f"*pope*_{split}.json", ORIGIN), Question)


def parse(answer: str) -> str:
    """ "yes" or "no" by the first such word of the answer's first sentence; "" where there is none."""
    found = _ANSWER.search(re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0])
    if found is None:
        return ""
    return "yes" if found.group().lower() == "yes" else "no"


def pope(answers: Mapping[str, str], folder: Path) -> Scores:
    """Scores per split of raw answers by ``SPLIT/QUESTION_ID``, as ``random/1``; "yes" is the positive class.

    A question without an answer is left out and lowers ``answered``; an answer that says neither yes nor no
    is wrong, and counts in ``malformed``. DataError for answers to questions that the files do not hold.
    """
    splits = [split for split in SPLITS if any(key.startswith(f"{split}/") for key in answers)]
    rows: dict[str, dict[str, float]] = {}
    known: set[str] = set()
    for split in splits:
        for question in read_questions(folder, split):
            key = f"{split}/{question.question_id}"
            if key in known:
                raise DataError(f"pope: two questions have the number {key}", where=str(folder))
            known.add(key)
            row = rows.setdefault(question.image, {})
            for column in _count(question.label, answers.get(key)):
                row[f"{split} {column}"] = row.get(f"{split} {column}", 0) + 1
    if strange := sorted(answers.keys() - known):
        raise DataError(
            f"pope: {len(strange)} answers are to unknown questions: {', '.join(strange[:3])}",
            where=str(folder),
            fix="name each answer SPLIT/QUESTION_ID, as random/1",
        )
    columns = [f"{split} {column}" for split in SPLITS for column in COUNTS]
    return tabulate(
        "pope",
        rows,
        _metrics,
        columns=columns,
        annotated=len(rows),
        lower_is_better=[f"{split} malformed" for split in SPLITS],
    )


def _count(label: str, answer: str | None) -> list[str]:
    """The columns in which one question counts."""
    if answer is None:
        return ["questions"]
    said = parse(answer)
    columns = ["questions", "positive" if label == "yes" else "negative"]
    if not said:
        return [*columns, "malformed"]
    outcome = {("yes", "yes"): ["tp"], ("yes", "no"): ["fp"], ("no", "no"): ["tn"], ("no", "yes"): []}
    return columns + outcome[said, label]


def _metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
    result: dict[str, Array] = {}
    for split in SPLITS:
        questions, positive, negative, tp, fp, tn, malformed = (sums[f"{split} {name}"] for name in COUNTS)
        answered = positive + negative
        result |= {
            f"{split} accuracy": ratio(tp + tn, answered),
            f"{split} precision": ratio(tp, tp + fp),
            f"{split} recall": ratio(tp, positive),
            f"{split} f1": ratio(2 * tp, tp + fp + positive),
            f"{split} yes_ratio": ratio(tp + fp, answered),
            f"{split} malformed": ratio(malformed, answered),
            f"{split} answered": ratio(answered, questions),
        }
    return result
