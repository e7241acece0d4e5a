"""Which images of a set are worth having: size, shape, detail, and whether another one shows the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from captioner.progress import progress
from captioner.sources.folder import ImageRow, load_row
from captioner.views import BadImage

SIDE = 256  # pixels: the longer side that detail is measured at, so that it does not depend on resolution
BLANK = 2.0  # standard deviation of gray values (0 to 255) below which an image is blank


@dataclass(frozen=True)
class Rules:
    """What an image must have; None asks nothing."""

    min_side: int | None = None  # of the shorter side, pixels
    max_aspect: float | None = None  # longer side over shorter
    min_detail: float | None = None  # standard deviation of the Laplacian at SIDE pixels; blurred: below 4
    near: int | None = None  # bits of a 64-bit perceptual hash in which copies differ at most; 0 = none


@dataclass(frozen=True)
class Screened:
    """An image with what was measured, and why it goes (None: it stays)."""

    row: ImageRow
    reason: str | None
    width: int = 0
    height: int = 0
    detail: float = 0.0
    copy_of: str | None = None  # key of the first image that shows the same


def screen(rows: Sequence[ImageRow], rules: Rules) -> Iterator[Screened]:
    """Every image with the first reason why it goes; blank images and exact copies always do.

    Of images that show the same the first stays. Perceptual hashes are the `imagehash` library's pHash
    (discrete cosine transform of the gray image).
    """
    import imagehash  # type: ignore[import-untyped]

    seen: dict[str, str] = {}
    hashes = np.zeros(0, np.uint64)
    keys: list[str] = []
    with progress("screening images", len(rows)) as bar:
        for row in rows:
            bar.advance()
            try:
                image, sha = load_row(row)
            except BadImage as error:
                yield Screened(row, error.reason)
                continue
            detail, contrast = measure(image)
            about = (image.width, image.height, round(detail, 2))
            reason = _reason(image, detail, contrast, rules)
            if reason is None and sha in seen:
                yield Screened(row, "the same bytes as another", *about, copy_of=seen[sha])
                continue
            if reason is None and rules.near is not None:
                found = np.uint64(int(str(imagehash.phash(image)), 16))
                near = np.flatnonzero(np.bitwise_count(hashes ^ found) <= rules.near)
                if len(near):
                    yield Screened(row, "shows what another shows", *about, copy_of=keys[near[0]])
                    continue
                hashes, keys = np.append(hashes, found), [*keys, row.key]
            if reason is None:
                seen[sha] = row.key
            yield Screened(row, reason, *about)


def measure(image: Image.Image) -> tuple[float, float]:
    """(standard deviation of the Laplacian, of the gray values), at SIDE pixels on the longer side."""
    gray = image.convert("L")
    gray.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(gray, dtype=np.float64)
    if min(values.shape) < 3:
        return 0.0, float(values.std())
    inner = values[1:-1, 1:-1]
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((around - 4 * inner).std()), float(values.std())


def _reason(image: Image.Image, detail: float, contrast: float, rules: Rules) -> str | None:
    if rules.min_side is not None and min(image.size) < rules.min_side:
        return f"its shorter side is below {rules.min_side} px"
    if rules.max_aspect is not None and max(image.size) > rules.max_aspect * min(image.size):
        return f"its sides differ by more than {rules.max_aspect:g}"
    if contrast < BLANK:
        return "blank, or nearly"
    if rules.min_detail is not None and detail < rules.min_detail:
        return f"blurred: its detail is below {rules.min_detail:g}"
    return None
