"""An SFT step with six views against one native image of the same number of pixels.

    python -m benchmarks.sft_views [--hidden 512] [--view 128] [--batch 4] [--repeats 5]

One random Qwen3-VL with adapters and a soft prompt, forward and backward of one batch. Six views attend each
to itself; one image of as many pixels (as nearly as whole patches allow) attends to all of itself. The two
take turns; the ratio is of medians, per patch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.decode import build
from captioner.config import AdapterTuning, ModelConfig, SoftPromptConfig, ViewsConfig
from captioner.fit import fit
from captioner.lab import grid as scenes
from captioner.models import model, render
from captioner.models.model import Captioner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model")
    parser.add_argument("--view", type=int, default=128, help="side of a view, px")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), args.hidden)
        captioner = model.load(ModelConfig(path=folder))
    prompt = SoftPromptConfig(length=8, init="northwest circle, northwest red")
    fit.tune(captioner, AdapterTuning(), prompt, 0)
    captioner.model.train()
    kinds = {
        "six views": ViewsConfig(size=args.view, tags=False),
        "one image": ViewsConfig(levels=(1,), center=False, tags=False, size=round(6**0.5 * args.view)),
    }
    batches = {name: batch(captioner, views, args.batch) for name, views in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(args.repeats + 1):
        for name, fed in batches.items():
            captioner.model.zero_grad()
            start = time.perf_counter()
            captioner.model(**fed, use_cache=False).loss.backward()
            if captioner.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - start)
    cost = {}
    for name, fed in batches.items():
        patches, tokens = len(fed["pixel_values"]) // args.batch, fed["input_ids"].shape[1]
        cost[name] = median(times[name]) / patches
        print(f"{name}: {median(times[name]):.3f} s a step; {patches} patches, {tokens} tokens an image")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"six views take {cost['six views'] / cost['one image']:.2f} of one image's time a patch; {device}")


def batch(captioner: Captioner, views: ViewsConfig, rows: int) -> dict[str, torch.Tensor]:
    renderer = render.Renderer(captioner, views)
    drawn = [scenes.sample("train", index) for index in range(rows)]
    cut = renderer.patches_batch([scenes.draw(scene, index) for index, scene in enumerate(drawn)])
    found = [
        render.TrainRow(patches, grid, False, [renderer.branch_ids(None, scenes.shorthand(scene))])
        for scene, (patches, grid) in zip(drawn, cut, strict=True)
    ]
    fed = render.collate(renderer, found)
    fed["pixel_values"] = fed["pixel_values"].to(captioner.model.dtype)
    return {name: tensor.to(captioner.device) for name, tensor in fed.items()}


if __name__ == "__main__":
    main()
