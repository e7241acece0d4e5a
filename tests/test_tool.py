"""The rules: splitting, near-duplicates, natural order, questions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.lab import grid as scenes
from captioner.method.tool import Rules
from captioner.statements import normalise

PLAIN = st.from_regex(r"[a-z]{2,8}( [a-z]{2,8}){0,2}", fullmatch=True)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a red cup", "red cup", True),
        ("The Red  cup.", "red cup", True),
        ("cup on the table", "cup on a table", True),
        ("light-blue wall", "light blue wall", True),
        ("two cats", "a cat", False),
        ("two cats", "cats", False),
        ("cats", "cat", False),
        ("no people", "people", False),
        ("cup left of bowl", "bowl left of cup", False),
        ("letter A", "letter", False),
        ("vitamin A bottle", "vitamin bottle", False),
        ('sign "the end"', 'sign "end"', False),
        ("1.5 litres", "15 litres", False),
    ],
)
def test_near_duplicates(first: str, second: str, same: bool) -> None:
    assert (normalise(first) == normalise(second)) is same
    assert len(Rules().merge([first, second])) == (1 if same else 2)


def test_merge_tells_who_stated_it_and_keeps_the_usual_wording() -> None:
    merged = Rules().merge(["a red cup, tree", "Red cup, red cup", "", "Red cup, tree, dog"])
    assert [(each.text, each.candidates) for each in merged] == [
        ("Red cup", (0, 1, 3)),
        ("tree", (0, 3)),
        ("dog", (3,)),
    ]


def test_merge_keeps_what_belongs_together_together() -> None:
    """One caption says where "south large" goes, wrongly; the words it shares outweigh that."""
    samples = [
        "north circle, north red, south star, south blue",
        "north circle, north red, south star, south blue",
        "south large, north circle",
    ]
    merged = [each.text for each in Rules().merge(samples)]
    assert [text.split()[0] for text in merged] == ["north"] * 2 + ["south"] * 3


def test_merge_follows_the_order_of_most_captions() -> None:
    samples = ["dog, tree, red cup", "dog, tree, red cup", "red cup, tree, dog"]
    assert [each.text for each in Rules().merge(samples)] == ["dog", "tree", "red cup"]
    assert [each.text for each in Rules().merge(samples[2:])] == ["red cup", "tree", "dog"]


@given(st.lists(st.lists(PLAIN, max_size=8), max_size=5))
def test_merge_is_the_union_once(captions: list[list[str]]) -> None:
    merged = Rules().merge([", ".join(statements) for statements in captions])
    keys = [normalise(each.text) for each in merged]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {normalise(text) for statements in captions for text in statements}
    for each, key in zip(merged, keys, strict=True):
        assert each.candidates == tuple(
            k for k, statements in enumerate(captions) if key in map(normalise, statements)
        )


@given(st.lists(PLAIN, unique_by=normalise), st.integers(0, 1000))
def test_merge_recovers_the_order_of_partial_captions(statements: list[str], seed: int) -> None:
    """Captions that leave out parts of one full caption do not disturb its order."""
    rng = random.Random(seed)
    partial = [[text for text in statements if rng.random() < 0.6] for _ in range(3)]
    merged = Rules().merge([", ".join(each) for each in [*partial, statements]])
    assert [each.text for each in merged] == statements


def test_decompose_asks_one_atomic_question() -> None:
    question = Rules().decompose("no {people} here")
    assert question.text == "Visible: no {people} here?"
    assert question.expected == "yes"


@pytest.mark.parametrize(
    ("statement", "checkable"),
    [
        ("red cup", True),
        ("beautiful garden", False),
        ("taken in 2019", False),
        ("photo by Jane", False),
        ("peaceful mood", False),
        ("seems old", False),
        ('sign reading "beautiful mood"', True),
        ("person photographing a bird", True),
        ("seam in cloth", True),
    ],
)
def test_checkable(statement: str, checkable: bool) -> None:
    assert Rules().checkable(statement) is checkable


def test_every_fact_of_the_scenes_is_checkable_and_stays_apart() -> None:
    scene = scenes.sample("round", 3)
    merged = Rules(scenes.kind_of).merge([scenes.shorthand(scene)])
    assert [each.text for each in merged] == scenes.statements(scene)
    assert all(Rules(scenes.kind_of).checkable(each.text) for each in merged)


@pytest.mark.parametrize("statement", ["west cyan west brown", "star left of", "northwest", "circle", ""])
def test_what_is_no_statement_of_a_known_language_cannot_be_checked(statement: str) -> None:
    assert not Rules(scenes.kind_of).checkable(statement)


@pytest.mark.parametrize(
    ("statement", "guessed", "exact"),
    [
        ("gray background", "color", "background"),
        ("circle above star", "relation", "relation"),
        ("north red", "color", "color"),
        ("north large", "size", "size"),
        ("north star", "object", "shape"),
        ("north dot", "object", "mark"),
        ("redwood trunk", "object", ""),
        ("red north red", "color", ""),
    ],
)
def test_kind(statement: str, guessed: str, exact: str) -> None:
    assert Rules().kind(statement) == guessed
    assert Rules(scenes.kind_of).kind(statement) == exact


def test_statements_that_exclude_each_other_share_a_place() -> None:
    """The star is said once, behind its colour; where shapes stand is what the other captions tell."""
    captions = [
        "north circle, north red, south plus",
        "north ring, north red",
        "north red, south plus, north star",
    ]
    merged = [each.text for each in Rules(scenes.kind_of, scenes.slot_of).merge(captions)]
    assert merged == ["north circle", "north ring", "north star", "north red", "south plus"]
    assert [each.text for each in Rules().merge(captions)] != merged
