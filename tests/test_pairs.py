"""Pairs: which samples are rejected, and why an image has none."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioner.config import PairsConfig
from captioner.errors import Refused
from captioner.method import pairs
from captioner.records import Candidate, Claim, Golden, Pair


def candidate(k: int, text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(
        sample="s", key="i", k=k, text=text, finish_reason=finish_reason, mean_logprob=-1.0, tokens=9, seed=k
    )


def claim(text: str, candidates: list[int], verdict: str) -> Claim:
    return Claim(
        sample="s", key="i", text=text, kind="", candidates=candidates, question=f"{text}?", expected="yes",
        p_yes=0.5, label_mass=1.0, verdict=verdict, verifier="v", view="all",
    )  # fmt: skip


def golden(text: str) -> Golden:
    return Golden(sample="s", key="i", text=text, kept=1, dropped=1, abstained=0, tokens=5)


CLAIMS = [
    claim("red cup", [0, 1, 2, 3], "keep"),
    claim("dog", [1, 3], "drop"),
    claim("cat", [1], "drop"),
    claim("tree", [2], "abstain"),
]
CANDIDATES = [
    candidate(0, "red cup"),
    candidate(1, "red cup, dog, cat"),
    candidate(2, "red cup, tree"),
    candidate(3, "red cup, dog"),
]


@pytest.mark.parametrize(
    ("per_image", "min_refuted", "expected"),
    [
        (1, 1, [(1, 2)]),
        (2, 1, [(1, 2), (3, 1)]),
        (9, 1, [(1, 2), (3, 1)]),
        (9, 2, [(1, 2)]),
        (9, 3, []),
        (9, 0, [(1, 2), (3, 1), (2, 0)]),  # sample 0 is the golden caption itself
    ],
)
def test_most_refuted_first(per_image: int, min_refuted: int, expected: list[tuple[int, int]]) -> None:
    config = PairsConfig(rejected_per_image=per_image, min_refuted=min_refuted)
    made = pairs.build(golden("Red cup."), CANDIDATES, CLAIMS, config)
    assert [(pair.k, pair.refuted_in_rejected) for pair in made] == expected
    assert all(pair.chosen == "Red cup." and pair.rejected == CANDIDATES[pair.k].text for pair in made)
    assert all(pair.ref_chosen_logp is None and pair.ref_rejected_logp is None for pair in made)


def test_ended_samples_come_before_cut_ones() -> None:
    candidates = [candidate(1, "red cup, dog, cat", "length"), candidate(3, "red cup, dog")]
    made = pairs.build(golden("red cup"), candidates, CLAIMS, PairsConfig())
    assert [pair.k for pair in made] == [3, 1]


def test_the_same_caption_is_rejected_once() -> None:
    candidates = [candidate(1, "red cup, dog"), candidate(3, "Red cup,  the dog.")]
    assert [pair.k for pair in pairs.build(golden("red cup"), candidates, CLAIMS, PairsConfig())] == [1]


def test_why_none() -> None:
    config = PairsConfig()
    assert pairs.build(None, CANDIDATES, CLAIMS, config) == []
    assert pairs.why_none(None, CANDIDATES) == pairs.NO_GOLDEN
    same = [candidate(0, "red cup"), candidate(1, "Red cup")]
    assert pairs.build(golden("red cup"), same, CLAIMS[:1], config) == []
    assert pairs.why_none(golden("red cup"), same) == pairs.ALL_EQUAL
    assert pairs.build(golden("red cup"), CANDIDATES[:1] + CANDIDATES[2:3], CLAIMS, config) == []
    assert pairs.why_none(golden("red cup"), CANDIDATES[2:3]) == pairs.TOO_FEW_REFUTED


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(
    st.lists(st.lists(st.sampled_from(["red cup", "dog", "cat", "tree"]), max_size=4), max_size=6),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_never_the_golden_never_twice(said: list[list[str]], per_image: int, min_refuted: int) -> None:
    candidates = [candidate(k, ", ".join(statements)) for k, statements in enumerate(said)]
    claims = [
        claim(text, [k for k, statements in enumerate(said) if text in statements], verdict)
        for text, verdict in (("red cup", "keep"), ("dog", "drop"), ("cat", "drop"), ("tree", "keep"))
    ]
    config = PairsConfig(rejected_per_image=per_image, min_refuted=min_refuted)
    made = pairs.build(golden("red cup, tree"), candidates, claims, config)
    texts = [pair.rejected for pair in made]
    assert len(made) <= per_image
    assert "red cup, tree" not in texts
    assert len(set(texts)) == len(texts)
    counts = [pair.refuted_in_rejected for pair in made]
    assert counts == sorted(counts, reverse=True)
    assert all(count >= min_refuted for count in counts)
    assert counts == [len({"dog", "cat"} & set(said[pair.k])) for pair in made]


LONG = " ".join("abcdefghijklmnop")


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


def many(count: int = 20) -> list[Pair]:
    claims = [claim("red cup", [0], "keep"), claim("dog", [0], "drop")]
    made = []
    for i in range(count):
        [pair] = pairs.build(golden("red cup"), [candidate(0, f"red cup, dog, {i}")], claims, PairsConfig())
        made.append(pair.model_copy(update={"sample": f"s{i}", "key": f"i{i}"}))
    return made


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sample": "s1", "key": "elsewhere", "rejected": "Red  cup, the dog, 1"}, "repeated"),
        ({"rejected": "Red cup."}, "identical"),
        ({"chosen": f"red cup, {LONG} q", "rejected": f"red cup, {LONG} r"}, "identical"),
        ({"rejected": "red cup, " + "x" * 300}, "too long"),
        ({"chosen": "x" * 256}, "too long"),  # 257 with the end token
        ({"ended": False}, "unended"),
        ({"refuted_in_rejected": 0}, "too few refuted"),
    ],
)  # fmt: skip
def test_lint_drops_and_counts(change: dict[str, object], reason: str) -> None:
    rows = many()
    bad = rows[0].model_copy(update={"sample": "new", **change})
    config = PairsConfig(max_similarity=0.97, max_length_ratio=9)
    kept, seen = pairs.lint([*rows, bad], ids, {}, config)
    assert kept == rows
    assert seen[reason] == 1 and seen["kept"] == 20
    assert (
        sum(seen[name] for name in ("repeated", "identical", "too long", "unended", "too few refuted")) == 1
    )
    assert seen["chosen tokens"] == 8  # characters, and the end token


def test_lint_fails_past_its_limits() -> None:
    rows = many()
    with pytest.raises(Refused, match="3 images of the pairs are evaluation images") as leak:
        pairs.lint(rows, ids, {f"s{i}": f"val/{i}" for i in (3, 4, 5)}, PairsConfig(max_length_ratio=9))
    assert "i3 = val/3" in leak.value.where
    assert leak.value.exit_code == 3
    with pytest.raises(Refused, match=r"drops 5 of 25 pairs \(5 repeated\)"):
        pairs.lint([*rows, *rows[:5]], ids, {}, PairsConfig(max_dropped=0.19, max_length_ratio=9))
    with pytest.raises(Refused, match="chosen captions have 8 tokens on average, rejected ones 16"):
        pairs.lint(rows, ids, {}, PairsConfig(max_length_ratio=1.9))
