"""Engines: what every one of them does (:mod:`captioner.engines.base`), and which one a config names."""

from pathlib import Path

from captioner.config import Config
from captioner.engines.base import CaptionRequest, Engine, QuestionBatch, YesNo

__all__ = ["CaptionRequest", "Engine", "QuestionBatch", "YesNo", "make_engine"]


def make_engine(checkpoint: Path, config: Config, prompt: str | None = None) -> Engine:
    """The engine that ``config.engine.type`` names, with the captioner of ``checkpoint``."""
    from captioner import model  # imports torch
    from captioner.engines.hf import HFEngine

    loaded = model.load(config.model.model_copy(update={"path": str(checkpoint)}))
    return HFEngine(loaded, config.views, config.engine, prompt)
