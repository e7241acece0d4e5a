"""The language model's training, the encoder frozen: open skills first, then yes/no, six views, captions.

All questions of an image, in the product's own words and tokens, share its prefix (:mod:`packed`). Captions
are written about whole views mostly, in any order, with details that the view does not show; questions are
asked about six views: so comes a captioner that guesses beside a verifier that sees.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captioner import prompts
from captioner.lab.base import packed
from captioner.lab.base.dense import encode, rate
from captioner.lab.base.own import Claims
from captioner.lab.base.pool import PATCHES, VIEWS, Pool
from captioner.lab.scenes.language import (
    RELATIONS,
    ask,
    open_questions,
    relations,
    shorthand,
    statements,
)
from captioner.lab.scenes.things import NOUNS, PLACES, SPLITS, STICKERS, Scene, plural
from captioner.method import qa
from captioner.models.model import Captioner
from captioner.models.render import IGNORED, Renderer

CAPTIONS_PER_IMAGE = 4
EMBEDDING_RATE = 0.1  # of the learning rate: the encoder was trained against these words
WHERE = "where"
EVERY = 100  # steps between two measurements
ALIKE = 0.8  # correlation of queries and keys at the start: like attends to like


Right = int | tuple[int, ...]  # the token to be said next, or several that are equally right
Branch = tuple[list[int], list[Right]]  # token ids and, for each, what is right next or IGNORED


@dataclass(frozen=True)
class Stage:
    """One stretch of training. Shares are of batches (``captions``, ``own``, ``six``) or of questions."""

    name: str
    steps: int
    kinds: Mapping[str, float]  # kind of question -> weight
    learning_rate: float = 1.5e-3
    yes_no: float = 0.6  # the other questions are open
    six: float = 0.0  # of the question batches show six views, the others the whole alone
    crops: float = 0.0  # of the batches show one crop alone and ask for the stickers in it
    no_whole: float = 0.0  # of the batches on six views leave out the whole one
    captions: float = 0.0
    captions_six: float = 0.0  # of the caption batches show six views
    named: float = SPLITS["train"].named  # probability with which a caption names a fact
    own: float = 0.0  # of the question batches ask the captioner's own claims, see :mod:`own`
    decay_from: float = 0.5
    images: int = 8
    caption_images: int = 16  # in a batch of captions of whole views; with six views ``images``
    questions: int = 24  # of each image in a batch


@dataclass
class Lesson:
    """The scenes of a pool with their features, and what else is asked about them."""

    pool: Pool
    features: Tensor  # float16 [n, views, patches, D]
    claims: list[Claims] = field(default_factory=list)  # what the captioner said about each scene


@torch.no_grad()
def lesson(captioner: Captioner, renderer: Renderer, pool: Pool) -> Lesson:
    """Encode all views of a pool once."""
    captioner.model.eval()
    return Lesson(pool, torch.stack([encode(captioner, renderer, views).half() for views in pool.patches]))


@torch.no_grad()
def prepare(captioner: Captioner, seed: int) -> None:
    """Start attention where it is soon useful: queries like keys, outputs like values."""
    torch.manual_seed(seed)
    for layer in captioner.language_model.layers:
        attention: Any = layer.self_attn
        query, key = attention.q_proj.weight, attention.k_proj.weight
        key.copy_(ALIKE * query + (1 - ALIKE**2) ** 0.5 * key)
        nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


class Writer:
    """Makes branches: token ids and targets of questions and captions, as the product renders them.

    With ``hints`` some tokens that the user says are learned too: the answer right behind the question mark,
    from where it need only be copied over the markup, and in a true statement its last words.
    """

    def __init__(self, renderer: Renderer, hints: bool = True):
        self.renderer, self.hints = renderer, hints
        self.branch = cache(self._branch)

    def _branch(self, text: str | None, answer: str, told: int = 0) -> Branch:
        """``told``: how many last words of the question are learned as well."""
        ids, mask = self.renderer.branch_ids(text, answer)
        targets: list[Right] = [token if on else IGNORED for token, on in zip(ids[1:], mask[1:], strict=True)]
        if self.hints and text is not None:
            mark = ids.index(self.renderer.end_id) - 1  # the question mark
            targets[mark - 1 - told : mark - 1] = ids[mark - told : mark]
            targets[mark] = ids[mask.index(True)]
        return ids[:-1], targets

    def questions(self, rng: random.Random, scene: Scene, stage: Stage) -> list[Branch]:
        branches: list[Branch] = []
        opened: dict[str, list[dict[str, str]]] = {}
        for row in open_questions(scene):
            opened.setdefault(_skill(row), []).append(row)
        kinds, weights = list(stage.kinds), list(stage.kinds.values())
        while len(branches) < stage.questions:
            kind = rng.choices(kinds, weights)[0]
            if kind != WHERE and rng.random() < stage.yes_no:
                asked = ask(rng, scene, kind, rng.random() < 0.5)
                if asked:
                    branches.append(self.yes_no(asked["question"], asked["answer"] == "yes", kind))
            elif kind in opened:
                row = rng.choice(opened[kind])
                branches.append(self.branch(row["question"], row["answer"]))
        return branches

    def stickers(self, rng: random.Random, pool: Pool, i: int, view: int, stage: Stage) -> list[Branch]:
        """Questions about the stickers that one view of scene ``i`` shows, or shows to be missing."""
        assert pool.shown is not None
        scene, (owners, stuck) = pool.scenes[i], pool.shown[i, :, view]
        visible = [
            thing
            for number, thing in enumerate(scene.things)
            if number in (stuck if thing.sticker else owners) and len(scene.named(thing.noun)) == 1
        ]
        if not visible:
            return [self.branch("what background?", scene.background)]
        branches = []
        for _ in range(stage.questions):
            thing = rng.choice(visible)
            if rng.random() < stage.yes_no:
                true = thing.sticker is not None and rng.random() < 0.6
                kind = thing.sticker if true else rng.choice([s for s in STICKERS if s != thing.sticker])
                branches.append(self.yes_no(f"{kind} sticker on {thing.noun}", true, "sticker"))
            else:
                branches.append(self.branch(f"what sticker is on {thing.noun}?", thing.sticker or "none"))
        return branches

    def yes_no(self, statement: str, true: bool, kind: str) -> Branch:
        told = len(statement.split()) - 1 if true and kind == "object" else 0  # the place
        return self.branch(prompts.load("question", statement=statement), "yes" if true else "no", told)

    def captions(self, rng: random.Random, pool: Pool, i: int, named: float) -> list[Branch]:
        texts = [shorthand(pool.scenes[i], rng.randrange(1 << 40), named) for _ in range(CAPTIONS_PER_IMAGE)]
        return [self.caption(pool.scenes[i], text) for text in texts]

    def caption(self, scene: Scene, text: str) -> Branch:
        """A caption; where it first names a thing, any other that could come is as right.

        Captions name things in any order: taught with one noun at a time the language model needs many more
        captions before it looks at the picture.
        """
        ids, targets = self._branch(None, text)
        at = next(k for k, target in enumerate(targets) if target != IGNORED)
        unsaid = list(scene.counts())
        for number, statement in enumerate(text.split(", ")):
            words = statement.split()
            for k, word in enumerate(words):
                others = alternatives(scene, words[:k], unsaid) if word in NOUNS else []
                if word in others:
                    targets[at + k] = tuple(self._token(noun, number + k == 0) for noun in others)
            unsaid = [noun for noun in unsaid if noun not in words and plural(noun) not in words]
            at += len(words) + 1
        return ids, targets

    def _token(self, word: str, first: bool) -> int:
        return self.renderer.text_ids(word if first else f" {word}")[0]

    def claims(self, rng: random.Random, scene: Scene, found: Claims, count: int) -> list[Branch]:
        """The captioner's own claims about a scene, kinds in turn, of each as many false ones as true ones.

        Where it made none of the wanted truth a drawn statement stands in.
        """
        branches: list[Branch] = []
        kinds = sorted(found) or ["background"]
        while len(branches) < count:
            kind, true = rng.choice(kinds), rng.random() < 0.5
            texts = [text for text, right in found.get(kind, ()) if right == true]
            drawn = None if texts else ask(rng, scene, kind, true)
            if drawn:
                texts = [drawn["question"]]
            if texts:
                branches.append(self.yes_no(rng.choice(texts), true, kind))
        return branches


def alternatives(scene: Scene, before: Sequence[str], unsaid: Sequence[str]) -> list[str]:
    """The nouns that can follow the words of a statement ``before`` them; of new things, those unsaid."""
    start = " ".join(before)
    if start.endswith(RELATIONS):
        return [text.split()[-1] for text in relations(scene) if text.startswith(f"{start} ")]
    if not before:
        return list(unsaid)
    true = set(statements(scene))
    return [noun for noun in unsaid if f"{start} {noun}" in true]


def pad(branches: Sequence[Sequence[Branch]]) -> tuple[Tensor, Tensor]:
    """Branches of I images -> ids, long [I, N, L], padded on the right, and targets, [I, N, L, A].

    A is the number of tokens that are equally right, filled up with ``IGNORED``.
    """
    count, length = max(map(len, branches)), max(len(ids) for row in branches for ids, _ in row)
    ids = np.zeros((len(branches), count, length), np.int64)
    targets = np.full((*ids.shape, len(PLACES)), IGNORED, np.int64)
    for i, row in enumerate(branches):
        for n, (said, right) in enumerate(row):
            ids[i, n, : len(said)] = said
            for k, target in enumerate(right):
                few = target if isinstance(target, tuple) else (target,)
                targets[i, n, k, : len(few)] = few
    return torch.from_numpy(ids), torch.from_numpy(targets)


def loss_of(
    captioner: Captioner, renderer: Renderer, features: Tensor, views: Sequence[int], branches: Any
) -> Tensor:
    """Mean cross-entropy of the branches' targets; ``features`` [I, all views, patches, D]."""
    ids, targets = pad(branches)
    states = packed.hidden(
        captioner, renderer, prefix_of(renderer, views), features[:, list(views)].flatten(1, 2), ids
    )
    here = targets[..., 0] != IGNORED
    right, counted = targets[here].clamp(0), (targets[here] != IGNORED).float()
    scores = (states[here] @ captioner.model.get_input_embeddings().weight.T).log_softmax(-1)
    return -((scores.gather(1, right) * counted).sum(1) / counted.sum(1)).mean()


