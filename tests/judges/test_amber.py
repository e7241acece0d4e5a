"""AMBER's generative scores on small files of its form."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import DataError
from captioner.judges.amber import Rules, amber, count, nouns_in, read_rules

RELATION = {
    "person": ["people", "man", "woman"],
    "man": ["person"],
    "grass": ["ground"],
    "dog": [],
    "cat": [],
    "bird": [],
    "sky": [],
    "TV": [],
    "bear": [],
    "orange": [],
    "chair": [],
    "bus": [],
    "can": [],
}
ROWS = [
    {"id": 1, "type": "generative", "truth": ["person", "grass", "dog"], "hallu": ["bird", "sky"]},
    {"id": 2, "type": "generative", "truth": ["cat", "cat", "TV"], "hallu": ["dog"]},
    {"id": 3, "type": "generative", "truth": ["bus"], "hallu": []},
    {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "relation.json").write_text(json.dumps(RELATION))
    (tmp_path / "annotations.json").write_text(json.dumps(ROWS))
    (tmp_path / "safe_words.txt").write_text("orange\nline")
    return tmp_path


@pytest.fixture
def rules(folder: Path) -> Rules:
    return read_rules(folder)


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("Two dogs and a bear on the grass.", ["dog", "bear", "grass"]),
        ("an orange chair", ["chair"]),  # a colour
        ("an orange", ["orange"]),
        ("a man can be seen", ["man"]),
        ("a red can", ["can"]),
        ("dogs, people, bear, bus", ["dog", "people", "bear", "bus"]),
        ("a tv", ["tv"]),
        ("a table", []),  # not in the vocabulary
        ("", []),
    ],
)
def test_nouns(rules: Rules, caption: str, nouns: list[str]) -> None:
    assert nouns_in(caption, rules.vocabulary) == nouns


def test_by_hand(folder: Path) -> None:
    """False nouns, true objects and targets of each caption.

    1: woman (person), ground (grass), bird (a target), orange (safe): 1 of 4, 2 of 3, 1 of 2.
    2: cat twice (its first place alone), dog (a target): 1 of 3, 1 of 3, 1 of 1. 3: nothing.
    """
    captions = {
        "AMBER_1": "a woman, ground, a bird, an orange",
        "AMBER_2": "a cat, a cat, a dog",
        "AMBER_3": "",
    }
    scores = amber(captions, folder)
    assert scores.annotated == 3
    assert scores.corpus() == {
        "chair": pytest.approx(2 / 7),
        "cover": pytest.approx(3 / 7),
        "hal": pytest.approx(2 / 3),
        "cog": pytest.approx(2 / 3),
    }
    empty = scores.per_image()["AMBER_3"]
    assert math.isnan(empty["chair"])
    assert math.isnan(empty["cog"])  # no target is annotated
    assert (empty["cover"], empty["hal"]) == (0, 0)
    assert scores.lower_is_better == {"chair", "hal", "cog"}


def test_likeness_can_excuse_a_noun_and_can_hit_a_target(rules: Rules) -> None:
    """As in the benchmark: a bear that is like a true dog covers it; one that is like a target hits that."""
    strict = count("a bear", ["dog"], ["bird"], rules)
    assert (strict["false"], strict["covered"], strict["hit"]) == (1, 0, 0)
    alike = count("a bear", ["dog"], ["bird"], rules, lambda one, other: {one, other} == {"bear", "dog"})
    assert (alike["false"], alike["covered"], alike["hit"]) == (0, 1, 0)
    target = count("a bear", ["dog"], ["bird"], rules, lambda one, other: {one, other} == {"bear", "bird"})
    assert (target["false"], target["covered"], target["hit"]) == (1, 0, 1)


def test_a_noun_stands_for_the_first_object_that_it_names(rules: Rules) -> None:
    """ "man" is associated with "person", which comes before the object "man" itself."""
    row = count("a man", ["person", "man"], [], rules)
    assert row["covered"] == 1
    assert count("a man, a person", ["person", "man"], [], rules)["covered"] == 2


@pytest.mark.parametrize("name", ["annotations.json", "relation.json", "safe_words.txt"])
def test_a_missing_file_is_named_with_its_origin_and_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        amber({"AMBER_1": "a cat"}, folder)
    assert name in caught.value.what
    assert "junyangwang0410/AMBER" in caught.value.fix
    assert str(folder) in caught.value.fix


def test_images_that_the_benchmark_does_not_describe_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="AMBER_4"):  # it is asked about, not described
        amber({"AMBER_1": "a cat", "AMBER_4": "a cat"}, folder)


def test_files_of_another_form_are_an_error(folder: Path) -> None:
    (folder / "annotations.json").write_text('[{"id": "one", "type": "generative", "truth": []}]')
    with pytest.raises(DataError, match=r"0\.id"):
        amber({"AMBER_1": "a cat"}, folder)
    (folder / "annotations.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(DataError, match="annotation file is not"):
        amber({"AMBER_1": "a cat"}, folder)


WORDS = ["dog", "woman", "bird", "bear", "orange", "chair", "ground", "street"]


@settings(deadline=None)
@given(said=st.lists(st.sampled_from(WORDS), max_size=8), data=st.data())
def test_counts_hold_together_in_any_order(said: list[str], data: st.DataObject) -> None:
    vocabulary = frozenset(word.lower() for word in RELATION).union(*RELATION.values())
    rules = Rules(RELATION, vocabulary, frozenset(["orange"]))
    truth, targets = ["person", "grass", "dog"], ["bird", "sky"]
    row = count(", ".join(f"a {word}" for word in said), truth, targets, rules)
    assert 0 <= row["false"] <= row["nouns"] <= len(said)
    assert 0 <= row["covered"] <= len(truth)
    assert 0 <= row["hit"] <= len(targets)
    turned = data.draw(st.permutations(said))
    assert count(", ".join(f"a {word}" for word in turned), truth, targets, rules) == row
