"""CIDEr-D, BLEU, METEOR and ROUGE-L: cases by hand, COCO's own code, and what must hold of any captions."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioner.errors import DataError
from captioner.judges.references import bleu, cider, cider_d, meteor, read_references, rouge_l
from captioner.judges.scores import Scores
from captioner.judges.words import tokens, words

CAPTIONS = {
    "1": "A red cup stands on the table.",
    "2": "two dogs run along the beach, the sea is rough",
    "3": "a man in a hat rides a horse",
    "4": "cat",
    "5": "",
}
REFERENCES = {
    "1": ["a red cup on a wooden table", "There is a cup on the table."],
    "2": ["dogs are running on a beach", "two dogs run along the beach", "the beach with two wet dogs"],
    "3": ["a man rides a brown horse", "a cowboy on a horse"],
    "4": ["a cat on a sofa"],
    "5": ["a train at a station", "the train"],
}


def write(path: Path, references: dict[str, list[str]]) -> Path:
    rows = [json.dumps({"key": key, "references": refs}) for key, refs in references.items()]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "references.jsonl", REFERENCES)


def coco(captions: dict[str, str], references: dict[str, list[str]]) -> tuple[dict, dict]:
    """The same words for COCO's code, whose tokenizer needs Java."""
    said = {key: [" ".join(words(caption))] for key, caption in captions.items()}
    return {key: [" ".join(words(ref)) for ref in references[key]] for key in captions}, said


def by_image(scores: Scores, metric: str) -> list[float]:
    return [scores.per_image()[key][metric] for key in sorted(CAPTIONS)]


# ---------------------------------------------------------------- words


def test_words_are_small_letters_without_punctuation() -> None:
    assert words("A dog's \"red\" ball. It isn't 3.5 m, right?") == [
        *("a", "dog", "'s", "red", "ball", "it", "is", "n't", "3.5", "m", "right")
    ]
    assert tokens("hot. dog.") == ["hot", ".", "dog", "."]
    assert words("") == words(" ... ") == []


# ---------------------------------------------------------------- by hand


def test_cider_of_a_reference_itself_is_ten_and_of_one_word_a_quarter(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"1": ["a red cup stands"], "2": ["dog"]})
    scores = cider({"1": "a red cup stands", "2": "dog"}, path)
    assert scores.per_image() == {"1": {"cider": pytest.approx(10)}, "2": {"cider": pytest.approx(2.5)}}
    assert scores.corpus()["cider"] == pytest.approx(6.25)


def test_cider_by_hand() -> None:
    """All weights are log 2. Cosines of one and two words: 2/(√2·2) and 1/√3; two words shorter."""
    value = cider_d([["a", "b"], ["x"]], [[["a", "b", "c", "d"]], [["x"]]])[0]
    expected = 10 / 4 * (2 / (math.sqrt(2) * 2) + 1 / math.sqrt(3)) * math.exp(-4 / 72)
    assert value == pytest.approx(expected)


def test_cider_clips_a_word_that_is_said_again() -> None:
    """Said three times, counted once: 1 / (3 · 1) of one word, nothing of two or three; two words longer."""
    value = cider_d([["a", "a", "a"], ["x"]], [[["a"]], [["x"]]])[0]
    assert value == pytest.approx(10 / 4 * (1 / 3) * math.exp(-4 / 72))


def test_cider_of_one_image_is_undefined(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"1": ["a red cup"]})
    scores = cider({"1": "a red cup"}, path)
    assert math.isnan(scores.corpus()["cider"])
    assert math.isnan(scores.intervals()["cider"].low)


def test_bleu_by_hand(tmp_path: Path) -> None:
    """Words 3/4 (of three "the" two count), pairs 1/3; too short by exp(1 - 6/4)."""
    path = write(tmp_path / "r.jsonl", {"1": ["the cat sat on the mat"]})
    got = bleu({"1": "the the the cat"}, path).corpus()
    brevity = math.exp(1 - 6 / 4)
    assert got["bleu1"] == pytest.approx(brevity * 3 / 4)
    assert got["bleu2"] == pytest.approx(brevity * math.sqrt(3 / 4 * 1 / 3))
    assert got["bleu3"] == got["bleu4"] == 0


