"""Metrics against their definitions: an oracle, injected errors, hand counts, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from captioner.errors import DataError
from captioner.judges import facts, metrics
from captioner.judges.metrics import Counts
from captioner.lab import grid as scenes

SCENES = [scenes.sample("test", i) for i in range(40)]


def counts(
    captions: list[str], *, ended: bool = True, tokens: int = 30, drop_facts: bool = False
) -> list[Counts]:
    return [
        metrics.count(
            str(i),
            caption,
            None if drop_facts else facts.read(SCENES[i].to_json()),
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
    known = facts.read(scene.to_json())
    row = metrics.count("0", scenes.prose(scene, 3), known, finish_reason="stop", tokens=9, prose=True)
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
    known = facts.read(scenes.Scene("gray", (small, large)).to_json())
    said = "gray background, north circle, north circle, north blue, north dot, south star, west ring, hm, "
    row = metrics.count("a", said + "circle above star, south large", known, finish_reason="stop", tokens=9)
    assert row.groups["precision by size"] == {"small": (1, 3), "large": (2, 2)}
    told = "There is a small green circle in the north."
    prose = metrics.count("a", told, known, finish_reason="stop", tokens=9, prose=True)
    assert prose.groups["precision by size"] == {"small": (2, 3)}


def test_intervals_are_those_of_scipy() -> None:
    """Paired percentile intervals, by scipy.stats.bootstrap over the same images."""
    rng = np.random.default_rng(8)
    before, after = counts(spoiled(rng, 0.6)), counts(spoiled(rng, 0.3))
    shares = np.array([[(r["false"], r["true"]) for r in rows] for rows in (before, after)])  # [2, N, 2]

    def change(index: np.ndarray, axis: int = -1) -> np.ndarray:
        false, true = shares[:, index].sum(-2).transpose(2, 0, 1)
        wrong = false / (false + true)
        return wrong[1] - wrong[0]

    images = (np.arange(len(before)),)
    theirs = bootstrap(images, change, n_resamples=20_000, method="percentile", vectorized=True, rng=0)
    ours = metrics.difference(before, after, resamples=20_000)["hallucinated"]
    low, high = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.002)
