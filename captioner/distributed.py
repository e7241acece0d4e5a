"""Several processes for one training: ``--gpus N`` starts them; under torchrun or accelerate they are there.

Every process (rank) runs the whole command. Rank 0 alone prepares, writes and speaks; the others find what it
prepared and take their share of every step.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from captioner.errors import ConfigError, RunError
from captioner.runs import is_main, world_size

if TYPE_CHECKING:
    from captioner.model import Captioner

POLL_S = 0.1
GRACE_S = 5.0  # between asking a process to end and killing it
CONSEQUENCE_S = 3.0  # a crash that follows from another rank's waits this long before it speaks


def launch(count: int, device: str) -> int:
    """Run this process's command in ``count`` processes, one per GPU (``device`` "cpu": all on the CPU).

    When one of them fails all are stopped. Returns 0, or the exit code of a rank whose message is passed on.
    Raises ConfigError where there are fewer GPUs, RunError where a rank was killed.
    """
    if device != "cpu" and (found := torch.cuda.device_count()) < count:
        mend = f"--gpus {found}" if found else "leave it out, or --model.device cpu for processes on the CPU"
        raise ConfigError(f"--gpus {count}, and there are {found}", mend=mend)
    code = "import sys; from loops.cli import main; sys.exit(main(sys.argv[1:]))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    world |= {"LOCAL_WORLD_SIZE": str(count)}
    world |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # a batch of questions alone leaves the soft prompt unused
    ranks: list[subprocess.Popen[bytes]] = []
    said: list[IO[bytes]] = []
    try:
        for number in range(count):
            said.append(tempfile.TemporaryFile())  # noqa: SIM115 (until all ended)
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said[number]} if number else {}
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            command = [sys.executable, "-c", code, *sys.argv[1:]]
            ranks.append(subprocess.Popen(command, env={**os.environ, **world, **own}, **quiet))
        failed = _first_failure(ranks)
    finally:
        _stop(ranks)
    if failed is None:
        return 0
    status = ranks[failed].returncode
    if status < 0:
        raise RunError(
            f"rank {failed} of {count} was killed by signal {-status}; the others were stopped",
            mend="the same command goes on from the last checkpoint",
        )
    if failed:
        said[failed].seek(0)
        sys.stderr.write(said[failed].read().decode(errors="replace"))
    return status


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all, or for the first that fails; its number."""
    while True:
        states = [process.poll() for process in ranks]
        if failed := [number for number, state in enumerate(states) if state]:
            return failed[0]
        if all(state == 0 for state in states):
            return None
        time.sleep(POLL_S)


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def main_first(device: str) -> Generator[None, None, None]:
    """Rank 0 runs the body before the others do, so that they find what it prepared.

    From here on the others are silent, but for how they end.
    """
    if world_size() == 1:
        yield
        return
    # what trains decides, not the launcher: transformers would load the weights on rank 0 alone
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    sys.excepthook = _wait_for_the_cause
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    with state.main_process_first():
        yield


def _wait_for_the_cause(*error: Any) -> None:
    """A lost connection is mostly another rank's failure: the launcher tells that and ends this process."""
    time.sleep(CONSEQUENCE_S)
    sys.__excepthook__(*error)


def add_up(values: list[float], device: Any) -> list[float]:
    """The sums of the values over all ranks."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return cast(list[float], total.tolist())


# ---- weights in parts (FSDP, Zhao et al. 2023, arXiv 2304.11277)


@contextmanager
def sharded(captioner: Captioner, device: str, bfloat16: bool) -> Generator[None, None, None]:
    """In the body each rank holds a part of every parameter; a layer is whole only while it runs.

    ``device`` is the kind of device to train on; the model may be on the CPU. Computes in ``bfloat16`` where
    asked. After it rank 0 has the whole model on the CPU, the others one without weights.
    """
    model = captioner.model
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    whole = copy.deepcopy(model, empty)  # nothing takes the sharding off a model again
    mesh = init_device_mesh(device, (world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if bfloat16 else MixedPrecisionPolicy()
    for part in (*captioner.layers["vision"], *captioner.layers["language"], model):
        # the root, too, after a forward: `parameters()` gives the parts whenever it is asked
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # accelerate would wrap it for DDP; its own FSDP does not run on the CPU
    model._is_accelerate_prepared = True
    yield
    state = gathered(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if is_main():
            torch.utils.swap_tensors(parameter, nn.Parameter(state[name], parameter.requires_grad))
    captioner.model = whole


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name; what is sharded is whole on rank 0, in its memory, and empty on the others.

    All ranks have to ask.
    """
    found = {}
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor().detach()
            found[name] = full.cpu() if is_main() else full.new_empty(0)
        else:
            found[name] = tensor.detach()
    return found


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, sharded as ``like`` is if it is."""
    if not isinstance(like, DTensor):
        return tensor
    on = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(on, like.device_mesh, like.placements, src_data_rank=None)
