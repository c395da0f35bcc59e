"""Server-sent events: the frames of a stream, and the response that sends them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, proxies see a living connection."""

KEEP_ALIVE_S = 15.0
"""How long a stream may be silent before a comment goes out."""

_encoder = msgspec.json.Encoder()


def event(payload: Any) -> bytes:
    """One event with `payload` as JSON."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def raw_event(body: bytes) -> bytes:
    """One event with JSON that is encoded already."""
    return b"data: " + body + b"\n\n"


class EventStream(StreamingResponse):
    """Sends the frames of a generator. When the client goes away the generator is closed, so its `finally` runs."""

    def __init__(self, frames: AsyncGenerator[bytes], headers: dict[str, str] | None = None) -> None:
        self._frames = frames
        plain = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(frames, media_type="text/event-stream", headers=plain)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()
