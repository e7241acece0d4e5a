"""MMHal-Bench (Sun et al. 2023, arXiv:2309.14525): a summary of what a judge model wrote about 96 answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from captioner.judges import files
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate

ORIGIN = "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench (response_template.json)"
GOOD = 3  # ratings from here on mean: no hallucination
_RATING = re.compile(r"\brating\W{0,3}:\W{0,4}([0-6])(?![0-9]|\.[0-9])", re.IGNORECASE)


class _Question(BaseModel):
    question_type: str


def parse(judgement: str) -> int | None:
    """The rating, 0 to 6; None where the judge gave none or several."""
    found = {int(match) for match in _RATING.findall(judgement)}
    return found.pop() if len(found) == 1 else None


def mmhal(judgements: Mapping[str, str], folder: Path) -> Scores:
    """Mean rating (also by question type) and share of hallucinating answers, of the judge's texts.

    Keys are the question's place in the benchmark's file, from ``0``. A text without one clear rating is no
    rating: it lowers ``rated``. DataError for places that the file does not have.
    """
    path = files.find(folder, "response_template.json", ORIGIN)
    questions = files.read_json(path, list[_Question])
    types = {str(place): question.question_type for place, question in enumerate(questions)}
    files.check_known(judgements.keys() - types.keys(), "mmhal", path)
    kinds = sorted(set(types.values()))
    rows = {key: _count(parse(text), types[key]) for key, text in judgements.items()}
    columns = ["questions", "rated", "sum", "hallucinated"]
    columns += [f"{what} {kind}" for kind in kinds for what in ("rated", "sum")]

    def metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
        return {
            "score": ratio(sums["sum"], sums["rated"]),
            "hallucination_rate": ratio(sums["hallucinated"], sums["rated"]),
            "rated": ratio(sums["rated"], sums["questions"]),
        } | {f"score {kind}": ratio(sums[f"sum {kind}"], sums[f"rated {kind}"]) for kind in kinds}

    return tabulate(
        "mmhal",
        rows,
        metrics,
        columns=columns,
        annotated=len(questions),
        lower_is_better=("hallucination_rate",),
    )


def _count(rating: int | None, kind: str) -> dict[str, float]:
    if rating is None:
        return {"questions": 1}
    each: dict[str, float] = {"rated": 1, "sum": rating}
    return (
        {"questions": 1, "hallucinated": int(rating < GOOD)}
        | each
        | {f"{name} {kind}": value for name, value in each.items()}
    )
