"""Write a captioner as a stock Qwen-VL checkpoint: adapters become wider feed-forward blocks, exactly.

``down(act(gate x) * (up x)) + down'(act(gate' x) * (up' x))`` is one block whose ``gate`` and ``up`` have
the rows of both and whose ``down`` has the columns of both; biases of the inputs join, those of the output
add. Rows of zeros with columns of zeros add nothing: they fill the blocks of a tower up to one width. LoRA
is added to the weights it hangs on. Shapes: D width of the tower, I inner width of the block, r inner units
of the adapter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, GenerationConfig, PretrainedConfig

from captioner.config import ModelConfig
from captioner.errors import CheckpointError, Refused
from captioner.files import atomic_dir
from captioner.models import adapters, model, stock
from captioner.models.adapters import Delta
from captioner.models.card import chat_template, model_card
from captioner.models.families import Family, Mlp
from captioner.models.model import Captioner, SoftEmbedding
from captioner.models.render import Prompt

# of the largest logit: what the order of summation may change in each number format
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclass(frozen=True)
class Difference:
    """How far the logits of an exported checkpoint lie from those of what was exported."""

    prompts: int
    largest: float  # |difference| of a logit
    scale: float  # largest |logit|
    same_tokens: float  # share of the positions with the same likeliest token

    @property
    def relative(self) -> float:
        return self.largest / self.scale

    def __str__(self) -> str:
        return (
            f"Against the captioner it was made from, on {self.prompts} prompts: logits differ by at most\n"
            f"{self.largest:.3g} (of {self.scale:.3g}); the likeliest token is the same at "
            f"{self.same_tokens:.2%} of the positions."
        )


def export(
    captioner: Captioner,
    out_dir: Path,
    adapter: str | None = "captioner",
    card: dict[str, Any] | None = None,
    *,
    multiple: int = 1,
    prompts: Sequence[Prompt] = (),
) -> Difference | None:
    """Write a checkpoint that transformers' auto classes load without this package.

    ``adapter`` names what is fused (None: there is nothing to fuse). ``card`` goes into README.md. The soft
    prompt becomes ordinary special tokens: generation_config.json suppresses them, and the chat template
    renders them where a user shows images alone. Number formats stay.
    Inner widths of the feed-forward blocks are padded with zeros to a ``multiple``. With ``prompts`` the
    logits of what was written are compared with the captioner's before it is published. ``out_dir`` is there
    whole or, after a failure, as it was.
    Raises ConfigError for a sequential or unknown adapter, CheckpointError where tensors do not fit, Refused
    where the logits differ by more than ``TOLERANCE``.
    """
    if getattr(captioner.model, "is_loaded_in_4bit", False):
        captioner = adapters.unquantized(captioner, adapter)
    plan = adapters.delta(captioner, adapter) if adapter else []
    state = adapters.base_state(captioner)
    config = copy.deepcopy(captioner.model.config)
    _replace(state, adapters.merged(captioner))
    fuse(state, plan)
    _widen(config, captioner.family, _even(state, captioner, multiple))
    own = {"views": captioner.views.model_dump(mode="json"), **_add_soft_rows(captioner, config, state)}
    with torch.device("meta"):
        written = AutoModelForImageTextToText.from_config(config)
    try:
        written.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The fused weights do not fit the architecture: {error}") from error
    written.tie_weights()
    written.generation_config = _generation_config(captioner)
    with atomic_dir(out_dir) as folder:
        stock.write_model(folder, written, captioner=own)
        stock.write_processor(folder, captioner.processor, chat_template(captioner))
        difference = compare(captioner, folder, prompts) if prompts else None
        text = model_card(captioner, card or {}, str(difference or ""))
        (folder / "README.md").write_text(text, encoding="utf-8")
    return difference


def compare(captioner: Captioner, folder: Path, prompts: Sequence[Prompt]) -> Difference:
    """Logits of the checkpoint in ``folder`` against the captioner's, soft tokens left out.

    Raises Refused where they differ by more than ``TOLERANCE`` of the largest logit.
    """
    name = str(captioner.model.dtype).removeprefix("torch.")
    settings = {"path": str(folder), "dtype": name, "device": captioner.device.type}
    exported = model.load(ModelConfig.model_validate(settings))
    largest = scale = 0.0
    same = positions = 0
    for prompt in prompts:
        expected, found = (_logits(one, prompt) for one in (captioner, exported))
        largest = max(largest, float((found - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        positions += len(expected)
    difference = Difference(len(prompts), largest, scale, same / positions)
    if not difference.relative <= TOLERANCE[name]:  # NaN, too
        raise Refused(
            f"the exported model's logits differ by {largest:.3g} of {scale:.3g} "
            f"({difference.relative:.2g}; at most {TOLERANCE[name]:g})",
            where=str(folder),
            fix="export in float32 (--model.dtype float32); if it stays, this is a bug of ours",
        )
    return difference


def _logits(captioner: Captioner, prompt: Prompt) -> Tensor:
    """[T, vocabulary] in float64; soft tokens have none."""
    with torch.no_grad():
        made = captioner.model(
            input_ids=torch.tensor([prompt.input_ids], device=captioner.device),
            position_ids=prompt.position_ids[:, None].to(captioner.device),
            pixel_values=prompt.pixel_values.to(captioner.device, captioner.model.dtype),
            image_grid_thw=prompt.image_grid_thw.to(captioner.device),
        )
    return cast(Tensor, made.logits[0].double())


def _replace(state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Put merged weights in the place of the base's; checks every shape before the first change."""
    for key, weight in weights.items():
        shapes = tuple(None if w is None else tuple(w.shape) for w in (state.get(key), weight))
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"Base and merged weight have the shapes {shapes}.", where=key)
    state.update(weights)


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


