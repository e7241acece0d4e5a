"""captioner serve CHECKPOINT: start a vLLM server with the right flags for a captioner.

The server offers the checkpoint under a name made of its hash; `--engine.type server` looks for that name, so
no other checkpoint is taken for it. Runs until it is stopped; SIGINT and SIGTERM go on to the server.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from captioner.config import Config
from captioner.errors import EngineError
from captioner.runs import Run, RunDir, checkpoint_path
from loops.stages import StagePlan

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def plan(run: Run, checkpoint: str, host: str = "127.0.0.1", port: int = 8000) -> list[StagePlan]:
    """What is read, and the command that is started."""
    starts = shlex.join(command(run.config, checkpoint, host, port))
    return [StagePlan("", {"checkpoint": checkpoint_path(checkpoint)}, starts=starts)]


def serve(run: RunDir, config: Config, checkpoint: str, *, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Serve a captioner until the server ends; returns the server's exit code, 0 where it was stopped.

    Args:
        run: Not read.
        config: Settings; `model`, `views` and `engine` are read.
        checkpoint: Directory of the captioner to serve.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        EngineError: the port is taken, or the server ends before it answers.
    """
    words = command(config, checkpoint, host, port)
    _check_free(host, port)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    # A session of its own: a Ctrl-C then reaches the server once, through us.
    try:
        server = subprocess.Popen(words, env=environment, start_new_session=True)
    except OSError as error:
        raise EngineError(
            f"the interpreter does not start: {error.strerror}",
            where=words[0],
            fix="--engine.vllm_python names one that has vLLM",
        ) from error
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        server.send_signal(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        while server.poll() is None and not stopped and not _healthy(host, port):
            time.sleep(0.5)
        if server.poll() is None and not stopped:
            name = words[words.index("--served-model-name") + 1]
            print(f"serving {checkpoint} as {name}: {_url(host, port)}", flush=True)
        elif not stopped:
            raise EngineError(
                f"the server ended with code {server.returncode} before it answered",
                where=shlex.join(words),
                fix="see its messages above; --engine.vllm_python names an interpreter that has vLLM",
            )
        code = server.wait()
        return 0 if stopped else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if server.poll() is None:
            server.terminate()
            server.wait()


def command(config: Config, checkpoint: str, host: str, port: int) -> list[str]:
    """The words that start the server. Raises CheckpointError, ConfigError for what vLLM cannot serve."""
    from captioner.engines import vllm
    from captioner.engines.server import served_name
    from captioner.models import model
    from captioner.models.render import Renderer

    folder = checkpoint_path(checkpoint)
    captioner = model.load_frontend(folder)
    settings = vllm.settings(captioner, Renderer(captioner, config.views), config.engine, config.model.dtype)
    settings |= {
        "served_model_name": served_name(folder),
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


def _url(host: str, port: int) -> str:
    return f"http://{host}:{port}/v1"


def _check_free(host: str, port: int) -> None:
    """Raise EngineError where something listens on the port already: its health would pass for ours."""
    try:
        socket.create_connection((_reached(host), port), timeout=2).close()
    except OSError:
        return
    raise EngineError(
        "the port is taken", where=_url(host, port), fix="name another --port, or stop what is there"
    )


def _reached(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def _healthy(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{_reached(host)}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
