"""captioner/qa.py and loops/qa.py: balance, split, scores, and that only the language model learns."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from captioner import qa, scenes
from captioner.config import Config, ModelConfig, QAConfig, TrainingConfig
from captioner.errors import DataError, RunError
from captioner.model import FAMILIES
from captioner.qa import Answer
from loops import qa as loop
from tests.test_train import compare_losses, logged
from tests.tiny import tiny_checkpoint

QUESTIONS = scenes.questions(scenes.sample("qa", 3), 3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 200), st.integers(2, 60))
def test_draw_is_balanced_for_every_kind(index: int, count: int) -> None:
    questions = scenes.questions(scenes.sample("qa", index), index)
    drawn = qa.draw_balanced(questions, count, random.Random(index))
    answers = Counter((question["kind"], question["answer"]) for question in drawn)
    assert 0 < len(drawn) <= count
    assert all(answers[kind, "yes"] == answers[kind, "no"] for kind, _ in answers)
    assert len({question["question"] for question in drawn}) == len(drawn)
    assert all(map(qa.is_yes_no, drawn))


def test_draw_depends_on_the_generator_alone() -> None:
    draws = [qa.draw_balanced(QUESTIONS, 8, random.Random(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_strata_take_turns() -> None:
    common = [{"question": f"q{i}", "answer": "no", "kind": "color", "stratum": "random"} for i in range(50)]
    rare = [{"question": f"r{i}", "answer": "no", "kind": "color", "stratum": "swap"} for i in range(4)]
    sure = [{"question": f"y{i}", "answer": "yes", "kind": "color", "stratum": "positive"} for i in range(50)]
    drawn = qa.draw_balanced([*common, *rare, *sure], 16, random.Random(0))
    assert Counter(q["stratum"] for q in drawn) == {"positive": 8, "random": 4, "swap": 4}


def test_a_kind_with_one_answer_is_left_out() -> None:
    only_yes = [{"question": "a", "answer": "yes", "kind": "mark", "stratum": "positive"}]
    assert qa.draw_balanced(only_yes, 8, random.Random(0)) == []


def test_question_text() -> None:
    statement = {"question": "northwest red", "answer": "yes", "kind": "color", "stratum": "positive"}
    asked = {"question": "northwest color?", "answer": "red", "kind": "color", "stratum": "open"}
    assert qa.question_text(statement) == "Visible: northwest red?"
    assert qa.question_text(asked) == "northwest color?"


def test_split_is_by_image_and_stable() -> None:
    keys = [f"image-{i}" for i in range(200)]
    learned, held = qa.split(keys, 0.15, seed=0)
    assert sorted(learned + held) == list(range(200)) and len(held) == 30
    shuffled = keys[::-1]
    assert {shuffled[i] for i in qa.split(shuffled, 0.15, seed=0)[1]} == {keys[i] for i in held}
    assert qa.split(keys, 0.15, seed=1)[1] != held
    assert [len(part) for part in qa.split(keys[:2], 0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError):
        qa.split(keys[:1], 0.5, seed=0)


def test_accuracy_by_hand() -> None:
    answers = [
        Answer("color", "positive", "yes", 0.9, 1.0),
        Answer("color", "positive", "yes", 0.2, 0.8),
        Answer("mark", "swap", "no", 0.7, 1.0),
        Answer("mark", "random", "no", 0.05, 0.6),
        Answer("mark", "random", "no", 0.05, 0.6),
    ]
    table = qa.accuracy_table(answers)
    every = table["all"]
    assert (every.count, every.accuracy, every.precision, every.recall) == (5, 3 / 5, 1 / 2, 1 / 2)
    assert every.yes_ratio == 2 / 5 and every.label_mass == pytest.approx(0.8)
    assert every.calibration_error == pytest.approx((0.1 + 0.8 + 0.7 + 0.1) / 5)
    assert table["stratum random"].precision is None and table["stratum random"].recall is None
    assert table["kind color"].recall == 1 / 2 and table["stratum swap"].accuracy == 0
    assert set(table) == {
        "all",
        "kind color",
        "kind mark",
        "stratum positive",
        "stratum random",
        "stratum swap",
    }


def test_calibrated_answers_have_no_calibration_error() -> None:
    answers = [Answer("a", "b", "yes" if i < 7 else "no", 0.7, 1.0) for i in range(10)]
    assert qa.accuracy(answers).calibration_error == pytest.approx(0)


def test_qa_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = Config(
        model=ModelConfig(),
        qa=QAConfig(
            data="scenes:qa:6",
            questions_per_image=4,
            holdout=0.34,
            language_width=4,
            training=TrainingConfig(
                steps=10, batch_size=2, learning_rate=3e-3, log_steps=1, save_steps=5, seed=2
            ),
        ),
    )
    args = argparse.Namespace(run_dir=run_dir, redo=False, round=1)
    with pytest.raises(RunError, match="no such run"):
        loop.run(config, args)
    from captioner.runs import Run

    Run.open(run_dir, config)
    start = run_dir / "sft" / "captioner"
    captioner = tiny_checkpoint(start)
    assert loop.run(config, args) == 0

    out = run_dir / "round-1" / "qa"
    old, new = load_file(start / "model.safetensors"), load_file(out / "captioner" / "model.safetensors")
    assert old.keys() == new.keys()
    wider = {name for name in old if old[name].shape != new[name].shape}
    assert wider and all("language_model" in name and ".mlp." in name for name in wider)
    for name in old.keys() - wider:  # the encoder above all, bit for bit
        assert old[name].equal(new[name]), name
    mlp = FAMILIES[captioner.family.name].language_mlp
    for name in wider:
        rows, columns = old[name].shape
        assert new[name][:rows, :columns].equal(old[name])
    assert any(new[n][:, old[n].shape[1] :].abs().max() > 0 for n in wider if f".{mlp.output}." in n)

    scores = json.loads((out / "accuracy.json").read_text())
    assert {"all", "blind", "kind color", "stratum positive"} <= scores.keys()
    manifest = json.loads((out / "stage.json").read_text())
    assert manifest["counts"]["images"] + manifest["counts"]["held_out_images"] == 6
    assert manifest["counts"]["held_out_questions"] == scores["all"]["count"]
    compare_losses("qa", logged(out))
