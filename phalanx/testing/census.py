"""What a running service takes of its host: processes, memory, open files, threads, counted from /proc.

For soaks and tests that look for leaks. Linux; LOCAL throughout; only processes of this user can be counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
"""What reading about a process raises when it ends meanwhile."""


@dataclass(frozen=True)
class Process:
    """One process. role: what it is in the service. pss: bytes of memory, shared pages divided among those who share
    them, so that sums are right; rss: with shared pages in full, so that it changes only when the process itself does.
    """

    pid: int
    role: str
    zombie: bool = False
    pss: int = 0
    rss: int = 0
    fds: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Census:
    """All processes of a service at one moment."""

    processes: tuple[Process, ...]

    @property
    def roles(self) -> list[str]:
        """Every role that somebody has, sorted."""
        return sorted({process.role for process in self.processes})

    @property
    def zombies(self) -> frozenset[int]:
        """Pids of those that ended and were not waited for."""
        return frozenset(process.pid for process in self.processes if process.zombie)

    def total(self, what: str, role: str | None = None) -> int:
        """The sum of a field of Process over those with `role` (None: all). LOCAL."""
        return sum(getattr(process, what) for process in self.processes if role in (None, process.role))

    def count(self, role: str | None = None) -> int:
        """How many have `role` (None: all). LOCAL."""
        return sum(role in (None, process.role) for process in self.processes)


def take_census(root: int, known: Mapping[int, str]) -> Census:
    """Count `root`, a launcher, and all that descend from it. known: roles by pid, where they are known. LOCAL."""
    return Census(tuple(counted for pid in _family(root) if (counted := _count(pid, root, known)) is not None))


def listening_ports(pid: int) -> list[int]:
    """The TCP ports at which a process listens. LOCAL."""
    mine = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(*GONE):
            mine.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    rows = []
    for family in ("tcp", "tcp6"):
        with suppress(FileNotFoundError), open(f"/proc/{pid}/net/{family}", encoding="ascii") as file:
            rows += [line.split() for line in file][1:]
    ports = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}
    return sorted(ports)


def _family(root: int) -> Iterator[int]:
    """`root` and its descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(*GONE):
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    todo = [root]
    while todo:
        pid = todo.pop()
        yield pid
        todo += children.get(pid, [])


def _stat(pid: int) -> list[str]:
    """State, parent and what follows of /proc/PID/stat."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _count(pid: int, root: int, known: Mapping[int, str]) -> Process | None:
    try:
        state = _stat(pid)
        role = "launcher" if pid == root else known.get(pid) or _role_by_command(pid)
        if state[0] == "Z":
            return Process(pid, role, zombie=True)
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in file if line.startswith(("Pss:", "Rss:"))}
        return Process(
            pid, role, False, sizes["Pss:"], sizes["Rss:"], len(os.listdir(f"/proc/{pid}/fd")), int(state[17])
        )
    except (*GONE, KeyError):
        return None


def _role_by_command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read().split(b"\0")
    for name in ("server", "nursery"):
        if f"phalanx.{name}".encode() in words:
            return name
    return "other"
