"""DCScore's arithmetic on units with verdicts."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import DataError
from captioner.judges.dcscore import Unit, dcscore, precision_recall_f1


def unit(matched: int | None, true: bool, relevant: bool = True) -> Unit:
    return Unit(fact="x", matched_oracle_id=matched, verification=true, relevance=relevant)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"image_name": "a.jpg", "oracle_caption": "", "oracle_facts": ["1", "2", "3", "4"]}]
    rows.append({"image_name": "b.jpg", "oracle_caption": "", "oracle_facts": ["1", "2"]})
    rows.append({"image_name": "none.jpg", "oracle_caption": "", "oracle_facts": []})
    (tmp_path / "human_annotated_oracle_facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_by_hand() -> None:
    """Two true units share fact 0, one true unit is extra, a matched and an unmatched one are false."""
    units = [unit(0, True), unit(0, True), unit(None, True), unit(1, False), unit(None, False)]
    precision, recall, f1 = precision_recall_f1(units, 4)
    assert precision == pytest.approx(3 / 5)
    assert recall == pytest.approx((1 / 2 + 1 / 2 + 1) / (4 + 1))
    assert f1 == pytest.approx(2 * 0.6 * 0.4 / (0.6 + 0.4))


def test_a_false_twin_takes_half_the_credit() -> None:
    assert precision_recall_f1([unit(0, True), unit(0, False)], 2)[:2] == (0.5, 0.25)


def test_an_irrelevant_twin_takes_half_the_credit_among_the_relevant_too(folder: Path) -> None:
    """As in the benchmark's code: P 1, and half a fact of two is recalled."""
    scores = dcscore({"b.jpg": [unit(0, True), unit(0, True, relevant=False)]}, folder)
    assert scores.corpus()["f1_relevant"] == pytest.approx(2 * (1 / 4) / (5 / 4))


def test_silence_has_no_precision_and_no_recall() -> None:
    precision, recall, f1 = precision_recall_f1([], 4)
    assert math.isnan(precision)
    assert (recall, f1) == (0, 0)
    assert all(map(math.isnan, precision_recall_f1([], 0)))
    assert precision_recall_f1([unit(None, True)], 0) == (1, 1, 1)


def test_the_corpus_is_the_mean_over_images(folder: Path) -> None:
    """An irrelevant unit is out of the second F1: P 1/2, R 1/4 of all; P 1, R 1/4 of the relevant."""
    a = [unit(0, True), unit(None, False, relevant=False)]
    scores = dcscore({"a.jpg": a, "b.jpg": []}, folder)
    each = scores.per_image()["a.jpg"]
    assert each["f1"] == pytest.approx(2 * (1 / 2) * (1 / 4) / (3 / 4))
    assert each["f1_relevant"] == pytest.approx(2 * (1 / 4) / (5 / 4))
    assert each["dcscore"] == pytest.approx((1 / 3 + 2 / 5) / 2)
    got = scores.corpus()
    assert got["precision"] == pytest.approx(1 / 2)  # b.jpg has none
    assert got["recall"] == pytest.approx(1 / 8)
    assert got["dcscore"] == pytest.approx((1 / 3 + 2 / 5) / 4)
    assert scores.annotated == 3


def test_an_image_without_facts_is_left_out_of_the_mean(folder: Path) -> None:
    scores = dcscore({"none.jpg": [unit(None, False)], "b.jpg": [unit(0, True)]}, folder)
    assert math.isnan(scores.per_image()["none.jpg"]["recall"])
    assert scores.corpus()["recall"] == 0.5


def test_images_matches_and_files_are_checked(folder: Path) -> None:
    with pytest.raises(DataError, match=r"c\.jpg"):
        dcscore({"c.jpg": []}, folder)
    with pytest.raises(DataError, match=r"outside 0 to 1[\s\S]*b\.jpg"):
        dcscore({"b.jpg": [unit(2, True)]}, folder)
    (folder / "human_annotated_oracle_facts.jsonl").unlink()
    with pytest.raises(DataError, match="DeCapBench"):
        dcscore({"b.jpg": []}, folder)


UNITS = st.lists(st.builds(unit, st.none() | st.integers(0, 3), st.booleans(), st.booleans()), max_size=8)


@settings(deadline=None)
@given(units=UNITS, data=st.data())
def test_ranges_and_order(units: list[Unit], data: st.DataObject) -> None:
    got = precision_recall_f1(units, 4)
    assert all(math.isnan(value) or 0 <= value <= 1 + 1e-12 for value in got)
    turned = precision_recall_f1(data.draw(st.permutations(units)), 4)
    assert turned == pytest.approx(got, nan_ok=True)
