"""A random, tiny Qwen-VL of each family with tokenizer and processor, built in a second, offline."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from captioner.models import model
from captioner.models.model import Captioner

VIEW_SIZE = 64  # px
TEXTS = (
    "gray background, northwest circle, northwest red, northwest large, northwest dot, center square, blue",
    "southeast triangle, southeast green, south star, west ring, east small, circle above star, north bar",
    "Visible: northeast yellow? yes no Caption in shorthand. Describe the image. user assistant system",
    "whole: top left: top right: bottom left: bottom right: center: row 1 column 2",
)
_SPREAD = 0.15  # standard deviation of the weights: large enough that logits differ visibly


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return model.build_tokenizer(TEXTS * 3, vocab_size=420)


def architecture(family: str, vocab_size: int) -> PretrainedConfig:
    """Two layers in each tower, heads of width 32, patches of 8 px, merge 2."""
    text = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=_SPREAD,
    )
    vision = dict(
        depth=2,
        num_heads=3,
        patch_size=8,
        spatial_merge_size=2,
        temporal_patch_size=2,
        hidden_size=96,
        initializer_range=_SPREAD,
    )
    if family == "qwen2_vl":
        return Qwen2VLConfig(
            text_config=text
            | dict(rope_scaling={"rope_type": "default", "type": "mrope", "mrope_section": [6, 5, 5]}),
            vision_config=vision | dict(embed_dim=96, hidden_size=64, mlp_ratio=1),
            tie_word_embeddings=True,
        )
    if family == "qwen2_5_vl":
        return Qwen2_5_VLConfig(
            text_config=text
            | dict(rope_scaling={"rope_type": "default", "type": "mrope", "mrope_section": [6, 5, 5]}),
            vision_config=vision
            | dict(intermediate_size=96, out_hidden_size=64, window_size=32, fullatt_block_indexes=[1]),
            tie_word_embeddings=True,
        )
    return Qwen3VLConfig(
        text_config=text
        | dict(rope_scaling={"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}),
        vision_config=vision
        | dict(
            intermediate_size=96,
            out_hidden_size=64,
            num_position_embeddings=36,
            deepstack_visual_indexes=[0],
        ),
        tie_word_embeddings=True,
    )


def tiny_checkpoint(
    folder: Path,
    family: str = "qwen3_vl",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    padding: int = 0,
) -> Captioner:
    """Write a checkpoint into ``folder`` and load it; ``padding`` adds vocabulary rows that no token uses."""
    words = tokenizer()
    return model.build_random(
        folder, architecture(family, len(words) + padding), words, view_size=VIEW_SIZE, seed=seed, dtype=dtype
    )


def tiny_captioner(family: str = "qwen3_vl", dtype: torch.dtype = torch.float32, seed: int = 0) -> Captioner:
    """As :func:`tiny_checkpoint`, in a directory that is gone when this returns."""
    with tempfile.TemporaryDirectory() as folder:
        return tiny_checkpoint(Path(folder), family, dtype, seed)
