"""Several processes for one command: ``--gpus N`` starts them; under torchrun or accelerate they are there.

Every process (rank) runs the whole command. Rank 0 alone prepares, writes and speaks; the others find what it
prepared and take their share: of every step of a training, of the shards that an engine fills. torch is
imported where it is needed: a command in one process does not wait for it here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, TypeVar

from captioner.config import Config
from captioner.errors import CaptionerError, ConfigError, CrashedError, Refused, RunError
from captioner.processes import is_main, rank, world_size
from captioner.runs import Run, RunDir

T = TypeVar("T")
POLL_S = 0.1
GRACE_S = 5.0  # between asking a process to end and killing it
CONSEQUENCE_S = 3.0  # a crash that follows from another rank's waits this long before it speaks
PATIENCE = timedelta(days=7)  # between the first rank that has filled its shards and the last


def wanted(gpus: int) -> bool:
    """Whether this process is the one that starts the processes of ``--gpus N``."""
    return gpus > 1 and world_size() == 1


def launch(command: str, run: RunDir, config: Config, count: int, **flags: Any) -> None:
    """Run a command in ``count`` processes, one per GPU (``model.device`` "cpu": all on the CPU).

    ``flags`` are the command's own arguments. When one process fails all are stopped, its message is passed
    on to stderr and an error with its exit code is raised: Refused for 3, else RunError. Raises ConfigError
    where there are fewer GPUs, RunError where a process was killed.
    """
    import torch

    on_cpu = config.model.device == "cpu"
    if not on_cpu and (found := torch.cuda.device_count()) < count:
        fix = f"--gpus {found}" if found else "leave it out, or --model.device cpu for processes on the CPU"
        raise ConfigError(f"--gpus {count}, and there are {found}", fix=fix)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    world |= {
        "LOCAL_WORLD_SIZE": str(count),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # a batch of questions alone leaves the soft prompt unused
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        world |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    place = str(Run.path_of(run))
    told = {"command": command, "run": place, "config": config.model_dump(mode="json"), "flags": flags}
    job = json.dumps(told).encode()
    ranks: list[subprocess.Popen[bytes]] = []
    said: list[IO[bytes]] = []
    try:
        for number in range(count):
            said.append(tempfile.TemporaryFile())  # noqa: SIM115 (until all ended)
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": said[number]} if number else {}
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            code = "import sys; from loops.cli import rank; sys.exit(rank())"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **world, **own},
                stdin=subprocess.PIPE,
                **quiet,
            )
            ranks.append(process)
            assert process.stdin
            process.stdin.write(job)
            process.stdin.close()
        failed = _first_failure(ranks)
    finally:
        _stop(ranks)
    if failed is None:
        return
    status = ranks[failed].returncode
    if status < 0:
        raise RunError(
            f"rank {failed} of {count} was killed by signal {-status}; the others were stopped",
            fix="the same command goes on from the last checkpoint",
        )
    if failed:
        said[failed].seek(0)
        sys.stderr.write(said[failed].read().decode(errors="replace"))
    raise ended(status)(f"captioner {command} ended with exit code {status}: see the message above")


def ended(status: int) -> type[CaptionerError]:
    """The error that stands for the exit code of another process."""
    return {2: RunError, 3: Refused}.get(status, CrashedError)


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
    import torch
    from accelerate import PartialState

    # what trains decides, not the launcher: transformers would load the weights on rank 0 alone
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    sys.excepthook = _wait_for_the_cause
    if not is_main() and sys.stdout is sys.__stdout__:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    with state.main_process_first():
        yield


def leave() -> None:
    """Wait for the other ranks, then part: one that ends before them tears down what they still use."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _wait_for_the_cause(*error: Any) -> None:
    """A lost connection is mostly another rank's failure: the launcher tells that and ends this process."""
    time.sleep(CONSEQUENCE_S)
    sys.__excepthook__(*error)


def share_out(items: Sequence[T]) -> list[T]:
    """What of ``items``, the same on all ranks, is this rank's."""
    return list(items[rank() :: world_size()])


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def collect(values: Sequence[Any], device: Any) -> list[Any]:
    """The values of all ranks, as JSON has them, one rank's behind the other's; the same on every rank."""
    if world_size() == 1:
        return list(values)
    import torch
    from accelerate.utils import gather, pad_across_processes

    text = torch.tensor(list(json.dumps(list(values)).encode()), dtype=torch.uint8, device=device)
    sizes = gather(torch.tensor([len(text)], device=device)).tolist()
    rows = gather(pad_across_processes(text)[None])
    return [
        value
        for row, size in zip(rows, sizes, strict=True)
        for value in json.loads(bytes(row[:size].tolist()))
    ]
