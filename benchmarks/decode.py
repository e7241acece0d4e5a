"""Decoding speed of the fused captioner against the bare base and against the same adapters unfused.

    python -m benchmarks.decode [--hidden 512] [--width 64] [--tokens 64] [--batch 8] [--repeats 5]

One random Qwen3-VL; adapters of ``--width`` inner units in both towers, moved away from zero. Six views of an
image per row; the time of a token is (time of 1 + T tokens - time of 1 token) / T, so the prompt counts for
nothing. The three take turns, and the ratios are of medians. Float32 on a CPU, bfloat16 on CUDA. What fusing
costs is what a wider block costs: the gain of inner units is printed beside.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from captioner.config import AdapterTuning, ModelConfig, ViewsConfig
from captioner.lab import grid as scenes
from captioner.models import adapters, fuse, model, render
from captioner.models.model import Captioner

VIEW = 64  # px


def build(folder: Path, hidden: int, layers: int = 6) -> Captioner:
    """A random Qwen3-VL with heads of width 64, four times as wide inside."""
    from transformers import Qwen3VLConfig

    texts = [scenes.shorthand(scenes.sample("train", index)) for index in range(200)]
    tokenizer = model.build_tokenizer(texts, 512)
    heads = hidden // 64
    rope = {"rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    architecture = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, rope_scaling=rope,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64,
            max_position_embeddings=8192, tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=layers, hidden_size=hidden // 2, intermediate_size=2 * hidden, num_heads=heads // 2,
            patch_size=8, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=hidden,
            num_position_embeddings=64, deepstack_visual_indexes=[1],
        ),
        tie_word_embeddings=True,
    )  # fmt: skip
    return model.build_random(folder, architecture, tokenizer, view_size=VIEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model")
    parser.add_argument("--width", type=int, default=64, help="inner units of an adapter")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base, fused = Path(place) / "base", Path(place) / "fused"
        build(base, args.hidden)
        adapted = model.load(ModelConfig(path=str(base)))
        wide = AdapterTuning(vision_width=args.width, language_width=args.width)
        adapters.tune(adapted, wide, "captioner")
        with torch.no_grad():
            for parameter in adapted.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        fuse.export(adapted, fused)
        adapted.model.eval()
        captioners = {
            "base": model.load(ModelConfig(path=str(base))),
            "fused": model.load(ModelConfig(path=str(fused))),
            "adapters": adapted,
        }
        for captioner in captioners.values():
            seconds(captioner, args.batch, 2)  # warm up
        times: dict[str, list[float]] = {name: [] for name in captioners}
        for _ in range(args.repeats):
            for name, captioner in captioners.items():
                one, all_ = (seconds(captioner, args.batch, n) for n in (1, 1 + args.tokens))
                times[name].append((all_ - one) / args.tokens)
    rate = {name: args.batch / median(values) for name, values in times.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for name, value in rate.items():
        print(f"{name:9}{value:10.1f} tokens/s")
    print(
        f"fused {rate['fused'] / rate['base']:.3f} of the bare base, {rate['fused'] / rate['adapters']:.2f} "
        f"times the unfused adapters; inner units {args.width / (4 * args.hidden):+.1%}; {device}"
    )


def seconds(captioner: Captioner, rows: int, tokens: int) -> float:
    """Of generating exactly ``tokens`` tokens for each of the rows."""
    prompt = render.Renderer(captioner, ViewsConfig()).prompt(scenes.draw(scenes.sample("test", 0)))
    device = captioner.device
    fed = {
        "input_ids": torch.tensor([prompt.input_ids] * rows, device=device),
        "attention_mask": torch.ones(rows, len(prompt.input_ids), dtype=torch.long, device=device),
        "mm_token_type_ids": torch.tensor([prompt.input_ids] * rows, device=device)
        .eq(captioner.model.config.image_token_id)
        .int(),
        "pixel_values": prompt.pixel_values.repeat(rows, 1).to(device, captioner.model.dtype),
        "image_grid_thw": prompt.image_grid_thw.repeat(rows, 1).to(device),
    }
    start = time.perf_counter()
    captioner.model.generate(**fed, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
