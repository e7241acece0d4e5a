"""What a checkpoint directory must hold and must not hold, read before transformers sees it.

The files of a checkpoint are hostile until checked. transformers follows some keys of its JSON files to
kernels of the hub, to Python files and to other classes; such keys are refused wherever they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from captioner.config import ViewsConfig
from captioner.errors import CheckpointError
from captioner.models.families import FAMILIES

INDEX_FILE = "model.safetensors.index.json"
# the JSON files whose keys are settings; those of a vocabulary are its tokens
_SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
# Keys that make transformers fetch, import or run what the checkpoint names.
_REFUSED = re.compile(
    r"_?(attn|experts)_implementation.*"  # `owner/name` is a kernel, fetched from the hub
    r"|auto_map(ping)?|_auto_class|custom_\w+|trust_remote_code"  # Python files
    r"|\w*kernels?(_config|_mapping)?"
    r"|(use_)?(timm|pretrained)_backbone|use_timm\w*|backbone\w*"  # another model
    r"|transformers_weights|gguf_file"  # other weights
    r"|audio_tokenizer\w*|distributed_config|\w*_(tp|pp|fsdp)_plan"
)
_CLASS_KEY = re.compile(r"(slow_|fast_)?\w*(tokenizer|processor|extractor)_(class|type)")
_CLASS = re.compile(
    r"Qwen[0-9_]*(VL)?(Tokenizer|Processor|ImageProcessor|VideoProcessor)(Fast|Pil)?"
    r"|PreTrainedTokenizerFast|TokenizersBackend"
)
_CONTRASTIVE = re.compile(
    r"(CLIP|Siglip2?|Gemma)(Tokenizer|Processor|ImageProcessor)(Fast|Pil)?|PreTrainedTokenizerFast|TokenizersBackend"
)
_FIX = "load a checkpoint you trust, or remove the key from the file"


class Own(BaseModel):
    """The section `captioner` of an exported checkpoint's config.json."""

    views: ViewsConfig = ViewsConfig()
    soft_prompt_ids: list[NonNegativeInt] = []
    base_vocab_size: PositiveInt | None = None


def check_files(path: Path, *, weights: bool = True) -> dict[str, Any]:
    """Refuse what cannot be loaded, or not safely, before anything heavy starts; returns config.json.

    ``weights`` false: transformers will not read them, so quantized ones are fine.
    Raises CheckpointError, which names the file and the key.
    """
    where = str(path)
    if not path.is_dir():
        raise CheckpointError(
            "There is no checkpoint directory.", where=where, fix="set --model.path to a directory"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "The directory holds no config.json.", where=where, fix="name a checkpoint directory"
        )
    settings = read_json(path / "config.json")
    if settings.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"The architecture {settings.get('model_type')!r} is not supported.",
            where=where,
            fix="use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint (dense, not MoE)",
        )
    _check_weights(path)
    _check_processor_files(path)
    for file in path.glob("*.json"):
        if file.name in _SETTINGS_FILES:
            refuse_hostile(read_json(file), file)
        else:
            read_json(file)
    if weights and settings.get("quantization_config"):
        raise CheckpointError(
            "The weights are quantized (`quantization_config`).",
            where=where,
            fix="load the checkpoint it was made from; --model.load_in_4bit holds that one in 4 bits",
        )
    return settings


def check_contrastive(path: Path) -> str:
    """As :func:`check_files`, of a CLIP or SigLIP model that scores captions; its kind."""
    settings = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    kind = str(settings.get("model_type"))
    if kind not in ("clip", "siglip", "siglip2"):
        raise CheckpointError(
            f"There is no CLIP or SigLIP checkpoint, but {kind!r}.",
            where=str(path),
            fix="name the directory of one, with config.json and model.safetensors",
        )
    _check_weights(path)
    _check_processor_files(path)
    for file in (path / name for name in _SETTINGS_FILES):
        if file.is_file():
            refuse_hostile(read_json(file), file, _CONTRASTIVE)
    return kind


def _check_weights(path: Path) -> None:
    """Safetensors, in this directory, and no adapter in the place of a model."""
    where = str(path)
    if not any((path / name).is_file() for name in ("model.safetensors", INDEX_FILE)):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise CheckpointError(
            "The weights are pickled; loading them could run code."
            if pickled
            else "The directory holds no weights.",
            where=where,
            fix="convert them to safetensors (model.save_pretrained) in an environment you trust"
            if pickled
            else "copy model.safetensors there",
        )
    if (path / "adapter_config.json").exists():  # transformers would load the model that it names instead
        raise CheckpointError(
            "The directory holds an adapter (`adapter_config.json`) beside a model.",
            where=where,
            fix="merge the adapter into the model, or move the file elsewhere",
        )
    shards = read_json(path / INDEX_FILE).get("weight_map") if (path / INDEX_FILE).is_file() else {}
    names = set(shards.values()) if isinstance(shards, dict) else {shards}
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"`weight_map` names {name!r}, which is no safetensors file of this directory.",
                where=str(path / INDEX_FILE),
                fix="copy the checkpoint again",
            )


def _check_processor_files(path: Path) -> None:
    missing = [name for name in ("tokenizer_config.json",) if not (path / name).is_file()]
    for names in (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json")):
        if not any((path / name).is_file() for name in names):
            missing.append(names[0])
    if missing:
        raise CheckpointError(
            f"Processor files are missing: {', '.join(missing)}.",
            where=str(path),
            fix="copy them from the original checkpoint",
        )


def own_settings(settings: dict[str, Any], path: Path) -> Own:
    """What `captioner export` wrote into config.json. Raises CheckpointError where it was changed."""
    try:
        return Own.model_validate(settings.get("captioner", {}))
    except ValidationError as error:
        raise CheckpointError(
            f"The section `captioner` of config.json cannot be read: {error}",
            where=str(path),
            fix="export the captioner again",
        ) from error


def stored_dtype(path: Path) -> Literal["auto", "float32", "bfloat16", "float16", "float64"]:
    """The number format a checkpoint is stored in; ``auto`` where config.json names none of ours."""
    settings = check_files(path)
    name = settings.get("dtype", settings.get("torch_dtype"))
    return name if name in ("float32", "bfloat16", "float16", "float64") else "auto"


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for what is not a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} in the place of an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not JSON: {error}", where=str(path), fix="copy the file again"
        ) from error
    return found


def refuse_hostile(settings: dict[str, Any], file: Path, classes: re.Pattern[str] = _CLASS) -> None:
    """Raises CheckpointError for a key, at any depth, by which loading could fetch or run code."""
    for name, key, value in _entries(settings):
        if value is None or isinstance(value, bool | int | float):  # names nothing
            continue
        if _REFUSED.fullmatch(key):
            raise CheckpointError(
                f"{file.name} sets `{name}`, by which loading could fetch or run code.",
                where=str(file),
                fix=_FIX,
            )
        if _CLASS_KEY.fullmatch(key) and not (isinstance(value, str) and classes.fullmatch(value)):
            raise CheckpointError(
                f"{file.name} sets `{name}` to {value!r}, which is no class of such a checkpoint.",
                where=str(file),
                fix="copy the file from the original checkpoint",
            )


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, key, value) of every entry of nested objects and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{name}{key}", key, inner
            yield from _entries(inner, f"{name}{key}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _entries(inner, f"{name}{index}.")
