"""POPE: scores by split, with "yes" as the positive class and its known scoring bugs fixed."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import DataError
from captioner.judges.pope import parse, pope

LABELS = ["yes", "no", "yes", "no", "yes", "no"]


def write(folder: Path, split: str, labels: list[str]) -> None:
    rows = [
        {
            "question_id": i,
            "image": f"{(i - 1) // 2}.jpg",
            "text": "Is there a cat in the image?",
            "label": label,
        }
        for i, label in enumerate(labels, 1)
    ]
    (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("random", "popular"):
        write(tmp_path, split, LABELS)
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, there is no doubt.", "yes"),
        ("No, there is not. Yes!", "no"),
        ("There isn't a cat", "no"),
        ("There is not any", "no"),
        ("A cat sits here", ""),  # POPE's own code takes this, and anything else, for yes
        ("another notebook", ""),
        ("", ""),
    ],
)
def test_answers(answer: str, said: str) -> None:
    assert parse(answer) == said


def test_by_hand(folder: Path) -> None:
    """yes: right, right, malformed; no: right, wrong, and one question without an answer."""
    answers = {
        "random/1": "yes",
        "random/3": "Yes.",
        "random/5": "maybe",
        "random/2": "no",
        "random/4": "yes",
    }
    scores = pope(answers, folder)
    got = {name.removeprefix("random "): value for name, value in scores.corpus().items() if "random" in name}
    assert got == {
        "accuracy": pytest.approx(3 / 5),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "yes_ratio": pytest.approx(3 / 5),
        "malformed": pytest.approx(1 / 5),
        "answered": pytest.approx(5 / 6),
    }
    assert math.isnan(scores.corpus()["popular accuracy"])  # nothing was asked
    assert scores.keys == ("0.jpg", "1.jpg", "2.jpg")
    each = scores.per_image()
    assert each["0.jpg"]["random accuracy"] == 1
    assert each["1.jpg"]["random precision"] == 0.5


def test_the_yes_ratio_is_of_the_answers_not_of_the_truth(folder: Path) -> None:
    always = {f"random/{i}": "yes" for i in range(1, 7)}
    got = pope(always, folder).corpus()
    assert (got["random yes_ratio"], got["random accuracy"], got["random recall"]) == (1, 0.5, 1)
    never = pope(dict.fromkeys(always, "no"), folder).corpus()
    assert (never["random yes_ratio"], never["random f1"]) == (0, 0)
    assert math.isnan(never["random precision"])


def test_splits_are_kept_apart_and_only_their_files_are_needed(folder: Path) -> None:
    got = pope({"random/1": "yes", "popular/2": "yes"}, folder).corpus()
    assert (got["random accuracy"], got["popular accuracy"]) == (1, 0)
    with pytest.raises(DataError) as caught:
        pope({"adversarial/1": "yes"}, folder)
    assert "adversarial" in caught.value.what
    assert "AoiDragon/POPE" in caught.value.fix
    assert str(folder) in caught.value.fix


def test_answers_to_unknown_questions_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"2 answers are to unknown questions: 7, random/99"):
        pope({"random/1": "yes", "random/99": "no", "7": "yes"}, folder)
    with pytest.raises(DataError, match="no captions"):
        pope({}, folder)


def test_files_of_another_form_are_an_error(folder: Path) -> None:
    path = folder / "coco_pope_random.json"
    path.write_text(path.read_text() + '\n{"question_id": 7, "image": "x", "text": "?", "label": "maybe"}')
    with pytest.raises(DataError, match="line 7"):
        pope({"random/1": "yes"}, folder)
    (folder / "other_pope_popular.json").write_text("")
    with pytest.raises(DataError, match="2 files match"):
        pope({"popular/1": "yes"}, folder)
    write(folder, "random", LABELS)
    path.write_text(path.read_text() + "\n" + path.read_text().splitlines()[0])
    with pytest.raises(DataError, match="two questions have the number random/1"):
        pope({"random/1": "yes"}, folder)


@settings(max_examples=50, deadline=None)
@given(replies=st.lists(st.sampled_from(["yes", "no", "hm", None]), min_size=6, max_size=6), data=st.data())
def test_ranges_and_order(
    tmp_path_factory: pytest.TempPathFactory, replies: list[str | None], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("pope")
    write(folder, "random", LABELS)
    answers = {f"random/{i}": reply for i, reply in enumerate(replies, 1) if reply is not None}
    if not answers:
        return
    got = pope(answers, folder).corpus()
    assert all(math.isnan(value) or 0 <= value <= 1 for value in got.values())
    precision, recall, f1 = (got[f"random {name}"] for name in ("precision", "recall", "f1"))
    if precision + recall > 0:
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    turned = {key: answers[key] for key in data.draw(st.permutations(sorted(answers)))}
    assert str(pope(turned, folder).corpus()) == str(got)
