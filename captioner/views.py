"""Six views of an image: which boxes to cut, at which size, and how to read an image file safely.

Reading is a boundary to hostile bytes: whatever a file holds, :func:`load_image` returns an RGB image or
raises :class:`BadImage` with a short reason, and checks the size in the header before it decodes a pixel.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile

from captioner.config import ViewsConfig
from captioner.errors import DataError

# What may be decoded; not formats that start other programs (EPS) or have no mark to know them by (TGA).
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO")
try:
    import pillow_heif  # type: ignore[import-not-found, import-untyped]
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"))
MAX_BYTES = 1 << 29  # of a file
MAX_SIDE = 20_000  # pixels
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 3 bytes each are half a gigabyte
MAX_ASPECT = 200  # the image processors of the Qwen-VL family refuse more
MIN_SIDE = 2  # pixels: a 1 px wide image is a tracking pixel or a ruler, and has no quadrants

# A reduced JPEG may lack this share of the pixels that a view is shown at, along each axis: less than the
# bicubic filter itself blurs.
SLACK = 0.05
JPEG_SCALES = (8, 4, 2)  # that the decoder can divide by
# A scan of a progressive JPEG costs a pass over the whole image and takes a few bytes; encoders write ten.
MAX_SCANS = 500
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
LEVELS = re.compile(rb"\xff\x4f\xff\x51.*?\xff\x52.{7}(.)", re.S)  # JPEG 2000: of resolution, in COD
STRIP = 1 << 20  # pixels that are converted at once

Room = Callable[[int], AbstractContextManager[None]]  # holds so many bytes of the machine's memory

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


class BadImage(DataError):
    """An image file that cannot be captioned; ``reason`` is what its row records.

    ``world``: the fault is not the image's, and another time it may be read.
    """

    def __init__(self, reason: str, world: bool = False):
        self.reason, self.world = reason, world
        super().__init__(f"bad image: {reason}")


@dataclass(frozen=True)
class View:
    """``box`` = (left, top, right, bottom) in pixels of the image, shown at ``width`` x ``height`` pixels."""

    tag: str
    box: tuple[int, int, int, int]
    width: int
    height: int


@dataclass(frozen=True)
class ViewSpec:
    """What :func:`plan` needs beside the image: picklable, so that other processes cut the same views."""

    config: ViewsConfig
    size: int
    factor: int

    def plan(self, width: int, height: int) -> list[View]:
        """The views of an image of that size, pixels."""
        return plan(width, height, self.config, size=self.size, factor=self.factor)


@dataclass(frozen=True)
class Cut:
    """An image already cut into its views; it stands wherever an engine takes an image."""

    size: tuple[int, int]  # of the whole image, px
    parts: Mapping[View, Image.Image]


Picture = Image.Image | Cut


def plan(
    width: int, height: int, config: ViewsConfig, *, size: int, factor: int, whole_only: bool = False
) -> list[View]:
    """Plan the views of a ``width`` x ``height`` image, coarse to fine, rows first, the centre last.

    The tiles of a level cover the image exactly (with ``overlap`` they also reach into their neighbours).
    A view has its box's aspect ratio as nearly as multiples of ``factor`` allow and at most ``size`` squared
    pixels, so a square box is shown at ``size`` x ``size``. ``config.size``, where set, takes the place of
    ``size``. Raises ValueError for an image or a size without pixels.
    """
    size = config.size or size
    if width < 1 or height < 1 or size < factor:
        raise ValueError(f"no views of {width} x {height} px at {size} px with cells of {factor} px")
    levels = (1,) if whole_only else tuple(sorted(set(config.levels)))
    boxes = [tile for grid in levels for tile in _tiles(width, height, grid, config.overlap)]
    finest = levels[-1]
    if config.center and finest > 1:  # a centre as large as the whole would be the whole again
        across, down = max(1, width // finest), max(1, height // finest)
        left, top = (width - across) // 2, (height - down) // 2
        boxes.append(("center", (left, top, left + across, top + down)))
    return [View(tag, box, *_fit(box, size, factor)) for tag, box in boxes]


def cut(image: Picture, views: Sequence[View]) -> list[Image.Image]:
    """Cut an RGB image: one RGB image per view, exactly ``view.width`` x ``view.height`` px, bicubic.

    The crop comes before the resize, so no pixel from outside the box bleeds into a view. Of a :class:`Cut`
    the views are taken; KeyError where it was cut by another plan.
    """
    if isinstance(image, Cut):
        return [image.parts[view] for view in views]
    whole = (0, 0, *image.size)
    return [
        # of the whole image no copy is made: it may be most of what there is room for
        (image if view.box == whole else image.crop(view.box)).resize(
            (view.width, view.height), Image.Resampling.BICUBIC
        )
        for view in views
    ]


def load_image(source: Path | bytes) -> tuple[Image.Image, str]:
    """Read an image: (RGB image as a viewer would show it, sha256 hex of its bytes).

    The EXIF orientation is applied, transparency lies on white, 16 bits are scaled to 8, and of an
    animation the first frame is taken. Raises :class:`BadImage` for everything that is not a whole image
    of a sane size.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    return decode(data), hashlib.sha256(data).hexdigest()


