"""Preference pairs of a round: the golden caption against the captioner's own samples. Pure, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from captioner.config import Config, PairsConfig
from captioner.errors import Refused
from captioner.method import rounds, verdicts
from captioner.method.rounds import Plan
from captioner.records import Candidate, Claim, Golden, Pair
from captioner.runs import Shards, Stage
from captioner.statements import comparable_statements, normalise, without

NO_GOLDEN = "no golden caption"
ALL_EQUAL = "every sample equals the golden caption"
TOO_FEW_REFUTED = "too few refuted claims"


def build(
    golden: Golden | None,
    candidates: Sequence[Candidate],
    claims: Sequence[Claim],
    config: PairsConfig,
    neutral: Collection[str] = (),
) -> list[Pair]:
    """Pairs of one image: samples that ended by themselves first, then those with most refuted claims.

    ``claims`` are the image's judged claims; refuted are those with the verdict "drop". A sample that says
    what the golden caption or an earlier rejected one says, statement by statement, is passed over. Abstained
    claims of ``neutral`` kinds, which no golden caption has, leave the rejected caption: otherwise preferring
    one to the other would unlearn the kind.
    """
    if golden is None:
        return []
    refuted = {each.k: _refuted(each, claims) for each in candidates}
    silent = {normalise(each.text) for each in claims if each.verdict == "abstain" and each.kind in neutral}
    seen = {_said(golden.text)}
    pairs: list[Pair] = []
    for each in sorted(candidates, key=lambda c: (c.finish_reason != "stop", -refuted[c.k], c.k)):
        text = without(each.text, silent.__contains__)
        said = _said(text)
        nothing_left = each.text and not said
        enough = len(pairs) == config.rejected_per_image
        if enough or nothing_left or refuted[each.k] < config.min_refuted or said in seen:
            continue
        seen.add(said)
        pairs.append(
            Pair(
                sample=golden.sample,
                key=golden.key,
                chosen=golden.text,
                rejected=text,
                k=each.k,
                refuted_in_rejected=refuted[each.k],
                ended=each.finish_reason == "stop",
            )
        )
    return pairs


def why_none(golden: Golden | None, candidates: Sequence[Candidate]) -> str:
    """Why :func:`build` found no pair for an image."""
    if golden is None:
        return NO_GOLDEN
    said = _said(golden.text)
    return ALL_EQUAL if all(_said(each.text) == said for each in candidates) else TOO_FEW_REFUTED


def lint(
    pairs: Sequence[Pair],
    token_ids: Callable[[str], Sequence[int]],
    held_out: Mapping[str, str],
    config: PairsConfig,
) -> tuple[list[Pair], dict[str, float]]:
    """The pairs worth training on, and what was seen: counts of what was dropped by reason, and mean sizes.

    Dropped are repeated pairs, captions that say the same or nearly so, those with more than ``max_tokens``
    tokens, rejected samples that never ended (an end token behind them would be ours, not theirs) and those
    with too few refuted claims. ``held_out`` maps the sha256 of evaluation images to their names,
    ``token_ids`` gives a caption's ids without the end token. Raises Refused for a pair of a held-out image,
    too many dropped pairs, and sides of too different length.
    """
    _refuse_leaks(pairs, held_out)
    dropped = dict.fromkeys(("repeated", "identical", "too long", "unended", "too few refuted"), 0)
    kept: list[Pair] = []
    sizes: list[tuple[int, int]] = []
    seen: set[tuple[object, ...]] = set()
    for pair in pairs:
        said = pair.sample, _said(pair.chosen), _said(pair.rejected)
        ids = token_ids(pair.chosen), token_ids(pair.rejected)
        lengths = len(ids[0]) + 1, len(ids[1]) + 1
        # a bound on the ratio, cheap: most pairs need no comparison
        close = 2 * min(map(len, ids)) / max(sum(map(len, ids)), 1) > config.max_similarity
        if said in seen:
            dropped["repeated"] += 1
        elif said[1] == said[2] or (close and _similarity(*ids) > config.max_similarity):
            dropped["identical"] += 1
        elif max(lengths) > config.max_tokens:
            dropped["too long"] += 1
        elif not pair.ended:
            dropped["unended"] += 1
        elif pair.refuted_in_rejected < config.min_refuted:
            dropped["too few refuted"] += 1
        else:
            kept.append(pair)
            sizes.append(lengths)
        seen.add(said)
    listed = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    if not kept or sum(dropped.values()) > config.max_dropped * len(pairs):
        raise Refused(
            f"the linter drops {len(pairs) - len(kept)} of {len(pairs)} pairs ({listed}); it may drop "
            f"{config.max_dropped:.0%}",
            fix="look at the samples and claims of the round; pairs.max_dropped raises the limit",
        )
    chosen, rejected = (fmean(side) for side in zip(*sizes, strict=True))
    if max(chosen / rejected, rejected / chosen) > config.max_length_ratio:
        raise Refused(
            f"chosen captions have {chosen:.0f} tokens on average, rejected ones {rejected:.0f}: length "
            f"alone would tell them apart; the limit is a factor of {config.max_length_ratio}",
            fix="another golden.keep or golden.abstain; pairs.max_length_ratio raises the limit",
        )
    means = {"chosen tokens": chosen, "rejected tokens": rejected}
    refuted = {"refuted in rejected": fmean(pair.refuted_in_rejected for pair in kept)}
    return kept, {"kept": len(kept), **dropped, **means, **refuted}


def _refuse_leaks(pairs: Sequence[Pair], held_out: Mapping[str, str]) -> None:
    leaked = sorted({f"{pair.key} = {held_out[pair.sample]}" for pair in pairs if pair.sample in held_out})
    if leaked:
        raise Refused(
            f"{len(leaked)} images of the pairs are evaluation images",
            where=", ".join(leaked[:3]),
            fix="take other golden.images, or another gate.data or evaluate.data",
        )


def _similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the tokens of both that stand in the other, in order, 0..1."""
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _refuted(candidate: Candidate, claims: Sequence[Claim]) -> int:
    return sum(claim.verdict == "drop" and candidate.k in claim.candidates for claim in claims)