def _even(state: dict[str, Tensor], captioner: Captioner, multiple: int) -> dict[str, int]:
    """Give the blocks of each tower one inner width, a multiple, by units of zeros; returns the widths.

    The zeros of an earlier export go first, so that they do not add up from round to round.
    """
    widths = {}
    for tower, blocks in captioner.blocks.items():
        mlp: Mlp = getattr(captioner.family, f"{tower}_mlp")
        for block in blocks:
            _drop_zeros(state, block, mlp)
        hidden, _ = state[f"{blocks[0]}.{mlp.output}.weight"].shape
        whole = tower == "vision" and captioner.family.ratio_of is not None
        step = math.lcm(multiple, hidden) if whole else multiple
        most = max(state[f"{block}.{mlp.output}.weight"].shape[1] for block in blocks)
        widths[tower] = -(-most // step) * step
        for block in blocks:
            lacking = widths[tower] - state[f"{block}.{mlp.output}.weight"].shape[1]
            if not lacking:
                continue
            key = f"{block}.{mlp.output}.weight"
            state[key] = F.pad(state[key], (0, lacking))
            for part in mlp.inputs:
                key = f"{block}.{part}.weight"
                state[key] = F.pad(state[key], (0, 0, 0, lacking))
                if mlp.bias:
                    key = f"{block}.{part}.bias"
                    state[key] = F.pad(state[key], (0, lacking))
    return widths


def _drop_zeros(state: dict[str, Tensor], block: str, mlp: Mlp) -> None:
    """Leave out inner units that reach nothing."""
    used = state[f"{block}.{mlp.output}.weight"].any(dim=0)
    if used.all():
        return
    state[f"{block}.{mlp.output}.weight"] = state[f"{block}.{mlp.output}.weight"][:, used]
    for key in (f"{block}.{part}.{kind}" for part in mlp.inputs for kind in ("weight", "bias")):
        if key in state:
            state[key] = state[key][used]


def _widen(config: PretrainedConfig, family: Family, widths: dict[str, int]) -> None:
    """Write the inner widths into the config."""
    vision = config.vision_config
    config.text_config.intermediate_size = widths["language"]
    if family.ratio_of:
        vision.mlp_ratio = widths["vision"] // getattr(vision, family.ratio_of)
    else:
        vision.intermediate_size = widths["vision"]


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
