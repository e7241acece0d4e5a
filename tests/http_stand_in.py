"""A small local HTTP server that speaks the OpenAI protocol as badly as a test asks it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes] | str  # status and body, or the text of a good answer
HANG = (0, b"")  # never answers


def chat(text: str, finish_reason: str = "stop") -> bytes:
    """The body of a well-formed chat completion that says ``text``."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}).encode()


class StandIn:
    """Answers a chat completion with ``answer(body)``; counts requests, and how many came at once."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply], port: int = 0, model: str = "stand-in"):
        self.answer, self.model = answer, model
        self.requests: list[dict[str, Any]] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": outer.model}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(body)
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    reply = outer.answer(body)
                finally:
                    with outer._lock:
                        outer._now -= 1
                if reply == HANG:
                    outer._over.wait(30)
                elif isinstance(reply, str):
                    self._send(200, chat(reply))
                else:
                    self._send(*reply)

            def _send(self, status: int, data: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has given up

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def prompt_of(body: dict[str, Any]) -> str:
    """The text of the one message."""
    return str(body["messages"][0]["content"])


def slowly(reply: Reply, seconds: float) -> Reply:
    time.sleep(seconds)
    return reply
