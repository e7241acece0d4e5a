"""captioner data preferences --round N --to trl|swift --out OUTPUT: a round's pairs for other trainers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from captioner.config import Config
from captioner.errors import RunError
from captioner.files import atomic_dir
from captioner.records import Pair
from captioner.runs import Run, RunDir, Shards, input_of
from captioner.sources.folder import read_folder
from loops.data.edge import check_free, report
from loops.stages import StagePlan

__all__ = ["plan", "preferences"]


def plan(run: Run, out: Path, round: int = 1) -> list[StagePlan]:
    """What is read and written."""
    home = run.stage_dir(f"round-{round}")
    return [StagePlan("", {"pairs": home / "pairs", "candidates": home / "candidates"}, outputs=[out])]


def preferences(
    run: RunDir, config: Config, *, out: Path, round: int = 1, to: Literal["trl", "swift"] = "trl"
) -> Path:
    """Write the preference pairs of a round, with their images and prompt; returns the new folder.

    Args:
        run: Run directory with the pairs of the round.
        config: Settings; only `max_failed` is read.
        out: Folder to write; a new one.
        round: Number of the round, from 1.
        to: `trl` = Parquet files that TRL's DPOTrainer takes, `swift` = pairs.jsonl and images/ for ms-swift.

    Raises:
        RunError: the round has no pairs.
        Refused: more than `max_failed` of the pairs have lost their image.
    """
    from captioner.layouts.preferences import write

    check_free(out)
    run = Run.open(run, config, create=False)
    home = run.stage_dir(f"round-{round}")
    images = input_of(home / "candidates", "images")
    if images is None or not (home / "pairs").is_dir():
        fix = f"captioner golden --round {round} --run {run.path}"
        raise RunError("the round has no pairs", where=str(home), fix=fix)
    rows = {row.key: row for row in read_folder(images, captions=False)}
    lost: Counter[str] = Counter()
    with atomic_dir(out) as part:
        count = write(to, Shards(home / "pairs", Pair).read_all(), rows, images, part, lost)
    report(count, lost, config.max_failed, out, "pairs")
    return out
