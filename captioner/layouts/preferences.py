"""Preference pairs with image and prompt, in the forms of TRL and ms-swift.

TRL: https://huggingface.co/docs/trl/dataset_formats (vision, conversational). ms-swift: its page on custom
data sets (`messages`, `rejected_response`, `images`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from captioner import prompts
from captioner.layouts.writers import ROW_GROUP
from captioner.records import Pair
from captioner.sources.folder import ImageRow, json_line, link_image
from captioner.views import BadImage, read_bytes


def write(
    to: Literal["trl", "swift"],
    pairs: Sequence[Pair],
    images: Mapping[str, ImageRow],
    folder: Path,
    out: Path,
    lost: Counter[str],
) -> int:
    """Write the pairs into ``out``; returns how many. ``lost`` counts those whose image is gone, by reason.

    ``images``: the rows of ``folder`` by key.
    """
    if to == "trl":
        return _trl(pairs, images, out, lost)
    return _swift(pairs, images, folder, out, lost)


def _messages(pair: Pair) -> dict[str, list[dict[str, str]]]:
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": "user", "content": prompts.load("caption")}], **said}


def _trl(pairs: Sequence[Pair], images: Mapping[str, ImageRow], out: Path, lost: Counter[str]) -> int:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = datasets.Features(
        {"images": [datasets.Image()], "prompt": turn, "chosen": turn, "rejected": turn}
    )
    count = 0
    with pq.ParquetWriter(out / "train.parquet", features.arrow_schema) as writer:
        rows = _with_bytes(pairs, images, lost)
        while chunk := list(islice(rows, ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=features.arrow_schema))
            count += len(chunk)
    return count


def _with_bytes(
    pairs: Sequence[Pair], images: Mapping[str, ImageRow], lost: Counter[str]
) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        try:
            if pair.key not in images:
                raise BadImage("no such file")
            path = images[pair.key].path
            yield {"images": [{"bytes": read_bytes(path), "path": path.name}], **_messages(pair)}
        except BadImage as error:
            lost[error.reason] += 1


def _swift(
    pairs: Sequence[Pair], images: Mapping[str, ImageRow], folder: Path, out: Path, lost: Counter[str]
) -> int:
    placed: dict[str, str] = {}
    count = 0
    with (out / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for pair in pairs:
            if pair.key not in images:
                lost["no such file"] += 1
                continue
            if pair.key not in placed:
                (out / "images").mkdir(exist_ok=True)
                placed[pair.key] = f"images/{link_image(images[pair.key], folder, out / 'images')}"
            said = _messages(pair)
            said["prompt"][0]["content"] = "<image>" + said["prompt"][0]["content"]
            row = {"messages": said["prompt"] + said["chosen"], "rejected_response": pair.rejected}
            file.write(json_line(row | {"images": [placed[pair.key]]}))
            count += 1
    return count
