"""What the commands share: what they read and write, and when they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from captioner.errors import ConfigError, Refused
from captioner.runs import Run
from captioner.sources import resolve
from loops.stages import StagePlan


def plan(run: Run, source: str, out: Path | None = None, images: str | None = None) -> list[StagePlan]:
    """What is read and written."""
    inputs: dict[str, Path | str] = {"source": source}
    if images:
        inputs["images"] = images
    return [StagePlan("", inputs, outputs=[out] if out else [])]


def check_free(out: Path) -> None:
    """Raise ConfigError where the output exists."""
    if out.exists():
        fix = "name a new --out, or remove it first"
        raise ConfigError("the output exists already", where=str(out), fix=fix)


@contextmanager
def folder_of(source: str) -> Iterator[Path]:
    """The image folder of any source, for as long as it is read."""
    with TemporaryDirectory(prefix="captioner-") as cache:
        yield resolve(source, cache=Path(cache))


def report(written: int, failed: Mapping[str, int], max_failed: float, out: Path, what: str) -> None:
    """Print the counts; Refused where more than ``max_failed`` of all failed."""
    lost = Counter(failed)
    print(f"{written:,} {what}, {lost.total():,} failed: {out}")
    for reason, count in lost.most_common():
        print(f"  {count:,} {reason}")
    if lost.total() > max_failed * (written + lost.total()):
        raise Refused(
            f"{lost.total():,} of {written + lost.total():,} failed, more than max_failed = {max_failed:.1%}",
            where=str(out),
            fix="the others are written: see the reasons, or allow more with --max-failed",
        )