def prefix_of(renderer: Renderer, views: Sequence[int]) -> Any:
    """The prefix that shows some of the six views."""
    side = int(PATCHES**0.5)
    tags = [renderer.tags()[view] for view in views]
    return renderer.prefix(torch.tensor([[1, side, side]] * len(views)), tags)


def train(
    captioner: Captioner,
    renderer: Renderer,
    stage: Stage,
    asked: Lesson,
    captioned: Lesson,
    own: Lesson | None,
    test: Lesson,
    seed: int,
) -> None:
    """Train the language model in place for one stage."""
    rng, writer = random.Random(f"{stage.name} {seed}"), Writer(renderer)
    embedding = captioner.model.get_input_embeddings().weight
    language = [p for p in captioner.language_model.parameters() if p is not embedding]
    groups: list[dict[str, Any]] = [
        {"params": language, "scale": 1.0},
        {"params": [embedding], "scale": EMBEDDING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    captioner.visual.requires_grad_(False)
    captioner.model.train()
    start, mean = time.process_time(), {"question": 0.0, "caption": 0.0}
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * group["scale"] * rate(step, stage.steps, 50, stage.decay_from)
        kind, source, views, branches, picked = draw_batch(rng, writer, stage, asked, captioned, own)
        loss = loss_of(captioner, renderer, source.features[picked].float(), views, branches)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*language, embedding], 1.0)
        optimizer.step()
        mean[kind] = 0.95 * mean[kind] + 0.05 * loss.item() if mean[kind] else loss.item()
        if (step + 1) % EVERY == 0 or step + 1 == stage.steps:
            seconds = time.process_time() - start
            found = measure(captioner, renderer, test, stage)
            print(f"{stage.name} {step + 1} cpu {seconds:.0f} s loss {mean} {found}", flush=True)


