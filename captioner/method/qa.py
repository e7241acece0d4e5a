"""Yes/no questions: how they are put, drawn in balance and held out, and what their answers are worth.

A verifier's P(yes) is made honest by one temperature (Guo et al. 2017), fitted on held-out questions; the
same questions tell between which probabilities its word is not good enough.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Column, Table
from scipy.special import expit, log_expit, logit

from captioner import prompts
from captioner.errors import DataError, RunError
from captioner.files import row_seed
from captioner.progress import console

if TYPE_CHECKING:
    from captioner.sources.folder import ImageRow

ANSWERS = ("yes", "no")
OPEN = "open"  # stratum of a question that asks for a word
WORDINGS = ("question", "question_again")  # prompts that put a statement as a question
ENOUGH = 20  # answers below which a share says nothing
BINS = 10  # of the calibration error
BAND_GROUP = 40  # answers whose share of "yes" is looked at together
HELD_OUT = "held_out.json"  # of a QA stage: keys of the images that its verifier was not trained on
RIDGE = 0.1  # on the coefficients of a logistic regression
SHARPEST, FLATTEST = 0.05, 20.0  # temperatures that are not exceeded

Question = Mapping[str, Any]  # question, answer, kind, stratum: a row of a data set's `questions` column


def is_yes_no(question: Question) -> bool:
    return question["stratum"] != OPEN and question["answer"] in ANSWERS


def question_text(question: Question, wording: str = WORDINGS[0]) -> str:
    """The user's turn: a statement is put as a yes/no question, a question is asked as it stands."""
    text: str = question["question"]
    if text.rstrip().endswith("?") or not is_yes_no(question):
        return text
    return prompts.load(wording, statement=text)


def read_rows(data: Path, max_bad: float, seed: int) -> tuple[list[ImageRow], dict[str, int]]:
    """Images with yes/no questions of a folder or question file, and counts of what a file holds.

    Raises DataError where there are none, Refused where more than ``max_bad`` of a file's rows are bad.
    """
    from captioner.sources import questions

    rows, counts = questions.read_any(data, max_bad)
    if counts:
        asked = balance([row.questions or [] for row in rows], seed)
        rows = [replace(row, questions=[dict(q) for q in own]) for row, own in zip(rows, asked, strict=True)]
    rows = [row for row in rows if any(map(is_yes_no, row.questions or []))]
    if not rows:
        fix = "give the folder's metadata a column questions with yes/no answers"
        raise DataError("no image has yes/no questions", where=str(data), fix=fix)
    return rows, counts


def balance(asked: Sequence[Sequence[Question]], seed: int) -> list[list[Question]]:
    """Yes/no questions of many images, of every kind as many "yes" as "no"; who leaves is drawn by ``seed``.

    For data sets whose images have too few questions each for :func:`draw_balanced`.
    """
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for i, questions in enumerate(asked):
        for j, question in enumerate(questions):
            if is_yes_no(question):
                places.setdefault((question["kind"], question["answer"]), []).append((i, j))
    rng = random.Random(seed)
    stay: set[tuple[int, int]] = set()
    for kind in sorted({kind for kind, _ in places}):
        pools = [places.get((kind, answer), []) for answer in ANSWERS]
        for pool in pools:
            stay.update(rng.sample(pool, min(map(len, pools))))
    return [[q for j, q in enumerate(questions) if (i, j) in stay] for i, questions in enumerate(asked)]


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
            f"{len(keys)} image with yes/no questions", fix="give qa.data more images: some are held out"
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
    blind: float | None = None  # accuracy of the same verifier on the same questions without the image
    false_veto: float | None = None  # share of the true ones answered "no"
    false_pass: float | None = None  # share of the false ones answered "yes"


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
        false_veto=1 - both / sum(true) if any(true) else None,
        false_pass=(sum(said) - both) / (count - sum(true)) if not all(true) else None,
    )


def accuracy_table(answers: Sequence[Answer], blind: Sequence[Answer] = ()) -> dict[str, Accuracy]:
    """Scores of all answers, every kind and every stratum: ``all``, ``kind color``, ``stratum swap``, ...

    ``blind``: answers to the same questions, in the same order, given without the image.
    """
    groups = {"all": list(range(len(answers)))}
    for field in ("kind", "stratum"):
        for index in sorted(range(len(answers)), key=lambda i: getattr(answers[i], field)):
            groups.setdefault(f"{field} {getattr(answers[index], field)}", []).append(index)
    table = {name: accuracy([answers[i] for i in members]) for name, members in groups.items()}
    if not blind:
        return table
    unseen = {name: accuracy([blind[i] for i in members]).accuracy for name, members in groups.items()}
    return {name: replace(scores, blind=unseen[name]) for name, scores in table.items()}


def print_table(accuracies: Mapping[str, Accuracy], title: str = "held out") -> None:
    table = Table(Column(title, no_wrap=True))
    for name in ("questions", "accuracy", "precision", "recall", "yes ratio", "calib. error", "blind"):
        table.add_column(name, justify="right")
    for name, a in accuracies.items():
        scores = (a.accuracy, a.precision, a.recall, a.yes_ratio, a.calibration_error, a.blind)
        table.add_row(name, str(a.count), *("-" if score is None else f"{score:.3f}" for score in scores))
    console().print(table)


# ---- calibration


