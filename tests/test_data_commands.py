"""captioner data: training sets from what people have, by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from captioner.config import Config
from captioner.errors import ConfigError, DataError, Refused
from captioner.method.annotations import Boxes, annotate
from captioner.records import Failed
from captioner.runs import Shards
from captioner.sources.folder import read_folder
from loops.cli import main
from loops.data.make import questions
from loops.data.photographs import boxes
from tests import photographs, tiny
from tests.http_stand_in import Reply, StandIn

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


# ---------------------------------------------------------------- from a teacher


def test_a_server_recaptions_and_what_it_said_is_kept(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"horse"}

    def answer(body: dict[str, Any]) -> Reply:
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        hint = text["text"].rpartition("\n\n")[2]
        if "horse" in hint and bad:
            return "no JSON"
        return json.dumps({"caption": f"a teacher's view of\n{json.loads(hint).partition(',')[0]}"})

    with StandIn(answer) as server:
        words = ["data", "recaption", str(photos), "--teacher", server.url, "--run", str(tmp_path / "run")]
        words += ["--hint", "--tool.retries", "0", "--tool.in_flight", "2"]
        assert main([*words, "--out", str(tmp_path / "one"), "--max_failed", "0.01"]) == 3
        assert len(server.requests) == 18 and "1 failed" in capsys.readouterr().out
        bad.clear()
        assert main([*words, "--out", str(tmp_path / "again")]) == 0
        assert len(server.requests) == 19  # the horse alone was asked about again
        assert main([*words, "--out", str(tmp_path / "two"), "--keep", "0.3"]) == 0
    rows = {row.key: row for row in read_folder(tmp_path / "two")}
    facts = {key: ", ".join(row["facts"]) for key, row in photographs.read().items()}
    taught = {key for key, row in rows.items() if row.caption != facts[key]}
    assert len(rows) == 18 and 5 < len(taught) < 18
    assert all(rows[key].caption == f"a teacher's view of {facts[key].partition(',')[0]}" for key in taught)
    lines = map(json.loads, (tmp_path / "two" / "metadata.jsonl").read_text().splitlines())
    assert {line["original"] for line in lines} == set(facts.values())
    assert {row.key for row in Shards(tmp_path / "one" / "failed", Failed).read(0)} == {"horse"}
    assert main([*words, "--out", str(tmp_path / "three"), "--keep", "2"]) == 2


def test_a_checkpoint_recaptions_through_the_bulk_pipeline(photos: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    tiny.tiny_checkpoint(teacher, seed=1)
    for path in sorted(photos.glob("*.*"))[3:]:
        path.unlink()
    (photos / "cut.png").write_bytes(b"\x89PNG")
    words = ["data", "recaption", str(photos), "--teacher", str(teacher), "--run", str(tmp_path / "run")]
    words += ["--caption.sampling.max_tokens", "6", "--caption.prepare_processes", "0", "--max_failed", "1"]
    assert main([*words, "--out", str(tmp_path / "set")]) == 0
    said = {row.key: row.caption for row in read_folder(tmp_path / "set")}
    [lost] = [row for row in Shards(tmp_path / "set" / "failed", Failed).read(0) if row.key == "cut"]
    assert lost.reason == "not an image of a known format" and "cut" not in said
    assert main([*words, "--out", str(tmp_path / "hinted"), "--hint"]) == 2


# ---------------------------------------------------------------- from photographs


def test_photographs_are_prepared_filled_in_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "set"
    for i in range(6):
        (photos / f"day {i % 2}").mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # turned
        Image.new("RGB", (40, 20), "teal").save(photos / f"day {i % 2}" / f"{i}.jpg", exif=exif)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (30, 10), "red").save(photos / "wide.png", icc_profile=profile)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    command = ["data", "prepare", str(photos), "--out", str(out), "--longest", "20"]
    assert main([*command, "--validation", "0.5", "--group", "folder"]) == 0
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before
    table = (out / "captions.csv").read_text(encoding="utf-8-sig").splitlines()
    assert table[0] == "file_name,split,text" and len(table) == 8
    with Image.open(out / "day 0" / "0.jpg") as upright, Image.open(out / "wide.png") as wide:
        assert upright.size == (10, 20) and wide.size == (20, 7)
    splits = {line.split(",")[0].rpartition("/")[0]: line.split(",")[1] for line in table[1:]}
    assert all(splits[line.split(",")[0].rpartition("/")[0]] == line.split(",")[1] for line in table[1:])
    capsys.readouterr()
    assert main(["data", "check", str(out)]) == 3
    assert "7 missing" in capsys.readouterr().out
    filled = [f"{line}photo {i}" for i, line in enumerate(table[1:])]
    filled[0] = table[1]
    rows = [table[0], *filled, filled[3], "gone.jpg,train,a ghost"]
    (out / "captions.csv").write_text("\n".join(rows), encoding="utf-16")
    assert main(["data", "check", str(out), "--max_failed", "0.5"]) == 0
    told = capsys.readouterr().out
    assert "1 missing" in told and "1 duplicate" in told and "1 ghost" in told
    assert "'gone.jpg' is not in the folder" in told and "6 of 9 images are ready" in told


NAMES = ("dog", "cat", "wine glass", "bus", "car", "boat")
COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
    "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    "annotations": [
        {"image_id": 1, "category_id": 0, "bbox": [0, 0, 20, 20]},
        {"image_id": 1, "category_id": 1, "bbox": [50, 0, 20, 20]},
        {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5]},
        {"image_id": 1, "category_id": 2, "bbox": [90, 0, 5, 5]},
    ],
}


def test_boxes_become_exact_questions_and_facts(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (100, 50)).save(images / "a.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    source = str(tmp_path / "instances.json")
    out = boxes(tmp_path / "run", Config(), source, images=str(images), out=tmp_path / "o")
    [row] = read_folder(out)
    assert row.caption == "one dog, one cat, two wine glasses, dog to the left of the cat"
    asked = {(question["question"], question["answer"]) for question in row.questions or []}
    assert {("dog", "yes"), ("wine glass", "yes"), ("dog to the left of the cat", "yes")} <= asked
    assert {("dog to the right of the cat", "no"), ("two wine glasses", "yes")} <= asked
    assert json.loads((out / "facts.jsonl").read_text())["facts"] == (row.caption or "").split(", ")
    (tmp_path / "bad.json").write_text(json.dumps(COCO | {"annotations": [{"image_id": 9}]}))
    with pytest.raises(DataError, match="no boxes that can be read"):
        boxes(tmp_path / "run", Config(), str(tmp_path / "bad.json"), images=str(images), out=tmp_path / "p")


def test_what_boxes_leave_open_is_not_asked() -> None:
    crowd = Boxes({"dog": [(0.0, 0.0, 0.5, 0.5)], "cat": [(0.4, 0.0, 0.9, 0.5)]}, {"dog"})
    [(_, known)] = annotate({"a": crowd}, ["dog", "cat"])
    said = " ".join(question["question"] for question in known.questions)
    assert "one dog" not in said and "left" not in said  # a crowd, and boxes that overlap
    assert set(known.facts) == {"one cat", "dog"}


def test_images_are_screened_with_the_reason_for_each(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(photos / "chelsea.png") as cat:
        cat.convert("RGB").resize((150, 100)).save(photos / "cat again.jpg", quality=60)
        cat.convert("RGB").resize((300, 20)).save(photos / "wide.jpg")
        cat.convert("RGB").resize((12, 12)).resize((400, 300)).save(photos / "blurred.png")
    (photos / "coffee copy.png").write_bytes((photos / "coffee.png").read_bytes())
    Image.new("RGB", (200, 200), (20, 30, 40)).save(photos / "blank.png")
    Image.new("RGB", (16, 200), "red").save(photos / "small.png")
    (photos / "cut.png").write_bytes((photos / "horse.png").read_bytes()[:300])
    command = ["data", "filter", str(photos), "--min_side", "18", "--max_aspect", "4", "--min_detail", "3"]
    assert main([*command, "--near", "4"]) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "kept").exists() and "25 images" in told
    assert main([*command, "--near", "4", "--out", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out.startswith(told.splitlines()[0])
    reasons = {
        row["key"]: row["reason"]
        for row in map(json.loads, (tmp_path / "kept" / "reasons.jsonl").read_text().splitlines())
    }
    assert reasons["wide"].startswith("its sides differ") and reasons["small"].startswith("its shorter side")
    assert reasons["blank"] == "blank, or nearly" and reasons["blurred"].startswith("blurred")
    assert "the same bytes as another" in (reasons["coffee"], reasons["coffee copy"])
    assert "shows what another shows" in (reasons["chelsea"], reasons["cat again"])
    assert reasons["cut"].startswith("cannot be decoded")
    kept = {row.key: row.caption for row in read_folder(tmp_path / "kept")}
    assert kept.keys() == {key for key, reason in reasons.items() if reason is None}
    assert len(kept) >= 15 and "orange space suit" in (kept["astronaut"] or "")
