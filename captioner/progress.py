"""What a terminal shows: tables and progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 120  # columns


class Progress:
    """Counts what is done; :func:`progress` makes one that shows it."""

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """``n`` more are done; ``tokens``, where they are counted, were written for all up to now."""


def console() -> Console:
    """Where tables are printed; wide enough for them where the output is not a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


@contextmanager
def progress(description: str, total: int) -> Generator[Progress, None, None]:
    """A bar with rate and time left on stderr; silent without a terminal and below two steps."""
    if total < 2 or not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, rate="")
        start, finished = time.monotonic(), 0

        class Shown(Progress):
            def advance(self, n: int = 1, tokens: int = 0) -> None:
                nonlocal finished
                finished += n
                seconds = max(time.monotonic() - start, 1e-9)
                written = f", {tokens / seconds:.0f} tokens/s" if tokens else ""
                bar.update(task, advance=n, rate=f"{finished / seconds:.1f}/s{written}")

        yield Shown()
