"""Training on TRL's trainers: what all share, and SFT and QA on SFTTrainer. Preferences: preference.py.

What is drawn at a step depends on (seed, position) alone, so a resumed run equals an uninterrupted one.
Checkpoints hold the trained parameters and the optimizer's state as safetensors and JSON; nothing is
unpickled.

Shapes: B batch, T tokens of a packed row, L tokens of a branch, D width.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # the type that TRL asks for
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from captioner import prompts
from captioner.config import FullTuning, SoftPromptConfig, TrainingConfig, Tuning
from captioner.errors import CaptionerError, ConfigError, DataError, RunError
from captioner.files import atomic_write_text, row_seed
from captioner.fit import distributed, sharding
from captioner.models import adapters, soft_prompt
from captioner.models.model import Captioner, describe_trainable
from captioner.models.render import IGNORED, Renderer, TrainRow, collate
from captioner.processes import is_main, rank, world_size
from captioner.progress import progress
from captioner.views import BadImage, load_image

ADAPTER = "captioner"  # name of the one adapter that a captioner carries
CACHE_BYTES = 1 << 29  # of cut images that are kept between epochs
CACHED_BRANCHES = 1 << 16
LARGE = 500_000_000  # parameters above which a batch of several images with all activations fills a GPU


@dataclass(frozen=True)
class Target:
    """One thing to learn of an image; ``text`` None is the soft prompt, or the caption prompt without one."""

    text: str | None
    answer: str
    silent: tuple[tuple[int, int], ...] = ()  # characters of the answer that are read and not learned


@dataclass(frozen=True)
class TrainingImages:
    """Images and what is learned of each.

    ``draw(index, rng)`` gives the targets of an image; it may choose among them with ``rng`` and nothing
    else. ``multi_view_share`` is the share of the *batches* that show all views, evenly spread: a mixed batch
    would pad its short rows to six views' length.
    """

    keys: Sequence[str]
    paths: Sequence[Path]
    draw: Callable[[int, random.Random], Sequence[Target]]
    multi_view_share: float = 1.0

    def __len__(self) -> int:
        return len(self.keys)


# ---- what a step sees


class Order:
    """Position in the training -> index of an image; an epoch is a permutation drawn from (seed, epoch)."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch, self.permutation = count, seed, -1, list[int]()

    def __call__(self, position: int) -> int:
        epoch, at = divmod(position, self.count)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, list(range(self.count))
            random.Random(row_seed(self.seed, "order", epoch)).shuffle(self.permutation)
        return self.permutation[at]


