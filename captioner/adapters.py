"""Bottleneck adapters on the feed-forward blocks of both towers, through `adapters`. Its only door.

A *parallel* adapter (He et al. 2021, arXiv 2110.04366) has the form of the block beside it, with ``width``
inner units: together they are the same function as one wider block, which `fuse.export` writes. A
*sequential* adapter (Houlsby et al. 2019, arXiv 1902.00751) follows the block, has no such form and cannot
be exported.

Shapes: N tokens of any leading shape, D width of the tower, r inner units of the adapter.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import adapters as library
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from captioner.errors import CheckpointError, ConfigError
from captioner.model import Captioner, Mlp, SoftEmbedding
from captioner.runs import atomic_write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter.safetensors"
Placement = Literal["parallel", "sequential"]
_OURS = ("output_adapters.", "shared_parameters.")  # what `adapters` hangs into a tower
_WHOLE = 1 << 16  # values of a tensor that the fingerprint reads


@dataclass(frozen=True)
class Delta:
    """The inner units that one feed-forward block gains."""

    block: str  # dotted name of the block in the model
    mlp: Mlp
    weights: dict[str, Tensor]  # input name → rows [r, D]; output name → columns [D, r]
    biases: dict[str, Tensor]  # input name → [r]; output name → [D], added


class Inner(nn.Module):
    """The inner units [N, D] → [N, r] of an adapter: ``act(gate x) * (up x)`` or ``act(fc x)``."""

    def __init__(self, d: int, r: int, names: tuple[str, ...], bias: bool, activation: nn.Module):
        super().__init__()
        self.names, self.activation = names, activation
        for name in names:
            self.add_module(name, nn.Linear(d, r, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.get_parameter(f"{self.names[0]}.weight").dtype)
        gate, *up = (self.get_submodule(name)(x) for name in self.names)
        inner: Tensor = self.activation(gate)
        return inner * up[0] if up else inner


class Outer(nn.Linear):
    """[N, r] → [N, D] in the tower's number format; zero at first, so a new adapter changes nothing."""

    def __init__(self, r: int, d: int, bias: bool, dtype: torch.dtype):
        super().__init__(r, d, bias=bias)
        self.out_dtype = dtype
        nn.init.zeros_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.out_dtype)


def add(
    captioner: Captioner,
    name: str,
    vision_width: int,
    language_width: int,
    placement: Placement = "parallel",
    seed: int = 0,
) -> None:
    """Hang an adapter into every layer of the towers whose width is not 0 and freeze the base.

    Widths are inner units per layer. The up-projection starts at zero: the function is unchanged. The
    adapter's weights are float32 where the base is bfloat16. A soft prompt trains or rests as before.
    Raises ConfigError if the captioner has an adapter already (export it: rounds add to the fused model).
    """
    if name_of(captioner) is not None:
        raise ConfigError(
            f"The captioner already has the adapter {name_of(captioner)!r}.",
            where=str(captioner.path),
            mend="export it and load the exported checkpoint: adapters do not stack",
        )
    soft = captioner.model.get_input_embeddings()
    for parameter in captioner.model.parameters():
        if not (isinstance(soft, SoftEmbedding) and parameter is soft.soft):
            parameter.requires_grad = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tower, width in (("vision", vision_width), ("language", language_width)):
            if width:
                _add_to_tower(captioner, tower, name, width, placement)
    captioner.model.gradient_checkpointing_enable = types.MethodType(_checkpointing, captioner.model)


def name_of(captioner: Captioner) -> str | None:
    """The name of the captioner's adapter; None if it has none."""
    return next((name for _, _, name, _ in _units(captioner)), None)


def save(captioner: Captioner, name: str, folder: Path) -> None:
    """Write the adapter's weights and settings, which name the base by a hash, into ``folder``.

    Raises ConfigError if there is no such adapter.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in _parameters(captioner, name).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    atomic_write_json(folder / CONFIG_FILE, describe(captioner, name))


def load(captioner: Captioner, name: str, folder: Path) -> None:
    """Add the adapter that :func:`save` wrote.

    Raises CheckpointError if it is damaged or was trained on another base.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"The adapter cannot be read: {error}", where=str(folder), mend="train it again"
        ) from error
    if settings["base"] != fingerprint(captioner):
        raise CheckpointError(
            "The adapter was trained on another base.",
            where=str(folder),
            mend=f"load the checkpoint it was trained on ({settings['base_path']})",
        )
    add(captioner, name, settings["vision_width"], settings["language_width"], settings["placement"])
    parameters = _parameters(captioner, name)
    if {key: value.shape for key, value in parameters.items()} != {
        key: value.shape for key, value in state.items()
    }:
        raise CheckpointError(
            "The adapter's tensors do not fit the model.", where=str(folder), mend="train it again"
        )
    with torch.no_grad():
        for key, value in state.items():
            parameters[key].copy_(value)


def describe(captioner: Captioner, name: str) -> dict[str, Any]:
    """What ``adapter_config.json`` holds."""
    units = [(tower, unit) for _, tower, found, unit in _units(captioner) if found == name]
    if not units:
        raise ConfigError(f"The captioner has no adapter {name!r}.", where=str(captioner.path))
    widths = {tower: unit.adapter_up.in_features for tower, unit in units}
    parallel = isinstance(units[0][1], library.methods.modeling.ParallelAdapter)
    return {
        "type": "adapters",
        "placement": "parallel" if parallel else "sequential",
        "family": captioner.family.name,
        "vision_width": widths.get("vision", 0),
        "language_width": widths.get("language", 0),
        "base": fingerprint(captioner),
        "base_path": str(captioner.path),
    }


