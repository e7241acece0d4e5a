"""A small local HTTP server that speaks the OpenAI protocol as badly as a test asks it to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

Reply = tuple[int, bytes] | str  # status and body, or the text of a good answer
HANG = (0, b"")  # never answers


def chat(text: str, finish_reason: str = "stop") -> bytes:
    """The body of a well-formed chat completion that says ``text``."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}).encode()


class StandIn:
    """Answers a chat completion with ``answer(body)``; counts requests, and how many came at once."""

    def __init__(
        self, answer: Callable[[dict[str, Any]], Reply], port: int = 0, model: str = "stand-in", *others: str
    ):
        self.answer, self.models = answer, (model, *others)
        self.requests: list[dict[str, Any]] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": name} for name in outer.models]}).encode())

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


Speak = Callable[[str, str], str]  # (name of a captioner, key of an image) -> its caption
Judge = Callable[[str, str, str], float]  # (name of a verifier, key of an image, question) -> P(yes)


class Vllm:
    """Plays a vLLM server with several checkpoints: what each says of each image comes from the test.

    ``checkpoints`` maps names to directories, all with the tokenizer and views of the first; images are told
    apart by the pixels of their views, as vLLM tells them apart.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Path],
        images: Mapping[str, Path],
        speak: Speak,
        p_yes: Judge = lambda name, key, question: 0.5,
    ):
        from captioner.config import EngineConfig, ViewsOverride
        from captioner.engines.server import ServerEngine, served_name
        from captioner.models import model

        self.speak, self.p_yes = speak, p_yes
        self.names = {served_name(path): name for name, path in checkpoints.items()}
        frontend = model.load_frontend(next(iter(checkpoints.values())))
        self._engine = ServerEngine(frontend, ViewsOverride(), EngineConfig())
        self._keys: dict[str, tuple[str, list[int]]] = {}  # hash of the first view -> key, prompt ids
        for key, path in images.items():
            with Image.open(path) as image:
                shown = self._engine._show(image.convert("RGB"), "all")
            first = next(part["uuid"] for part in shown.parts if "uuid" in part)
            self._keys[first] = key, shown.ids
        self._stand_in = StandIn(self._answer, 0, *self.names)
        self.url, self.requests = self._stand_in.url, self._stand_in.requests

    def _answer(self, body: dict[str, Any]) -> Reply:
        content, name = body["messages"][0]["content"], self.names[body["model"]]
        if isinstance(content, str):  # a probe
            return "yes"
        key, shown = self._keys[next(part["uuid"] for part in content if "uuid" in part)]
        text, renderer = content[-1]["text"], self._engine.renderer
        ids = shown + renderer.branch_ids(text)[0]
        if "logprob_token_ids" in body:
            words, p = self._engine._words, self.p_yes(name, key, text)
            chances = {token: p / len(words.yes) for token in words.yes}
            chances |= {token: (1 - p) / len(words.no) for token in words.no}
            said = [renderer.end_id]
            top = [
                {"token": f"token_id:{token}", "logprob": math.log(max(chances.get(token, 0.0), 1e-9))}
                for token in body["logprob_token_ids"]
            ]
            rows: list[dict[str, Any]] = [{"logprob": -1.0, "top_logprobs": top}]
        else:
            said = [*renderer.text_ids(self.speak(name, key)), renderer.end_id]
            rows = [{"logprob": -0.5} for _ in said]
        choice = {"finish_reason": "stop", "token_ids": said, "logprobs": {"content": rows}}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(said)}
        return 200, json.dumps({"choices": [choice], "usage": usage, "prompt_token_ids": ids}).encode()

    def close(self) -> None:
        self._stand_in.close()
        self._engine.close()
