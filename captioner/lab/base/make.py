"""python -m captioner.lab.base.make --out DIR: make a base for the table tops, one stage after the other.

Every stage is kept under ``--work`` and skipped where it is there already; it prints its CPU time. Needs
numbers in bfloat16 to be fast (AVX512-BF16): data/lab/README.md says how long it took.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

from captioner.config import ViewsConfig
from captioner.files import atomic_dir
from captioner.lab.base import architecture, dense, language, own
from captioner.lab.base.pool import draw_pool
from captioner.models import model
from captioner.models.render import Renderer

SEED = 0
TEST_SEED = 1  # of the scenes that progress is measured on; acceptance has its own
SCENES = {"dense": 6000, "pretrain": 3000, "train": 2000, "qa": 320, "test": 40}
ALL = {"object": 1.0, "size": 1.0, "sticker": 1.0, "count": 0.6, "relation": 1.0, "background": 0.2}
SEEN = {kind: weight for kind, weight in ALL.items() if kind != "sticker"}  # in a whole view
OPEN = {kind: weight for kind, weight in SEEN.items() if kind != "relation"}
STICKERS = {**ALL, "sticker": 5.0}
MIXED = {**ALL, "sticker": 2.0}
LAST = {"object": 2.0, "size": 1.0, "sticker": 1.5, "count": 1.0, "relation": 1.0, "background": 1.0}
COUNTS = {**LAST, "count": 6.0, "background": 0.5}  # two thirds of the scenes have nothing to ask for
TWINS = {**COUNTS, "count": 20.0}
SMALL = {"images": 6, "questions": 20}  # batches where six views make long prefixes
STAGES: tuple[language.Stage | tuple[str, dense.DenseConfig], ...] = (
    ("dense", dense.DenseConfig()),
    language.Stage("open", 1000, {**OPEN, "object": 3.0}, yes_no=0.0, decay_from=0.7),
    language.Stage("where", 600, {**OPEN, "where": 5.0}, yes_no=0.0, decay_from=0.9),
    language.Stage("yes", 1200, {**SEEN, "where": 1.0}),
    ("stickers", dense.DenseConfig(600, learning_rate=6e-4, carried=True, words=False)),
    language.Stage("crops", 500, SEEN, yes_no=0.4, crops=0.8, decay_from=1.0),
    language.Stage(
        "views", 500, STICKERS, yes_no=0.5, six=0.9, crops=0.2, no_whole=0.3, decay_from=0.8, **SMALL
    ),
    language.Stage("captions", 350, MIXED, six=0.8, captions=0.5, captions_six=0.2, decay_from=0.7, **SMALL),
    language.Stage("speak", 665, LAST, six=0.85, captions=0.6, captions_six=0.15, decay_from=0.9, **SMALL),
    language.Stage("look", 500, LAST, six=0.85, captions=0.8, captions_six=0.1, decay_from=1.0, **SMALL),
    language.Stage("see", 1000, COUNTS, six=0.7, captions=0.75, captions_six=0.1, decay_from=1.0, **SMALL),
    language.Stage(
        "all", 600, TWINS, six=0.7, captions=0.75, captions_six=0.1, named=0.9, decay_from=1.0, **SMALL
    ),
    language.Stage(
        "write", 1000, LAST, six=0.85, captions=0.65, captions_six=0.15, named=0.6, decay_from=0.1, **SMALL
    ),
    language.Stage(
        "own", 300, LAST, 8e-4, six=1.0, captions=0.4, captions_six=0.2, own=0.6, decay_from=0.2, **SMALL
    ),
)


@dataclass
class Lessons:
    """The pools with their features, drawn when a stage first needs them."""

    captioner: model.Captioner
    renderer: Renderer

    def _encoded(self, split: str, count: int, seed: int = SEED) -> language.Lesson:
        pool = draw_pool(self.renderer, split, count, seed=seed, labels=split == "pretrain")
        return language.lesson(self.captioner, self.renderer, pool)

    @cached_property
    def asked(self) -> language.Lesson:
        return self._encoded("pretrain", SCENES["pretrain"])

    @cached_property
    def captioned(self) -> language.Lesson:
        return self._encoded("train", SCENES["train"])

    @cached_property
    def test(self) -> language.Lesson:
        return self._encoded("qa", SCENES["test"], TEST_SEED)

    def own(self) -> language.Lesson:
        """Scenes of the split ``qa`` with what the captioner, as it is now, says about them."""
        found = self._encoded("qa", SCENES["qa"])
        said: list[list[str]] = [[] for _ in found.pool.scenes]
        for views, n in ((own.WHOLE, 3), (own.SIX, 1)):
            samples = own.captions(self.captioner, "qa", found.pool.indices, SEED, n, 1.0, views)
            for texts, row in zip(said, samples, strict=True):
                texts += [candidate.text for candidate in row]
        found.claims = [
            own.claims(scene, texts) for scene, texts in zip(found.pool.scenes, said, strict=True)
        ]
        return found


def train_encoder(captioner: model.Captioner, renderer: Renderer, config: dense.DenseConfig) -> None:
    """A stage of the encoder, see :mod:`dense`; the first one makes words and attention ready."""
    pool = draw_pool(renderer, "pretrain", SCENES["dense"], seed=SEED, labels=True)
    test = draw_pool(renderer, "pretrain", SCENES["test"], seed=TEST_SEED, labels=True)
    captioner.visual.requires_grad_(True)
    dense.train(captioner, renderer, pool, test, config, SEED)
    if config.words:
        dense.spread(captioner, SEED)
        language.prepare(captioner, SEED)


def make(work: Path, until: str = "") -> model.Captioner:
    """Run what is missing of all stages, or of those to the one named ``until``; returns the captioner."""
    start = work / "architecture"
    if not start.is_dir():
        with atomic_dir(start) as folder:
            architecture.write(folder, SEED)
    captioner = model.load(start)
    renderer = Renderer(captioner, ViewsConfig())
    lessons = Lessons(captioner, renderer)
    for number, stage in enumerate(STAGES):
        name = stage.name if isinstance(stage, language.Stage) else stage[0]
        path = work / f"{number}-{name}.safetensors"
        if not path.is_file():
            began = time.process_time()
            if isinstance(stage, language.Stage):
                claimed = lessons.own() if stage.own else None
                language.train(
                    captioner, renderer, stage, lessons.asked, lessons.captioned, claimed, lessons.test, SEED
                )
            else:
                train_encoder(captioner, renderer, stage[1])
                lessons = Lessons(captioner, renderer)  # features of before are stale
            save_model(captioner.model, str(path))
            print(f"stage {name}: {time.process_time() - began:.0f} CPU seconds", flush=True)
        load_model(captioner.model, str(path))
        if name == until:
            break
    return captioner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished checkpoint; must not exist"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/lab-base"), help="where stages are kept")
    parser.add_argument("--until", default="", help="name of the last stage (default all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    captioner = make(args.work, args.until)
    with atomic_dir(args.out) as folder:
        architecture.export(captioner, folder)
    print(f"the base: {args.out}")


if __name__ == "__main__":
    main()
