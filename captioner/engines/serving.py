"""vLLM servers that are started here: their command, their start, their end."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from captioner.config import Config
from captioner.errors import EngineError, printable
from captioner.processes import guard

HOST = "127.0.0.1"
END_SECONDS = 30.0  # between asking a server to end and killing it
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(config: Config, checkpoint: Path, host: str, port: int) -> list[str]:
    """The words that start the server. Raises CheckpointError, ConfigError for what vLLM cannot serve."""
    from captioner.engines import vllm
    from captioner.engines.server import served_name
    from captioner.models import model
    from captioner.models.render import Renderer

    captioner = model.load_frontend(checkpoint)
    settings = vllm.settings(captioner, Renderer(captioner, config.views), config.engine, config.model.dtype)
    settings |= {
        "served_model_name": served_name(checkpoint),
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},  # no end of it
        "host": host,
        "port": port,
    }
    interpreter = config.engine.vllm_python or sys.executable
    # The module, not the `vllm` command: builds for a CPU have another distribution's name.
    return [interpreter, "-m", "vllm.entrypoints.openai.api_server", *_words(settings)]


def _words(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as flags; what is in a group has a dotted name, and a switch that is off has none."""
    words = []
    for name, value in settings.items():
        flag = f"{prefix}.{name}" if prefix else f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            words += _words(value, flag)
        elif isinstance(value, bool) and not prefix:
            words += [flag] if value else []
        else:
            words += [flag, str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def start(words: list[str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, with its messages in ``log`` where that is given.

    Raises EngineError where the interpreter does not start.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **inherited}
    try:
        return subprocess.Popen(
            words,
            env=environment,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
        )
    except OSError as error:
        raise EngineError(
            f"the interpreter does not start: {error.strerror}",
            where=words[0],
            fix="--engine.vllm_python names one that has vLLM",
        ) from error


def ended(server: subprocess.Popen[bytes], words: list[str], said: str = "") -> EngineError:
    """The error for a server that ended before it answered."""
    return EngineError(
        f"the server ended with code {server.returncode} before it answered{said}",
        where=shlex.join(words),
        fix="see its messages above; --engine.vllm_python names an interpreter that has vLLM",
    )


def url_of(host: str, port: int) -> str:
    return f"http://{host}:{port}/v1"


def reached(host: str) -> str:
    return HOST if host == "0.0.0.0" else host


def healthy(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{reached(host)}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Served:
    """A server for one checkpoint that ends with :meth:`close`, and when this process is gone.

    Raises EngineError where it ends, or does not answer within ``engine.wait`` seconds.
    """

    def __init__(self, checkpoint: Path, config: Config):
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = free.getsockname()[1]
        self.url = url_of(HOST, port)
        words = command(config, checkpoint, HOST, port)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (until the server ends)
        self._process = start(words, self._log)
        self._guard = guard()
        deadline = time.monotonic() + config.engine.wait
        while not healthy(HOST, port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()  # a late one ends by a signal
                raise ended(self._process, words, f":\n{self._said()}")
            time.sleep(0.2)

    def _said(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(printable(line)[:200] for line in lines[-20:])

    def close(self) -> None:
        """End the server with all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # the second for what the server left behind
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        self._guard.kill()
        self._guard.wait()
