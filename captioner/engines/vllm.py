"""vLLM in this process: the prompt ids of the ``hf`` engine, captions and answers in batches.

Runs on the transformers that vLLM brings (4.57 or 5). :func:`settings` is what vLLM is started with, here and
by `captioner serve`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from captioner import views
from captioner.config import EngineConfig, SamplingConfig, ViewsConfig, ViewsOverride
from captioner.engines.base import CaptionRequest, QuestionBatch, YesNo
from captioner.engines.vocabulary import Vocabulary
from captioner.errors import CheckpointError, ConfigError, EngineError
from captioner.model import Captioner
from captioner.records import Candidate
from captioner.render import Renderer
from captioner.runs import row_seed

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
            mend="use --engine.type hf",
        )
    if dtype == "float64":
        raise ConfigError("vLLM has no float64", where="model.dtype", mend="set --model.dtype float32")
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
        "max_num_seqs": config.batch_size,
        "limit_mm_per_prompt": {"image": len(plan), "video": 0},
        "mm_processor_kwargs": {
            "size": {"shortest_edge": renderer.factor**2, "longest_edge": renderer.size**2}
        },
        "generation_config": "vllm",  # a request names all that decides its tokens
        "enforce_eager": not torch.cuda.is_available(),  # compiling for a CPU takes minutes
    }


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
                mend="use --engine.type server, with `captioner serve` on --engine.vllm_python",
            ) from error
        self.captioner, self.prompt, self.batch_size = captioner, prompt, config.batch_size
        self.renderer = Renderer(captioner, views)
        self._words = Vocabulary(captioner, self.renderer)
        self._llm: Any = LLM(**settings(captioner, self.renderer, config, dtype), disable_log_stats=True)

    def close(self) -> None:
        """Drop the model."""
        self._llm = None

    def sample(
        self, requests: Iterable[CaptionRequest], n: int, sampling: SamplingConfig
    ) -> Iterator[list[Candidate]]:
        """``n`` captions of every image, in request order; see :class:`captioner.engines.Engine`."""
        from vllm import SamplingParams

        bias = {token: -100.0 for token in self._words.never}
        prompts = ((request, self._prompt(request.image, "all", self.prompt)) for request in requests)
        while group := list(itertools.islice(prompts, max(1, 4 * self.batch_size // n))):
            seeds = [row_seed(sampling.seed, request.sample_id, k) for request, _ in group for k in range(n)]
            params = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=seed,
                    logprobs=0,
                    logit_bias=bias,
                    stop_token_ids=sorted(self._words.stops),
                )
                for seed in seeds
            ]
            said = self._run([prompt for _, prompt in group for _ in range(n)], params)
            rows = [
                self._candidate(group[i // n][0], i % n, seed, output)
                for i, (seed, output) in enumerate(zip(seeds, said, strict=True))
            ]
            yield from (rows[at : at + n] for at in range(0, len(rows), n))

    def _candidate(self, request: CaptionRequest, k: int, seed: int, output: Any) -> Candidate:
        ids = list(output.token_ids)
        logprobs = [row[token].logprob for row, token in zip(output.logprobs, ids, strict=True)]
        return self._words.candidate(request.sample_id, request.key, k, seed, ids, logprobs)

    def p_yes(self, requests: Iterable[QuestionBatch]) -> Iterator[list[YesNo]]:
        """One :class:`YesNo` per question, in request order; see :class:`captioner.engines.Engine`."""
        from vllm import SamplingParams

        words, soft = self._words, self.captioner.soft_prompt_ids
        params = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=[*words.yes, *words.no, *soft]
        )
        for request in requests:
            # The first alone: the others then find its images in the prefix cache.
            first, rest = request.questions[:1], request.questions[1:]
            said = []
            for part in (first, rest):
                prompts = [self._prompt(request.image, request.view, question) for question in part]
                said += self._run(prompts, [params] * len(part))
            yield [self._yes_no(output.logprobs[0]) for output in said]

    def _yes_no(self, row: Any) -> YesNo:
        groups = (self._words.yes, self._words.no, self.captioner.soft_prompt_ids)
        yes, no, learned = (sum(math.exp(row[token].logprob) for token in ids) for ids in groups)
        return YesNo(yes / (yes + no), (yes + no) / (1.0 - learned))  # no soft token is ever said

    def _prompt(
        self, source: views.Picture | Path, view: str, text: str | None
    ) -> tuple[dict[str, Any], list[int]]:
        """A prompt for vLLM, and the ids that it must make of it."""
        image = views.load_image(source)[0] if isinstance(source, Path) else source
        cuts, _, prefix = self.renderer.shown(image, view)
        pad = self.renderer.image_pad_id
        # one slot per image, which vLLM widens to its tokens
        slots = [token for i, token in enumerate(prefix.ids) if token != pad or prefix.ids[i - 1] != pad]
        tail = self.renderer.branch_ids(text)[0]
        return {"prompt_token_ids": slots + tail, "multi_modal_data": {"image": cuts}}, prefix.ids + tail

    def _run(self, prompts: list[tuple[dict[str, Any], list[int]]], params: list[Any]) -> list[Any]:
        """The first completion of every prompt."""
        if not prompts:
            return []
        outputs = self._llm.generate([prompt for prompt, _ in prompts], params, use_tqdm=False)
        for output, (_, ids) in zip(outputs, prompts, strict=True):
            if list(output.prompt_token_ids) != ids:
                raise EngineError(
                    f"vLLM reads a prompt of {len(ids)} tokens as {len(output.prompt_token_ids)} others",
                    where=str(self.captioner.path),
                    mend="use --engine.type hf, and report the family and the version of vLLM",
                )
        return [output.outputs[0] for output in outputs]
