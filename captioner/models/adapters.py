"""What trains in a frozen base: adapters, LoRA, named parts. The only door to `peft`.

A *parallel* adapter (He et al. 2021, arXiv 2110.04366) has the form of the feed-forward block beside it, with
``width`` inner units: together they are the same function as one wider block, which `fuse.export` writes. A
*sequential* adapter (Houlsby et al. 2019, arXiv 1902.00751) follows the block, has no such form and cannot
be exported. Both are a module below the block and one forward hook on it, so whatever runs the block again
(gradient checkpointing) or moves its parameters (DDP, FSDP) treats the adapter as a part of it. The kinds
`pfeiffer` and `houlsby` come from the `adapters` library, see `library_adapters`. LoRA (Hu et al. 2021, arXiv
2106.09685) and its kin are layers of `peft` in the place of linear layers of the stock model; nothing is
wrapped around it, so positions and caches stay the model's own.

Shapes: N tokens of any leading shape, D width of the tower, r inner units of the adapter.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captioner.config import AdapterTuning, LoraTuning, ModelConfig, Part, PartsTuning
from captioner.errors import CheckpointError, ConfigError
from captioner.files import atomic_write_json
from captioner.models import checkpoint, library_adapters, model, soft_prompt
from captioner.models.families import Mlp
from captioner.models.model import Captioner, SoftEmbedding

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter.safetensors"
LIBRARY_KINDS = ("pfeiffer", "houlsby")
KINDS = {"adapters": AdapterTuning, "lora": LoraTuning, "parts": PartsTuning}
# what we, the `adapters` library and `peft` hang into a tower
_OURS = (".bottleneck.", "attention_adapters.", "output_adapters.", "shared_parameters.", ".lora_", ".vera_")
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


class Bottleneck(nn.Module):
    """The adapter of one feed-forward block: [N, D] → [N, D]."""

    adapter_down: Inner
    adapter_up: Outer

    def __init__(self, inner: Inner, outer: Outer, parallel: bool):
        super().__init__()
        self.adapter_down, self.adapter_up, self.parallel = inner, outer, parallel

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.adapter_up(self.adapter_down(x))
        return added


def _add(block: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook: block(x) + adapter(x), or y + adapter(y) with y = block(x)."""
    return output + block.bottleneck(args[0] if block.bottleneck.parallel else output)


def tune(
    captioner: Captioner, tuning: AdapterTuning | LoraTuning | PartsTuning, name: str, seed: int = 0
) -> None:
    """Hang in what ``tuning`` asks for, let it train and freeze the rest. The function stays as it is.

    What is hung in is float32 where the base is bfloat16. A soft prompt trains or rests as before.
    Raises ConfigError if the captioner is tuned already (export it: rounds add to the fused model), for a
    layer that the model lacks, and for parts that are held in 4 bits.
    """
    if name_of(captioner) is not None:
        raise ConfigError(
            f"The captioner already has the adapter {name_of(captioner)!r}.",
            where=str(captioner.path),
            fix="export it and load the exported checkpoint: adapters do not stack",
        )
    parts = () if isinstance(tuning, AdapterTuning) else tuning.parts
    if _quantized(captioner) and set(parts) - {"merger", "head", "embeddings"}:
        fix = "train only merger, head or embeddings, or set --model.load_in_4bit false"
        raise ConfigError("Weights held in 4 bits cannot train.", where="sft.tuning.parts", fix=fix)
    manifest = {
        "name": name,
        **tuning.model_dump(mode="json"),
        "seed": seed,
        "family": captioner.family.name,
        "base": fingerprint(captioner),  # now: parts will move
        "base_path": str(captioner.path),
    }
    fully = [parameter for part in parts for parameter in part_parameters(captioner, part)]
    soft = captioner.model.get_input_embeddings()
    soft_trains = isinstance(soft, SoftEmbedding) and soft.soft.requires_grad
    captioner.model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(tuning, AdapterTuning):
            _add_bottlenecks(captioner, tuning, name)
        elif isinstance(tuning, LoraTuning):
            _add_lora(captioner, tuning, name, seed)
    for parameter in fully:
        parameter.requires_grad = True
    if isinstance(soft, SoftEmbedding):
        soft.soft.requires_grad = soft_trains
    captioner.tuning = manifest


