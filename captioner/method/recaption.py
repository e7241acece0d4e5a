"""Captions of images by a teacher: a vision-language model on servers that speak the OpenAI protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from captioner import prompts
from captioner.config import ToolConfig
from captioner.engines import NoAnswer, TextRequest
from captioner.progress import progress
from captioner.records import CaptionRow
from captioner.runs import Shards
from captioner.sources.folder import ImageRow, one_line

SHARD_ROWS = 256  # images between two published shards


class Described(BaseModel):
    """What the teacher answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    caption: str = Field(min_length=1, max_length=8000)


def describe(
    rows: Sequence[ImageRow], shards: Shards[CaptionRow], config: ToolConfig, *, hint: bool = False
) -> list[CaptionRow]:
    """A row for each image, in order; those that are in ``shards`` with a caption are not asked for again.

    With ``hint`` the teacher is shown the caption that is there. The answers are untrusted text. An image
    without a good answer in all tries has a row with the reason. Raises EngineError where no server answers.
    """
    from captioner.engines.text import TextEngine

    engine = TextEngine(config)
    try:
        with progress("captions by the teacher", len(rows)) as bar:
            for index, start in enumerate(range(0, len(rows), SHARD_ROWS)):
                part = rows[start : start + SHARD_ROWS]
                known = {
                    row.key: row for row in (shards.read(index) if shards.has(index) else []) if row.caption
                }
                asked = [row for row in part if row.key not in known and not row.error]
                answers = engine.complete((_request(row, config, hint) for row in asked), Described)
                for row, answer in zip(asked, answers, strict=True):
                    known[row.key] = _row(row.key, answer, engine.model)
                    bar.advance()
                bar.advance(len(part) - len(asked))
                if asked or not shards.has(index):
                    lost = NoAnswer("")
                    made = [known.get(row.key) or _row(row.key, lost, "", row.error) for row in part]
                    shards.write(index, made)
    finally:
        engine.close()
    return shards.read_all()


def _request(row: ImageRow, config: ToolConfig, hint: bool) -> TextRequest:
    text = prompts.load("recaption")
    if hint and row.caption:
        told = json.dumps(row.caption, ensure_ascii=False)
        text += "\n\n" + prompts.load("recaption_hint", caption=told)
    return TextRequest(text, config.max_tokens, image=row.path)


def _row(key: str, answer: Described | NoAnswer, model: str, error: str | None = None) -> CaptionRow:
    text = None if isinstance(answer, NoAnswer) else one_line(answer.caption)
    return CaptionRow(
        id="",
        key=key,
        caption=text,
        finish_reason="stop" if text else None,
        tokens=None,
        model=model,
        config=prompts.prompt_hash("recaption"),
        error=error or (answer.reason if isinstance(answer, NoAnswer) else None),
    )
