"""Statements that exclude each other, and the many more that do not; measured on captions of photographs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.method import verdicts
from captioner.method.contradictions import conflict, may_be_two
from captioner.records import Claim
from tests import photographs

EXCLUDE = [
    ("a red cup", "blue cup"),
    ("red coffee cup", "a coffee cup that is green"),
    ("red cup", "blue cup on a table"),
    ("wooden chair", "metal chair"),
    ("round table", "square table"),
    ("man standing", "sitting man"),
    ("man sitting on a bench", "man standing on a bench"),
    ("a closed door", "open door"),
    ("two cats", "three cats"),
    ("two cats", "three black cats"),
    ("cup on the left", "cup on the right"),
    ("a cat with green eyes", "cat with blue eyes"),
    ("cup left of the bowl", "bowl left of the cup"),
    ("cup left of the bowl", "cup right of the bowl"),
    ("lamp above the bed", "lamp below the bed"),
    ("indoors", "outdoors"),
    ("black and white photograph", "color photograph"),
    ("night", "daytime"),
    ('sign reading "STOP"', 'sign reading "EXIT"'),
    ("no people", "people on a bench"),
    ("no dog", "a black dog"),
]
AGREE = [
    ("a red cup", "Red cup"),
    ("a red cup", "small cup"),
    ("red cup", "red and white cup"),
    ("red cup", "orange cup"),
    ("blue cup", "dark blue cup"),
    ("red cup", "blue bowl"),
    ("white dog", "dog with a red collar"),
    ("man in a red shirt", "man in blue jeans"),
    ("red cup on a table", "blue cup on a shelf"),
    ("red cup on the left", "blue cup on the right"),
    ("two cats", "two black cats"),
    ("three cats", "two black cats"),
    ("two cats", "a cat"),
    ("orange galaxies", "blue galaxies"),
    ("two cats", "three dogs"),
    ("cat on a table", "table"),
    ("man eating", "man drinking"),
    ("a park", "a street"),
    ('sign reading "STOP"', 'sign reading "STOP HERE"'),
    ('red sign reading "STOP"', 'blue sign reading "EXIT"'),
    ("no red cup", "a blue cup"),
    ("no people", "a dog"),
    ("", "red"),
]


@pytest.mark.parametrize(("one", "other"), EXCLUDE)
def test_what_excludes(one: str, other: str) -> None:
    assert conflict(one, other) and conflict(other, one)


@pytest.mark.parametrize(("one", "other"), AGREE)
def test_what_may_both_hold(one: str, other: str) -> None:
    assert not conflict(one, other) and not conflict(other, one)


def test_what_two_things_may_have() -> None:
    assert may_be_two("a red cup", "a blue cup") and may_be_two("cup on the left", "cup on the right")
    assert not may_be_two("two cats", "three cats") and not may_be_two("indoors", "outdoors")


def test_true_statements_about_photographs_never_exclude_each_other() -> None:
    """Of 18 hand-written fact lists, every two statements about one photograph."""
    known = photographs.read().values()
    pairs = [pair for about in known for pair in itertools.combinations(about["facts"], 2)]
    assert len(pairs) > 350
    assert [pair for pair in pairs if conflict(*pair)] == []


def test_falsehoods_that_contradict_a_fact_are_found() -> None:
    """Of 108 hand-written falsehoods about the photographs 31, and every one by reading contradicts its fact.

    Not found are things that are not there (a dog), words that the lists lack (a galloping horse) and colors
    too near to each other (yellow paper, white paper).
    """
    found = [
        (key, false)
        for key, about in photographs.read().items()
        for false in about["false"]
        if any(conflict(false, fact) for fact in about["facts"])
    ]
    assert len(found) >= 31
    assert {("coffee", "blue saucer"), ("chelsea", "blue eyes"), ("coins", "three rows of coins")} <= set(
        found
    )
    assert {("coffee", "spoon to the left of the cup"), ("rocket", "daylight sky")} <= set(found)


WORDS = (
    "a",
    "red",
    "blue",
    "two",
    "three",
    "cats",
    "cup",
    "no",
    "on the left",
    "left of",
    "'x'",
    "indoors",
    "and",
)


@given(*[st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join) | st.text(max_size=30)] * 2)
def test_any_texts(one: str, other: str) -> None:
    assert conflict(one, other) == conflict(other, one)
    assert not conflict(one, one)


def claim(text: str, p: float, candidates: tuple[int, ...]) -> Claim:
    return Claim(
        sample="s", key="i", text=text, kind="color", candidates=list(candidates), question="",
        expected="yes", p_yes=p, label_mass=1.0, verifier="v", view="all",
    )  # fmt: skip


def test_the_likeliest_of_contradicting_claims_stays() -> None:
    said = [
        claim("red cup", 0.8, (0, 1)),
        claim("blue cup", 0.9, (2,)),
        claim("green cup", 0.5, (3,)),  # undecided, and it contradicts one that is kept
        claim("yellow bowl", 0.8, (0, 1)),
        claim("purple bowl", 0.9, (1,)),  # a caption that states both sees two bowls
        claim("two dogs", 0.7, (0,)),
        claim("three dogs", 0.8, (0,)),  # but no two numbers
    ]
    judged = verdicts.judge(said, verdicts.Thresholds(0.6, 0.4))
    assert [each.verdict for each in judged] == ["drop", "keep", "drop", "keep", "keep", "drop", "keep"]
    assert judged[0].why == "0.800, and blue cup has 0.900"
