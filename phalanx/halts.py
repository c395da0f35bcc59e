"""Processes that are stopped (SIGSTOP, a debugger): for how long, as the kernel says, whatever the load.

A process that is silent may be waiting for a CPU; one that is stopped says so in /proc. So what is stopped can be told
from what is slow, exactly and by two reads, and somebody who does not wait for it himself can find it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress

from phalanx.endings import has_ended, wait_status

LOOK_S = 0.5
"""How often the launcher looks at each process of its host."""

HELPER_HALT_S = 30.0
"""How long a process for whom nobody waits (the vault's) may be stopped before another one takes its place."""

_STOPPED = (b"T", b"t")
"""The states of a process that was stopped, and of one that is held by a debugger."""


class Halt:
    """One process, as it was found at each look. LOCAL."""

    def __init__(self, pid: int, look_s: float = LOOK_S) -> None:
        """pid: of a process that is not waited for meanwhile, so that it stays its own. look_s: how often it is looked
        at: a time between two looks counts as twice that at most, for who looks may have been stopped, too."""
        self._pid, self._most_s = pid, 2 * look_s
        self._traces: tuple[bytes, ...] = ()
        self._looked_s = 0.0
        self.total_s = 0.0
        """How long it has been stopped, as far as it was looked at."""

    def look(self, now_s: float) -> float | None:
        """Seconds of the time since the last look in which it was stopped all along; 0.0 when it was not at that look,
        or ran in between; None: it is not stopped."""
        traces = self._traces_of_a_stop()
        if not traces:
            self._traces, self.total_s = (), 0.0
            return None
        stayed = traces == self._traces
        seconds = min(now_s - self._looked_s, self._most_s) if stayed else 0.0
        self._traces, self._looked_s = traces, now_s
        self.total_s = self.total_s + seconds if stayed else 0.0
        return seconds

    def _traces_of_a_stop(self) -> tuple[bytes, ...]:
        """What changes as soon as it runs: CPU time of all its threads, in ticks, and that of the main one, in ns,
        where the kernel keeps it. Nothing when it is not stopped, or gone."""
        fields = _read(self._pid, "stat").rpartition(b") ")[2].split()
        if len(fields) < 13 or fields[0] not in _STOPPED:
            return ()
        return (*fields[11:13], _read(self._pid, "schedstat"))


class Halts:
    """Which members have been stopped for so long that the others are to go on without them. Pure.

    Only time counts in which another member was not stopped: when all are, nobody waits for anybody, and when they go
    on each has all its time again."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._stopped: dict[tuple[int, int], float] = {}
        """Those that are stopped now."""

    def heard(
        self, rank: int, incarnation: int, seconds: float | None, members: Collection[tuple[int, int]]
    ) -> float | None:
        """What a look at a process found (see `Halt.look`). members: (rank, incarnation) of those that live and are in
        the view. For how long it has been stopped, once, when the others are to go on without it, else None. LOCAL."""
        if seconds is None:
            self.forget(rank, incarnation)
            return None
        stayed = seconds > 0
        before_s = self._stopped.get((rank, incarnation), 0.0) if stayed else 0.0
        someone_runs = any(name not in self._stopped for name in members if name != (rank, incarnation))
        total_s = self._stopped[rank, incarnation] = before_s + (seconds if someone_runs else 0.0)
        crossed = before_s <= self._limit_s < total_s
        return total_s if crossed and (rank, incarnation) in members else None

    def forget(self, rank: int, incarnation: int) -> None:
        """It is dead. LOCAL."""
        self._stopped.pop((rank, incarnation), None)


def wait_for_child(pid: int, limit_s: float, look_s: float = LOOK_S) -> int:
    """The wait status of a child that has ended, -1 when a debugger has it; one that is stopped for longer than
    `limit_s` is killed. LOCAL, blocks."""
    halt = Halt(pid, look_s)
    pidfd = os.pidfd_open(pid)
    try:
        while not has_ended(pidfd, look_s):
            halt.look(time.monotonic())
            if halt.total_s > limit_s:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    status = wait_status(pid)
    return -1 if status is None else status


def _read(pid: int, name: str) -> bytes:
    with suppress(OSError), open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
        return file.read()
    return b""
