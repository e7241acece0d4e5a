"""The golden caption of an image: the claims that stay, recomposed within a token budget. No model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from captioner.config import Config, GoldenConfig
from captioner.method import rounds, verdicts
from captioner.method.rounds import Plan
from captioner.method.verdicts import Thresholds, confidence
from captioner.pipeline.stages import Output
from captioner.records import Candidate, Claim, Failed, Golden
from captioner.runs import Run, Shards, Stage
from captioner.statements import comparable_statements, is_one_statement, normalise

CountTokens = Callable[[str], int]

NOTHING_KEPT = "no claim was kept"
OVER_BUDGET = "no kept claim fits the token budget"
UNVERIFIED = "the merged caption says something that was not asked"


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
    claims: Sequence[Claim],
    samples: int,
    config: GoldenConfig,
    count_tokens: CountTokens,
    neutral: Collection[str] = (),
) -> Golden | str:
    """The golden caption of one image, or the reason why there is none.

    ``claims`` are all judged claims of the image, in natural order; ``samples`` is the number of captions
    they were drawn from. The counts are of verdicts; an abstained claim is counted there whether it stays or
    not. The caption is read again as a reader splits it: it states the claims that stay and nothing else.
    Abstained claims of ``neutral`` kinds never stay; those that most samples state have their place in
    ``sft_text``, so that SFT unlearns no kind that nothing can judge.
    """
    whole = [claim for claim in claims if is_one_statement(claim.text)]
    silent = [claim for claim in whole if claim.verdict == "abstain" and claim.kind in neutral]
    staying = [each for each in whole if each not in silent and stays(each, samples, config.abstain)]
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
        **_with_silent(whole, inside, [each for each in silent if 2 * len(each.candidates) > samples]),
    )


def _with_silent(whole: Sequence[Claim], inside: Sequence[Claim], silent: Sequence[Claim]) -> dict[str, Any]:
    if not silent:
        return {}
    text = ", ".join(claim.text for claim in whole if claim in inside or claim in silent)
    return {"sft_text": text, "silent": [claim.text for claim in silent]}


# ---- the stage


def made_of(plan: Plan, config: Config, thresholds: Thresholds) -> tuple[rounds.Inputs, dict[str, Any]]:
    """Inputs and settings of the stage."""
    section = config.golden.model_dump(mode="json", include={"abstain", "max_tokens"}) | thresholds.to_json()
    inputs: rounds.Inputs = {"candidates": plan.home / "candidates", **rounds.judged(plan.home)}
    return inputs, section


def fill(stage: Stage, run: Run, plan: Plan, config: Config, images: int, thresholds: Thresholds) -> None:
    """The golden captions of all images; ``images`` is how many the round began with."""
    if stage.done:
        return
    settings, home = config.golden, plan.home
    output = Output(stage.dir, Golden)
    candidates = Shards(home / "candidates", Candidate)
    missing = [index for index in range(rounds.shard_count(home / "claims")) if not output.rows.has(index)]
    count_tokens = _token_counter(plan.captioner) if missing else len
    for index in missing:
        samples = Counter(row.key for row in candidates.read(index))
        made: list[list[Golden] | Failed] = []
        for key, claims in rounds.by_key(verdicts.read_shard(home, index)).items():
            one = build(claims, samples[key], settings, count_tokens, thresholds.neutral)
            made.append(
                [one] if isinstance(one, Golden) else Failed(sample=claims[0].sample, key=key, reason=one)
            )
        output.write(index, made)
    captions = output.rows.read_all()
    counts = {"images": images, "golden": len(captions), **rounds.verdict_counts(verdicts.read(home))}
    rounds.finish(stage, run, counts, images)


def _token_counter(checkpoint: Path) -> Callable[[str], int]:
    """Tokens of a caption, the end token included. Reads the tokenizer's files only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids) + 1
