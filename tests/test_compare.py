"""captioner evaluate --captions: captions of any maker beside each other, with and without benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from captioner.config import Config
from captioner.errors import CaptionerError, CheckpointError, ConfigError, DataError
from captioner.judges import scores, sets
from captioner.judges.base import Said
from captioner.judges.registry import score
from captioner.records import CaptionRow, write_parquet
from captioner.runs import Run
from loops import cli, evaluate
from tests import photographs
from tests.http_stand_in import StandIn

KNOWN = photographs.read()
FIRST = {"a": "a red cup, a table", "b": "two dogs", "c": "an old boat"}
SECOND = {"a": "red cup on a table", "b": "two dogs in snow", "c": ""}
REFERENCES = {"a": "a red cup on a table", "b": "two dogs in snow", "c": "a boat on a lake"}


def table(path: Path, captions: dict[str, str], name: str = "file_name", text: str = "caption") -> str:
    path.write_text("\n".join(json.dumps({name: f"{key}.jpg", text: said}) for key, said in captions.items()))
    return str(path)


def csv(path: Path, captions: dict[str, str]) -> str:
    path.write_text("image,caption\n" + "\n".join(f'./{key}.png,"{said}"' for key, said in captions.items()))
    return str(path)


def shards(folder: Path, captions: dict[str, str | None]) -> str:
    folder.mkdir()
    rows = [
        CaptionRow(id="", key=key, caption=said, finish_reason="length" if key == "b" else "stop", tokens=7,
                   model="", config="", error=None if said is not None else "broken")
        for key, said in captions.items()
    ]  # fmt: skip
    write_parquet(folder / "00000.parquet", rows, CaptionRow)
    return str(folder)


def compare(tmp_path: Path, *captions: str, **flags: Any) -> dict[str, Any]:
    """comparison.json of the command."""
    settings = {"evaluate": {"bootstrap": 200, **flags.pop("evaluate", {})}, **flags.pop("settings", {})}
    config = Config.model_validate(settings)
    file = evaluate.evaluate(tmp_path / "run", config, captions=captions, **flags)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def values(summary: dict[str, Any], name: str) -> list[dict[str, float]]:
    [each] = [one for one in summary["scores"] if one["name"] == name]
    return [{k: v["value"] for k, v in one["metrics"].items()} for one in each["captioners"]]


# ---------------------------------------------------------------- reading


def test_captions_of_three_tools_are_the_same_images(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for key, text in FIRST.items():
        (folder / f"{key}.jpg").write_bytes(b"never opened")
        (folder / f"{key}.txt").write_text(text)
    sources = [
        csv(tmp_path / "one.csv", FIRST),
        table(tmp_path / "two.jsonl", FIRST),
        shards(tmp_path / "ours", dict(FIRST)),
        str(folder),
        table(tmp_path / "odd.jsonl", FIRST, "where", "what") + "?file=where&text=what",
    ]
    read = sets.said(sources)
    assert [side.name for side in read] == ["one", "two", "ours", "photos", "odd"]
    for side in read:
        assert {row.key: row.caption for row in side.rows} == FIRST
    assert sets.names(sources[:1] * 2) == ["one", "one 2"]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"a": "x", "b": "y"}, "1 only in first: c"),
        ({**FIRST, "d": "x"}, "1 only in second: d"),
        (
            {"A": "x", "B": "y", "C": "z", "D": "z"},
            "3 only in first: a, b, c; 4 only in second: A, B, C and 1",
        ),
    ],
)
def test_different_images_are_named(tmp_path: Path, other: dict[str, str], what: str) -> None:
    sources = (csv(tmp_path / "first.csv", FIRST), table(tmp_path / "second.jsonl", other))
    with pytest.raises(DataError, match=what):
        compare(tmp_path, *sources)
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    twice = tmp_path / "twice.csv"
    twice.write_text("image,caption\na.jpg,x\na.png,y\n")
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"image": "a.jpg", "caption": 3}')
    empty = tmp_path / "empty.csv"
    empty.write_text("image,caption\n")
    for file, what in ((twice, "a is named twice"), (numbers, "of a is not text"), (empty, "no captions")):
        with pytest.raises(DataError, match=what):
            sets.said([str(file)])


def test_images_that_one_of_them_failed_on_are_left_out_and_told(tmp_path: Path) -> None:
    sources = (csv(tmp_path / "first.csv", FIRST), shards(tmp_path / "ours", {**FIRST, "c": None}))
    found = compare(tmp_path, *sources)
    assert found["images"] == 2
    assert "ours: 1 images failed, left out for all" in found["judge"]["notes"]


# ---------------------------------------------------------------- numbers that need no judge


def test_the_numbers_by_hand(tmp_path: Path) -> None:
    said = {
        "a": "red cup, red cup, a cozy mood",
        "b": "two dogs in snow",
        "c": "",
        "d": "two dogs in snow",
        "e": "the image shows a blorp, zorp",
    }
    [side] = sets.said([shards(tmp_path / "ours", dict(said))])
    found = sets.describe(side).corpus()
    hand = {
        "empty": 1 / 5,
        "ended": 4 / 5,
        "repeated": 1 / 7,  # the second red cup
        "not plain": 2 / 7,  # the mood, and the lead-in
        "understood": 4 / 7,  # two cups and two pairs of dogs
        "distinct": 4 / 5,
        "statements": 7 / 5,
        "words": 21 / 5,
        "tokens": 7,
    }
    assert {name: round(value, 9) for name, value in found.items()} == {
        k: round(v, 9) for k, v in hand.items()
    }
    counted = sets.describe(side, lambda text: len(text)).corpus()
    assert counted["tokens"] == sum(map(len, said.values())) / 5
    alone = sets.describe(Said("", [side.rows[2]])).corpus()  # an empty caption and nothing else
    assert alone["empty"] == 1 and math.isnan(alone["repeated"]) and math.isnan(alone["understood"])
    other = sets.said([csv(tmp_path / "other.csv", said)])[0]
    assert math.isnan(sets.describe(other).corpus()["ended"])  # another tool does not say


# ---------------------------------------------------------------- benchmarks


def test_several_captioners_against_references_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = tmp_path / "references.jsonl"
    references.write_text("\n".join(json.dumps({"key": k, "references": v}) for k, v in REFERENCES.items()))
    sides = {"one": FIRST, "two": SECOND, "three": REFERENCES}
    words = [
        word for name, said in sides.items() for word in ("--captions", csv(tmp_path / f"{name}.csv", said))
    ]
    words += ["--against", f"bleu={references}", "--against", f"cider={references}"]
    words += ["--evaluate.bootstrap", "200", "--run", str(tmp_path / "run")]
    assert cli.main(["evaluate", *words]) == 0
    shown = capsys.readouterr().out
    assert (
        "bleu1" in shown and "two - one" in shown and "nobody tells what is true" in " ".join(shown.split())
    )
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [each["name"] for each in found["scores"]] == ["captions", "bleu", "cider"]
    [bleu] = [each for each in found["scores"] if each["name"] == "bleu"]
    assert values(found, "bleu")[2] == {f"bleu{n}": pytest.approx(1) for n in (1, 2, 3, 4)}
    assert [(d["from"], d["to"]) for d in bleu["differences"]] == [
        ("one", "two"), ("one", "three"), ("two", "three"),
    ]  # fmt: skip
    direct = scores.difference(
        score("bleu", FIRST, references), score("bleu", SECOND, references), resamples=200
    )
    assert bleu["differences"][0]["metrics"] == {name: each.to_json() for name, each in direct.items()}


def test_answers_are_scored_too(tmp_path: Path) -> None:
    (tmp_path / "coco_pope_random.json").write_text(
        "\n".join(
            json.dumps({"question_id": i, "image": f"{i}.jpg", "text": "?", "label": label})
            for i, label in enumerate(("yes", "no"), 1)
        )
    )
    said = tmp_path / "said.jsonl"
    said.write_text("\n".join(json.dumps({"id": f"random/{i}", "answer": "Yes."}) for i in (1, 2)))
    found = compare(tmp_path, f"{said}?text=answer", against=(f"pope={tmp_path}",))
    [pope] = values(found, "pope")
    assert (pope["random accuracy"], pope["random yes_ratio"]) == (0.5, 1.0)

    (tmp_path / "human_annotated_oracle_facts.jsonl").write_text('{"image_name": "a", "oracle_facts": ["x"]}')
    units = tmp_path / "units.jsonl"
    units.write_text('{"key": "a", "units": [{"fact": "x", "matched_oracle_id": 0, "verification": true}]}')
    found = compare(tmp_path, f"{units}?text=units", against=(f"dcscore={tmp_path}",))
    assert values(found, "dcscore")[0]["dcscore"] == 1.0
    units.write_text('{"key": "a", "units": "x"}')
    with pytest.raises(DataError, match="dcscore takes judged units by image name: a"):
        compare(tmp_path, f"{units}?text=units", against=(f"dcscore={tmp_path}",))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            {"against": ("chair=nowhere",)},
            r"synonyms.txt is missing[\s\S]*LisaAnne/Hallucination[\s\S]*nowhere",
        ),
        ({"against": ("cider=none.json",)}, r"none.json is missing"),
        ({"against": ("chair",)}, "--against NAME=PATH"),
        ({"against": ("spice=x",)}, "no benchmark is called 'spice'"),
        ({"against": ("chair=x", "pope=y")}, "pope reads answers by"),
        ({"against": ("fixed_budget=x",)}, "fixed_budget needs a language model"),
        ({"prefer": True}, "--images DATA"),
        ({"evaluate": {"clip": "x"}}, "--images DATA"),
        ({"round": 1}, "neither --round nor --questions"),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, flags: dict[str, Any], what: str) -> None:
    with pytest.raises(CaptionerError, match=what):
        compare(tmp_path, csv(tmp_path / "one.csv", {"COCO_1": "a cat"}), **flags)


def test_one_image_has_words_of_its_own(tmp_path: Path) -> None:
    sources = (csv(tmp_path / "one.csv", {"a": ""}), csv(tmp_path / "two.csv", {"a": "a cat"}))
    found = compare(tmp_path, *sources)
    assert any("one image" in note for note in found["judge"]["notes"])
    first, second = values(found, "captions")
    assert (first["empty"], second["empty"], first["repeated"]) == (1.0, 0.0, None)


# ---------------------------------------------------------------- truth of photographs


def test_facts_of_photographs_judge_the_files_of_another_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = photographs.copy(tmp_path / "photographs", side=32)
    facts = {key: ", ".join(KNOWN[key]["facts"]) for key in images}
    nonsense = {key: ", ".join(photographs.NONSENSE) for key in images}
    sources = (csv(tmp_path / "facts.csv", facts), table(tmp_path / "nonsense.jsonl", nonsense))
    settings = {"gate": {"judge": {"facts": str(photographs.FILE)}}}
    found = compare(tmp_path, *sources, images=str(tmp_path / "photographs"), settings=settings)
    assert found["judge"]["kind"] == "facts" and found["images"] == len(KNOWN)
    precision = [one["metrics"]["precision"]["value"] for one in found["captioners"]]
    assert precision == [1.0, 0.0]
    assert found["differences"][0]["metrics"]["hallucinated"]["low"] == 1.0
    assert "judge: facts" in " ".join(capsys.readouterr().out.split())
    stranger = csv(tmp_path / "stranger.csv", {**facts, "stranger": "a cat"})
    with pytest.raises(DataError, match="1 captions are of images that are not there: stranger"):
        compare(tmp_path, stranger, images=str(tmp_path / "photographs"), settings=settings)


# ---------------------------------------------------------------- a language model


@pytest.mark.slow
def test_a_language_model_prefers_and_reads(tmp_path: Path) -> None:
    """It prefers what names a cup, else what stands first; and it reads the colour from the caption."""
    asked: list[str] = []

    def answer(body: dict[str, Any]) -> str:
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            asked.append(content)
            return json.dumps({"choice": 1 if "red" in content.partition("Question")[0] else 2})
        picture, said = content
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        first, _, second = said["text"].partition("A: ")[2].partition("B: ")
        cups = ("cup" in first, "cup" in second)
        return json.dumps({"better": "B" if cups == (False, True) else "A"})

    images = photographs.copy(tmp_path / "photographs", side=32)
    keys = sorted(images)[:4]
    one = dict.fromkeys(keys, "a table, red")
    two = {keys[0]: "a cup", keys[1]: "a cup", keys[2]: "a spoon", keys[3]: "cup, red"}
    rows = [
        {"id": key, "questions": [{"question": "Which color?", "choices": ["blue", "red"], "answer": "red"}]}
        for key in keys
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = StandIn(answer)
    try:
        found = compare(
            tmp_path, csv(tmp_path / "one.csv", one), csv(tmp_path / "two.csv", two),
            images=str(tmp_path / "photographs"), prefer=True, against=(f"fixed_budget={tmp_path}",),
            settings={"tool": {"type": "server", "urls": [server.url], "retries": 0}},
        )  # fmt: skip
    finally:
        server.close()
    [wins] = values(found, "prefer")
    assert wins == {"win rate": (3 + 0.5) / 4, "ties": 0.25, "answered": 1.0}  # a spoon or a table: a tie
    reading = values(found, "fixed_budget")
    assert all("Cannot answer from the caption" in each for each in asked)
    assert (len(asked), reading[0]["answered at 50"]) == (2 * 3 * 4, 1.0)


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, whose words are letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("clip")
    signs = ["[s]", "[e]", *"abcdefghijklmnopqrstuvwxyz ,"]
    plain = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token=","))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.post_processor = processors.TemplateProcessing(
        single="[s] $A [e]", special_tokens=[("[s]", 0), ("[e]", 1)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="[s]", eos_token="[e]", pad_token="[e]", model_max_length=16
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": len(signs), "max_position_embeddings": 16, "eos_token_id": 1,
                         "bos_token_id": 0, "pad_token_id": 1},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), words).save_pretrained(folder)
    return folder


def test_clip_is_what_the_model_says(tmp_path: Path, contrastive: Path) -> None:
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    images = photographs.copy(tmp_path / "photographs", side=48)
    said = dict.fromkeys(images, "")
    texts = ["red cup", "a dog on a table in the snow", "moon", "old wall of brick"]
    keys = sorted(images)[:4]
    said |= dict(zip(keys, texts, strict=True))
    found = compare(
        tmp_path, csv(tmp_path / "one.csv", said), images=str(tmp_path / "photographs"),
        evaluate={"clip": str(contrastive)},
    )  # fmt: skip
    model, processor = CLIPModel.from_pretrained(contrastive), CLIPProcessor.from_pretrained(contrastive)
    total = 0.0
    for key, text in zip(keys, texts, strict=True):
        ids = processor.tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with Image.open(images[key]) as picture, torch.no_grad():
            pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            vision = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            text_ = model.text_projection(model.text_model(**ids).pooler_output)[0]
        total += 2.5 * max(0.0, float(torch.cosine_similarity(vision, text_, dim=0)))
    [clip] = values(found, "clip")
    assert clip["clip"] == pytest.approx(total / len(images), abs=1e-5) and total > 0
    assert clip["cut"] == pytest.approx(2 / len(images))


def test_a_hostile_or_foreign_clip_is_refused(tmp_path: Path, contrastive: Path) -> None:
    from captioner.judges.clip import Contrastive

    for changed, what in (
        ({"auto_map": {"AutoModel": "code.Evil"}}, "could fetch or run code"),
        ({"model_type": "llama"}, "no CLIP or SigLIP checkpoint, but 'llama'"),
    ):
        folder = tmp_path / what[:5]
        folder.mkdir()
        for file in contrastive.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(CheckpointError, match=what):
            Contrastive(folder)
    with pytest.raises(CheckpointError, match="no CLIP or SigLIP"):
        Contrastive(tmp_path / "none")


def test_a_run_scores_its_captioners_by_a_benchmark_too() -> None:
    with pytest.raises(ConfigError, match="--round goes with neither"):
        evaluate.evaluate(Run(Path("none"), Config()), Config(), 1, against=("cider=x",))
