"""Streaming clients for tests: real HTTP, one thread a stream, and events to wait on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Streamed:
    """What one client saw: its chunks of text, and when."""

    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    done: bool = False
    usage: dict[str, int] = field(default_factory=dict)
    at: list[float] = field(default_factory=list)

    @property
    def result(self) -> tuple[str, str | None, str, bool]:
        return self.text, self.finish_reason, self.error, self.done


class Streams:
    """Several completions streamed at once. Entering starts them; `join` waits for their ends."""

    def __init__(self, url: str, prompts: Sequence[str], max_tokens: int = 32, **options: Any) -> None:
        self.url = url
        self.seen = [Streamed() for _ in prompts]
        self._news = threading.Condition()
        self._bodies = [
            {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                **{name: value[i] if isinstance(value, list) else value for name, value in options.items()},
            }
            for i, prompt in enumerate(prompts)
        ]
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(len(prompts))]

    def start(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def wait_for_chunks(self, count: int, timeout_s: float = 120) -> None:
        """Until every stream has had `count` chunks of text (or has ended)."""
        with self._news:
            happened = self._news.wait_for(
                lambda: all(len(s.at) >= count or s.done or s.error for s in self.seen), timeout_s
            )
        assert happened, [(len(s.at), s.error) for s in self.seen]

    def join(self, timeout_s: float = 240) -> list[tuple[str, str | None, str, bool]]:
        """(text, finish reason, error, saw [DONE]) of each stream."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), [(len(s.at), s.error, s.done) for s in self.seen]
        return [s.result for s in self.seen]

    def longest_gap_s(self) -> float:
        return max((b - a for s in self.seen for a, b in zip(s.at, s.at[1:], strict=False)), default=0.0)

    def _run(self, i: int) -> None:
        seen = self.seen[i]
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=self._bodies[i], timeout=120) as response:
                if response.status_code != 200:
                    seen.error = f"{response.status_code} {response.read().decode()}"
                    return
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self._take(seen, line.removeprefix("data: "))
        except httpx.HTTPError as error:
            seen.error = repr(error)
        finally:
            with self._news:
                self._news.notify_all()

    def _take(self, seen: Streamed, data: str) -> None:
        with self._news:
            if data == "[DONE]":
                seen.done = True
            else:
                chunk = json.loads(data)
                if "error" in chunk:
                    seen.error = json.dumps(chunk["error"])
                seen.usage = chunk.get("usage") or seen.usage
                for choice in chunk.get("choices", ()):
                    if choice["text"]:
                        seen.text += choice["text"]
                        seen.at.append(time.monotonic())
                    seen.finish_reason = choice.get("finish_reason") or seen.finish_reason
            self._news.notify_all()


PROMPTS = [
    "The quick brown fox",
    "In the beginning",
    "def main():",
    "A long prompt that takes more than one block of the cache, and more than one chunk when chunks are small: "
    + "one two three four five six seven eight nine ten " * 3,
    "Phalanx",
    "Once upon a time there was a rank",
    "1 2 3 4 5 6 7",
    "Zeta",
]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": [11, 12, 13, 14, 15, 16, 17, 18]},
}
