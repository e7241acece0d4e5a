"""Image + views + prompt (+ answer) -> token ids, loss mask, image slots.

The only place that knows the chat format. A rendered sequence is one *prefix* (all views of the image, each
with its tag) and one or more *branches* (a prompt, the turn of the assistant, perhaps its answer). Images
come first, so that all branches of an image share its prefix.

Shapes: B batch, V views, P patches (before merging), C values of a patch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from captioner import prompts, views
from captioner.config import ViewsConfig, ViewsOverride
from captioner.errors import CheckpointError, DataError
from captioner.models.model import Captioner
from captioner.models.vision import Normaliser

IGNORED = -100  # label of a token that carries no loss
VISION = "<|vision_start|><|image_pad|><|vision_end|>"  # what the family's chat templates write for an image


@dataclass(frozen=True)
class Prefix:
    """Everything up to and including the last image."""

    ids: list[int]  # T
    positions: Tensor  # [3, T] long: temporal, height and width index of multimodal RoPE
    next_position: int  # where every branch goes on, on all three axes


@dataclass
class Prompt:
    """One image and what follows it, rendered for the model."""

    prefix: Prefix
    branch: list[int]
    pixel_values: Tensor  # [P, C]
    image_grid_thw: Tensor  # [V, 3]

    @property
    def input_ids(self) -> list[int]:
        return self.prefix.ids + self.branch

    @property
    def position_ids(self) -> Tensor:
        """[3, T] long"""
        return torch.cat(
            [self.prefix.positions, _text_positions(self.prefix.next_position, len(self.branch))], 1
        )


@dataclass
class TrainRow:
    """One image and what is learned about it. ``pixel_values``: float [P, C], or uint8 patches [P, 3*p*p]."""

    pixel_values: Tensor
    grid: Tensor  # [V, 3]
    whole_only: bool
    branches: list[tuple[list[int], list[bool]]]  # ids and loss mask, as branch_ids gives them


class Renderer:
    """Renders images and text for one captioner.

    The markup around user and assistant turns is read off the checkpoint's own chat template, so the ids
    equal ``processor.apply_chat_template`` on the same messages. Text of captions and questions never becomes
    markup: a caption that spells ``<|im_end|>`` is tokenised as those characters.

    Raises :class:`CheckpointError` for a chat template that is not one of the Qwen-VL family.
    """

    def __init__(self, captioner: Captioner, config: ViewsConfig | ViewsOverride):
        self.captioner = captioner
        self.config = config.over(captioner.views) if isinstance(config, ViewsOverride) else config
        images = captioner.processor.image_processor
        self.patch, self.merge, self.frames = images.patch_size, images.merge_size, images.temporal_patch_size
        self.factor = self.patch * self.merge
        self.size = self.config.size or captioner.view_size
        self._normaliser = Normaliser(images)
        self._read_template()
        self._tags = {w: tuple(v.tag for v in self.plan(1024, 1024, w)) for w in (False, True)}
        self._prefixes: dict[tuple[Any, ...], Prefix] = {}

    def _read_template(self) -> None:
        """Split the chat template at its slots: head IMAGE user-text turn assistant-text end."""
        user, assistant = "USERTEXT", "ASSISTANTTEXT"
        content = [{"type": "image"}, {"type": "text", "text": user}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": assistant}]},
        ]
        try:  # in a sandbox: a template comes from outside
            text = self.captioner.processor.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
        head, image, rest = text.partition(VISION)
        before, _, rest = rest.partition(user)
        turn, _, after = rest.partition(assistant)
        end = self.captioner.tokenizer.convert_tokens_to_ids("<|im_end|>")
        if not image or before or not turn or not after.startswith("<|im_end|>") or end is None:
            raise CheckpointError(
                f"the chat template does not have the form of the Qwen-VL family: {text[:200]!r}",
                where=str(self.captioner.path),
                fix="use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL instruct checkpoint with its own chat template",
            )
        self.end_id: int = end
        self._head, self._turn = self._markup(head), self._markup(turn)
        start, self.image_pad_id, stop = self._markup(VISION)
        self._vision = (start, stop)

    def _markup(self, text: str) -> list[int]:
        return self.captioner.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens spelled in it stay ordinary characters."""
        tokenizer = self.captioner.tokenizer
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    # ---- images

    def plan(self, width: int, height: int, whole_only: bool = False) -> list[views.View]:
        """The views of an image of that size, pixels."""
        return views.plan(
            width, height, self.config, size=self.size, factor=self.factor, whole_only=whole_only
        )

    @property
    def spec(self) -> views.ViewSpec:
        """What another process needs to cut the same views."""
        return views.ViewSpec(self.config, self.size, self.factor)

    def patches_batch(
        self, images: Sequence[views.Picture], whole_only: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Per image its patches, uint8 [P, 3*p*p] in the processor's order, and its grid, long [V, 3].

        uint8 patches are an eighth of the model's ``pixel_values``; :meth:`normalise` or :func:`collate`
        makes them into those. Views of one size are cut to patches in one operation.
        """
        cuts = [views.cut(image, self.plan(*image.size, whole_only)) for image in images]
        by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, parts in enumerate(cuts):
            for v, part in enumerate(parts):
                by_size.setdefault(part.size, []).append((i, v))
        patches: list[list[Tensor]] = [[torch.empty(0)] * len(parts) for parts in cuts]
        for members in by_size.values():
            pixels = np.stack([np.asarray(cuts[i][v], dtype=np.uint8) for i, v in members])
            for (i, v), part in zip(members, self._patchify(pixels), strict=True):
                patches[i][v] = part
        grids = [[[1, p.height // self.patch, p.width // self.patch] for p in parts] for parts in cuts]
        return [(torch.cat(p), torch.tensor(g)) for p, g in zip(patches, grids, strict=True)]

    def _patchify(self, pixels: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] -> uint8 [N, H*W/p^2, 3*p*p]; patches that merge into one token adjoin."""
        n, height, width, _ = pixels.shape
        p, m = self.patch, self.merge
        x = torch.from_numpy(pixels).view(n, height // (p * m), m, p, width // (p * m), m, p, 3)
        return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, (height // p) * (width // p), 3 * p * p)

    def normalise(self, patches: Tensor) -> Tensor:
        """uint8 patches [P, 3*p*p] -> pixel_values, float32 [P, C]; float input is returned as it is."""
        if patches.dtype != torch.uint8:
            return patches
        return self._normaliser(patches)

    def pixels(self, parts: Sequence[Tensor]) -> Tensor:
        """What the model is fed: raw patches as they are where all are (it normalises them on its device)."""
        raw = self.frames > 1 and all(part.dtype == torch.uint8 for part in parts)
        return torch.cat(list(parts) if raw else [self.normalise(part) for part in parts])

    def images_batch(
        self, images: Sequence[Image.Image], whole_only: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Per image (pixel_values float32 [P, C], image_grid_thw long [V, 3]), as the image processor's."""
        return [(self.normalise(p), grid) for p, grid in self.patches_batch(images, whole_only)]

    def images(self, image: Image.Image, whole_only: bool = False) -> tuple[Tensor, Tensor]:
        """:meth:`images_batch` for one image."""
        return self.images_batch([image], whole_only)[0]

    def shown(
        self, image: views.Picture, view: str = "all"
    ) -> tuple[list[Image.Image], tuple[str, ...], Prefix]:
        """The views of an image, their tags and their prefix, for engines that make patches themselves.

        ``view`` names one view to show alone; DataError where there is none of that name.
        """
        plan = self.plan(*image.size)
        if view != "all":
            plan = [part for part in plan if part.tag == view]
        if not plan:
            known = ", ".join(self.tags())
            raise DataError(
                f"there is no view {view!r}", where="view of a question", fix=f"use one of: {known}"
            )
        grid = torch.tensor([[1, part.height // self.patch, part.width // self.patch] for part in plan])
        tags = tuple(part.tag for part in plan)
        return views.cut(image, plan), tags, self.prefix(grid, tags)

    # ---- token ids

    def tags(self, whole_only: bool = False) -> tuple[str, ...]:
        """The names of the views, in prompt order."""
        return self._tags[whole_only]

    def prefix(self, grid: Tensor, tags: Sequence[str]) -> Prefix:
        """The prefix of an image whose views have that grid [V, 3] and those tags (cached)."""
        key = (tuple(tags), tuple(grid.flatten().tolist()))
        if key not in self._prefixes:
            if len(tags) != len(grid):
                raise DataError(
                    f"{len(grid)} views were rendered where the settings have {len(tags)}",
                    where="views.levels, views.center",
                    fix="render images and prompts with the same views settings",
                )
            self._prefixes[key] = self._make_prefix(grid.tolist(), tags)
        return self._prefixes[key]

    def _make_prefix(self, grid: list[list[int]], tags: Sequence[str]) -> Prefix:
        ids, positions, at = list(self._head), [_text_positions(0, len(self._head))], len(self._head)
        for (t, h, w), tag in zip(grid, tags, strict=True):
            rows, columns = h // self.merge, w // self.merge
            before = (self.text_ids(tag) if self.config.tags else []) + [self._vision[0]]
            ids += before + [self.image_pad_id] * (t * rows * columns) + [self._vision[1]]
            positions.append(_text_positions(at, len(before)))
            at += len(before)
            # Multimodal RoPE: an image occupies a box of positions; text behind it moves by its longest side.
            box = torch.meshgrid(torch.arange(t), torch.arange(rows), torch.arange(columns), indexing="ij")
            positions.append(torch.stack(box).reshape(3, -1) + at)
            at += max(t, rows, columns)
            positions.append(_text_positions(at, 1))
            at += 1
        return Prefix(ids, torch.cat(positions, dim=1), at)

    def prefix_ids(self, grid_thw: Tensor, whole_only: bool = False) -> list[int]:
        """Ids of everything up to and including the last image."""
        return self.prefix(grid_thw, self.tags(whole_only)).ids

    def branch_ids(
        self, text: str | None, answer: str | None = None, silent: tuple[tuple[int, int], ...] = ()
    ) -> tuple[list[int], list[bool]]:
        """Ids behind the images and their loss mask: true on the tokens of the answer and its end token.

        ``text`` None is the caption prompt: the learned soft prompt if the captioner has one, else
        ``prompts/caption.md``. ``answer`` None leaves the turn of the assistant open, for sampling. Tokens of
        the answer's characters ``silent``, as (start, stop), are read and not learned.
        """
        ids = (self.caption_prompt() if text is None else self.text_ids(text)) + self._turn
        mask = [False] * len(ids)
        if answer is not None:
            said = [*self.text_ids(answer), self.end_id]
            learned = [True] * len(said)
            if silent and answer:
                encoded = self.captioner.tokenizer(
                    answer, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
                )
                for token, (start, stop) in enumerate(encoded["offset_mapping"]):
                    learned[token] = not any(start < end and begin < stop for begin, end in silent)
            ids, mask = ids + said, mask + learned
        return ids, mask

    def caption_prompt(self) -> list[int]:
        """Ids of the soft prompt, or of ``prompts/caption.md`` where there is none."""
        return list(self.captioner.soft_prompt_ids) or self.text_ids(prompts.load("caption"))

    def prompt(self, image: Image.Image, text: str | None = None, whole_only: bool = False) -> Prompt:
        """An image and an open prompt."""
        pixel_values, grid = self.images(image, whole_only)
        return Prompt(self.prefix(grid, self.tags(whole_only)), self.branch_ids(text)[0], pixel_values, grid)


def _text_positions(start: int, count: int) -> Tensor:
    """[3, count]: text advances on all three axes together."""
    return torch.arange(start, start + count).expand(3, -1)


def collate(renderer: Renderer, rows: Sequence[TrainRow]) -> dict[str, Tensor]:
    """Training rows -> the model's arguments; the branches of an image share its prefix in one sequence.

    Returns input_ids [B, T], labels [B, T] (-100 outside answers), position_ids [3, B, T],
    pixel_values [P, C] or raw patches, image_grid_thw [V, 3] and attention_mask: with one branch in every row
    the usual [B, T]; else bool [B, 1, T, T] in which a branch sees the prefix and itself (for ``sdpa``
    attention). Each branch's positions go on right behind the prefix, so its logits are those of a sequence
    of its own. Padded on the right.
    """
    ids, labels, positions, segments = zip(*(_lay_out(renderer, row) for row in rows), strict=True)
    pad = renderer.captioner.tokenizer.pad_token_id
    input_ids = _pad(ids, renderer.end_id if pad is None else pad)
    segment = _pad(segments, -1)  # [B, T]: 0 prefix, j the j-th branch, -1 padding
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    for b, row_positions in enumerate(positions):
        position_ids[:, b, : row_positions.shape[1]] = row_positions
    if all(len(row.branches) == 1 for row in rows):
        attention_mask = (segment >= 0).long()
    else:
        # Padding sees the prefix and other padding: nothing reads it, and no row of the mask is empty (NaN).
        inside = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        attention_mask = inside.tril().unsqueeze(1)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": _pad(labels, IGNORED),
        "pixel_values": renderer.pixels([row.pixel_values for row in rows]),
        "image_grid_thw": torch.cat([row.grid for row in rows]),
    }


def _lay_out(renderer: Renderer, row: TrainRow) -> tuple[list[int], list[int], Tensor, list[int]]:
    """ids, labels, positions [3, T] and segments of one row."""
    prefix = renderer.prefix(row.grid, renderer.tags(row.whole_only))
    ids, labels, segments = list(prefix.ids), [IGNORED] * len(prefix.ids), [0] * len(prefix.ids)
    positions = [prefix.positions]
    for number, (branch, mask) in enumerate(row.branches, 1):
        ids += branch
        labels += [token if on else IGNORED for token, on in zip(branch, mask, strict=True)]
        segments += [number] * len(branch)
        positions.append(_text_positions(prefix.next_position, len(branch)))
    return ids, labels, torch.cat(positions, dim=1), segments


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
