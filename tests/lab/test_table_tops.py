"""Table tops: exact facts, questions executed and balanced, splits that never meet, a strict parser."""

import collections
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import views
from captioner.config import ViewsConfig
from captioner.errors import DataError
from captioner.lab import scenes
from captioner.lab.scenes import language, things
from captioner.lab.scenes import pictures as drawing
from captioner.lab.scenes.judging import stream_of

indices = st.integers(0, 10_000)
splits = st.sampled_from(sorted(scenes.SPLITS))
SCENE = scenes.Scene(
    "brick",
    (
        scenes.Thing("teapot", "top left", "large", "heart"),
        scenes.Thing("lemon", "top right", "small", None),
        scenes.Thing("lemon", "bottom", "small", None),
        scenes.Thing("cup", "bottom right", "large", "star"),
    ),
)
FACTS = [
    "brick background",
    "teapot top left", "large teapot", "heart sticker on teapot",
    "two lemons", "lemon top right", "lemon bottom", "small lemon",
    "cup bottom right", "large cup", "star sticker on cup",
]  # fmt: skip


def test_the_facts_of_a_scene():
    assert scenes.statements(SCENE) == FACTS
    assert scenes.relations(SCENE) == ["teapot left of cup", "teapot above cup"]


@pytest.mark.parametrize(
    ("statement", "truth"),
    [
        ("teapot left of lemon", True),  # of both
        ("lemon left of cup", False),  # of one only: the other stands right above it
        ("cup left of teapot", False),
        ("teapot above kite", False),
        ("lemon above cup", False),
        ("teapot top", False),
        ("cup top right", False),
        ("small teapot", False),
        ("large kite", False),
        ("heart sticker on cup", False),
        ("two teapots", False),
        ("two kites", False),
        ("grass background", False),
        ("a lovely mood", None),
    ],
)
def test_what_statements_mean(statement, truth):
    assert scenes.execute(statement, SCENE) is truth


@given(splits, indices)
@settings(max_examples=25, deadline=None)
def test_the_complete_caption_is_exact(split, index):
    scene = scenes.sample(split, index)
    judged = scenes.judge(scenes.shorthand(scene), scene.to_json())
    assert (judged.false, judged.unparsed, judged.duplicates) == (0, 0, 0)
    assert judged.true == judged.recalled == judged.facts == len(scenes.statements(scene))


@given(splits, indices, st.sampled_from([0.1, 0.4, 0.9]))
@settings(max_examples=25, deadline=None)
def test_partial_captions_say_nothing_false(split, index, named):
    scene = scenes.sample(split, index)
    for text, prose in ((scenes.shorthand(scene, index, named), False), (scenes.prose(scene, index), True)):
        judged = scenes.judge(text, scene, prose=prose)
        assert (judged.false, judged.unparsed) == (0, 0), text  # prose may repeat what is true of two
        assert judged.true > 0


def test_partial_captions_name_the_share_they_should_in_any_order():
    pairs = [(s, scenes.judge(scenes.shorthand(s, i, 0.4), s)) for i, s in _some("train", 200)]
    share = sum(j.recalled for _, j in pairs) / sum(j.facts for _, j in pairs)
    assert 0.37 < share < 0.45
    first = collections.Counter(
        scenes.kind_of(scenes.parse(scenes.shorthand(s, i, 0.4))[0]) for i, s in _some("train", 200)
    )
    assert set(first) >= {"object", "size", "sticker", "background", "relation"}


def _some(split, count, seed=0):
    return [(i, scenes.sample(split, i, seed)) for i in range(count)]


def test_judge_counts_errors_once_and_by_kind():
    judged = scenes.judge("teapot top left, small cup, small cup, nonsense, heart sticker on kite", SCENE)
    assert (judged.true, judged.false, judged.unparsed, judged.duplicates) == (1, 2, 1, 1)
    assert judged.by_kind == {"object": (1, 0), "size": (0, 1), "sticker": (0, 1)}
    assert judged.precision_by_size == {"large": (1, 2)}  # a kite is not there: it has no size
    assert judged.recall_by_kind["object"] == (1, 4)
    assert judged.recall_by_size == {"large": (1, 6), "small": (0, 4)}
    assert sum(total for _, total in judged.recall_by_group.values()) == 10