class Calibration(BaseModel):
    """What held-out questions say about a verifier's probabilities; ``calibration.json`` of a QA stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(gt=0)
    keep: float = Field(ge=0, le=1)  # calibrated P(yes) from which "yes" is right often enough
    drop: float = Field(ge=0, le=1)  # ... below which "no" is
    reask: tuple[str, ...] = ()  # ways of asking again that decided undecided questions rightly

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Raises RunError for a file that does not hold one."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            raise RunError(
                f"no calibration: {error}", where=str(path), fix="captioner qa --round N --redo"
            ) from error


def calibrate(answers: Sequence[Answer], target: float) -> Calibration:
    """Temperature and abstain band of a verifier, from its raw answers to held-out questions."""
    temperature = fit_temperature(answers)
    keep, drop = band(scaled(answers, temperature), target)
    return Calibration(temperature=temperature, keep=keep, drop=drop)


def scale(p: float, temperature: float) -> float:
    """A probability with its logit divided by ``temperature`` (Guo et al. 2017, eq. 9, two classes)."""
    return float(expit(log_odds([p])[0] / temperature))


def scaled(answers: Sequence[Answer], temperature: float) -> list[Answer]:
    return [replace(answer, p_yes=scale(answer.p_yes, temperature)) for answer in answers]


def combine(probabilities: Sequence[float]) -> float:
    """One probability from several askings: the mean of their logits."""
    return float(expit(log_odds(probabilities).mean()))


def log_odds(probabilities: Sequence[float]) -> np.ndarray:
    """Their logits (N), finite where a probability is 0 or 1."""
    return logit(np.clip(np.asarray(probabilities, dtype=float), 1e-12, 1 - 1e-12))


def fit_temperature(answers: Sequence[Answer]) -> float:
    """The temperature with the least negative log-likelihood; 1 where there is only one kind of answer.

    The likelihood is concave in the inverse temperature, so there is one best.
    """
    from scipy.optimize import minimize_scalar  # half a second to import

    logits = log_odds([answer.p_yes for answer in answers])
    labels = np.array([answer.expected == "yes" for answer in answers])
    if labels.all() or not labels.any():
        return 1.0
    signed = np.where(labels, logits, -logits)
    bounds = (1 / FLATTEST, 1 / SHARPEST)
    best = minimize_scalar(
        lambda sharp: -log_expit(sharp * signed).sum(),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(1 / best.x)


def undecided(p: float, calibration: Calibration) -> bool:
    return calibration.drop <= p < calibration.keep


def decided_rightly(
    asked_twice: Sequence[tuple[Answer, float]], calibration: Calibration
) -> tuple[int, float]:
    """Of undecided questions, how many a second P(yes) decides, and the share decided rightly (0 of none)."""
    right = []
    for first, second in asked_twice:
        p = combine([first.p_yes, second])
        if not undecided(p, calibration):
            right.append((p >= calibration.keep) == (first.expected == "yes"))
    return len(right), sum(right) / len(right) if right else 0.0


def cross_fitted(answers: Sequence[Answer], images: Sequence[str]) -> list[Answer]:
    """Calibrated answers, each by a temperature fitted on the other half of the ``images`` (one per answer).

    So the calibration error that is reported is that of questions the temperature has not seen.
    """
    half = {key: i % 2 for i, key in enumerate(sorted(set(images)))}
    sides = [half[key] for key in images]
    fitted = []
    for side in (0, 1):
        others = [answer for answer, of in zip(answers, sides, strict=True) if of != side]
        fitted.append(fit_temperature(others) if others else 1.0)
    return [
        replace(answer, p_yes=scale(answer.p_yes, fitted[side]))
        for answer, side in zip(answers, sides, strict=True)
    ]


def logistic(features: np.ndarray, targets: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Coefficients (D) of a logistic regression on ``features`` (N, D), targets (N) anywhere in 0..1.

    The ridge keeps them finite where the classes separate. (Those of scikit-learn take classes 0 and 1 only.)
    """
    from scipy.optimize import minimize

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        at = features @ x
        nll = -(weights * (targets * log_expit(at) + (1 - targets) * log_expit(-at))).sum()
        slope = features.T @ (weights * (expit(at) - targets))
        return nll + RIDGE / 2 * x @ x, slope + RIDGE * x

    def bend(x: np.ndarray) -> np.ndarray:
        p = expit(features @ x)
        return (features.T * (weights * p * (1 - p))) @ features + RIDGE * np.eye(len(x))

    start = np.zeros(features.shape[1])
    return minimize(loss, start, jac=True, hess=bend, method="trust-exact", options={"gtol": 1e-8}).x


def band(answers: Sequence[Answer], target: float) -> tuple[float, float]:
    """(keep, drop): from ``keep`` on "yes", below ``drop`` "no" is right in at least ``target`` of the cases.

    The share of "yes" as a function of P(yes), made monotone (isotonic regression) over groups of
    ``BAND_GROUP`` answers. (1, 0) where the target is never reached.
    """
    from scipy.optimize import isotonic_regression

    ordered = sorted(answers, key=lambda answer: answer.p_yes)
    groups = np.array_split(np.arange(len(ordered)), max(1, len(ordered) // BAND_GROUP))
    lowest = [ordered[group[0]].p_yes for group in groups]
    shares = [fmean(ordered[i].expected == "yes" for i in group) for group in groups]
    fitted = isotonic_regression(shares, weights=[len(group) for group in groups])
    blocks = [(lowest[start], fitted.x[start] + 0.0) for start in fitted.blocks[:-1]]
    keep = next((low for low, share in blocks if share >= target - 1e-9), 1.0)
    unsure = next((i for i, (_, share) in enumerate(blocks) if share > 1 - target + 1e-9), None)
    drop = keep if unsure is None else blocks[unsure][0] if unsure else 0.0
    return keep, min(drop, keep)
