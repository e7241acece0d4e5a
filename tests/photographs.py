"""Real photographs that ship with scikit-image, with facts about them written by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from PIL import Image

FILE = Path(__file__).with_name("photographs.jsonl")
# What is in none of the photographs.
NONSENSE = (
    "purple whale",
    "flying toaster",
    "nine moons",
    "glass piano",
    "striped penguin",
    "burning umbrella",
    "marble staircase",
    "pile of bananas",
)


def read() -> dict[str, dict[str, Any]]:
    """Facts and plausible falsehoods of each photograph: key -> {file_name, facts, false}."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return {Path(row["file_name"]).stem: row for row in rows}


def copy(folder: Path, side: int = 160) -> dict[str, Path]:
    """The photographs in a folder of their own, by key, at most ``side`` px wide and high."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None, "pip install scikit-image"
    data = Path(spec.origin).parent / "data"
    folder.mkdir(parents=True)
    rows = {key: row["file_name"] for key, row in read().items()}
    for name in rows.values():
        with Image.open(data / name) as photograph:
            small = photograph.convert("RGB")
        small.thumbnail((side, side))
        small.save(folder / name)
    return {key: folder / name for key, name in rows.items()}
