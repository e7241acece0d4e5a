"""What a language model on a server judges: questions answered from a caption, and which caption is better.

Its answers are checked; one that cannot be had is None, never wrong and never a tie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from captioner import prompts
from captioner.config import ToolConfig
from captioner.engines import NoAnswer, TextRequest
from captioner.engines.text import TextEngine
from captioner.errors import ConfigError
from captioner.judges.fixed_budget import CaptionQuestion

TOKENS = 64  # of an answer

Preference = Literal["first", "second", "tie"]


class Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    choice: int


class Better(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    better: Literal["A", "B", "tie"]


def engine_of(config: ToolConfig, what: str) -> TextEngine:
    """The model on ``tool.urls``. Raises ConfigError where the tool is no model."""
    if config.type != "server":
        fix = "--tool.type server --tool.urls http://HOST:PORT/v1"
        raise ConfigError(f"{what} needs a language model", where="tool.type = rules", fix=fix)
    return TextEngine(config)


class Reader:
    """Answers questions from captions, as :class:`captioner.judges.fixed_budget.Answerer`."""

    def __init__(self, engine: TextEngine):
        self._engine = engine

    def answer(self, asked: Sequence[CaptionQuestion]) -> list[int | None]:
        """The place of the chosen one of the choices, None without a good answer."""
        answers = self._engine.complete(map(_question, asked), Choice)
        return [None if isinstance(one, NoAnswer) else one.choice for one in answers]


def _question(one: CaptionQuestion) -> TextRequest:
    choices = json.dumps(list(one.choices), ensure_ascii=False)
    text = prompts.load("choose", caption=one.caption, question=one.question, choices=choices)

    def check(made: Choice) -> str | None:
        return None if 0 <= made.choice < len(one.choices) else f"no choice {made.choice}"

    return TextRequest(text, TOKENS, check)


def prefer(
    engine: TextEngine, first: Mapping[str, str], second: Mapping[str, str], images: Mapping[str, Path]
) -> dict[str, Preference | None]:
    """Which of two captions of each image the model prefers, by key.

    Every pair is asked in both orders, because models prefer a position (Zheng et al. 2023,
    arXiv:2306.05685): what is preferred in one place only is a tie. The model sees the image. None where
    either answer is missing.
    """
    keys = sorted(first.keys() & second.keys())

    def asked() -> Iterator[TextRequest]:
        for key in keys:
            for one, other in ((first[key], second[key]), (second[key], first[key])):
                yield TextRequest(prompts.load("prefer", first=one, second=other), TOKENS, image=images[key])

    answers = list(engine.complete(asked(), Better))
    return {
        key: _joined(*pair)
        for key, pair in zip(keys, zip(answers[::2], answers[1::2], strict=True), strict=True)
    }


def _joined(straight: Better | NoAnswer, swapped: Better | NoAnswer) -> Preference | None:
    if isinstance(straight, NoAnswer) or isinstance(swapped, NoAnswer):
        return None
    if (straight.better, swapped.better) == ("A", "B"):
        return "first"
    return "second" if (straight.better, swapped.better) == ("B", "A") else "tie"
