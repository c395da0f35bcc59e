"""The crowd of a soak finds every way in which a stream can be wrong, and nothing else."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from phalanx.testing.crowd import CHAT, COMPLETIONS, Crowd, calls

TOKENS = 12


class Server:
    """Says numbers that follow from the seed; from the second time on, it makes one mistake with each call."""

    def __init__(self) -> None:
        self.mistake = ""
        self.asked: Counter[int] = Counter()
        self.enough = threading.Event()
        app = FastAPI()
        app.post(COMPLETIONS)(self._answer)
        app.post(CHAT)(self._answer)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)

    async def _answer(self, request: Request) -> StreamingResponse:
        body = await request.json()
        self.asked[body["seed"]] += 1
        if sum(self.asked.values()) > 40:
            self.enough.set()
        wrong = self.mistake if self.asked[body["seed"]] > 1 else ""
        return StreamingResponse(self._stream(body["seed"], wrong), media_type="text/event-stream")

    async def _stream(self, seed: int, wrong: str) -> AsyncIterator[str]:
        ids = [seed * 100 + index for index in range(TOKENS)]
        if wrong == "lost":
            del ids[5]
        elif wrong == "doubled":
            ids.insert(5, ids[5])
        elif wrong == "changed":
            ids[5] += 1
        for index, token in enumerate(ids):
            if wrong == "error" and index == 5:
                yield _event({"error": {"message": "no rank is alive"}})
                return
            if wrong == "cut" and index == 5:
                return
            reason = "length" if index == len(ids) - 1 else None
            yield _event({"choices": [{"text": str(token), "token_ids": [token], "finish_reason": reason}]})
            await asyncio.sleep(0)
        yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.thread.start()
    while not made.server.started:
        assert made.thread.is_alive()
        threading.Event().wait(0.01)
    yield made
    made.server.should_exit = True
    made.thread.join()


def crowd_of(server: Server, leave: float) -> Crowd:
    (port,) = {socket.getsockname()[1] for each in server.server.servers for socket in each.sockets}
    return Crowd(f"http://127.0.0.1:{port}", calls("m", 6, random.Random(1)), size=3, seed=4, leave=leave)


async def soak(crowd: Crowd, server: Server) -> None:
    assert await crowd.learn() == 6 * TOKENS
    crowd.start()
    await asyncio.to_thread(server.enough.wait, 60)
    await crowd.calm(60)


def test_right_streams_are_right_also_when_their_client_leaves_early(server: Server) -> None:
    crowd = crowd_of(server, leave=0.5)
    asyncio.run(soak(crowd, server))
    tally = crowd.tally
    assert (tally.failed, tally.different) == ([], [])
    assert tally.requests >= 30
    assert 0 < tally.left < tally.requests
    assert tally.tokens >= TOKENS * (tally.requests - tally.left)


@pytest.mark.parametrize("mistake", ["lost", "doubled", "changed", "error", "cut"])
def test_every_wrong_stream_is_found(server: Server, mistake: str) -> None:
    server.mistake = mistake
    crowd = crowd_of(server, leave=0.0)
    asyncio.run(soak(crowd, server))
    tally = crowd.tally
    assert tally.requests >= 30
    found = tally.failed if mistake in ("error", "cut") else tally.different
    assert len(found) == tally.requests == len(tally.failed) + len(tally.different)


def test_calls_are_the_same_for_the_same_seed_and_of_both_kinds() -> None:
    made = calls("m", 24, random.Random(7))
    assert made == calls("m", 24, random.Random(7))
    assert made != calls("m", 24, random.Random(8))
    assert {call.path for call in made} == {COMPLETIONS, CHAT}
    assert {call.body["temperature"] > 0 for call in made} == {True, False}
