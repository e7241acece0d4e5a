"""The vision towers, many views at once; the numbers stay those of transformers.

Views of one length attend in one batched call instead of a Python loop over views; the patch convolution,
whose kernel equals its stride, is a matrix product.

Shapes: V views, P patches of a view, N patches of all views, H heads, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normaliser:
    """Raw patches, values 0 to 255 [P, 3*p*p] → pixel_values, float32 [P, C], every value once a frame.

    ``images`` is the image processor whose scale, mean and deviation hold.
    """

    def __init__(self, images: Any):
        scale = images.rescale_factor if images.do_rescale else 1.0
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
        self._mean = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1) * (1.0 / scale)
        self._std = torch.tensor(std, dtype=torch.float32).view(1, 3, 1) * (1.0 / scale)
        self._frames = images.temporal_patch_size

    def __call__(self, patches: Tensor) -> Tensor:
        mean, std = self._mean.to(patches.device), self._std.to(patches.device)
        x = (patches.view(len(patches), 3, -1).float() - mean) / std
        return x.unsqueeze(2).expand(-1, -1, self._frames, -1).reshape(len(patches), -1)


def speed_up(visual: nn.Module, images: Any) -> None:
    """Make an encoder of the Qwen-VL family cheap for many views, of whatever sizes.

    It then takes raw patches too, an eighth of the bytes: they are told by their width, because transformers
    casts what it is given to the model's number format, in which the values 0 to 255 are exact.
    """
    for module in visual.modules():
        if type(module).__name__.endswith("VisionAttention"):
            kind: Any = type(module)
            module.__class__ = _derived(kind, _attention)
    patch_embed: Any = visual.get_submodule("patch_embed")
    patch_embed.normalise = Normaliser(images)
    patch_embed.__class__ = _derived(patch_embed.__class__, _patch_embed)


@cache
def _derived(kind: Any, forward: Callable[..., Any]) -> type[nn.Module]:
    """A class with another ``forward``, which is given the one of ``kind`` too.

    A method bound to the module would be a reference to itself: a dropped model would wait for the collector.
    """

    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(kind.forward, self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": replaced, "__module__": kind.__module__})


def _attention(
    stock: Callable[..., Any],
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of [N, D] inside each of the segments that ``cu_seqlens`` bounds, a call for every length."""
    if self.config._attn_implementation != "sdpa" or position_embeddings is None:
        kwargs["position_embeddings"] = position_embeddings
        return cast(Tensor, stock(self, hidden_states, cu_seqlens, *args, **kwargs))
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb_vision
    n = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)  # [N, H, D/H]
    query, key = rotate(query, key, *position_embeddings)
    groups, back = _groups(tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist()))
    mixed = []
    for index, length in groups:
        picked = (x if index is None else x[index.to(x.device)] for x in (query, key, value))
        q, k, v = (x.reshape(-1, length, self.num_heads, x.shape[-1]).transpose(1, 2) for x in picked)
        made = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)  # [V, H, P, D/H]
        mixed.append(made.transpose(1, 2).reshape(-1, made.shape[1] * made.shape[3]))
    whole = mixed[0] if back is None else torch.cat(mixed)[back.to(mixed[0].device)]
    return cast(Tensor, self.proj(whole))


@lru_cache(maxsize=256)
def _groups(lengths: tuple[int, ...]) -> tuple[list[tuple[Tensor | None, int]], Tensor | None]:
    """For every distinct length the places of its segments' patches; where each patch is then found.

    None: all patches, in the order they have.
    """
    distinct = sorted(set(lengths))
    if len(distinct) == 1:
        return [(None, distinct[0])], None
    segment = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    groups = [(torch.nonzero(segment == length).flatten(), length) for length in distinct]
    order = torch.cat([index for index, _ in groups])
    return [*groups], torch.argsort(order)


def _patch_embed(stock: Callable[..., Any], self: Any, hidden_states: Tensor) -> Tensor:
    """[N, C] flat patches, or raw ones, → [N, D]."""
    weight = self.proj.weight
    if hidden_states.shape[-1] != weight[0].numel():
        hidden_states = self.normalise(hidden_states)
    return F.linear(
        hidden_states.to(weight.dtype).view(-1, weight[0].numel()), weight.flatten(1), self.proj.bias
    )
