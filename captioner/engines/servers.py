"""Several servers that speak the OpenAI protocol, used as one: bounded, retried, the dead left out.

A server that fails is out of rotation until it answers a probe. A request is tried a bounded number of times,
each on the least loaded server that is up; while none is up it waits. What a server sends is read with limits
on size and time and is no more than a JSON object afterwards: whoever asked checks the rest.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from captioner.config import ServerConfig
from captioner.errors import EngineError, masked, printable

T = TypeVar("T")
R = TypeVar("R")
MAX_BYTES = 1 << 24  # of an answer
MAX_ERROR = 1 << 16  # bytes of an answer that is none: its beginning is read
PROBE_SECONDS = 30.0  # for a probe to be answered, if `timeout` is not shorter
LONGEST_PAUSE = 10.0  # seconds between two tries or probes; it doubles from 0.2
FATAL = (401, 402, 403, 404)  # the fault is in the settings: another try gives the same


class Unanswered(Exception):
    """A request that got no good answer in all its tries; the message is the reason."""


class Rejected(Unanswered):
    """The server refuses the request itself (status 4xx); another try gives the same."""


class Server:
    """One base address and what is known of it."""

    def __init__(self, url: str, slots: int):
        self.url = url.rstrip("/")
        self.slots = asyncio.Semaphore(slots)
        self.load = 0  # requests under way and waiting for a slot
        self.up = False
        self.was_up = False
        self.model = ""  # what its requests name
        self.reason = "not asked yet"  # why it is not up
        self.strange = False  # it answers, but serves another model
        self.probing: asyncio.Task[None] | None = None


class Servers:
    """The servers of a config section. ``model`` must be among those a server lists; None = its first.

    Runs an event loop in a thread of its own, so that plain iterators can be given out.
    """

    def __init__(self, config: ServerConfig, model: str | None = None):
        self.config, self.wanted = config, config.model or model
        self.tokens = 0  # generated up to now
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=10.0),  # the whole of a request has one limit, see _send
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._loop = asyncio.new_event_loop()
        self._servers = [Server(url, config.in_flight) for url in dict.fromkeys(config.urls)]
        self._change = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """Requests that all servers together work on at the same time."""
        return self.config.in_flight * len(self._servers)

    def model(self) -> str:
        """The model that requests name; waits for a server where only it can tell."""
        if self.wanted is not None:
            return self.wanted
        return asyncio.run_coroutine_threadsafe(self._pick(None, None), self._loop).result().model

    def close(self) -> None:
        """End everything under way."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def map(self, work: Callable[[T], Awaitable[R]], items: Iterable[T], ahead: int) -> Iterator[R]:
        """``work`` of every item, in order; items are pulled as needed, at most ``ahead`` before a result."""
        under_way: deque[Future[R]] = deque()

        async def one(item: T) -> R:
            return await work(item)

        try:
            for item in items:
                under_way.append(asyncio.run_coroutine_threadsafe(one(item), self._loop))
                if len(under_way) >= ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    async def ask(
        self,
        body: Callable[[Server, int], dict[str, Any]],
        read: Callable[[dict[str, Any]], R],
        prefer: Server | None = None,
    ) -> tuple[R, Server]:
        """The answer to a chat completion as ``read`` understands it, and the server that gave it.

        ``body`` makes the request for a server, given how many answers to it were no good: tries that a dying
        server cost do not count, or its death would change what is asked. ``read`` raises :class:`Unanswered`
        for an unusable answer, which is tried again like a server's failure.
        Raises :class:`Unanswered` after the last try, EngineError where none answers for ``wait`` seconds.
        """
        last: Server | None = None
        wrong = broken = 0
        while True:
            server = await self._pick(prefer, last)
            server.load += 1
            try:
                async with server.slots:
                    if not server.up:  # it failed while this waited for its slot: no try of this request
                        continue
                    answer = await self._send(server, body(server, wrong))
                return read(answer), server
            except Rejected:
                raise
            except Unanswered as error:
                reason, wrong = str(error), wrong + 1
                tries = wrong
            except (httpx.HTTPError, TimeoutError, OSError) as error:
                reason, broken = f"{type(error).__name__} {error}".strip(), broken + 1
                tries = broken
                self._out(server, reason)
            finally:
                server.load -= 1
            last = server
            if tries > self.config.retries:
                raise Unanswered(f"{reason} ({tries} tries)")
            await asyncio.sleep(_pause(tries))

    async def _send(
        self, server: Server, body: dict[str, Any], seconds: float | None = None
    ) -> dict[str, Any]:
        """One request; raises Rejected, Unanswered (an unusable answer), httpx's errors and TimeoutError."""
        content = json.dumps({"model": server.model, **body})
        async with asyncio.timeout(seconds or self.config.timeout):
            async with self._client.stream(
                "POST",
                f"{server.url}/chat/completions",
                content=content,
                headers={"Content-Type": "application/json"},
            ) as response:
                data = await _read(response)
        if response.status_code in FATAL:
            raise EngineError(
                f"the server answers {response.status_code}: {_excerpt(data)}",
                where=server.url,
                fix="check its address and model, and the key in OPENAI_API_KEY",
            )
        if 400 <= response.status_code < 500 and response.status_code not in (408, 409, 425, 429):
            raise Rejected(f"the server answers {response.status_code}: {_excerpt(data)}")
        if response.status_code == 429:  # busy, not broken
            raise Unanswered("the server answers 429, too many requests")
        if response.status_code != 200:
            raise httpx.HTTPError(f"the server answers {response.status_code}: {_excerpt(data)}")
        answer = _object(data)
        used = answer.get("usage")
        count = used.get("completion_tokens") if isinstance(used, dict) else 0
        self.tokens += count if isinstance(count, int) and 0 < count < MAX_BYTES else 0
        return answer

    # ---- rotation

    async def _pick(self, prefer: Server | None, last: Server | None) -> Server:
        """The least loaded server that is up, another than ``last`` if there is one; waits for one."""
        if prefer is not None and prefer.up and prefer is not last:
            return prefer
        deadline = self._loop.time() + self.config.wait
        while True:
            up = [server for server in self._servers if server.up]
            if up:
                return min(up, key=lambda server: (server is last, server.load))
            reasons = "; ".join(f"{masked(server.url)}: {server.reason}" for server in self._servers)
            if all(server.strange for server in self._servers):
                raise EngineError(
                    f"no server serves {self.wanted}",
                    where=reasons,
                    fix="start one with `captioner serve CHECKPOINT`, or name the model to ask for",
                )
            for server in self._servers:
                self._probe(server)
            self._change.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._change.wait()
            except TimeoutError:
                raise EngineError(
                    f"no server answered for {self.config.wait:.0f} seconds",
                    where=reasons,
                    fix="start one with `captioner serve CHECKPOINT`; the same command then goes on",
                ) from None

    def _out(self, server: Server, reason: str) -> None:
        server.up, server.reason = False, reason
        self._probe(server)

    def _probe(self, server: Server) -> None:
        """See to it that somebody asks a server that is not up whether it answers again."""
        if not server.strange and (server.probing is None or server.probing.done()):
            server.probing = self._loop.create_task(self._until_up(server))

    async def _until_up(self, server: Server) -> None:
        number = 0
        while not server.up and not server.strange:
            if number:
                await asyncio.sleep(_pause(number))
            number += 1
            try:
                await self._look(server)
            except (httpx.HTTPError, TimeoutError, OSError, Unanswered, EngineError) as error:
                server.reason = f"{type(error).__name__} {error}".strip()
            else:
                self._change.set()

    async def _look(self, server: Server) -> None:
        """Learn the server's model; one that has failed before must also generate a token."""
        seconds = min(PROBE_SECONDS, self.config.timeout)
        async with asyncio.timeout(seconds):
            async with self._client.stream("GET", f"{server.url}/models") as response:
                data = await _read(response)
        if response.status_code != 200:
            raise Unanswered(f"the server answers {response.status_code}: {_excerpt(data)}")
        listed = _object(data).get("data")
        rows = listed if isinstance(listed, list) else []
        names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
        if self.wanted not in names and not (names and self.wanted is None):
            said = printable(", ".join(names))[:200]
            server.strange, server.reason = True, f"serves {said or 'nothing'}"
            return
        server.model = self.wanted or names[0]
        if server.was_up:
            greeting = {"messages": [{"role": "user", "content": "yes"}], "max_tokens": 1}
            await self._send(server, greeting, seconds)
        server.up = server.was_up = True


def _pause(number: int) -> float:
    """Seconds before try ``number``: doubling, and random so that many do not come at once."""
    return min(LONGEST_PAUSE, 0.2 * 2.0 ** min(number, 16)) * random.uniform(0.5, 1.0)


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        if response.status_code != 200 and len(data) > MAX_ERROR:
            break
        if len(data) > MAX_BYTES:
            raise Unanswered(f"over-long answer: more than {MAX_BYTES:,} bytes")
    return bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise Unanswered("the answer is not a JSON object")
    return answer


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")  # NaN and infinities, which Python's reader takes


def _excerpt(data: bytes) -> str:
    return printable(data[:2000].decode("utf-8", errors="replace"))[:200]


def choice_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a chat completion; Unanswered where there is none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unanswered("an answer without a choice")
    return choices[0]
