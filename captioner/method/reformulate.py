"""An image folder with prose captions -> the same images with shorthand captions, for fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from captioner.engines import NoAnswer
from captioner.errors import DataError
from captioner.method.tool import Tool
from captioner.records import Failed
from captioner.runs import Shards, atomic_dir
from captioner.sources.folder import read_folder


def reformulate(source: Path, out: Path, tool: Tool) -> tuple[int, list[Failed]]:
    """Write ``out`` (images, metadata.jsonl with ``text`` = shorthand and ``prose`` = the caption before).

    Returns the count of images written and those left out, which also stand in ``out``/failed with their
    reasons. ``out`` is there whole or not at all. Raises DataError where ``out`` exists or no image has a
    caption.
    """
    if out.exists():
        raise DataError("the output exists already", where=str(out), mend="name a new --out, or remove it")
    rows = read_folder(source)
    told = [row for row in rows if row.caption]
    if not told:
        raise DataError("no image has a caption", where=str(source), mend="see data/README.md for the forms")
    failed = [Failed(sample="", key=row.key, reason="no caption") for row in rows if not row.caption]
    count = 0
    with atomic_dir(out) as folder:
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
            made = tool.reformulate([row.caption or "" for row in told])
            for row, text in zip(told, made, strict=True):
                if isinstance(text, NoAnswer):
                    failed.append(Failed(sample="", key=row.key, reason=text.reason))
                    continue
                name = row.path.relative_to(source)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(row.path, folder / name)
                about = {"file_name": name.as_posix(), "text": text, "prose": row.caption}
                file.write(json.dumps(about, ensure_ascii=False) + "\n")
                count += 1
        Shards(folder / "failed", Failed).write(0, failed)
    return count, failed
