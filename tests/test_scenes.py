"""Scenes: exact facts, balanced questions, splits that do not meet, a parser that knows its limits."""

import collections
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioner.errors import DataError
from captioner.lab import grid as scenes

indices = st.integers(0, 10_000)
splits = st.sampled_from(sorted(scenes.SPLITS))


@given(splits, indices)
@settings(max_examples=60, deadline=None)
def test_complete_caption_is_exact(split, index):
    scene = scenes.sample(split, index)
    judged = scenes.judge(scenes.shorthand(scene), scene.to_json())
    assert (judged.false, judged.unparsed, judged.duplicates) == (0, 0, 0)
    assert judged.true == judged.recalled == judged.facts == len(scenes.statements(scene))


@given(splits, indices)
@example("sft", 7323)  # every object would be left out
@settings(max_examples=60, deadline=None)
def test_prose_says_nothing_false(split, index):
    scene = scenes.sample(split, index)
    judged = scenes.judge(scenes.prose(scene, index), scene, prose=True)
    assert judged.false == 0
    assert 0 < judged.recalled <= judged.facts


@given(indices, st.sampled_from(["northwest", "center", "southeast"]))
@settings(max_examples=40, deadline=None)
def test_each_injected_error_counts_once(index, position):
    scene = scenes.sample("test", index)
    thing = scene.at(position)
    wrong = f"{position} {'small' if thing and thing.size == 'large' else 'large' if thing else 'star'}"
    caption = scenes.shorthand(scene) + ", " + wrong
    judged = scenes.judge(caption, scene)
    assert judged.false == 1
    assert judged.recalled == judged.facts
    assert scenes.judge(caption + ", " + wrong, scene).false == 1  # repeated: a duplicate, not a second error


def test_unparsed_statements_are_neither_true_nor_false():
    scene = scenes.sample("test", 1)
    judged = scenes.judge("a lovely mood, northwest northwest, northwest", scene)
    assert (judged.true, judged.false, judged.unparsed) == (0, 0, 3)


@pytest.mark.parametrize(
    ("statement", "canonical", "kind"),
    [
        ("northwest red", "northwest red", "color"),
        ("The northwest is red.", "northwest red", "color"),
        ("center a star", "center star", "shape"),
        ("a gray background", "gray background", "background"),
        ("circle left of a star", "circle left of star", "relation"),
        ("north bar", "north bar", "mark"),
        ("northwest", None, ""),
        ("red northwest", None, ""),
        ("northwest red red", None, ""),
    ],
)
def test_parser(statement, canonical, kind):
    assert scenes.normalise(statement) == canonical
    assert scenes.kind_of(statement) == kind


@given(splits, indices)
@settings(max_examples=60, deadline=None)
def test_questions_are_executed_and_balanced(split, index):
    scene = scenes.sample(split, index)
    counts = collections.Counter()
    for row in scenes.questions(scene, index):
        if row["stratum"] == "open":
            continue
        says = None if row["stratum"] == "malformed" else row["answer"] == "yes"
        assert scenes.execute(row["question"], scene) is says
        assert (row["stratum"] == "positive") is (row["answer"] == "yes")
        counts[row["kind"], row["answer"]] += 1
    for kind in scenes.KINDS:
        assert counts[kind, "yes"] == counts[kind, "no"]


def test_all_strata_occur():
    strata = {row["stratum"] for i in range(50) for row in scenes.questions(scenes.sample("qa", i), i)}
    assert strata == {"positive", "random", "popular", "adversarial", "swap", "malformed", "open"}


def test_close_ups_say_nothing_of_size_and_stand_in_the_corners():
    drawn = [scenes.sample("train", i) for i in range(100)]
    close = [scene for scene in drawn if scene.close]
    assert 30 < len(close) < 70 and not any(scenes.sample("test", i).close for i in range(50))
    for i, scene in enumerate(close):
        assert {thing.position for thing in scene.objects} <= {scenes.POSITIONS[c] for c in scenes.CORNERS}
        asked = scenes.questions(scene, i)
        texts = [scenes.shorthand(scene), scenes.prose(scene, i)]
        assert not any(size in text for text in texts for size in scenes.RADIUS_PX)
        assert all(row["kind"] != "size" for row in asked)
        assert scenes.draw(scene, i).size == (scenes.SIZE_PX, scenes.SIZE_PX)


def test_splits_do_not_share_scenes_and_do_not_change():
    seen = {name: {scenes.sample(name, i).to_json() for i in range(300)} for name in scenes.SPLITS}
    names = sorted(seen)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not seen[a] & seen[b], (a, b)
    assert scenes.sample("test", 5) == scenes.sample("test", 5)
    assert scenes.sample("test", 5) != scenes.sample("test", 5, seed=1)


def test_planted_correlation_is_broken_in_the_test_split():
    def usual(split):
        things = [thing for i in range(400) for thing in scenes.sample(split, i).objects]
        return np.mean([thing.mark == scenes.USUAL_MARK[thing.shape] for thing in things])

    assert usual("train") > 0.55 and usual("sft") > 0.75
    assert usual("test") < 0.4 and usual("qa") < 0.4


def test_held_out_and_rare_combinations():
    def groups(split):
        counts = collections.Counter(
            scenes.group_of(t) for i in range(600) for t in scenes.sample(split, i).objects
        )
        return {name: n / counts.total() for name, n in counts.items()}

    assert "held_out" not in groups("train") and "held_out" not in groups("qa")
    assert groups("sft").keys() == {"common"}
    assert 0 < groups("train")["rare"] < 0.03 < groups("test")["rare"]
    assert groups("test")["held_out"] > 0.03


def test_marks_change_few_pixels_and_only_there():
    thing = scenes.Thing("center", "square", "blue", "large", "dot")
    with_mark = np.asarray(scenes.draw(scenes.Scene("white", (thing,)), 3)).astype(int)
    bare = np.asarray(
        scenes.draw(scenes.Scene("white", (scenes.Thing("center", "square", "blue", "large", None),)), 3)
    )
    changed = np.abs(with_mark - bare).max(-1) > 30
    rows, columns = np.where(changed)
    assert 8 <= max(np.ptp(rows), np.ptp(columns)) + 3 <= 14  # a few pixels of the 128
    assert changed.sum() < 70


def test_written_folder_is_read_by_datasets(tmp_path):
    import datasets

    scenes.write("test", 5, tmp_path / "scenes", offset=7)
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "scenes"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 5
    assert table[0]["image"].size == (128, 128)
    assert json.loads(table[0]["facts"]) == json.loads(scenes.sample("test", 7).to_json())
    assert {"text", "prose", "questions"} <= set(table.column_names)


def test_unknown_split_and_broken_facts():
    with pytest.raises(DataError, match="no split 'training'"):
        list(scenes.rows("training", 1))
    with pytest.raises(DataError, match="not the facts"):
        scenes.Scene.from_json('{"background": 1}')
