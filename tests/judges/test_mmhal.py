"""MMHal: a judge's texts become ratings, and what is no rating is none."""

import json
import math
from pathlib import Path

import pytest

from captioner.errors import DataError
from captioner.judges.mmhal import mmhal, parse

TYPES = ["attribute", "counting", "attribute", "counting"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question_type": kind, "question": "?", "model_answer": ""} for kind in TYPES]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("It is right. Rating: 6, very informative", 6),
        ("**Rating**: 3", 3),
        ("Rating: **0**", 0),
        ("rating: 4/6. I repeat: Rating: 4", 4),
        ("Rating: 2 or Rating: 5", None),
        ("Rating: 10", None),
        ("Rating: 4.5", None),
        ("Rating: 7", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_ratings(text: str, rating: int | None) -> None:
    assert parse(text) == rating


def test_by_hand(folder: Path) -> None:
    """Ratings 6, 2 and 3; the fourth text is none, which the benchmark's code takes for 0."""
    scores = mmhal({"0": "Rating: 6", "1": "Rating: 2", "2": "Rating: 3", "3": "sorry"}, folder)
    assert scores.corpus() == {
        "score": pytest.approx(11 / 3),
        "hallucination_rate": pytest.approx(1 / 3),
        "rated": pytest.approx(3 / 4),
        "score attribute": pytest.approx(4.5),
        "score counting": pytest.approx(2),
    }
    assert math.isnan(scores.per_image()["3"]["score"])


def test_no_rating_at_all_is_undefined(folder: Path) -> None:
    got = mmhal({"1": "sorry"}, folder).corpus()
    assert math.isnan(got["score"])
    assert got["rated"] == 0


def test_places_and_files_are_checked(folder: Path) -> None:
    with pytest.raises(DataError, match="not in the annotation files: 4"):
        mmhal({"4": "Rating: 6"}, folder)
    (folder / "response_template.json").unlink()
    with pytest.raises(DataError, match=r"response_template\.json is missing[\s\S]*MMHal-Bench"):
        mmhal({"0": "Rating: 6"}, folder)
