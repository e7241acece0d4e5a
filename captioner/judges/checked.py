"""Claims that people answered: the file of answers, and the judge that goes by them. No model.

`captioner review --gate` asks about the gate's images; ``gate.judge.checked`` names such a file of another
run. A statement is true if a claim that holds says all of it, and false if it says all of a claim that does
not hold. Of others, and of claims that nobody could tell, nothing is known. Where that leaves too many
statements open the judge cannot tell, and says how many.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from captioner.errors import DataError
from captioner.judges.base import Comparison, Kind, Said, compared, counted
from captioner.judges.facts import FactList
from captioner.judges.metrics import Counts
from captioner.runs import input_of
from captioner.sources.folder import ImageRow, read_folder
from captioner.statements import entails, normalise, visible

Answer = Literal["yes", "no", "cannot tell"]
ANSWERS: tuple[str, ...] = get_args(Answer)
ANSWERED = 0.9  # share of a captioner's statements that must have an answer


@dataclass(frozen=True)
class Checked:
    """A claim with a person's answer: one line of the answers file."""

    sample: str
    key: str
    text: str
    kind: str
    question: str
    expected: str
    p_yes: float
    answer: str

    @property
    def holds(self) -> bool | None:
        """Whether the claim is true; None where the person could not tell."""
        return None if self.answer == "cannot tell" else self.answer == self.expected


class Answers:
    """An append-only JSONL file; every answer is on the disk before :meth:`add` returns.

    A line that a kill tore is cut off when the file is opened. ``id`` names what was answered; a later line
    of the same id replaces an earlier one, and a line whose answer is null takes it back.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self._order: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._take(row["id"], row)
            except (ValueError, KeyError, TypeError) as error:
                self._file.close()
                raise DataError(
                    f"Line {number} of the answers is not one of ours: {error}",
                    where=str(path),
                    fix="Move the file away; the review starts a new one.",
                ) from error

    def _take(self, id: str, row: dict[str, Any]) -> None:
        self.rows.pop(id, None)
        self._order = [each for each in self._order if each != id]
        if row.get("answer") is not None:
            self.rows[id] = row
            self._order.append(id)

    def add(self, id: str, answer: str | None, **about: Any) -> None:
        """Store an answer; None takes the answer to ``id`` back."""
        row = {"id": id, **about, "answer": answer}
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(id, row)

    def undo(self) -> str | None:
        """Take the latest answer back; its id."""
        if not self._order:
            return None
        latest = self._order[-1]
        self.add(latest, None)
        return latest

    def close(self) -> None:
        self._file.close()


def read_checked(path: Path) -> list[Checked]:
    """The claims that a person answered. Raises DataError for a damaged file."""
    answers = Answers(path)
    answers.close()
    names = Checked.__dataclass_fields__
    return [Checked(**{name: row[name] for name in names}) for row in answers.rows.values()]


def as_questions(path: Path) -> list[ImageRow] | None:
    """The answers of `captioner review` in RUN/review as yes/no questions about the images of their round.

    None where the file is none of ours. Raises DataError where the images are not there.
    """
    if path.suffix != ".jsonl" or path.parent.name != "review":
        return None
    name = re.fullmatch(r"round-(\d+)", path.stem)
    home = path.parent.parent
    folder = input_of(home / f"round-{name[1]}" / "candidates", "images") if name else None
    if folder is None:
        raise DataError(
            "the images of these answers are not there", where=str(path), fix="keep RUN/review in RUN"
        )
    asked: dict[str, list[dict[str, str]]] = {}
    for row in read_checked(path):
        if row.holds is not None:
            about = {"question": row.text, "answer": "yes" if row.holds else "no"}
            asked.setdefault(row.key, []).append({**about, "kind": row.kind, "stratum": "checked"})
    rows = read_folder(folder, captions=False)
    return [replace(row, questions=asked[row.key]) for row in rows if row.key in asked]


@dataclass(frozen=True)
class Answered(FactList):
    """What people said about one image; ``facts`` are the claims that hold, ``wrong`` those that do not."""

    wrong: tuple[str, ...] = ()

    def holds(self, statement: str) -> bool | None:
        """True, false, or None where no answer tells."""
        if not visible(statement):
            return None
        said = normalise(statement)
        if any(entails(claim, said) for fact in self.facts for claim in fact):
            return True
        return False if any(entails(said, claim) for claim in self.wrong) else None


def known_of(checked: Sequence[Checked]) -> dict[str, Answered]:
    """What people know of each image, by key."""
    held: dict[str, dict[bool, list[str]]] = {}
    for row in checked:
        answers = held.setdefault(row.key, {True: [], False: []})
        if row.holds is not None:
            answers[row.holds].append(normalise(row.text))
    return {
        key: Answered(tuple((text,) for text in each[True]), tuple(each[False])) for key, each in held.items()
    }


class CheckedJudge:
    """Judges captions by what people answered about their images; ``known`` is by key."""

    kind: Kind = "checked"

    def __init__(self, known: Mapping[str, Answered]):
        self._known = known
        self.notes: tuple[str, ...] = ()

    def count(self, said: Said) -> list[Counts]:
        nothing = Answered(())
        rows = said.captions.values()
        return [counted(row, self._known.get(row.key, nothing), prose=said.prose) for row in rows]

    def compare(self, before: Said, after: Said, *, resamples: int = 2000, seed: int = 0) -> Comparison:
        step = compared(self, before, after, resamples=resamples, seed=seed)
        notes = []
        for side in (before, after):
            left, total = self._unanswered(side)
            notes.append(f"{side.name}: {total - left} of {total} statements have an answer")
        why = self.short((before, after))
        if why is None:
            return replace(step, notes=tuple(notes))
        return replace(step, judge="none", notes=(*notes, why))

    def short(self, said: Sequence[Said]) -> str | None:
        """Which statements lack an answer, as a sentence; None where enough have one."""
        counted = {side.name: self._unanswered(side) for side in said}
        missing = [
            f"{left} statements of {name}"
            for name, (left, total) in counted.items()
            if total - left < ANSWERED * total
        ]
        if not missing:
            return None
        return (
            f"people have not answered {' and '.join(missing)}; {ANSWERED:.0%} of each captioner's are needed"
        )

    def _unanswered(self, said: Said) -> tuple[int, int]:
        """(statements without an answer, all)."""
        counts = self.count(said)
        left = sum(row["unparsed"] for row in counts)
        return int(left), int(left + sum(row["true"] + row["false"] for row in counts))
