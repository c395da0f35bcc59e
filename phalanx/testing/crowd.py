"""Many clients that stream all the time, and compare every stream with what an unfailed service said."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from phalanx.cli.figures import prompts
from phalanx.testing.streams import Stream, client, run_stream

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Call:
    """One request that is made again and again, and must always bring the same."""

    path: str
    body: Mapping[str, Any]


@dataclass
class Tally:
    """What all clients saw so far. left: calls that their client gave up on purpose, in mid-stream; what had come was
    right. longest_s: the longest silence within a stream."""

    requests: int = 0
    left: int = 0
    tokens: int = 0
    longest_s: float = 0.0
    failed: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def calls(model: str, count: int, rng: random.Random) -> list[Call]:
    """`count` calls of all kinds: completions and chats, greedy and seeded, short and long. LOCAL."""
    made = []
    for number in range(count):
        [ids] = prompts(1, rng.choice((3, 17, 40, 150)), rng.randrange(1 << 30))
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": rng.choice((8, 30, 60, 120)),
            "temperature": 0.0 if number % 2 else 0.9,
            "seed": number + 1,
            "ignore_eos": number % 3 > 0,
            "return_token_ids": True,
        }
        if number % 4 == 3:
            words = "".join(chr(i) for i in ids)
            made.append(Call(CHAT, {**body, "messages": [{"role": "user", "content": words}]}))
        else:
            made.append(Call(COMPLETIONS, {**body, "prompt": ids}))
    return made


class Crowd:
    """Clients in a loop, from `start` to `calm`, as often as wanted. size: how many at once.

    leave: the part of calls that their client abandons in mid-stream."""

    def __init__(self, url: str, made: Sequence[Call], size: int, seed: int, leave: float = 0.1) -> None:
        self.tally = Tally()
        self._url, self._calls, self._leave = url, made, leave
        self._rngs = [random.Random(f"{seed}/{number}") for number in range(size)]
        self._expected: list[Stream] = []
        self._going = False
        self._tasks: list[asyncio.Task[None]] = []

    async def learn(self) -> int:
        """Make each call once, of a service that nobody hurts; how many tokens came. ValueError when one fails."""
        async with client(self._url) as http:
            streams = [Stream(str(number)) for number in range(len(self._calls))]
            pairs = zip(self._calls, streams, strict=True)
            self._expected = await asyncio.gather(*(run_stream(http, c.path, c.body, s) for c, s in pairs))
        if broken := [stream for stream in self._expected if stream.error]:
            raise ValueError(f"call {broken[0].name} fails in a service that nobody hurt: {broken[0].error}")
        return sum(stream.tokens for stream in self._expected)

    def start(self) -> None:
        """Let all clients begin."""
        self._going = True
        self._tasks = [asyncio.create_task(self._client(rng)) for rng in self._rngs]

    async def calm(self, patience_s: float) -> None:
        """Let every call come to its end, and make no others. One that does not end in time has failed."""
        self._going = False
        done, late = await asyncio.wait(self._tasks, timeout=patience_s)
        for task in late:
            task.cancel()
            self.tally.failed.append(f"a stream did not end within {patience_s:.0f} s")
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()

    async def _client(self, rng: random.Random) -> None:
        async with client(self._url) as http:
            while self._going:
                number = rng.randrange(len(self._calls))
                expected = self._expected[number]
                leave_after = rng.randrange(1, 10) if rng.random() < self._leave else 0
                await self._call(http, self._calls[number], Stream(str(number)), expected, leave_after)

    async def _call(self, http: Any, call: Call, stream: Stream, expected: Stream, leave_after: int) -> None:
        so_far = 0
        enough = asyncio.Event()

        def count(growing: Stream) -> None:
            nonlocal so_far
            self.tally.tokens += growing.tokens - so_far
            so_far = growing.tokens
            if leave_after and growing.tokens >= leave_after:
                enough.set()

        running = asyncio.create_task(run_stream(http, call.path, call.body, stream, count))
        watching = asyncio.create_task(enough.wait())
        try:
            await asyncio.wait([running, watching], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            abandoned = not running.done()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        self._compare(stream, expected, abandoned)

    def _compare(self, stream: Stream, expected: Stream, abandoned: bool) -> None:
        tally = self.tally
        tally.requests += 1
        tally.longest_s = max([tally.longest_s, *(b - a for a, b in itertools.pairwise(stream.arrivals_s))])
        if abandoned:
            tally.left += 1
            if stream.ids != expected.ids[: len(stream.ids)]:
                tally.different.append(f"call {stream.name}, abandoned: {stream.ids} is not how {expected.ids} begins")
        elif stream.error:
            tally.failed.append(f"call {stream.name}, after {stream.tokens} tokens: {stream.error}")
        elif wrong := stream.different_tokens(expected):
            tally.different.append(f"call {stream.name}: {wrong} tokens: {stream.ids} instead of {expected.ids}")
