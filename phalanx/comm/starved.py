"""How long a process wanted a CPU and had none: the part of a silence that is nobody's fault.

On a loaded machine a healthy peer may be silent for seconds, because it waits for a CPU, and a waiter may see only a
few of those seconds itself. The kernel counts both (`schedstat`, second field: ns spent runnable but not running), so
a time-out need not guess. A stopped or dead process wants no CPU: its count stands still, and its silence counts.
"""

from __future__ import annotations

from collections.abc import Iterable


class Starvation:
    """Counts from its construction. Reading costs some microseconds a process: for long waits only. LOCAL."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._own = _delay_ns("thread-self")
        self._peers = {pid: _delay_ns(pid) for pid in pids}

    def own_ns(self) -> int:
        """Nanoseconds for which the calling thread waited for a CPU."""
        return _delay_ns("thread-self") - self._own

    def peer_ns(self, pid: int) -> int:
        """Nanoseconds for which process `pid`'s main thread waited for a CPU; 0 when it is gone."""
        return max(0, _delay_ns(pid) - self._peers[pid])


def _delay_ns(task: int | str) -> int:
    try:
        with open(f"/proc/{task}/schedstat", "rb", buffering=0) as file:
            return int(file.read().split()[1])
    except (OSError, IndexError):  # the process is gone, or the kernel keeps no such count
        return 0
