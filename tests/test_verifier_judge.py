"""The judge without labels, by hand: pool, precision, recall, its errors, what people's answers change."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from captioner.config import GateConfig
from captioner.judges import checked, verifier
from captioner.judges.base import Said
from captioner.judges.checked import CheckedJudge
from captioner.judges.gate import decide
from captioner.judges.verifier import Asked, Errors, VerifierJudge
from captioner.records import CaptionRow

PERFECT = Errors({"all": 1.0}, {}, 0.0)


def said(captions: dict[str, str] | list[tuple[str, str]], name: str = "", prose: bool = False) -> Said:
    pairs = captions.items() if isinstance(captions, dict) else captions
    rows = [
        CaptionRow(
            id="", key=key, caption=text, finish_reason="stop", tokens=len(text.split()), model="", config=""
        )
        for key, text in pairs
    ]
    return Said(name, rows, prose)


# ---------------------------------------------------------------- by hand


def test_every_captioner_weighs_the_same_however_much_it_says() -> None:
    terse = said([("a", "red cup"), ("a", "red cup, table")])
    wordy = said([("a", "Red cup, spoon, fork, plate")])
    base = said([("a", "The image shows a red cup.")], prose=True)
    pool = verifier.pooled([terse, wordy, base])["a"]
    assert pool == pytest.approx(
        {"red cup": 2 / 3 + 1 / 4 + 1, "table": 1 / 3, "spoon": 1 / 4, "fork": 1 / 4, "plate": 1 / 4}
    )
    assert sum(pool.values()) == pytest.approx(3)
    assert verifier.pooled([said({"a": ""})]) == {"a": {}}


def test_precision_and_recall_by_hand() -> None:
    answers = {"red cup": 0.9, "spoon": 0.4, "fork": 0.2, "table": 0.5}
    asked = {"a": {text: Asked("object", p) for text, p in answers.items()}}
    pool = {"a": {"red cup": 2.0, "spoon": 1.0, "table": 1.0, "nobody asked": 1.0}}
    judge = VerifierJudge(asked, pool, PERFECT)
    [row] = judge.count(said({"a": "A red cup, fork, red cup, unheard of"}))
    columns = ("statements", "repeated", "unparsed", "true", "false", "facts", "recalled")
    values = [row[name] for name in columns]
    assert values == pytest.approx([4, 1, 1, 0.9 + 0.2, 0.1 + 0.8, 1.8 + 0.4 + 0.5, 1.8])
    assert row.groups["precision by kind"] == {"object": pytest.approx((1.1, 2.0))}


def test_a_longer_statement_states_the_shorter_claim_of_the_pool() -> None:
    asked = {"a": {"cup": Asked("object", 1.0), "shiny red cup": Asked("object", 1.0)}}
    judge = VerifierJudge(asked, {"a": {"cup": 1.0}}, PERFECT)
    [row] = judge.count(said({"a": "shiny red cup"}))
    assert (row["facts"], row["recalled"]) == (1.0, 1.0)


# ---------------------------------------------------------------- the judge's own error


def world(
    images: int, new_true: float, passed: float, false_pass: float, seed: int = 0
) -> tuple[dict[str, dict[str, Asked]], Said, Said]:
    """Four old claims and four new ones per image: half of the old ones are true, and a share ``new_true`` of
    the new. A judge was asked about all; it confirms 5 % of the old false ones."""
    rng = random.Random(seed)
    asked: dict[str, dict[str, Asked]] = {}
    for index in range(images):
        new = {f"new {i}": rng.random() < new_true for i in range(4)}
        chance = {f"old {i}": passed if i < 2 else 0.05 for i in range(4)}
        chance |= {text: passed if true else false_pass for text, true in new.items()}
        votes = {text: rng.random() < p for text, p in chance.items()}
        asked[str(index)] = {text: Asked("object", 0.95 if yes else 0.05) for text, yes in votes.items()}
    before = said({key: ", ".join(list(own)[:4]) for key, own in asked.items()})
    after = said({key: ", ".join([*list(own)[:2], *list(own)[4:]]) for key, own in asked.items()})
    return asked, before, after


def pool_of(asked: dict[str, dict[str, Asked]]) -> dict[str, dict[str, float]]:
    return {key: dict.fromkeys(own, 1.0) for key, own in asked.items()}


def test_the_correction_finds_the_share_of_true_claims() -> None:
    """Votes with known error rates on claims of which 70 % are true (Rogan & Gladen)."""
    asked, _, _ = world(4000, new_true=0.7, passed=0.9, false_pass=0.3)
    errors = Errors({"all": 0.9}, {"object": 0.3}, 0.5)
    worst = VerifierJudge(asked, pool_of(asked), errors)
    worst._doubted = {key: [text for text in own if text.startswith("new")] for key, own in asked.items()}
    rows = worst.count(said({key: ", ".join(f"new {i}" for i in range(4)) for key in asked}))
    assert sum(row["true"] for row in rows) / (4 * len(rows)) == pytest.approx(0.7, abs=0.01)


@pytest.mark.slow
def test_what_the_judge_confirms_by_mistake_does_not_promote() -> None:
    """The new claims are false, and the judge, of the verifier's family, confirms half of them."""
    asked, before, after = world(400, new_true=0.0, passed=0.95, false_pass=0.5)
    trusting = VerifierJudge(asked, pool_of(asked), Errors({"all": 0.95}, {}, 0.02))
    config = GateConfig(max_length_ratio=3)
    assert decide(trusting.compare(before, after), config).promoted  # what a judge without doubt would do
    doubting = VerifierJudge(asked, pool_of(asked), Errors({"all": 0.95}, {}, 0.5))
    decision = decide(doubting.compare(before, after), config)
    assert not decision.promoted and decision.judge == "verifier"
    assert any("new claims of kind object: a false-pass rate of 0.50 is assumed" in x for x in decision.notes)


