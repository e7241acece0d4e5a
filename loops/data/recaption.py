"""captioner data recaption SET --teacher CHECKPOINT_OR_URL --out OUTPUT: captions from a stronger captioner.

The teacher is a vision-language model behind an OpenAI-compatible server, or a checkpoint, which the bulk
pipeline runs. A killed command goes on: what the teacher has said is kept in the run directory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from captioner import prompts
from captioner.config import Config
from captioner.errors import ConfigError
from captioner.files import atomic_dir, row_seed
from captioner.records import CaptionRow, Failed
from captioner.runs import Run, RunDir, Shards
from captioner.sources import resolve
from captioner.sources.folder import ImageRow, json_line, link_image, read_captions, read_folder
from loops.data.edge import check_free, report
from loops.stages import StagePlan

__all__ = ["plan", "recaption"]

URL = ("http://", "https://")


def plan(run: Run, source: str, teacher: str, out: Path) -> list[StagePlan]:
    """What is read and written."""
    inputs: dict[str, Path | str] = {"source": source}
    if not teacher.startswith(URL):
        inputs["teacher"] = Path(teacher)
    return [StagePlan("", inputs, outputs=[out])]


def recaption(
    run: RunDir,
    config: Config,
    source: str,
    *,
    teacher: str,
    out: Path,
    hint: bool = False,
    keep: float = 0.0,
) -> Path:
    """Make a set of images with the captions of a teacher; returns the new folder.

    Args:
        run: Run directory that keeps what the teacher has said.
        config: Settings; `tool` is read for a server, else `model`, `views`, `engine` and `caption`.
        source: Images, with captions or without.
        teacher: Address of a server, such as http://127.0.0.1:8000/v1, or a checkpoint directory.
        out: Folder to write; a new one. The caption before stands in the column `original`.
        hint: Show the teacher the caption that is there. Servers only.
        keep: Share of the images that keep the caption they have, drawn by `seed`; from 0 to 1.

    Raises:
        Refused: more than `max_failed` of the images have no caption.
    """
    check_free(out)
    if not 0 <= keep <= 1:
        raise ConfigError(f"{keep:g} is no share", where="--keep", fix="a number from 0 to 1")
    home = Run.path_of(run)
    folder = resolve(source, cache=home / "data")
    rows = read_folder(folder)
    stays = {row.key for row in rows if row.caption and _drawn(row, config.seed) < keep}
    asked = [row for row in rows if row.key not in stays]
    made: Iterable[CaptionRow]
    if teacher.startswith(URL):
        from captioner.method.recaption import describe

        tool = config.tool.model_copy(update={"urls": (teacher,)})
        shards = Shards(
            home
            / "recaption"
            / _name(asked, teacher, tool.model, hint and prompts.prompt_hash("recaption_hint")),
            CaptionRow,
        )
        made = describe(asked, shards, tool, hint=hint)
    elif hint:
        raise ConfigError("a checkpoint takes no hint", where="--hint", fix="serve it, and name its address")
    else:
        from loops.caption import caption

        place = home / "recaption" / _name(rows, teacher, None, hint)
        caption(
            run, config.model_copy(update={"max_failed": 1.0}), str(folder), out=place, checkpoint=teacher
        )
        made = read_captions(place)
    count, failed = _write(rows, {row.key: row for row in made}, stays, folder, out)
    if stays:
        print(f"{len(stays):,} images keep the caption that they had")
    report(count, Counter(each.reason for each in failed), config.max_failed, out, "images with captions")
    return out


def _drawn(row: ImageRow, seed: int) -> float:
    return row_seed(seed, "keep", row.key) / 2**31


def _name(rows: Iterable[ImageRow], *about: object) -> str:
    """Of the folder with what the teacher has said: other images, another teacher or hint have another."""
    told = [[row.key, row.caption, row.path.stat().st_mtime_ns if row.path.is_file() else 0] for row in rows]
    return hashlib.sha256(json.dumps([told, about]).encode()).hexdigest()[:12]


def _write(
    rows: Iterable[ImageRow], made: dict[str, CaptionRow], stays: set[str], folder: Path, out: Path
) -> tuple[int, list[Failed]]:
    """The images, metadata.jsonl, and the reasons of those without a caption."""
    failed: list[Failed] = []
    count = 0
    with atomic_dir(out) as part:
        with (part / "metadata.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                told = made.get(row.key)
                text = row.caption if row.key in stays else told.caption if told else None
                if row.error or not text:
                    reason = row.error or (told.error if told else None) or "no caption"
                    failed.append(Failed(sample="", key=row.key, reason=reason))
                    continue
                about = {"file_name": link_image(row, folder, part), "text": text, "original": row.caption}
                file.write(json_line({name: value for name, value in about.items() if value is not None}))
                count += 1
        Shards(part / "failed", Failed).write(0, failed)
    return count, failed
