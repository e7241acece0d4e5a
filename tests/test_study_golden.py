"""The arithmetic of the study of golden captions; what it runs is tested where it lives."""

from __future__ import annotations

import pytest

from captioner.config import GoldenConfig
from captioner.lab import grid as scenes
from captioner.lab.grid import Scene, Thing
from captioner.method.verdicts import Thresholds, judge
from captioner.records import Candidate, Claim
from loops.studies import golden as study

SCENE = Scene("white", (Thing("north", "star", "red", "large", None),))  # 4 facts
TRUE = ("white background", "north star", "north red", "north large")


def image(texts: list[str], p_yes: dict[str, float]) -> study.Image:
    fields = {"sample": "s", "key": "i"}
    samples = [
        Candidate(**fields, k=k, text=text, finish_reason="stop", mean_logprob=-1.0, tokens=9, seed=k)
        for k, text in enumerate(texts)
    ]
    claims = [
        Claim(
            **fields, text=text, kind=scenes.kind_of(text), question=f"{text}?", expected="yes", p_yes=p,
            candidates=[k for k, said in enumerate(texts) if text in said.split(", ")],
            p_true=None if text == "north dot" else p,  # of a kind that is not trusted
            label_mass=1.0, verifier="v", view="all", slot=text,  # none excludes another
        )
        for text, p in p_yes.items()
    ]  # fmt: skip
    return SCENE, samples, judge(claims, Thresholds(0.6, 0.4))


P_YES = {
    "white background": 0.9, "north star": 0.5, "north red": 0.3, "north large": 0.7,
    "north blue": 0.5, "north dot": 0.8, "south star": 0.1,
}  # fmt: skip
IMAGE = image(
    [
        "white background, north star, north blue",
        "white background, north star, north red, north dot",
        "white background, north large, south star",
    ],
    P_YES,
)


@pytest.mark.parametrize(
    ("arm", "precision", "recall", "statements"),
    [
        ("mean sample", 7 / 10, 7 / 12, 10 / 3),
        ("best of K", 2 / 3, 2 / 4, 3),  # 0.63 of the first sample, 0.62 of the second, 0.57 of the third
        ("union", 4 / 7, 1, 7),
        ("majority vote", 1, 2 / 4, 2),
        ("golden", 3 / 4, 3 / 4, 4),  # star is undecided, and most say it
        ("golden by P(yes) alone", 3 / 4, 3 / 4, 4),
        ("golden, keep 0.1", 4 / 6, 1, 6),  # never the dot, whose kind is not trusted
        ("golden, keep 0.25", 4 / 5, 1, 5),
        ("golden, keep 0.75", 1, 1 / 4, 1),
        ("golden, abstained kept", 3 / 5, 3 / 4, 5),
    ],
)
def test_arms_by_hand(arm: str, precision: float, recall: float, statements: float) -> None:
    made = dict(study._arms(GoldenConfig(abstain="majority")))[arm](*IMAGE[1:])
    scores = study._scores([IMAGE], [made])
    assert scores["precision"] == pytest.approx(precision)
    assert scores["recall"] == pytest.approx(recall)
    assert scores["statements"] == pytest.approx(statements)


def test_lost_and_kept_by_hand() -> None:
    captions = [[", ".join(("white background", "north large", "north dot"))]]
    union = [set(P_YES)]
    found = study._lost_and_kept([IMAGE], union, captions, scenes.KINDS)
    assert found == {"true_lost": pytest.approx(2 / 4), "false_kept": pytest.approx(1 / 3)}
    assert study._lost_and_kept([IMAGE], union, captions, ("mark",)) == {"false_kept": 1.0}
    assert study._lost_and_kept([IMAGE], union, captions, ("relation",)) == {}
