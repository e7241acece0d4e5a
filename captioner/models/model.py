"""Load a Qwen-VL family model and its processor; the table of families; build a random model.

Shapes: B batch, V views, P patches of a view, N patches of all views, H heads, T tokens, D width.
Knows nothing of training. Runs on transformers 4.57 and 5.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from captioner.config import ModelConfig, ViewsConfig
from captioner.errors import CheckpointError, ConfigError
from captioner.runs import checkpoint_path

DEFAULT_VIEW_SIZE = 448  # px; where the checkpoint fixes none
SOFT_TOKEN = "<|soft_{}|>"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The text half of Qwen3-VL's template: no default system message, images where the message names them.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen's pre-tokenization: words with their leading space, single digits, punctuation runs.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Mlp:
    """Names inside a feed-forward block: rows of ``inputs`` and columns of ``output`` are its inner units."""

    gated: bool  # down(act(gate x) * (up x)) or fc2(act(fc1 x))
    bias: bool
    inputs: tuple[str, ...]
    output: str
    activation: str  # attribute that holds the activation function


@dataclass(frozen=True)
class Family:
    """Where the parts of one architecture are, as attribute paths of the model."""

    name: str
    vision_mlp: Mlp
    language_mlp: Mlp
    # config field of the encoder's width D, where its inner width is `mlp_ratio` times D, a whole number of
    # times: transformers 5 reads no other; None: it is `intermediate_size`
    ratio_of: str | None = None
    visual: str = "model.visual"
    language_model: str = "model.language_model"
    vision_layers: str = "blocks"  # below ``visual``
    language_layers: str = "layers"  # below ``language_model``
    embedding: str = "embed_tokens"  # below ``language_model``
    mergers: tuple[str, ...] = ("merger",)  # below ``visual``: what projects into the language model
    mlp: str = "mlp"  # the feed-forward block's name in every layer of both towers


_SWIGLU = Mlp(
    gated=True, bias=False, inputs=("gate_proj", "up_proj"), output="down_proj", activation="act_fn"
)
_SWIGLU_BIAS = Mlp(
    gated=True, bias=True, inputs=("gate_proj", "up_proj"), output="down_proj", activation="act_fn"
)
FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("qwen2_vl", Mlp(False, True, ("fc1",), "fc2", "act"), _SWIGLU, ratio_of="embed_dim"),
    "qwen2_5_vl": Family("qwen2_5_vl", _SWIGLU_BIAS, _SWIGLU),
    "qwen3_vl": Family(
        "qwen3_vl",
        Mlp(False, True, ("linear_fc1",), "linear_fc2", "act_fn"),
        _SWIGLU,
        mergers=("merger", "deepstack_merger_list"),
    ),
}


@dataclass
class Captioner:
    """A model with everything needed to feed it."""

    model: PreTrainedModel
    processor: ProcessorMixin
    tokenizer: PreTrainedTokenizerBase
    family: Family
    path: Path
    view_size: int  # side of a square view, px
    soft_prompt_ids: list[int] = field(default_factory=list)
    views: ViewsConfig = field(default_factory=ViewsConfig)  # what it was trained with
    tuning: dict[str, Any] = field(default_factory=dict)  # what `adapters` hung in: its manifest

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def visual(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.get_submodule(self.family.visual))

    @property
    def language_model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.get_submodule(self.family.language_model))

    @property
    def layers(self) -> dict[str, list[nn.Module]]:
        """The layers of both towers: ``{"vision": [...], "language": [...]}``."""
        vision = self.visual.get_submodule(self.family.vision_layers)
        language = self.language_model.get_submodule(self.family.language_layers)
        return {"vision": list(vision.children()), "language": list(language.children())}

    @property
    def blocks(self) -> dict[str, list[str]]:
        """The names in the model of the feed-forward blocks of both towers."""
        family = self.family
        places = {
            "vision": f"{family.visual}.{family.vision_layers}",
            "language": f"{family.language_model}.{family.language_layers}",
        }
        return {
            tower: [f"{place}.{index}.{family.mlp}" for index in range(len(self.layers[tower]))]
            for tower, place in places.items()
        }


class SoftEmbedding(nn.Embedding):
    """An input embedding in which the ids ``first ... first + k - 1`` look up the rows of ``soft`` [k, D].

    ``weight`` [vocabulary, D] stays the base's own parameter (the output head may be tied to it), so the
    soft tokens are no rows of any softmax.
    """

    first: int
    soft: nn.Parameter

    @classmethod
    def around(cls, base: nn.Embedding, first: int, rows: Tensor, trainable: bool) -> SoftEmbedding:
        embedding = cls(1, base.embedding_dim, device="meta")
        embedding.num_embeddings, embedding.padding_idx = base.num_embeddings, base.padding_idx
        embedding.weight = base.weight
        embedding.first = first
        precise = torch.promote_types(base.weight.dtype, torch.float32)  # bfloat16 would lose small steps
        embedding.soft = nn.Parameter(
            rows.to(base.weight.device, precise, copy=True), requires_grad=trainable
        )
        embedding.train(base.training)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        """[B, T] ids → [B, T, D]."""
        k = len(self.soft)
        is_soft = (input >= self.first) & (input < self.first + k)
        base = F.embedding(input.masked_fill(is_soft, 0), self.weight)
        soft = F.embedding((input - self.first).clamp(0, k - 1), self.soft).to(base.dtype)
        return torch.where(is_soft[..., None], soft, base)


def load(
    config: ModelConfig | Path | str, *, init: Literal["pretrained", "random"] = "pretrained", seed: int = 0
) -> Captioner:
    """Load a checkpoint directory, offline, safetensors only, with the fast vision path.

    ``init="random"`` draws new weights (from ``seed``) for the checkpoint's architecture. Soft prompt rows of
    an exported captioner leave the vocabulary and become a frozen :class:`SoftEmbedding`.

    Raises :class:`CheckpointError` for a missing directory, another architecture, pickled weights only, or
    missing processor files; ConfigError where 4-bit weights are asked for and cannot be had.
    """
    if not isinstance(config, ModelConfig):
        config = ModelConfig(path=str(config))
    path = checkpoint_path(config.path)
    settings = _check_files(path)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    processor = _processor(path)
    if init == "random":
        architecture = AutoConfig.from_pretrained(path, local_files_only=True)
        model = _random_model(architecture, seed, dtype).to(device)
    elif config.load_in_4bit:
        family = FAMILIES[settings["model_type"]]
        model = _pretrained_model(path, dtype, **_four_bits(family, dtype, device))
    else:
        model = _pretrained_model(path, dtype).to(device)
    captioner = _captioner(model.eval(), processor, path, settings)
    own = settings.get("captioner", {})
    if "soft_prompt_ids" in own:
        _strip_soft_rows(captioner, own["soft_prompt_ids"], own["base_vocab_size"])
    speed_up_vision(captioner)
    return captioner


def load_frontend(path: Path) -> Captioner:
    """What makes prompts for a checkpoint and reads its answers; the weights stay on disk.

    As :func:`load`, but the model is on the meta device and its soft prompt still in the vocabulary.
    """
    settings = _check_files(path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(path, local_files_only=True)
        )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    captioner = _captioner(model, _processor(path), path, settings)
    captioner.soft_prompt_ids = list(settings.get("captioner", {}).get("soft_prompt_ids", []))
    return captioner


def stored_dtype(path: Path) -> Literal["auto", "float32", "bfloat16", "float16", "float64"]:
    """The number format a checkpoint is stored in; ``auto`` where config.json names none of ours."""
    settings = _check_files(path)
    name = settings.get("dtype", settings.get("torch_dtype"))
    return name if name in ("float32", "bfloat16", "float16", "float64") else "auto"


def describe_trainable(model: nn.Module) -> list[tuple[str, int, float]]:
    """What trains: (module, trainable parameters, their share of all parameters), largest first.

    Indices are folded (``model.visual.blocks.*.mlp``) so that the table stays short.
    """
    total = sum(p.numel() for p in model.parameters())
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = ["*" if part.isdigit() else part for part in name.split(".")[:-1]]
            counts[".".join(parts)] = counts.get(".".join(parts), 0) + parameter.numel()
    rows = sorted(counts.items(), key=lambda row: -row[1])
    return [(module, params, params / total) for module, params in rows]


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_files(path: Path) -> dict[str, Any]:
    """Refuse what cannot be loaded before anything heavy starts; returns config.json."""
    where = str(path)
    if not path.is_dir():
        raise CheckpointError(
            "There is no checkpoint directory.", where=where, mend="set --model.path to a directory"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "The directory holds no config.json.", where=where, mend="name a checkpoint directory"
        )
    settings = _read_json(path / "config.json")
    if settings.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"The architecture {settings.get('model_type')!r} is not supported.",
            where=where,
            mend="use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint (dense, not MoE)",
        )
    if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise CheckpointError(
            "The weights are pickled; loading them could run code."
            if pickled
            else "The directory holds no weights.",
            where=where,
            mend="convert them to safetensors (model.save_pretrained) in an environment you trust"
            if pickled
            else "copy model.safetensors there",
        )
    missing = [name for name in ("tokenizer_config.json",) if not (path / name).is_file()]
    for names in (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json")):
        if not any((path / name).is_file() for name in names):
            missing.append(names[0])
    if missing:
        raise CheckpointError(
            f"Processor files are missing: {', '.join(missing)}.",
            where=where,
            mend="copy them from the original checkpoint",
        )
    for file in path.glob("*.json"):
        _read_json(file)
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} is no JSON: {error}", where=str(path), mend="copy the file again"
        ) from error


def _four_bits(family: Family, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """How transformers is told to hold the layers of both towers in NF4 (Dettmers et al. 2023)."""
    where = "model.load_in_4bit"
    if not device.startswith("cuda"):
        mend = "leave it false, or run on a machine with a CUDA device"
        raise ConfigError(
            f"4-bit weights need a CUDA device; the model is on {device}.", where=where, mend=mend
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "4-bit weights need bitsandbytes, which is not installed.",
            where=where,
            mend="pip install bitsandbytes",
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *(f"{family.visual}.{merger}" for merger in family.mergers)],
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _captioner(
    model: PreTrainedModel, processor: ProcessorMixin, path: Path, settings: dict[str, Any]
) -> Captioner:
    return Captioner(
        model=model,
        processor=processor,
        tokenizer=processor.tokenizer,
        family=FAMILIES[settings["model_type"]],
        path=path,
        view_size=_view_size(processor),
        views=ViewsConfig.model_validate(settings.get("captioner", {}).get("views", {})),
    )


def _pretrained_model(path: Path, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"The weights do not load: {str(error).splitlines()[0]}",
            where=str(path),
            mend="copy the checkpoint again",
        ) from error
    if info["missing_keys"]:  # transformers would leave them random
        raise CheckpointError(
            f"The weights lack {len(info['missing_keys'])} tensors, {min(info['missing_keys'])} among them.",
            where=str(path),
            mend="copy the checkpoint again",
        )
    return cast(PreTrainedModel, model)


def _processor(path: Path) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(path, local_files_only=True, use_fast=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"The processor does not load: {str(error).splitlines()[0]}",
            where=str(path),
            mend="copy the tokenizer and processor files from the original checkpoint",
        ) from error


def _device(name: str) -> str:
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    return cast(torch.dtype, getattr(torch, name))


def _view_size(processor: ProcessorMixin) -> int:
    """Side in px of the square that the processor's size fixes (least = most pixels), else 448."""
    size = processor.image_processor.size
    least, most = size["shortest_edge"], size["longest_edge"]
    return math.isqrt(most) if least == most else DEFAULT_VIEW_SIZE


