"""Several processes for one training: ``--gpus N`` starts them; under torchrun or accelerate they are there.

Every process (rank) runs the whole command. Rank 0 alone prepares, writes and speaks; the others find what it
prepared and take their share of every step.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any, cast

import torch
from accelerate import PartialState

from captioner.errors import ConfigError, RunError
from captioner.runs import is_main, world_size

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