def test_bleu_sums_over_images_before_it_divides(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"1": ["a b"], "2": ["c d e f"]})
    scores = bleu({"1": "a b", "2": "c x y z"}, path)
    assert scores.corpus()["bleu1"] == pytest.approx((2 + 1) / (2 + 4))
    assert scores.corpus()["bleu2"] == pytest.approx(math.sqrt(3 / 6 * 1 / 4))
    assert math.isnan(scores.per_image()["1"]["bleu3"])  # two words have no three in a row


def test_bleu_takes_the_nearer_and_of_two_as_near_the_shorter_reference(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"1": ["a b c d e", "a b c", "a"]})
    scores = bleu({"1": "a b c d"}, path)
    assert scores.counts[0, list(scores.columns).index("reference length")] == 3
    assert scores.corpus()["bleu1"] == pytest.approx(1)


def test_meteor_by_hand(tmp_path: Path) -> None:
    """Three words in one piece: 1 - 0.5/27. "cats" meets "cat" by its stem; "sofa" never meets "couch"."""
    path = write(
        tmp_path / "r.jsonl", {"1": ["a cat sleeps"], "2": ["cat"], "3": ["sofa"], "4": ["x a y b", "q"]}
    )
    each = meteor({"1": "a cat sleeps", "2": "cats", "3": "couch", "4": "a b"}, path).per_image()
    assert each["1"]["meteor"] == pytest.approx(1 - 0.5 / 27)
    assert each["2"]["meteor"] == pytest.approx(1 - 0.5)
    assert each["3"]["meteor"] == 0
    # precision 1, recall 1/2, two pieces of two words: (0.5 / (0.9 + 0.1 · 0.5)) · (1 - 0.5)
    assert each["4"]["meteor"] == pytest.approx(0.5 / 0.95 * 0.5)


def test_rouge_l_by_hand(tmp_path: Path) -> None:
    """The best precision (2/2) and the best recall (1/1) may come from different references."""
    path = write(tmp_path / "r.jsonl", {"1": ["a x c y"], "2": ["a x b", "a"], "3": ["x"]})
    each = rouge_l({"1": "a b c", "2": "a b", "3": "y"}, path).per_image()
    precision, recall = 2 / 3, 2 / 4
    assert each["1"]["rouge_l"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert each["2"]["rouge_l"] == pytest.approx(1)
    assert each["3"]["rouge_l"] == 0


# ---------------------------------------------------------------- COCO's code


def test_cider_is_that_of_coco(file: Path) -> None:
    mean, each = Cider().compute_score(*coco(CAPTIONS, REFERENCES))
    scores = cider(CAPTIONS, file)
    assert by_image(scores, "cider") == pytest.approx(list(each), abs=1e-12)
    assert scores.corpus()["cider"] == pytest.approx(mean)


def test_rouge_l_is_that_of_coco(file: Path) -> None:
    mean, each = Rouge().compute_score(*coco(CAPTIONS, REFERENCES))
    scores = rouge_l(CAPTIONS, file)
    assert by_image(scores, "rouge_l") == pytest.approx(list(each))
    assert scores.corpus()["rouge_l"] == pytest.approx(mean)


def test_bleu_is_that_of_coco(file: Path) -> None:
    corpus, _ = Bleu(4).compute_score(*coco(CAPTIONS, REFERENCES), verbose=0)
    assert list(bleu(CAPTIONS, file).corpus().values()) == pytest.approx(corpus, rel=1e-6)


SENTENCES = st.lists(st.sampled_from(["cat", "dog", "red", "blue", "on"]), min_size=1, max_size=9).map(
    " ".join
)
IMAGES = st.lists(st.tuples(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3)), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(IMAGES)
def test_any_captions_score_as_coco_has_it(images: list[tuple[str, list[str]]]) -> None:
    captions = {str(i): said for i, (said, _) in enumerate(images)}
    gts, res = coco(captions, {str(i): refs for i, (_, refs) in enumerate(images)})
    mine = cider_d([words(said) for said, _ in images], [[words(ref) for ref in refs] for _, refs in images])
    assert list(mine) == pytest.approx(list(Cider().compute_score(gts, res)[1]), abs=1e-9)


# ---------------------------------------------------------------- what must hold


@settings(max_examples=40, deadline=None)
@given(images=IMAGES, data=st.data())
def test_ranges_and_order(
    tmp_path_factory: pytest.TempPathFactory, images: list, data: st.DataObject
) -> None:
    captions = {str(i): said for i, (said, _) in enumerate(images)}
    references = {str(i): refs for i, (_, refs) in enumerate(images)}
    file = write(tmp_path_factory.mktemp("r") / "r.jsonl", references)
    order = data.draw(st.permutations(sorted(captions)))
    turned = {key: captions[key] for key in order}
    backwards = {key: references[key][::-1] for key in order}
    other = write(tmp_path_factory.mktemp("r") / "r.jsonl", backwards)
    functions: tuple[Callable[..., Scores], ...] = (cider, bleu, meteor, rouge_l)
    for function in functions:
        one, two = function(captions, file), function(turned, other)
        top = 10 if function is cider else 1
        assert one.keys == two.keys
        np.testing.assert_allclose(one.counts, two.counts, atol=1e-9)
        assert all(math.isnan(v) or -1e-9 <= v <= top + 1e-9 for v in one.corpus().values())


# ---------------------------------------------------------------- files


def test_empty_captions_say_nothing_that_a_reference_says(file: Path) -> None:
    for function in (cider, meteor, rouge_l):
        (value,) = function(CAPTIONS, file).per_image()["5"].values()
        assert value == 0
    assert all(math.isnan(value) for value in bleu(CAPTIONS, file).per_image()["5"].values())


def test_an_empty_reference_is_a_reference_without_words(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"1": [""], "2": ["", "a cat"]})
    for function in (cider, meteor, rouge_l):
        each = function({"1": "a dog", "2": "a cat"}, path).per_image()
        assert sum(each["1"].values()) == 0 < sum(each["2"].values())
    assert bleu({"1": "a dog", "2": "a cat"}, path).per_image()["1"]["bleu1"] == 0
    assert math.isnan(bleu({"1": "", "2": ""}, path).corpus()["bleu1"])