def _strip_soft_rows(captioner: Captioner, ids: list[int], base_vocab_size: int) -> None:
    """Take the soft prompt's rows out of embedding and head; look them up from a frozen parameter instead."""
    embedding = captioner.model.get_input_embeddings()
    rows = embedding.weight.detach()[ids].clone()
    if base_vocab_size < embedding.num_embeddings:
        captioner.model.resize_token_embeddings(base_vocab_size)
    embed_soft_rows(captioner, ids[0], rows, trainable=False)


def embed_soft_rows(captioner: Captioner, first: int, rows: Tensor, *, trainable: bool) -> SoftEmbedding:
    """Put a :class:`SoftEmbedding` around the input embedding.

    ``rows`` [k, D]; ``first`` is the id of the first soft token. Ids that lie in the vocabulary's padding
    lose the unused rows they had there: with tied embeddings they would be rows of the head.
    """
    base = captioner.model.get_input_embeddings()
    with torch.no_grad():
        base.weight[first : first + len(rows)] = 0
    embedding = SoftEmbedding.around(base, first, rows, trainable)
    captioner.model.set_input_embeddings(embedding)
    captioner.soft_prompt_ids = list(range(first, first + len(rows)))
    return embedding


# ── the vision tower, many views at once ─────────────────────────────────────────────────────────────────


