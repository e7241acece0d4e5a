"""Verdicts on the claims of a round: keep, drop or abstain, from P(yes), votes and thresholds. No model.

They are a stage of their own, ``round-N/verdicts``: a threshold changes without asking the verifier again,
and the ledger stays as it was answered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from captioner.config import Config
from captioner.errors import DataError
from captioner.method import contradictions, qa, rounds
from captioner.method.rounds import Plan
from captioner.records import Claim, Planted, Verdict
from captioner.runs import Shards, Stage
from captioner.statements import normalise

Decision = Literal["keep", "drop", "abstain"]


@dataclass(frozen=True)
class Thresholds:
    """What makes a verdict. Kinds with the reason why: ``distrusted`` always abstain, ``cautious`` are never
    kept."""

    keep: float
    drop: float
    distrusted: Mapping[str, str] = field(default_factory=dict)
    cautious: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Thresholds and kinds, as a stage was made with them."""
        cautious = {"cautious": sorted(self.cautious)} if self.cautious else {}
        return {"keep": self.keep, "drop": self.drop, "distrusted": sorted(self.distrusted), **cautious}

    @property
    def neutral(self) -> frozenset[str]:
        """Kinds whose claims may not count for or against a caption where they abstain."""
        return frozenset(self.distrusted) | frozenset(self.cautious)


def confirmed(claim: Claim) -> float:
    """The verifier's probability of the answer that confirms the claim: P(yes), or P(no)."""
    return claim.p_yes if claim.expected == "yes" else 1.0 - claim.p_yes


def confidence(claim: Claim) -> float:
    """How likely the claim holds: by verifier and samples together, where :func:`weigh` could tell."""
    return confirmed(claim) if claim.p_true is None else claim.p_true


def weigh(
    claims: Sequence[Claim],
    samples: int,
    told_by: Mapping[str, tuple[float, float]],
    distrusted: Collection[str],
) -> list[Claim]:
    """All claims of a round with ``p_true``, except those of ``distrusted`` kinds; ``samples`` per image.

    Log odds = what P(yes) tells + the prior of the kind and the votes. What P(yes) tells (``told_by``, of
    :func:`tells`) is fitted on the planted claims of the kind (Platt 1999), "yes" and "no" weighing the same;
    where too few are known it is taken as it stands: calibrated on questions half of which are true. The
    prior is logistic in the log odds of the votes. No answer of the round is needed for it: expectation
    maximisation finds the one under which the verifier's own answers are most likely (Saerens, Latinne &
    Decaestecker 2002). Kinds with fewer than ``qa.ENOUGH`` claims share one prior, and fewer than that in all
    have none.
    """
    places: dict[str, list[int]] = {}
    for index, claim in enumerate(claims):
        if claim.kind not in distrusted:
            places.setdefault(claim.kind, []).append(index)
    rare = [kind for kind, own in places.items() if len(own) < qa.ENOUGH]
    together = [index for kind in rare for index in places.pop(kind)]
    weighed = [claim.model_copy(update={"p_true": None}) for claim in claims]
    for indices in [*places.values(), together]:
        for index, p in zip(
            indices, _probabilities([claims[i] for i in indices], samples, told_by), strict=True
        ):
            weighed[index] = claims[index].model_copy(update={"p_true": float(p)})
    return weighed


def _probabilities(
    claims: Sequence[Claim], samples: int, told_by: Mapping[str, tuple[float, float]]
) -> np.ndarray:
    """That each of these claims holds (N): one prior for all of them, what P(yes) tells by kind."""
    bias, slope = np.array([told_by.get(claim.kind, (0.0, 1.0)) for claim in claims]).reshape(-1, 2).T
    told = bias + slope * qa.log_odds([claim.p_yes for claim in claims])
    told = np.where([claim.expected == "yes" for claim in claims], told, -told)
    votes = qa.log_odds([(len(claim.candidates) + 0.5) / (samples + 1) for claim in claims])
    features = np.stack([np.ones(len(claims)), votes], axis=1)
    prior = np.zeros(2)
    for _ in range(100 if len(claims) >= qa.ENOUGH else 0):
        before, prior = prior, qa.logistic(features, expit(told + features @ prior))
        if np.abs(prior - before).max() < 1e-4:
            break
    return expit(told + features @ prior)


def tells(planted: Sequence[Planted]) -> dict[str, tuple[float, float]]:
    """What P(yes) tells about each kind of which enough planted claims are known.

    (bias, slope), in log odds of P(yes), of log P(answer | it holds) - log P(answer | it does not).
    """
    found: dict[str, tuple[float, float]] = {}
    for kind in sorted({row.kind for row in planted}):
        known = [row for row in planted if row.kind == kind]
        true = np.array([row.answer == "yes" for row in known], dtype=float)
        if len(known) >= qa.ENOUGH and 0 < true.sum() < len(known):
            weights = np.where(true == 1, 0.5 / true.mean(), 0.5 / (1 - true.mean()))
            features = np.stack([np.ones(len(known)), qa.log_odds([row.p_yes for row in known])], axis=1)
            bias, slope = qa.logistic(features, true, weights)
            found[kind] = float(bias), float(slope)
    return found


