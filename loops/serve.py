"""captioner serve CHECKPOINT: start a vLLM server with the right flags for a captioner.

The server offers the checkpoint under a name made of its hash; `--engine.type server` looks for that name, so
no other checkpoint is taken for it. Runs until it is stopped; SIGINT and SIGTERM go on to the server.
"""

from __future__ import annotations

import argparse
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

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="captioner to serve; a directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")


def plan(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    return {"starts": shlex.join(command(config, args)), "at": _url(args), "writes": "nothing"}


def run(config: Config, args: argparse.Namespace) -> int:
    """Serve until the server ends; raises EngineError where it ends before it answers."""
    words = command(config, args)
    _check_free(args)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    # A session of its own: a Ctrl-C then reaches the server once, through us.
    try:
        server = subprocess.Popen(words, env=environment, start_new_session=True)
    except OSError as error:
        raise EngineError(
            f"the interpreter does not start: {error.strerror}",
            where=words[0],
            mend="--engine.vllm_python names one that has vLLM",
        ) from error
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        server.send_signal(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        while server.poll() is None and not stopped and not _healthy(args):
            time.sleep(0.5)
        if server.poll() is None and not stopped:
            name = words[words.index("--served-model-name") + 1]
            print(f"serving {args.checkpoint} as {name}: {_url(args)}", flush=True)
        elif not stopped:
            raise EngineError(
                f"the server ended with code {server.returncode} before it answered",
                where=shlex.join(words),
                mend="see its messages above; --engine.vllm_python names an interpreter that has vLLM",
            )
        code = server.wait()
        return 0 if stopped else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if server.poll() is None:
            server.terminate()
            server.wait()


def command(config: Config, args: argparse.Namespace) -> list[str]:
    """The words that start the server. Raises CheckpointError, ConfigError for what vLLM cannot serve."""
    from captioner.engines import vllm
    from captioner.engines.server import served_name
    from captioner.models import model
    from captioner.models.render import Renderer

    checkpoint = model.checkpoint_path(args.checkpoint)
    captioner = model.load_frontend(checkpoint)
    settings = vllm.settings(captioner, Renderer(captioner, config.views), config.engine, config.model.dtype)
    settings |= {
        "served_model_name": served_name(checkpoint),
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},  # no end of it
        "host": args.host,
        "port": args.port,
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


def _url(args: argparse.Namespace) -> str:
    return f"http://{args.host}:{args.port}/v1"


def _check_free(args: argparse.Namespace) -> None:
    """Raise EngineError where something listens on the port already: its health would pass for ours."""
    try:
        socket.create_connection((_host(args), args.port), timeout=2).close()
    except OSError:
        return
    raise EngineError(
        "the port is taken", where=_url(args), mend="name another --port, or stop what is there"
    )


def _host(args: argparse.Namespace) -> str:
    return "127.0.0.1" if args.host == "0.0.0.0" else str(args.host)


def _healthy(args: argparse.Namespace) -> bool:
    try:
        with urllib.request.urlopen(f"http://{_host(args)}:{args.port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