def name_of(captioner: Captioner) -> str | None:
    """The name of what is tuned; None if the captioner is as it was loaded."""
    return captioner.tuning.get("name")


def part_parameters(captioner: Captioner, part: Part) -> list[nn.Parameter]:
    """The parameters of a named part. With tied embeddings `head` and `embeddings` are the same matrix."""
    visual, table = captioner.visual, captioner.model.get_input_embeddings().weight
    if part == "embeddings":
        return [table]
    if part == "head":
        return [captioner.model.get_output_embeddings().weight]
    if part == "language":
        soft = getattr(captioner.model.get_input_embeddings(), "soft", None)
        return [p for p in captioner.language_model.parameters() if p is not table and p is not soft]
    merger = [p for name in captioner.family.mergers for p in visual.get_submodule(name).parameters()]
    if part == "merger":
        return merger
    inside = {id(p) for p in merger}
    return [p for p in visual.parameters() if id(p) not in inside]


def save(captioner: Captioner, name: str, folder: Path) -> None:
    """Write what was trained and its settings, which name the base by a hash, into ``folder``.

    Raises ConfigError if there is no such adapter.
    """
    settings = describe(captioner, name)
    state = {key: value.detach().cpu().contiguous() for key, value in _parameters(captioner).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    atomic_write_json(folder / CONFIG_FILE, settings)


def load(captioner: Captioner, name: str, folder: Path) -> None:
    """Hang in what :func:`save` wrote.

    Raises CheckpointError if it is damaged or was trained on another base.
    """
    try:
        settings = checkpoint.read_json(folder / CONFIG_FILE)
        checkpoint.refuse_hostile(settings, folder / CONFIG_FILE)
        kind: Any = KINDS[settings["type"]]
        tuning = kind.model_validate({key: settings[key] for key in kind.model_fields})
        base, base_path, seed = settings["base"], settings["base_path"], int(settings["seed"])
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The adapter cannot be read: {error}", where=str(folder), fix="train it again"
        ) from error
    if base != fingerprint(captioner):
        raise CheckpointError(
            "The adapter was trained on another base.",
            where=str(folder),
            fix=f"load the checkpoint it was trained on ({base_path})",
        )
    tune(captioner, tuning, name, seed)
    parameters = _parameters(captioner)
    if {key: value.shape for key, value in parameters.items()} != {
        key: value.shape for key, value in state.items()
    }:
        raise CheckpointError(
            "The adapter's tensors do not fit the model.", where=str(folder), fix="train it again"
        )
    with torch.no_grad():
        for key, value in state.items():
            parameters[key].copy_(value)


def describe(captioner: Captioner, name: str) -> dict[str, Any]:
    """What ``adapter_config.json`` holds. Raises ConfigError if there is no such adapter."""
    if name_of(captioner) != name:
        raise ConfigError(f"The captioner has no adapter {name!r}.", where=str(captioner.path))
    return captioner.tuning


def delta(captioner: Captioner, name: str) -> list[Delta]:
    """The inner units each feed-forward block gains; the plan of `fuse.export`.

    Empty where no adapters but LoRA or parts were trained.
    Raises ConfigError if there is no such adapter or it is not parallel.
    """
    placement = describe(captioner, name).get("placement", "parallel")
    if placement != "parallel":
        raise ConfigError(
            f"A {placement} adapter cannot be exported: a stock checkpoint has no block of its form.",
            where=str(captioner.path),
            fix='train with tuning.placement = "parallel", or caption with the hf engine',
        )
    plan = []
    for block, tower, unit in _units(captioner):
        mlp = getattr(captioner.family, f"{tower}_mlp")
        parts: dict[str, Any] = {part: unit.adapter_down.get_submodule(part) for part in mlp.inputs}
        parts[mlp.output] = unit.adapter_up
        weights = {part: linear.weight.detach() for part, linear in parts.items()}
        biases = {part: linear.bias.detach() for part, linear in parts.items() if linear.bias is not None}
        plan.append(Delta(block, mlp, weights, biases))
    return plan


