"""The exact judge: images of which it is known what they show, from a laboratory or a list of facts.

Facts of real images are a JSON Lines file, one image a line, ``file_name`` relative to the image folder::

    {"file_name": "coffee.png", "facts": ["cup of coffee", ["red saucer", "red plate"], "metal spoon"]}

A fact with several wordings is a list. What none of an image's facts states counts as false, so a list must
be complete. Opinions count as neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import DataError
from captioner.judges.base import Comparison, Kind, Said, compared, counted
from captioner.judges.metrics import Counts
from captioner.laboratory import Facts, Judgement, laboratories
from captioner.statements import comparable_statements, entails, normalise, visible


@dataclass(frozen=True)
class FactList:
    """Facts about an image in plain words, each in one or more wordings (normalised)."""

    facts: tuple[tuple[str, ...], ...]

    def holds(self, statement: str) -> bool | None:
        """Whether a fact states it; None for what cannot be seen, such as an opinion."""
        if not visible(statement):
            return None
        said = normalise(statement)
        return any(entails(wording, said) for fact in self.facts for wording in fact)

    def judge(self, caption: str, *, prose: bool = False) -> Judgement:
        """A caption against the facts, statement by statement."""
        said = comparable_statements(caption)
        truth = {text: self.holds(text) for text in said}
        recalled = sum(
            any(entails(text, wording) for text in truth for wording in fact) for fact in self.facts
        )
        return Judgement(
            statements=len(said),
            unparsed=sum(truth[text] is None for text in said),
            duplicates=len(said) - len(truth),
            true=sum(known is True for known in truth.values()),
            false=sum(known is False for known in truth.values()),
            facts=len(self.facts),
            recalled=recalled,
        )

    @classmethod
    def of(cls, facts: object, where: str = "") -> FactList:
        """From a list of texts or lists of texts. Raises DataError for anything else, and an empty one."""
        rows = facts if isinstance(facts, list) else []
        wordings = [row if isinstance(row, list) else [row] for row in rows]
        texts = [text for row in wordings for text in row]
        if not texts or not all(isinstance(text, str) and normalise(text) for text in texts):
            fix = 'write "facts": ["red cup", ["wooden table", "table of wood"]]'
            raise DataError("not a list of facts", where=where or repr(facts)[:80], fix=fix)
        return cls(tuple(tuple(map(normalise, row)) for row in wordings))


def read(facts: str | None) -> Facts | None:
    """What the ``facts`` of an image's metadata tell: JSON of a laboratory, or a list of facts.

    None tells nothing. Raises DataError for anything else.
    """
    if facts is None:
        return None
    for laboratory in laboratories().values():
        if (known := laboratory.read(facts)) is not None:
            return known
    try:
        return FactList.of(json.loads(facts))
    except ValueError as error:
        raise DataError(f"facts are not JSON: {error}", where=facts[:80]) from error


def read_file(path: Path) -> dict[str, FactList]:
    """Fact lists by ``file_name``. Raises DataError for a file that does not hold them."""
    found: dict[str, FactList] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"facts cannot be read: {error}", where=str(path)) from error
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise DataError(f"a line is not JSON: {error}", where=where) from error
        if row is None:
            continue
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise DataError("no file_name", where=where, fix="name the image in the field file_name")
        if name in found:
            raise DataError(f"the image {name!r} is named twice", where=where, fix="keep one line per image")
        found[name] = FactList.of(row.get("facts"), where)
    return found


class FactsJudge:
    """Judges captions by what is known of their images; ``known`` is by key, of every image."""

    kind: Kind = "facts"
    notes: tuple[str, ...] = ()

    def __init__(self, known: Mapping[str, Facts]):
        self._known = known

    def count(self, said: Said) -> list[Counts]:
        return [counted(row, self._known[row.key], prose=said.prose) for row in said.captions.values()]

    def compare(self, before: Said, after: Said, *, resamples: int = 2000, seed: int = 0) -> Comparison:
        return compared(self, before, after, resamples=resamples, seed=seed)


def unknown(keys: Sequence[str], known: Mapping[str, Facts]) -> str | None:
    """Which images have no facts, as a sentence; None where all have."""
    missing = [key for key in keys if key not in known]
    if not missing:
        return None
    named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return f"{len(missing)} of {len(keys)} images have no known facts ({named})"
