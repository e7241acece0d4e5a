"""captioner data filter SOURCE --out OUTPUT: drop images and captions by rules, each with its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.errors import DataError
from captioner.files import atomic_dir
from captioner.records import CaptionRow, read_parquet
from captioner.runs import RunDir, Shards
from captioner.sources.folder import caption_shards, json_line, link_image, read_captions, read_folder
from captioner.sources.screen import Rules, Screened, screen
from loops.data.edge import check_free, folder_of, plan

__all__ = ["filter", "plan"]


def filter(
    run: RunDir,
    config: Config,
    source: str,
    *,
    out: Path | None = None,
    ended: bool = False,
    max_repeats: int | None = None,
    min_side: int | None = None,
    max_aspect: float | None = None,
    min_detail: float | None = None,
    near: int | None = None,
) -> Path | None:
    """Keep the captions, or images, that pass every rule; returns their folder.

    Args:
        run: Not read.
        config: Settings; none is read.
        source: Output of `captioner caption`, or images with or without captions.
        out: Folder to write; a new one. Of images it can be left out: then the counts are printed alone.
        ended: Captions: drop those that were cut at the token limit.
        max_repeats: Captions: drop those that more than this many images have.
        min_side: Images: drop those whose shorter side has fewer pixels.
        max_aspect: Images: drop those whose longer side is more times the shorter one.
        min_detail: Images: drop blurred ones, by the deviation of the Laplacian at 256 pixels; try 4.
        near: Images: drop those whose 64-bit perceptual hash differs from another's in at most so many bits;
            try 4.
    """
    if out is not None:
        check_free(out)
    if caption_shards(Path(source)):
        if out is None:
            raise DataError("no output to write", where="--out", fix="add --out FOLDER")
        print(_filter(Path(source), out, ended, max_repeats))
        return out
    rules = Rules(min_side, max_aspect, min_detail, near)
    with folder_of(source) as folder:
        found = list(screen(read_folder(folder), rules))
        if out is not None:
            with atomic_dir(out) as part:
                _write(found, folder, part)
    left = len(found)
    print(f"{left:,} images")
    for reason, count in Counter(each.reason for each in found if each.reason).most_common():
        left -= count
        print(f"  {left:,} after {count:,}: {reason}")
    print(f"{left:,} of {len(found):,} images kept" + (f": {out}" if out else ""))
    return out


def _write(found: list[Screened], folder: Path, out: Path) -> None:
    """The images that stay, metadata.jsonl, and reasons.jsonl with what was measured of every image."""
    with (
        (out / "metadata.jsonl").open("w", encoding="utf-8") as table,
        (out / "reasons.jsonl").open("w", encoding="utf-8") as reasons,
    ):
        for each in found:
            about = {"key": each.row.key, "reason": each.reason, "width": each.width, "height": each.height}
            reasons.write(json_line(about | {"detail": each.detail, "copy_of": each.copy_of}))
            if each.reason is not None:
                continue
            row: dict[str, Any] = {"file_name": link_image(each.row, folder, out), "text": each.row.caption}
            row |= {"prose": each.row.prose, "facts": each.row.facts, "questions": each.row.questions}
            told = {name: value for name, value in row.items() if value is not None}
            if len(told) > 1:
                table.write(json_line(told))
    if not (out / "metadata.jsonl").stat().st_size:
        (out / "metadata.jsonl").unlink()


def _filter(folder: Path, out: Path, ended: bool, max_repeats: int | None) -> str:
    """Write the rows that pass, shard by shard as they lie; returns the closing line."""
    shards = caption_shards(folder)
    if not shards:
        raise DataError("no caption rows here", where=str(folder), fix="name what `captioner caption` wrote")
    repeats: Counter[int] = Counter()
    if max_repeats is not None:  # hashes, so that the captions of a large set need little memory
        repeats.update(hash(row.caption) for row in read_captions(folder) if row.caption is not None)
    dropped: Counter[str] = Counter()
    kept = 0

    def passes(row: CaptionRow) -> bool:
        if row.caption is None:
            reason = "without a caption"
        elif ended and row.finish_reason != "stop":
            reason = "cut at the token limit"
        elif max_repeats is not None and repeats[hash(row.caption)] > max_repeats:
            reason = f"said of more than {max_repeats:,} images"
        else:
            return True
        dropped[reason] += 1
        return False

    with atomic_dir(out) as part:
        for shard in shards:
            rows = [row for row in read_parquet(shard, CaptionRow) if passes(row)]
            Shards(part, CaptionRow).write(int(shard.stem), rows)
            kept += len(rows)
    reasons = "".join(f", {count:,} {reason}" for reason, count in dropped.most_common())
    return f"{kept:,} rows kept{reasons}: {out}"