def speed_up_vision(captioner: Captioner) -> None:
    """Make the encoder cheap for many views of equal size; the numbers stay those of transformers.

    Views attend in one batched call instead of a Python loop over views; position tables are made once per
    grid; the patch convolution, whose kernel equals its stride, is a matrix product.
    """
    visual = captioner.visual
    for module in visual.modules():
        if type(module).__name__.endswith(("VisionAttention", "VisionAttentionFast")):
            _bind(module, "forward", _attention)
    _bind(visual.get_submodule("patch_embed"), "forward", _patch_embed)
    _bind(visual, "rot_pos_emb", _rotary)
    if hasattr(visual, "fast_pos_embed_interpolate"):
        _bind(visual, "fast_pos_embed_interpolate", _positions)


def _bind(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, types.MethodType(function, module))


def _attention(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention of [N, D] inside each of the segments that ``cu_seqlens`` bounds."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    cos_sin = kwargs.get("position_embeddings")
    if len(set(lengths)) != 1 or self.config._attn_implementation != "sdpa" or cos_sin is None:
        return cast(Tensor, type(self).forward(self, hidden_states, cu_seqlens, *args, **kwargs))
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb_vision
    n = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)  # [N, H, D/H]
    query, key = rotate(query, key, *cos_sin)
    query, key, value = (
        x.reshape(len(lengths), lengths[0], self.num_heads, -1).transpose(1, 2) for x in (query, key, value)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)  # [V, H, P, D/H]
    return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(n, -1)))


