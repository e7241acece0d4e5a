"""The demo end to end on a random tiny model: every stage runs, stops where it should, and resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from captioner import config as configs
from captioner.config import Config
from captioner.errors import Refused
from captioner.judges import metrics
from captioner.lab import grid as scenes
from captioner.runs import Run
from loops import demo, iterate
from tests import tiny

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1}


def small(home: Path) -> dict[str, Any]:
    """Settings of every stage for a random model. It says nothing in the scenes' language, so its round has
    images of which nothing is known."""
    scenes.write("round", 6, home / "images")
    (home / "images" / "metadata.parquet").unlink()
    tiny.tiny_checkpoint(home / "tiny", seed=1)
    return {
        "model": {"path": str(home / "tiny"), "device": "cpu"},
        "max_failed": 1.0,
        "sft": {"data": ["scenes:sft:8"], "validation": "scenes:validation:4", "training": TRAINING},
        "qa": {
            "data": "scenes:qa:8",
            "questions_per_image": 4,
            "tuning": {"type": "adapters", "vision_width": 0, "language_width": 8},
            "training": TRAINING,
        },
        "golden": {
            "images": str(home / "images"),
            "samples": 3,
            "sampling": {"max_tokens": 24},
            "max_questions": 8,
            # a random verifier would be refused, and knows nothing
            **{"min_accuracy": 0.0, "min_kind_accuracy": 0.0, "abstain": "keep"},
        },
        # hardly a sample of a random model ends by itself
        "pairs": {"min_refuted": 0, "max_dropped": 1.0, "max_length_ratio": 100.0},
        "dpo": {"golden_sft_steps": 2, "training": TRAINING, "alarms": {"images": 2, "max_tokens": 8}},
        "evaluate": {"data": "scenes:test:4", "max_tokens": 24, "bootstrap": 100},
        "gate": {"data": "scenes:validation:4", "max_recall_loss": 1.0, "min_ended": 0.0},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("demo")
    config = Config.model_validate(small(home))
    demo.demo(home / "run", config, gpus=1)
    return Run(home / "run", config)


@pytest.mark.slow
def test_demo_runs_and_resumes(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = made.path
    stages = {path: path.stat().st_mtime_ns for path in run_dir.rglob("stage.json")}
    demo.demo(made, made.config, gpus=1)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("stage.json")} == stages
    out = capsys.readouterr().out
    for wanted in ("-- sft:", "-- round 1:", "-- evaluation:", "-- report:", "demo done in", "Captioner"):
        assert wanted in out, wanted
    names = [c["name"] for c in json.loads((run_dir / "evaluation.json").read_text())["captioners"]]
    assert names[:3] in (["base", "SFT", "round 1"], ["base", "SFT", "round 1 (refused)"])
    assert len((run_dir / "captions" / "captions.jsonl").read_text().splitlines()) == 4
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")


CHILD = """
import sys
from pathlib import Path
from captioner.config import Config
from loops import demo
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
demo.demo(sys.argv[2], config, gpus=1)
"""


KILLS = 6


def files(run: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(run))  # which bears with folders that vanish


def rows(run: Path) -> dict[str, object]:
    """Every row that a run holds, by file."""
    found: dict[str, object] = {
        str(path.relative_to(run)): pq.read_table(path).to_pylist()
        for path in run.rglob("*.parquet")
        if path.relative_to(run).parts[0] != "data"
    }
    lines = (run / "captions" / "captions.jsonl").read_text().splitlines()
    return found | {"captions": [json.loads(line)["caption"] for line in lines]}


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_rows(made: Run, tmp_path: Path) -> None:
    """kill -9 of the whole process group at random moments, again and again, then the same command.

    A moment is a number of files that the run holds, for no clock tells how fast a machine is, and up to a
    second of sleep after it, so that it also falls in the middle of the work on the next file.
    """
    (tmp_path / "config.json").write_text(made.config.model_dump_json())
    words = [sys.executable, "-c", CHILD, str(tmp_path / "config.json"), str(tmp_path / "run")]
    rng, kills = random.Random(time.time_ns()), 0
    moments = sorted(rng.sample(range(1, files(made.path) * 9 // 10), KILLS))
    while True:
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
        while child.poll() is None and not (moments and files(tmp_path / "run") >= moments[0]):
            time.sleep(0.02)
        if child.poll() is not None:
            break
        time.sleep(rng.uniform(0, 1))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        kills += 1
        moments = [moment for moment in moments if moment > files(tmp_path / "run")]
    assert child.returncode == 0 and kills
    undisturbed = rows(made.path)
    assert rows(tmp_path / "run") == undisturbed


def test_table_over_seeds() -> None:
    """Means over seeds, paired differences, and the step from SFT to the last captioner."""

    def row(key: str, true: int, false: int) -> metrics.Counts:
        values = dict.fromkeys(metrics.COLUMNS, 0) | {
            "captions": 1,
            "statements": true + false,
            "true": true,
            "false": false,
            "facts": 10,
            "recalled": true,
            "ended": 1,
            "tokens": 5,
        }
        return metrics.Counts(key, True, tuple(values.values()))

    def captioner(true: int, false: int) -> list[metrics.Counts]:
        return [row(str(i), true, false) for i in range(6)]

    seeds = [
        [captioner(4, 4), captioner(5, 5), captioner(6, 4), captioner(8, 2)],
        [captioner(4, 4), captioner(6, 4), captioner(7, 3), captioner(9, 1)],
    ]
    pooled = demo._pooled(["base", "SFT", "round 1", "round 2"], seeds, resamples=100)
    hallucinated = [one["metrics"]["hallucinated"]["value"] for one in pooled["captioners"]]
    assert hallucinated == pytest.approx([0.5, 0.45, 0.35, 0.15])
    last = pooled["differences"][-1]
    assert (last["from"], last["to"]) == ("SFT", "round 2")
    assert last["metrics"]["hallucinated"]["value"] == pytest.approx(-0.3)
    assert last["metrics"]["recall"]["value"] == pytest.approx(0.3)


def test_demo_goes_on_after_a_refused_round(
    made: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def refuse(run: object, number: int, **flags: object) -> None:
        asked.append(number)
        home = made.path / f"round-{number}"
        (home / "gate.json").write_text('{"promoted": false, "reasons": []}')
        raise Refused(f"the gate refused round {number}")

    monkeypatch.setattr(iterate, "run_round", refuse)
    gate = made.path / "round-1" / "gate.json"
    before = gate.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loops.caption.caption", lambda *args, **flags: None)
        demo.demo(made, made.config, gpus=1)
    gate.write_text(before)
    assert asked == [1]
    assert "the demo goes on with" in capsys.readouterr().out


def test_demo_toml_is_a_config() -> None:
    assert configs.load(demo.TOML).model.path == "scenes-base"


def test_the_table_shows_what_needs_no_training(made: Run) -> None:
    """Deleting the kinds that the verifier distrusts is a row of its own, judged like the others."""
    decision = made.path / "round-1" / "verifier.json"
    decision.write_text(json.dumps({"distrusted": {"mark": "at chance"}}))
    found = demo.baselines(made)
    assert list(found) == ["base, mark statements deleted", "SFT, mark statements deleted"]
    assert [len(rows) for rows in found.values()] == [4, 4]
    scene = scenes.sample("test", 3)
    prose, said = scenes.prose(scene, 3), scenes.shorthand(scene)
    for text, is_prose in ((prose, True), (said, False)):
        kept = demo.without(text, is_prose, {"mark", "relation"})
        kinds = {scenes.kind_of(part) for part in kept.split(", ")}
        assert kinds and not kinds & {"mark", "relation"}
        assert scenes.judge(kept, scene).false == 0
    decision.unlink()
    assert demo.baselines(made) == {}
