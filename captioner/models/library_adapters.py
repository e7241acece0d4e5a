"""The `adapters` library's own kinds, beside the feed-forward block and attention. The only door to it.

`pfeiffer` (Pfeiffer et al. 2021, arXiv 2005.00247) follows the feed-forward block of a layer and sees its sum
with the residual stream; `houlsby` (Houlsby et al. 2019, arXiv 1902.00751) follows attention and feed-forward
block. They run in the `hf` engine. The library (1.3.0) needs transformers 4.57, so it is the extra
`adapters`, in an environment of its own: tests/adapters/install.sh builds one.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captioner.errors import ConfigError
from captioner.models.families import Family
from captioner.models.model import Captioner

# of the layers: attention, its output and inputs, the norm before the feed-forward block
_PARTS: dict[str, dict[str, str]] = {
    "vision": dict(
        model_embeddings="patch_embed",
        layer_self_attn="attn",
        attn_o_proj="proj",
        attn_qkv_proj="qkv",
        layer_pre_ffn="norm2",
    ),
    "language": dict(
        model_embeddings="embed_tokens",
        layer_self_attn="self_attn",
        attn_o_proj="o_proj",
        attn_q_proj="q_proj",
        attn_k_proj="k_proj",
        attn_v_proj="v_proj",
        layer_pre_ffn="post_attention_layernorm",
    ),
}


def add(captioner: Captioner, tower: str, name: str, width: int, layers: Sequence[int], kind: str) -> None:
    """Hang adapters of ``kind`` with ``width`` inner units into these layers of a tower; they train.

    Raises ConfigError where the library is not installed.
    """
    library = _library()
    model: Any = captioner.visual if tower == "vision" else captioner.language_model
    _patch(library, model, captioner.family, tower)
    count = len(captioner.layers[tower])
    make = {"pfeiffer": library.SeqBnConfig, "houlsby": library.DoubleSeqBnConfig}[kind]
    left_out = [number for number in range(count) if number not in layers]
    model.add_adapter(name, make(reduction_factor=model.config.hidden_size / width, leave_out=left_out))
    precise = torch.promote_types(captioner.model.dtype, torch.float32)
    for unit in model.modules():
        if isinstance(unit, library.methods.modeling.Adapter):
            unit.to(captioner.device, precise).requires_grad_(True)
            nn.init.zeros_(unit.adapter_up.weight)  # a new adapter changes nothing, as ours
            unit.register_forward_pre_hook(_to_precise)
            unit.register_forward_hook(partial(_to_dtype, captioner.model.dtype))
    model.adapters_config.active_setup = library.composition.Stack(name)
    captioner.model.gradient_checkpointing_enable = types.MethodType(_checkpointing, captioner.model)


def _library() -> Any:
    try:
        import adapters
        import adapters.composition
        import adapters.methods.modeling
    except ImportError as error:
        raise ConfigError(
            f"The adapters of this kind need the `adapters` library: {error}.",
            where="tuning.placement",
            fix="set it to parallel or sequential, or use an environment with captioner[adapters]",
        ) from error
    return adapters


def _to_precise(unit: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(unit.adapter_up.weight.dtype), *args[1:])


def _to_dtype(dtype: torch.dtype, _unit: Any, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output[0].to(dtype), *output[1:])


def _patch(library: Any, model: Any, family: Family, tower: str) -> None:
    """Let the library patch a tower. ``base_model=""`` makes the tower its own base."""
    if isinstance(model, library.ModelAdaptersMixin):
        return
    interface = library.AdapterModelInterface(
        adapter_methods=["bottleneck"],
        model_layers=family.vision_layers if tower == "vision" else family.language_layers,
        layer_cross_attn=None,
        layer_intermediate_proj=family.mlp,
        layer_output_proj=family.mlp,
        base_model="",
        **_PARTS[tower],
    )
    library.init(model, interface=interface)
    # The library reads row lengths from a 2-D mask; ours may have four dimensions, and bottlenecks need none.
    model.forward_context = types.MethodType(_forward_context, model)


def _forward_context(self: Any, context: Any, *args: Any, **kwargs: Any) -> None:
    type(self).forward_context(self, context)


def _checkpointing(self: Any, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
    """As in transformers, and hooks find the library's context when a layer is run again."""
    settings = (gradient_checkpointing_kwargs or {}) | {"use_reentrant": False}
    type(self).gradient_checkpointing_enable(self, settings)
    context = _library().ForwardContext

    def run(layer: Any, *args: Any) -> Any:
        current = context.get_context() or nullcontext()
        return checkpoint(layer, *args, context_fn=lambda: (nullcontext(), current), **settings)

    for module in self.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = run
