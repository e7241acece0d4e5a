"""captioner/qa.py and loops/qa.py: balance, split, scores, and that only the language model learns."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from captioner.config import AdapterTuning, Config, ModelConfig, QAConfig, TrainingConfig
from captioner.errors import DataError, RunError
from captioner.lab import grid as scenes
from captioner.method import qa
from captioner.method.qa import Answer
from captioner.models.model import FAMILIES
from loops import qa as loop
from tests.tiny import tiny_checkpoint

QUESTIONS = scenes.questions(scenes.sample("qa", 3), 3)
NARROW = AdapterTuning(vision_width=0, language_width=4)


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
    assert qa.question_text(statement | {"question": "Is there a dog?"}) == "Is there a dog?"


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


def test_blind_answers_stand_beside_those_of_the_same_questions() -> None:
    answers = [Answer("a", "s", "yes", 0.9, 1.0), Answer("b", "s", "no", 0.1, 1.0)]
    blind = [Answer("a", "s", "yes", 0.9, 1.0), Answer("b", "s", "no", 0.9, 1.0)]
    table = qa.accuracy_table(answers, blind)
    found = {name: (row.accuracy, row.blind) for name, row in table.items()}
    assert found == {"all": (1, 0.5), "kind a": (1, 1), "kind b": (1, 0), "stratum s": (1, 0.5)}


def drawn_answers(temperature: float, count: int, seed: int = 0) -> list[Answer]:
    """Answers of a verifier whose logits are too large by ``temperature``."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(0, 2, count)))
    yes = rng.random(count) < p
    raw = 1 / (1 + np.exp(-temperature * np.log(p / (1 - p))))
    return [Answer("k", "s", "yes" if y else "no", float(x), 1.0) for x, y in zip(raw, yes, strict=True)]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_that_of_least_likelihood_loss(temperature: float) -> None:
    answers = drawn_answers(temperature, 4000)
    fitted = qa.fit_temperature(answers)
    assert fitted == pytest.approx(temperature, rel=0.1)
    logits = torch.from_numpy(qa.log_odds([a.p_yes for a in answers]))
    labels = torch.tensor([float(a.expected == "yes") for a in answers], dtype=torch.float64)

    def loss(t: float) -> float:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits / t, labels))

    assert loss(fitted) <= min(loss(fitted * 1.001), loss(fitted / 1.001))
    after = qa.accuracy(qa.scaled(answers, fitted))
    assert after.calibration_error < 0.03
    assert after.accuracy == qa.accuracy(answers).accuracy  # one half stays one half


def test_temperature_of_hopeless_answers_stays_in_bounds() -> None:
    assert qa.fit_temperature([Answer("k", "s", "yes", 0.9, 1)] * 5) == 1.0
    turned = [Answer("k", "s", a, p, 1) for a, p in (("yes", 0.01), ("no", 0.99))]
    assert qa.fit_temperature(turned) == pytest.approx(qa.FLATTEST)
    sure = [Answer("k", "s", a, p, 1) for a, p in (("yes", 1.0), ("no", 0.0))]
    assert qa.fit_temperature(sure) == pytest.approx(qa.SHARPEST)
    assert 0 < qa.scale(0.0, qa.SHARPEST) < qa.scale(1.0, qa.SHARPEST) <= 1


def test_calibrated_by_questions_of_other_images() -> None:
    answers = drawn_answers(3.0, 2000)
    keys = [f"image {i // 10}" for i in range(len(answers))]
    fitted = qa.cross_fitted(answers, keys)
    assert qa.accuracy(fitted).calibration_error < 0.04 < qa.accuracy(answers).calibration_error
    wrong = [replace(a, expected="yes" if a.expected == "no" else "no") for a in answers]
    even = {key for i, key in enumerate(sorted(set(keys))) if i % 2 == 0}
    mixed = [w if key in even else a for a, w, key in zip(answers, wrong, keys, strict=True)]
    for one, other, key in zip(qa.cross_fitted(mixed, keys), fitted, keys, strict=True):
        assert (one.p_yes == other.p_yes) == (key in even)  # what an image says is not fitted on itself


def test_band_by_hand() -> None:
    def group(p: float, yes: int) -> list[Answer]:
        return [Answer("k", "s", "yes" if i < yes else "no", p, 1.0) for i in range(qa.BAND_GROUP)]

    shares = {0.1: 2, 0.3: 12, 0.5: 22, 0.7: 18, 0.9: 38}  # of 40; 0.5 and 0.7 are pooled: 20 of 40
    answers = [each for p, yes in shares.items() for each in group(p, yes)]
    assert qa.band(answers, 0.9) == (0.9, 0.3)
    assert qa.band(answers, 0.7) == (0.9, 0.5)
    assert qa.band(answers, 0.5) == (0.5, 0.5)
    assert qa.band(group(0.4, 20), 0.9) == (1.0, 0.0)  # nothing is certain: everything abstains
    assert qa.band(group(0.4, 40), 0.9) == (0.4, 0.0)
    assert qa.band(group(0.4, 0), 0.9) == (1.0, 1.0)


def test_band_reaches_its_target_on_new_questions() -> None:
    calibration = qa.calibrate(drawn_answers(2.0, 6000), 0.8)
    assert calibration.temperature == pytest.approx(2, rel=0.1)
    assert calibration.keep == pytest.approx(0.8, abs=0.08) and calibration.drop == pytest.approx(
        0.2, abs=0.08
    )


