"""From samples to a golden caption: statements, verdicts, recomposition. Pure functions, no model.

The claim ledger is the one truth of a round: everything here derives from P(yes) and the thresholds, so a
threshold can change without asking the verifier again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from captioner import laboratory, prompts, views
from captioner.config import GoldenConfig, ViewsConfig, ViewsOverride
from captioner.engines import YesNo
from captioner.method import qa
from captioner.method.planted import ENOUGH
from captioner.method.tool import Statement, Tool
from captioner.records import Candidate, Claim, Golden, Planted
from captioner.statements import comparable_statements, is_one_statement, normalise, split_statements
from captioner.views import View

Verdict = Literal["keep", "drop", "abstain"]
CountTokens = Callable[[str], int]

NOTHING_KEPT = "no claim was kept"
OVER_BUDGET = "no kept claim fits the token budget"
UNVERIFIED = "the merged caption says something that was not asked"


UNCHECKABLE = "looking cannot check it"
OVER_LIMIT = "over the limit of questions per image, stated by few samples"

# Statements about the whole picture, which come first: they end in one of these words.
_WHOLE = re.compile(
    r"(?:\S+ ){0,4}(?:background|backdrop|photo|photograph|picture|illustration|painting|drawing|sketch|"
    r"rendering|render|screenshot|collage|watercolou?r|monochrome|close[- ]up|scene|indoors?|outdoors?)",
    re.IGNORECASE,
)
_RELATION = re.compile(r"\b(?:left|right|top) of\b", re.IGNORECASE)
_PLACES = (  # (axis, place as a share of the side, words)
    (0, 1 / 6, re.compile(r"\bleft\b", re.IGNORECASE)),
    (0, 5 / 6, re.compile(r"\bright\b", re.IGNORECASE)),
    (1, 1 / 6, re.compile(r"\btop\b|\bupper\b", re.IGNORECASE)),
    (1, 5 / 6, re.compile(r"\bbottom\b|\blower\b", re.IGNORECASE)),
)
_CENTER = re.compile(r"\bcent(?:er|re)\b|\bmiddle\b", re.IGNORECASE)


@dataclass(frozen=True)
class Thresholds:
    """What makes a verdict; ``distrusted`` maps the kinds that always abstain to the reason."""

    keep: float
    drop: float
    distrusted: Mapping[str, str] = field(default_factory=dict)


# ---- samples


def mark(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One image's candidates with ``repeats`` and ``duplicate_of`` set."""
    first: dict[tuple[str, ...], int] = {}
    marked = []
    for each in candidates:
        said = comparable_statements(each.text)
        original = first.setdefault(tuple(dict.fromkeys(said)), each.k)
        update = {
            "repeats": repeats(each.text),
            "duplicate_of": None if original == each.k else original,
        }
        marked.append(each.model_copy(update=update))
    return marked


def repeats(text: str) -> int:
    """Statements that were said before in this caption, and words that repeat the words before them."""
    said = comparable_statements(text)
    return len(said) - len(set(said)) + sum(map(_looped, set(said)))


def _looped(statement: str) -> int:
    """Words that only repeat those before them: one to eight that follow themselves three times or more."""
    words = re.findall(r"\w+", statement)
    found = at = 0
    while at < len(words):
        for period in range(1, 9):
            end = at + period
            while end < len(words) and words[end] == words[end - period]:
                end += 1
            times = (end - at) // period - 1
            if times >= 3:
                found += times * period
                at += (times + 1) * period
                break
        else:
            at += 1
    return found


@dataclass(frozen=True)
class Selection:
    """The statements of one image that are asked about, and those that are not, each with the reason."""

    asked: list[Statement]  # candidates are the candidates' k
    unasked: list[tuple[Statement, str]]


