"""captioner data filter CAPTIONS --out OUTPUT: drop captions that were cut off or repeat across images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from captioner.config import Config
from captioner.errors import DataError
from captioner.records import CaptionRow, read_parquet
from captioner.runs import RunDir, Shards, atomic_dir
from captioner.sources.folder import caption_shards, read_captions
from loops.data.edge import check_free, plan

__all__ = ["filter", "plan"]


def filter(
    run: RunDir,
    config: Config,
    source: str,
    *,
    out: Path,
    ended: bool = False,
    max_repeats: int | None = None,
) -> Path:
    """Copy the captions that pass; returns their folder.

    Args:
        run: Not read.
        config: Settings; none is read.
        source: Output of `captioner caption`.
        out: Folder to write; a new one.
        ended: Drop captions that were cut at the token limit.
        max_repeats: Drop captions that more than this many images have.
    """
    check_free(out)
    print(_filter(Path(source), out, ended, max_repeats))
    return out


def _filter(folder: Path, out: Path, ended: bool, max_repeats: int | None) -> str:
    """Write the rows that pass, shard by shard as they lie; returns the closing line."""
    shards = caption_shards(folder)
    if not shards:
        raise DataError("no caption rows here", where=str(folder), mend="name what `captioner caption` wrote")
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