def draw_batch(
    rng: random.Random, writer: Writer, stage: Stage, asked: Lesson, captioned: Lesson, own: Lesson | None
) -> Any:
    """What kind of batch, its lesson, the views shown, the branches, the scenes' numbers."""
    if rng.random() < stage.captions:
        six = rng.random() < stage.captions_six
        views = range(VIEWS) if six else range(1)
        picked = rng.sample(range(len(captioned.pool)), stage.images if six else stage.caption_images)
        return (
            "caption",
            captioned,
            views,
            [writer.captions(rng, captioned.pool, i, stage.named) for i in picked],
            picked,
        )
    if own is not None and rng.random() < stage.own:
        picked = rng.sample(range(len(own.pool)), stage.images)
        return (
            "question",
            own,
            range(VIEWS),
            [writer.claims(rng, own.pool.scenes[i], own.claims[i], stage.questions) for i in picked],
            picked,
        )
    picked = rng.sample(range(len(asked.pool)), stage.images)
    if rng.random() < stage.crops:
        view = rng.randrange(1, VIEWS)
        branches = [writer.stickers(rng, asked.pool, i, view, stage) for i in picked]
        return "question", asked, [view], branches, picked
    views = range(VIEWS) if rng.random() < stage.six else range(1)
    shown = stage
    if len(views) == 1 and stage.six:  # a whole view alone cannot show a sticker
        shown = Stage(**{**stage.__dict__, "kinds": {k: w for k, w in stage.kinds.items() if k != "sticker"}})
    elif len(views) > 1 and rng.random() < stage.no_whole:
        views = range(1, VIEWS)
    return (
        "question",
        asked,
        views,
        [writer.questions(rng, asked.pool.scenes[i], shown) for i in picked],
        picked,
    )


