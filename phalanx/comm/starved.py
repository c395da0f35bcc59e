"""How long a process wanted a CPU and had none: the part of a silence that is nobody's fault.

On a loaded machine a healthy peer may be silent for seconds, because it waits for a CPU, and a waiter may see only a
few of those seconds itself. The kernel counts both (`schedstat`: ns spent running, ns spent runnable but not running,
turns), so a time-out need not guess. A stopped, sleeping or dead process wants no CPU: its silence counts.
"""

from __future__ import annotations

from collections.abc import Iterable


class Starvation:
    """Counts from its construction. Reading costs some microseconds a process: for long waits only. LOCAL."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._own = _delay_ns(_schedstat("thread-self"))
        self._peers = {pid: _delay_ns(_schedstat(pid)) for pid in pids}
        self._seen: dict[int, bytes] = {}

    def own_ns(self) -> int:
        """Nanoseconds for which the calling thread waited for a CPU."""
        return _delay_ns(_schedstat("thread-self")) - self._own

    def peer_ns(self, pid: int) -> int | None:
        """Nanoseconds for which process `pid`'s main thread waited for a CPU; None: unknown just now, ask again.

        The kernel adds a wait to its count when it ends. So the count of a process that is runnable can be trusted
        only when it has moved since it was last asked for."""
        count = _schedstat(pid)
        moved = count != self._seen.get(pid, count)
        self._seen[pid] = count
        if _state(pid) == b"R" and not moved:
            return None
        return max(0, _delay_ns(count) - self._peers[pid])


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
