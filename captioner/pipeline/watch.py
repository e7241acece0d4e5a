"""What a captioning job says while it runs: progress, the status file, and tripwires over its rows."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from captioner.config import CaptionConfig, TripwireConfig
from captioner.errors import Refused
from captioner.files import atomic_write_json, atomic_write_text
from captioner.pipeline.output import STATUS, Output
from captioner.pipeline.page import Page
from captioner.progress import Progress
from captioner.records import CaptionRow
from captioner.statements import loops

LEAST = 100  # rows: fewer at the end of a job are not judged
WINDOW = 60.0  # seconds over which rates are measured
MIRRORED = 60.0  # seconds between two puts of journal, status and page into a store
REFUSAL = re.compile(
    r"\W*(?:i['’]?m sorry|i am sorry|sorry\b|i can(?:no|['’])t|i am unable|i['’]m unable|as an ai)", re.I
)


@dataclass
class _Worker:
    state: str = "starting"
    images: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class _Sample:
    """What was done at a time, from which rates are taken."""

    time: float
    images: int = 0
    tokens: int = 0
    workers: dict[int, int] = field(default_factory=dict)  # images of each


class Tripwires:
    """Judges rows in blocks of ``config.rows``, so that what goes wrong late in a long job shows as well."""

    def __init__(self, config: TripwireConfig):
        self.config = config
        self.length: float | None = None  # mean tokens of the first block
        self._block: list[CaptionRow] = []

    def see(self, rows: Iterable[CaptionRow]) -> list[str]:
        """What is wrong with the blocks that these rows complete."""
        found: list[str] = []
        for row in rows:
            self._block.append(row)
            if len(self._block) >= self.config.rows:
                found += self.judge()
        return found

    def judge(self) -> list[str]:
        """What is wrong with the block at hand, which is then a new one."""
        block, self._block = self._block, []
        texts = [row.caption for row in block if row.caption is not None]
        if len(block) < min(LEAST, self.config.rows) or not texts:
            return []
        # copies of an image have one caption rightly
        distinct = {row.id: row.caption for row in block if row.caption is not None}
        most, times = Counter(distinct.values()).most_common(1)[0]
        tokens = [row.tokens or 0 for row in block if row.caption is not None]
        mean = sum(tokens) / len(tokens)
        self.length = self.length or mean
        drift = abs(mean - self.length) / self.length if self.length else 0.0
        limits = self.config
        same = times / len(distinct) if times > 1 else 0.0
        shares = (
            (same, limits.same, f"have one and the same caption: {most[:60]!r}"),
            (_share(row.error == "the model wrote no caption" for row in block), limits.empty, "are empty"),
            (_share(bool(REFUSAL.match(text)) for text in texts), limits.refused, "refuse to caption"),
            (
                _share(row.finish_reason == "length" for row in block),
                limits.cut,
                "are cut by the token limit",
            ),
            (_share(map(loops, texts)), limits.repeated, "repeat themselves"),
            (_share(row.error is not None for row in block), limits.failed, "failed"),
        )
        found = [
            f"{share:.1%} of the last {len(block)} rows {what}"
            for share, limit, what in shares
            if share > limit
        ]
        if drift > self.config.drift:
            found.append(f"captions became {mean:.0f} tokens long on average; they were {self.length:.0f}")
        return found


def _share(hits: Iterable[bool]) -> float:
    listed = list(hits)
    return sum(listed) / len(listed) if listed else 0.0


class Watch:
    """Counts the rows of a job as they come, shows them and raises Refused where a tripwire stops it."""

    def __init__(
        self,
        config: CaptionConfig,
        output: Output,
        *,
        shards: int,
        images: int | None,
        bar: Progress,
        page: Page | None = None,
    ):
        """``images`` None where the source does not say how many it holds: they are estimated then."""
        self.config, self.output, self.bar, self.page = config, output, bar, page
        self.shards, self.images = shards, images
        self.before = output.tally.rows
        self.done = self.failed = self.tokens = 0
        self.warnings: list[str] = []
        self.workers: dict[int, _Worker] = {}
        self.wires = Tripwires(config.tripwires)
        self.started = time.monotonic()
        self._samples: deque[_Sample] = deque([_Sample(self.started)])
        self._written = self._mirrored = -math.inf
        self._begun = _now()

    def worker(self, number: int, state: str) -> None:
        worker = self.workers.setdefault(number, _Worker())
        worker.state = state
        worker.deaths += state == "died"

    def had(self, count: int) -> None:
        """Rows of a shard that earlier commands began."""
        self.before += count

    def rows(self, number: int | None, rows: Sequence[CaptionRow]) -> None:
        """New rows of a worker. Raises Refused where a tripwire is to stop the job."""
        if number is not None:
            self.workers.setdefault(number, _Worker()).images += len(rows)
        self.done += len(rows)
        self.failed += sum(row.error is not None for row in rows)
        self.tokens += sum(row.tokens or 0 for row in rows)
        self.bar.advance(len(rows))
        self._trip(self.wires.see(rows))

    def say(self, text: str) -> None:
        """Note something for whoever looks, and print it."""
        self.warnings.append(text.splitlines()[0])
        print(text, file=sys.stderr)

    def tick(self, *, state: str = "running", force: bool = False) -> None:
        """Write the status file if it is time to."""
        now = time.monotonic()
        if not force and now - self._written < self.config.status_every:
            return
        self._written = now
        each = {number: worker.images for number, worker in self.workers.items()}
        self._samples.append(_Sample(now, self.done, self.tokens, each))
        while len(self._samples) > 2 and now - self._samples[1].time > WINDOW:
            self._samples.popleft()
        status = self.status(state)
        atomic_write_json(self.output.out / STATUS, status)
        if self.config.prometheus is not None:
            atomic_write_text(Path(self.config.prometheus), prometheus(status))
        if self.page is not None:
            self.page.refresh(status, last=state != "running")
        if self.output.mirror and (state != "running" or now - self._mirrored > MIRRORED):
            self._mirrored = now
            self.output.mirror.rest()

    def close(self) -> None:
        """Say that the job is done, where the process that did the last of it could not."""
        try:
            told = json.loads((self.output.out / STATUS).read_text(encoding="utf-8"))["state"] == "done"
        except (OSError, ValueError, LookupError, TypeError):
            told = False
        if not told or (self.page is not None and not self.page.complete):
            self.tick(state="done", force=True)

    def finish(self) -> None:
        """Judge the last rows."""
        self._trip(self.wires.judge())

    def status(self, state: str) -> dict[str, Any]:
        """The fields of the status file; see docs/bulk.md."""
        then, now = self._samples[0], self._samples[-1].time
        seconds = max(now - then.time, 1e-9)
        rate = (self.done - then.images) / seconds
        total = self._total()
        left = None if total is None else max(0, total - self.before - self.done)
        return {
            "state": state,
            "started": self._begun,
            "updated": _now(),
            "elapsed_s": round(now - self.started, 1),
            "images": {"total": total, "before": self.before, "done": self.done, "failed": self.failed},
            "shards": {"total": self.shards, "done": len(self.output.done)},
            "images_per_s": round(rate, 3),
            "tokens_per_s": round((self.tokens - then.tokens) / seconds, 1),
            "left_s": round(left / rate) if left is not None and rate > 0 else None,
            "workers": {
                str(number): asdict(worker)
                | {"images_per_s": round((worker.images - then.workers.get(number, 0)) / seconds, 3)}
                for number, worker in self.workers.items()
            },
            "warnings": self.warnings[-20:],
        }

    def _total(self) -> int | None:
        if self.images is not None:
            return self.images
        finished = len(self.output.done)
        return round(self.output.tally.rows / finished * self.shards) if finished else None

    def _trip(self, found: list[str]) -> None:
        action = self.config.tripwires.action
        if not found or action == "off":
            return
        for text in found:
            self.say(f"tripwire: {text}")
        if action == "stop":
            raise Refused(
                f"stopped by a tripwire: {'; '.join(found)}",
                where=str(self.output.out),
                fix="look at the rows; the same command with --caption.tripwires.action warn goes on",
            )


def prometheus(status: dict[str, Any]) -> str:
    """The status in Prometheus' text format, for the textfile collector."""
    images, shards = status["images"], status["shards"]
    values = {
        "images_total": images["total"],
        "images_done": images["before"] + images["done"],
        "images_failed": images["failed"],
        "shards_total": shards["total"],
        "shards_done": shards["done"],
        "images_per_second": status["images_per_s"],
        "tokens_per_second": status["tokens_per_s"],
        "seconds_left": status["left_s"],
        "running": int(status["state"] == "running"),
    }
    lines = []
    for name, value in values.items():
        if value is not None:
            lines += [f"# TYPE captioner_{name} gauge", f"captioner_{name} {value}"]
    for name, key in (("images", "images"), ("images_per_second", "images_per_s"), ("deaths", "deaths")):
        lines.append(f"# TYPE captioner_worker_{name} gauge")
        for number, worker in status["workers"].items():
            lines.append(f'captioner_worker_{name}{{worker="{number}"}} {worker[key]}')
    return "\n".join(lines) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
