"""Pairs per second and peak memory of preference training against TRL's own DPOTrainer.

    python benchmarks/dpo_step.py [--steps 8] [--hidden 256]

One random Qwen3-VL, the same images in six views, the same captions (a quarter of the prompt long), the same
losses (sigmoid and sft), full fine-tuning with AdamW, float32 on a CPU and bfloat16 autocast on CUDA. TRL's
trainer gets the six views as six images and transformers' own model (ours goes through
`vision.speed_up`), and computes its reference from a second model in every step, as it does for images;
ours computes it once before, which is counted in every step here, as if each pair were seen once.

Each trainer has a process of its own. They take steps in turn, so what else the machine does meets both, and
the ratio printed is the median over the turns, with its quartiles. Peak memory is that of the process on a
CPU, of the allocator on CUDA, above what is there before the model is loaded. Seconds are those of the
processor on a CPU, and of the clock on CUDA.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

BETA, CE_WEIGHT, VIEW = 0.1, 1.0, 128  # px
KINDS = ("stock", "shared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each case (default 8)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the language model (default 256)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case.split(":"), args.steps, args.hidden)))
        return
    for rejected, images in ((1, 4), (4, 2)):
        seconds, peaks, about = in_turn(rejected, images, args.steps, args.hidden)
        for kind in KINDS:
            rate = rejected * images / median(seconds[kind])
            print(f"{rejected} rejected, {kind:6}: {rate:.2f} pairs/s, peak {peaks[kind]:.0f} MiB ({about})")
        times = [stock / shared for stock, shared in zip(*(seconds[kind] for kind in KINDS), strict=True)]
        low, _, high = quantiles(times)
        print(
            f"{rejected} rejected: {median(times):.2f} ({low:.2f} to {high:.2f}) times the pairs/s at "
            f"{peaks['shared'] / peaks['stock']:.2f} of the peak memory",
            flush=True,
        )


def in_turn(
    rejected: int, images: int, steps: int, hidden: int
) -> tuple[dict[str, list[float]], dict[str, float], str]:
    """Seconds of every step and peak MiB by trainer, and what was measured; the first step warms up."""
    processes, seconds, peaks, about = {}, {}, {}, ""
    for kind in KINDS:
        command = [sys.executable, __file__, "--case", f"{kind}:{rejected}:{images}"]
        command += ["--steps", str(steps), "--hidden", str(hidden)]
        pipe = subprocess.PIPE
        processes[kind] = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, bufsize=1)
        seconds[kind] = list[float]()
        hear(processes[kind])  # it is ready for its first step
    for _ in range(steps + 1):
        for kind, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            seconds[kind].append(hear(process)["seconds"])
    for kind, process in processes.items():
        done = hear(process)
        peaks[kind], about = done["peak_mib"], done["about"]
        assert process.wait() == 0
    return {kind: each[1:] for kind, each in seconds.items()}, peaks, about


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON that a process prints; what else it prints is passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"'):
            heard: dict[str, Any] = json.loads(line)
            return heard
    raise SystemExit("a trainer ended early")


def measure(kind: str, rejected: str, images: str, steps: int, hidden: int) -> dict[str, Any]:
    import torch

    from captioner.config import TrainingConfig, ViewsConfig
    from captioner.lab import grid as scenes
    from captioner.models import model, render

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        scenes.write("round", int(images), folder / "images")
        base = model.build_random(
            folder / "model", architecture(hidden), tokenizer(), view_size=VIEW, seed=0, dtype=torch.float32
        )
        del base
        before = memory()
        captioner = model.load(folder / "model")
        captioner.model.requires_grad_(True)
        renderer = render.Renderer(captioner, ViewsConfig())
        pairs, paths = made_pairs(renderer, folder / "images", int(rejected))
        training = TrainingConfig(
            max_steps=steps + 1,
            per_device_train_batch_size=int(images),
            learning_rate=1e-5,
            warmup_ratio=0,
            save_steps=10**6,
        )
        run = stock if kind == "stock" else shared
        run(captioner, renderer, pairs, paths, training, folder)
        grid = renderer.images_batch([image(next(iter(paths.values())))])[0][1]
        prompt = len(renderer.prefix_ids(grid)) + len(renderer.branch_ids(None)[0])
        caption = len(renderer.text_ids(pairs[0].chosen)) + 1
        about = f"prompt {prompt} tokens, caption {caption}, {captioner.device}"
        return {"peak_mib": memory(peak=True) - before, "about": about}


def now() -> float:
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.monotonic()


def memory(peak: bool = False) -> float:
    """MiB that this process holds, or has held at most."""
    import torch

    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def shared(captioner: Any, renderer: Any, pairs: Any, paths: Any, training: Any, out: Path) -> None:
    from captioner.config import DPOConfig
    from captioner.fit import reference, trainers
    from captioner.fit.examples import PairedImages, by_image

    objective = trainers.Preference(DPOConfig(beta=BETA, ce_weight=CE_WEIGHT))
    collator = objective.collator(renderer, PairedImages(pairs, paths), training)

    def score() -> None:
        collator.reference = by_image(reference.score(trainer, training.per_device_train_batch_size))

    told = trainers.arguments(captioner, training, out)
    trainer = trainers.make(objective, captioner, collator, told, turns(score))
    score()
    trainer.train()


def stock(captioner: Any, renderer: Any, pairs: Any, paths: Any, training: Any, out: Path) -> None:
    """TRL alone: its trainer, its collator, its reference model, and the model as transformers loads it."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText
    from trl import DPOTrainer

    from captioner import prompts, views
    from captioner.config import DPOConfig
    from captioner.fit import trainers

    rows = []
    for pair in pairs:
        cut = views.cut(image(paths[pair.key]), renderer.plan(*image(paths[pair.key]).size))
        prompt = [{"type": "image"}] * len(cut) + [{"type": "text", "text": prompts.load("caption")}]
        said = {
            side: [{"role": "assistant", "content": [{"type": "text", "text": getattr(pair, side)}]}]
            for side in ("chosen", "rejected")
        }
        rows.append({"images": cut, "prompt": [{"role": "user", "content": prompt}], **said})
    objective = trainers.Preference(DPOConfig(beta=BETA, ce_weight=CE_WEIGHT))
    _, args = objective.arguments(trainers.arguments(captioner, training, out))
    args.precompute_ref_log_probs = False  # TRL refuses it for images
    args.per_device_train_batch_size = len(pairs)
    captioner.model = AutoModelForImageTextToText.from_pretrained(captioner.path)  # its own is freed
    trainer = DPOTrainer(
        model=captioner.model,
        ref_model=AutoModelForImageTextToText.from_pretrained(captioner.path),
        args=args,
        train_dataset=Dataset.from_list(rows * training.max_steps),
        processing_class=captioner.processor,
        callbacks=[turns(lambda: None)],
    )
    trainer.train()


