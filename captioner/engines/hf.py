"""The embedded engine: transformers on CPU, CUDA or MPS, with the images of a prompt encoded once.

All samples of an image, and all questions about it, go on from one key/value cache of its prefix. Positions
are always passed, so no state that the model keeps between calls (``rope_deltas``) is ever used.

Shapes: I images, B rows (samples or questions) of a forward pass, T tokens, D width, W vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from captioner import views
from captioner.config import EngineConfig, SamplingConfig, ViewsConfig, ViewsOverride
from captioner.engines.base import CaptionRequest, QuestionBatch, YesNo
from captioner.engines.vocabulary import Vocabulary
from captioner.errors import DataError
from captioner.files import row_seed
from captioner.models.model import Captioner
from captioner.models.render import Renderer
from captioner.records import Candidate

T = TypeVar("T")
COMPACT_BELOW = 0.75  # share of unfinished rows below which the finished ones leave the cache
IMAGES_PER_PREFIX_BATCH = 8  # images encoded together before their questions are asked


class RoomyLayer(DynamicLayer):
    """A cache layer with room for ``room`` more tokens, so that a step does not copy the whole cache."""

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        """Copies keys and values [B, heads, T, width]."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._set([_with_room(keys, room), _with_room(values, room)], keys.shape[2])

    def _set(self, buffers: list[Tensor], length: int) -> None:
        self._buffers = buffers
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._set(self._buffers, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._set([buffer[indices] for buffer in self._buffers], self.keys.shape[2])


def _with_room(states: Tensor, room: int) -> Tensor:
    b, heads, t, width = states.shape
    buffer = states.new_empty(b, heads, t + room, width)
    buffer[:, :, :t] = states
    return buffer


@dataclass(frozen=True)
class Shown:
    """What the model sees of one image."""

    patches: Tensor  # uint8 [P, 3*p*p]
    grid: Tensor  # [V, 3]
    tags: Sequence[str]  # V


@dataclass
class Prefill:
    """The cache of I prompts, padded on the right: holes between a prompt and what follows are masked out."""

    cache: DynamicCache
    mask: Tensor  # [I, T] long, 1 = a real token
    next_position: Tensor  # [I]
    last_hidden: Tensor  # [I, D] of the last real token

    def rows(self, index: Tensor, room: int) -> tuple[Cache, Tensor, Tensor]:
        """A copy of cache, mask and next_position with one row for each entry of ``index`` [B].

        ``room`` is how many tokens the rows may go on for.
        """
        layers = [RoomyLayer(layer.keys[index], layer.values[index], room) for layer in self.cache.layers]
        return Cache(layers=layers), self.mask[index], self.next_position[index]


class HFEngine:
    """See :class:`captioner.engines.Engine`. Puts the model into evaluation mode.

    ``prompt`` is asked for captions in place of the captioner's own prompt (see ``Renderer.branch_ids``).

    Raises :class:`CheckpointError` where "yes" and "no" begin with the same token.
    """

    def __init__(
        self,
        captioner: Captioner,
        views: ViewsConfig | ViewsOverride,
        config: EngineConfig,
        prompt: str | None = None,
    ):
        self.captioner, self.batch_size, self.prompt = captioner, config.max_num_seqs, prompt
        self.renderer = Renderer(captioner, views)
        self.model: Any = captioner.model.eval()
        width = self.model.get_output_embeddings().weight.shape[0]
        self._words = Vocabulary(captioner, self.renderer)
        bias = [-torch.inf if i in self._words.never else 0.0 for i in range(width)]
        self._bias = torch.tensor(bias, device=captioner.device, dtype=_wide_type(captioner.model.dtype))

    def close(self) -> None:
        """Drop the captioner; no request may follow."""
        self.model = self.captioner = self.renderer = None  # type: ignore[assignment]

    # ---- captions

    @torch.no_grad()  # not inference_mode: what the model caches meanwhile must stay usable in training
    def sample(
        self, requests: Iterable[CaptionRequest], n: int, sampling: SamplingConfig
    ) -> Iterator[list[Candidate]]:
        """``n`` captions of every image, in request order; see :class:`captioner.engines.Engine`."""
        tail = self.renderer.branch_ids(self.prompt)[0]
        # Cut as they are pulled: a batch holds the patches of its images, never the decoded images.
        cut = ((request.key, request.sample_id, self._cut(request.image)) for request in requests)
        for group in _groups(cut, max(1, self.batch_size // n)):
            prefill = self._prefill([shown for _, _, shown in group], tail)
            tasks = [
                (i, k, row_seed(sampling.seed, sample_id, k))
                for i, (_, sample_id, _) in enumerate(group)
                for k in range(n)
            ]
            captions = []
            for chunk in _groups(tasks, self.batch_size):
                index = torch.tensor([i for i, _, _ in chunk], device=self.captioner.device)
                captions += self._decode(prefill, index, [seed for _, _, seed in chunk], sampling)
            candidates = [
                self._words.candidate(group[i][1], group[i][0], k, seed, tokens, logprobs)
                for (i, k, seed), (tokens, logprobs) in zip(tasks, captions, strict=True)
            ]
            yield from (candidates[at : at + n] for at in range(0, len(candidates), n))

    def _decode(
        self, prefill: Prefill, index: Tensor, seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens (with the end token) and their log-probabilities for each row of ``index`` [B].

        The numbers that a row draws are fixed by its seed before the first token, so its samples depend on
        its own seed and logits only. Log-probabilities: temperature 1, among the tokens that may be said.
        """
        cache, mask, position = prefill.rows(index, sampling.max_tokens)
        hidden = prefill.last_hidden[index]
        uniforms = _uniforms(seeds, sampling, index.device)
        stops = torch.tensor(sorted(self._words.stops), device=index.device)
        one = mask.new_ones(1, 1)
        alive = torch.arange(len(seeds), device=index.device)  # the result each row of the cache belongs to
        open_ = torch.ones_like(alive, dtype=torch.bool)  # rows of the cache that have not ended
        said = torch.zeros(len(seeds), sampling.max_tokens, dtype=torch.long, device=index.device)
        logprobs = torch.zeros(said.shape, dtype=self._bias.dtype, device=index.device)
        lengths = torch.full((len(seeds),), sampling.max_tokens, device=index.device)
        for step in range(sampling.max_tokens):
            scores = self.model.lm_head(hidden) + self._bias  # [B, W]
            token = pick(scores, uniforms[alive, step], sampling)
            said[alive, step] = token
            logprobs[alive, step] = scores.log_softmax(-1).gather(1, token[:, None])[:, 0]
            ended = open_ & torch.isin(token, stops)
            lengths[alive[ended]] = step + 1
            open_ = open_ & ~ended
            left = int(open_.sum())
            if left == 0 or step + 1 == sampling.max_tokens:
                break
            if left < COMPACT_BELOW * len(open_):
                keep = open_.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                mask, position, alive, token, open_ = (x[keep] for x in (mask, position, alive, token, open_))
            mask = torch.cat([mask, one.expand(len(mask), 1)], dim=1)
            hidden = self._step(token[:, None], mask, position[:, None], cache)[:, -1]
            position = position + 1
        ends = lengths.tolist()
        rows = zip(said.tolist(), logprobs.tolist(), ends, strict=True)
        return [(tokens[:end], values[:end]) for tokens, values, end in rows]

    # ---- questions

    @torch.no_grad()  # not inference_mode: what the model caches meanwhile must stay usable in training
    def p_yes(self, requests: Iterable[QuestionBatch]) -> Iterator[list[YesNo]]:
        """One :class:`YesNo` per question, in request order; see :class:`captioner.engines.Engine`."""
        cut = ((request.questions, self._cut(request.image, request.view)) for request in requests)
        for group in _groups(cut, IMAGES_PER_PREFIX_BATCH):
            prefill = self._prefill([shown for _, shown in group], [])
            ids = [self.renderer.branch_ids(q)[0] for questions, _ in group for q in questions]
            owner = [i for i, (questions, _) in enumerate(group) for _ in questions]
            answers = iter(self._ask(prefill, ids, owner))
            yield from (list(itertools.islice(answers, len(questions))) for questions, _ in group)

    def _ask(self, prefill: Prefill, ids: list[list[int]], owner: list[int]) -> list[YesNo]:
        """Answers of the questions ``ids`` about images ``owner``; questions of one length go together."""
        answers: list[YesNo | None] = [None] * len(ids)
        for chunk in _groups(sorted(range(len(ids)), key=lambda q: len(ids[q])), self.batch_size):
            device = self.captioner.device
            tokens, real = _right_pad([ids[q] for q in chunk], self.renderer.end_id, device)
            cache, mask, position = prefill.rows(
                torch.tensor([owner[q] for q in chunk], device=device), tokens.shape[1]
            )
            positions = position[:, None] + torch.arange(tokens.shape[1], device=device)
            hidden = self._step(tokens, torch.cat([mask, real], dim=1), positions, cache)
            scores = self.model.lm_head(_at(hidden, real.sum(1) - 1)).to(self._bias.dtype)  # [B, W]
            yes, no = scores[:, self._words.yes].logsumexp(1), scores[:, self._words.no].logsumexp(1)
            p = torch.sigmoid(yes - no).tolist()
            mass = (torch.logaddexp(yes, no) - scores.logsumexp(1)).exp().tolist()
            for q, p_yes, label_mass in zip(chunk, p, mass, strict=True):
                answers[q] = YesNo(p_yes, label_mass)
        return [answer for answer in answers if answer is not None]

    # ---- forward passes

    def _cut(self, image: views.Picture | Path, view: str = "all") -> Shown:
        """The patches of an image: of all its views, or of the one of that tag."""
        decoded = views.load_image(image)[0] if isinstance(image, Path) else image
        part = self.renderer.patches_batch([decoded])[0]
        tags = self.renderer.tags()
        return Shown(*part, tags) if view == "all" else _one_view(part, tags, view)

    def _prefill(self, shown: Sequence[Shown], tail: list[int]) -> Prefill:
        """Encode images and ``tail`` behind each of them."""
        device, renderer = self.captioner.device, self.renderer
        prefixes = [renderer.prefix(each.grid, each.tags) for each in shown]
        tokens, mask = _right_pad([prefix.ids + tail for prefix in prefixes], renderer.end_id, device)
        positions = torch.zeros(3, *tokens.shape, dtype=torch.long)
        for i, prefix in enumerate(prefixes):
            end = len(prefix.ids)
            positions[:, i, :end] = prefix.positions
            positions[:, i, end : end + len(tail)] = prefix.next_position + torch.arange(len(tail))
        cache = DynamicCache()
        hidden = self.model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions.to(device),
            past_key_values=cache,
            pixel_values=renderer.pixels([each.patches for each in shown]).to(device),
            image_grid_thw=torch.cat([each.grid for each in shown]).to(device),
            use_cache=True,
        )[0]
        following = torch.tensor([prefix.next_position + len(tail) for prefix in prefixes], device=device)
        return Prefill(cache, mask, following, _at(hidden, mask.sum(1) - 1))

    def _step(self, tokens: Tensor, mask: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Text ``tokens`` [B, T] behind a cache -> hidden states [B, T, D]; position [B, T] for all axes."""
        return self.model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position.expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        )[0]


def pick(scores: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """One token for each row of scores [B, W] by inverse CDF at uniforms [B] in [0, 1).

    Argmax at temperature 0. ``top_p`` keeps the smallest set of most likely tokens with that mass
    (nucleus sampling, Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return scores.argmax(-1)
    # Double precision: rounding in a long cumulative sum would let the batch move a draw across a border.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    probabilities = (scores.to(exact) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
    cdf = probabilities.cumsum(-1)
    total = cdf[:, -1:]
    # Below the total, so that rounding never picks a token behind the last one that has any probability.
    at = torch.minimum(uniforms[:, None].to(exact) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, at, right=True)[:, 0]


def _uniforms(seeds: Sequence[int], sampling: SamplingConfig, device: torch.device) -> Tensor:
    """[B, max_tokens] numbers in [0, 1), each row from a generator of its own."""
    if sampling.temperature == 0:
        return torch.zeros(len(seeds), sampling.max_tokens, device=device)
    rows = [torch.rand(sampling.max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def _one_view(part: tuple[Tensor, Tensor], tags: Sequence[str], view: str) -> Shown:
    """The patches, grid and tag of the one view of that name."""
    if view not in tags:
        known = ", ".join(tags)
        raise DataError(f"there is no view {view!r}", where="view of a question", fix=f"use one of: {known}")
    patches, grid = part
    at = list(tags).index(view)
    start = int(grid[:at].prod(1).sum())
    return Shown(patches[start : start + int(grid[at].prod())], grid[at : at + 1], (view,))


def _right_pad(rows: Sequence[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask, long, 1 = a real token."""
    longest = max(map(len, rows))
    tokens = [row + [value] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden [B, T, D] at one token per row -> [B, D]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what scores are worked with in."""
    return torch.promote_types(dtype, torch.float32)


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to ``size`` items, in order."""
    rest = iter(items)
    while group := list(itertools.islice(rest, size)):
        yield group
