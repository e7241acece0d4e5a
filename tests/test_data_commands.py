"""captioner data: training sets from what people have, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captioner.config import Config
from captioner.errors import ConfigError, DataError, Refused
from captioner.records import Failed
from captioner.runs import Shards
from captioner.sources.folder import read_folder
from loops.cli import main
from loops.data.make import questions
from tests import photographs

CHECKED = Path(__file__).parent.parent / "data" / "reformulation.jsonl"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Real photographs with the facts about them as captions, in a table as Excel saves it."""
    photographs.copy(tmp_path / "photos")
    lines = ["file;Caption"]
    lines += [f'{row["file_name"]};"{", ".join(row["facts"])}"' for row in photographs.read().values()]
    (tmp_path / "photos" / "captions.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    return tmp_path / "photos"


def test_questions_of_photographs(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "questions", str(photos), "--out", str(tmp_path / "set")]) == 0
    told = capsys.readouterr().out
    assert "18 images asked about, 0 failed" in told and "chance 50%" in told
    rows = read_folder(tmp_path / "set")
    assert len(rows) == 18 and all(row.questions for row in rows)
    answers = [question["answer"] for row in rows for question in row.questions or []]
    assert len(answers) > 150 and answers.count("yes") == answers.count("no")
    false = {key: set(row["false"]) for key, row in photographs.read().items()}
    yes = {
        (row.key, question["question"])
        for row in rows
        for question in row.questions or []
        if question["answer"] == "yes"
    }
    assert not any(text in false[key] for key, text in yes)  # what a person called false is never affirmed
    blind = json.loads((tmp_path / "set" / "blind.json").read_text())
    assert blind["blind_accuracy_before_balancing"] > 0.6 > blind["blind_accuracy"]


def test_questions_of_images_that_have_no_captions(photos: Path, tmp_path: Path) -> None:
    (photos / "captions.csv").unlink()
    with pytest.raises(DataError, match="no image has a caption"):
        questions(tmp_path / "run", Config(), str(photos), out=tmp_path / "set")
    (photos / "coffee.txt").write_text("a cup of coffee on a wooden table")
    with pytest.raises(Refused, match="17 of 18 failed"):
        questions(tmp_path / "run", Config(), str(photos), out=tmp_path / "set")
    assert {row.reason for row in Shards(tmp_path / "set" / "failed", Failed).read(0)} == {"no caption"}
    with pytest.raises(ConfigError, match="exists already"):
        questions(tmp_path / "run", Config(), str(photos), out=tmp_path / "set")


def test_reformulated_sets_and_their_fidelity(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in photos.glob("*.csv"):
        file.unlink()
    (photos / "coffee.txt").write_text("The image shows a lovely red cup, which stands on a wooden table.")
    command = ["data", "reformulate", str(photos), "--out", str(tmp_path / "set"), "--max_failed", "1"]
    assert main([*command, "--run", str(tmp_path / "run")]) == 0
    [row] = read_folder(tmp_path / "set")
    assert (
        row.caption == "red cup standing on a wooden table"
        or row.caption == "red cup, red cup standing on a wooden table"
    )
    capsys.readouterr()
    assert main(["data", "reformulate", str(CHECKED), "--check", "--run", str(tmp_path / "run")]) == 0
    assert "| 100 all | 315 of 315 | 0 |" in capsys.readouterr().out
    assert main(["data", "reformulate", str(photos)]) == 2  # neither --out nor --check