def _patch_embed(self: Any, hidden_states: Tensor) -> Tensor:
    """[N, C] flat patches → [N, D]."""
    weight = self.proj.weight
    return F.linear(
        hidden_states.to(weight.dtype).view(-1, weight[0].numel()), weight.flatten(1), self.proj.bias
    )


def _per_grid(grid_thw: Tensor, one: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Concatenate ``one(grid)`` over the rows of ``grid_thw`` [V, 3]; each distinct grid is computed once."""
    grids = [tuple(grid) for grid in grid_thw.tolist()]
    distinct = {grid: one(grid) for grid in dict.fromkeys(grids)}
    if len(distinct) == 1:
        return distinct[grids[0]].repeat(len(grids), 1)
    return torch.cat([distinct[grid] for grid in grids])


def _cached(module: nn.Module, name: str, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """A constant of the module per key; the table is small because views come in few sizes."""
    table = module.__dict__.setdefault(name, {})
    if key not in table:
        if len(table) >= 256:
            table.clear()
        table[key] = make()
    return table[key]


def _rotary(self: Any, grid_thw: Tensor) -> Tensor:
    """Rotary angles [N, D/H/2]: they depend on the grid alone."""
    device = self.rotary_pos_emb.inv_freq.device

    def one(grid: tuple[int, ...]) -> Tensor:
        row = torch.tensor([grid], device=grid_thw.device)
        make = lambda: type(self).rot_pos_emb(self, row)  # noqa: E731
        return cast(Tensor, _cached(self, "_rotary_cache", (grid, device), make))

    return _per_grid(grid_thw, one)


def _positions(self: Any, grid_thw: Tensor) -> Tensor:
    """Position embeddings [N, D], bilinear in the learned square table (Qwen3-VL)."""
    weight = self.pos_embed.weight

    def one(grid: tuple[int, ...]) -> Tensor:
        t, h, w = grid
        make = lambda: _corners(h, w, self.num_grid_per_side, self.config.spatial_merge_size, weight)  # noqa: E731
        index, share = _cached(self, "_corner_cache", (h, w, weight.device, weight.dtype), make)
        return (self.pos_embed(index) * share[..., None]).sum(0).repeat(t, 1)

    return _per_grid(grid_thw, one)


def _corners(h: int, w: int, side: int, merge: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the table [4, h*w] that surround each patch and their shares [4, h*w], in merge-block order."""
    y, x = torch.linspace(0, side - 1, h), torch.linspace(0, side - 1, w)
    y0, x0 = y.int(), x.int()
    y1, x1 = (y0 + 1).clip(max=side - 1), (x0 + 1).clip(max=side - 1)
    dy, dx = (y - y0)[:, None], (x - x0)[None]
    index = torch.stack([a[:, None] * side + b[None] for a in (y0, y1) for b in (x0, x1)])
    share = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])

    def order(table: Tensor) -> Tensor:
        return table.view(4, h // merge, merge, w // merge, merge).transpose(2, 3).flatten(1)

    return order(index).long().to(like.device), order(share).to(like)


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer in Qwen's form, trained on ``texts``: no text is unknown to it.

    ``vocab_size`` counts the 256 bytes and Qwen's special tokens too; few texts give fewer tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=32768,
    )


