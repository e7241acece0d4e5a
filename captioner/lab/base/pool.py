"""Scenes drawn once for training: their views as patches, and what every patch shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captioner.lab.scenes.judging import stream_of
from captioner.lab.scenes.pictures import draw_owned
from captioner.lab.scenes.things import Scene, sample
from captioner.models.render import Renderer

NOT_HERE = -1
LEAST_SHARE = (0.12, 0.2)  # of a patch that a thing, a sticker covers where the patch is said to show it
VIEWS = 6
PATCHES = 36  # of a view


@dataclass
class Pool:
    """``patches``: uint8 [n, views, patches, 3*p*p]. ``shown``: int8 [n, 2, views, patches], the number of
    the thing, and of the sticker's thing, in each patch, or ``NOT_HERE``; None where nobody asked.
    """

    split: str
    scenes: list[Scene]
    indices: list[int]  # of the scenes in their split: wording is drawn from them
    patches: Tensor
    shown: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scenes)


def draw_pool(
    renderer: Renderer, split: str, count: int, *, offset: int = 0, seed: int = 0, labels: bool = False
) -> Pool:
    """``count`` scenes of a split from number ``offset`` on, drawn and cut."""
    indices = list(range(offset, offset + count))
    scenes = [sample(split, index, seed) for index in indices]
    patches: Tensor | None = None
    shown = np.full((count, 2, VIEWS, PATCHES), NOT_HERE, np.int8) if labels else None
    for i, (index, scene) in enumerate(zip(indices, scenes, strict=True)):
        image, owners = draw_owned(scene, stream_of(split, index, seed))
        cut, grid = renderer.patches_batch([image])[0]
        if patches is None:
            patches = torch.empty(count, len(grid), len(cut) // len(grid), cut.shape[1], dtype=torch.uint8)
        patches[i] = cut.view(patches.shape[1:])
        if shown is not None:
            for v, view in enumerate(renderer.plan(*image.size)):
                left, top, right, bottom = view.box
                for o, (owner, share) in enumerate(zip(owners, LEAST_SHARE, strict=True)):
                    shown[i, o, v] = _majority(owner[top:bottom, left:right], len(scene.things), share)
    assert patches is not None
    return Pool(split, scenes, indices, patches, shown)


def _majority(owner: np.ndarray, things: int, share: float) -> np.ndarray:
    """Of each patch the thing that covers most of it, if it covers at least ``share``: int8 [patches]."""
    side = int(PATCHES**0.5)
    k = len(owner) // side
    cells = owner.reshape(side, k, side, k).transpose(0, 2, 1, 3).reshape(PATCHES, k * k)
    counts = np.stack([(cells == number).sum(1) for number in range(things)])
    best = counts.argmax(0)
    return np.where(counts.max(0) >= share * k * k, best, NOT_HERE).astype(np.int8)