class Collator:
    """Positions -> a batch: reads and cuts the images, draws their targets, packs them by ``collate``."""

    def __init__(self, renderer: Renderer, images: TrainingImages, seed: int, batch_size: int):
        self.renderer, self.images, self.seed, self.batch_size = renderer, images, seed, batch_size
        self.order = Order(len(images), seed)
        self.branch = lru_cache(CACHED_BRANCHES)(renderer.branch_ids)  # questions come again and again
        self.cache: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self.room = CACHE_BYTES
        text = renderer.captioner.model.config.get_text_config()
        self.longest = text.max_position_embeddings

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, Any]:
        positions = [feature["position"] for feature in features]
        whole_only = not self._multi_view(positions[0] // self.batch_size)
        picked = [self.order(position) for position in positions]
        rows = [
            TrainRow(patches, grid, whole_only, [self.branch(t.text, t.answer, t.silent) for t in targets])
            for (patches, grid), targets in zip(
                self._patches(picked, whole_only), map(self._targets, picked, positions), strict=True
            )
        ]
        return self.pack(rows, positions, picked) | {"positions": torch.tensor(positions)}

    def pack(self, rows: list[TrainRow], positions: list[int], picked: list[int]) -> dict[str, Any]:
        """The model's arguments."""
        batch = collate(self.renderer, rows)
        reach = batch["position_ids"].amax(dim=(0, 2))
        if int(reach.max()) >= self.longest:
            raise DataError(
                f"a row reaches position {int(reach.max())}; the model ends at {self.longest}",
                where=self.images.keys[picked[int(reach.argmax())]],
                fix="shorten its caption, or use fewer or smaller views",
            )
        return batch

    def check_lengths(self) -> None:
        """Raise DataError, which counts and names them, for captions that do not fit behind their views.

        Only images whose text could be too long are opened.
        """
        renderer = self.renderer
        cells = (renderer.size // renderer.factor) ** 2  # of a view; it advances positions by less
        most = 64 + sum(cells + 2 + len(renderer.text_ids(tag)) for tag in renderer.tags())
        long = []
        for index, path in enumerate(self.images.paths):
            targets = self._targets(index, index)
            reach = max((len(self.branch(t.text, t.answer)[0]) for t in targets), default=0)
            if reach + most >= self.longest and reach + self._prefix_reach(path) > self.longest:
                long.append(self.images.keys[index])
        if long:
            raise DataError(
                f"{len(long)} of {len(self.images)} images have captions that do not fit: the model ends at "
                f"position {self.longest}",
                where=", ".join(long[:5]) + (", ..." if len(long) > 5 else ""),
                fix="shorten or leave out these captions, or use fewer or smaller views",
            )

    def _prefix_reach(self, path: Path) -> int:
        renderer = self.renderer
        grids = [
            [1, view.height // renderer.patch, view.width // renderer.patch]
            for view in renderer.plan(*self._open(path).size)
        ]
        return renderer.prefix(torch.tensor(grids), renderer.tags()).next_position

    def keys(self, positions: Sequence[int]) -> list[str]:
        return [self.images.keys[self.order(position)] for position in positions]

    def _multi_view(self, batch: int) -> bool:
        share = self.images.multi_view_share
        return int((batch + 1) * share) > int(batch * share)

    def _targets(self, index: int, position: int) -> Sequence[Target]:
        return self.images.draw(index, random.Random(row_seed(self.seed, "targets", position)))

    def _patches(self, picked: list[int], whole_only: bool) -> list[tuple[Tensor, Tensor]]:
        """uint8 patches and grid of each image; the first that are read stay in memory, up to CACHE_BYTES."""
        found = {i: self.cache[i, whole_only] for i in picked if (i, whole_only) in self.cache}
        missing = [i for i in dict.fromkeys(picked) if i not in found]
        cut = self.renderer.patches_batch([self._image(i) for i in missing], whole_only) if missing else []
        for index, entry in zip(missing, cut, strict=True):
            found[index] = entry
            if (size := entry[0].nbytes) <= self.room:
                self.cache[index, whole_only] = entry
                self.room -= size
        return [found[i] for i in picked]

    def _image(self, index: int) -> Any:
        return self._open(self.images.paths[index])

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return load_image(path)[0]
        except BadImage as error:
            fix = "remove or replace the image"
            raise DataError(str(error), where=str(path), fix=fix) from error


# ---- trainers


class _Trainer:
    """What all trainers share: our order, our checkpoints, the finite check; no telemetry, no model card."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: TrainerState
    args: TrainingArguments
    data_collator: Collator
    not_finite: type[CaptionerError] = RunError  # what a loss that is not finite raises

    def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(dataset)

    def _align_special_tokens(self) -> None:
        """The checkpoint's own settings stay."""

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """The export writes one."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        positions = inputs.pop("positions").tolist()
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise self.not_finite(
                f"loss {loss.item()}, gradient norm {norm.item()} at step {self.state.global_step + 1}",
                where=f"images {', '.join(self.data_collator.keys(positions))}",
                fix="lower the section's training.learning_rate, or leave these images out",
            )
        return loss

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        os.makedirs(output_dir, exist_ok=True)
        _save_trainable(self.model, Path(output_dir) / "trainable.safetensors")

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        _load_trainable(self.model, Path(checkpoint) / "trainable.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        tensors = sharding.gathered(
            (f"{i}.{name}", t) for i, entry in state["state"].items() for name, t in entry.items()
        )
        if not self.args.should_save:  # rank 0 alone writes
            return
        save_file(tensors, Path(output_dir) / "optimizer.safetensors")
        plain = {"groups": state["param_groups"], "schedule": self.lr_scheduler.state_dict()}
        (Path(output_dir) / "optimizer.json").write_text(json.dumps(plain))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state: dict[int, dict[str, Tensor]] = {}
        of = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in load_file(Path(checkpoint) / "optimizer.safetensors").items():
            index, _, field = name.partition(".")
            moment = tensor.ndim > 0  # and no count of steps
            state.setdefault(int(index), {})[field] = (
                sharding.spread(tensor, of[int(index)]) if moment else tensor
            )
        plain = json.loads((Path(checkpoint) / "optimizer.json").read_text())
        self.optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
        self.lr_scheduler.load_state_dict(plain["schedule"])

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        os.makedirs(output_dir, exist_ok=True)  # dropout differs between ranks: each has a file
        save_file(state, Path(output_dir) / f"rng-{self.args.process_index}.safetensors")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = Path(checkpoint) / f"rng-{self.args.process_index}.safetensors"
        if not file.exists():  # trained on fewer devices before
            return
        state = load_file(file)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


class _SFT(_Trainer, SFTTrainer):
    pass


class _Log(TrainerCallback):
    """metrics.jsonl, the progress bar, the validation loss at every checkpoint, and the early stop on it.

    With ``patience`` the trained parameters at the best validation loss are kept in ``best``.
    """

    trainer: Any  # both set when it is made: validation losses go to its trackers
    advance: Callable[[int], None]

    def __init__(self, out: Path, validate: Callable[[], float] | None = None, patience: int = 0):
        self.path, self.validate, self.patience = out / "metrics.jsonl", validate, patience
        self.best = out / "checkpoints" / "best.safetensors"
        self.last: dict[str, float] = {}
        self.validated: dict[int, float] = {}  # step -> validation loss

    def on_train_begin(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run writes the lines behind its checkpoint again."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        if is_main():
            atomic_write_text(self.path, "".join(line + "\n" for line in kept))
        for line in map(json.loads, kept):
            self.last |= line
            if "validation_loss" in line:
                self.validated[line["step"]] = line["validation_loss"]
        self.advance(state.global_step)
        if state.global_step:  # the process may have been killed between a checkpoint and its validation
            self._validate(state.global_step, control)

    def on_step_end(self, _args: Any, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.advance(1)

    def on_log(
        self, _args: Any, state: TrainerState, _control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" in logs or "validation_loss" in logs:  # the closing line repeats what the others say
            self.write(state.global_step, logs)

    def on_save(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._validate(state.global_step, control)

    def _validate(self, step: int, control: TrainerControl) -> None:
        if self.validate is None:
            return
        if step not in self.validated:
            loss = self.validated[step] = self.validate()
            trainer = self.trainer
            trainer.callback_handler.on_log(trainer.args, trainer.state, control, {"validation_loss": loss})
            if self.patience and loss == min(self.validated.values()):
                _save_trainable(trainer.model, self.best)
        best = min(self.validated, key=lambda at: self.validated[at])
        if self.patience and sum(at > best for at in self.validated) >= self.patience:
            control.should_training_stop = True

    def restore_best(self, model: torch.nn.Module) -> None:
        """Put the parameters of the best validation loss back."""
        if not self.patience or not is_main():
            return
        _load_trainable(model, self.best)
        best = min(self.validated, key=lambda at: self.validated[at])
        self.last |= {"validation_loss": self.validated[best], "best_step": best}

    def write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **{k: v for k, v in values.items() if k not in ("epoch", "num_tokens")}}
        self.last |= line
        if is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def train_sft(
    captioner: Captioner,
    renderer: Renderer,
    images: TrainingImages,
    training: TrainingConfig,
    out: Path,
    validation: TrainingImages | None = None,
    report: Callable[[str], None] = print,
    shard: bool = False,
) -> dict[str, float]:
    """Train what requires a gradient on the targets of ``images``; token-mean cross-entropy on the answers.

    With ``shard`` each of several processes holds a part of the weights and of AdamW's state; what comes out
    is on the CPU of rank 0.

    Writes ``out/metrics.jsonl`` and resumable checkpoints under ``out/checkpoints``, and resumes from the
    last whole one. Returns the last value of every metric. Raises RunError for a loss that is not finite
    (its batch is named), DataError for an image that cannot be read.
    """
    training = by_steps(training, len(images), world_size())
    collator = Collator(renderer, images, training.seed, training.per_device_train_batch_size)
    args = sft_arguments(captioner, training, out)
    validate = None
    if validation is not None:
        size = args.per_device_train_batch_size
        whole = training.per_device_train_batch_size
        validate = partial(validation_loss, captioner, renderer, validation, whole, size)
    elif training.early_stopping_patience:
        where, fix = "training.early_stopping_patience", "set sft.validation, or the patience to 0"
        raise ConfigError("An early stop needs a validation loss.", where=where, fix=fix)
    log = _Log(out, validate, training.early_stopping_patience)
    return _train(_SFT, captioner, collator, args, out, log, report, shard=shard and world_size() > 1)


def by_steps(training: TrainingConfig, images: int, processes: int) -> TrainingConfig:
    """The training of so many images in so many processes, its epochs as ``max_steps``."""
    if training.num_train_epochs is None:
        return training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    steps = max(1, math.ceil(training.num_train_epochs * images / batch))
    return training.model_copy(update={"max_steps": steps, "num_train_epochs": None})


def validation_loss(
    captioner: Captioner,
    renderer: Renderer,
    images: TrainingImages,
    batch_size: int,
    microbatch_size: int | None = None,
) -> float:
    """Cross-entropy per answer token over all images, each with the targets of its first draw.

    Where several processes train, each computes its share of the batches. TRL's fused head gives the losses:
    logits of every token over the whole vocabulary would need more memory than a training step.
    """
    if "forward" not in captioner.model.__dict__:  # no trainer is at work
        add_fused_lm_head(captioner.model)
        try:
            return validation_loss(captioner, renderer, images, batch_size, microbatch_size)
        finally:
            del captioner.model.forward
    collator = Collator(renderer, images, 0, batch_size)
    collator.order = lambda position: position  # type: ignore[assignment]
    total, tokens = 0.0, 0
    was_training = captioner.model.training
    captioner.model.eval()
    size = microbatch_size or batch_size
    for first in range(0, len(images), world_size() * size):
        start = first + rank() * size
        shown = range(start, min(start + size, len(images)))
        # sharded ranks run as many forwards as the others, the last of them for nothing
        batch = collator([{"position": i} for i in shown or (0,)])
        batch.pop("positions")
        count = int((batch["labels"][:, 1:] != IGNORED).sum()) if shown else 0
        with torch.no_grad():
            arguments = {name: tensor.to(captioner.device) for name, tensor in batch.items()}
            total += captioner.model(**arguments, fused_lm_head=True).loss.item() * count
        tokens += count
    captioner.model.train(was_training)
    total, all_tokens = distributed.add_up([total, tokens], captioner.device)
    return total / all_tokens


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _save_trainable(model: torch.nn.Module, file: Path) -> None:
    state = sharding.gathered(_trainable(model))
    if is_main():
        save_file(state, file)


def _load_trainable(model: torch.nn.Module, file: Path) -> None:
    stored = load_file(file)
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(sharding.spread(stored[name], parameter))


# ---- what trains


def tune(captioner: Captioner, tuning: Tuning, prompt: SoftPromptConfig | None, seed: int) -> None:
    """Set what trains: the whole model, or what is hung into a frozen one; a soft prompt if one is wanted.

    Raises ConfigError where nothing would train.
    """
    if isinstance(tuning, FullTuning):
        if getattr(captioner.model, "is_loaded_in_4bit", False):
            fix = "set --model.load_in_4bit false, or train adapters"
            raise ConfigError("Weights held in 4 bits cannot train.", where="sft.tuning.type", fix=fix)
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


def trainable_table(model: torch.nn.Module) -> str:
    """What trains, one line a module: parameters and their share."""
    lines = [f"  {module:52}{count:>12,}{share:>9.2%}" for module, count, share in describe_trainable(model)]
    return "\n".join(["trained parameters:", *lines])


# ---- one run of a trainer


def _train(
    kind: type[_Trainer],
    captioner: Captioner,
    collator: Collator,
    args: TrainingArguments,
    out: Path,
    log: _Log,
    report: Callable[[str], None],
    prepare: Callable[[Any, _Log, bool], None] = lambda _trainer, _log, _resumed: None,
    shard: bool = False,
) -> dict[str, float]:
    """``prepare`` sees the trainer before its first step, the log, and whether a checkpoint is there."""
    collator.check_lengths()
    last = _last_checkpoint(out / "checkpoints")
    begin = time.monotonic()
    device = captioner.device.type
    if shard:
        captioner.model.to("cpu")  # a device gets its part of it, layer by layer
    with _precise(captioner), progress("training", args.max_steps) as bar:
        with sharding.sharded(captioner, device, args.bf16) if shard else nullcontext():
            log.advance = bar.advance
            trainer = make_trainer(kind, captioner, collator, args, log)
            log.trainer = trainer
            _raise_precision(captioner.model)  # beside 4-bit weights TRL makes what trains bfloat16
            prepare(trainer, log, last is not None)
            if last:
                report(f"resuming from step {last.name.rpartition('-')[2]}")
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            steps = trainer.state.global_step
            # trainer and callbacks hold one another; AdamW's state must not wait for the collector
            del trainer, log.trainer
        log.restore_best(captioner.model)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return log.last | {"steps": steps, "seconds": time.monotonic() - begin}


def make_trainer(
    kind: type[_Trainer],
    captioner: Captioner,
    collator: Collator,
    args: TrainingArguments,
    *callbacks: TrainerCallback,
) -> Any:
    """The trainer, with as many positions to visit as its steps need.

    Of W ranks, rank r gets every W-th batch from the r-th on: what all see in a step is what one process
    sees with W times the accumulation.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs take a process each (--gpus), not torch's DataParallel
    if getattr(captioner.model, "is_loaded_in_4bit", False):
        captioner.model._hf_peft_config_loaded = True  # how transformers is told that adapters hang on 4 bits
    positions = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size
    trainer: Any = kind(  # type: ignore[call-arg]
        model=captioner.model,
        args=args,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"position": range(positions * args.world_size)}),
        processing_class=captioner.processor,
        callbacks=list(callbacks),
    )
    # the mean over the tokens of all batches of a step, however they are split
    trainer.model_accepts_loss_kwargs = issubclass(kind, SFTTrainer)
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl holds what it would print
    return trainer


def sft_arguments(captioner: Captioner, training: TrainingConfig, out: Path) -> SFTConfig:
    own = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(**own, **_arguments(captioner, training, out))


def _arguments(captioner: Captioner, training: TrainingConfig, out: Path) -> dict[str, Any]:
    """What both trainers are told: bfloat16 autocast on CUDA or for bfloat16 weights; what trains is float32.

    Raises ConfigError for a tracker that is not installed.
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
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": training.gradient_accumulation_steps * whole // micro,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(training.warmup_ratio * training.max_steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "seed": training.seed,
        "save_steps": training.save_steps,
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


@contextmanager
def _precise(captioner: Captioner) -> Iterator[None]:
    """While training, trained parameters are at least float32; after it TRL's patch of forward is undone.

    Raises RunError for frozen parameters in another number format than the model's: they would take the time
    and memory of float32 by accident.
    """
    patched = captioner.model.__dict__.get("forward")
    _check_precision(captioner.model)
    dtypes = {name: p.dtype for name, p in _trainable(captioner.model)}
    _raise_precision(captioner.model)
    try:
        yield
    finally:
        model = captioner.model  # another one where it was sharded
        for name, p in _trainable(model):
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


def _last_checkpoint(checkpoints: Path) -> Path | None:
    """The last whole checkpoint, None without one. That it is of this training is the stage's care."""
    folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for folder in reversed(folders):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
            return folder
        except (OSError, ValueError):
            shutil.rmtree(folder)  # the process was killed while it wrote this one
    return None
