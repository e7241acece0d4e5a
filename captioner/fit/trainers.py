"""The objectives on TRL's trainers, each told in one way what `training` says.

Shapes: N pairs of a batch, U branches (see batches.py), L tokens of the longest branch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset  # the type that TRL asks for
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback, TrainerState
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from captioner import config
from captioner.config import TrainingConfig
from captioner.errors import ConfigError, RunError
from captioner.fit import alarms, distributed, objectives, reference
from captioner.fit.batches import Collator, PairCollator
from captioner.fit.branches import shared_prefix
from captioner.fit.checkpoints import Checkpoints
from captioner.fit.examples import TrainingImages, by_image
from captioner.fit.log import Log
from captioner.models.model import Captioner
from captioner.models.render import Renderer

LARGE = 500_000_000  # parameters above which a batch of several images with all activations fills a GPU


@dataclass(frozen=True)
class CrossEntropy:
    """SFT, QA and golden SFT: :func:`objectives.cross_entropy` over the answers of a batch, by SFTTrainer."""

    validation: TrainingImages | None = None

    def collator(self, renderer: Renderer, examples: Any, training: TrainingConfig) -> Collator:
        return Collator(renderer, examples, training.seed, training.per_device_train_batch_size)

    def arguments(self, told: dict[str, Any]) -> tuple[type, SFTConfig]:
        """The trainer, and what it is told."""
        skip = {"skip_prepare_dataset": True}
        return _SFT, SFTConfig(max_length=None, dataset_kwargs=skip, **told)

    def begin(self, trainer: Any, renderer: Renderer, log: Log, resumed: bool) -> None:
        """Nothing is made before the first step."""


@dataclass(frozen=True)
class Preference:
    """Preferences over all pairs of an image at once, against the captioner as it is before its first step.

    The loss is the sum of TRL's losses of ``dpo.loss_type`` and of our terms, each with its weight: see
    :mod:`captioner.fit.objectives`. The log-probabilities of the reference are computed once, by the same
    forward, and stored: no second model is held. ``origin`` is for the alarm of drift.
    """

    dpo: config.DPOConfig
    origin: alarms.Origin | None = None
    validation = None

    def collator(self, renderer: Renderer, examples: Any, training: TrainingConfig) -> PairCollator:
        return PairCollator(renderer, examples, training, self.dpo)

    def arguments(self, told: dict[str, Any]) -> tuple[type, DPOConfig | KTOConfig]:
        """The trainer, and what it is told; dropout is what ``tuning`` says, and not off."""
        dpo = self.dpo
        own: dict[str, Any] = {"precompute_ref_log_probs": True, "disable_dropout": False}
        own |= {"max_length": None, "beta": dpo.beta, **told}
        if "kto" in dpo.loss_type:
            return _KTO, KTOConfig(loss_type="kto", **own)
        types, weights = list[str](dpo.loss_type), list(dpo.loss_weights) or [1.0] * len(dpo.loss_type)
        if dpo.ce_weight:
            types, weights = [*types, "sft"], [*weights, dpo.ce_weight]
        own |= {"loss_type": types, "loss_weights": weights, "label_smoothing": dpo.label_smoothing}
        return _DPO, DPOConfig(**own)

    def begin(self, trainer: Any, renderer: Renderer, log: Log, resumed: bool) -> None:
        """The reference's log-probabilities, and the alarms' first look."""
        collator, out, beta = trainer.data_collator, log.path.parent, self.dpo.beta
        # TRL gathers one number a pair, and the ranks' batches hold different numbers of pairs
        trainer.accelerator.gather = lambda values: values.new_tensor(
            distributed.collect(values.flatten().tolist(), values.device)
        )
        collator.reference = by_image(reference.stored(trainer, out))
        trainer.watch = alarms.Alarms(self.dpo.alarms, renderer, collator.images.paths, out, self.origin)
        trainer.watch.begin(
            lambda: trainer._metrics["train"]["rewards/chosen"][-1] / beta, log.write, resumed
        )
        trainer.add_callback(trainer.watch)


Objective = CrossEntropy | Preference


def check(objective: Objective, training: TrainingConfig, shard: bool) -> None:
    """Raise ConfigError for a setting that a training for ``objective`` cannot keep."""
    if training.early_stopping_patience and objective.validation is None:
        where, fix = "training.early_stopping_patience", "set sft.validation, or the patience to 0"
        raise ConfigError("An early stop needs a validation loss.", where=where, fix=fix)
    if shard and isinstance(objective, Preference):  # for the alarms' looks and TRL's hash of the reference
        what, fix = "Preferences need the whole model in each process.", "--dpo.tuning.shard false"
        raise ConfigError(what, where="dpo.tuning.shard", fix=fix)


def make(
    objective: Objective,
    captioner: Captioner,
    collator: Collator,
    told: dict[str, Any],
    *callbacks: TrainerCallback,
) -> Any:
    """The trainer, with as many positions to visit as its steps need. ``told``: see :func:`arguments`.

    Of W ranks, rank r gets every W-th batch from the r-th on: what all see in a step is what one process
    sees with W times the accumulation.
    """
    kind, args = objective.arguments(told)
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs take a process each (--gpus), not torch's DataParallel
    if getattr(captioner.model, "is_loaded_in_4bit", False):
        captioner.model._hf_peft_config_loaded = True  # how transformers is told that adapters hang on 4 bits
    positions = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    trainer = kind(
        model=captioner.model,
        args=args,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"position": range(positions * args.world_size)}),
        processing_class=captioner.processor,
        callbacks=list(callbacks),
    )
    trainer.objective = objective
    trainer.processing_class = None  # else its special tokens would replace the checkpoint's own settings
    # the mean over the tokens of all batches of a step, however they are split
    trainer.model_accepts_loss_kwargs = kind is _SFT
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl holds what it would print
    return trainer


def arguments(captioner: Captioner, training: TrainingConfig, out: Path) -> dict[str, Any]:
    """What every trainer is told: bfloat16 autocast on CUDA or for bfloat16 weights; what trains is float32.

    Raises ConfigError for a microbatch that does not divide the batch and a tracker that is not installed.
    """
    device, dtype = captioner.device.type, captioner.model.dtype
    large, recompute = captioner.model.num_parameters() > LARGE, training.gradient_checkpointing
    whole = training.per_device_train_batch_size
    micro = training.microbatch_size or (1 if large else whole)
    if whole % micro:
        raise ConfigError(
            f"Microbatches of {micro} images do not divide a batch of {whole}.",
            where="training.microbatch_size",
            fix="name a divisor of training.per_device_train_batch_size",
        )
    for tracker in training.report_to:
        if importlib.util.find_spec(tracker) is None:
            where, fix = "training.report_to", f"pip install {tracker}, or leave it out"
            raise ConfigError(f"{tracker} is not installed", where=where, fix=fix)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers leaves the last training's choice there
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "logs")
    return {
        "output_dir": str(out / "checkpoints"),
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "save_steps": training.save_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": training.gradient_accumulation_steps * whole // micro,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(training.warmup_ratio * training.max_steps),
        "optim": "adamw_torch",
        "save_total_limit": 2,
        # a short training says something, too
        "logging_steps": min(training.logging_steps, training.max_steps),
        "logging_nan_inf_filter": False,
        "bf16": dtype == torch.bfloat16 or (device == "cuda" and dtype != torch.float64),
        "use_cpu": device == "cpu",
        "gradient_checkpointing": large if recompute is None else recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "remove_unused_columns": False,
        # On a GPU the batches are prepared beside it; on a CPU workers would only take the model's cores.
        "dataloader_num_workers": min(8, (os.cpu_count() or 2) - 1) if device == "cuda" else 0,
        "dataloader_pin_memory": device == "cuda",
        "disable_tqdm": True,
        "report_to": list(training.report_to) or "none",
        "trackio_space_id": None,  # nothing goes to a hub unasked
    }


# ---- trainers


Terms = dict[str, tuple[float, Callable[[], Tensor]]]  # our losses by name: weight and value


class _Trainer(Checkpoints):
    """What all trainers share: our order, our checkpoints, the finite check; no telemetry, no model card."""

    model: Any
    state: TrainerState
    data_collator: Collator
    objective: Any

    def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler:
        """The order is the collator's. transformers 4.57 has no ``train_sampling_strategy`` to say so."""
        return torch.utils.data.SequentialSampler(dataset)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine. TRL asks only environment variables, which others read before us."""

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """The export writes one."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        positions = inputs.pop("positions").tolist()
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self.fail(
                f"loss {loss.item()}, gradient norm {norm.item()} at step {self.state.global_step + 1}",
                where=f"images {', '.join(self.data_collator.keys(positions))}",
                fix="lower the section's training.learning_rate, or leave these images out",
            )
        return loss

    def fail(self, what: str, where: str, fix: str) -> NoReturn:
        raise RunError(what, where=where, fix=fix)