def turns(reference: Callable[[], None]) -> Any:
    """Waits for a line before each step and prints the seconds since the last, ``reference`` included.

    What is waited is not counted, and a batch is drawn before its step begins: a turn is from the end of a
    step to the end of the next.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        begun = 0.0

        def wait(self) -> None:
            print(json.dumps({"ready": True}) if not self.begun else "", flush=True)
            sys.stdin.readline()
            self.begun = now()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.wait()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            reference()
            print(json.dumps({"seconds": now() - self.begun}), flush=True)
            if state.global_step < state.max_steps:
                self.wait()

    return Turns()


def image(path: Path) -> Any:
    from captioner.views import load_image

    return load_image(path)[0]


def made_pairs(renderer: Any, folder: Path, rejected: int) -> tuple[list[Any], dict[str, Path]]:
    """Captions a quarter of the prompt long."""
    from captioner.records import Pair
    from captioner.sources.folder import read_folder

    rows = read_folder(folder)
    paths = {row.key: row.path for row in rows}
    _, grid = renderer.images_batch([image(rows[0].path)])[0]
    tokens = len(renderer.prefix_ids(grid)) // 4

    def caption(words: list[str], turn: int) -> str:
        said = words[turn % len(words) :] + words[: turn % len(words)]
        text = ", ".join(said)
        while len(renderer.text_ids(text)) < tokens:
            text += ", " + said[len(text) % len(said)]
        return text

    pairs = [
        Pair(sample=row.key, key=row.key, chosen=caption(words, 0), rejected=caption(words, k + 1), k=k,
             refuted_in_rejected=1)
        for row in rows
        for words in [(row.caption or "").split(", ")]
        for k in range(rejected)
    ]  # fmt: skip
    return pairs, paths


def tokenizer() -> Any:
    from captioner.lab import grid as scenes
    from captioner.models import model

    captions = [scenes.shorthand(scenes.sample("train", i)) for i in range(200)]
    return model.build_tokenizer(
        [*captions, "Describe the image. Caption: whole top left right"], vocab_size=420
    )


def architecture(hidden: int) -> Any:
    from transformers import Qwen3VLConfig

    heads = hidden // 32
    words = len(tokenizer())
    text = dict(
        vocab_size=words, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=6,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=32,
        max_position_embeddings=4096, tie_word_embeddings=True,
        rope_scaling={"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    )  # fmt: skip
    vision = dict(
        depth=4, num_heads=6, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, hidden_size=192,
        intermediate_size=576, out_hidden_size=hidden, num_position_embeddings=256,
        deepstack_visual_indexes=[1],
    )  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


if __name__ == "__main__":
    main()