def write_processor(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    patch_size: int,
    merge_size: int,
    view_size: int,
    model_type: str = "qwen3_vl",
) -> None:
    """Write processor and tokenizer files that ``AutoProcessor`` loads.

    Sizes in px; every image is resized to about ``view_size``² pixels, sides multiples of patch × merge.
    """
    from transformers import Qwen2VLImageProcessorFast
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor

    kinds = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }
    processor_kind, video_kind = kinds[model_type]
    shape = dict(
        size={"shortest_edge": view_size**2, "longest_edge": view_size**2},
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = processor_kind(
        image_processor=Qwen2VLImageProcessorFast(**shape),
        tokenizer=tokenizer,
        video_processor=video_kind(**shape),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


def build_random(
    folder: Path,
    architecture: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    view_size: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Captioner:
    """Write a checkpoint of ``architecture`` with random weights and load it.

    Token ids of the architecture (image, video, vision start and end, end, pad) are set from the tokenizer;
    ``architecture.text_config.vocab_size`` must hold all its tokens.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    for name in ("image", "video"):
        setattr(architecture, f"{name}_token_id", ids[f"<|{name}_pad|>"])
    for name in ("start", "end"):
        setattr(architecture, f"vision_{name}_token_id", ids[f"<|vision_{name}|>"])
    architecture.text_config.pad_token_id = ids["<|endoftext|>"]
    architecture.text_config.eos_token_id = ids["<|im_end|>"]
    architecture.text_config.bos_token_id = None
    model = _random_model(architecture, seed, dtype)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.save_pretrained(folder)
    complete_config(folder, model)
    vision = architecture.vision_config
    write_processor(
        folder,
        tokenizer,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        view_size=view_size,
        model_type=architecture.model_type,
    )
    settings = {"path": str(folder), "dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    return load(ModelConfig.model_validate(settings))


def complete_config(folder: Path, model: PreTrainedModel, **extra: Any) -> None:
    """Write at the top level of config.json what transformers 4.57 leaves in ``text_config`` for Qwen2-VL
    and Qwen2.5-VL, and vLLM reads there: the class name and whether the embeddings are tied.

    ``extra`` keys are added.
    """
    path = folder / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text = settings["text_config"]
    text.pop("architectures", None)
    settings["architectures"] = [stock_class(model)]
    settings["tie_word_embeddings"] = bool(
        text.get("tie_word_embeddings", settings.get("tie_word_embeddings"))
    )
    settings |= extra
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stock_class(model: PreTrainedModel) -> str:
    """The class of transformers that the model is, whatever was wrapped around it."""
    return next(
        kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")
    )


def _random_model(architecture: PretrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """New weights drawn in float32 from ``seed``, the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(architecture, dtype=torch.float32)
    return cast(PreTrainedModel, model.to(dtype))