def test_references_of_coco_and_docci_are_read(tmp_path: Path) -> None:
    rows = [{"image_id": 310196, "caption": "a cat", "id": 1}, {"image_id": 310196, "caption": "one cat"}]
    rows.append({"image_id": 7, "caption": "a dog"})
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": rows}))
    found, annotated = read_references(path, {"val/COCO_val2014_000000310196.jpg": ""})
    assert (found, annotated) == ({"val/COCO_val2014_000000310196.jpg": ["a cat", "one cat"]}, 2)
    docci = tmp_path / "docci.jsonlines"
    docci.write_text(
        '{"type": "test", "image_file": "x", "example_id": "test_00", "description": "A dog."}\n'
    )
    assert read_references(docci, {"test_00": ""}) == ({"test_00": ["A dog."]}, 1)


def test_a_missing_file_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"captions_val2014\.json is missing[\s\S]*cocodataset\.org"
    ) as caught:
        cider(CAPTIONS, tmp_path / "captions_val2014.json")
    assert str(tmp_path) in str(caught.value)


def test_images_without_reference_are_named(file: Path) -> None:
    with pytest.raises(DataError, match="1 captioned images are not in the annotation files: 99"):
        cider({**CAPTIONS, "99": "a cat"}, file)


@pytest.mark.parametrize(
    "text", ['{"key": "1", "references": []}', '{"key": "1"}', "[1, 2]", "{", '{"key": 1, "references": "x"}']
)
def test_lines_that_do_not_fit_are_an_error_with_their_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": "1", "references": ["a"]}\n\n' + text)
    with pytest.raises(DataError, match="line 3"):
        cider(CAPTIONS, path)


def test_coco_needs_one_caption_per_image_number(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match=r"no image number[\s\S]*holiday"):
        cider({"holiday": "a"}, path)
    with pytest.raises(DataError, match="same image as a/7"):
        cider({"a/7": "a", "b/007": "b"}, path)
    path.write_text('{"annotations": [{"image_id": 3}]}')
    with pytest.raises(DataError, match=r"annotations\.0\.caption"):
        cider({"3": "a"}, path)