def select(candidates: Sequence[Candidate], tool: Tool, max_questions: int) -> Selection:
    """Merged statements of one image's samples, in natural order, those about the whole picture first.

    What looking cannot check is left out, then the rarest until ``max_questions`` remain (of equally rare
    ones those that stand later). The last statement of a sample that the limit cut is half a statement and
    not read.
    """
    statements = tool.merge([whole_statements(candidate) for candidate in candidates])
    statements = [
        Statement(each.text, tuple(candidates[index].k for index in each.candidates)) for each in statements
    ]
    statements.sort(key=lambda each: _WHOLE.fullmatch(each.text) is None)
    checkable = [each for each in statements if tool.checkable(each.text)]
    chosen = set(sorted(checkable, key=lambda each: -len(each.candidates))[:max_questions])
    return Selection(
        [each for each in checkable if each in chosen],
        [(each, UNCHECKABLE) for each in statements if each not in checkable]
        + [(each, OVER_LIMIT) for each in checkable if each not in chosen],
    )


def whole_statements(candidate: Candidate) -> str:
    statements = split_statements(candidate.text)
    return ", ".join(statements if candidate.finish_reason == "stop" else statements[:-1])


# ---- verdicts


def confirmed(claim: Claim) -> float:
    """The verifier's probability of the answer that confirms the claim: P(yes), or P(no)."""
    return claim.p_yes if claim.expected == "yes" else 1.0 - claim.p_yes


def confidence(claim: Claim) -> float:
    """How likely the claim holds: by verifier and samples together, where :func:`weigh` could tell."""
    return confirmed(claim) if claim.p_true is None else claim.p_true


def weigh(
    claims: Sequence[Claim], samples: int, planted: Sequence[Planted], distrusted: Mapping[str, str]
) -> list[Claim]:
    """All claims of a round with ``p_true``, except those of ``distrusted`` kinds; ``samples`` per image.

    Log odds = what P(yes) tells + the prior of the kind and the votes. What P(yes) tells is fitted on the
    planted claims of the kind (Platt 1999), "yes" and "no" weighing the same; where too few are known it is
    taken as it stands: calibrated on questions half of which are true. The prior is logistic in the log odds
    of the votes. No answer of the round is needed for it: expectation maximisation finds the one under which
    the verifier's own answers are most likely (Saerens, Latinne & Decaestecker 2002).
    """
    places: dict[str, list[int]] = {}
    for index, claim in enumerate(claims):
        places.setdefault(claim.kind, []).append(index)
    weighed = [claim.model_copy(update={"p_true": None}) for claim in claims]
    for kind, indices in places.items():
        if kind in distrusted:
            continue
        own = [claims[index] for index in indices]
        bias, slope = _what_it_tells([row for row in planted if row.kind == kind])
        told = bias + slope * qa.log_odds([claim.p_yes for claim in own])
        told = np.where([claim.expected == "yes" for claim in own], told, -told)
        votes = qa.log_odds([(len(claim.candidates) + 0.5) / (samples + 1) for claim in own])
        features = np.stack([np.ones(len(own)), votes], axis=1)
        prior = np.zeros(2)
        for _ in range(100):
            before, prior = prior, qa.logistic(features, qa.expit(told + features @ prior))
            if np.abs(prior - before).max() < 1e-4:
                break
        for index, p in zip(indices, qa.expit(told + features @ prior), strict=True):
            weighed[index] = claims[index].model_copy(update={"p_true": float(p)})
    return weighed


def _what_it_tells(known: Sequence[Planted]) -> tuple[float, float]:
    """(bias, slope), in log odds of P(yes), of log P(answer | it holds) - log P(answer | it does not)."""
    true = np.array([row.answer == "yes" for row in known], dtype=float)
    if len(known) < ENOUGH or not 0 < true.sum() < len(known):
        return 0.0, 1.0
    weights = np.where(true == 1, 0.5 / true.mean(), 0.5 / (1 - true.mean()))
    features = np.stack([np.ones(len(known)), qa.log_odds([row.p_yes for row in known])], axis=1)
    bias, slope = qa.logistic(features, true, weights)
    return float(bias), float(slope)


