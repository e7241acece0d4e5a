"""Write a checkpoint in the form of the published Qwen-VL ones, which every tool reads.

transformers 5 writes forms of its own (one file for all processors, `rope_parameters`), which 4.57 and tools
that read the files themselves do not know; both versions read the published form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

# fields that both a root config and its text_config have
_AT_BOTH_LEVELS = {"model_type", "dtype", "torch_dtype", "tie_word_embeddings", "architectures"}
_AT_BOTH_LEVELS |= {"bos_token_id", "eos_token_id", "pad_token_id"}
_HOW_IT_WAS_LOADED = ("backend", "is_local", "local_files_only", "fix_mistral_regex")


def write_model(folder: Path, model: PreTrainedModel, **extra: Any) -> None:
    """Write weights and config.json; ``extra`` keys are added to config.json.

    The class name and whether the embeddings are tied go to its top level: transformers 4.57 leaves them in
    ``text_config`` for Qwen2-VL and Qwen2.5-VL, and vLLM reads them at the top. What else both levels have
    leaves the top, where a flat config.json keeps what it was loaded with.
    """
    model.save_pretrained(folder)
    settings = _read(folder / "config.json")
    text = settings["text_config"]
    text.pop("architectures", None)
    settings["architectures"] = [stock_class(model)]
    tied = text.get("tie_word_embeddings", settings.get("tie_word_embeddings"))
    settings["tie_word_embeddings"] = bool(tied)
    for key in set(settings) & set(text) - _AT_BOTH_LEVELS:
        del settings[key]
    if rope := text.pop("rope_parameters", None):
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
    _write(folder / "config.json", settings | extra)


def write_processor(folder: Path, processor: ProcessorMixin, chat_template: str | None = None) -> None:
    """Write the files of tokenizer, image and video processor; ``chat_template`` replaces its own."""
    processor.save_pretrained(folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    joint = folder / "processor_config.json"
    if joint.is_file():
        settings = _read(joint)
        for part, name in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
            if part in settings:
                own = settings.pop(part) | {"processor_class": settings["processor_class"]}
                _write(folder / f"{name}_config.json", own)
        joint.unlink()
    tokenizer = _read(folder / "tokenizer_config.json")
    for key in _HOW_IT_WAS_LOADED:
        tokenizer.pop(key, None)
    if isinstance(extra := tokenizer.get("extra_special_tokens"), list):
        del tokenizer["extra_special_tokens"]
        tokenizer["additional_special_tokens"] = extra
    _write(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def stock_class(model: PreTrainedModel) -> str:
    """The class of transformers that the model is, whatever was wrapped around it."""
    return next(
        kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")
    )
