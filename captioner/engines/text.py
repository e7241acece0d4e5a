"""JSON answers of an instruction-tuned model on servers that speak the OpenAI protocol. Imports no torch."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import BytesIO
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from captioner.config import ServerConfig
from captioner.engines.base import NoAnswer, TextRequest
from captioner.engines.servers import Server, Servers, Unanswered, choice_of
from captioner.views import BadImage, load_image

ModelT = TypeVar("ModelT", bound=BaseModel)
MAX_TEXT = 1 << 16  # characters of an answer that may be read as JSON
LONGEST_SIDE = 1024  # px of an image that is shown


class TextEngine:
    """The servers of a config section, asked for JSON."""

    def __init__(self, config: ServerConfig):
        self._servers = Servers(config)

    @property
    def tokens(self) -> int:
        """Tokens generated up to now."""
        return self._servers.tokens

    @cached_property
    def model(self) -> str:
        """The name of the model that answers."""
        return self._servers.model()

    def close(self) -> None:
        """End what is under way."""
        self._servers.close()

    def complete(self, requests: Iterable[TextRequest], schema: type[ModelT]) -> Iterator[ModelT | NoAnswer]:
        """An answer of that schema to each request, in order, or why there is none; see TextRequest."""
        kind = {"name": schema.__name__, "schema": schema.model_json_schema(), "strict": True}

        async def one(request: TextRequest) -> ModelT | NoAnswer:
            try:
                content = _content(request)
            except BadImage as error:
                return NoAnswer(str(error))

            def body(server: Server, number: int) -> dict[str, Any]:
                return {
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": request.max_tokens,
                    "temperature": 0.7 if number else 0.0,  # the same again would give the same again
                    "seed": number,
                    "response_format": {"type": "json_schema", "json_schema": kind},
                }

            try:
                return (await self._servers.ask(body, lambda answer: _parse(answer, request, schema)))[0]
            except Unanswered as error:
                return NoAnswer(str(error))

        return self._servers.map(one, requests, 2 * self._servers.slots)


def _content(request: TextRequest) -> str | list[dict[str, Any]]:
    """What the user says: the text, with the image before it where there is one. Raises BadImage."""
    if request.image is None:
        return request.text
    picture, _ = load_image(request.image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    data = BytesIO()
    picture.save(data, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.text}]


def _parse(answer: dict[str, Any], request: TextRequest, schema: type[ModelT]) -> ModelT:
    """The answer as a checked object; Unanswered for anything else."""
    choice = choice_of(answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if choice.get("finish_reason") == "length":
        raise Unanswered("cut answer")
    if not isinstance(text, str) or not text.strip():
        raise Unanswered("empty answer")
    if len(text) > MAX_TEXT:
        raise Unanswered("over-long answer")
    try:
        made = schema.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise Unanswered("invalid answer") from error
    if request.check is not None and (reason := request.check(made)):
        raise Unanswered(reason)
    return made
