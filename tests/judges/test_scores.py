"""The table behind every benchmark: what is undefined, intervals over images, paired differences."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from captioner.errors import DataError
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, difference, ratio, tabulate


def share(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {"share": ratio(sums["hits"], sums["tries"])}


def made(rows: dict[str, tuple[int, int]], name: str = "share") -> Scores:
    counts = {key: {"hits": hits, "tries": tries} for key, (hits, tries) in rows.items()}
    return tabulate(name, counts, share, columns=("hits", "tries"), annotated=9)


def test_the_corpus_value_weighs_tries_and_an_image_without_any_is_nan() -> None:
    scores = made({"a": (1, 1), "b": (0, 3), "c": (0, 0)})
    assert scores.corpus() == {"share": 0.25}
    each = scores.per_image()
    assert (each["a"], each["b"]) == ({"share": 1.0}, {"share": 0.0})
    assert math.isnan(each["c"]["share"])


def test_nothing_to_divide_by_is_nan_in_the_corpus_and_null_in_json() -> None:
    scores = made({"a": (0, 0), "b": (0, 0)})
    assert math.isnan(scores.corpus()["share"])
    assert scores.to_json()["metrics"]["share"] == {"value": None, "low": None, "high": None}
    assert (scores.to_json()["images"], scores.to_json()["annotated"]) == (2, 9)


def test_one_image_has_an_interval_of_no_width() -> None:
    interval = made({"a": (1, 4)}).intervals()["share"]
    assert (interval.value, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_the_interval_has_the_width_of_a_binomial_share() -> None:
    rows = {f"{i:03}": (int(i % 2 == 0), 1) for i in range(400)}
    interval = made(rows).intervals()["share"]
    expected = 1.96 * math.sqrt(0.25 / 400)
    assert interval.low == pytest.approx(0.5 - expected, abs=0.01)
    assert interval.high == pytest.approx(0.5 + expected, abs=0.01)


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    """One image better of 40 that differ much among themselves: pairing sees through that."""
    rng = np.random.default_rng(0)
    hits = {f"{i:02}": int(h) for i, h in enumerate(rng.integers(0, 10, 40))}
    before = made({key: (h, 10) for key, h in hits.items()})
    after = made({key: (h + 1, 10) for key, h in hits.items()})
    change = difference(before, after)["share"]
    assert (change.value, change.low, change.high) == pytest.approx((0.1, 0.1, 0.1))
    back = difference(after, before)["share"]
    assert back.value == pytest.approx(-0.1)


def test_captioners_of_different_images_or_benchmarks_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"different images[\s\S]*b, c"):
        difference(made({"a": (1, 1), "b": (1, 1)}), made({"a": (1, 1), "c": (1, 1)}))
    with pytest.raises(DataError, match="cannot be compared"):
        difference(made({"a": (1, 1)}), made({"a": (1, 1)}, "other"))


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = {"a": (1, 1), "b": (0, 3), "c": (2, 5)}
    one, other = made(rows), made(dict(reversed(rows.items())))
    assert one.keys == other.keys
    assert one.intervals() == other.intervals()


def test_no_caption_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no captions"):
        made({})
