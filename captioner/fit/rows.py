"""Which rows of a data set can be learned from: found before the first step, all at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from captioner.config import Config
from captioner.errors import Refused
from captioner.files import remove_dir
from captioner.fit import distributed
from captioner.processes import is_main
from captioner.progress import progress
from captioner.records import Failed
from captioner.runs import Shards
from captioner.sources.folder import ImageRow, caption_tables, load_row
from captioner.views import BadImage

SHOWN = 3  # images named for each reason


def usable(
    rows: Sequence[ImageRow],
    lacks: Callable[[ImageRow], str | None],
    home: Path,
    config: Config,
    sources: Sequence[Path],
    name: str = "failed",
) -> list[ImageRow]:
    """The rows whose image can be decoded and that lack nothing; ``lacks`` gives what a row lacks.

    The rows are of the folders ``sources``. The others are in ``home/name`` with their reasons, where a
    continued training finds them. Of processes that train together, the first looks. Raises :class:`Refused`
    where they are more than ``max_failed`` of all, or none is left, and removes ``home``, so that the same
    command works once they are fixed.
    """
    shards, max_failed = Shards(home / name, Failed), config.max_failed
    with distributed.main_first(config.model.device):
        if is_main() and not shards.has(0):
            failed = [each for each in _look(rows, lacks) if each]
            if len(failed) > max_failed * len(rows) or len(failed) == len(rows):
                remove_dir(home)
                raise _refused(failed, len(rows), max_failed, sources)
            shards.write(0, failed)
    failed = shards.read(0)
    if failed and is_main():
        print(
            f"{len(failed):,} of {len(rows):,} images are left out: {_reasons(failed)[0]}: {shards.path(0)}"
        )
    out = Counter(each.key for each in failed)
    return [row for row in rows if not out[row.key]]


def _look(rows: Sequence[ImageRow], lacks: Callable[[ImageRow], str | None]) -> list[Failed | None]:
    def look(row: ImageRow) -> Failed | None:
        reason = lacks(row)
        if reason is None:
            try:
                load_row(row)
            except BadImage as error:
                reason = error.reason
        bar.advance()
        return Failed(sample="", key=row.key, reason=reason) if reason else None

    # decoders release the interpreter
    with progress("reading images", len(rows)) as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(look, rows))


def _reasons(failed: Sequence[Failed]) -> tuple[str, str]:
    """What was wrong how often, on one line, and with the first images of each reason."""
    kinds: dict[str, list[str]] = {}
    for each in failed:
        kinds.setdefault(each.reason.split(":")[0].split(" (")[0], []).append(each.key)
    order = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    line = ", ".join(f"{len(keys):,} x {reason}" for reason, keys in order)
    shown = [f"  {len(keys):,} {reason}: {', '.join(keys[:SHOWN])}" for reason, keys in order]
    return line, "\n".join(
        text + ", ..." * (len(keys) > SHOWN) for text, (_, keys) in zip(shown, order, strict=True)
    )


def _refused(failed: Sequence[Failed], total: int, max_failed: float, sources: Sequence[Path]) -> Refused:
    what = f"{len(failed):,} of {total:,} images cannot be learned from, max_failed is {max_failed:.1%}"
    tables = {name: why for path in sources for name, why in caption_tables(path)[1].items()}
    passed_over = "".join(f"\n  not read: {name}: {why}" for name, why in list(tables.items())[:SHOWN])
    return Refused(
        f"{what}\n{_reasons(failed)[1]}{passed_over}",
        where=", ".join(map(str, sources)),
        fix="fix them (data/README.md has the forms), or allow more with --max_failed",
    )