def test_asking_again_is_judged_by_what_it_decides() -> None:
    calibration = qa.Calibration(temperature=1, keep=0.7, drop=0.3)
    yes, no = (Answer("k", "s", answer, 0.5, 1.0) for answer in ("yes", "no"))
    twice = [(yes, 0.99), (no, 0.99), (no, 0.01), (yes, 0.55)]
    assert qa.decided_rightly(twice, calibration) == (3, pytest.approx(2 / 3))
    assert qa.decided_rightly([(yes, 0.55)], calibration) == (0, 0.0)
    assert qa.combine([0.2, 0.8]) == pytest.approx(0.5) and qa.combine([0.7]) == pytest.approx(0.7)


def test_balance_over_images() -> None:
    def rows(count: int, answer: str, kind: str) -> list[qa.Question]:
        return [
            {"question": f"{kind} {answer} {i}?", "answer": answer, "kind": kind, "stratum": "s"}
            for i in range(count)
        ]

    asked = [rows(5, "yes", "a"), rows(2, "no", "a"), rows(3, "no", "b"), rows(3, "red", "a")]
    kept = qa.balance(asked, seed=1)
    counts = Counter((q["kind"], q["answer"]) for own in kept for q in own)
    assert counts == {("a", "yes"): 2, ("a", "no"): 2}
    assert kept == qa.balance(asked, seed=1) and kept[0] != qa.balance(asked, seed=2)[0]


def test_calibrated_answers_have_no_calibration_error() -> None:
    answers = [Answer("a", "b", "yes" if i < 7 else "no", 0.7, 1.0) for i in range(10)]
    assert qa.accuracy(answers).calibration_error == pytest.approx(0)


@pytest.mark.slow
def test_qa_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = Config(
        model=ModelConfig(),
        qa=QAConfig(
            data="scenes:qa:6",
            questions_per_image=4,
            holdout=0.34,
            tuning=NARROW,
            training=TrainingConfig(
                max_steps=10,
                per_device_train_batch_size=2,
                learning_rate=3e-3,
                logging_steps=1,
                save_steps=5,
                seed=2,
            ),
        ),
    )
    with pytest.raises(RunError, match="no such run"):
        loop.qa(run_dir, config, 1)
    from captioner.runs import Run

    Run.open(run_dir, config)
    start = run_dir / "sft" / "captioner"
    captioner = tiny_checkpoint(start)
    out = loop.qa(run_dir, config, 1)
    assert out == run_dir / "round-1" / "qa"
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
    assert {"all", "blind", "uncalibrated", "kind color", "stratum positive"} <= scores.keys()
    assert scores["all"]["blind"] == scores["blind"]["accuracy"]
    assert scores["all"]["accuracy"] == scores["uncalibrated"]["accuracy"]
    calibration = qa.Calibration.read(out / "calibration.json")
    assert 0 <= calibration.drop <= calibration.keep <= 1
    manifest = json.loads((out / "stage.json").read_text())
    assert manifest["counts"]["images"] + manifest["counts"]["held_out_images"] == 6
    assert manifest["counts"]["held_out_questions"] == scores["all"]["count"]
    assert manifest["metrics"]["temperature"] == calibration.temperature
    assert set(manifest["asked_again"]) == {"view", "wording"}


@pytest.mark.slow
def test_the_judge_learns_from_the_base_and_from_other_images(tmp_path: Path) -> None:
    """Where nothing else tells what is true at the gate, the QA images are halved: no image serves both."""
    from captioner.judges import asking
    from captioner.runs import Run

    scenes.write("validation", 2, tmp_path / "gate")
    (tmp_path / "gate" / "metadata.parquet").unlink()
    tiny_checkpoint(tmp_path / "base", seed=3)
    training = TrainingConfig(max_steps=2, per_device_train_batch_size=2, save_steps=2, logging_steps=1)
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path / "base"), "device": "cpu"},
            "qa": {
                "data": "scenes:qa:8",
                "questions_per_image": 4,
                "tuning": NARROW,
                "training": training,
            },
            "gate": {"data": str(tmp_path / "gate")},
        }
    )
    run = Run.open(tmp_path / "run", config)
    tiny_checkpoint(run.path / "sft" / "captioner")
    assert asking.trained(config) and asking.checkpoint_of(run) is None
    loop.judge(run)
    judge = asking.checkpoint_of(run)
    assert judge == run.path / "judge" / "captioner"
    about = json.loads((run.path / "judge" / "stage.json").read_text())
    assert about["counts"]["images"] + about["counts"]["held_out_images"] == 4
    assert (run.path / "judge" / about["input_paths"]["captioner"]).resolve() == tmp_path / "base"
    temperature, passes, [note] = asking.measured(judge)
    assert temperature > 0 and "all" in passes and "held-out questions" in note
    stamp = (run.path / "judge" / "stage.json").stat().st_mtime_ns
    loop.judge(run)  # once per run
    assert (run.path / "judge" / "stage.json").stat().st_mtime_ns == stamp

    rows, _ = qa.read_rows(tmp_path / "run" / "data" / "qa-8-0", config.max_failed, 0)
    taught, judging = (loop.share_of(config, rows, judge=side) for side in (False, True))
    assert {row.key for row in taught} | {row.key for row in judging} == {row.key for row in rows}
    assert not {row.key for row in taught} & {row.key for row in judging}
    told = config.model_copy(update={"gate": config.gate.model_copy(update={"data": "scenes:validation:2"})})
    assert loop.share_of(told, rows, judge=False) == rows  # the scenes' facts tell: nothing is halved
