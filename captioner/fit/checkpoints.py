"""Resumable checkpoints of a training: what trains and the optimizer's state, as safetensors and JSON.

transformers would pickle the optimizer and the generators' state and write the frozen base each time, and no
setting says otherwise: so the trainers' methods that write and read them are overridden here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captioner.fit import sharding
from captioner.processes import is_main

WEIGHTS, OPTIMIZER, PLAIN = "trainable.safetensors", "optimizer.safetensors", "optimizer.json"


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def save_trainable(model: nn.Module, file: Path) -> None:
    """Rank 0 writes; all have to call it."""
    state = sharding.gathered(trainable(model))
    if is_main():
        save_file(state, file)


def load_trainable(model: nn.Module, file: Path) -> None:
    stored = load_file(file)
    with torch.no_grad():
        for name, parameter in trainable(model):
            parameter.copy_(sharding.spread(stored[name], parameter))


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of the training in ``out``; torn ones behind it are removed.

    That it is of this training is the stage's care.
    """
    folders = (out / "checkpoints").glob("checkpoint-*")
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
            return folder
        except (OSError, ValueError):
            shutil.rmtree(folder)  # the process was killed while it wrote this one
    return None


class Checkpoints:
    """A part of a trainer of transformers: see above for why it overrides private methods."""

    def save_model(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_trainable(self.model, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self: Any, checkpoint: str, model: Any = None) -> None:
        load_trainable(self.model, Path(checkpoint) / WEIGHTS)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        tensors = sharding.gathered(
            (f"{i}.{name}", t) for i, entry in state["state"].items() for name, t in entry.items()
        )
        if not self.args.should_save:  # rank 0 alone writes
            return
        save_file(tensors, Path(output_dir) / OPTIMIZER)
        plain = {"groups": state["param_groups"], "schedule": self.lr_scheduler.state_dict()}
        (Path(output_dir) / PLAIN).write_text(json.dumps(plain))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state: dict[int, dict[str, Tensor]] = {}
        of = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in load_file(Path(checkpoint) / OPTIMIZER).items():
            index, _, field = name.partition(".")
            moment = tensor.ndim > 0  # and no count of steps
            state.setdefault(int(index), {})[field] = (
                sharding.spread(tensor, of[int(index)]) if moment else tensor
            )
        plain = json.loads((Path(checkpoint) / PLAIN).read_text())
        self.optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
        self.lr_scheduler.load_state_dict(plain["schedule"])

    def _save_rng_state(self: Any, output_dir: str) -> None:
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        os.makedirs(output_dir, exist_ok=True)  # dropout differs between ranks: each has a file
        save_file(state, Path(output_dir) / f"rng-{self.args.process_index}.safetensors")

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = Path(checkpoint) / f"rng-{self.args.process_index}.safetensors"
        if not file.exists():  # trained on fewer devices before
            return
        state = load_file(file)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
