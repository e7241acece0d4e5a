"""The one language of captions: splitting, near-duplicates, repetition; linear in any text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.statements import (
    comparable_statements,
    loops,
    normalise,
    repeats,
    split_statements,
    statement_spans,
    without,
)

ROOT = Path(__file__).resolve().parent.parent
PLAIN = st.from_regex(r"[a-z]{2,8}( [a-z]{2,8}){0,2}", fullmatch=True)


@pytest.mark.parametrize(
    ("caption", "statements"),
    [
        ("red cup, blue bowl", ["red cup", "blue bowl"]),
        ("red cup; blue bowl\nno people", ["red cup", "blue bowl", "no people"]),
        ("A red cup. A bowl! Is it? yes", ["A red cup", "A bowl", "Is it", "yes"]),
        ("bottle of 1.5 litres, 1,000 bees, 2.", ["bottle of 1.5 litres", "1,000 bees", "2"]),
        ("1,2 stars, 3, 4", ["1,2 stars", "3", "4"]),
        ('sign reading "stop, now. go", tree', ['sign reading "stop, now. go"', "tree"]),
        ("sign “halt, friend”, tree", ["sign “halt, friend”", "tree"]),
        ("sign 'halt, friend', tree", ["sign 'halt, friend'", "tree"]),
        ("man's hat, dog's ball", ["man's hat", "dog's ball"]),
        ("dogs' bowl, cats' bed", ["dogs' bowl", "cats' bed"]),
        ('a 12" pizza, a 10" plate', ['a 12" pizza', 'a 10" plate']),
        ('an open " mark, tree', ['an open " mark', "tree"]),
        ("two people (a man, a woman), dog", ["two people (a man, a woman)", "dog"]),
        ("an open (bracket, tree", ["an open (bracket", "tree"]),
        ("St. Mary church, J. Smith sign", ["St. Mary church", "J. Smith sign"]),
        ("- red cup\n* bowl\n2. tree", ["red cup", "bowl", "tree"]),
        ("red cup,, ,\n ;blue   bowl,", ["red cup", "blue bowl"]),
        ("赤いカップ、青い空。木", ["赤いカップ", "青い空", "木"]),
        ("", []),
        (" ,.;\n", []),
    ],
)
def test_split(caption: str, statements: list[str]) -> None:
    assert split_statements(caption) == statements


@given(st.lists(PLAIN), st.sampled_from([", ", "; ", "\n", ". ", " , "]))
def test_split_undoes_joining(statements: list[str], separator: str) -> None:
    assert split_statements(separator.join(statements)) == statements


@given(st.text(max_size=200))
def test_split_takes_any_text_and_loses_no_word(caption: str) -> None:
    statements = split_statements(caption)
    assert all(statement == " ".join(statement.split()) and statement for statement in statements)
    kept = sum(c.isalpha() for c in caption)
    assert sum(c.isalpha() for statement in statements for c in statement) == kept
    assert [part for each in statements for part in split_statements(each)] or not statements


@given(st.text(alphabet="ab1\"“”'()[].,;!? -•\n", max_size=80))
def test_spans_stand_in_order_and_hold_every_letter(caption: str) -> None:
    spans = statement_spans(caption)
    bounds = [0, *(at for start, stop, end in spans for at in (start, stop, end)), len(caption)]
    assert bounds == sorted(bounds)
    letters = [c for start, stop, _ in spans for c in caption[start:stop] if c.isalpha()]
    assert letters == [c for c in caption if c.isalpha()]


def test_spans_end_with_the_mark_of_their_sentence() -> None:
    caption = "- Red cup on a table. A dog sleeps, nearby\n2. tree!"
    assert [(caption[i:j], caption[j:k]) for i, j, k in statement_spans(caption)] == [
        ("Red cup on a table", "."), ("A dog sleeps", ""), ("nearby", ""), ("tree", "!")
    ]  # fmt: skip


@given(st.text(max_size=60))
def test_normalise_ignores_what_stands_around(text: str) -> None:
    assert normalise(text) == normalise(f" \n{text} .") == " ".join(normalise(text).split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("red cup, dog, tree", 0),
        ("red cup, dog, a red cup, Dog", 2),
        ("red cup, very very very very small dog", 1),
        ("so so good, 3 cups, 13 cups", 0),
        ("on the left on the left on the left", 0),  # three times
        ("on the left on the left on the left on the left", 1),
        ("a cup " * 4 + ", a cup " * 2, 2),
        ("", 0),
    ],
)
def test_repeats(text: str, count: int) -> None:
    assert repeats(comparable_statements(text)) == count
    assert loops(text) == (2 * count > len(split_statements(text)))


@pytest.mark.parametrize(
    ("caption", "gone", "left"),
    [
        ("red cup, blue bowl, tree", ["blue bowl"], "red cup, tree"),
        ("red cup, blue bowl, tree", ["red cup"], "blue bowl, tree"),
        ("red cup, blue bowl, tree", ["tree", "blue bowl"], "red cup"),
        ("red cup, blue bowl", ["red cup", "blue bowl"], ""),
        ("A dog sleeps, nearby. Two  cats!", ["nearby"], "A dog sleeps. Two  cats!"),
        ("A dog sleeps, nearby. Two  cats!", ["dog sleeps"], "nearby. Two  cats!"),
        ("A dog sleeps, nearby. Two  cats!", ["two cats"], "A dog sleeps, nearby."),
        ("A dog sleeps, nearby. Two  cats!", ["nearby", "two cats"], "A dog sleeps."),
        ("A dog sleeps, far, nearby. Two cats.", ["far", "nearby"], "A dog sleeps. Two cats."),
        ("A dog. Two cats. A tree.", ["two cats"], "A dog. A tree."),
        ("- red cup\n- bowl\n- tree", ["bowl"], "- red cup\n- tree"),
        ("- red cup\n- bowl\n- tree", ["tree"], "- red cup\n- bowl"),
        ("red cup,  tree ;", [], "red cup,  tree ;"),
    ],
)
def test_what_leaves_takes_its_separator_along(caption: str, gone: list[str], left: str) -> None:
    assert without(caption, gone.__contains__) == left


@given(st.lists(st.sampled_from(["a cup", "tree", "(c, d)", "'e. f'"]), max_size=6), st.data())
def test_what_stays_is_stated_as_before(said: list[str], data: st.DataObject) -> None:
    caption = "".join(text + data.draw(st.sampled_from([", ", ". ", "! ", "\n- ", "; "])) for text in said)
    gone = data.draw(st.sets(st.sampled_from(["cup", "tree", "(c, d)", "'e. f'"])))
    left = without(caption, gone.__contains__)
    assert comparable_statements(left) == [
        each for each in comparable_statements(caption) if each not in gone
    ]


HOSTILE = (
    *(".", "?!", "“", '"', "' \"", " 'a", "(", "( ", "[a", "[(", "1", "1.", "a.", ".a", "St.", "e.g."),
    *(",", " ", "\n", "\n- ", "\n 1", " \t", "the ", "a ", "-", "evok", '"a', "“a", "'a' ", "、", "a b "),
)
LINEAR = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
from captioner.statements import is_one_statement, loops, split_statements, visible
from tests.test_statements import HOSTILE
for text in HOSTILE:
    text = text * (300_000 // len(text)) + "x"
    split_statements(text), loops(text), visible(text), is_one_statement(text)
"""


@pytest.mark.slow
def test_long_texts_are_read_once() -> None:
    """300 kB of each take seconds of work in all; one that is read again from each of its places takes more
    than the limit alone. The limit is on the work of the process, so a busy machine changes nothing.
    """
    done = subprocess.run([sys.executable, "-c", LINEAR], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"killed by its limit: {done}"
