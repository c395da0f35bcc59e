"""A real `phalanx serve` as a subprocess, for tests, demos and benchmarks: start it, watch it, hurt it, end it.

Waiting is for events: the service's own log lines, read as they come.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import httpx

LISTENING = re.compile(r"listening on (http://\S+)")
READY = re.compile(r"ready: ")


class ServiceEnded(Exception):
    """The service ended while something was awaited of it; the message holds its last lines."""


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does, so services are left by way of the `with` that ends them:
    `timeout`, a CI job or a kill leave none behind. For the main thread. LOCAL."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Service:
    """One service on a port of its own choice. A context manager: leaving it ends every process it started.

    model: the checkpoint's directory; "" when the flags name it."""

    def __init__(
        self,
        model: str,
        *flags: str,
        env: dict[str, str] | None = None,
        echo: bool = False,
        within: Sequence[str] = (),
    ) -> None:
        """within: put before the command, `testing.netns` say."""
        named = [model] if model else []
        self._command = [*within, sys.executable, "-m", "phalanx", "serve", *named, "--port", "0", *flags]
        self._env = {**os.environ, **(env or {})}
        self._echo = echo
        self._lines: list[str] = []
        self._came_s: list[float] = []
        self._news = threading.Condition()
        self._ended = False
        self.url = ""

    def start(self) -> Service:
        """Start the process and wait until it has said where it listens."""
        return self.launch().find_url()

    def find_url(self) -> Service:
        """Wait until it has said where it listens."""
        self.url = self.wait_for_line(LISTENING, timeout_s=120).group(1)
        return self

    def launch(self) -> Service:
        """Start the process: all there is to wait for when it is one of the further hosts, which serve no HTTP."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=self._env, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def wait_ready(self, timeout_s: float = 120) -> Service:
        """Wait until the service says that it is ready."""
        self.wait_for_line(READY, timeout_s)
        return self

    def wait_for_line(self, pattern: re.Pattern[str] | str, timeout_s: float = 60, *, after: int = 0) -> re.Match[str]:
        """The first match in the log from line number `after` on; ServiceEnded or TimeoutError when none comes."""
        return self.line_at(pattern, timeout_s, after=after)[0]

    def line_at(
        self, pattern: re.Pattern[str] | str, timeout_s: float = 60, *, after: int = 0
    ) -> tuple[re.Match[str], float]:
        """As `wait_for_line`, with when the line came, by time.monotonic()."""
        pattern = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        seen = after
        with self._news:
            while True:
                for number in range(seen, len(self._lines)):
                    if match := pattern.search(self._lines[number]):
                        return match, self._came_s[number]
                seen = len(self._lines)
                left = deadline - time.monotonic()
                if self._ended:
                    raise ServiceEnded(f"no line like {pattern.pattern!r}; exit code {self.process.poll()}\n{self.log}")
                if left <= 0 or not self._news.wait(left):
                    raise TimeoutError(f"no line like {pattern.pattern!r} in {timeout_s} s; the log:\n{self.log}")

    @property
    def lines(self) -> int:
        """How many lines the log has: a place to wait from."""
        return len(self._lines)

    @property
    def log(self) -> str:
        """The last lines of the service's log."""
        return "\n".join(self._lines[-60:])

    @property
    def whole_log(self) -> str:
        """All that the service has said."""
        return "".join(f"{line}\n" for line in self._lines)

    def status(self) -> dict[str, Any]:
        """GET /fault_tolerance/status."""
        answer: dict[str, Any] = httpx.get(f"{self.url}/fault_tolerance/status", timeout=60).raise_for_status().json()
        return answer

    def pid(self, rank: int) -> int:
        """The process that runs `rank` now."""
        return int(next(r["pid"] for r in self.status()["ranks"] if r["rank"] == rank))

    def signal(self, rank: int, number: signal.Signals) -> int:
        """Send a signal to a rank's process; returns its pid."""
        pid = self.pid(rank)
        os.kill(pid, number)
        return pid

    def stop(self, timeout_s: float = 60) -> int:
        """Ask the service to stop, as an operator would, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(5)
        return code

    def __enter__(self) -> Service:
        try:
            return self.start().wait_ready()
        except BaseException:
            self.stop(10)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if self._echo:
                sys.stderr.write(line)
            with self._news:
                self._lines.append(line.rstrip("\n"))
                self._came_s.append(time.monotonic())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def flags_of(**options: object) -> Sequence[str]:
    """`flags_of(ep_size=4, enable_chaos=True)` -> ["--ep-size", "4", "--enable-chaos"]."""
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags
