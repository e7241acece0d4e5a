"""Engines: what runs a captioner (`hf`, `vllm`, `server`) and what a tool LLM answers through (`text`).

The same request gives the same prompt ids on every engine. Heavy libraries are imported when one is made.
"""

from __future__ import annotations

from pathlib import Path

from captioner.config import Config
from captioner.engines.base import (
    NO_ANSWER,
    CaptionRequest,
    Engine,
    NoAnswer,
    QuestionBatch,
    TextRequest,
    YesNo,
)
from captioner.errors import CaptionerError

__all__ = [
    "NO_ANSWER",
    "CaptionRequest",
    "Engine",
    "NoAnswer",
    "QuestionBatch",
    "TextRequest",
    "YesNo",
    "make_engine",
]


def make_engine(checkpoint: Path, config: Config, prompt: str | None = None) -> Engine:
    """The engine that ``config.engine.type`` names, on a checkpoint directory.

    ``prompt`` is asked for captions in place of the captioner's own (see ``Renderer.branch_ids``). Raises
    CheckpointError for a checkpoint that cannot be read.
    """
    from captioner.models import model  # imports torch, which --help has no time for

    if config.engine.type == "hf":
        from captioner.engines.hf import HFEngine

        captioner = model.load(config.model.model_copy(update={"path": str(checkpoint)}))
        return HFEngine(captioner, config.views, config.engine, prompt=prompt)
    captioner = model.load_frontend(checkpoint)
    if config.engine.type == "server":
        from captioner.engines.server import ServerEngine
        from captioner.engines.serving import Served

        if not config.engine.serve:
            return ServerEngine(captioner, config.views, config.engine, prompt=prompt)
        served = Served(checkpoint, config)
        there = config.engine.model_copy(update={"urls": (served.url,), "model": None})
        try:
            return ServerEngine(captioner, config.views, there, prompt=prompt, served=served)
        except CaptionerError:
            served.close()
            raise
    from captioner.engines.vllm import VLLMEngine

    return VLLMEngine(captioner, config.views, config.engine, config.model.dtype, prompt=prompt)
