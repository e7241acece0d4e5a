"""Metrics against their definitions: an oracle, injected errors, hand counts, intervals, the gate."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from captioner import scenes
from captioner.config import GateConfig
from captioner.errors import DataError
from captioner.judges import metrics
from captioner.judges.metrics import Counts

SCENES = [scenes.sample("test", i) for i in range(40)]


def counts(
    captions: list[str], *, ended: bool = True, tokens: int = 30, drop_facts: bool = False
) -> list[Counts]:
    return [
        metrics.count(
            str(i),
            caption,
            None if drop_facts else SCENES[i].to_json(),
            finish_reason="stop" if ended else "length",
            tokens=tokens,
        )
        for i, caption in enumerate(captions)
    ]


def false_statements(scene: scenes.Scene) -> list[str]:
    return [f"{name} background" for name in scenes.BACKGROUNDS if name != scene.background]


ORACLE = [scenes.shorthand(scene) for scene in SCENES]


def test_oracle_is_perfect() -> None:
    result = metrics.evaluate(counts(ORACLE), resamples=200)
    for name in ("precision", "recall", "f1", "parsed", "ended"):
        assert (result[name].value, result[name].low, result[name].high) == (1, 1, 1), name
    for name in ("hallucinated", "hallucinating_captions", "repeated"):
        assert (result[name].value, result[name].high) == (0, 0), name


@pytest.mark.parametrize("injected", [1, 2, 3])
def test_each_false_statement_lowers_precision_by_its_share(injected: int) -> None:
    captions = [
        ", ".join([text, *false_statements(s)[:injected]]) for text, s in zip(ORACLE, SCENES, strict=True)
    ]
    true = sum(len(scenes.statements(s)) for s in SCENES)
    result = metrics.evaluate(counts(captions), resamples=200)
    assert result["precision"].value == pytest.approx(true / (true + injected * len(SCENES)))
    assert result["hallucinated"].value == pytest.approx(1 - result["precision"].value)
    assert result["hallucinating_captions"].value == 1
    assert result["recall"].value == 1


def test_one_hallucinating_caption_of_forty() -> None:
    captions = [*ORACLE[:-1], f"{ORACLE[-1]}, {false_statements(SCENES[-1])[0]}"]
    assert metrics.evaluate(counts(captions), resamples=200)["hallucinating_captions"].value == pytest.approx(
        1 / 40
    )


def test_half_of_the_facts_is_recall_of_their_share() -> None:
    halves = [scenes.statements(s)[::2] for s in SCENES]
    result = metrics.evaluate(counts([", ".join(h) for h in halves]), resamples=200)
    wanted = sum(map(len, halves)) / sum(len(scenes.statements(s)) for s in SCENES)
    assert result["recall"].value == pytest.approx(wanted)
    assert result["precision"].value == 1
    assert result["f1"].value == pytest.approx(2 * wanted / (1 + wanted))


def test_repeated_statement_counts_once_and_unparsed_is_not_true() -> None:
    scene = SCENES[0]
    first = scenes.statements(scene)[0]
    row = counts([f"{first}, {first}, a mood of quiet"])[0]
    assert [row[c] for c in ("statements", "repeated", "unparsed", "true", "false")] == [3, 1, 1, 1, 0]
    result = metrics.evaluate([row], resamples=200)
    assert result["precision"].value == 1
    assert result["parsed"].value == 0.5
    assert result["repeated"].value == pytest.approx(1 / 3)


def test_prose_is_judged_with_its_own_parser() -> None:
    scene = SCENES[0]
    row = metrics.count(
        "0", scenes.prose(scene, 3), scene.to_json(), finish_reason="stop", tokens=9, prose=True
    )
    assert row["true"] > 0
    assert row["false"] == 0


def test_nothing_said_is_undefined_not_perfect() -> None:
    result = metrics.evaluate(counts([""] * 5), resamples=200)
    assert math.isnan(result["precision"].value)
    assert math.isnan(result["precision"].low)
    assert result["recall"].value == 0
    assert result["precision"].to_json() == {"value": None, "low": None, "high": None}


def test_no_facts_leaves_length_ended_repetition() -> None:
    result = metrics.evaluate(counts(["a cat, a cat", "a dog"], drop_facts=True, tokens=7), resamples=200)
    assert {name for name, x in result.items() if math.isnan(x.value)} == metrics.NEED_FACTS
    assert (result["tokens"].value, result["ended"].value) == (7, 1)
    assert result["repeated"].value == pytest.approx(1 / 3)


def spoiled(rng: np.random.Generator, share: float) -> list[str]:
    return [
        ", ".join([text, *(f for f in false_statements(s) if rng.random() < share)])
        for text, s in zip(ORACLE, SCENES, strict=True)
    ]


def test_weighted_resamples_equal_the_plain_loop() -> None:
    rows = counts(spoiled(np.random.default_rng(0), 0.4))
    weights = metrics.resample_weights(len(rows), 50, 3)
    assert (weights.sum(1) == len(rows)).all()
    at = {row.key: row for row in rows}
    order = sorted(at)
    draws = []
    for drawn in weights:
        bag = [at[key] for key, times in zip(order, drawn, strict=True) for _ in range(int(times))]
        true, false = sum(r["true"] for r in bag), sum(r["false"] for r in bag)
        draws.append(true / (true + false))
    got = metrics.evaluate(rows, resamples=50, seed=3)["precision"]
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))


def test_interval_is_seeded_and_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(60):
        rows = counts(spoiled(rng, 0.3))
        interval = metrics.evaluate(rows, resamples=300, seed=trial)["hallucinated"]
        assert interval == metrics.evaluate(rows, resamples=300, seed=trial)["hallucinated"]
        said = sum(len(scenes.statements(s)) for s in SCENES)
        truth = 0.9 * len(SCENES) / (said + 0.9 * len(SCENES))  # three chances of 0.3 per caption
        hits += interval.low <= truth <= interval.high
    assert hits >= 50  # 95 % of 60 is 57; a broken interval falls far short


def test_paired_difference_is_narrower_than_unpaired() -> None:
    base = spoiled(np.random.default_rng(2), 0.5)
    better = [c.rsplit(", ", 1)[0] if i < 4 else c for i, c in enumerate(base)]
    a, b = counts(base), counts(better)
    paired = metrics.difference(a, list(reversed(b)), resamples=500)["hallucinated"]
    alone = metrics.evaluate(a, resamples=500)["hallucinated"]
    assert paired.value < 0
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)
    same = metrics.difference(a, a, resamples=200)
    assert {(x.value, x.low, x.high) for x in same.values()} == {(0.0, 0.0, 0.0)}


def test_difference_refuses_other_images() -> None:
    with pytest.raises(DataError, match="different images"):
        metrics.difference(counts(ORACLE), counts(ORACLE[:-1]))


def test_runs_are_averaged_and_their_spread_widens_the_interval() -> None:
    rng = np.random.default_rng(4)
    before = [counts(ORACLE)] * 3
    after = [counts(spoiled(rng, share)) for share in (0.0, 0.3, 0.9)]
    pooled = metrics.difference_runs(before, after, resamples=400)["precision"]
    each = [metrics.difference(b, a, resamples=400)["precision"] for b, a in zip(before, after, strict=True)]
    assert pooled.value == pytest.approx(np.mean([x.value for x in each]))
    assert pooled.low < min(x.value for x in each[:2])
    assert pooled.high - pooled.low > max(x.high - x.low for x in each)


def test_breakdown_by_kind_and_size() -> None:
    captions = [", ".join(t for t in scenes.statements(s) if scenes.kind_of(t) != "mark") for s in SCENES]
    table = metrics.breakdown(counts(captions), resamples=200)
    assert table["recall by kind"]["mark"].value == 0
    assert table["recall by kind"]["color"].value == 1
    assert set(table["recall by size"]) == {"small", "large"}
    assert table["precision by kind"]["shape"].value == 1
    assert table["recall by rarity"]["held_out"].high < 1


def test_precision_by_size_by_hand() -> None:
    """Of what stands at the place: repeated statements count once, empty places and relations for nothing."""
    small = scenes.Thing("north", "circle", "red", "small", None)
    large = scenes.Thing("south", "star", "blue", "large", "dot")
    facts = scenes.Scene("gray", (small, large)).to_json()
    said = "gray background, north circle, north circle, north blue, north dot, south star, west ring, hm, "
    row = metrics.count("a", said + "circle above star, south large", facts, finish_reason="stop", tokens=9)
    assert row.groups["precision by size"] == {"small": (1, 3), "large": (2, 2)}
    told = "There is a small green circle in the north."
    prose = metrics.count("a", told, facts, finish_reason="stop", tokens=9, prose=True)
    assert prose.groups["precision by size"] == {"small": (2, 3)}


def test_gate_promotes_a_better_captioner() -> None:
    decision = metrics.gate(counts(spoiled(np.random.default_rng(5), 0.5)), counts(ORACLE), GateConfig())
    assert decision.promoted
    assert len(decision.reasons) == 7


@pytest.mark.parametrize(
    ("after", "ended", "reason"),
    [
        (spoiled(np.random.default_rng(6), 0.9), True, "hallucinated"),
        ([", ".join(scenes.statements(s)[:-2]) for s in SCENES], True, "recall"),
        (ORACLE, False, "ended"),
        ([""] * len(SCENES), True, "hallucinated"),  # says nothing: no hallucination, and no captioner either
        (ORACLE, True, "better in one"),  # nothing changed: no reason to replace it
        ([f"{c}, {c.split(', ')[0]}" for c in ORACLE], True, "repeated"),
    ],
)
def test_gate_refuses(after: list[str], ended: bool, reason: str) -> None:
    decision = metrics.gate(counts(ORACLE), counts(after, ended=ended), GateConfig())
    assert not decision.promoted
    assert any(line.startswith("REFUSED") and reason in line for line in decision.reasons)


def test_gate_rules_a_loss_out_where_the_images_are_enough() -> None:
    """The same small loss of recall: forty images cannot tell it from a large one, four hundred can."""
    rng = np.random.default_rng(7)
    before = spoiled(rng, 0.9)
    after = [", ".join(scenes.statements(s)[: -1 if i % 5 == 0 else None]) for i, s in enumerate(SCENES)]
    loss = metrics.difference(counts(before), counts(after), resamples=400)["recall"]
    assert -0.02 < loss.value < 0 and loss.low < -0.018
    config = GateConfig(max_recall_loss=0.018)
    few = metrics.gate(counts(before), counts(after), config)
    assert not few.promoted and "recall at equal length" in "".join(r for r in few.reasons if r[0] == "R")
    many = [
        [dataclasses.replace(r, key=f"{r.key}-{i}") for i in range(10) for r in counts(side)]
        for side in (before, after)
    ]
    assert metrics.gate(*many, config).promoted


def test_recall_at_equal_length_is_not_earned_by_talking() -> None:
    """As many true statements, one false one behind them left out: recall is equal, length is not."""
    assert metrics.evenly("a, b, c", "b; a") == ("a, b", "b, a")
    assert metrics.evenly("", "a") == ("", "")
    half = [", ".join(scenes.statements(s)[::2]) for s in SCENES]
    cut = [metrics.evenly(a, b) for a, b in zip(half, ORACLE, strict=True)]
    even = counts([a for a, _ in cut]), counts([b for _, b in cut])
    whole = metrics.difference(counts(half), counts(ORACLE), resamples=200)["recall"]
    equal = metrics.gate(counts(half), counts(ORACLE), GateConfig(), even=even).difference["even_recall"]
    assert whole.value > 0.3 and abs(equal.value) < 0.1


def test_gate_without_facts_refuses_and_on_the_users_word_watches_repetition() -> None:
    good = counts(["a cat, a dog"] * 10, drop_facts=True)
    refused = metrics.gate(good, good, GateConfig())
    assert (refused.promoted, refused.unjudged) == (False, True)
    assert any("10 of 10 images have no known facts" in reason for reason in refused.reasons)
    assert metrics.gate(good, good, GateConfig(), accept_unjudged=True).promoted
    loops = counts(["a cat, a cat, a cat"] * 10, drop_facts=True)
    assert not metrics.gate(good, loops, GateConfig(), accept_unjudged=True).promoted
    mixed = [*counts(ORACLE[:9]), *counts(ORACLE, drop_facts=True)[9:10]]
    assert not metrics.gate(mixed, mixed, GateConfig()).promoted


def test_completeness_wins_by_f1() -> None:
    """Twice as much said with the same share of false statements: nothing is less false, and it is better."""
    both = [(scenes.statements(s), false_statements(s)) for s in SCENES]
    half = [", ".join([*facts[::2], false[0]]) for facts, false in both]
    more = [", ".join([*facts, *false[:2]]) for facts, false in both]
    config = GateConfig(max_hallucinated_rise=0.05, max_length_ratio=3.0)
    decision = metrics.gate(counts(half), counts(more), config)
    assert decision.difference["f1"].low > 0 and decision.difference["hallucinated"].high > 0
    assert decision.promoted


def test_more_said_does_not_win_where_more_of_it_is_false() -> None:
    half = [", ".join(scenes.statements(s)[::2]) for s in SCENES]
    more = [", ".join([*scenes.statements(s), *false_statements(s)[:1]]) for s in SCENES]
    decision = metrics.gate(counts(half), counts(more), GateConfig())
    assert decision.difference["f1"].low > 0
    assert not decision.promoted
    assert any(line.startswith("REFUSED: hallucinated") for line in decision.reasons)