def prepare(
    source: Path | bytes, spec: ViewSpec, reduced: bool = True, room: Room = lambda size: nullcontext()
) -> tuple[Cut, str]:
    """Read an image and cut its views: (views, sha256 hex of the file's bytes).

    With ``reduced`` a JPEG (also JPEG 2000) is decoded at a half, a quarter or an eighth of its size where
    every view still has its pixels; the views are planned on the whole image all the same. ``room`` is held
    while the image is in memory. Raises :class:`BadImage` as :func:`load_image` does.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    with ExitStack() as held:
        image, (width, height) = _decode(
            data, spec if reduced else None, lambda size: held.enter_context(room(size))
        )
        views = spec.plan(width, height)
        parts = cut(image, [_scaled(view, image.width / width, image.height / height) for view in views])
    return Cut((width, height), dict(zip(views, parts, strict=True))), hashlib.sha256(data).hexdigest()


def _scaled(view: View, x: float, y: float) -> View:
    """A view of an image on its picture of another size; it keeps a pixel at least."""
    left, top, right, bottom = view.box
    left, top = math.floor(left * x + 0.5), math.floor(top * y + 0.5)
    right, bottom = math.floor(right * x + 0.5), math.floor(bottom * y + 0.5)
    return View(view.tag, (left, top, max(right, left + 1), max(bottom, top + 1)), view.width, view.height)


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file; :class:`BadImage` where it cannot be read, is empty or is too large."""
    try:
        if not path.is_file():  # a pipe or a device would block
            raise BadImage("not a regular file") if path.exists() else BadImage("no such file", world=True)
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadImage(f"file too large: {size:,} bytes, limit {MAX_BYTES:,}")
        return path.read_bytes()
    except BadImage:
        raise
    except Exception as error:  # the boundary: the client of an object store raises what it likes
        reason = (
            (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        )
        raise BadImage(f"cannot be read: {reason}", world=True) from error


def decode(data: bytes) -> Image.Image:
    """Decode the bytes of an image file to RGB; see :func:`load_image`."""
    return _decode(data)[0].convert("RGB")  # and no longer the file that was opened


def _decode(
    data: bytes, spec: ViewSpec | None = None, room: Callable[[int], None] = lambda size: None
) -> tuple[Image.Image, tuple[int, int]]:
    """(RGB image, size of the whole image); smaller than whole where ``spec`` allows it.

    ``room`` hears how many bytes the image will take before its pixels are decoded.
    """
    if not data:
        raise BadImage("empty file")
    # Pillow warns about sizes that the limits here allow and about metadata that nobody reads here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _check_size(image.width, image.height)
                image.seek(0)
                size, shift, whole = None, 0, image.width * image.height
                if isinstance(image, JpegImageFile) and (scans := len(SCAN.findall(data))) > MAX_SCANS:
                    raise BadImage(f"too many scans: {scans:,}, limit {MAX_SCANS}")
                if spec is not None and isinstance(image, JpegImageFile | Jpeg2KImageFile):
                    size = (image.height, image.width) if _turned(image) else image.size
                    shift = _draft(image, _reduction(spec.plan(*size)), data)
                room(len(data) + _cost(image, whole, shift))
                image.load()
                shown = _rgb(_upright(image))
                return shown, size or shown.size
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage(_unknown(data)) from error
        except Image.DecompressionBombError as error:
            raise BadImage(f"too many pixels, limit {MAX_PIXELS:,}") from error
        except MemoryError as error:
            raise BadImage("does not fit in memory") from error
        except Exception as error:  # the boundary: decoders raise whatever broken bytes make them raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(f"cannot be decoded: {reason[:200]}") from error


def _unknown(data: bytes) -> str:
    """Why bytes are no image, with a name for those formats that photographs come in."""
    if data[4:12] in HEIC:
        return "HEIC, for which pillow-heif is missing (pip install 'captioner[heif]')"
    if data[:2] == b"\xff\x0a" or data[4:12] == b"JXL \x0d\x0a\x87\x0a":
        return "JPEG XL, which is not read"
    return "not an image of a known format"


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small: {width} x {height} px, smallest side {MIN_SIDE}")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"too large: {width} x {height} px, longest side {MAX_SIDE:,}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"too many pixels: {width} x {height}, limit {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"too long: {width} x {height} px, aspect ratio limit {MAX_ASPECT}")


def _reduction(views: Sequence[View]) -> float:
    """How many times smaller the image may be so that every view still has its pixels, but for SLACK."""
    spare = [
        min((view.box[2] - view.box[0]) / view.width, (view.box[3] - view.box[1]) / view.height)
        for view in views
    ]
    return min(spare) / (1 - SLACK)


def _draft(image: JpegImageFile | Jpeg2KImageFile, reduction: float, data: bytes) -> int:
    """Let the decoder leave out frequencies: the image becomes at most ``reduction`` times smaller.

    Returns how often it will be halved once it is loaded.
    """
    scale = next((scale for scale in JPEG_SCALES if scale <= reduction), 1)
    if isinstance(image, JpegImageFile):
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        return 0  # its size is the smaller one at once
    levels = LEVELS.search(data)
    shift = min(scale.bit_length() - 1, levels[1][0]) if levels else 0
    image.reduce = shift
    return shift


def _cost(image: Image.Image, whole: int, shift: int) -> int:
    """Bytes of memory that an image takes while it is decoded and cut, at most; ``whole``: its pixels."""
    pixels = image.width * image.height >> 2 * shift
    if isinstance(image, JpegImageFile) and "progressive" in image.info:
        return 10 * pixels + 6 * whole  # all coefficients are held, however small it is decoded
    if isinstance(image, Jpeg2KImageFile):
        return 22 * pixels  # 12 of the decoder
    return 10 * pixels  # 4 each as decoded and as converted or turned, and the quarters that are cut


def _turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation swaps width and height."""
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 = upright; broken EXIF data say nothing about the pixels."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as in _orientation
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """In strips where that needs more than the image and its RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        opaque = Image.new("RGB", image.size)
        for box in _strips(image):
            strip = image.crop(box).convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
            opaque.paste(strip.convert("RGB"), box)
        return opaque
    return image if image.mode == "RGB" else image.convert("RGB")  # palette, CMYK, YCbCr, gray, 1 bit


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits hold 0..65535; for 32-bit integers and floats the range is the one that the image uses."""

    def values(box: tuple[int, int, int, int]) -> np.ndarray:
        wide = np.asarray(image.crop(box)).astype(np.float64)
        return wide if sixteen else np.nan_to_num(wide, posinf=0.0, neginf=0.0)

    sixteen = image.mode.startswith("I;16")
    low, high = 0.0, 65535.0
    if not sixteen:
        ends = [(float(part.min()), float(part.max())) for part in map(values, _strips(image))]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
    gray = Image.new("L", image.size)
    for box in _strips(image) if high > low else ():
        scaled = (values(box) - low) * (255.0 / (high - low))
        gray.paste(Image.fromarray(np.rint(scaled).astype(np.uint8)), box)
    return gray


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows that cover an image."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _tiles(width: int, height: int, grid: int, overlap: float) -> list[tuple[str, tuple[int, int, int, int]]]:
    columns, rows = _edges(width, grid, overlap), _edges(height, grid, overlap)
    cells = [(r, c) for r in range(grid) for c in range(grid)]
    if grid <= 2:
        tags: tuple[str, ...] = ("whole",) if grid == 1 else QUADRANTS
    else:
        tags = tuple(f"row {r + 1} column {c + 1}" for r, c in cells)
    return [
        (tag, (columns[c][0], rows[r][0], columns[c][1], rows[r][1]))
        for tag, (r, c) in zip(tags, cells, strict=True)
    ]


def _edges(length: int, grid: int, overlap: float) -> list[tuple[int, int]]:
    """Start and end of each tile of one axis; a tile has a pixel even where the axis has too few for all."""
    reach = round(overlap * length / grid)
    spans = [(i * length // grid, (i + 1) * length // grid) for i in range(grid)]
    return [(max(0, a - reach), min(length, max(a + 1, b + reach))) for a, b in spans]


def _fit(box: tuple[int, int, int, int], size: int, factor: int) -> tuple[int, int]:
    """Width and height of a view: multiples of ``factor``, at most ``size`` squared pixels."""
    cells = (size // factor) ** 2
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    across = min(cells, max(1, round(math.sqrt(cells * aspect))))
    down = min(cells, max(1, round(math.sqrt(cells / aspect))))
    if across >= down:
        across = min(across, cells // down)
    else:
        down = min(down, cells // across)
    return across * factor, down * factor