@pytest.mark.parametrize(
    ("statement", "canonical", "kind"),
    [
        ("Teapot top left.", "teapot top left", "object"),
        ("the teapot is at the top left", "teapot top left", "object"),
        ("the teapot is large", "large teapot", "size"),
        ("a heart sticker on the teapot", "heart sticker on teapot", "sticker"),
        ("two lemons", "two lemons", "count"),
        ("teapot is left of a cup", "teapot left of cup", "relation"),
        ("gray background", "gray background", "background"),
        ("teapot", None, ""),
        ("two lemon", None, ""),
        ("teapot top top", None, ""),
        ("large small teapot", None, ""),
    ],
)
def test_parser(statement, canonical, kind):
    assert scenes.normalise(statement) == canonical
    assert scenes.kind_of(statement) == kind


@pytest.mark.parametrize("statement", [*FACTS, "teapot left of cup", "teapot above cup"])
def test_swaps_change_one_value_each(statement):
    found = list(scenes.swaps(statement, random.Random(0)))
    kind = scenes.kind_of(statement)
    assert len(found) == {"background": 1, "count": 1, "relation": 3}.get(kind, 2)
    assert {scenes.kind_of(text) for text in found} == {kind}
    assert statement not in found
    if statement == "teapot left of cup":
        assert "cup left of teapot" in found


@given(splits, indices)
@settings(max_examples=25, deadline=None)
def test_questions_are_executed_and_balanced(split, index):
    scene = scenes.sample(split, index)
    counts = collections.Counter()
    for row in scenes.questions(scene, index):
        if row["stratum"] == "open":
            continue
        truth = scenes.execute(row["question"], scene)
        assert truth is (row["answer"] == "yes") or (truth is None and row["stratum"] == "malformed")
        assert scenes.kind_of(row["question"]) == row["kind"] or row["stratum"] == "malformed"
        counts[row["kind"], row["answer"]] += 1
    assert all(counts[kind, "yes"] == counts[kind, "no"] for kind in scenes.KINDS)


def test_negatives_come_from_where_a_captioner_errs():
    strata = collections.Counter(
        (row["kind"], row["stratum"])
        for i, scene in _some("qa", 120)
        for row in scenes.questions(scene, i)
        if row["answer"] == "no"
    )
    for kind, stratum in [
        ("object", "swap"), ("object", "empty"), ("object", "absent"), ("object", "adversarial"),
        ("sticker", "adversarial"), ("sticker", "swap"), ("sticker", "random"), ("sticker", "absent"),
        ("size", "swap"), ("size", "absent"), ("relation", "swap"), ("relation", "absent"), ("count", "swap"),
    ]:  # fmt: skip
        assert strata[kind, stratum] > 5, (kind, stratum)


def test_of_two_values_of_one_thing_at_most_one_is_true():
    """What rules may rely on to tell contradictions without an answer key."""
    for i, scene in _some("test", 100):
        facts = scenes.statements(scene)
        for noun, count in scene.counts().items():
            assert count <= 2
            about = [f for f in facts if language.subject_of(f) == noun]
            kinds = collections.Counter(map(scenes.kind_of, about))
            assert kinds["size"] == 1 and kinds["sticker"] <= 1 and kinds["count"] == count - 1
            assert kinds["object"] == count
        assert len({thing.place for thing in scene.things}) == len(scene.things), i


def test_splits_never_meet():
    seen: dict[str, str] = {}
    for split in scenes.SPLITS:
        for seed in (0, 1):
            for _, scene in _some(split, 150, seed):
                assert seen.setdefault(scene.to_json(), f"{split} {seed}") == f"{split} {seed}"
    streams = {
        stream_of(split, i, seed) for split in scenes.SPLITS for i in (0, 9_999_999) for seed in (0, 107)
    }
    assert len(streams) == 4 * len(scenes.SPLITS)


def test_what_is_held_out_is_in_no_training_split():
    groups = {
        split: collections.Counter(scenes.group_of(t) for _, s in _some(split, 250) for t in s.things)
        for split in scenes.SPLITS
    }
    for split, how in scenes.SPLITS.items():
        assert (groups[split]["held_out"] > 0) == how.held_out, split
    share = {split: count["rare"] / count.total() for split, count in groups.items()}
    assert share["train"] < 0.6 * share["qa"]


def test_planted_correlations_are_in_train_and_sft_only():
    for split, how in scenes.SPLITS.items():
        stuck = [t for _, s in _some(split, 200) for t in s.things if t.sticker]
        usual = np.mean([t.sticker == things.USUAL_STICKER[things.CATEGORY_OF[t.noun]] for t in stuck])
        together = np.mean(
            [things.COMPANION[t.noun] in s.counts() for _, s in _some(split, 200) for t in s.things
             if t.noun in things.COMPANION]
        )  # fmt: skip
        assert (usual > 0.55, together > 0.3) == (how.bias > 0,) * 2, split