def delta(captioner: Captioner, name: str) -> list[Delta]:
    """The inner units each feed-forward block gains; the plan of `fuse.export`.

    Raises ConfigError if there is no such adapter or it is sequential.
    """
    if describe(captioner, name)["placement"] != "parallel":
        raise ConfigError(
            "A sequential adapter cannot be exported: it is no part of a stock checkpoint.",
            where=str(captioner.path),
            mend='train with tuning.placement = "parallel", or caption with the hf engine',
        )
    plan = []
    for block, tower, found, unit in _units(captioner):
        if found == name:
            mlp = getattr(captioner.family, f"{tower}_mlp")
            parts = {part: unit.adapter_down.get_submodule(part) for part in mlp.inputs} | {
                mlp.output: unit.adapter_up
            }
            weights = {part: linear.weight.detach() for part, linear in parts.items()}
            biases = {part: linear.bias.detach() for part, linear in parts.items() if linear.bias is not None}
            plan.append(Delta(block, mlp, weights, biases))
    return plan


def fingerprint(captioner: Captioner) -> str:
    """A hash of the base's weights (adapters and soft prompt left out), the same in every number format.

    Large tensors are sampled: any training moves what is read.
    """
    digest = hashlib.sha256()
    for key, value in sorted(base_state(captioner).items()):
        flat = value.detach().flatten()
        sample = flat[:: -(-len(flat) // _WHOLE)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def base_state(captioner: Captioner) -> dict[str, Tensor]:
    """The state dict of the model without its adapter and soft prompt: exactly the stock model's keys."""
    state = captioner.model.state_dict()
    return {
        key: value
        for key, value in state.items()
        if not key.endswith(".soft") and not any(part in key for part in _OURS)
    }


# ── how it hangs in the model ────────────────────────────────────────────────────────────────────────────


def _add_to_tower(captioner: Captioner, tower: str, name: str, width: int, placement: Placement) -> None:
    family = captioner.family
    model = captioner.visual if tower == "vision" else captioner.language_model
    mlp: Mlp = getattr(family, f"{tower}_mlp")
    _prepare(model, family.vision_layers if tower == "vision" else family.language_layers, family.mlp)
    parallel = placement == "parallel"
    settings: dict[str, Any] = dict(mh_adapter=False, output_adapter=True, non_linearity="relu", scaling=1.0)
    settings["reduction_factor"] = model.config.hidden_size / width  # the units are replaced below
    config = library.ParBnConfig(**settings) if parallel else library.BnConfig(**settings)
    model.add_adapter(name, config=config)
    for layer in captioner.layers[tower]:
        block = layer.get_submodule(family.mlp)
        example = block.get_parameter(f"{mlp.output}.weight")  # [D, inner]
        names = mlp.inputs if parallel else mlp.inputs[:1]
        unit: Any = layer.get_submodule(f"output_adapters.adapters.{name}")
        unit.adapter_down = Inner(len(example), width, names, mlp.bias, getattr(block, mlp.activation))
        unit.adapter_up = Outer(width, len(example), mlp.bias, example.dtype)
        precise = torch.promote_types(example.dtype, torch.float32)
        unit.to(example.device, precise).requires_grad_(True)
    model.adapters_config.active_setup = library.composition.Stack(name)


def _prepare(model: PreTrainedModel, layers: str, mlp: str) -> None:
    """Let `adapters` patch a tower: a hook keeps what the feed-forward block sees, one adds to its output.

    ``base_model=""`` makes the tower its own base; attention is left alone.
    """
    if isinstance(model, library.ModelAdaptersMixin):
        return
    interface = library.AdapterModelInterface(
        adapter_methods=["bottleneck"],
        model_embeddings=next(name for name in ("embed_tokens", "patch_embed") if hasattr(model, name)),
        model_layers=layers,
        layer_self_attn=None,
        layer_cross_attn=None,
        attn_qkv_proj="",
        attn_o_proj=None,
        layer_intermediate_proj=mlp,
        layer_output_proj=mlp,
        layer_pre_ffn=mlp,
        base_model="",
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

    def run(layer: Any, *args: Any) -> Any:
        context = library.ForwardContext.get_context()
        contexts = (nullcontext(), context or nullcontext())
        return checkpoint(layer, *args, context_fn=lambda: contexts, **settings)

    for module in self.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = run


def _units(captioner: Captioner) -> Iterator[tuple[str, str, str, Any]]:
    """Every adapter unit: (name of the block in the model, tower, adapter name, unit)."""
    family = captioner.family
    paths = {
        "vision": f"{family.visual}.{family.vision_layers}",
        "language": f"{family.language_model}.{family.language_layers}",
    }
    for tower, layers in captioner.layers.items():
        for index, layer in enumerate(layers):
            hung = getattr(layer, "output_adapters", None)
            for name, unit in hung.adapters.items() if hung is not None else ():
                yield f"{paths[tower]}.{index}.{family.mlp}", tower, name, unit


def _parameters(captioner: Captioner, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under names that do not depend on how `adapters` nests them."""
    found = {
        f"{block}.{key}": parameter
        for block, _, unit_name, unit in _units(captioner)
        if unit_name == name
        for key, parameter in unit.named_parameters()
    }
    if not found:
        raise ConfigError(f"The captioner has no adapter {name!r}.", where=str(captioner.path))
    return found
