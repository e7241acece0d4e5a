"""Yes/no questions: how they are put, drawn in balance and held out, and how well a verifier answers them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captioner import prompts
from captioner.errors import DataError
from captioner.runs import row_seed

ANSWERS = ("yes", "no")
OPEN = "open"  # stratum of a question that asks for a word
BINS = 10  # of the calibration error

Question = Mapping[str, Any]  # question, answer, kind, stratum: a row of a data set's `questions` column


def is_yes_no(question: Question) -> bool:
    return question["stratum"] != OPEN and question["answer"] in ANSWERS


def question_text(question: Question) -> str:
    """The user's turn: a yes/no question holds a statement, an open one is asked as it stands."""
    return (
        prompts.load("question", statement=question["question"])
        if is_yes_no(question)
        else question["question"]
    )


def draw_balanced(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """At most ``count`` yes/no questions of one image: of every kind as many "yes" as "no", strata in turn.

    Otherwise the kind alone would tell the answer. Fewer come where the image has no more such pairs.
    """
    pools: dict[str, dict[str, list[Question]]] = {}
    for question in filter(is_yes_no, questions):
        pools.setdefault(question["kind"], {answer: [] for answer in ANSWERS})[question["answer"]].append(
            question
        )
    for pool in pools.values():
        rng.shuffle(pool["yes"])
        pool["no"] = _strata_in_turn(pool["no"], rng)
    drawn: list[Question] = []
    while len(drawn) + 2 <= count:
        kinds = [kind for kind, pool in pools.items() if all(pool.values())]
        if not kinds:
            break
        for kind in rng.sample(kinds, min(len(kinds), (count - len(drawn)) // 2)):
            drawn += [pools[kind]["yes"].pop(), pools[kind]["no"].pop()]
    rng.shuffle(drawn)
    return drawn


def _strata_in_turn(negatives: list[Question], rng: random.Random) -> list[Question]:
    """Shuffled so that ``pop`` takes the strata in turn: common ones do not drown the rare."""
    strata: dict[str, list[Question]] = {}
    for question in negatives:
        strata.setdefault(question["stratum"], []).append(question)
    piles = list(strata.values())
    for pile in piles:
        rng.shuffle(pile)
    ordered: list[Question] = []
    while any(piles):
        rng.shuffle(piles)
        ordered += [pile.pop() for pile in piles if pile]
    return ordered[::-1]


def split(keys: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for (training, holdout), split by image key: an image keeps its side when others come or go.

    Raises DataError for fewer than two images.
    """
    if len(keys) < 2:
        raise DataError(
            f"{len(keys)} image with yes/no questions", mend="give qa.data more images: some are held out"
        )
    order = sorted(range(len(keys)), key=lambda i: (row_seed(seed, "holdout", keys[i]), keys[i]))
    held = min(max(1, round(share * len(keys))), len(keys) - 1)
    return sorted(order[held:]), sorted(order[:held])


# ---- accuracy


@dataclass(frozen=True)
class Answer:
    """What a verifier said to one held-out question."""

    kind: str
    stratum: str
    expected: str  # "yes" or "no"
    p_yes: float
    label_mass: float


@dataclass(frozen=True)
class Accuracy:
    """Scores of a group of answers; "yes" is what precision and recall are about. None where undefined."""

    count: int
    accuracy: float
    precision: float | None
    recall: float | None
    yes_ratio: float  # share answered "yes"
    calibration_error: float
    label_mass: float  # mean probability of "yes" and "no" together


def accuracy(answers: Sequence[Answer]) -> Accuracy:
    """Scores at the threshold 0.5.

    Calibration error (Naeini et al. 2015): over ten equal bins of P(yes), weighted by their counts, the mean
    of |mean P(yes) - share whose answer is "yes"|.
    """
    said = [answer.p_yes >= 0.5 for answer in answers]
    true = [answer.expected == "yes" for answer in answers]
    both = sum(s and t for s, t in zip(said, true, strict=True))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for answer, is_true in zip(answers, true, strict=True):
        bins.setdefault(min(int(answer.p_yes * BINS), BINS - 1), []).append((answer.p_yes, is_true))
    gaps = [abs(sum(p for p, _ in members) - sum(t for _, t in members)) for members in bins.values()]
    count = len(answers)
    return Accuracy(
        count=count,
        accuracy=sum(s == t for s, t in zip(said, true, strict=True)) / count,
        precision=both / sum(said) if any(said) else None,
        recall=both / sum(true) if any(true) else None,
        yes_ratio=sum(said) / count,
        calibration_error=sum(gaps) / count,
        label_mass=sum(answer.label_mass for answer in answers) / count,
    )


def accuracy_table(answers: Sequence[Answer]) -> dict[str, Accuracy]:
    """Scores of all answers, every kind and every stratum: ``all``, ``kind color``, ``stratum swap``, ..."""
    groups = {"all": list(answers)}
    for answer in sorted(answers, key=lambda answer: answer.kind):
        groups.setdefault(f"kind {answer.kind}", []).append(answer)
    for answer in sorted(answers, key=lambda answer: answer.stratum):
        groups.setdefault(f"stratum {answer.stratum}", []).append(answer)
    return {name: accuracy(members) for name, members in groups.items()}