def test_sft_covers_the_range_of_the_test():
    for split in ("sft", "qa", "round", "test"):
        assert {len(s.things) for _, s in _some(split, 200)} == set(range(3, 9))


@pytest.mark.parametrize("index", range(6))
def test_a_quarter_shows_every_sticker_whole_at_16_px(index):
    scene, number = scenes.sample("pretrain", index), stream_of("pretrain", index)
    picture, (_, stickers) = drawing.draw_owned(scene, number)
    plan = views.plan(*picture.size, ViewsConfig(), size=96, factor=16)
    boxes = [view.box for view in plan if view.tag != "whole"]
    for i, thing in enumerate(scene.things):
        rows, columns = np.nonzero(stickers == i)
        if not thing.sticker or len(rows) < drawing.STICKER_PX**2:  # none, or another thing's lies over it
            continue
        assert any(
            left <= columns.min() and columns.max() < right and top <= rows.min() and rows.max() < bottom
            for left, top, right, bottom in boxes
        ), thing


def test_pictures_are_the_same_again_and_differ_by_index():
    first, again, other = (np.asarray(scenes.draw(SCENE, i)) for i in (1, 1, 2))
    assert first.shape == (192, 192, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_things_stand_where_the_facts_say():
    _, (owners, _) = drawing.draw_owned(SCENE, 5)
    for i, thing in enumerate(SCENE.things):
        rows, columns = np.nonzero(owners == i)
        assert (int(rows.mean() // 64), int(columns.mean() // 64)) == (thing.row, thing.column)
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert longest <= 42 if thing.size == "small" else longest >= 48


def test_every_noun_has_a_sprite_and_all_are_small():
    folder = drawing._folder()
    assert {path.stem for path in folder.glob("*.webp")} == {*scenes.NOUNS} | {
        f"texture-{t}" for t in drawing.TINTS
    }
    assert sum(path.stat().st_size for path in folder.glob("*.webp")) < 1_000_000
    assert (folder / "LICENSE.md").is_file()


def test_writing_an_image_folder(tmp_path):
    import pyarrow.parquet as pq

    scenes.write("sft", 3, tmp_path, offset=5)
    rows = pq.read_table(tmp_path / "metadata.parquet").to_pylist()
    assert [row["file_name"] for row in rows] == [f"images/00000{i}.png" for i in (5, 6, 7)]
    for i, row in enumerate(rows, 5):
        assert scenes.Scene.from_json(row["facts"]) == scenes.sample("sft", i)
        assert Image.open(tmp_path / row["file_name"]).size == (192, 192)
        assert scenes.judge(row["text"], row["facts"]).false == 0
    partial = [scenes.judge(row["text"], row["facts"]) for row in rows]
    assert sum(j.recalled for j in partial) < sum(j.facts for j in partial)
    complete = next(scenes.rows("test", 1))[1]
    assert scenes.judge(complete["text"], complete["facts"]).recalled == len(
        scenes.statements(scenes.sample("test", 0))
    )


def test_unknown_splits_and_broken_facts_are_refused():
    with pytest.raises(DataError, match="no split"):
        next(scenes.rows("nowhere", 1))
    for text in ("", "[]", "{}", json.dumps({"background": "red"}), '{"background": "white", "things": [1]}'):
        with pytest.raises(DataError, match="not the facts"):
            scenes.Scene.from_json(text)


def test_the_product_knows_the_facts_through_the_laboratory():
    laboratory = scenes.LABORATORY
    facts = laboratory.read(SCENE.to_json())
    assert facts is not None and laboratory.read('{"background":"white","objects":[]}') is None
    assert facts.holds("teapot top left") is True and facts.holds("kite top") is False
    assert facts.judge(", ".join(FACTS)).recalled == len(FACTS)
    claimed = laboratory.claims([*FACTS, "nonsense", "teapot left of cup"], SCENE.to_json(), random.Random(0))
    for claim in claimed:
        assert (claim["answer"] == "yes") is scenes.execute(claim["question"], SCENE)
        assert claim["kind"] == scenes.kind_of(claim["question"])
    assert {"yes", "no"} == {claim["answer"] for claim in claimed}
    assert len({claim["question"] for claim in claimed}) == len(claimed)
