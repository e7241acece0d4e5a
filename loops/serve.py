"""captioner serve CHECKPOINT: start a vLLM server with the right flags for a captioner.

The server offers the checkpoint under a name made of its hash; `--engine.type server` looks for that name, so
no other checkpoint is taken for it. Runs until it is stopped; SIGINT and SIGTERM go on to the server.
"""

from __future__ import annotations

import shlex
import signal
import socket
import time

from captioner.config import Config
from captioner.engines import serving
from captioner.errors import EngineError
from captioner.runs import Run, RunDir, checkpoint_path
from loops.stages import StagePlan

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def plan(run: Run, checkpoint: str, host: str = "127.0.0.1", port: int = 8000) -> list[StagePlan]:
    """What is read, and the command that is started."""
    starts = shlex.join(serving.command(run.config, checkpoint_path(checkpoint), host, port))
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
    words = serving.command(config, checkpoint_path(checkpoint), host, port)
    _check_free(host, port)
    server = serving.start(words)  # a session of its own: a Ctrl-C then reaches it once, through us
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        server.send_signal(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        while server.poll() is None and not stopped and not serving.healthy(host, port):
            time.sleep(0.5)
        if server.poll() is None and not stopped:
            name = words[words.index("--served-model-name") + 1]
            print(f"serving {checkpoint} as {name}: {serving.url_of(host, port)}", flush=True)
        elif not stopped:
            raise serving.ended(server, words)
        code = server.wait()
        return 0 if stopped else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if server.poll() is None:
            server.terminate()
            server.wait()


def _check_free(host: str, port: int) -> None:
    """Raise EngineError where something listens on the port already: its health would pass for ours."""
    try:
        socket.create_connection((serving.reached(host), port), timeout=2).close()
    except OSError:
        return
    raise EngineError(
        "the port is taken",
        where=serving.url_of(host, port),
        fix="name another --port, or stop what is there",
    )
