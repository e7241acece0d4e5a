"""Servers as one pool: bounded, retried, out of rotation and back; a stand-in plays the servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from captioner.config import ServerConfig
from captioner.engines import NoAnswer, TextRequest
from captioner.engines.text import TextEngine
from captioner.errors import EngineError
from tests.http_stand_in import HANG, Reply, StandIn, chat, prompt_of, slowly


class Word(BaseModel):
    word: Literal["yes", "no"]


YES = json.dumps({"word": "yes"})


def config(*stand_ins: StandIn, **settings: Any) -> ServerConfig:
    urls = tuple(each.url for each in stand_ins)
    return ServerConfig(**{"urls": urls, "timeout": 5.0, "wait": 10.0, **settings})


def ask(settings: ServerConfig, count: int = 1) -> list[Word | NoAnswer]:
    engine = TextEngine(settings)
    try:
        return list(engine.complete((TextRequest(f"question {i}", 64) for i in range(count)), Word))
    finally:
        engine.close()


def test_answers_come_in_order_and_bounded() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        number = int(prompt_of(body).split()[-1])
        return slowly(json.dumps({"word": "yes" if number % 3 else "no"}), 0.03 * (number % 2))

    with StandIn(answer) as server:
        words = ask(config(server, in_flight=3), 20)
        assert [each.word for each in words] == ["yes" if i % 3 else "no" for i in range(20)]  # type: ignore[union-attr]
        assert 1 < server.most <= 3 and len(server.requests) == 20


def test_requests_are_pulled_as_needed() -> None:
    pulled = 0

    def requests() -> Iterator[TextRequest]:
        nonlocal pulled
        for i in range(100):
            pulled += 1
            yield TextRequest(f"question {i}", 64)

    with StandIn(lambda body: YES) as server:
        engine = TextEngine(config(server, in_flight=2))
        answers = engine.complete(requests(), Word)
        next(answers)
        assert pulled <= 5
        engine.close()


def test_work_is_spread() -> None:
    def slow(body: dict[str, Any]) -> Reply:
        return slowly(YES, 0.02)

    with StandIn(slow) as one, StandIn(slow) as two:
        ask(config(one, two, in_flight=2), 20)
        assert min(len(one.requests), len(two.requests)) >= 5


@pytest.mark.slow
def test_another_try_after_a_failure_and_no_more_than_allowed() -> None:
    replies: list[Reply] = [(503, b"busy"), (200, b"\xff\x00nonsense"), YES]
    with StandIn(lambda body: replies.pop(0) if "question" in prompt_of(body) else YES) as server:
        assert ask(config(server, retries=2)) == [Word(word="yes")]
    with StandIn(lambda body: (200, b"[]")) as server:
        [answer] = ask(config(server, retries=2))
        assert isinstance(answer, NoAnswer) and "not a JSON object" in answer.reason
        assert len(server.requests) == 3


def test_a_request_that_is_refused_is_not_repeated() -> None:
    with StandIn(lambda body: (400, b"too long")) as server:
        [answer] = ask(config(server))
        assert answer == NoAnswer("the server answers 400: too long") and len(server.requests) == 1


def test_a_wrong_key_or_name_stops_the_job() -> None:
    with StandIn(lambda body: (401, b"no key")) as server, pytest.raises(EngineError, match="401"):
        ask(config(server))
    with StandIn(lambda body: YES) as server, pytest.raises(EngineError, match="no server serves other"):
        ask(config(server, model="other"))


def test_a_stalled_server_leaves_the_rotation_and_comes_back() -> None:
    stalled = threading.Event()
    stalled.set()

    def sometimes(body: dict[str, Any]) -> Reply:
        return HANG if stalled.is_set() else YES

    with StandIn(sometimes) as bad, StandIn(lambda body: slowly(YES, 0.02)) as good:
        engine = TextEngine(config(bad, good, in_flight=2, timeout=0.5))
        words = list(engine.complete((TextRequest(f"q {i}", 64) for i in range(30)), Word))
        assert words == [Word(word="yes")] * 30
        questions = [body for body in bad.requests if "q " in prompt_of(body)]
        assert 1 <= len(questions) <= 2  # what was under way when it stalled, and nothing after
        stalled.clear()
        deadline = time.monotonic() + 20
        while len([b for b in bad.requests if "q " in prompt_of(b)]) < 5 and time.monotonic() < deadline:
            list(engine.complete([TextRequest(f"q {i}", 64) for i in range(8)], Word))
        assert len([b for b in bad.requests if "q " in prompt_of(b)]) >= 5
        engine.close()


def test_waits_for_a_server_that_is_started_again() -> None:
    first = StandIn(lambda body: YES)
    engine = TextEngine(config(first, in_flight=2))
    answers = engine.complete((TextRequest(f"q {i}", 64) for i in range(12)), Word)
    got = [next(answers) for _ in range(2)]
    first.close()
    again: list[StandIn] = []

    def restart() -> None:
        time.sleep(0.7)
        again.append(StandIn(lambda body: YES, port=first.port))

    thread = threading.Thread(target=restart)
    thread.start()
    got += list(answers)
    thread.join()
    assert got == [Word(word="yes")] * 12
    engine.close()
    again[0].close()


def test_gives_up_when_no_server_answers() -> None:
    gone = StandIn(lambda body: YES)
    gone.close()
    started = time.monotonic()
    with pytest.raises(EngineError, match="no server answered for 1 seconds"):
        ask(config(gone, wait=1.0))
    assert time.monotonic() - started < 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((200, chat("")), "empty answer"),
        ((200, chat('{"word": "yes"', "length")), "cut answer"),
        ((200, chat('{"word": "maybe"}')), "invalid answer"),
        ((200, chat("[" * 60_000)), "invalid answer"),
        ((200, chat('{"word": "yes", "x": "' + "x" * 1_000_000 + '"}')), "over-long answer"),
        ((200, b'{"choices": []}'), "without a choice"),
        ((200, b'{"choices": [7], "usage": 3}'), "without a choice"),
        ((200, b"[" * 100_000), "not a JSON object"),
    ],
)
def test_bad_answers_have_a_reason(reply: Reply, reason: str) -> None:
    with StandIn(lambda body: reply) as server:
        [answer] = ask(config(server, retries=1))
        assert isinstance(answer, NoAnswer) and reason in answer.reason and "2 tries" in answer.reason


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.engines.servers.MAX_BYTES", 10_000)
    with StandIn(lambda body: (200, b"x" * 100_000)) as server:
        [answer] = ask(config(server, retries=0))
        assert isinstance(answer, NoAnswer) and "over-long" in answer.reason


def test_the_key_is_sent_and_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    settings = ServerConfig()
    engine = TextEngine(settings)
    assert engine._servers._client.headers["Authorization"] == "Bearer sesame"
    assert "sesame" not in settings.model_dump_json()
    engine.close()
