"""Learned prompt tokens: special tokens <|soft_0|> ... whose embedding rows are trained.

Only the input embedding knows them. They have no row in the output head, hence no share in any softmax.
Shapes: k tokens, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from captioner.errors import CheckpointError, ConfigError
from captioner.models.model import SOFT_TOKEN, Captioner, SoftEmbedding, embed_soft_rows

FILE = "soft_prompt.safetensors"


def attach(captioner: Captioner, length: int, init_text: str, trainable: bool = True) -> None:
    """Give the captioner ``length`` soft tokens that start as the tokens of ``init_text``, repeated to fill.

    A captioner that has a soft prompt of this length keeps its rows. Raises ConfigError if it has one of
    another length, and for a text without tokens.
    """
    if captioner.soft_prompt_ids:
        if len(captioner.soft_prompt_ids) != length:
            raise ConfigError(
                f"The captioner has {len(captioner.soft_prompt_ids)} soft tokens, not {length}.",
                where=str(captioner.path),
                fix=f"set --sft.soft_prompt.length {len(captioner.soft_prompt_ids)}",
            )
        rows(captioner).requires_grad_(trainable)
        return
    if length < 1:
        raise ConfigError(
            "A soft prompt needs at least one token.", fix="set --sft.soft_prompt.length 1 or more"
        )
    table = captioner.model.get_input_embeddings().weight.detach()
    ids = captioner.tokenizer.encode(init_text, add_special_tokens=False)
    if not ids:
        raise ConfigError(
            f"The soft prompt's text {init_text!r} has no tokens.",
            where="sft.soft_prompt.init",
            fix="give it words, or `none` for the caption prompt",
        )
    picked = [ids[i % len(ids)] for i in range(length)]
    _embed(captioner, table[picked].clone(), trainable)


def rows(captioner: Captioner) -> torch.nn.Parameter:
    """The soft prompt's parameter [k, D]. Raises ConfigError if there is none."""
    embedding = captioner.model.get_input_embeddings()
    if not isinstance(embedding, SoftEmbedding):
        raise ConfigError("The captioner has no soft prompt.", where=str(captioner.path))
    return embedding.soft


def save(captioner: Captioner, folder: Path) -> None:
    """Write ``soft_prompt.safetensors`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"soft_prompt": rows(captioner).detach().cpu().contiguous()}, folder / FILE)


def load(captioner: Captioner, folder: Path, trainable: bool = False) -> None:
    """Attach the soft prompt that :func:`save` wrote, or replace the rows of one of the same length.

    Raises CheckpointError if it cannot be read or does not fit the model.
    """
    try:
        learned = load_file(folder / FILE)["soft_prompt"]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The soft prompt cannot be read: {error}", where=str(folder), fix="train it again"
        ) from error
    width = captioner.model.get_input_embeddings().embedding_dim
    if learned.ndim != 2 or learned.shape[1] != width:
        raise CheckpointError(
            f"The soft prompt has the shape {tuple(learned.shape)}; the model's width is {width}.",
            where=str(folder),
            fix="train it again on this base",
        )
    if not captioner.soft_prompt_ids:
        _embed(captioner, learned, trainable)
        return
    attach(captioner, len(learned), "", trainable)
    with torch.no_grad():
        rows(captioner).copy_(learned)


def _embed(captioner: Captioner, learned: Tensor, trainable: bool) -> None:
    """Add the tokens to the tokenizer and their rows to the input embedding."""
    tokenizer = captioner.tokenizer
    tokens = [SOFT_TOKEN.format(i) for i in range(len(learned))]
    tokenizer.add_tokens(tokens, special_tokens=True)
    first = tokenizer.convert_tokens_to_ids(tokens[0])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if (
        ids != list(range(first, first + len(ids)))
        or first > captioner.model.get_input_embeddings().num_embeddings
    ):
        raise CheckpointError("The tokenizer and the embedding do not match.", where=str(captioner.path))
    embed_soft_rows(captioner, first, learned, trainable=trainable)
