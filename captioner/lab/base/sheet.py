"""python -m captioner.lab.base.sheet --out docs/lab.png: table tops with their complete captions."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from captioner.lab.scenes import SIZE_PX, draw, sample, shorthand
from captioner.lab.scenes.judging import stream_of

SHOWN = (7, 8, 19, 5)  # of the split `round`
WIDTH_PX, HEIGHT_PX, LINE_PX, CHARACTERS = 440, 204, 15, 36
COLUMNS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    font = ImageFont.load_default(size=12)
    sheet = Image.new("RGB", (COLUMNS * WIDTH_PX, -(-len(SHOWN) // COLUMNS) * HEIGHT_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for number, index in enumerate(SHOWN):
        scene = sample("round", index)
        x, y = 6 + number % COLUMNS * WIDTH_PX, 6 + number // COLUMNS * HEIGHT_PX
        sheet.paste(draw(scene, stream_of("round", index)), (x, y))
        caption = _wrapped(shorthand(scene))
        pen.multiline_text((x + SIZE_PX + 8, y), caption, fill="black", font=font, spacing=2)
    sheet.save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def _wrapped(caption: str) -> str:
    """Lines that break between statements."""
    lines = [""]
    for statement in caption.split(", "):
        if len(lines[-1]) + len(statement) > CHARACTERS:
            lines.append("")
        lines[-1] += f"{statement}, "
    return "\n".join(lines).rstrip(", ")


if __name__ == "__main__":
    main()
