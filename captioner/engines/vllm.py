"""vLLM in this process: the prompt ids of the ``hf`` engine, captions and answers in batches.

Runs on the transformers that vLLM brings (4.57 or 5). :func:`settings` is what vLLM is started with, here and
by `captioner serve`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from captioner import views
from captioner.config import EngineConfig, SamplingConfig, ViewsConfig, ViewsOverride
from captioner.engines.base import CaptionRequest, QuestionBatch, YesNo
from captioner.engines.vocabulary import Vocabulary
from captioner.errors import CheckpointError, ConfigError, EngineError
from captioner.files import row_seed
from captioner.models.model import Captioner
from captioner.models.render import Renderer
from captioner.processes import guard
from captioner.records import Candidate

T = TypeVar("T")
Prompt = tuple[dict[str, Any], list[int]]  # for vLLM, and the ids that it must make of it
# What one image wants: yields requests (prompt and sampling parameters), is sent their completions, returns.
Job = Generator[list[tuple[Prompt, Any]], Any, T]
ROOM = 1024  # tokens behind the images: a question or a prompt, and the longest caption
NARROWEST_HEAD = 32  # what vLLM's attention kernels have


def settings(captioner: Captioner, renderer: Renderer, config: EngineConfig, dtype: str) -> dict[str, Any]:
    """vLLM's engine arguments for a checkpoint and its views.

    Views are shown as they are cut: the processor's limits on pixels are set so wide that none is resized.
    Raises CheckpointError for attention heads that vLLM cannot run, ConfigError for a number format.
    """
    text = captioner.model.config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head < NARROWEST_HEAD:
        raise CheckpointError(
            f"the attention heads are {head} wide; vLLM needs {NARROWEST_HEAD} or more",
            where=str(captioner.path),
            fix="use --engine.type hf",
        )
    if dtype == "float64":
        raise ConfigError("vLLM has no float64", where="model.dtype", fix="set --model.dtype float32")
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    plan = renderer.plan(1024, 1024)  # square views have the most tokens
    grid = torch.tensor([[1, part.height // renderer.patch, part.width // renderer.patch] for part in plan])
    longest = len(renderer.prefix(grid, [part.tag for part in plan]).ids) + ROOM
    return {
        "model": str(captioner.path),
        "runner": "generate",
        "dtype": dtype,
        "max_model_len": config.max_model_len or min(longest, text.max_position_embeddings),
        "max_num_seqs": config.max_num_seqs,
        "limit_mm_per_prompt": {"image": len(plan), "video": 0},
        "mm_processor_kwargs": {
            "size": {"shortest_edge": renderer.factor**2, "longest_edge": renderer.size**2}
        },
        "generation_config": "vllm",  # a request names all that decides its tokens
        "enforce_eager": not torch.cuda.is_available(),  # compiling for a CPU takes minutes
    }


@dataclass
class _Progress(Generic[T]):
    """A job under way."""

    job: Job[T]
    ids: list[list[int]] = field(default_factory=list)  # of the prompts that it waits for
    waits: list[int] = field(default_factory=list)  # the numbers of these requests
    result: list[T] = field(default_factory=list)  # one, when it is there


class VLLMEngine:
    """See :class:`captioner.engines.Engine`. ``captioner`` may be one of ``model.load_frontend``.

    ``Candidate.mean_logprob`` is over the whole vocabulary of the checkpoint. Raises EngineError where vLLM
    is not installed or reads a prompt differently.
    """

    def __init__(
        self,
        captioner: Captioner,
        views: ViewsConfig | ViewsOverride,
        config: EngineConfig,
        dtype: str = "auto",
        prompt: str | None = None,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise EngineError(
                f"vLLM is not installed here: {error}",
                fix="use --engine.type server, with `captioner serve` on --engine.vllm_python",
            ) from error
        self.captioner, self.prompt, self.batch_size = captioner, prompt, config.max_num_seqs
        self.renderer = Renderer(captioner, views)
        self._words = Vocabulary(captioner, self.renderer)
        # its processes are no copies of this one, which may train, too
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        wanted = settings(captioner, self.renderer, config, dtype)
        self._guard = guard()
        self._llm: Any = LLM(**wanted, disable_log_stats=True)
        self._done: dict[int, Any] = {}  # completions by request, until their job takes them

    def close(self) -> None:
        """End what runs the model; the next engine may need its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._guard.kill()
            self._guard.wait()
        self._llm = None

    def sample(
        self, requests: Iterable[CaptionRequest], n: int, sampling: SamplingConfig
    ) -> Iterator[list[Candidate]]:
        """``n`` captions of every image, in request order; see :class:`captioner.engines.Engine`."""
        return self._run(self._captions(request, n, sampling) for request in requests)

    def _captions(self, request: CaptionRequest, n: int, sampling: SamplingConfig) -> Job[list[Candidate]]:
        from vllm import SamplingParams

        prompt = self._prompt(request.image, "all", self.prompt)
        seeds = [row_seed(sampling.seed, request.sample_id, k) for k in range(n)]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
                logprobs=0,
                logit_bias=dict.fromkeys(self._words.never, -100.0),
                stop_token_ids=sorted(self._words.stops),
            )
            for seed in seeds
        ]
        said = yield [(prompt, each) for each in params]
        return [self._candidate(request, k, seed, said[k]) for k, seed in enumerate(seeds)]

    def _candidate(self, request: CaptionRequest, k: int, seed: int, output: Any) -> Candidate:
        ids = list(output.token_ids)
        logprobs = [row[token].logprob for row, token in zip(output.logprobs, ids, strict=True)]
        return self._words.candidate(request.sample_id, request.key, k, seed, ids, logprobs)

    def p_yes(self, requests: Iterable[QuestionBatch]) -> Iterator[list[YesNo]]:
        """One :class:`YesNo` per question, in request order; see :class:`captioner.engines.Engine`."""
        return self._run(self._answers(request) for request in requests)

    def _answers(self, request: QuestionBatch) -> Job[list[YesNo]]:
        from vllm import SamplingParams

        words, soft = self._words, self.captioner.soft_prompt_ids
        wanted = [*words.yes, *words.no, *soft]
        said = []
        # The first alone: the others then find its images in the prefix cache.
        for part in (request.questions[:1], request.questions[1:]):
            said += yield [
                (
                    self._prompt(request.image, request.view, question),
                    SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=wanted),
                )
                for question in part
            ]
        return [self._yes_no(output.logprobs[0]) for output in said]

    def _yes_no(self, row: Any) -> YesNo:
        groups = (self._words.yes, self._words.no, self.captioner.soft_prompt_ids)
        yes, no, learned = (sum(math.exp(row[token].logprob) for token in ids) for ids in groups)
        return YesNo(yes / (yes + no), (yes + no) / (1.0 - learned))  # no soft token is ever said

    def _prompt(self, source: views.Picture | Path, view: str, text: str | None) -> Prompt:
        image = views.load_image(source)[0] if isinstance(source, Path) else source
        cuts, _, prefix = self.renderer.shown(image, view)
        pad = self.renderer.image_pad_id
        # one slot per image, which vLLM widens to its tokens
        slots = [token for i, token in enumerate(prefix.ids) if token != pad or prefix.ids[i - 1] != pad]
        tail = self.renderer.branch_ids(text)[0]
        return {"prompt_token_ids": slots + tail, "multi_modal_data": {"image": cuts}}, prefix.ids + tail

    def _run(self, jobs: Iterable[Job[T]]) -> Iterator[T]:
        """The results of jobs, in order.

        vLLM has twice as many requests as it works on at once, and works in a process of its own: so it goes
        on while images are waited for and prompts are made here. Runs may be nested: what one finds of
        another's is kept for it.
        """
        under_way: deque[_Progress[T]] = deque()
        try:
            for job in jobs:
                under_way.append(_Progress(job))
                self._go_on(under_way[-1], [])
                while self._llm.llm_engine.get_num_unfinished_requests() >= 2 * self.batch_size:
                    self._step(under_way)
                while under_way and under_way[0].result:
                    yield from under_way.popleft().result
            while under_way:
                while not under_way[0].result:
                    self._step(under_way)
                yield from under_way.popleft().result
        finally:  # of a run that nobody ends
            left = {number for each in under_way if not each.result for number in each.waits}
            done = {number for number in left if self._done.pop(number, None)}
            self._llm.llm_engine.abort_request([str(number) for number in left - done])

    def _step(self, under_way: Iterable[_Progress[Any]]) -> None:
        """Go on with the jobs that have all their answers; take what vLLM has finished if there is none."""
        ready = [
            each
            for each in under_way
            if not each.result and all(number in self._done for number in each.waits)
        ]
        for each in ready:
            self._go_on(each, [self._done.pop(number) for number in each.waits])
        if not ready:  # it waits for vLLM, which another run may have emptied
            self._done.update((int(output.request_id), output) for output in self._llm.llm_engine.step())

    def _go_on(self, progress: _Progress[Any], outputs: list[Any]) -> None:
        """Send a job what it waited for, and ask vLLM what it asks next."""
        for output, ids in zip(outputs, progress.ids, strict=True):
            if list(output.prompt_token_ids) != ids:
                raise EngineError(
                    f"vLLM reads a prompt of {len(ids)} tokens as {len(output.prompt_token_ids)} others",
                    where=str(self.captioner.path),
                    fix="use --engine.type hf, and report the family and the version of vLLM",
                )
        try:
            asked = progress.job.send([output.outputs[0] for output in outputs] or None)  # None: its start
            while not asked:  # no question
                asked = progress.job.send([])
        except StopIteration as end:
            progress.result.append(end.value)
            return
        progress.ids = [ids for (_, ids), _ in asked]
        progress.waits = [self._ask(prompt, params) for (prompt, _), params in asked]

    def _ask(self, prompt: dict[str, Any], params: Any) -> int:
        """The number under which vLLM answers; what it returns may have more behind it."""
        [number] = self._llm.enqueue([prompt], [params], use_tqdm=False)
        return int(number.partition("-")[0])
