"""Kinds of statements about photographs, and what would make a statement false."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioner.method.kinds import KINDS, all_objects, kind_of, objects, swapped_words, swaps

OF_KIND = {
    "text": [
        'a sign reading "STOP"',
        "the letter B on a block",
        "“CAFÉ” on the window",
        "a label that says sale",
    ],
    "style": ["a black-and-white photograph", "soft natural light", "blurry background", "seen from above"],
    "count": ["three cups", "a pair of shoes", "several people", "2 cats", "two dogs on a couch"],
    "relation": [
        "a cat under a table",
        "a tree on the left",
        "camera on a tripod",
        "trees in the background",
    ],
    "action": ["a man riding a horse", "a closed door", "a woman smiling", "man sitting on a bench"],
    "color": ["a red mug", "man in a red shirt", "the sky is blue", "gold fish"],
    "material": ["a wooden chair", "a striped shirt", "glass of milk"],
    "size": ["a tall tower", "a round table", "large window"],
    "scene": ["a kitchen", "outdoors at night", "snowy"],
    "object": ["a dog", "a two-story house", "the building", "woman with sunglasses", "", "猫"],
}


@pytest.mark.parametrize(
    ("kind", "statement"), [(kind, text) for kind, texts in OF_KIND.items() for text in texts]
)
def test_the_kind_of_a_statement(kind: str, statement: str) -> None:
    assert kind_of(statement) == kind


@pytest.mark.parametrize(
    ("statement", "kind", "has", "has_not"),
    [
        ("a red mug", None, "a blue mug", "an orange mug"),  # red and orange are too near
        ("a Red apple", "object", "a Red banana", "a Red apple"),
        ("an orange cat", None, "a green cat", "an red cat"),
        ("three cups", None, "four cups", "one cups"),
        ("two knives", "object", "two forks", "two fork"),
        ("dogs", "object", "cats", "cat"),
        ("the cup is left of the plate", None, "the cup is right of the plate", "the cup"),
        ("a cat on a mat", None, "a cat under a mat", "a cat on top of a mat"),
        ('a sign reading "EXIT 25"', None, 'a sign reading "EXIT 58"', 'a sign reading "EXIT 25"'),
        ('a red sign reading "red"', "color", 'a blue sign reading "red"', 'a red sign reading "blue"'),
        ("outdoors", None, "indoors", "outside"),
    ],
)  # fmt: skip
def test_swaps_exclude_the_statement(statement: str, kind: str | None, has: str, has_not: str) -> None:
    made = swaps(statement, kind)
    assert has in made and has_not not in made


def test_text_is_swapped_for_text_of_other_captions() -> None:
    assert "the word “BANK”" in swaps("the word “POST”", texts=["BANK"])


def test_nothing_to_swap_is_no_swap() -> None:
    assert swaps("soft natural light") == [] and swaps("猫") == [] and swaps("a sextant", "object") == []


def test_objects_by_their_first_word() -> None:
    assert objects("Two puppies and a kitten near the buses, three knives") == ["dog", "cat", "bus", "knife"]
    assert len(all_objects()) > 150


def test_swapped_words() -> None:
    assert swapped_words("a red mug", "a blue mug") == {"blue"}


WORDS = ("a", "red", "two", "cats", "on the left", "of", "'x'", '"', "3", "dog")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_has_a_kind_and_its_swaps_differ(text: str) -> None:
    assert kind_of(text) in KINDS
    for kind in KINDS:
        made = swaps(text, kind)
        assert text not in made and len(made) == len(set(made))
