"""Write a captioner as a stock Qwen-VL checkpoint: adapters become wider feed-forward blocks, exactly.

``down(act(gate x) * (up x)) + down'(act(gate' x) * (up' x))`` is one block whose ``gate`` and ``up`` have
the rows of both and whose ``down`` has the columns of both; biases of the inputs join, those of the output
add. Shapes: D width of the tower, I inner width of the block, r inner units of the adapter.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, PretrainedConfig

from captioner import adapters
from captioner.adapters import Delta
from captioner.errors import CheckpointError
from captioner.model import Captioner, Family, SoftEmbedding, complete_config
from captioner.runs import atomic_dir


def export(
    captioner: Captioner, out_dir: Path, adapter: str | None = "captioner", card: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint that transformers' auto classes load without this package.

    ``adapter`` names the adapter to fuse (None: there is none to fuse). ``card`` goes into README.md. The
    soft prompt becomes ordinary special tokens, which generation_config.json suppresses. Number formats
    stay. ``out_dir`` is there whole or, after a failure, as it was.
    Raises ConfigError for a sequential or unknown adapter, CheckpointError where tensors do not fit.
    """
    plan = adapters.delta(captioner, adapter) if adapter else []
    state = adapters.base_state(captioner)
    config = copy.deepcopy(captioner.model.config)
    fuse(state, plan)
    _widen(config, captioner.family, state, plan)
    own = {"views": captioner.views.model_dump(mode="json"), **_add_soft_rows(captioner, config, state)}
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config)
    try:
        stock.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The fused weights do not fit the architecture: {error}") from error
    stock.tie_weights()
    stock.generation_config = _generation_config(captioner)
    with atomic_dir(out_dir) as folder:
        stock.save_pretrained(folder)
        complete_config(folder, stock, captioner=own)
        captioner.processor.save_pretrained(folder)
        (folder / "README.md").write_text(_readme(captioner, card or {}), encoding="utf-8")


def fuse(state: dict[str, Tensor], plan: Iterable[Delta]) -> None:
    """Apply the plan to a state dict in place (its tensors are replaced, never written to).

    Checks every shape before the first change; raises CheckpointError where one does not fit.
    """
    plan = list(plan)
    for delta in plan:
        _check(state, delta)
    for delta in plan:
        for part, rows in delta.weights.items():
            key = f"{delta.block}.{part}.weight"
            state[key] = torch.cat(
                [state[key], rows.to(state[key])], dim=1 if part == delta.mlp.output else 0
            )
        for part, bias in delta.biases.items():
            key = f"{delta.block}.{part}.bias"
            is_output = part == delta.mlp.output
            state[key] = (
                (state[key] + bias.to(state[key]))
                if is_output
                else torch.cat([state[key], bias.to(state[key])])
            )


def _check(state: dict[str, Tensor], delta: Delta) -> None:
    d, inner = state[f"{delta.block}.{delta.mlp.output}.weight"].shape
    r = delta.weights[delta.mlp.output].shape[1]
    for part in (*delta.mlp.inputs, delta.mlp.output):
        is_output = part == delta.mlp.output
        expected = {
            "weight": ((d, inner), (d, r)) if is_output else ((inner, d), (r, d)),
            "bias": ((d,), (d,)) if is_output else ((inner,), (r,)),
        }
        for kind, gained in (("weight", delta.weights), ("bias", delta.biases)):
            if kind == "bias" and not delta.mlp.bias:
                continue
            base = state.get(f"{delta.block}.{part}.{kind}")
            shapes = tuple(
                None if tensor is None else tuple(tensor.shape) for tensor in (base, gained.get(part))
            )
            if shapes != expected[kind]:
                raise CheckpointError(
                    f"Base and adapter have the shapes {shapes}, expected {expected[kind]}.",
                    where=f"{delta.block}.{part}.{kind}",
                )


def _widen(config: PretrainedConfig, family: Family, state: dict[str, Tensor], plan: list[Delta]) -> None:
    """Write the new inner widths into the config."""
    for delta in plan:
        width = state[f"{delta.block}.{delta.mlp.output}.weight"].shape[1]
        if delta.block.startswith(family.language_model):
            config.text_config.intermediate_size = width
        elif family.vision_width == "mlp_ratio":
            config.vision_config.mlp_ratio = _ratio(
                getattr(config.vision_config, family.vision_hidden), width
            )
        else:
            config.vision_config.intermediate_size = width


def _ratio(hidden: int, width: int) -> float:
    """The number with ``int(hidden * ratio) == width``, which is how Qwen2-VL's encoder finds its width."""
    ratio = width / hidden
    return ratio if int(hidden * ratio) == width else math.nextafter(ratio, math.inf)


def _add_soft_rows(
    captioner: Captioner, config: PretrainedConfig, state: dict[str, Tensor]
) -> dict[str, Any]:
    """Make the soft prompt rows of the vocabulary; returns what a load needs to take them out again."""
    embedding = captioner.model.get_input_embeddings()
    if not isinstance(embedding, SoftEmbedding):
        return {}
    family, ids = captioner.family, captioner.soft_prompt_ids
    key = f"{family.language_model}.{family.embedding}.weight"
    base = state[key]
    size = max(len(base), ids[-1] + 1)
    tied = state["lm_head.weight"].data_ptr() == base.data_ptr()
    table = torch.zeros(size, base.shape[1], dtype=base.dtype, device=base.device)
    table[: len(base)] = base
    table[ids] = embedding.soft.detach().to(base)
    head = (
        table
        if tied
        else torch.cat([state["lm_head.weight"], table.new_zeros(size - len(base), base.shape[1])])
    )
    state[key], state["lm_head.weight"] = table, head
    config.text_config.vocab_size = size
    return {"soft_prompt_ids": ids, "base_vocab_size": len(base)}


def _generation_config(captioner: Captioner) -> GenerationConfig:
    config = copy.deepcopy(captioner.model.generation_config)
    suppressed = {*(config.suppress_tokens or ()), *captioner.soft_prompt_ids}
    config.suppress_tokens = sorted(suppressed) or None
    end = captioner.tokenizer.convert_tokens_to_ids("<|im_end|>")
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = [end, *(i for i in listed if i not in (None, end))]
    return config


def _readme(captioner: Captioner, card: dict[str, Any]) -> str:
    prompt = (
        "The caption prompt is learned: "
        + "".join(captioner.tokenizer.convert_ids_to_tokens(captioner.soft_prompt_ids))
        if captioner.soft_prompt_ids
        else "The caption prompt is ordinary text."
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        "# Captioner",
        "",
    ]
    lines += [f"A stock `{captioner.family.name}` checkpoint written by `captioner export`. {prompt}", ""]
    if card:
        lines += ["```json", json.dumps(card, indent=2, sort_keys=True, default=str), "```", ""]
    return "\n".join(lines)
