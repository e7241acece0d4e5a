"""The encoder's pre-training: every patch is told apart by the words of the language model's embedding.

A patch is classified against the tied word embeddings: which noun, which size, which sticker, which
background, whether there are two of it. Stickers are never asked for in whole views, so that the encoder
does not learn to read them there. What whole captions would teach from scratch in hours comes in minutes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from captioner.lab.base.pool import NOT_HERE, PATCHES, Pool
from captioner.lab.scenes.language import NOUN_OF_PLURAL
from captioner.lab.scenes.things import BACKGROUNDS, NOUNS, SIZES, STICKERS, plural
from captioner.models.model import Captioner
from captioner.models.render import Renderer

WHOLE_SHARE = 0.35  # of the views in a batch
DECAY_FROM = 0.6  # of the steps: the learning rate falls from here on
TWIN_NORM = 0.5  # of the step between a word and its plural, or its form at the start of a text
WORDS = {
    "noun": (*NOUNS, "nothing"),
    "size": SIZES,
    "sticker": (*STICKERS, "none"),
    "background": BACKGROUNDS,
    "count": ("one", "two"),
}
LOSS_WEIGHT = {"noun": 1.0, "size": 0.3, "sticker": 2.0, "background": 0.3, "count": 0.5}
NOTHING_WEIGHT = {"noun": 0.15, "sticker": 0.1}  # of the patches without one: they are many


@dataclass(frozen=True)
class DenseConfig:
    steps: int = 2600
    views: int = 48
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    carried: bool = False  # ask every patch of a thing for the sticker that the view shows on it
    words: bool = True  # train the word embeddings too


def encode(captioner: Captioner, renderer: Renderer, patches: Tensor) -> Tensor:
    """uint8 patches [N, P, 3*p*p] of N views -> what the language model sees of them, float32 [N, P, D]."""
    side = int(patches.shape[1] ** 0.5)
    grid = torch.tensor([[1, side, side]]).expand(len(patches), 3)
    pixels = renderer.normalise(patches.flatten(0, 1))
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast("cpu", torch.bfloat16),
    ):  # the fastest for so few patches
        out: Any = captioner.visual(pixels, grid)
    features = out[0] if isinstance(out, tuple) else out.pooler_output  # transformers 4.57, 5
    return features.float().view(len(patches), patches.shape[1], -1)


def labels(pool: Pool, carried: bool = False) -> dict[str, Tensor]:
    """The right word's number for each patch, long [n, V, P] (background [n]); ``NOT_HERE``: none."""
    assert pool.shown is not None
    stuck = _carried(pool.shown) if carried else pool.shown[:, 1]
    table: dict[str, np.ndarray] = {}
    widest = max(len(scene.things) for scene in pool.scenes)
    for kind in ("noun", "size", "sticker", "count"):
        table[kind] = np.full((len(pool), widest + 1), NOT_HERE, np.int64)  # the last column: of nobody
    for i, scene in enumerate(pool.scenes):
        counts = scene.counts()
        for j, thing in enumerate(scene.things):
            table["noun"][i, j] = NOUNS.index(thing.noun)
            table["size"][i, j] = SIZES.index(thing.size)
            table["count"][i, j] = counts[thing.noun] - 1
            table["sticker"][i, j] = STICKERS.index(thing.sticker) if thing.sticker else NOT_HERE
    found = {}
    for kind, values in table.items():
        shown = (stuck if kind == "sticker" else pool.shown[:, 0]).astype(np.int64)
        found[kind] = torch.from_numpy(
            np.take_along_axis(values[:, None], shown.reshape(len(pool), 1, -1), 2).reshape(shown.shape)
        )
    found["background"] = torch.tensor([BACKGROUNDS.index(scene.background) for scene in pool.scenes])
    return found


def _carried(shown: np.ndarray) -> np.ndarray:
    """Whose sticker each patch is asked for, int8 [n, V, P]: its own thing's too, where the view shows it."""
    thing, sticker = shown[:, 0], shown[:, 1]
    visible = (thing[..., :, None] == sticker[..., None, :]).any(-1)
    return np.where((sticker == NOT_HERE) & visible, thing, sticker)


class Reader(nn.Module):
    """Logits of each kind's words for features, against the word embeddings; and a head for places."""

    def __init__(self, captioner: Captioner):
        super().__init__()
        self.embedding = captioner.model.get_input_embeddings()
        tokens = captioner.tokenizer
        self.ids = {
            kind: torch.tensor([tokens.convert_tokens_to_ids(f"Ġ{word}") for word in words])
            for kind, words in WORDS.items()
        }
        self.place = nn.Linear(self.embedding.embedding_dim, 2 * int(PATCHES**0.5))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        weight = self.embedding.weight
        return {kind: features @ weight[ids].T for kind, ids in self.ids.items()}