def test_a_true_gain_is_promoted_under_the_worst_case() -> None:
    asked, before, after = world(400, new_true=1.0, passed=0.95, false_pass=0.1)
    judge = VerifierJudge(asked, pool_of(asked), Errors({"all": 0.95}, {}, 0.5))
    step = judge.compare(before, after)
    assert decide(step, GateConfig(max_length_ratio=3)).promoted
    plain = VerifierJudge(asked, pool_of(asked), PERFECT)._worst({}, before, after, PERFECT, 2000, 0)
    for name, x in step.difference.items():  # the interval spans the judge's plain word, too
        assert x.low <= plain.difference[name].low and x.high >= plain.difference[name].high


def test_a_small_gain_waits_for_people_and_says_how_many() -> None:
    asked, before, after = world(150, new_true=0.5, passed=0.95, false_pass=0.02)
    errors = Errors({"all": 0.95}, {}, 0.5)
    waiting = VerifierJudge(asked, pool_of(asked), errors).compare(before, after)
    config = GateConfig(max_length_ratio=3)
    assert not decide(waiting, config).promoted
    assert "checked false claims among those that the round's verifier let through" in waiting.notes[-1]
    known = verifier.false_pass_of([("object", False)] * 120 + [("object", True)] * 2)
    decided = VerifierJudge(asked, pool_of(asked), Errors({"all": 0.95}, known, 0.5)).compare(before, after)
    assert decide(decided, config).promoted
    assert any("is the upper bound from checked claims" in note for note in decided.notes)


def test_a_kind_that_the_judge_cannot_tell_earns_nothing() -> None:
    asked, before, after = world(100, new_true=1.0, passed=0.6, false_pass=0.5)
    judge = VerifierJudge(asked, pool_of(asked), Errors({"all": 0.95, "object": 0.6}, {}, 0.5))
    step = judge.compare(before, after)
    assert step.after["precision"].low < 0.4
    assert any("the judge cannot tell this kind" in note for note in step.notes)


def test_false_pass_rates_are_upper_bounds_of_enough_claims() -> None:
    found = verifier.false_pass_of([("object", False)] * 20 + [("count", True)] * 19)
    assert found == {"object": pytest.approx(1 - 0.025 ** (1 / 20))}  # Clopper & Pearson, none of 20


# ---------------------------------------------------------------- people's answers


def answers(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    about = {"sample": "s", "kind": "object", "question": "?", "expected": "yes", "p_yes": 0.9}
    lines = [
        json.dumps({"id": f"{key} {text}", "key": key, "text": text, "answer": answer, **about})
        for key, text, answer in rows
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_people_judge_what_they_answered(tmp_path: Path) -> None:
    told = [("red cup on table", "yes"), ("dog", "no"), ("old spoon", "cannot tell")]
    keys = [str(i) for i in range(30)]
    path = answers(tmp_path / "a.jsonl", [(key, *row) for key in keys for row in told])
    judge = CheckedJudge(checked.known_of(checked.read_checked(path)))
    truth = {"Red cup": True, "a big dog": False, "old spoon": None, "window": None}
    one = checked.known_of(checked.read_checked(path))["0"]
    assert {text: one.holds(text) for text in truth} == truth
    worse, better = (said(dict.fromkeys(keys, text), name) for name, text in
                     (("start", "red cup, dog"), ("round 1", "red cup on table, red cup")))  # fmt: skip
    step = judge.compare(worse, better)
    assert (step.judge, step.before["precision"].value, step.after["recall"].value) == ("checked", 0.5, 1.0)
    assert decide(step, GateConfig(max_length_ratio=3)).promoted
    guessing = judge.compare(worse, said(dict.fromkeys(keys, "red cup on table, window"), "round 1"))
    assert guessing.judge == "none"
    assert "people have not answered 30 statements of round 1; 90% of each" in guessing.notes[-1]
