"""Load a Qwen-VL family model and its processor; build a random model.

Shapes: B batch, T tokens, k soft tokens, D width. Knows nothing of training. Runs on transformers 4.57 and 5.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
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
from transformers.utils.logging import disable_progress_bar

from captioner.config import ModelConfig, ViewsConfig
from captioner.errors import CheckpointError, ConfigError
from captioner.models import stock, vision
from captioner.models.checkpoint import Own, check_files, own_settings
from captioner.models.families import FAMILIES, Family
from captioner.runs import checkpoint_path

disable_progress_bar()  # of transformers 5, which draws two for every file of weights
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
    soft tokens have no row in any softmax.
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
    settings = check_files(path)
    device = _device(config.device)
    dtype = _dtype(config.dtype, device)
    processor = _processor(path)
    if init == "random":
        model = _random_model(_architecture(path), seed, dtype).to(device)
    elif config.load_in_4bit:
        family = FAMILIES[settings["model_type"]]
        model = _pretrained_model(path, dtype, **_four_bits(family, dtype, device))
    else:
        model = _pretrained_model(path, dtype).to(device)
    own = own_settings(settings, path)
    captioner = _captioner(model.eval(), processor, path, settings, own)
    if own.soft_prompt_ids:
        _strip_soft_rows(captioner, own)
    vision.speed_up(captioner.visual, processor.image_processor)
    return captioner


def load_frontend(path: Path) -> Captioner:
    """What makes prompts for a checkpoint and reads its answers; the weights stay on disk.

    As :func:`load`, but the model is on the meta device and its soft prompt still in the vocabulary.
    """
    settings = check_files(path, weights=False)
    own = own_settings(settings, path)
    architecture = _architecture(path)
    architecture.quantization_config = None  # whoever serves the weights reads it
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(architecture)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    captioner = _captioner(model, _processor(path), path, settings, own)
    captioner.soft_prompt_ids = list(own.soft_prompt_ids)
    return captioner


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


def _four_bits(family: Family, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """How transformers is told to hold the layers of both towers in NF4 (Dettmers et al. 2023)."""
    where = "model.load_in_4bit"
    if not device.startswith("cuda"):
        fix = "leave it false, or run on a machine with a CUDA device"
        raise ConfigError(
            f"4-bit weights need a CUDA device; the model is on {device}.", where=where, fix=fix
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "4-bit weights need bitsandbytes, which is not installed.",
            where=where,
            fix="pip install bitsandbytes",
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
    model: PreTrainedModel, processor: ProcessorMixin, path: Path, settings: dict[str, Any], own: Own
) -> Captioner:
    return Captioner(
        model=model,
        processor=processor,
        tokenizer=processor.tokenizer,
        family=FAMILIES[settings["model_type"]],
        path=path,
        view_size=_view_size(processor),
        views=own.views,
    )


def _architecture(path: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"config.json does not fit its architecture: {_one_line(error)}",
            where=str(path),
            fix="copy it from the original checkpoint",
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _pretrained_model(path: Path, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            config=_architecture(path),
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **how,
        )
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"The weights do not load: {_one_line(error)}",
            where=str(path),
            fix="copy the checkpoint again",
        ) from error
    if info["missing_keys"]:  # transformers would leave them random
        raise CheckpointError(
            f"The weights lack {len(info['missing_keys'])} tensors, {min(info['missing_keys'])} among them.",
            where=str(path),
            fix="copy the checkpoint again",
        )
    return cast(PreTrainedModel, model)


def _processor(path: Path) -> ProcessorMixin:
    try:
        # transformers warns of a fault of Mistral's tokenizers at every large vocabulary, unless told off
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, fix_mistral_regex=False)
        images = processor.image_processor
        sizes = [images.size["shortest_edge"], images.size["longest_edge"]]
        sizes += [images.patch_size, images.merge_size, images.temporal_patch_size]
        if wrong := [size for size in sizes if not isinstance(size, int) or size < 1]:
            raise ValueError(f"a size in pixels is {wrong[0]!r}")
        return cast(ProcessorMixin, processor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The processor does not load: {_one_line(error)}",
            where=str(path),
            fix="copy the tokenizer and processor files from the original checkpoint",
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
    least, most = (processor.image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
    return math.isqrt(most) if least == most else DEFAULT_VIEW_SIZE


def _strip_soft_rows(captioner: Captioner, own: Own) -> None:
    """Take the soft prompt's rows out of embedding and head; look them up from a frozen parameter instead."""
    embedding, ids = captioner.model.get_input_embeddings(), own.soft_prompt_ids
    base_vocab_size = own.base_vocab_size or embedding.num_embeddings
    if ids != list(range(ids[0], ids[0] + len(ids))) or ids[-1] >= embedding.num_embeddings:
        raise CheckpointError(
            "The soft tokens that config.json names are no rows of the embedding.",
            where=str(captioner.path),
            fix="export the captioner again",
        )
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
    from transformers import Qwen2VLImageProcessor
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
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=tokenizer,
        video_processor=video_kind(**shape),
        chat_template=CHAT_TEMPLATE,
    )
    stock.write_processor(folder, processor)


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
    stock.write_model(folder, model)
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


def _random_model(architecture: PretrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """New weights drawn in float32 from ``seed``, the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(architecture, dtype=torch.float32)
    return cast(PreTrainedModel, model.to(dtype))
