"""What the stages of a round share: its plan, its rows and counts, how they begin and end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from captioner import laboratory
from captioner.errors import Refused, RunError
from captioner.records import Candidate, Claim, Failed
from captioner.runs import Run, Shards, Stage
from captioner.sources.folder import ImageRow
from captioner.sources.gather import part_of_round

if TYPE_CHECKING:
    from captioner.laboratory import Laboratory

Inputs = dict[str, Path | str]  # a Path, or a data source as the config names it
RowT = TypeVar("RowT", Candidate, Claim)
STAGES = ("candidates", "claims", "verdicts", "golden", "pairs")
CHANGED = "changed since it was sampled"


@dataclass(frozen=True)
class Plan:
    """What a round of golden captions is made of."""

    number: int
    source: str  # of the images
    captioner: Path
    qa: Path  # the round's QA stage
    home: Path  # the round's directory

    @property
    def verifier(self) -> Path:
        return self.qa / "captioner"

    @property
    def calibration(self) -> Path:
        return self.qa / "calibration.json"

    @property
    def lab(self) -> Laboratory | None:
        """What knows all about the images, where something does."""
        return laboratory.of_source(self.source)


def round_source(source: str, number: int) -> str:
    """The images of round ``number``: of a laboratory and of a source with a count, it takes its own part."""
    part = laboratory.parse(source)
    return part_of_round(source, number) if part is None else part.next(number - 1)


# ---------------------------------------------------------------- rows and counts


def by_key(rows: Iterable[RowT]) -> dict[str, list[RowT]]:
    """Rows of each image, which stand together, in order."""
    return {key: list(group) for key, group in groupby(rows, key=lambda row: row.key)}


def verdict_counts(claims: Iterable[Claim]) -> dict[str, int]:
    verdicts = Counter(claim.verdict for claim in claims)
    return {"kept": verdicts["keep"], "dropped": verdicts["drop"], "abstained": verdicts["abstain"]}


def parts(images: list[ImageRow], size: int) -> list[list[ImageRow]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def shard_count(folder: Path) -> int:
    return len(list(folder.glob("[0-9]*.parquet")))


def failures(folder: Path) -> Counter[str]:
    return Counter(row.reason for row in Shards(folder / "failed", Failed).read_all())


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """An accuracy table as JSON. Raises RunError where there is none."""
    try:
        table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"no accuracy: {error}", where=str(path), fix="captioner qa --redo") from error
    return table


# ---------------------------------------------------------------- beginning and ending a stage


def judged(home: Path) -> dict[str, Path]:
    """The stages that hold the claims with their verdicts; rounds of 0.1 have these in the claims."""
    old = (home / "golden").is_dir() and not (home / "verdicts").is_dir()
    return {name: home / name for name in (("claims",) if old else ("claims", "verdicts"))}


def finish(
    stage: Stage,
    run: Run,
    counts: dict[str, int],
    images: int,
    metrics: dict[str, object] | None = None,
) -> None:
    """Publish the stage, unless more images failed up to here than the limit allows."""
    reasons = failures(stage.dir)
    before = STAGES[: STAGES.index(stage.dir.name)]
    failed = reasons.total() + sum(failures(stage.dir.parent / name).total() for name in before)
    if failed > run.config.max_failed * images:
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise Refused(
            f"{failed} of {images} images failed ({listed}), the limit is {run.config.max_failed:.0%}",
            where=str(stage.dir),
            fix="look at failed/ there; --max-failed raises the limit",
        )
    stage.finish({**counts, "failed": reasons.total()}, metrics, failed_reasons=dict(reasons))
