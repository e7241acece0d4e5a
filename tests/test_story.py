"""docs/story.md runs as it is printed, on photographs that ship with scikit-image."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from loops.cli import main
from tests import photographs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "story.md"
CROPS = ((0.0, 0.0, 1.0, 1.0), (0.08, 0.06, 1.0, 1.0), (0.0, 0.0, 0.92, 0.94))  # left, top, right, bottom
SMALL = {  # for a machine without a GPU: the shipped model, and few steps
    "path": '"scenes-base"',
    "max_steps": "12",
    "save_steps": "4",
    "learning_rate": "3e-3",
}


@pytest.mark.slow
def test_the_story_runs_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    take_photographs(Path("photos"))
    ran = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        if language == "toml":
            for name, value in SMALL.items():
                block, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", block)
                assert found == 1, name
            Path("mine.toml").write_text(block, encoding="utf-8")
        else:
            assert language == "sh"
            for line in block.splitlines():
                words = shlex.split(line)
                assert words[0] == "captioner" and main(words[1:]) == 0, line
                ran.append(words[1])
                if words[1:3] == ["data", "prepare"]:
                    fill_in(Path("set/captions.csv"))
    assert {"sft", "evaluate", "report", "caption"} <= set(ran)
    said = capsys.readouterr().out
    assert "54 of 54 images are ready" in said and "54 of 54 images captioned" in said
    lines = map(json.loads, Path("runs/mine/sft/metrics.jsonl").read_text().splitlines())
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0] / 1.5
    summary = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert [one["name"] for one in summary["captioners"]] == ["base", "SFT"] and summary["images"] == 12
    assert "cider" in said and "54" in said
    assert all(name in Path("runs/mine/report.html").read_text() for name in ("base", "SFT"))
    assert len(list(Path("captions").rglob("*.txt"))) == 54


def take_photographs(folder: Path) -> None:
    """Eighteen photographs, three crops of each in a folder of its own, about fifty as a user has them."""
    for key, path in photographs.copy(folder.with_name("originals"), side=200).items():
        (folder / key).mkdir(parents=True)
        with Image.open(path) as photograph:
            wide, high = photograph.size
            for i, (left, top, right, bottom) in enumerate(CROPS):
                box = (int(left * wide), int(top * high), int(right * wide), int(bottom * high))
                photograph.crop(box).save(folder / key / f"{i + 1}.jpg")


def fill_in(table: Path) -> None:
    """What the user types: the captions that people wrote of the photographs."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    known = photographs.read()
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            facts = known[Path(row["file_name"]).parent.name]["facts"]
            writer.writerow(row | {"text": ", ".join(facts)})
