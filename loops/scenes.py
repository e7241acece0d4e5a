"""captioner scenes --split test --count 200 --out FOLDER: draw the procedural scenes as an image folder.

``captioner scenes --architecture DIR`` instead writes the untrained model that ``loops/scenes_base.toml``
trains: Qwen3-VL architecture, byte-level tokenizer, processor files, random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from captioner import files, prompts
from captioner.config import Config
from captioner.errors import ConfigError
from captioner.lab import grid as drawing
from captioner.runs import Run, RunDir
from loops.stages import StagePlan

VIEW_SIZE = 64  # px, the encoder's native resolution
VOCABULARY = 512  # 256 bytes, seven special tokens, the scenes' words
INITIALIZER_RANGE = 0.06  # of so narrow a model; at 0.02 the first hundred steps learn little

POSITION_RANGE = 0.5


Split = Literal["test", "train", "close", "sft", "qa", "round", "validation"]


def plan(run: Run, out: Path | None = None, architecture: Path | None = None) -> list[StagePlan]:
    """What is written."""
    return [StagePlan("", {}, outputs=[target for target in (architecture or out,) if target])]


def scenes(
    run: RunDir,
    config: Config,
    *,
    out: Path | None = None,
    split: Split = "test",
    count: int = 200,
    offset: int = 0,
    architecture: Path | None = None,
) -> Path:
    """Draw scenes as an image folder; returns it.

    Args:
        run: Not read.
        config: Settings; only `seed` is read.
        out: Folder to write; a new one.
        split: Which split.
        count: Scenes to draw.
        offset: Number of the first scene.
        architecture: Write the untrained base model here instead.
    """
    target = architecture or out
    if target is None:
        raise ConfigError(
            "no folder to write", where="--out", fix="captioner scenes --split test --count 200 --out FOLDER"
        )
    if target.exists():
        raise ConfigError(
            "the folder exists already", where=str(target), fix="name a new --out, or remove it first"
        )
    if architecture:
        write_architecture(target, config.seed)
        print(f"untrained base model: {target}")
        return target
    with files.atomic_dir(target) as folder:
        drawing.write(split, count, folder, offset=offset, seed=config.seed)
    print(f"{count} scenes of the {split} split: {target}")
    return target


def write_architecture(folder: Path, seed: int = 0) -> None:
    """The untrained base: an encoder of 3 layers at width 96, a language model of 4 at width 128."""
    from transformers import Qwen3VLConfig

    from captioner.models import model

    tokenizer = model.build_tokenizer(_texts(), VOCABULARY)
    architecture = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            initializer_range=INITIALIZER_RANGE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,  # vLLM's CPU attention refuses narrower heads
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            rope_scaling={"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=3,
            initializer_range=INITIALIZER_RANGE,
            hidden_size=96,
            intermediate_size=384,
            num_heads=3,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=128,
            num_position_embeddings=64,
            deepstack_visual_indexes=[1],
        ),
        tie_word_embeddings=True,
    )
    with files.atomic_dir(folder) as temporary:
        model.build_random(temporary, architecture, tokenizer, view_size=VIEW_SIZE, seed=seed)
        _spread_positions(temporary / "model.safetensors", seed)


def _spread_positions(weights: Path, seed: int) -> None:
    """Draw position embeddings as large as patch embeddings, so that places are told apart early."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    table = state["model.visual.pos_embed.weight"]
    generator = torch.Generator().manual_seed(seed)
    state["model.visual.pos_embed.weight"] = torch.randn(table.shape, generator=generator) * POSITION_RANGE
    save_file(state, weights, metadata={"format": "pt"})


def _texts() -> list[str]:
    """What the tokenizer is trained on: captions, questions, prompts and view tags."""
    texts = [prompts.load("caption"), prompts.load("describe"), "user", "assistant", "yes", "no", "none"] * 50
    texts += ["whole", "top left", "top right", "bottom left", "bottom right", "center"] * 50
    for index in range(2000):
        scene = drawing.sample("train", index)
        texts += [drawing.shorthand(scene), drawing.prose(scene, index)]
        for row in drawing.questions(scene, index)[::5]:
            texts += [prompts.load("question", statement=row["question"]), row["question"], row["answer"]]
    return texts
