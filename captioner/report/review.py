"""What a person checks: claims to show, answers that no kill can lose, and what the answers decide. No model.

A reviewer sees an image and a question and answers yes, no or cannot tell; P(yes) stays hidden, so that the
verifier does not lead the person. The answers measure the verifier per kind of claim and fill the `checked`
judge.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from captioner.errors import DataError
from captioner.judges.checked import ANSWERS, Answers, Checked
from captioner.records import Claim

BINS = (0.1, 0.3, 0.5, 0.7, 0.9)  # edges of the P(yes) strata
FURTHEST = 2000  # more answers than this are not asked of anybody
Z = 1.959964  # of a 95 % interval
ENOUGH = 20  # answers below which nothing is decided: the interval is an approximation


@dataclass(frozen=True)
class Item:
    """One claim to check."""

    id: str
    sample: str  # sha256 of the image bytes
    key: str
    text: str
    kind: str
    question: str
    expected: str  # "yes" or "no": the answer that confirms the claim
    p_yes: float
    view: str

    @property
    def passed(self) -> bool:
        """Whether the verifier confirms the claim."""
        return (self.p_yes >= 0.5) == (self.expected == "yes")


@dataclass(frozen=True)
class Agreement:
    """How often verifier and person agree on one kind of claim, and what is missing for a decision."""

    kind: str
    asked: int  # answered yes or no
    cannot_tell: int
    agree: int
    low: float  # 95 % Wilson interval of the agreement
    high: float
    false_pass: int  # the verifier confirmed, the person did not
    false_veto: int
    decided: str  # "above", "below" the limit, or ""
    more: int | None  # further answers until the limit is decided at this rate; None: beyond FURTHEST


def choose(claims: Iterable[Claim], count: int, seed: int) -> list[Item]:
    """At most ``count`` claims, stratified by kind and P(yes): every stratum gives one in turn."""
    strata: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for claim in claims:
        item = Item(
            id=f"{claim.sample[:16]} {claim.question}",
            sample=claim.sample,
            key=claim.key,
            text=claim.text,
            kind=claim.kind or "other",
            question=claim.question,
            expected=claim.expected,
            p_yes=claim.p_yes,
            view=claim.view,
        )
        strata[item.kind, sum(claim.p_yes >= edge for edge in BINS)].append(item)
    rng = random.Random(seed)
    for name in sorted(strata):
        strata[name].sort(key=lambda item: item.id)
        rng.shuffle(strata[name])
    chosen: dict[str, Item] = {}
    while len(chosen) < count and any(strata.values()):
        for name in sorted(strata):
            if strata[name] and len(chosen) < count:
                item = strata[name].pop()
                chosen.setdefault(item.id, item)
    return list(chosen.values())


def add(answers: Answers, item: Item, answer: str) -> None:
    """Store what a person says about a claim. Raises DataError for another answer than ``ANSWERS``."""
    if answer not in ANSWERS:
        raise DataError(f"{answer!r} is not an answer.", fix=f"Answer one of: {', '.join(ANSWERS)}.")
    about = {name: value for name, value in asdict(item).items() if name not in ("id", "view")}
    answers.add(item.id, answer, **about)


def agreements(checked: Sequence[Checked], limit: float) -> list[Agreement]:
    """One row per kind and one for all, the largest first. ``limit`` is what agreement has to reach."""
    kinds: dict[str, list[Checked]] = defaultdict(list)
    for row in checked:
        kinds["all"].append(row)
        kinds[row.kind].append(row)
    return [_agreement(kind, rows, limit) for kind, rows in sorted(kinds.items(), key=lambda x: -len(x[1]))]


def _agreement(kind: str, rows: Sequence[Checked], limit: float) -> Agreement:
    counts = Counter(
        "cannot tell"
        if row.holds is None
        else ("agree" if passed == row.holds else "false pass" if passed else "false veto")
        for row in rows
        for passed in [(row.p_yes >= 0.5) == (row.expected == "yes")]
    )
    asked = len(rows) - counts["cannot tell"]
    low, high = interval(counts["agree"], asked)
    return Agreement(
        kind=kind,
        asked=asked,
        cannot_tell=counts["cannot tell"],
        agree=counts["agree"],
        low=low,
        high=high,
        false_pass=counts["false pass"],
        false_veto=counts["false veto"],
        decided="" if asked < ENOUGH else "above" if low >= limit else "below" if high < limit else "",
        more=more_needed(counts["agree"], asked, limit),
    )


def interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson interval of a share (Wilson 1927); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    from scipy.stats import binomtest  # a second of its own, which --help would wait for

    found = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def more_needed(successes: int, trials: int, limit: float) -> int | None:
    """Further answers until the interval lies on one side of ``limit``, if the rate stays as it is.

    A Wilson interval excludes a share exactly where the score test rejects it, so n answers decide when
    n > z^2 limit (1 - limit) / (rate - limit)^2; at least ``ENOUGH`` are asked for. Without answers the rate
    is taken to be 1. None where more than ``FURTHEST`` would be needed.
    """
    rate = successes / trials if trials else 1.0
    if rate == limit:
        return None
    needed = math.floor(Z**2 * limit * (1 - limit) / (rate - limit) ** 2) + 1
    more = max(0, max(needed, ENOUGH) - trials)
    return more if more <= FURTHEST else None


@dataclass(frozen=True)
class CaptionPair:
    """Two captions of an image; ``swapped`` tells that the second is shown first."""

    id: str
    key: str
    first: str
    second: str
    swapped: bool


def pair_up(first: Mapping[str, str], second: Mapping[str, str], count: int, seed: int) -> list[CaptionPair]:
    """At most ``count`` images that both captioned differently, in random order and random positions."""
    keys = sorted(key for key in first.keys() & second.keys() if first[key] != second[key])
    rng = random.Random(seed)
    rng.shuffle(keys)
    return [CaptionPair(key, key, first[key], second[key], rng.random() < 0.5) for key in keys[:count]]


def win_rate(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of images on which the second captioner wins, a tie counting half, with a 95 % interval.

    The interval leaves ties out (a sign test on the decided images).
    """
    counts = Counter(row["answer"] for row in answers)
    decided, total = counts["first"] + counts["second"], counts.total()
    low, high = interval(counts["second"], decided)
    share = (counts["second"] + counts["tie"] / 2) / total if total else None
    return {"images": total, **counts, "win_rate": share, "low": low, "high": high}


def unanswered(items: Sequence[Item | CaptionPair], answers: Answers) -> Iterator[int]:
    """Indices of what nobody has answered yet, in order."""
    return (index for index, item in enumerate(items) if item.id not in answers.rows)
