"""Texts that people read, compared with files: CAPTIONER_SNAPSHOTS=write writes the files anew."""

import os
from pathlib import Path

HOME = Path(__file__).with_name("snapshots")


def compare(name: str, text: str) -> None:
    file = HOME / f"{name}.txt"
    if os.environ.get("CAPTIONER_SNAPSHOTS") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"CAPTIONER_SNAPSHOTS=write pytest writes {file.name} anew"