class _SFT(_Trainer, SFTTrainer):
    pass


class _Preference(_Trainer):
    """What both preference trainers share. Our terms are added to TRL's loss."""

    watch: alarms.Alarms
    _metrics: Any

    def _prepare_dataset(self, dataset: Dataset, *_args: Any) -> Dataset:
        """Tokens come with the batch. SFTTrainer alone has a setting that leaves a data set as it is."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_args: Any) -> Dataset:
        """They come with the batch, too. No other setting keeps TRL from loading a reference model."""
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Tensor:
        with shared_prefix(self.model) as seen:
            loss = super().compute_loss(model, inputs, *more, **named)  # type: ignore[misc]
        for name, (weight, term) in self.terms(inputs, seen[-1]).items():
            if weight:
                value = term()
                self._metrics["train"][f"loss/{name}"].append(value.item())
                loss = loss + weight * value
        return loss

    def terms(self, inputs: dict[str, Any], log_probs: Tensor) -> Terms:
        """``log_probs`` [U, L - 1] of the branches."""
        raise NotImplementedError

    def fail(self, what: str, where: str, fix: str) -> NoReturn:
        self.watch.stop(what, where, fix)


class _DPO(_Preference, DPOTrainer):
    def terms(self, inputs: dict[str, Any], log_probs: Tensor) -> Terms:
        dpo, logps, ref = self.objective.dpo, log_probs.sum(1), inputs["ref_chosen_logps"]
        owner = inputs["expand"][: len(ref)]

        def image_term() -> Tensor:
            ref_masked = inputs["ref_masked_logps"]
            own = torch.searchsorted(owner, torch.arange(len(ref_masked), device=owner.device))
            chosen, masked = logps[: len(ref_masked)], logps[-len(ref_masked) :]
            return objectives.image_conditional(chosen, ref[own], masked, ref_masked, dpo.beta)

        return {
            "anchor": (dpo.anchor_weight, lambda: objectives.anchor(logps[owner], ref, dpo.beta)),
            "image": (dpo.image_weight, image_term),
        }


class _KTO(_Preference, KTOTrainer):
    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """TRL hands its second forward the fields of the first, but for those that it knows by name."""
        other = {name: batch[f"KL_{name}"] for name in ("gather", "weights") if f"KL_{name}" in batch}
        return super()._compute_kl_logps(model, batch | other)

    def terms(self, inputs: dict[str, Any], log_probs: Tensor) -> Terms:
        mask = inputs["completion_mask"][:, 1:] * inputs["label"][:, None]
        return {"ce": (self.objective.dpo.ce_weight, lambda: objectives.cross_entropy(log_probs, mask))}
