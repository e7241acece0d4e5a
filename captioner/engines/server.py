"""Captions and answers from vLLM servers, with the prompt ids of the ``hf`` engine.

The views go as PNG (lossless) under the hash of their pixels: the first request of an image carries them, the
others name them, all go to one server, and so its prefix cache holds the image. The token ids that the server
made of a prompt are compared with our own.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from captioner import views
from captioner.config import EngineConfig, SamplingConfig, ViewsConfig, ViewsOverride
from captioner.engines.base import NO_ANSWER, CaptionRequest, QuestionBatch, YesNo
from captioner.engines.servers import Rejected, Server, Servers, Unanswered, choice_of
from captioner.engines.vocabulary import Vocabulary
from captioner.errors import EngineError, printable
from captioner.files import hash_path, row_seed
from captioner.models.model import Captioner
from captioner.models.render import Renderer
from captioner.records import Candidate

if TYPE_CHECKING:
    from captioner.engines.serving import Served

NAME_LENGTH = 16  # digits of a checkpoint's hash that name it on a server
BIAS = -100.0  # the strongest that the protocol allows; the logits of a model lie far inside
NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def served_name(checkpoint: Path) -> str:
    """The name under which `captioner serve` offers a checkpoint: a hash, so that no other passes for it."""
    return f"captioner-{hash_path(checkpoint)[:NAME_LENGTH]}"


@dataclass
class Shown:
    """The views of one image as parts of a message, with and without their pixels, and their prompt ids."""

    parts: list[dict[str, Any]]
    names: list[dict[str, Any]]
    ids: list[int]
    home: Server | None = None  # where the requests of the image go
    known: set[Server] = field(default_factory=set)  # the servers that have seen the pixels


class ServerEngine:
    """See :class:`captioner.engines.Engine`. ``captioner`` may be one of ``model.load_frontend``.

    ``Candidate.mean_logprob`` is over the whole vocabulary of the served checkpoint. Where no server gives a
    good answer, candidates have the ``finish_reason`` "error: ..." and answers are NaN.
    ``served``, a server of its own, ends with it.
    Raises EngineError where no server answers, none serves the checkpoint, or the prompts differ.
    """

    def __init__(
        self,
        captioner: Captioner,
        views: ViewsConfig | ViewsOverride,
        config: EngineConfig,
        prompt: str | None = None,
        served: Served | None = None,
    ):
        self.captioner, self.prompt, self._served = captioner, prompt, served
        self.renderer = Renderer(captioner, views)
        self._words = Vocabulary(captioner, self.renderer)
        try:
            self._caption_text = self._text(prompt)
        except Unanswered as error:
            raise EngineError(
                f"the caption prompt cannot be sent: {error}", where=str(captioner.path)
            ) from error
        self._servers = Servers(config, served_name(captioner.path))

    def close(self) -> None:
        """End what is under way."""
        self._servers.close()
        if self._served:
            self._served.close()

    # ---- captions

    def sample(
        self, requests: Iterable[CaptionRequest], n: int, sampling: SamplingConfig
    ) -> Iterator[list[Candidate]]:
        """``n`` captions of every image, in request order; see :class:`captioner.engines.Engine`."""
        ahead = 2 * math.ceil(self._servers.slots / n)
        return self._servers.map(lambda request: self._captions(request, n, sampling), requests, ahead)

    async def _captions(self, request: CaptionRequest, n: int, sampling: SamplingConfig) -> list[Candidate]:
        text, tail = self._caption_text, self.renderer.branch_ids(self.prompt)[0]
        seeds = [row_seed(sampling.seed, request.sample_id, k) for k in range(n)]

        async def one(k: int) -> Candidate:
            settings = {
                **NEUTRAL,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                "seed": seeds[k],
                "logprobs": True,
                "logit_bias": {str(token): BIAS for token in sorted(self._words.never)},
                "stop_token_ids": sorted(self._words.stops),
                "return_token_ids": True,
            }
            ids, logprobs = await self._ask(shown, text, tail, settings, self._caption)
            return self._words.candidate(request.sample_id, request.key, k, seeds[k], ids, logprobs)

        try:
            shown = await asyncio.to_thread(self._show, request.image, "all")
            if n > 1:  # one token first: the samples then share its prefix, and none sends the pixels again
                await self._ask(shown, text, tail, {"max_tokens": 1, "temperature": 0.0}, lambda answer: None)
            return await _all(one(k) for k in range(n))
        except Unanswered as error:
            blame = "" if isinstance(error, Rejected) else NO_ANSWER
            return [_failed(request, k, seeds[k], blame + str(error)) for k in range(n)]

    def _caption(self, answer: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Token ids, the end token included, and their log-probabilities."""
        choice = choice_of(answer)
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        logprobs = [row["logprob"] for row in _logprobs(choice)]
        if reason not in ("stop", "length"):
            raise Unanswered(f"a caption with the finish reason {printable(str(reason))[:40]}")
        if not self._are_ids(ids) or len(ids) != len(logprobs) or not ids:
            raise Unanswered("a caption without its tokens")
        if (reason == "stop") != (ids[-1] in self._words.stops):
            raise Unanswered(f"finish reason {reason}, but the last token is {ids[-1]}")
        return ids, logprobs

    def _are_ids(self, ids: Any) -> TypeGuard[list[int]]:
        """Whether these are token ids of the checkpoint."""
        return isinstance(ids, list) and all(type(i) is int and 0 <= i < self._words.size for i in ids)

    # ---- questions

    def p_yes(self, requests: Iterable[QuestionBatch]) -> Iterator[list[YesNo]]:
        """One :class:`YesNo` per question, in request order; see :class:`captioner.engines.Engine`."""
        return self._servers.map(self._answers, requests, 1 + self._servers.slots // 8)

    async def _answers(self, batch: QuestionBatch) -> list[YesNo]:
        words = self._words
        soft = self.captioner.soft_prompt_ids
        settings = {
            **NEUTRAL,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "logprob_token_ids": [*words.yes, *words.no, *soft],
            "return_tokens_as_token_ids": True,
        }

        def read(answer: dict[str, Any]) -> YesNo:
            try:
                top = _finite(_logprobs(choice_of(answer))[0]["top_logprobs"])
                rows = {row["token"]: row["logprob"] for row in top}
                yes, no, learned = (
                    sum(math.exp(rows[f"token_id:{token}"]) for token in ids)
                    for ids in (words.yes, words.no, soft)
                )
                return YesNo(yes / (yes + no), (yes + no) / (1.0 - learned))  # no soft token is ever said
            except (LookupError, TypeError, ArithmeticError) as error:
                raise Unanswered("an answer without its probabilities") from error

        async def one(question: str, check: bool = False) -> YesNo:
            extra = {"return_token_ids": True} if check else {}
            try:
                text, tail = self._text(question), self.renderer.branch_ids(question)[0]
                return await self._ask(shown, text, tail, settings | extra, read)
            except Unanswered:
                return YesNo(math.nan, 0.0)

        shown = await asyncio.to_thread(self._show, batch.image, batch.view)
        first = [await one(question, check=True) for question in batch.questions[:1]]
        return first + await _all(one(question) for question in batch.questions[1:])

    # ---- requests

    def _show(self, source: views.Picture | Path, view: str) -> Shown:
        image = views.load_image(source)[0] if isinstance(source, Path) else source
        cuts, tags, prefix = self.renderer.shown(image, view)
        parts: list[dict[str, Any]] = []
        names: list[dict[str, Any]] = []
        for tag, part in zip(tags, cuts, strict=True):
            if self.renderer.config.tags:
                parts.append({"type": "text", "text": tag})
                names.append(parts[-1])
            data = BytesIO()
            part.save(data, "PNG", compress_level=1)
            name = {"type": "image_url", "uuid": hashlib.sha256(data.getvalue()).hexdigest()}
            url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
            parts.append({**name, "image_url": {"url": url}})
            names.append({**name, "image_url": None})
        return Shown(parts, names, prefix.ids)

    def _text(self, text: str | None) -> str:
        """The text that the server makes ``branch_ids`` of; Unanswered where it would read markup."""
        tokenizer = self.captioner.tokenizer
        if text is None:
            text = tokenizer.decode(self.renderer.caption_prompt())
            ids = self.renderer.caption_prompt()
        else:
            ids = self.renderer.text_ids(text)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            raise Unanswered("the text spells a token of the chat format")
        return text

    async def _ask(
        self,
        shown: Shown,
        text: str,
        tail: list[int],
        settings: dict[str, Any],
        read: Callable[[dict[str, Any]], Any],
    ) -> Any:
        named = forgotten = False

        def body(server: Server, number: int) -> dict[str, Any]:
            nonlocal named
            named = server in shown.known and not forgotten
            content = [*(shown.names if named else shown.parts), {"type": "text", "text": text}]
            return {"messages": [{"role": "user", "content": content}], **settings}

        def checked(answer: dict[str, Any]) -> Any:
            self._compare(answer, shown.ids + tail)
            return read(answer)

        try:
            answer, shown.home = await self._servers.ask(body, checked, prefer=shown.home)
        except Rejected:
            if not named:  # by this request: others about the image may have found out before it
                raise
            forgotten = True  # as a server that was started anew has: once more with the pixels
            shown.known.clear()
            answer, shown.home = await self._servers.ask(body, checked, prefer=shown.home)
        shown.known.add(shown.home)
        return answer

    def _compare(self, answer: dict[str, Any], ids: list[int]) -> None:
        """Raise EngineError where the server made other ids of the prompt than we do."""
        theirs, used = answer.get("prompt_token_ids"), answer.get("usage")
        count = used.get("prompt_tokens") if isinstance(used, dict) else None
        if theirs is not None and not self._are_ids(theirs):
            raise Unanswered("an answer with other prompt ids than tokens")
        if count == len(ids) and theirs in (None, ids):
            return
        if type(count) is not int or count < 0:
            raise Unanswered("an answer without its usage")
        raise EngineError(
            f"the server reads a prompt of {len(ids)} tokens as {count} others",
            where=", ".join(self._servers.config.urls),
            fix="start it with `captioner serve CHECKPOINT`, which keeps the sizes of the views",
        )


async def _all(waiting: Iterable[Any]) -> list[Any]:
    """The results, in order; the first failure ends the others."""
    tasks = [asyncio.ensure_future(each) for each in waiting]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of log-probabilities of a choice, one per token."""
    logprobs = choice.get("logprobs")
    return _finite(logprobs.get("content") if isinstance(logprobs, dict) else None)


def _finite(rows: Any) -> list[dict[str, Any]]:
    """Rows with a ``logprob`` that is one; Unanswered for anything else."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Unanswered("an answer without log-probabilities")
    for row in rows:
        value = row.get("logprob")
        if type(value) not in (float, int) or not -1e9 < value < 1e-3:  # not for NaN either
            raise Unanswered("an answer whose log-probabilities are none")
    return rows


def _failed(request: CaptionRequest, k: int, seed: int, reason: str) -> Candidate:
    return Candidate(
        sample=request.sample_id,
        key=request.key,
        k=k,
        text="",
        finish_reason=f"error: {reason}",
        mean_logprob=0.0,
        tokens=0,
        seed=seed,
    )
