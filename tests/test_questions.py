"""Question files of others: VQAv2, GQA, POPE, plain and hostile rows, and a QA stage that learns of one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.config import AdapterTuning, Config, QAConfig, TrainingConfig
from captioner.errors import DataError, Refused
from captioner.lab import grid as scenes
from captioner.method import qa
from captioner.runs import Run
from captioner.sources import questions
from loops import qa as loop
from loops.cli import main
from tests.tiny import tiny_checkpoint

IMAGES = (
    "val/COCO_val2014_000000000042.jpg",
    "val/COCO_val2014_000000000137.jpg",
    "gqa/2370799.jpg",
    "dog.png",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(tmp_path / name)
    return tmp_path


def write(path: Path, rows: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def found(path: Path) -> dict[str, list[tuple[str, str, str, str]]]:
    rows, _ = questions.read(path)
    columns = ("question", "answer", "kind", "stratum")
    return {row.key: [tuple(q[c] for c in columns) for q in row.questions or []] for row in rows}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_plain_rows(home: Path, suffix: str) -> None:
    rows = [
        {"image": "dog.png", "question": "Is there a dog?", "answer": "Yes", "kind": "animal"},
        {"image": "dog.png", "question": "Is there a cat?", "answer": "no.", "kind": "animal"},
        {"image": "val/COCO_val2014_000000000042.jpg", "question": "Is it red?", "answer": "no", "kind": ""},
        {"image": "dog", "question": "What is it?", "answer": "a dog", "kind": "animal"},
    ]
    path = write(home / f"rows{suffix}", rows)
    assert found(path) == {
        "dog": [
            ("Is there a dog?", "yes", "animal", "positive"),
            ("Is there a cat?", "no", "animal", "negative"),
        ],
        "val/COCO_val2014_000000000042": [("Is it red?", "no", "", "negative")],
    }
    assert questions.read(path)[1] == {"rows": 4, "questions": 3, questions.OTHER_ANSWER: 1}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])  # POPE's own files are JSON Lines called .json
def test_pope(home: Path, suffix: str) -> None:
    rows = [
        {"image": Path(IMAGES[0]).name, "text": f"Is there a {name} in the image?", "label": label}
        for name, label in (("snowboard", "yes"), ("car", "no"))
    ]
    path = home / f"coco_pope_adversarial{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert found(path) == {
        "val/COCO_val2014_000000000042": [
            ("Is there a snowboard in the image?", "yes", "", "adversarial"),
            ("Is there a car in the image?", "no", "", "adversarial"),
        ]
    }


def test_gqa(home: Path) -> None:
    types = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}
    rows = {
        "0753": {"imageId": "2370799", "question": "Is the sky dark?", "answer": "yes", "types": types},
        "0754": {"imageId": "2370799", "question": "What is dark?", "answer": "sky", "types": types},
    }
    path = write(home / "val_balanced_questions.json", rows)
    assert found(path) == {"gqa/2370799": [("Is the sky dark?", "yes", "attr", "positive")]}


def test_vqa(home: Path) -> None:
    rows = [
        (420, "yes/no", "yes", "is the"),
        (421, "number", "2", "how many"),
        (1370, "yes/no", "no", "is there"),
        (1371, "yes/no", "no", "is there"),
    ]
    columns = ("question_id", "answer_type", "multiple_choice_answer", "question_type")
    told = [{**dict(zip(columns, row, strict=True)), "image_id": row[0] // 10} for row in rows]
    asked = [{"question_id": i, "image_id": i // 10, "question": f"Is it {i}?"} for i in (420, 421, 1370)]
    answers = write(home / "v2_mscoco_val2014_annotations.json", {"annotations": told})
    with pytest.raises(DataError, match="0 question files"):
        questions.read(answers)
    file = write(home / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(home / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": []})
    assert found(answers) == {
        "val/COCO_val2014_000000000042": [("Is it 420?", "yes", "is the", "positive")],
        "val/COCO_val2014_000000000137": [("Is it 1370?", "no", "is there", "negative")],
    }
    assert questions.read(answers)[1][questions.NO_TEXT] == 1
    with pytest.raises(DataError, match="annotations"):
        questions.read(file)


def test_a_folder_is_asked_by_the_question_file_in_it(home: Path) -> None:
    assert questions.read_any(home)[1] == {}
    write(home / "rows.jsonl", [{"image": "dog.png", "question": "Is there a dog?", "answer": "yes"}])
    (home / "captions.jsonl").write_text('{"file_name": "dog.png", "text": "a dog"}')  # not of questions
    rows, counts = questions.read_any(home)
    assert [row.key for row in rows] == ["dog"] and counts["questions"] == 1
    write(home / "more.jsonl", [{"image": "dog.png", "question": "Is it?", "answer": "no"}])
    with pytest.raises(DataError, match=r"2 question files: more\.jsonl, rows\.jsonl"):
        questions.read_any(home)


def test_a_number_is_no_answer_of_a_counting_question(home: Path) -> None:
    """VQAv2 counts: "1" there is a number, in a set without answer types it may be a label."""
    row = {"image": "dog.png", "question": "How many dogs?", "answer": "1"}
    assert found(write(home / "a.json", [{**row, "answer_type": "number"}])) == {}
    assert found(write(home / "b.json", [{**row, "label": 1, "answer": None}])) == {
        "dog": [("How many dogs?", "yes", "", "positive")]
    }


def test_bad_rows_are_counted_and_limited(home: Path) -> None:
    good = {"image": "dog.png", "question": "Is there a dog?", "answer": "yes"}
    rows = [
        good, good, {**good, "image": "cat.png"}, {**good, "image": "../dog.png"},
        {**good, "question": "  ?"},
        {**good, "question": "x" * 2000}, {**good, "answer": None}, {**good, "answer": ["yes"]}, 7, None,
        {**good, "image": None}, {**good, "image": {"path": "dog.png"}},
    ]  # fmt: skip
    path = write(home / "rows.jsonl", rows)
    used, counts = questions.read(path)
    assert [row.key for row in used] == ["dog"]
    assert counts == {
        "rows": 12, "questions": 1, questions.TWICE: 1, questions.NO_IMAGE: 4, questions.NO_TEXT: 1,
        questions.TOO_LONG: 1, questions.NO_ANSWER: 2, questions.NO_ROW: 2,
    }  # fmt: skip
    with pytest.raises(Refused, match=r"11 of 12 rows cannot be used \(4 x no such image"):
        questions.read(path, 0.5)
    (home / "val" / "dog.png").write_bytes((home / "dog.png").read_bytes())
    _, counts = questions.read(write(home / "one.json", [{**good, "image": "dog"}]))
    assert counts[questions.TWO_IMAGES] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2", "cannot be read"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.json", b"7", "neither rows"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b"\xff", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.txt", b"", "not a question file"),
    ],
)
def test_files_that_are_none(home: Path, name: str, content: bytes, message: str) -> None:
    (home / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        questions.read(home / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["yes", "dog.png"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "question", "answer", "types", "kind", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(JSON, max_size=5))
def test_any_json_gives_rows_or_counts(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    home = tmp_path_factory.mktemp("any")
    Image.new("RGB", (8, 8)).save(home / "dog.png")
    used, counts = questions.read(write(home / "rows.json", rows))
    assert sum(counts.values()) == 2 * counts["rows"]  # every row is a question or has a reason
    assert all(row.questions for row in used)


@pytest.mark.slow
def test_a_verifier_learns_from_a_question_file(tmp_path: Path) -> None:
    """One question an image: no image has a balanced pair, the set as a whole has."""
    folder = tmp_path / "asked"
    scenes.write("qa", 12, folder)
    rows = []
    for index in range(12):
        own = scenes.questions(scenes.sample("qa", index))
        wanted = "yes" if index % 2 else "no"
        one = next(q for q in own if q["answer"] == wanted and q["kind"] == "color")
        rows.append({"image": f"{index:06d}.png", **one})
    rows.append({**rows[-1], "question": "center red", "answer": "yes"})  # one "yes" too many
    file = write(folder / "asked.jsonl", rows)
    training = TrainingConfig(max_steps=2, per_device_train_batch_size=2, save_steps=2)
    config = Config(
        qa=QAConfig(
            data=str(file),
            holdout=0.34,
            tuning=AdapterTuning(vision_width=0, language_width=4),
            training=training,
        )
    )
    Run.open(tmp_path / "run", config)
    tiny_checkpoint(tmp_path / "run" / "sft" / "captioner")
    loop.qa(tmp_path / "run", config, 1)
    counts = json.loads((tmp_path / "run" / "round-1" / "qa" / "stage.json").read_text())["counts"]
    assert counts["rows"] == 13 and counts["questions"] == 13
    assert counts["images"] + counts["held_out_images"] in (11, 12)
    used, _ = qa.read_rows(file, config.max_failed, 0)
    assert Counter(q["answer"] for row in used for q in row.questions or []) == {"yes": 6, "no": 6}


def test_evaluate_asks_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores of `captioner evaluate --questions` are those of the engine's own answers."""
    from captioner.engines import QuestionBatch, make_engine
    from captioner.method import qa
    from captioner.sources.folder import load_row, read_folder

    scenes.write("qa", 3, tmp_path / "asked")
    checkpoint = tiny_checkpoint(tmp_path / "verifier").path
    job = ["evaluate", "--run", str(tmp_path / "run"), "--checkpoint", str(checkpoint)]
    job += ["--model.path", str(checkpoint), "--questions", str(tmp_path / "asked")]
    assert main(job) == 0
    written = json.loads((tmp_path / "run" / "questions.json").read_text())["accuracy"]
    engine = make_engine(Path(checkpoint), Config())
    rows = read_folder(tmp_path / "asked")
    asked = [list(filter(qa.is_yes_no, row.questions or [])) for row in rows]
    batches = [
        QuestionBatch(load_row(row)[0], list(map(qa.question_text, own)))
        for row, own in zip(rows, asked, strict=True)
    ]
    answers = [
        qa.Answer(q["kind"], q["stratum"], q["answer"], reply.p_yes, reply.label_mass)
        for own, replies in zip(asked, engine.p_yes(batches), strict=True)
        for q, reply in zip(own, replies, strict=True)
    ]
    expected = qa.accuracy_table(answers)
    assert written["verifier"] == {name: vars(row) for name, row in expected.items()} == written["base"]
    printed = capsys.readouterr().out
    assert "kind color" in printed and f"{expected['kind color'].accuracy:.3f}" in printed
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "a.png")
    assert main([*job[:-1], str(tmp_path / "empty")]) == 2
    assert "no image has yes/no questions" in capsys.readouterr().err
