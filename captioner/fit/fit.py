"""One way through every training: load, tune, train, save, export.

SFT, QA, golden SFT and preferences differ in their examples and in their objective (trainers.py) alone.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from captioner import prompts
from captioner.config import Config, FullTuning, ModelConfig, SoftPromptConfig, TrainingConfig, Tuning
from captioner.errors import ConfigError, RunError
from captioner.fit import distributed, log, sharding, trainers
from captioner.fit.checkpoints import last_checkpoint, trainable
from captioner.fit.examples import PairedImages, TrainingImages
from captioner.fit.trainers import Objective
from captioner.models import adapters, fuse, model, soft_prompt
from captioner.models.model import Captioner, describe_trainable
from captioner.models.render import Renderer
from captioner.processes import is_main, world_size
from captioner.progress import progress

ADAPTER = "captioner"  # name of the one adapter that a captioner carries
Examples = TrainingImages | PairedImages


@dataclass(frozen=True)
class Start:
    """Where a training begins: a checkpoint, and what its run says of the model, the views and the seed."""

    config: Config
    path: Path | None = None  # None: the config's own

    @property
    def model(self) -> ModelConfig:
        model = self.config.model
        return model.model_copy(update={"path": str(self.path)}) if self.path else model

    def seeded(self, training: TrainingConfig) -> TrainingConfig:
        """The training of a section in this run: the run's seed is added to the section's."""
        return training.model_copy(update={"seed": self.config.seed + training.seed})


def fit(
    start: Start,
    tuning: Tuning,
    examples: Examples,
    objective: Objective,
    training: TrainingConfig,
    out: Path,
    target: Path | None = None,
    *,
    prompt: SoftPromptConfig | None = None,
    card: dict[str, Any] | None = None,
    keep_adapter: bool = True,
) -> dict[str, float]:
    """Train a checkpoint on ``examples`` and write what comes out; returns the last value of every metric.

    ``out`` gets metrics.jsonl, resumable checkpoints and, where ``keep_adapter``, what trained
    (``adapter/``); ``target`` (``out/captioner``) the stock checkpoint, which a sequential adapter has none
    of. ``prompt`` attaches a new soft prompt; one that the checkpoint has stays as it is. ``card`` goes into
    its README.md with the metrics. A training that was killed goes on from its last checkpoint. Raises as
    :func:`prepare`, :func:`train` and :func:`captioner.models.fuse.export` do.
    """
    training, target = start.seeded(training), target or out / "captioner"
    renderer = prepare(start, tuning, training.seed, prompt)
    captioner = renderer.captioner
    print(trainable_table(captioner.model))
    metrics = train(renderer, examples, objective, training, out, shard=sharded(tuning))
    if is_main():
        name = adapters.name_of(captioner)
        if name and keep_adapter:
            adapters.save(captioner, name, out / "adapter")
        if prompt and captioner.soft_prompt_ids:
            soft_prompt.save(captioner, out / "adapter")
        if (kind := captioner.tuning.get("placement", "parallel")) == "parallel":
            # the same training gives the same files, however long it took
            kept = {key: value for key, value in metrics.items() if key != "seconds"}
            fuse.export(captioner, target, name, card and {**card, "Metrics": kept})
        else:
            print(f"a stock checkpoint cannot hold {kind} adapters: no {target}")
    distributed.barrier()  # rank 0 publishes
    return metrics


def prepare(start: Start, tuning: Tuning, seed: int, prompt: SoftPromptConfig | None = None) -> Renderer:
    """Load a checkpoint, set what trains, and say how its images are seen; the captioner comes with it."""
    init = tuning.init if isinstance(tuning, FullTuning) else "pretrained"
    captioner = model.load(start.model, init=init, seed=seed)
    tune(captioner, tuning, prompt, seed)
    renderer = Renderer(captioner, start.config.views)
    captioner.views = renderer.config
    return renderer


def tune(captioner: Captioner, tuning: Tuning, prompt: SoftPromptConfig | None, seed: int) -> None:
    """Set what trains: the whole model, or what is hung into a frozen one; a soft prompt if one is wanted.

    A soft prompt that the checkpoint has trains with the whole model only. Raises ConfigError where nothing
    would train.
    """
    if isinstance(tuning, FullTuning):
        if getattr(captioner.model, "is_loaded_in_4bit", False):
            fix = "set --model.load_in_4bit false, or train adapters"
            raise ConfigError("Weights held in 4 bits cannot train.", where="tuning.type", fix=fix)
        captioner.model.requires_grad_(True)
    else:
        captioner.model.requires_grad_(False)
        adapters.tune(captioner, tuning, ADAPTER, seed)
    if prompt is not None and prompt.length:
        text = prompts.load("caption") if prompt.init is None else prompt.init
        soft_prompt.attach(captioner, prompt.length, text, trainable=prompt.trainable)
    if not any(parameter.requires_grad for parameter in captioner.model.parameters()):
        fix = "name a part or a width, or let the soft prompt train"
        raise ConfigError("Nothing would train.", where="tuning", fix=fix)


def sharded(tuning: Tuning) -> bool:
    """Whether each of several processes holds a part of the weights only."""
    return isinstance(tuning, FullTuning) and tuning.shard and world_size() > 1


def trainable_table(model: torch.nn.Module) -> str:
    """What trains, one line a module: parameters and their share."""
    lines = [f"  {module:52}{count:>12,}{share:>9.2%}" for module, count, share in describe_trainable(model)]
    return "\n".join(["trained parameters:", *lines])


def train(
    renderer: Renderer,
    examples: Examples,
    objective: Objective,
    training: TrainingConfig,
    out: Path,
    *,
    shard: bool = False,
) -> dict[str, float]:
    """Train what requires a gradient of the renderer's captioner; returns the last value of every metric.

    With ``shard`` (see :func:`sharded`) each process holds a part of the weights and of AdamW's state; what
    comes out is on the CPU of rank 0. Writes ``out/metrics.jsonl`` and resumable checkpoints under
    ``out/checkpoints``, and goes on from the last whole one.

    Raises ConfigError for a setting that this training cannot keep, DataError for an image that cannot be
    read and captions that do not fit. A loss that is not finite is a RunError, which names its images;
    Preferences raise Refused for it and where an alarm rings, and RunError where what is stored of the
    reference does not belong to these weights, pixels or tokens.
    """
    captioner, training = renderer.captioner, by_steps(training, len(examples), world_size())
    trainers.check(objective, training, shard)
    told = trainers.arguments(captioner, training, out)
    collator = objective.collator(renderer, examples, training)
    collator.check_lengths()
    whole, micro = training.per_device_train_batch_size, told["per_device_train_batch_size"]
    held_out = objective.validation
    validate = partial(log.validation_loss, renderer, held_out, whole, micro) if held_out else None
    logged = log.Log(out, validate, training.early_stopping_patience)
    last, begin, device = last_checkpoint(out), time.monotonic(), captioner.device.type
    if shard:
        captioner.model.to("cpu")  # a device gets its part of it, layer by layer
    with _precise(captioner), progress("training", training.max_steps) as bar:
        with sharding.sharded(captioner, device, told["bf16"]) if shard else nullcontext():
            logged.advance = bar.advance
            trainer = trainers.make(objective, captioner, collator, told, logged)
            logged.trainer = trainer
            _raise_precision(captioner.model)  # beside 4-bit weights TRL makes what trains bfloat16
            objective.begin(trainer, renderer, logged, last is not None)
            if last:
                print(f"resuming from step {last.name.rpartition('-')[2]}")
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            steps = trainer.state.global_step
            # trainer and callbacks hold one another; AdamW's state must not wait for the collector
            del trainer, logged.trainer
        logged.restore_best(captioner.model)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return logged.last | {"steps": steps, "seconds": time.monotonic() - begin}


def by_steps(training: TrainingConfig, images: int, processes: int) -> TrainingConfig:
    """The training of so many images in so many processes, its epochs as ``max_steps``."""
    if training.num_train_epochs is None:
        return training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    steps = max(1, math.ceil(training.num_train_epochs * images / batch))
    return training.model_copy(update={"max_steps": steps, "num_train_epochs": None})


@contextmanager
def _precise(captioner: Captioner) -> Iterator[None]:
    """While training, trained parameters are at least float32; after it TRL's patch of forward is undone.

    Raises RunError for frozen parameters in another number format than the model's: they would take the time
    and memory of float32 by accident.
    """
    patched = captioner.model.__dict__.get("forward")
    _check_precision(captioner.model)
    dtypes = {name: p.dtype for name, p in trainable(captioner.model)}
    _raise_precision(captioner.model)
    try:
        yield
    finally:
        model = captioner.model  # another one where it was sharded
        for name, p in trainable(model):
            p.data, p.grad = p.data.to(dtypes[name]), None
        model.__dict__.pop("forward", None)
        if patched is not None:
            model.forward = patched
        if model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


def _raise_precision(model: torch.nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


def _check_precision(model: torch.nn.Module) -> None:
    frozen = {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point() and not p.requires_grad and not name.endswith(".soft")  # float32 on purpose
    }
    sizes = Counter[torch.dtype]()
    for p in frozen.values():
        sizes[p.dtype] += p.numel()
    odd = [name for name, p in frozen.items() if p.dtype != max(sizes, key=sizes.__getitem__)]
    if odd:
        raise RunError(
            f"{len(odd)} frozen parameters are {frozen[odd[0]].dtype}, the others are not",
            where=", ".join(odd[:3]),
            fix="store the checkpoint in one number format",
        )