def verdict(probability: float, keep: float, drop: float) -> Decision:
    """keep from ``keep`` on, drop below ``drop``, abstain between. Raises ValueError outside 0..1."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"not a probability: {probability}")
    return "keep" if probability >= keep else "drop" if probability < drop else "abstain"


def judge(claims: Sequence[Claim], thresholds: Thresholds) -> list[Claim]:
    """The claims, of any images, with the verdicts that these thresholds give, and why.

    Of claims about one image that exclude each other the likeliest stays where it is kept, of equally likely
    ones that of most samples; the others are dropped.
    """
    judged = [claim.model_copy(update=_judged(claim, thresholds)) for claim in claims]
    places: dict[str, list[int]] = {}
    for index, claim in enumerate(judged):
        if claim.verdict != "drop" and claim.kind not in thresholds.distrusted:
            places.setdefault(claim.key, []).append(index)
    for own in places.values():
        kept: list[Claim] = []
        for index in sorted(own, key=lambda each: _rank(judged[each]), reverse=True):
            claim = judged[index]
            better = next((other for other in kept if exclude(claim, other)), None)
            if better:
                why = f"{confidence(claim):.3f}, and {better.text} has {confidence(better):.3f}"
                judged[index] = claim.model_copy(update={"verdict": "drop", "why": why})
            elif claim.verdict == "keep":
                kept.append(claim)
    return judged


def exclude(one: Claim, other: Claim) -> bool:
    """Whether two claims about one image cannot both hold.

    By their slots, where the language of the captions is known; else by the rules of
    :mod:`captioner.method.contradictions`, and then what one caption states together may be of two things.
    """
    if one.slot or other.slot:
        return one.slot == other.slot and normalise(one.text) != normalise(other.text)
    if not contradictions.conflict(one.text, other.text):
        return False
    together = set(one.candidates) & set(other.candidates)
    return not (together and contradictions.may_be_two(one.text, other.text))


def _rank(claim: Claim) -> tuple[float, int]:
    return confidence(claim), len(claim.candidates)


def _judged(claim: Claim, thresholds: Thresholds) -> dict[str, str]:
    probability, keep, drop = confidence(claim), thresholds.keep, thresholds.drop
    said = verdict(probability, keep, drop)
    if claim.kind in thresholds.distrusted:
        return {"verdict": "abstain", "why": thresholds.distrusted[claim.kind]}
    if said == "keep" and claim.kind in thresholds.cautious:
        return {"verdict": "abstain", "why": thresholds.cautious[claim.kind]}
    bounds = {"keep": f"at least {keep:.3f}", "drop": f"below {drop:.3f}", "abstain": "between"}
    asked = "" if claim.first_p_yes is None else ", asked again"
    return {"verdict": said, "why": f"{probability:.3f} is {bounds[said]}{asked}"}


# ---- the stage


def made_of(plan: Plan, config: Config, thresholds: Thresholds) -> tuple[rounds.Inputs, dict[str, Any]]:
    """Inputs and settings of the stage."""
    inputs: rounds.Inputs = {"claims": plan.home / "claims"}
    table = plan.home / "planted" / "accuracy.json"
    return inputs | {"planted": table}, {"samples": config.golden.samples, **thresholds.to_json()}


def fill(stage: Stage, plan: Plan, config: Config, thresholds: Thresholds) -> None:
    """Judge the whole ledger."""
    if stage.done:
        return
    ledger, output = Shards(plan.home / "claims", Claim), Shards(stage.dir, Verdict)
    shards = [ledger.read(index) for index in range(rounds.shard_count(ledger.dir))]
    claims = [claim for rows in shards for claim in rows]
    known = tells(Shards(plan.home / "planted", Planted).read_all())
    weighed = weigh(claims, config.golden.samples, known, thresholds.distrusted)
    judged = iter(judge(weighed, thresholds))
    for index, rows in enumerate(shards):
        made = [Verdict.of(next(judged)) for _ in rows]
        if not output.has(index):
            output.write(index, made)
    stage.finish(rounds.verdict_counts(read(plan.home)))


def read(home: Path) -> list[Claim]:
    """All claims of the round in ``home``, with their verdicts."""
    count = rounds.shard_count(home / "claims")
    return [claim for index in range(count) for claim in read_shard(home, index)]


def read_shard(home: Path, index: int) -> list[Claim]:
    """One shard of the ledger with its verdicts; runs of 0.1 have them in the ledger itself.

    Raises DataError where the verdicts are those of other claims.
    """
    claims, verdicts = Shards(home / "claims", Claim).read(index), Shards(home / "verdicts", Verdict)
    if not verdicts.has(index):
        return claims
    rows = verdicts.read(index)
    if [(row.key, row.text) for row in rows] != [(claim.key, claim.text) for claim in claims]:
        raise DataError(
            "verdicts and claims do not belong together",
            where=str(verdicts.path(index)),
            fix="captioner golden --rethreshold KEEP judges the claims anew",
        )
    return [row.join(claim) for claim, row in zip(claims, rows, strict=True)]
