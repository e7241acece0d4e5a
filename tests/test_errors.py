"""Error messages read as the snapshot has them: what is wrong, where, and the fix."""

import json
from pathlib import Path

import pytest

from captioner.config import Config
from captioner.runs import Run
from loops import cli
from tests import snapshots

COMMANDS = [
    "evaluat",
    "sft --redu",
    "dpo --lr 1e-4",
    "sft --sft.training.steps 3",
    "sft --sft.lr 1e-4",
    "sft --dpo.beta",
    "sft --sft.training.max_steps 0",
    "sft --sft.training 3",
    "sft --sft.tuning.type lora --sft.tuning.vision_width 3",
    "sft --golden.keep 0.2 --golden.drop 0.4",
    "sft wrong.toml",
    "sft broken.toml",
    "sft no.toml",
    "sft --model.path nowhere",
    "sft --sft.data scenes:tset:5",
    "sft --sft.data scenes:test:many",
    "sft --sft.data photos?cuont=5",
    "sft --run photos",
    "qa --round 0",
    "qa --run runs/none",
    "golden",
    "golden --rethreshold 0.7",
    "golden --rethreshold 0.7 --redo",
    "golden --round 2",
    "dpo",
    "iterate --rounds 3-1",
    "iterate --round 2",
    "evaluate --round 1",
    "evaluate --checkpoint nowhere",
    "report --run runs/none",
    "caption photos",
    "caption photos --out out --format csv",
    "caption nowhere --out out --checkpoint scenes-base",
    "caption photos --out out --checkpoint nowhere",
    "caption photos --out out --checkpoint scenes-base --caption.best_of 2",
]


def test_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"no image")
    (tmp_path / "wrong.toml").write_text("[dpo]\nbetta = 1\n")
    (tmp_path / "broken.toml").write_text("[dpo\n")
    run = Run.open(tmp_path / "runs/default", Config())
    run.captioner_dir(0).mkdir(parents=True)
    run.stage_dir("sft").joinpath("stage.json").write_text(json.dumps({"section": {}, "inputs": {}}))
    shown = []
    for command in COMMANDS:
        code = cli.main(command.split())
        said = capsys.readouterr().err.replace(str(tmp_path), ".")
        assert code in (2, 3), command
        shown.append(f"$ captioner {command}\n{said}[exit {code}]\n")
    snapshots.compare("errors", "\n".join(shown))
