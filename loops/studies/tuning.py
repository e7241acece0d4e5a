"""What does each way to tune learn of a narrow training set, and what does it make the captioner forget?

Every arm is trained on the same scenes of the `sft` split (two or three objects, common combinations only),
on the whole view alone, which is cheap and shows shapes and colours. It is measured on unseen scenes of that
split and on `test`, where rare combinations and such that no training showed occur. The base row is the
untuned model, asked for prose. *Memory* counts what training adds to the weights: activations kept for the
backward pass of one batch, gradients and Adam's two moments of what trains, in MB; *step* is the time of one
forward and backward pass of it. Learning rates are each arm's own (``ARMS``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from captioner.config import (
    AdapterTuning,
    Config,
    FullTuning,
    LoraTuning,
    PartsTuning,
    Tuning,
)
from captioner.judges.metrics import evaluate
from loops import sft
from loops.studies._arms import Metrics, caption, images, remembered, share, train

if TYPE_CHECKING:
    from captioner.models.model import Captioner

BASE = "base (prose)"
PAIRED = "adapters + soft prompt"
SOFT = 8  # tokens of a soft prompt
# arm -> what trains, tokens of the soft prompt, peak learning rate: of those tried, the one with the best F1
# on `scenes:validation:48` after 60 steps of 16 images with seed 100 (soft prompt and projector, which say
# nothing right by then: the least loss). Tried: full 2e-4, 5e-4, 1.5e-3; LoRA 1e-3, 3e-3, 1e-2; parallel
# adapters 2e-3, 5e-3, 1.5e-2 (sequential ones take their rate), with a soft prompt 5e-3, 1.5e-2; soft prompt
# 1e-2, 3e-2, 1e-1; projector 3e-3, 1e-2.
ARMS: dict[str, tuple[Tuning, int, float]] = {
    "full": (FullTuning(), 0, 1.5e-3),
    "LoRA": (LoraTuning(targets=("language", "vision", "merger")), 0, 1e-2),
    "adapters, parallel": (AdapterTuning(), 0, 1.5e-2),
    "adapters, sequential": (AdapterTuning(placement="sequential"), 0, 1.5e-2),
    "soft prompt only": (PartsTuning(parts=()), SOFT, 1e-1),
    PAIRED: (AdapterTuning(), SOFT, 1.5e-2),
    "projector only": (PartsTuning(parts=("merger",)), 0, 1e-2),
}
COLUMNS = {
    "parameters": "trained, K",
    "memory": "memory, MB",
    "step": "step, s",
    "f1_narrow": "F1, in distribution",
    "precision": "precision, test",
    "recall_common": "recall, common",
    "recall_rare": "recall, rare",
    "recall_held_out": "recall, held out",
}
UNSEEN = "scenes:sft:{count}:1000000"  # far behind the training scenes
REPEATS = 5  # of the timed step


def measure(config: Config, work: Path) -> Iterator[tuple[str, Metrics]]:
    yield BASE, remembered(work, BASE, lambda _home: _base(config, work))
    for arm, (tuning, soft, rate) in ARMS.items():
        prompt = config.sft.soft_prompt.model_copy(update={"length": soft})
        training = config.sft.training.model_copy(update={"learning_rate": rate})
        own = {"tuning": tuning, "soft_prompt": prompt, "training": training}
        settings = config.model_copy(update={"sft": config.sft.model_copy(update=own)})

        def trained(home: Path, settings: Config = settings) -> Metrics:
            captioner = train(settings, work, home)
            return _scores(settings, work, captioner) | _cost(settings, work, captioner)

        yield arm, remembered(work, arm, trained)


def _base(config: Config, work: Path) -> Metrics:
    from captioner.models import model

    return _scores(config, work, model.load(config.model), prose=True)


def _scores(config: Config, work: Path, captioner: Captioner, prose: bool = False) -> Metrics:
    from captioner import prompts
    from captioner.engines.hf import HFEngine

    engine = HFEngine(
        captioner, config.views, config.engine, prompt=prompts.load("describe") if prose else None
    )
    test = images(config, work, config.evaluate.data)
    narrow = images(config, work, UNSEEN.format(count=len(test)))
    counts = {
        name: caption(config, engine, rows, prose) for name, rows in (("test", test), ("narrow", narrow))
    }
    return {
        "f1_narrow": evaluate(counts["narrow"], resamples=1)["f1"].value,
        "precision": evaluate(counts["test"], resamples=1)["precision"].value,
        **{
            f"recall_{group}": share(counts["test"], "recall by rarity", group)
            for group in ("common", "rare", "held_out")
        },
    }


def _cost(config: Config, work: Path, captioner: Captioner) -> Metrics:
    """Trained parameters in thousands, memory in MB and seconds of a step of the first batch."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from captioner.fit.batches import Collator
    from captioner.models import render

    section = config.sft
    rows = [row for source in section.data for row in images(config, work, source)]
    collator = Collator(
        render.Renderer(captioner, config.views),
        sft.training_images(rows, section),
        section.training.seed,
        section.training.per_device_train_batch_size,
    )
    batch = collator([{"position": at} for at in range(section.training.per_device_train_batch_size)])
    batch.pop("positions")
    fed = {name: tensor.to(captioner.device) for name, tensor in batch.items()}
    weights = {p.untyped_storage().data_ptr() for p in captioner.model.parameters()}
    kept: dict[int, int] = {}  # storage -> bytes; views of one storage count once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = []
    captioner.model.train()
    for repeat in range(REPEATS):
        captioner.model.zero_grad()
        start = time.perf_counter()
        with nullcontext() if repeat else saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = captioner.model(**fed, use_cache=False).loss
            loss.backward()
            loss.item()  # a GPU has done it all by now
        seconds.append(time.perf_counter() - start)
    captioner.model.zero_grad()
    captioner.model.eval()
    parameters = sum(p.numel() for p in captioner.model.parameters() if p.requires_grad)
    memory = sum(kept.values()) + 3 * 4 * parameters  # gradient and Adam's moments, float32
    return {"parameters": parameters / 1e3, "memory": memory / 1e6, "step": median(seconds[1:])}
