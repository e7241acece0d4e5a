"""A folder of photographs -> a set to caption: normalised copies and a table to fill in."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image, ImageCms

from captioner.progress import progress
from captioner.records import Failed
from captioner.sources.folder import ImageRow, load_row, one_line, sidecar_path
from captioner.views import FORMATS, BadImage, read_bytes

TABLE = "captions.csv"
QUALITY = 95  # of JPEG
LOSSLESS = (".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")  # these become PNG, photographs JPEG


@dataclass(frozen=True)
class Problem:
    """What is wrong with one image or row of a set."""

    kind: Literal["missing", "duplicate", "ghost", "unreadable"]
    key: str
    what: str


def prepare(
    rows: Sequence[ImageRow],
    out: Path,
    *,
    longest: int | None = None,
    validation: float = 0.0,
    group: Literal["file", "folder"] = "file",
    seed: int = 0,
) -> tuple[int, list[Failed]]:
    """Write the images below ``out`` upright, in sRGB, as JPEG or PNG, and ``captions.csv`` to fill in.

    ``longest`` is the longest side, in pixels; larger images are scaled down. The table has the captions that
    are there, and a column ``split``: ``validation`` for that share of the images, or of the folders, else
    ``train``; where there is a share, at least one. Excel reads it. Originals are only read. Returns the
    count of images, and those left out.
    """
    failed: list[Failed] = []
    table: list[dict[str, str]] = []
    held_out = _held_out({_unit(row, group) for row in rows}, validation, seed)
    with progress("preparing images", len(rows)) as bar:
        for row in rows:
            bar.advance()
            try:
                image = _normalised(row, longest)
            except BadImage as error:
                failed.append(Failed(sample="", key=row.key, reason=error.reason))
                continue
            suffix = ".png" if row.path.suffix.lower() in LOSSLESS else ".jpg"
            path = sidecar_path(out, row.key, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=QUALITY, subsampling=0)  # which PNG has no use for
            split = "validation" if _unit(row, group) in held_out else "train"
            name = path.relative_to(out).as_posix()
            table.append({"file_name": name, "split": split, "text": one_line(row.caption or "")})
    with (out / TABLE).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ("file_name", "split", "text"))
        writer.writeheader()
        writer.writerows(table)
    return len(table), failed


def _normalised(row: ImageRow, longest: int | None) -> Image.Image:
    """The image as a viewer would show it, in sRGB."""
    image, _ = load_row(row)
    try:
        with Image.open(io.BytesIO(read_bytes(row.path)), formats=FORMATS) as header:
            profile, mode = header.info.get("icc_profile"), header.mode
        if profile and mode == "RGB":
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB")) or image
    except (OSError, ImageCms.PyCMSError):
        pass  # a profile that cannot be read says nothing; the pixels are decoded already
    if longest and max(image.size) > longest:
        scale = longest / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def _unit(row: ImageRow, group: Literal["file", "folder"]) -> str:
    return row.key if group == "file" else PurePosixPath(row.key).parent.as_posix()


def _held_out(units: set[str], share: float, seed: int) -> set[str]:
    """So many files or folders, those first in the order of a hash: of fifty, chance alone may take none."""
    order = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}\0{unit}".encode()).digest())
    return set(order[: math.ceil(share * len(order))])


def problems(rows: Sequence[ImageRow]) -> list[Problem]:
    """What is wrong with a set that was read back, by image: no caption, a row too many, no image, damage."""
    found = []
    for row in rows:
        if row.error is None and row.caption:
            try:
                load_row(row)
            except BadImage as error:
                found.append(Problem("unreadable", row.key, error.reason))
        elif row.error is None:
            found.append(Problem("missing", row.key, "no caption"))
        elif "named twice" in row.error:
            found.append(Problem("duplicate", row.key, row.error))
        elif "is not in the folder" in row.error or "is not there" in row.error:
            found.append(Problem("ghost", row.key, row.error))
        else:
            found.append(Problem("unreadable", row.key, row.error))
    return found
