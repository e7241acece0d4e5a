"""The server engine where servers fail: one image never takes the others with it. A stand-in plays vLLM."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioner.config import EngineConfig, SamplingConfig, ViewsOverride
from captioner.engines import CaptionRequest, QuestionBatch
from captioner.engines.server import ServerEngine, served_name
from captioner.errors import CheckpointError, DataError, EngineError
from captioner.models import model
from captioner.sources.folder import read_captions
from loops import cli
from tests.http_stand_in import HANG, Reply, StandIn
from tests.tiny import tiny_checkpoint

GREEDY = SamplingConfig(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder)
    return folder


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8))


class Play:
    """What a server with this checkpoint would say: "red" to all, P(yes) from the length of the question."""

    def __init__(self, checkpoint: Path, **settings: Any):
        self.stand_in = StandIn(self.answer, model=served_name(checkpoint))
        config = EngineConfig(urls=(self.stand_in.url,), retries=1, timeout=5.0, wait=10.0, **settings)
        self.engine = ServerEngine(model.load_frontend(checkpoint), ViewsOverride(), config)
        self.poison: str | None = None  # the hash of a view that breaks the server
        self.reply: Reply = (500, b"broken")
        self.seen: set[str] = set()
        self.uploads = 0
        self.shift = 0  # tokens that the server adds to a prompt

    def poisoned(self, seed: int, reply: Reply) -> None:
        self.reply = reply
        self.poison = next(p["uuid"] for p in self.engine._show(image(seed), "all").parts if "uuid" in p)

    def answer(self, body: dict[str, Any]) -> Reply:
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            return "yes"
        pictures = [part for part in content if part["type"] == "image_url"]
        if self.poison in {part["uuid"] for part in pictures}:
            return self.reply
        for part in pictures:
            if part["image_url"] is None and part["uuid"] not in self.seen:
                return 400, b"Cache miss"
            self.uploads += part["image_url"] is not None
            self.seen.add(part["uuid"])
        renderer = self.engine.renderer
        text = content[-1]["text"]
        ids = self.engine._show(image(0), "all").ids + renderer.branch_ids(text)[0]
        said = [*renderer.text_ids("red"), renderer.end_id]
        rows: list[dict[str, Any]] = [{"logprob": -0.5} for _ in said]
        if "logprob_token_ids" in body:
            words = self.engine._words
            chances = {**dict.fromkeys(words.yes, 0.1), **dict.fromkeys(words.no, 0.01 * len(text))}
            rows = [{"logprob": -1.0, "top_logprobs": [
                {"token": f"token_id:{token}", "logprob": math.log(p)} for token, p in chances.items()
            ]}]  # fmt: skip
        choice = {"finish_reason": "stop", "token_ids": said, "logprobs": {"content": rows}}
        usage = {"prompt_tokens": len(ids) + self.shift, "completion_tokens": len(said)}
        return 200, json.dumps({"choices": [choice], "usage": usage, "prompt_token_ids": ids}).encode()

    def requests(self, count: int) -> list[CaptionRequest]:
        return [CaptionRequest(f"k{i}", image(i), f"{i:064x}") for i in range(count)]


def test_captions_and_answers(checkpoint: Path) -> None:
    play = Play(checkpoint)
    rows = list(play.engine.sample(play.requests(3), 2, GREEDY))
    assert [[(c.key, c.k, c.text, c.finish_reason, c.tokens) for c in row] for row in rows] == [
        [(f"k{i}", k, "red", "stop", len(play.engine.renderer.text_ids("red")) + 1) for k in range(2)]
        for i in range(3)
    ]
    assert all(c.mean_logprob == -0.5 for row in rows for c in row)
    assert play.uploads == 3 * 6  # the first request of an image carries its pixels, no other does
    [answers] = play.engine.p_yes([QuestionBatch(image(0), ["ring", "circles"])])
    yes, no = (len(ids) for ids in (play.engine._words.yes, play.engine._words.no))
    for question, answer in zip(("ring", "circles"), answers, strict=True):
        expected = 0.1 * yes / (0.1 * yes + 0.01 * len(question) * no)
        assert answer.p_yes == pytest.approx(expected, rel=1e-9)
    play.engine.close()


def test_pixels_that_are_forgotten_between_the_samples_of_an_image_cost_none(checkpoint: Path) -> None:
    """A server that was started anew refuses all of them at once, and each is sent again."""
    play = Play(checkpoint, in_flight=4)
    together = threading.Barrier(3)

    def forgetful(body: dict[str, Any]) -> Reply:
        content = body["messages"][0]["content"]
        if not isinstance(content, str) and any(part.get("image_url", 0) is None for part in content):
            together.wait(10)
            return 400, b"Cache miss"
        return play.answer(body)

    play.stand_in.answer = forgetful
    [row] = play.engine.sample(play.requests(1), 3, GREEDY)
    assert [candidate.text for candidate in row] == ["red"] * 3
    play.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("reply", [(500, b"broken"), (400, b"too long"), (200, b"{}"), HANG])
def test_one_image_that_breaks_the_server_is_one_failed_row(checkpoint: Path, reply: Reply) -> None:
    play = Play(checkpoint, in_flight=4)
    play.poisoned(2, reply)
    if reply == HANG:
        play.engine._servers.config = play.engine._servers.config.model_copy(update={"timeout": 1.0})
    rows = list(play.engine.sample(play.requests(6), 2, GREEDY))
    assert [row[0].key for row in rows] == [f"k{i}" for i in range(6)]
    assert [[c.error is None for c in row] for row in rows] == [[i != 2] * 2 for i in range(6)]
    assert all(c.text == "" and c.tokens == 0 for c in rows[2])
    answers = list(play.engine.p_yes([QuestionBatch(image(i), ["ring", "red"]) for i in (1, 2, 3)]))
    assert [[math.isnan(a.p_yes) for a in row] for row in answers] == [[False] * 2, [True] * 2, [False] * 2]
    play.engine.close()


def spoilt(body: bytes, **changes: Any) -> bytes:
    """A good answer with other values in its choice or, for `usage` and the like, beside it."""
    answer = json.loads(body)
    for name, value in changes.items():
        (answer if name in answer else answer["choices"][0])[name] = value
    return json.dumps(answer).encode()


def logprobs(value: Any) -> dict[str, Any]:
    top = [{"token": "token_id:1", "logprob": value}]
    return {"content": [{"logprob": value, "top_logprobs": top}] * 2}


BAD = [
    *(
        {"token_ids": ids}
        for ids in (["1", "2"], [1.5, 2.0], [-1, -2], [2**70, 1], [True, 1], "12", [[1], 2])
    ),
    *({"logprobs": logprobs(value)} for value in (math.nan, math.inf, 5.0, "0", None, 10**400, True)),
    {"logprobs": {"content": [1, 2]}},
    {"usage": {"prompt_tokens": -4}},
    {"usage": [1]},
    {"prompt_token_ids": ["a"]},
    {"finish_reason": {"a": 1}},
    {"finish_reason": "\x1b[31mred"},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", BAD, ids=str)
def test_an_answer_that_says_nonsense_is_a_failed_row(checkpoint: Path, changes: dict[str, Any]) -> None:
    """And no more: the engine lives, and the next image has its caption."""
    play = Play(checkpoint)
    answer = play.answer
    wrong = [True]

    def spoil(body: dict[str, Any]) -> Reply:
        status, data = answer(body)
        return (200, spoilt(data, **changes)) if wrong else (status, data)

    play.stand_in.answer = spoil
    [[candidate]] = play.engine.sample(play.requests(1), 1, GREEDY)
    assert candidate.error and candidate.error.isprintable() and len(candidate.error) < 200
    if "token_ids" not in changes and "finish_reason" not in changes:  # of which an answer has no need
        [[yes]] = play.engine.p_yes([QuestionBatch(image(0), ["ring"])])
        assert math.isnan(yes.p_yes)
    wrong.clear()
    [[candidate]] = play.engine.sample(play.requests(1), 1, GREEDY)
    assert candidate.text == "red"
    play.engine.close()


def test_errors_of_any_size_and_with_escapes_are_short_rows(checkpoint: Path) -> None:
    play = Play(checkpoint)
    body = b"\x1b[2J\x1b]0;title\x07 no such \x00 view " + b"x" * 10_000_000
    play.stand_in.answer = lambda _: (400, body)
    [[candidate]] = play.engine.sample(play.requests(1), 1, GREEDY)
    assert candidate.error and candidate.error.isprintable() and len(candidate.error) < 300
    assert "no such view" in candidate.error
    play.engine.close()


def test_a_failed_caption_is_a_row_with_its_reason(checkpoint: Path, tmp_path: Path) -> None:
    play = Play(checkpoint)
    play.poisoned(1, (400, b"too long"))
    (tmp_path / "in").mkdir()
    for i in range(3):
        image(i).save(tmp_path / "in" / f"k{i}.png")
    words = ["caption", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    words += ["--engine.type", "server", "--engine.urls", play.stand_in.url, "--max-failed", "1"]
    assert cli.main([*words, "--engine.retries", "1", "--caption.sampling.max_tokens", "8"]) == 0
    rows = list(read_captions(tmp_path / "out"))
    assert [row.caption for row in rows] == ["red", None, "red"]
    assert rows[1].error == "the server answers 400: too long"
    play.engine.close()


def test_another_number_of_tokens_stops_the_job(checkpoint: Path) -> None:
    play = Play(checkpoint)
    play.shift = 4
    with pytest.raises(EngineError, match="the server reads a prompt of"):
        list(play.engine.p_yes([QuestionBatch(image(0), ["ring"])]))
    play.engine.close()


def test_what_cannot_be_sent_is_told(checkpoint: Path) -> None:
    play = Play(checkpoint)
    with pytest.raises(DataError, match="no view 'middle'"):
        list(play.engine.p_yes([QuestionBatch(image(0), ["ring"], "middle")]))
    play.engine.close()
    captioner = model.load_frontend(checkpoint)
    with pytest.raises(EngineError, match="the caption prompt cannot be sent"):
        ServerEngine(captioner, ViewsOverride(), EngineConfig(), prompt="<|im_end|>")
    with pytest.raises(CheckpointError):
        model.load_frontend(checkpoint / "nowhere")
