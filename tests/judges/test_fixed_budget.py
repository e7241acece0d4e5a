"""Questions answered from captions of equal length, by a reader that looks words up."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import DataError
from captioner.judges.fixed_budget import SILENT, CaptionQuestion, cut, fixed_budget
from captioner.judges.scores import Scores

QUESTIONS = {
    "nat_1": [
        {
            "question": "What colour is the cup?",
            "choices": ["red", "blue", "green", "black"],
            "answer": "red",
        },
        {"question": "Is there a dog?", "choices": ["Yes", "No"], "answer": "Yes"},
    ],
    "nat_2": [{"question": "What stands left?", "choices": ["lamp", "chair"], "answer": "chair"}],
}


class Reader:
    """Answers with the only choice that the caption names, yes/no by its last word, else "cannot answer"."""

    def __init__(self, fails: Sequence[str] = ()):
        self.asked: list[CaptionQuestion] = []
        self.fails = fails

    def answer(self, asked: Sequence[CaptionQuestion]) -> list[int | None]:
        self.asked += asked
        return [None if one.question in self.fails else self.one(one) for one in asked]

    def one(self, one: CaptionQuestion) -> int | None:
        if "Yes" in one.choices:
            noun = one.question.rstrip("?").split()[-1]
            return one.choices.index("Yes" if noun in one.caption else "No")
        named = [i for i, choice in enumerate(one.choices) if choice in one.caption]
        return named[0] if len(named) == 1 else one.choices.index(SILENT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [json.dumps({"id": key, "questions": questions}) for key, questions in QUESTIONS.items()]
    (tmp_path / "natural.jsonl").write_text("\n".join(rows))
    return tmp_path


def at(scores: Scores, budget: int) -> dict[str, float]:
    end = f" at {budget}"
    return {k.removesuffix(end): v for k, v in scores.corpus().items() if k.endswith(end)}


@pytest.mark.parametrize(
    ("caption", "budget", "kept"),
    [
        ("a red cup, a dog, a tree", 3, "a red cup"),
        ("a red cup, a dog, a tree", 5, "a red cup, a dog"),
        ("a red cup, a dog, a tree", 4, "a red cup"),  # whole statements only
        ("a red cup, a dog, a tree", 99, "a red cup, a dog, a tree"),
        ("A man runs. A dog follows him.", 6, "A man runs."),
        ("A man runs. A dog follows him.", 7, "A man runs. A dog follows him."),
        ("one very long statement without any end", 3, "one very long"),
        ('a sign that says "stop, now", a car', 6, 'a sign that says "stop, now"'),
        ("a dog", 0, ""),
        ("", 50, ""),
        (" , ;", 50, ", ;"),
    ],
)
def test_cutting(caption: str, budget: int, kept: str) -> None:
    assert cut(caption, budget) == kept


@settings(deadline=None)
@given(st.text(alphabet="ab ,.;\n\"'", max_size=60), st.integers(0, 12))
def test_a_cut_caption_is_a_beginning_within_the_budget(caption: str, budget: int) -> None:
    kept = cut(caption, budget)
    assert len(kept.split()) <= budget
    assert " ".join(caption.split()).startswith(" ".join(kept.split()))


def test_by_hand(folder: Path) -> None:
    """At 3 words: red is right, the dog is not seen (wrong), nothing of the second image (1/2 + 0.05).
    At 50 words: all of the first, and a wrong lamp."""
    captions = {"nat_1": "a red cup, a dog", "nat_2": "four words and more, a lamp"}
    scores = fixed_budget(captions, folder, answerer=Reader(), budgets=(3, 50))
    assert at(scores, 3) == {
        "score": pytest.approx((1 + 0 + 0.55) / 3),
        "accuracy": pytest.approx(1 / 3),
        "silent": pytest.approx(1 / 3),
        "answered": 1,
        "words": 3,
    }
    assert at(scores, 50) == {
        "score": pytest.approx(2 / 3),
        "accuracy": pytest.approx(2 / 3),
        "silent": 0,
        "answered": 1,
        "words": pytest.approx((5 + 6) / 2),
    }
    assert scores.per_image()["nat_2"]["score at 3"] == pytest.approx(0.55)


def test_a_question_without_an_answer_is_left_out_and_counted(folder: Path) -> None:
    captions = {"nat_1": "a red cup, a dog", "nat_2": "a chair"}
    reader = Reader(fails=["What stands left?"])
    scores = fixed_budget(captions, folder, answerer=reader, budgets=(50,))
    assert at(scores, 50)["accuracy"] == 1
    assert at(scores, 50)["answered"] == pytest.approx(2 / 3)
    assert math.isnan(scores.per_image()["nat_2"]["accuracy at 50"])


def test_the_reader_sees_what_it_would_among_all_images(folder: Path) -> None:
    """Choices are shuffled, but by the question: who evaluates a part of the images asks the same."""
    whole, part = Reader(), Reader()
    fixed_budget({"nat_1": "x", "nat_2": "y"}, folder, answerer=whole)
    fixed_budget({"nat_2": "y"}, folder, answerer=part)
    assert [one for one in whole.asked if one.caption == "y"] == part.asked
    assert sorted(part.asked[0].choices) == sorted(["lamp", "chair", SILENT])
    closed = next(one for one in whole.asked if one.question == "Is there a dog?")
    assert SILENT not in closed.choices
    shuffled = Reader()
    fixed_budget({"nat_1": "x", "nat_2": "y"}, folder, answerer=shuffled, seed=3)
    assert [set(one.choices) for one in shuffled.asked] == [set(one.choices) for one in whole.asked]
    assert shuffled.asked != whole.asked


def test_without_a_caption_only_a_guess_is_left(folder: Path) -> None:
    scores = fixed_budget({"nat_1": "a red cup, a dog"}, folder, answerer=Reader(), budgets=(0,))
    assert at(scores, 0)["words"] == 0
    assert at(scores, 0)["accuracy"] == 0


def test_parquet_is_read_without_its_images(tmp_path: Path) -> None:
    rows = [{"id": key, "questions": questions, "image": b"x" * 9} for key, questions in QUESTIONS.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "natural-00000.parquet")
    scores = fixed_budget({"nat_1": "a red cup, a dog"}, tmp_path, answerer=Reader(), budgets=(50,))
    assert at(scores, 50)["accuracy"] == 1
    assert scores.annotated == 2
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "natural-00000.parquet")
    with pytest.raises(DataError, match="columns id and questions"):
        fixed_budget({"a": "x"}, tmp_path, answerer=Reader())


def test_files_and_answers_are_checked(folder: Path) -> None:
    with pytest.raises(DataError, match="nat_9"):
        fixed_budget({"nat_9": "x"}, folder, answerer=Reader())

    class Deaf(Reader):
        def answer(self, asked: Sequence[CaptionQuestion]) -> list[int | None]:
            return []

    with pytest.raises(DataError, match="0 answers came back"):
        fixed_budget({"nat_1": "x"}, folder, answerer=Deaf())
    path = folder / "natural.jsonl"
    path.write_text(
        json.dumps({"id": "a", "questions": [{"question": "?", "choices": ["b"], "answer": "b"}]})
    )
    with pytest.raises(DataError, match="not one of at least two choices"):
        fixed_budget({"a": "x"}, folder, answerer=Reader())
    path.unlink()
    with pytest.raises(DataError, match="CaptionQA"):
        fixed_budget({"a": "x"}, folder, answerer=Reader())
