"""Server-sent events: the frames of a stream, and the response that sends them.

The framing is FastAPI's. (The package sse-starlette replaces uvicorn's handler of signals to end streams at once when
the server is asked to stop; ours are to finish first.)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

DONE = format_sse_event(data_str="[DONE]")
KEEP_ALIVE = format_sse_event(comment="keep-alive")
"""A comment: clients skip it, proxies see a living connection."""

KEEP_ALIVE_S = 15.0
"""How long a stream may be silent before a comment goes out."""

_encoder = msgspec.json.Encoder()


def event(payload: Any) -> bytes:
    """One event with `payload` as JSON."""
    return raw_event(_encoder.encode(payload))


def raw_event(body: bytes) -> bytes:
    """One event with JSON that is encoded already."""
    return format_sse_event(data_str=body.decode())


class EventStream(EventSourceResponse):
    """Sends the frames of a generator. `call` is left when the stream ends or the client goes away, also when it went
    before the first frame: a generator that never began runs no `finally`."""

    def __init__(self, call: AbstractContextManager[object], frames: AsyncGenerator[bytes]) -> None:
        self._call, self._frames = call, frames
        super().__init__(frames, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._call:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._frames.aclose()
