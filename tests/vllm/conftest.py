"""A real vLLM: the interpreter that has it, and servers that `captioner serve` starts."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from captioner.models import fuse
from tests.test_fuse import adapted

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(REPO)}
START_SECONDS = 600.0  # where the machine is busy; 20 to 60 is usual


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = Path(os.environ.get("CAPTIONER_VLLM_PYTHON") or REPO / ".venv-vllm" / "bin" / "python")
    if not python.is_file():
        reason = f"no vLLM at {python}: build it with tests/vllm/install.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return str(python)


class Server:
    """`captioner serve` on a checkpoint, which can be killed and started again on the same port."""

    def __init__(self, python: str, checkpoint: Path, log: Path, *extra: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = log
        self.words = [
            *(sys.executable, "-c", "import sys; from loops.cli import main; sys.exit(main())"),
            *("serve", str(checkpoint), "--port", str(self.port), "--engine.vllm_python", python),
            *("--engine.max_num_seqs", "8", *extra),
        ]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.words, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **ENVIRONMENT}
            )
        late = threading.Timer(START_SECONDS, self.process.kill)
        late.start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving "):
                late.cancel()
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return
        raise AssertionError(f"{shlex.join(self.words)}\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """As a crash: nothing of it gets to say goodbye."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.kill()
        self.process.wait(60)

    def stop(self) -> int:
        """As a user does it; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny captioner with adapters in both towers and a soft prompt, fused."""
    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    fuse.export(adapted("qwen3_vl", torch.float32), folder)
    return folder


@contextmanager
def running(python: str, checkpoint: Path, home: Path) -> Iterator[Server]:
    server = Server(python, checkpoint, home / "server.log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(vllm_python: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(vllm_python, checkpoint, tmp_path_factory.mktemp("log")) as started:
        yield started
