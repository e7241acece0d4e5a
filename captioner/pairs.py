"""Preference pairs of a round: the golden caption against the captioner's own samples. Pure, no model."""

from __future__ import annotations

from collections.abc import Sequence

from captioner.config import PairsConfig
from captioner.records import Candidate, Claim, Golden, Pair
from captioner.tool import normalise, split_statements

NO_GOLDEN = "no golden caption"
ALL_EQUAL = "every sample equals the golden caption"
TOO_FEW_REFUTED = "too few refuted claims"


def build(
    golden: Golden | None, candidates: Sequence[Candidate], claims: Sequence[Claim], config: PairsConfig
) -> list[Pair]:
    """Pairs of one image: samples that ended by themselves first, then those with most refuted claims.

    ``claims`` are the image's judged claims; refuted are those with the verdict "drop". A sample that says
    what the golden caption or an earlier rejected one says, statement by statement, is passed over.
    """
    if golden is None:
        return []
    refuted = {each.k: _refuted(each, claims) for each in candidates}
    seen = {_said(golden.text)}
    pairs: list[Pair] = []
    for each in sorted(candidates, key=lambda c: (c.finish_reason != "stop", -refuted[c.k], c.k)):
        said = _said(each.text)
        if len(pairs) == config.rejected_per_image or refuted[each.k] < config.min_refuted or said in seen:
            continue
        seen.add(said)
        pairs.append(
            Pair(
                sample=golden.sample,
                key=golden.key,
                chosen=golden.text,
                rejected=each.text,
                k=each.k,
                refuted_in_rejected=refuted[each.k],
            )
        )
    return pairs


def why_none(golden: Golden | None, candidates: Sequence[Candidate]) -> str:
    """Why :func:`build` found no pair for an image."""
    if golden is None:
        return NO_GOLDEN
    said = _said(golden.text)
    return ALL_EQUAL if all(_said(each.text) == said for each in candidates) else TOO_FEW_REFUTED


def _refuted(candidate: Candidate, claims: Sequence[Claim]) -> int:
    return sum(claim.verdict == "drop" and candidate.k in claim.candidates for claim in claims)


def _said(caption: str) -> tuple[str, ...]:
    return tuple(normalise(statement) for statement in split_statements(caption))
