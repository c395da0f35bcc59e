"""How long peers have been silent by their own fault: the clock of a time-out.

On a loaded machine a healthy peer may be silent for seconds because it waits for a CPU; and who was stopped for a
while must not suspect everyone when it wakes up. Neither needs a guess: the kernel counts how long a process wanted a
CPU and had none (`schedstat`: ns spent running, ns spent runnable but not running, turns), and a waiter that was
stopped sees the gap in its own loop. A stopped, sleeping or dead process wants no CPU: its silence counts.

Of a process on another host nothing is known but what comes: there only the waiter's own hunger is taken off.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

_FROZEN_NS = 50_000_000
"""A gap in the waiter's loop as long as this means that the waiter itself was not there to hear."""


class Silence:
    """Counts from its construction. `tick` in each round of the wait; `of_ns` costs some microseconds. LOCAL."""

    def __init__(self, pids: Iterable[int | None]) -> None:
        self._own = _delay_ns(_schedstat("thread-self"))
        self._peers = {pid: _delay_ns(_schedstat(pid)) for pid in pids if pid is not None}
        self._seen: dict[int, bytes] = {}
        self._began = self._now = time.monotonic_ns()
        self._frozen = 0

    def tick(self) -> None:
        """The waiter looked."""
        now = time.monotonic_ns()
        if now - self._now > _FROZEN_NS:
            self._frozen += now - self._now
        self._now = now

    @property
    def longest_ns(self) -> int:
        """No silence can be longer than this."""
        return self._now - self._began - self._frozen

    def of_ns(self, pid: int | None) -> int | None:
        """Nanoseconds for which process `pid` was silent though it and the waiter could run; None: unknown just now.
        pid None: a process of another host, silent though the waiter could run.

        The kernel adds a wait for a CPU to its count when that wait ends. So the count of a process that is runnable
        can be trusted only when it has moved since it was last asked for: ask again in the next round."""
        if pid is None:
            return self._now - self._began - max(self._frozen, _delay_ns(_schedstat("thread-self")) - self._own)
        count = _schedstat(pid)
        moved = count != self._seen.get(pid, count)
        self._seen[pid] = count
        if _state(pid) == b"R" and not moved:
            return None
        starved = max(
            self._frozen, _delay_ns(_schedstat("thread-self")) - self._own, _delay_ns(count) - self._peers[pid]
        )
        return self._now - self._began - starved


def _schedstat(task: int | str) -> bytes:
    return _read(f"/proc/{task}/schedstat")


def _delay_ns(schedstat: bytes) -> int:
    fields = schedstat.split()
    return int(fields[1]) if len(fields) == 3 else 0


def _state(pid: int) -> bytes:
    """The process's state letter; R: it runs, or would if it had a CPU."""
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:  # the process is gone, or the kernel keeps no such count
        return b""
