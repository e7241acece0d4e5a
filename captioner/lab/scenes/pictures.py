"""Pictures of table tops, 192 px squared: a view of a quarter shows a sticker at 16 px, the whole at 8 px."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from captioner.errors import DataError
from captioner.lab.scenes.things import BACKGROUNDS, PLACES, STICKERS, Scene

SIZE_PX = 192
CELL_PX = 64
STICKER_PX = 16
LONGEST_PX = {"small": (34, 38, 42), "large": (54, 58, 62)}  # of an object's longer side
JITTER_PX = {"small": 8, "large": 1}
NOISE = 0.025  # standard deviation; 1 is white
TINTS = {"brick": (1.0, 0.75, 0.65), "grass": (0.75, 1.0, 0.65), "gravel": (0.95, 0.95, 1.0)}
PLAIN = {
    "white": (0.95, 0.95, 0.93),
    "gray": (0.55, 0.55, 0.57),
    "blue": (0.45, 0.65, 0.9),
    "green": (0.55, 0.8, 0.55),
    "pink": (0.95, 0.7, 0.78),
}
INKS = ((0.1, 0.1, 0.1), (0.75, 0.1, 0.1), (0.1, 0.2, 0.75), (0.05, 0.45, 0.1))
NOBODY = -1  # in a map of owners

Owners = tuple[np.ndarray, np.ndarray]  # int8 [S, S] each: which thing a pixel shows, whose sticker


def draw(scene: Scene, index: int = 0) -> Image.Image:
    """RGB picture of ``SIZE_PX`` squared; ``index`` seeds jitter, light and noise."""
    return draw_owned(scene, index)[0]


def draw_owned(scene: Scene, index: int = 0) -> tuple[Image.Image, Owners]:
    """The picture, and for every pixel the number of the thing, and of the sticker's thing, that it shows."""
    rng = np.random.default_rng([7, index])
    canvas = _background(scene.background, rng)
    owners = np.full((2, SIZE_PX, SIZE_PX), NOBODY, np.int8)
    for number, thing in enumerate(scene.things):
        sprite = _sprite(thing.noun, int(rng.choice(LONGEST_PX[thing.size])), thing.mirrored)
        h, w = sprite.shape[:2]
        cell = PLACES.index(thing.place)
        jitter = rng.integers(-JITTER_PX[thing.size], JITTER_PX[thing.size] + 1, 2)
        y, x = (
            int(np.clip(at * CELL_PX + CELL_PX // 2 - side // 2 + by, 0, SIZE_PX - side))
            for at, side, by in zip(divmod(cell, 3), (h, w), jitter, strict=True)
        )
        _paste(canvas, sprite, y, x)
        owners[0, y : y + h, x : x + w][sprite[..., 3] > 0.4] = number
        if thing.sticker:
            top, left = _sticker_corner(rng, y, x, h, w)
            _paste(canvas, _sticker(thing.sticker, int(rng.integers(len(INKS)))), top, left)
            owners[1, top : top + STICKER_PX, left : left + STICKER_PX] = number
    canvas += rng.normal(0, NOISE, (SIZE_PX, SIZE_PX, 1)).astype(np.float32)
    pixels = (np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels), (owners[0], owners[1])


def _paste(canvas: np.ndarray, sprite: np.ndarray, y: int, x: int) -> None:
    """Lay a sprite (float [h, w, 4], colour already times alpha) on the canvas, in place."""
    under = canvas[y : y + sprite.shape[0], x : x + sprite.shape[1]]
    under *= 1 - sprite[..., 3:]
    under += sprite[..., :3]


def _sticker_corner(rng: np.random.Generator, y: int, x: int, h: int, w: int) -> tuple[int, int]:
    """Top left corner of a sticker in an object's box, so that a quarter or the centre shows it whole."""
    half, quarter = SIZE_PX // 2, SIZE_PX // 4

    def uncut(at: int) -> bool:
        return not half - STICKER_PX < at < half

    def central(at: int) -> bool:
        return quarter <= at <= SIZE_PX - quarter - STICKER_PX

    for _ in range(8):
        top = min(y + int(rng.integers(0, max(1, h - STICKER_PX + 1))), SIZE_PX - STICKER_PX)
        left = min(x + int(rng.integers(0, max(1, w - STICKER_PX + 1))), SIZE_PX - STICKER_PX)
        if (uncut(top) and uncut(left)) or (central(top) and central(left)):
            return top, left
    snapped = [at if uncut(at) else half - STICKER_PX * (at < half - STICKER_PX // 2) for at in (top, left)]
    return snapped[0], snapped[1]


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
    """float32 [S, S, 3] between 0 and about 1."""
    if name in PLAIN:
        return np.full((SIZE_PX, SIZE_PX, 3), PLAIN[name], np.float32) * np.float32(rng.uniform(0.92, 1.04))
    texture = _texture(name)
    y, x = rng.integers(0, len(texture) - SIZE_PX + 1, 2)
    part = texture[y : y + SIZE_PX, x : x + SIZE_PX, None]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    return part * np.array(TINTS[name], np.float32) * np.float32(rng.uniform(0.8, 1.1))


def _folder() -> Path:
    """`data/lab/sprites` of the checkout, or its copy in an installed package."""
    package = Path(__file__).resolve().parents[2]
    packaged = package / "_lab_sprites"
    return packaged if packaged.is_dir() else package.parent / "data" / "lab" / "sprites"


@cache
def _texture(name: str) -> np.ndarray:
    return np.asarray(_open(f"texture-{name}").convert("L"), np.float32) / 255


def _open(name: str) -> Image.Image:
    path = _folder() / f"{name}.webp"
    try:
        return Image.open(path)
    except OSError as error:
        raise DataError(
            f"no picture of {name}", where=str(path), fix="restore data/lab/sprites from the repository"
        ) from error


@cache
def _sprite(noun: str, longest: int, mirrored: bool) -> np.ndarray:
    """float32 [h, w, 4] whose longer side is ``longest`` px; colour is already times alpha."""
    image = _open(noun).convert("RGBA")
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


@cache
def _sticker(kind: str, ink: int) -> np.ndarray:
    """A white disc with a sign, float32 [16, 16, 4]."""
    size = (STICKER_PX, STICKER_PX)
    disc = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(disc).ellipse([0, 0, 127, 127], fill=255)
    alpha, sign = (
        np.asarray(part.resize(size, Image.Resampling.LANCZOS), np.float32)[..., None] / 255
        for part in (disc, _sign(kind))
    )
    colour = (1 - sign) + sign * np.array(INKS[ink], np.float32)
    return np.concatenate([colour * alpha, alpha], axis=2)


def _sign(kind: str) -> Image.Image:
    image = Image.new("L", (256, 256), 0)
    pen = ImageDraw.Draw(image)
    turn = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 104, 44)
    t = np.linspace(0, 2 * np.pi, 80)
    heart_y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    outlines = {
        "star": np.stack([128 + reach * np.cos(turn), 128 + reach * np.sin(turn)], 1),
        "heart": np.stack([128 + 16 * np.sin(t) ** 3 * 5.4, 124 - heart_y * 5.4], 1),
        "bolt": np.array([(150, 24), (64, 140), (122, 140), (102, 232), (196, 106), (136, 106)]),
    }
    if kind in outlines:
        pen.polygon([tuple(map(float, point)) for point in outlines[kind]], fill=255)
    elif kind == "check":
        pen.line([(50, 130), (106, 186), (206, 70)], fill=255, width=40, joint="curve")
    elif kind == "cross":
        pen.line([(64, 64), (192, 192)], fill=255, width=40)
        pen.line([(192, 64), (64, 192)], fill=255, width=40)
    else:
        pen.ellipse([50, 38, 206, 218], fill=255)
        pen.ellipse([102, 30, 252, 200], fill=0)
    return image


assert set(TINTS) | set(PLAIN) == set(BACKGROUNDS) and len(STICKERS) == 6
