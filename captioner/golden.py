"""From samples to a golden caption: statements, verdicts, recomposition. Pure functions, no model.

The claim ledger is the one truth of a round: everything here derives from P(yes) and the thresholds, so a
threshold can change without asking the verifier again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from captioner.config import GoldenConfig
from captioner.engines import YesNo
from captioner.records import Candidate, Claim, Golden
from captioner.tool import Statement, Tool, split_statements

Verdict = Literal["keep", "drop", "abstain"]
CountTokens = Callable[[str], int]

NOTHING_KEPT = "no claim was kept"
OVER_BUDGET = "no kept claim fits the token budget"


@dataclass(frozen=True)
class Selection:
    """The statements of one image that are asked about, and how many are not."""

    asked: list[Statement]  # candidates are the candidates' k
    uncheckable: int
    over_limit: int


def select(candidates: Sequence[Candidate], tool: Tool, max_questions: int) -> Selection:
    """Merged statements of one image's samples, in natural order.

    What looking cannot check is left out, then the rarest until ``max_questions`` remain (of equally rare
    ones those that stand later). The last statement of a sample that the limit cut is half a statement and
    not read.
    """
    statements = tool.merge([_whole_statements(candidate) for candidate in candidates])
    statements = [
        Statement(each.text, tuple(candidates[index].k for index in each.candidates)) for each in statements
    ]
    checkable = [each for each in statements if tool.checkable(each.text)]
    by_rarity = sorted(range(len(checkable)), key=lambda i: -len(checkable[i].candidates))
    chosen = sorted(by_rarity[:max_questions])
    return Selection(
        [checkable[i] for i in chosen], len(statements) - len(checkable), len(checkable) - len(chosen)
    )


def _whole_statements(candidate: Candidate) -> str:
    statements = split_statements(candidate.text)
    return ", ".join(statements if candidate.finish_reason == "stop" else statements[:-1])


def confidence(claim: Claim) -> float:
    """The verifier's probability that the claim holds: P(yes), or P(no) where "no" confirms it."""
    return claim.p_yes if claim.expected == "yes" else 1.0 - claim.p_yes


def claims(
    candidate: Candidate,
    statements: Sequence[Statement],
    answers: Sequence[YesNo],
    tool: Tool,
    verifier: str,
    config: GoldenConfig,
) -> list[Claim]:
    """The judged claims of one image; ``candidate`` is any of its samples, ``verifier`` a hash."""
    asked = []
    for statement, answer in zip(statements, answers, strict=True):
        question = tool.decompose(statement.text)
        claim = Claim(
            sample=candidate.sample,
            key=candidate.key,
            text=statement.text,
            kind=tool.kind(statement.text),
            candidates=list(statement.candidates),
            question=question.text,
            expected=question.expected,
            p_yes=answer.p_yes,
            label_mass=answer.label_mass,
            verdict="abstain",
            verifier=verifier,
            view="all",
        )
        asked.append(claim)
    return judge(asked, config)


def verdict(probability: float, keep: float, drop: float) -> Verdict:
    """keep from ``keep`` on, drop below ``drop``, abstain between. Raises ValueError outside 0..1."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"not a probability: {probability}")
    return "keep" if probability >= keep else "drop" if probability < drop else "abstain"


def judge(claims: Sequence[Claim], config: GoldenConfig) -> list[Claim]:
    """The claims with the verdicts that these thresholds give."""
    return [
        claim.model_copy(update={"verdict": verdict(confidence(claim), config.keep, config.drop)})
        for claim in claims
    ]


def stays(claim: Claim, samples: int, abstain: Literal["majority", "leave_out", "keep"]) -> bool:
    """Whether a judged claim belongs into the golden caption, drawn from ``samples`` captions."""
    if claim.verdict != "abstain":
        return claim.verdict == "keep"
    return abstain == "keep" or (abstain == "majority" and 2 * len(claim.candidates) > samples)


def recompose(claims: Sequence[Claim], count_tokens: CountTokens, max_tokens: int) -> str | None:
    """The claims' texts in the given order, joined by ", ", within a token budget.

    Least certain claims leave first: lowest confidence, then fewest samples, then last. Claims that exceed
    the budget alone never enter. None where nothing is left, never an empty caption.
    """
    inside = [claim for claim in claims if count_tokens(claim.text) <= max_tokens]
    while inside:
        text = ", ".join(claim.text for claim in inside)
        if count_tokens(text) <= max_tokens:
            return text
        ranks = [(confidence(claim), len(claim.candidates), -i) for i, claim in enumerate(inside)]
        inside.pop(min(range(len(inside)), key=ranks.__getitem__))
    return None


def build(
    claims: Sequence[Claim], samples: int, config: GoldenConfig, count_tokens: CountTokens
) -> Golden | str:
    """The golden caption of one image, or the reason why there is none.

    ``claims`` are all claims of the image, in natural order; ``samples`` is the number of captions they were
    drawn from. The counts are of verdicts; an abstained claim is counted there whether it stays or not.
    """
    judged = judge(claims, config)
    staying = [claim for claim in judged if stays(claim, samples, config.abstain)]
    text = recompose(staying, count_tokens, config.max_tokens)
    if text is None:
        return OVER_BUDGET if staying else NOTHING_KEPT
    verdicts = [claim.verdict for claim in judged]
    return Golden(
        sample=claims[0].sample,
        key=claims[0].key,
        text=text,
        kept=verdicts.count("keep"),
        dropped=verdicts.count("drop"),
        abstained=verdicts.count("abstain"),
        tokens=count_tokens(text),
    )