def loss_of(reader: Reader, features: Tensor, right: dict[str, Tensor], whole: Tensor) -> Tensor:
    """Mean loss of features [N, P, D] with these views' labels; ``whole`` [N]: which are whole views."""
    logits = reader(features)
    total = features.new_zeros(())
    for kind, weight in LOSS_WEIGHT.items():
        target, scores = right[kind], logits[kind]
        if kind == "background":
            target = target[:, None].expand(-1, scores.shape[1])
        elif kind in NOTHING_WEIGHT:
            target = torch.where(target == NOT_HERE, scores.shape[-1] - 1, target)
        if kind in ("sticker", "count"):  # stickers in crops alone, twins where both can be seen
            rows = whole if kind == "count" else ~whole
            target, scores = target[rows], scores[rows]
        balance = torch.ones(scores.shape[-1])
        balance[-1] = NOTHING_WEIGHT.get(kind, 1.0)
        here = target != NOT_HERE
        if not here.any():  # whole views alone, say: the mean over nothing is no number
            continue
        total = total + weight * F.cross_entropy(scores[here], target[here], weight=balance)
    side = int(PATCHES**0.5)
    cells = torch.arange(PATCHES).repeat(len(features))
    rows_, columns = reader.place(features).flatten(0, 1).split(side, -1)
    return total + 0.2 * (F.cross_entropy(rows_, cells // side) + F.cross_entropy(columns, cells % side))


def rate(step: int, steps: int, warm_up: int = 60, decay_from: float = DECAY_FROM) -> float:
    """Share of the learning rate at a step: a warm-up, a plateau, a straight fall to 3 %."""
    done = step / steps
    return min(1.0, (step + 1) / warm_up) * (
        1 if done < decay_from else max(0.03, (1 - done) / (1 - decay_from))
    )


def train(
    captioner: Captioner, renderer: Renderer, pool: Pool, test: Pool, config: DenseConfig, seed: int
) -> None:
    """Train encoder and word embeddings in place."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    reader, right = Reader(captioner), labels(pool, config.carried)
    parameters = [*captioner.visual.parameters(), *reader.place.parameters()]
    if config.words:
        parameters.append(reader.embedding.weight)
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    captioner.model.train()
    start = time.process_time()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(step, config.steps)
        which = torch.from_numpy(rng.integers(0, len(pool), config.views))
        whole = torch.from_numpy(rng.random(config.views) < WHOLE_SHARE)
        view = torch.where(whole, 0, torch.from_numpy(rng.integers(1, pool.patches.shape[1], config.views)))
        features = encode(captioner, renderer, pool.patches[which, view])
        batch = {k: v[which] if k == "background" else v[which, view] for k, v in right.items()}
        loss = loss_of(reader, features, batch, whole)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            seconds = time.process_time() - start
            found = measure(captioner, renderer, test, config.carried)
            print(f"dense {step + 1} cpu {seconds:.0f} s loss {loss.item():.3f} {found}", flush=True)


@torch.no_grad()
def measure(captioner: Captioner, renderer: Renderer, pool: Pool, carried: bool) -> dict[str, str]:
    """Share of the patches told right, ``whole view / crops``; of stickers and nouns where there is one."""
    captioner.model.eval()
    reader, right = Reader(captioner), labels(pool, carried)
    features = torch.stack([encode(captioner, renderer, patches) for patches in pool.patches])
    found = {}
    for kind, scores in reader(features).items():
        target = right[kind]
        if kind == "background":
            target = target[:, None, None].expand(scores.shape[:-1])
        hit, here = scores.argmax(-1) == target, target != NOT_HERE
        found[kind] = (
            f"{hit[:, 0][here[:, 0]].float().mean():.3f}/{hit[:, 1:][here[:, 1:]].float().mean():.3f}"
        )
    captioner.model.train()
    return found


@torch.no_grad()
def spread(captioner: Captioner, seed: int) -> None:
    """Give words at the start of a text, and plurals, the embedding of their word one fixed step aside."""
    weight, tokens = captioner.model.get_input_embeddings().weight, captioner.tokenizer
    generator = torch.Generator().manual_seed(seed)
    norm = weight[Reader(captioner).ids["noun"]].norm(dim=1).mean() * TWIN_NORM
    steps = F.normalize(torch.randn(2, weight.shape[1], generator=generator), dim=1) * norm
    vocabulary = tokens.get_vocab()
    for noun in NOUN_OF_PLURAL.values():
        weight[vocabulary[f"Ġ{plural(noun)}"]] = weight[vocabulary[f"Ġ{noun}"]] + steps[1]
    for words in WORDS.values():
        for word in words:
            weight[vocabulary[word]] = weight[vocabulary[f"Ġ{word}"]] + steps[0]
