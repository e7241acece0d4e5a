"""Preparing the views of 12-megapixel JPEGs, per core, against the straightforward way with PIL.

    taskset -c 0 python benchmarks/bulk_views.py [ROUNDS]

Straightforward: decode the whole picture, crop every view, resize it. Ours decodes at the scale that the
views need. Prints images per second of both, their ratio (aim: 3 or more), and how far the pixels are apart.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from captioner import views
from captioner.config import ViewsConfig

SIDES = (4000, 3000)
SPEC = views.ViewSpec(ViewsConfig(), 448, 28)


def photograph() -> bytes:
    """A photograph with the noise of a sensor, as a JPEG of 12 megapixels."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None, "pip install scikit-image"
    small = Image.open(Path(spec.origin).parent / "data" / "astronaut.png").convert("RGB")
    pixels = np.asarray(small.resize(SIDES, Image.Resampling.BICUBIC), dtype=np.int16)
    noise = np.random.default_rng(0).normal(0, 6, pixels.shape).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def straightforward(data: bytes) -> list[Image.Image]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [
        image.crop(view.box).resize((view.width, view.height), Image.Resampling.BICUBIC)
        for view in SPEC.plan(*image.size)
    ]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    data = photograph()
    spent = {"straightforward": 0.0, "ours": 0.0}
    for _ in range(rounds):  # in turns, so that what else the machine does hits both
        for name in spent:
            started = time.process_time()
            straightforward(data) if name == "straightforward" else views.prepare(data, SPEC)
            spent[name] += time.process_time() - started
    ours = views.prepare(data, SPEC)[0].parts.values()
    apart = [
        np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
        for a, b in zip(straightforward(data), ours, strict=True)
    ]
    for name, seconds in spent.items():
        print(f"{name:16} {rounds / seconds:6.1f} images/s of a core")
    print(f"ratio            {spent['straightforward'] / spent['ours']:6.2f}")
    print(f"mean difference  {np.mean(apart):6.2f} of 255")


if __name__ == "__main__":
    main()
