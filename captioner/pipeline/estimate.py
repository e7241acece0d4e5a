"""How long a captioning job would take: a sample of its images through every stage, each timed by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

from captioner import views
from captioner.engines import Engine
from captioner.errors import DataError
from captioner.pipeline.local import Inline
from captioner.pipeline.worker import Settings, Worker
from captioner.sources.source import Item, ShardRef, read_shard
from captioner.views import BadImage

SHARDS = 8  # that the sample is spread over, a part of each from its start


@dataclass(frozen=True)
class Estimate:
    """Seconds of one core (read, prepare) or one device (caption) for an image."""

    images: int
    failed: int
    seconds: dict[str, float]
    tokens: float  # per image

    def rates(self, workers: int, processes: int) -> dict[str, float]:
        """Images per second of each stage where that many work on it."""
        hands = {"read": workers, "prepare": workers * max(1, processes), "caption": workers}
        return {stage: hands[stage] / max(spent, 1e-9) for stage, spent in self.seconds.items()}


def estimate(settings: Settings, engine: Engine, shards: list[ShardRef], count: int) -> Estimate:
    """Run ``count`` images of ``shards`` through reading, preparation and the engine, one stage at a time.

    The first images go through the engine twice: what it does only once (compiling, warming up) is not timed.
    Raises :class:`DataError` where none of them can be captioned.
    """
    chosen = [shards[i * len(shards) // min(SHARDS, len(shards))] for i in range(min(SHARDS, len(shards)))]
    started = time.monotonic()
    each = -(-count // len(chosen))
    items = [item for shard in chosen for item in islice(read_shard(shard), each)][:count]
    data = [_bytes(item) for item in items]
    read = time.monotonic()
    reduced, cuts, failed = settings.config.caption.reduced_decode, [], 0
    for source in data:
        try:
            cuts.append(views.prepare(source, engine.renderer.spec, reduced))
        except BadImage:
            failed += 1
    prepared = time.monotonic()
    if not cuts:
        raise DataError("none of the sampled images can be captioned", fix="captioner data stats INPUT")
    worker = Worker(settings, engine, Inline(2), lambda: None, lambda event: None)
    worker.caption(cuts[: settings.config.engine.max_num_seqs])
    warm = time.monotonic()
    rows = worker.caption(cuts)
    ended = time.monotonic()
    seconds = {"read": read - started, "prepare": prepared - read}
    per_image = {stage: spent / len(items) for stage, spent in seconds.items()}
    per_image["caption"] = (ended - warm) / len(cuts)
    return Estimate(len(items), failed, per_image, sum(row.tokens or 0 for row in rows) / len(rows))


def _bytes(item: Item) -> bytes:
    """The bytes of an image, none where it cannot be read."""
    try:
        image = item.image or b""
        return image if isinstance(image, bytes) else views.read_bytes(image)
    except BadImage:
        return b""