def merged(captioner: Captioner) -> dict[str, Tensor]:
    """The weights that LoRA layers come to, by their stock names and in their number format.

    The sum is made in at least float32. Raises CheckpointError where a sum is not finite.
    """
    found = {}
    for key, layer in captioner.model.named_modules():
        if not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        base: Any = layer.get_base_layer()
        kept = base.weight.data
        base.weight.data = kept.to(torch.promote_types(kept.dtype, torch.float32))
        try:
            layer.merge(safe_merge=True)  # replaces the tensor, never writes to it
            found[f"{key}.weight"] = base.weight.data.to(kept.dtype)
        except ValueError as error:
            raise CheckpointError(
                "The merged weights are not finite.", where=key, fix="train it again"
            ) from error
        finally:
            base.weight.data = kept
            layer.merged_adapters.clear()
    return found


def unquantized(captioner: Captioner, name: str | None) -> Captioner:
    """The captioner on its base as it is stored, on the CPU; ``name`` is what was trained on 4 bits."""
    path = captioner.path
    settings = ModelConfig(path=str(path), dtype=checkpoint.stored_dtype(path), device="cpu")
    whole = model.load(settings)
    with TemporaryDirectory() as folder:
        if name:
            save(captioner, name, Path(folder))
            load(whole, name, Path(folder))
        if captioner.soft_prompt_ids:
            soft_prompt.save(captioner, Path(folder))
            soft_prompt.load(whole, Path(folder))
    whole.views = captioner.views
    return whole


