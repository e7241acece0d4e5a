"""Yes/no questions from captions: balanced, false where they say no, and told apart by no blind model."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from captioner.method.asking import Asked, ask
from captioner.method.kinds import swaps
from captioner.method.reformulate import read_checked
from captioner.method.shorthand import shorthand

CHECKED = Path(__file__).parent.parent / "data" / "reformulation.jsonl"


@pytest.fixture(scope="module")
def captions() -> dict[str, str]:
    """More captions than people wrote: statements of the checked ones, some with a word swapped."""
    statements = [each for row in read_checked(CHECKED) for each in shorthand(row.prose)]
    rng = random.Random(0)
    made = {}
    for i in range(120):
        drawn = rng.sample(statements, 5)
        made[f"image {i}"] = ", ".join(
            rng.choice(swaps(each) or [each]) if rng.random() < 0.5 else each for each in drawn
        )
    return made


@pytest.fixture(scope="module")
def asked(captions: dict[str, str]) -> Asked:
    return ask(captions, per_image=12, seed=3)


def test_yes_and_no_are_equally_many_in_each_image_and_kind(asked: Asked) -> None:
    for own in asked.questions.values():
        assert len(own) <= 12
        counts = Counter((question["kind"], question["answer"]) for question in own)
        assert all(counts[kind, "yes"] == counts[kind, "no"] for kind, _ in counts)
        said = [question["question"] for question in own]
        assert len(said) == len(set(said))


def test_false_statements_are_not_in_the_caption(captions: dict[str, str], asked: Asked) -> None:
    for key, own in asked.questions.items():
        stated = {each.casefold() for each in shorthand(captions[key])}
        for question in own:
            if question["answer"] == "no":
                assert question["question"].casefold() not in stated
            elif len(question["question"].split()) > 1:
                assert question["question"].casefold() in stated


def test_every_way_of_making_them_is_used_and_every_kind(asked: Asked) -> None:
    assert asked.by_stratum.keys() >= {"swap", "popular", "adversarial", "random", "other"}
    assert len(asked.by_kind) >= 8
    assert sum(count for count, _ in asked.by_kind.values()) == 2 * sum(asked.by_stratum.values())


def test_balancing_takes_what_words_tell_away(asked: Asked) -> None:
    assert asked.blind_before > 0.6  # a swapped word is often an unlikely one
    assert 0.35 < asked.blind < 0.56


def test_the_same_seed_gives_the_same_questions(captions: dict[str, str], asked: Asked) -> None:
    few = dict(list(captions.items())[:20])
    assert ask(few, 6, 1).questions == ask(few, 6, 1).questions != ask(few, 6, 2).questions


def test_captions_that_say_nothing_have_no_questions() -> None:
    found = ask({"a": "", "b": "lovely", "c": "!!"})
    assert found.questions == {} and found.blind != found.blind
    assert ask({}).questions == {}


def test_what_the_caption_says_is_never_denied() -> None:
    captions = {f"{i}": "a red mug, a blue mug, a cat, a dog, two cups" for i in range(8)}
    for own in ask(captions).questions.values():
        denied = {question["question"] for question in own if question["answer"] == "no"}
        assert not denied & {"red mug", "blue mug", "cat", "dog", "mug", "cup"}
