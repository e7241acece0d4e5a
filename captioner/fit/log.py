"""What a training says of itself: metrics.jsonl, the progress bar and validation losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from captioner.files import atomic_write_text
from captioner.fit import distributed
from captioner.fit.batches import Collator
from captioner.fit.checkpoints import load_trainable, save_trainable
from captioner.fit.examples import TrainingImages
from captioner.models.render import IGNORED, Renderer
from captioner.processes import is_main, rank, world_size


class Log(TrainerCallback):
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
                save_trainable(trainer.model, self.best)
        best = min(self.validated, key=lambda at: self.validated[at])
        if self.patience and sum(at > best for at in self.validated) >= self.patience:
            control.should_training_stop = True

    def restore_best(self, model: torch.nn.Module) -> None:
        """Put the parameters of the best validation loss back."""
        if not self.patience or not is_main():
            return
        load_trainable(model, self.best)
        best = min(self.validated, key=lambda at: self.validated[at])
        self.last |= {"validation_loss": self.validated[best], "best_step": best}

    def write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **{k: v for k, v in values.items() if k not in ("epoch", "num_tokens")}}
        self.last |= line
        if is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def validation_loss(
    renderer: Renderer,
    images: TrainingImages,
    batch_size: int,
    microbatch_size: int | None = None,
) -> float:
    """Cross-entropy per answer token over all images, each with the targets of its first draw.

    Where several processes train, each computes its share of the batches. The fused head that TRL's trainer
    has set gives the losses: logits of every token would need more memory than a training step.
    """
    captioner = renderer.captioner
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
    losses, counts = zip(*distributed.collect([(total, tokens)], captioner.device), strict=True)
    return sum(losses) / sum(counts)