def fingerprint(captioner: Captioner) -> str:
    """A hash of the base's weights (adapters and soft prompt left out), the same in every number format.

    Large tensors are sampled: any training moves what is read.
    """
    if _quantized(captioner):
        captioner = unquantized(captioner, None)
    digest = hashlib.sha256()
    for key, value in sorted(base_state(captioner).items()):
        flat = value.detach().flatten()
        sample = flat[:: -(-len(flat) // _WHOLE)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def base_state(captioner: Captioner) -> dict[str, Tensor]:
    """The state dict of the model without what was hung in and the soft prompt: the stock model's keys."""
    return {
        key.replace(".base_layer.", "."): value
        for key, value in captioner.model.state_dict().items()
        if not key.endswith(".soft") and not any(part in key for part in _OURS)
    }


def _quantized(captioner: Captioner) -> bool:
    return bool(getattr(captioner.model, "is_loaded_in_4bit", False))


# ── how it hangs in the model ────────────────────────────────────────────────────────────────────────────


def _add_bottlenecks(captioner: Captioner, tuning: AdapterTuning, name: str) -> None:
    """The up-projections start at zero."""
    sizes = {
        "vision": (tuning.vision_width, tuning.vision_layers),
        "language": (tuning.language_width, tuning.language_layers),
    }
    for tower, (width, numbers) in sizes.items():
        if not width:
            continue
        layers = captioner.layers[tower]
        picked = _picked(numbers, len(layers), tower)
        if tuning.placement in LIBRARY_KINDS:
            library_adapters.add(captioner, tower, name, width, picked, tuning.placement)
            continue
        mlp: Mlp = getattr(captioner.family, f"{tower}_mlp")
        for number in picked:
            block: Any = layers[number].get_submodule(captioner.family.mlp)
            block.bottleneck = _bottleneck(captioner, block, mlp, width, tuning.placement == "parallel")
            block.register_forward_hook(_add)


def _bottleneck(captioner: Captioner, block: Any, mlp: Mlp, width: int, parallel: bool) -> Bottleneck:
    """A new adapter in at least float32, where the block's weights are."""
    example: Any = block.get_submodule(mlp.output)  # inner → D; of 4-bit weights only this tells D
    d, device = example.out_features, example.weight.device
    names = mlp.inputs if parallel else mlp.inputs[:1]
    inner = Inner(d, width, names, mlp.bias, getattr(block, mlp.activation))
    unit = Bottleneck(inner, Outer(width, d, mlp.bias, captioner.model.dtype), parallel)
    return unit.to(device, torch.promote_types(captioner.model.dtype, torch.float32)).train(block.training)


def _picked(numbers: Sequence[int] | None, count: int, tower: str) -> list[int]:
    """Layer numbers from 0, of numbers that may count from the end."""
    if numbers is None:
        return list(range(count))
    if wrong := [number for number in numbers if not -count <= number < count]:
        raise ConfigError(
            f"There is no {tower} layer {wrong[0]}: the model has {count}.",
            where=f"tuning.{tower}_layers",
            fix=f"name layers from 0 to {count - 1}, or from -1 to -{count} counted from the end",
        )
    return sorted({number % count for number in numbers})


def _add_lora(captioner: Captioner, tuning: LoraTuning, name: str, seed: int) -> None:
    """LoRA layers in the place of the targets' linear layers; B (VeRA: its vector b) starts at zero."""
    family = captioner.family
    places = {
        "language": [f"{family.language_model}.{family.language_layers}"],
        "vision": [f"{family.visual}.{family.vision_layers}"],
        "merger": [f"{family.visual}.{merger}" for merger in family.mergers],
    }
    roots = tuple(f"{place}." for target in tuning.targets for place in places[target])
    names = [
        key
        for key, layer in captioner.model.named_modules()
        if isinstance(layer, nn.Linear) and key.startswith(roots)
    ]
    config: peft.PeftConfig
    if tuning.method == "vera":
        with warnings.catch_warnings(action="ignore"):  # that the matrices are made again from the seed
            config = peft.VeraConfig(
                r=tuning.r,
                target_modules=names,
                vera_dropout=tuning.lora_dropout,
                projection_prng_key=seed,
                save_projection=False,
            )
    else:
        config = peft.LoraConfig(
            r=tuning.r,
            lora_alpha=tuning.lora_alpha,
            target_modules=names,
            lora_dropout=tuning.lora_dropout,
            use_rslora=tuning.use_rslora,
            use_dora=tuning.method == "dora",
        )
    wrapped = peft.get_peft_model(captioner.model, config, adapter_name=name)  # changes the model in place
    if tuning.method == "vera":  # its random matrices are float32, and a product has one number format
        for projection in (wrapped.base_model.vera_A, wrapped.base_model.vera_B):
            projection.to(torch.promote_types(captioner.model.dtype, torch.float32))
    captioner.model.train(captioner.model.training)


def _units(captioner: Captioner) -> Iterator[tuple[str, str, Bottleneck]]:
    """Every adapter unit: (name of the block in the model, tower, unit)."""
    for tower, blocks in captioner.blocks.items():
        for block in blocks:
            unit = getattr(captioner.model.get_submodule(block), "bottleneck", None)
            if unit is not None:
                yield block, tower, unit


def _parameters(captioner: Captioner) -> dict[str, nn.Parameter]:
    """What trains beside the soft prompt; no name depends on the adapter's or on how units are nested."""
    if captioner.tuning.get("placement") in ("parallel", "sequential"):
        units = ((block, unit) for block, _, unit in _units(captioner))
        return {f"{block}.{key}": p for block, unit in units for key, p in unit.named_parameters()}
    own = captioner.tuning["name"]
    return {
        ".".join(part for part in key.split(".") if part != own): p
        for key, p in captioner.model.named_parameters()
        if p.requires_grad and not key.endswith(".soft")
    }