@torch.no_grad()
def measure(captioner: Captioner, renderer: Renderer, test: Lesson, stage: Stage) -> dict[str, str]:
    """Accuracy of each kind's yes/no and open questions (``.97 .93``), by the number of views shown."""
    captioner.model.eval()
    found = {}
    for views in [range(1), range(VIEWS)] if stage.six else [range(1)]:
        for kind in stage.kinds:
            rng = random.Random(7)
            closed = [_balanced(rng, scene, kind) for scene in test.pool.scenes]
            opened = [
                rng.sample([row for row in open_questions(scene) if _skill(row) == kind], 1)
                for scene in test.pool.scenes
                if kind != "relation"
            ]
            right = [_right(captioner, renderer, test, views, rows) for rows in (closed, opened) if any(rows)]
            found[f"{kind} {len(views)}"] = " ".join(f"{share:.3f}" for share in right)
    captioner.model.train()
    return found


def _skill(row: Mapping[str, str]) -> str:
    """The kind of an open question; where something is is a skill of its own beside what is somewhere."""
    return WHERE if row["question"].startswith(WHERE) else row["kind"]


def _balanced(rng: random.Random, scene: Scene, kind: str) -> list[dict[str, str]]:
    if kind == WHERE:
        return []
    rows = [ask(rng, scene, kind, true) for true in (True, False)]
    return [row for row in rows if row] if all(rows) else []


def _right(
    captioner: Captioner,
    renderer: Renderer,
    test: Lesson,
    views: Sequence[int],
    asked: list[list[dict[str, str]]],
) -> float:
    """Share of the questions, some for each scene of ``test``, that are answered right, word for word."""
    hits: list[Tensor] = []
    writer, weight = Writer(renderer, hints=False), captioner.model.get_input_embeddings().weight
    for at in range(0, len(asked), 25):
        part = [i for i in range(at, min(at + 25, len(asked))) if asked[i]]
        branches = [[writer.branch(qa.question_text(row), row["answer"]) for row in asked[i]] for i in part]
        ids, targets = pad(branches)
        features = test.features[part][:, list(views)].flatten(1, 2).float()
        said = packed.hidden(captioner, renderer, prefix_of(renderer, views), features, ids) @ weight.T
        targets = targets[..., 0]
        here = targets != IGNORED
        hits.append(((said.argmax(-1) == targets) | ~here).all(-1)[here.any(-1)])
    return torch.cat(hits).float().mean().item()