def _said(caption: str) -> tuple[str, ...]:
    return tuple(comparable_statements(caption))


# ---- the stage


def made_of(plan: Plan, config: Config) -> tuple[rounds.Inputs, dict[str, Any]]:
    """Inputs and settings of the stage."""
    judged, home = rounds.judged(plan.home), plan.home
    inputs: rounds.Inputs = {"candidates": home / "candidates", **judged, "golden": home / "golden"}
    return inputs, config.pairs.model_dump(mode="json")


def fill(
    stage: Stage, plan: Plan, config: Config, images: int, neutral: Collection[str] = ()
) -> dict[str, int]:
    """The pairs of all images; returns the counts of the round up to here."""
    home = plan.home
    candidates, captions = Shards(home / "candidates", Candidate), Shards(home / "golden", Golden)
    output = Shards(stage.dir, Pair)
    reasons: Counter[str] = Counter()
    for index in range(rounds.shard_count(home / "claims")):
        golden_of = {row.key: row for row in captions.read(index)}
        claims_of = rounds.by_key(verdicts.read_shard(home, index))
        rows: list[Pair] = []
        for key, sampled in rounds.by_key(candidates.read(index)).items():
            made = build(golden_of.get(key), sampled, claims_of.get(key, []), config.pairs, neutral)
            if not made:
                reasons[why_none(golden_of.get(key), sampled)] += 1
            rows += made
        if not output.has(index):
            output.write(index, rows)
    claims = verdicts.read(home)
    counts = {
        "images": images,
        "candidates": len(candidates.read_all()),
        "claims": len(claims),
        **rounds.verdict_counts(claims),
        "pairs": len(output.read_all()),
        "failed": sum(rounds.failures(home / name).total() for name in rounds.STAGES[:-1]),
    }
    if not stage.done:
        stage.finish(counts, without_pair=dict(reasons))
    return counts
