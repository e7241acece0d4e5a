"""python -m captioner.lab.base.sprites --emoji DIR --names DIR --skimage DIR --out data/lab/sprites

Makes the pictures that the scenes are drawn from: one WebP per noun out of the npm package
`@lobehub/fluent-emoji-3d` (MIT) with the names of npm `emoji-datasource`, and grey textures out of
scikit-image's data (CC0). Each argument is the unpacked package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from captioner.errors import DataError
from captioner.lab.scenes.pictures import LONGEST_PX, TINTS
from captioner.lab.scenes.things import NOUNS

SPRITE_PX = max(LONGEST_PX["large"]) + 2
TEXTURE_PX = 256
QUALITY = {"sprite": 80, "texture": 60}
# Where a noun is not the emoji's short name.
EMOJI = {
    "kiwi": "kiwifruit", "pepper": "bell_pepper", "chili": "hot_pepper", "cheese": "cheese_wedge",
    "cup": "coffee", "bottle": "baby_bottle", "wineglass": "wine_glass", "bowl": "bowl_with_spoon",
    "vase": "amphora", "saw": "carpentry_saw", "padlock": "lock", "pencil": "pencil2",
    "paintbrush": "lower_left_paintbrush", "notebook": "notebook_with_decorative_cover",
    "book": "closed_book", "ruler": "straight_ruler", "envelope": "email", "parcel": "package",
    "television": "tv", "laptop": "computer", "telephone": "phone", "clock": "alarm_clock",
    "drum": "drum_with_drumsticks", "piano": "musical_keyboard", "hat": "tophat",
    "sneaker": "athletic_shoe", "backpack": "school_satchel", "glove": "gloves", "shirt": "shirt",
    "football": "soccer", "target": "dart", "yoyo": "yo-yo", "robot": "robot_face",
    "doll": "nesting_dolls",
}  # fmt: skip


def sprite(noun: str, code: str, emoji: Path) -> Image.Image:
    """The picture of a noun without its empty border. Raises DataError where the package has none."""
    code = code.lower()
    paths = [emoji / "assets" / f"{form}.webp" for form in (code, code.removesuffix("-fe0f"), f"{code}-fe0f")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"no picture of {noun}", where=str(paths[0]))
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda value: 255 * (value > 20)).getbbox())
    image.thumbnail((SPRITE_PX, SPRITE_PX), Image.Resampling.LANCZOS)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("emoji", "names", "skimage", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = json.loads((args.names / "emoji.json").read_text(encoding="utf-8"))
    codes = {row["short_name"]: row["unified"] for row in rows}
    for noun in NOUNS:
        image = sprite(noun, codes[EMOJI.get(noun, noun)], args.emoji)
        image.save(args.out / f"{noun}.webp", quality=QUALITY["sprite"], method=6)
    for name in TINTS:
        image = Image.open(args.skimage / "data" / f"{name}.png").convert("L")
        image = image.resize((384, 384), Image.Resampling.LANCZOS).crop((0, 0, TEXTURE_PX, TEXTURE_PX))
        image.save(args.out / f"texture-{name}.webp", quality=QUALITY["texture"], method=6)
    total = sum(path.stat().st_size for path in args.out.glob("*.webp"))
    print(f"{len(NOUNS)} objects, {len(TINTS)} textures, {total / 1000:.0f} kB: {args.out}")


if __name__ == "__main__":
    main()