def claims(
    candidate: Candidate,
    statements: Sequence[Statement],
    answers: Sequence[YesNo],
    tool: Tool,
    verifier: str,
    temperature: float,
) -> list[Claim]:
    """The claims of one image, not judged yet; ``candidate`` is any of its samples, ``verifier`` a hash."""
    asked = []
    for statement, answer in zip(statements, answers, strict=True):
        question = tool.decompose(statement.text)
        claim = Claim(
            sample=candidate.sample,
            key=candidate.key,
            text=statement.text,
            kind=tool.kind(statement.text),
            slot=tool.slot(statement.text),
            candidates=list(statement.candidates),
            question=question.text,
            expected=question.expected,
            p_yes=qa.scale(answer.p_yes, temperature),
            label_mass=answer.label_mass,
            verdict="abstain",
            verifier=verifier,
            view="all",
        )
        asked.append(claim)
    return asked


def verdict(probability: float, keep: float, drop: float) -> Verdict:
    """keep from ``keep`` on, drop below ``drop``, abstain between. Raises ValueError outside 0..1."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"not a probability: {probability}")
    return "keep" if probability >= keep else "drop" if probability < drop else "abstain"


def judge(claims: Sequence[Claim], thresholds: Thresholds) -> list[Claim]:
    """The claims, of any images, with the verdicts that these thresholds give, and why.

    Of claims that exclude each other (one image, one slot) the likeliest stays where it is kept, of equally
    likely ones that of most samples; the others are dropped.
    """
    judged = [claim.model_copy(update=_judged(claim, thresholds)) for claim in claims]
    best: dict[tuple[str, str], Claim] = {}
    for claim in judged:
        if claim.slot and claim.verdict == "keep":
            best[claim.key, claim.slot] = max(best.get((claim.key, claim.slot), claim), claim, key=_rank)
    return [_excluded(claim, best.get((claim.key, claim.slot)), thresholds) for claim in judged]


def _rank(claim: Claim) -> tuple[float, int]:
    return confidence(claim), len(claim.candidates)


def _excluded(claim: Claim, best: Claim | None, thresholds: Thresholds) -> Claim:
    if best is None or claim is best or claim.verdict == "drop" or claim.kind in thresholds.distrusted:
        return claim
    why = f"{confidence(claim):.3f}, and {best.text} has {confidence(best):.3f}"
    return claim.model_copy(update={"verdict": "drop", "why": why})


def _judged(claim: Claim, thresholds: Thresholds) -> dict[str, str]:
    probability, keep, drop = confidence(claim), thresholds.keep, thresholds.drop
    said = verdict(probability, keep, drop)
    if claim.kind in thresholds.distrusted:
        return {"verdict": "abstain", "why": thresholds.distrusted[claim.kind]}
    bounds = {"keep": f"at least {keep:.3f}", "drop": f"below {drop:.3f}", "abstain": "between"}
    asked = "" if claim.first_p_yes is None else ", asked again"
    return {"verdict": said, "why": f"{probability:.3f} is {bounds[said]}{asked}"}


def second_question(way: str, statement: str, question: str, plan: Sequence[View]) -> tuple[str, str] | None:
    """(view, question) of asking again by ``view`` or ``wording``; None where the statement allows neither.

    ``plan`` are the views of a square image.
    """
    if way == "view":
        view = best_view(statement, plan)
        return (view, question) if view else None
    if statement.rstrip().endswith("?"):  # a question has one wording
        return None
    return "all", prompts.load(qa.WORDINGS[1], statement=statement)


def square_plan(checkpoint: Path, override: ViewsOverride) -> list[View]:
    """The views that a checkpoint would see of a large square image."""
    stored = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("captioner", {})
    settings = override.over(ViewsConfig.model_validate(stored.get("views", {})))
    return views.plan(1200, 1200, settings, size=1200, factor=1)


def best_view(statement: str, plan: Sequence[View]) -> str | None:
    """The tag of the smallest view that covers the place a statement names.

    A place is a cell of a 3 x 3 grid. None where the statement names none, or only the largest view has it.
    """
    if _RELATION.search(statement):
        return None
    statement = laboratory.plainly(statement)
    named = {axis: at for axis, at, words in _PLACES if words.search(statement)}
    if not named and not _CENTER.search(statement):
        return None
    x, y = named.get(0, 0.5), named.get(1, 0.5)
    right, bottom = (max(view.box[side] for view in plan) for side in (2, 3))
    cell = ((x - 1 / 6) * right, (y - 1 / 6) * bottom, (x + 1 / 6) * right, (y + 1 / 6) * bottom)
    slack = 0.02 * right  # a third is not a whole number of pixels
    covering = [
        (view.box[2] - view.box[0], view.tag)
        for view in plan
        if view.box[0] <= cell[0] + slack
        and view.box[1] <= cell[1] + slack
        and view.box[2] >= cell[2] - slack
        and view.box[3] >= cell[3] - slack
    ]
    width, tag = min(covering, key=lambda each: each[0], default=(right, ""))
    return tag if width < right else None


def asked_again(
    claim: Claim, asked: Sequence[tuple[str, str]], answers: Sequence[YesNo], temperature: float
) -> Claim:
    """The claim with its first answer and those to ``asked`` taken together, not judged yet."""
    again = [qa.scale(answer.p_yes, temperature) for answer in answers]
    view = next((view for view, _ in asked if view != "all"), "all")
    update = {"first_p_yes": claim.p_yes, "p_yes": qa.combine([claim.p_yes, *again]), "view": view}
    return claim.model_copy(update=update)


# ---- the golden caption


def stays(claim: Claim, samples: int, abstain: Literal["majority", "leave_out", "keep"]) -> bool:
    """Whether a judged claim belongs into the golden caption, drawn from ``samples`` captions."""
    if claim.verdict != "abstain":
        return claim.verdict == "keep"
    return abstain == "keep" or (abstain == "majority" and 2 * len(claim.candidates) > samples)


def recompose(
    claims: Sequence[Claim], count_tokens: CountTokens, max_tokens: int
) -> tuple[str | None, list[Claim]]:
    """The claims' texts in the given order, joined by ", ", within a token budget; and the claims in it.

    What leaves first: claims whose words another one says as well, then the least certain, then those of
    fewest samples, then the last. Claims that exceed the budget alone never enter. None where nothing is
    left, never an empty caption.
    """
    inside = [claim for claim in claims if count_tokens(claim.text) <= max_tokens]
    while inside:
        text = ", ".join(claim.text for claim in inside)
        if count_tokens(text) <= max_tokens:
            return text, inside
        words = [set(normalise(claim.text).split()) for claim in inside]
        ranks = [
            (not any(own < other for other in words), confidence(claim), len(claim.candidates), -i)
            for i, (claim, own) in enumerate(zip(inside, words, strict=True))
        ]
        inside.pop(min(range(len(inside)), key=ranks.__getitem__))
    return None, []


def build(
    claims: Sequence[Claim], samples: int, config: GoldenConfig, count_tokens: CountTokens
) -> Golden | str:
    """The golden caption of one image, or the reason why there is none.

    ``claims`` are all judged claims of the image, in natural order; ``samples`` is the number of captions
    they were drawn from. The counts are of verdicts; an abstained claim is counted there whether it stays or
    not. The caption is read again as a reader splits it: it states the claims that stay and nothing else.
    """
    staying = [
        claim for claim in claims if stays(claim, samples, config.abstain) and is_one_statement(claim.text)
    ]
    text, inside = recompose(staying, count_tokens, config.max_tokens)
    if text is None:
        return OVER_BUDGET if staying else NOTHING_KEPT
    if comparable_statements(text) != [normalise(each.text) for each in inside]:
        return UNVERIFIED
    verdicts = [claim.verdict for claim in claims]
    return Golden(
        sample=claims[0].sample,
        key=claims[0].key,
        text=text,
        kept=verdicts.count("keep"),
        dropped=verdicts.count("drop"),
        abstained=verdicts.count("abstain"),
        tokens=count_tokens(text),
        over_budget=[claim.text for claim in staying if claim not in inside],
    )
