"""Clients that stream and remember: which token came when, so that a stall can be measured and texts compared.

Works with every OpenAI-compatible service. Where the service can return token ids (`return_token_ids`, as vLLM calls
it), streams are compared token by token, otherwise by text. Times are seconds of one monotonic clock, this process's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """One request as its client saw it, filled while it runs.

    arrivals_s: for each piece that carried tokens, when it came; counts: how many tokens it carried.
    ids: the tokens, when the service returns them. error: what went wrong, "" when nothing did.
    prompt_tokens, completion_tokens: the service's own count, 0 when it gives none.
    """

    name: str
    sent_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    done: bool = False

    @property
    def tokens(self) -> int:
        """Tokens received so far."""
        return sum(self.counts)

    @property
    def ttft_s(self) -> float:
        """Seconds from the request to the first token."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals_s)]

    def silence(self, since_s: float) -> tuple[float, float] | None:
        """Start and length of the longest silence that ended after `since_s`, counted from then on; None when nothing
        came after it.

        For a failure at `since_s` the length is the time from the failure to the next token. A token that was already
        on its way when the failure happened does not end it: the silence behind that token is the longer one."""
        points = [since_s, *(at for at in self.arrivals_s if at > since_s)]
        return max(((start, end - start) for start, end in itertools.pairwise(points)), key=_length, default=None)

    def same_as(self, other: Stream) -> bool:
        """The same tokens (the same text, where ids are not known) and the same end, without error."""
        return not (self.error or other.error) and self.different_tokens(other) == 0

    def different_tokens(self, other: Stream) -> int:
        """How many tokens differ, are missing or are too many; by text (1 or 0) where ids are not known."""
        if not self.ids and not other.ids:
            return int((self.text, self.finish_reason) != (other.text, other.finish_reason))
        wrong = sum(mine != theirs for mine, theirs in zip(self.ids, other.ids, strict=False))
        wrong += abs(len(self.ids) - len(other.ids))
        return wrong or int((self.text, self.finish_reason) != (other.text, other.finish_reason))


def _length(silence: tuple[float, float]) -> float:
    return silence[1]


async def run_stream(
    client: httpx.AsyncClient,
    path: str,
    body: Mapping[str, Any],
    stream: Stream,
    on_token: Callable[[Stream], None] = lambda stream: None,
) -> Stream:
    """POST `body` with streaming to `path` (/v1/completions or /v1/chat/completions) and fill `stream`.

    Never raises for what the service does: that is in `stream.error`. `on_token` is called after each piece."""
    stream.sent_s = time.monotonic()
    try:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                stream.error = f"{response.status_code}: {' '.join(response.text.split())[:300]}"
                return stream
            async for event in _events(response):
                _take(stream, event)
                on_token(stream)
                if stream.error:
                    return stream
        if not stream.finish_reason:
            stream.error = "the stream ended without a finish_reason"
    except (httpx.HTTPError, ValueError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.done = True
    return stream


async def run_streams(
    client: httpx.AsyncClient,
    path: str,
    bodies: Iterable[Mapping[str, Any]],
    *,
    concurrency: int | None = None,
    on_token: Callable[[Stream], None] = lambda stream: None,
    streams: Sequence[Stream] | None = None,
) -> list[Stream]:
    """Run one stream for each body, at most `concurrency` at once (None: all). `streams`: to watch them meanwhile."""
    requests = list(bodies)
    watched = list(streams) if streams is not None else [Stream(str(number)) for number in range(len(requests))]
    gate = asyncio.Semaphore(concurrency or len(requests) or 1)

    async def one(body: Mapping[str, Any], stream: Stream) -> None:
        async with gate:
            await run_stream(client, path, body, stream, on_token)

    async with asyncio.TaskGroup() as group:
        for body, stream in zip(requests, watched, strict=True):
            group.create_task(one(body, stream))
    return watched


@dataclass(frozen=True)
class Hurt:
    """When something was hurt in mid-stream, just before it happened, and the names of the streams already over."""

    at_s: float
    over: frozenset[str]


async def run_and_hurt(
    client: httpx.AsyncClient,
    path: str,
    bodies: Iterable[Mapping[str, Any]],
    *,
    streams: Sequence[Stream],
    after_tokens: int,
    hurt: Callable[[], Awaitable[None]],
    on_token: Callable[[Stream], None] = lambda stream: None,
) -> Hurt:
    """Run all streams at once, and call `hurt` when they have `after_tokens` tokens together; return when all are over.

    When they never get so many, `hurt` is called after their end: `Hurt.over` tells."""
    reached = asyncio.Event()

    def watch(stream: Stream) -> None:
        on_token(stream)
        if not reached.is_set() and sum(each.tokens for each in streams) >= after_tokens:
            reached.set()

    running = asyncio.create_task(run_streams(client, path, bodies, on_token=watch, streams=streams))
    due = asyncio.create_task(reached.wait())
    await asyncio.wait([running, due], return_when=asyncio.FIRST_COMPLETED)
    due.cancel()
    done = Hurt(time.monotonic(), frozenset(stream.name for stream in streams if stream.done))
    try:
        await hurt()
    finally:
        await running
    return done


def client(url: str, api_key: str = "", timeout_s: float = 300) -> httpx.AsyncClient:
    """A client for many streams at once. timeout_s: the longest silence that it endures."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(timeout_s, connect=10),
        limits=httpx.Limits(max_connections=None),
    )


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    """The JSON values of a stream of server-sent events, up to its [DONE]."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def _take(stream: Stream, event: Any) -> None:
    now = time.monotonic()
    if "error" in event:
        error = event["error"]
        stream.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return
    if usage := event.get("usage"):
        stream.prompt_tokens = usage.get("prompt_tokens", 0)
        stream.completion_tokens = usage.get("completion_tokens", 0)
    for choice in event.get("choices", ()):
        piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        ids = choice.get("token_ids") or []
        stream.text += piece
        stream.ids += ids
        if piece or ids:
            stream.arrivals_s.append(now)
            stream.counts.append(len(ids) or 1)
        if choice.get("finish_reason"):
            stream.finish_reason = choice["finish_reason"]
