"""DCScore (Ye et al. 2025, arXiv:2503.07906): precision and recall of a caption's units on a list of facts.

Extracting the units, matching them to the facts and verifying them on the image is a model's work; counting
is done here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from captioner.errors import DataError
from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate

FACTS = "human_annotated_oracle_facts.jsonl"
ORIGIN = "https://github.com/MAGAer13/DeCapBench (folder eval)"
_PARTS = ("precision", "recall", "f1", "f1_relevant", "dcscore")
COLUMNS = tuple(f"{what} {part}" for part in _PARTS for what in ("sum", "images"))


class Unit(BaseModel):
    """One thing that a caption states, and what was found of it."""

    fact: str
    relevance: bool = True  # whether it says something of the image at all
    matched_oracle_id: int | None = None  # the place of the fact that it states, from 0
    verification: bool  # whether it holds


class _Facts(BaseModel):
    image_name: str
    oracle_facts: list[str]


def dcscore(units: Mapping[str, Sequence[Unit]], folder: Path) -> Scores:
    """Means over images of precision, recall, F1 and DCScore; keys are the benchmark's image names.

    DCScore is the mean of F1 on all units and F1 on the relevant ones. DataError for images without facts,
    and for a unit matched to a fact that the image does not have.
    """
    path = files.find(folder, FACTS, ORIGIN)
    facts = {row.image_name: len(row.oracle_facts) for row in files.read_jsonl(path, _Facts)}
    files.check_known(units.keys() - facts.keys(), "dcscore", path)
    rows = {}
    for key, own in units.items():
        if any(u.matched_oracle_id is not None and not 0 <= u.matched_oracle_id < facts[key] for u in own):
            raise DataError(
                f"a unit is matched to a fact outside 0 to {facts[key] - 1}",
                where=key,
                fix="match units to the places of the facts in the file",
            )
        rows[key] = _row(own, facts[key])
    return tabulate("dcscore", rows, _metrics, columns=COLUMNS, annotated=len(facts))


def precision_recall_f1(
    units: Sequence[Unit], facts: int, stated_by: Sequence[Unit] | None = None
) -> tuple[float, float, float]:
    """Of one image; ``facts`` is how many facts are known of it.

    Units matched to one fact share its credit, all of ``stated_by`` (default: ``units``). A true unit that
    matches no fact is credited and counts as one more fact. Precision of no unit, and recall and F1 without
    any fact, are NaN; F1 without a true unit is 0.
    """
    sharing = units if stated_by is None else stated_by
    stated = Counter(unit.matched_oracle_id for unit in sharing)
    true = [unit for unit in units if unit.verification]
    extra = sum(unit.matched_oracle_id is None for unit in true)
    credit = extra + sum(1 / stated[u.matched_oracle_id] for u in true if u.matched_oracle_id is not None)
    precision = len(true) / len(units) if units else float("nan")
    recall = credit / (facts + extra) if facts + extra else float("nan")
    if recall != recall:
        return precision, recall, float("nan")
    return precision, recall, 2 * precision * recall / (precision + recall) if recall else 0.0


def _row(units: Sequence[Unit], facts: int) -> dict[str, float]:
    precision, recall, f1 = precision_recall_f1(units, facts)
    # in the benchmark's code irrelevant units take their share of a fact's credit here too
    relevant = precision_recall_f1([unit for unit in units if unit.relevance], facts, stated_by=units)[2]
    values = dict(zip(_PARTS, (precision, recall, f1, relevant, (f1 + relevant) / 2), strict=True))
    row: dict[str, float] = {}
    for part, value in values.items():
        if value == value:  # an undefined value is left out of the mean
            row |= {f"sum {part}": value, f"images {part}": 1}
    return row


def _metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {part: ratio(sums[f"sum {part}"], sums[f"images {part}"]) for part in _PARTS}
