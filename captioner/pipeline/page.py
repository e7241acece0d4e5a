"""The page of a captioning job: ``OUTPUT/report.html``, one file without scripts, replaced as it runs.

It is made of the parts as they are published, each read once, so that neither memory nor the page grows with
the job. The captions that it shows are those of the images with the lowest sha256: as good as drawn at
random, and the same however the job was cut. Keys and captions are untrusted: the template escapes them, and
the page's policy allows no script and no address.
"""

from __future__ import annotations

import base64
import bisect
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from captioner.errors import DataError
from captioner.files import atomic_file, atomic_write_text
from captioner.pipeline.output import PAGE, PAGE_STATE, THUMBNAILS, Output
from captioner.records import CaptionRow
from captioner.views import Cut

SHOWN = 100  # captions with their images
REPEATED = 1000  # captions that are counted at a time
LISTED = 20  # reasons and repeated captions on the page
LONGEST = 2000  # characters of a caption or a key
BARS = 30
THUMBNAIL_PX = 160
EVERY = 30.0  # seconds between two pages
SLICE, LAST_SLICE = 0.5, 20.0  # seconds to read parts in: each time, and at the end


class Thumbnails:
    """Small pictures of the images with the lowest sha256 so far; each worker writes those that it meets."""

    def __init__(self, out: Path):
        self.dir = out / THUMBNAILS
        found = self.dir.iterdir() if self.dir.is_dir() else ()
        self._lowest = sorted(path.stem for path in found if path.suffix == ".webp")[:SHOWN]

    def offer(self, sha: str, picture: Cut) -> None:
        """Write a thumbnail of an image if it is among the lowest."""
        if (len(self._lowest) == SHOWN and sha >= self._lowest[-1]) or sha in self._lowest:
            return
        bisect.insort(self._lowest, sha)
        del self._lowest[SHOWN:]
        small = next(iter(picture.parts.values())).copy()
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        with atomic_file(self.dir / f"{sha}.webp") as part:
            small.save(part, "WEBP", quality=60)


class Summary:
    """What the page says of the published parts. Bounded, and kept in a file between two commands."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        values = values or {}
        self.parts = {n for first, last in values.get("parts", ()) for n in range(first, last + 1)}
        self.lengths = Counter({int(n): count for n, count in values.get("lengths", {}).items()})
        self.repeated = Counter(dict(values.get("repeated", {})))
        self.sample: dict[str, tuple[str, str]] = {
            str(sha): (str(key), str(caption)) for sha, (key, caption) in values.get("sample", {}).items()
        }

    def values(self) -> dict[str, Any]:
        runs = [
            list(run) for _, run in groupby(enumerate(sorted(self.parts)), lambda pair: pair[1] - pair[0])
        ]
        return {
            "parts": [(run[0][1], run[-1][1]) for run in runs],
            "lengths": self.lengths,
            "repeated": self.repeated,
            "sample": self.sample,
        }

    def add(self, part: int, rows: Iterable[CaptionRow]) -> None:
        """Count a part. A caption that more than one in ``REPEATED`` images have is never missed, and counted
        too low rather than too high (Misra and Gries 1982; merged as by Agarwal et al. 2012)."""
        captioned = {
            row.id: row for row in rows if row.caption is not None
        }  # copies have one caption rightly
        self.parts.add(part)
        self.lengths.update(row.tokens or 0 for row in captioned.values())
        self.repeated.update((row.caption or "")[:LONGEST] for row in captioned.values())
        if len(self.repeated) > REPEATED:
            least = sorted(self.repeated.values(), reverse=True)[REPEATED]
            self.repeated = Counter({text: n - least for text, n in self.repeated.items() if n > least})
        for sha, row in captioned.items():
            self.sample[sha] = row.key[:LONGEST], (row.caption or "")[:LONGEST]
        self.sample = {sha: self.sample[sha] for sha in sorted(self.sample)[:SHOWN]}


class Page:
    """Writes the page of a job."""

    def __init__(self, output: Output):
        self.output, self._written = output, 0.0
        try:
            stored = json.loads((output.out / PAGE_STATE).read_text(encoding="utf-8"))
            self.summary = Summary(stored)
        except (OSError, ValueError, TypeError, AttributeError):
            self.summary = Summary()
        if not self.summary.parts <= output.done:  # some are made again: what they said cannot be taken back
            self.summary = Summary()

    def refresh(self, status: Mapping[str, Any], last: bool = False) -> None:
        """Read what was published since, for some time; write the page if it is time to."""
        self._read(LAST_SLICE if last else SLICE)
        if last or time.monotonic() - self._written > EVERY:
            self._write(status)
            self._written = time.monotonic()

    @property
    def complete(self) -> bool:
        return self.summary.parts == self.output.done and (self.output.out / PAGE).is_file()

    def _read(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for part in sorted(self.output.done - self.summary.parts):
            if time.monotonic() > until:
                return
            try:
                self.summary.add(part, self.output.shards.read(part))
            except DataError:
                self.summary.parts.add(part)  # removed or damaged by somebody: no business of the page

    def _write(self, status: Mapping[str, Any]) -> None:
        self._prune()
        atomic_write_text(self.output.out / PAGE, self._html(status))
        atomic_write_text(self.output.out / PAGE_STATE, json.dumps(self.summary.values()) + "\n")

    def _prune(self) -> None:
        """Remove the thumbnails of images that are among the lowest no more."""
        home = self.output.out / THUMBNAILS
        if len(self.summary.sample) == SHOWN and home.is_dir():
            highest = max(self.summary.sample)
            for path in home.iterdir():
                if path.suffix == ".webp" and path.stem > highest:
                    path.unlink(missing_ok=True)

    def _html(self, status: Mapping[str, Any]) -> str:
        env = Environment(loader=PackageLoader("captioner.pipeline"), autoescape=select_autoescape())
        env.filters |= {"duration": duration}
        tally = self.output.tally
        return env.get_template("page.html").render(
            out=self.output.out.name,
            status=status,
            tally=tally,
            every=round(EVERY),
            parts=(len(self.summary.parts), len(self.output.done)),
            reasons=Counter(tally.reasons).most_common(LISTED),
            bars=bars(self.summary.lengths),
            repeated=[(text, n) for text, n in self.summary.repeated.most_common(LISTED) if n > 1],
            sample=[(*said, self._thumbnail(sha)) for sha, said in self.summary.sample.items()],
        )

    def _thumbnail(self, sha: str) -> str:
        """A data URI; empty where a kill cost the picture."""
        try:
            data = (self.output.out / THUMBNAILS / f"{sha}.webp").read_bytes()
        except OSError:
            return ""
        return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def bars(lengths: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(first, last, count) of at most ``BARS`` equal ranges of lengths, from 0 on."""
    if not lengths:
        return []
    step = max(lengths) // BARS + 1
    counts = Counter[int]()
    for length, n in lengths.items():
        counts[length // step] += n
    return [(bar * step, bar * step + step - 1, counts[bar]) for bar in range(max(counts) + 1)]


def duration(seconds: float | None) -> str:
    """Such as 3 h 20 min; a dash where nobody knows."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
