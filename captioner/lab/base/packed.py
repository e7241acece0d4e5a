"""The language model on many branches of an image at once: each sees the prefix, computed once, and itself.

The numbers are those of the stock forward (a test holds them together). Shapes: I images, T prefix tokens,
N branches of an image, L tokens of a branch, H heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from captioner.models.model import Captioner
from captioner.models.render import Prefix, Renderer


def hidden(
    captioner: Captioner,
    renderer: Renderer,
    prefix: Prefix,
    features: Tensor,
    branches: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Final hidden states, float32 [I, N, L, D], of ``branches`` [I, N, L] behind their images.

    ``features`` float [I, P, D] are the encoder's outputs for the prefix's image slots; ``dtype`` is what
    matrices are multiplied in.
    """
    model: Any = captioner.language_model
    images, count, length = branches.shape
    ids = torch.tensor(prefix.ids)
    before = model.embed_tokens(ids).expand(images, -1, -1)
    before = before.index_copy(1, (ids == renderer.image_pad_id).nonzero()[:, 0], features)
    after = model.embed_tokens(branches.flatten(1))
    positions = torch.arange(length).add(prefix.next_position).repeat(count)
    turns = [
        model.rotary_emb(before, prefix.positions[:, None]),
        model.rotary_emb(after, positions.expand(3, 1, -1)),
    ]
    rotations = [(cos.to(dtype), sin.to(dtype)) for cos, sin in turns]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for layer in model.layers:
            normed = (layer.input_layernorm(before), layer.input_layernorm(after))
            heads = [_heads(layer.self_attn, x, turn) for x, turn in zip(normed, rotations, strict=True)]
            mixed = _attend(heads[0], heads[1], count)
            before, after = (
                x + layer.self_attn.o_proj(y.transpose(1, 2).flatten(2))
                for x, y in zip((before, after), mixed, strict=True)
            )
            before, after = (x + layer.mlp(layer.post_attention_layernorm(x)) for x in (before, after))
        return model.norm(after).float().view(images, count, length, -1)


def _heads(attention: Any, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, scaled, keys and values [I, H, tokens, D/H]."""
    shape = (*x.shape[:2], -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2)
    value = attention.v_proj(x).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query.to(value.dtype), key.to(value.dtype), *rotation)
    return query * attention.scaling, key, value


def _attend(before: tuple[Tensor, ...], after: tuple[Tensor, ...], count: int) -> tuple[Tensor, Tensor]:
    """Causal attention of the prefix, and of ``count`` branches over the prefix and themselves."""
    query, key, value = before
    own = _causal(query @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value
    asked, said, meant = after
    across = asked @ key.transpose(-1, -2)  # [I, H, N*L, T]
    one_by_one = [x.unflatten(2, (count, -1)) for x in after]  # [I, H, N, L, D/H]
    inside = _causal(one_by_one[0] @ one_by_one[1].transpose(-1, -2)).flatten(2, 3)
    weight = torch.cat([across, inside], -1).softmax(-1).to(meant.dtype)
    far, near = weight.split([key.shape[2], said.shape[2] // count], -1)
    mixed = (near.unflatten(2, (count, -1)) @ one_by_one[2]).flatten(2, 3)
    return own, far @ value + mixed


def _causal(scores: Tensor) -> Tensor:
    side = scores.shape[-1]
    return scores.masked_fill(torch.ones(side, side, dtype=torch.bool).triu(1), -1e4)
