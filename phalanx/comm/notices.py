"""The launcher's board of deaths: one memory file that it alone writes and every rank reads in its waits.

A notice costs the reader one load of a word, and it arrives within a poll of the waiting loop; so a rank that is
known to be dead costs nobody a time-out. Identity is (rank, incarnation): a word per rank says "every incarnation
up to k is dead", which is never taken back. No torch here.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from phalanx.comm import segment
from phalanx.world import Member

Cause = Literal["exit", "signal", "exception", "evicted", "operator", "host", "halted"]
_CAUSES: tuple[Cause, ...] = get_args(Cause)

_MAGIC = 0x5048_414C_4E4F_5401
_HEADER_WORDS = 8  # magic, ep_size, version; the rest of a cache line
_ROW_WORDS = 8  # dead_upto, stamp_ns, cause; a cache line a rank


class NoticeBoard:
    """Who is known to be dead. `create` for the launcher, `open` for everyone else. LOCAL throughout."""

    def __init__(self, mapped: mmap.mmap, ep_size: int, fd: int | None) -> None:
        """Use `create` or `open`. fd: the memory file, for its creator only."""
        self.ep_size = ep_size
        self._fd = fd
        self._map = mapped
        words = np.frombuffer(mapped, np.int64)
        self._version = memoryview(mapped)[16:24].cast("q")
        self._rows = words[_HEADER_WORDS:].reshape(ep_size, _ROW_WORDS)

    @classmethod
    def create(cls, ep_size: int) -> NoticeBoard:
        """A board on which nobody is dead."""
        size = 8 * (_HEADER_WORDS + ep_size * _ROW_WORDS)
        fd = os.memfd_create("phalanx-notices", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        mapped = mmap.mmap(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, segment.SEALS)
        board = cls(mapped, ep_size, fd)
        board._rows[:, 0] = -1
        header = np.frombuffer(mapped, np.int64, 2)
        header[:] = _MAGIC, ep_size
        return board

    @classmethod
    def open(cls, address: str) -> NoticeBoard:
        """The launcher's board, read-only. Raises OSError when the launcher is gone."""
        fd = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
        try:
            magic, ep_size = (int(v) for v in np.frombuffer(os.pread(fd, 16, 0), np.int64))
            assert magic == _MAGIC, f"{address} is no notice board"
            return cls(mmap.mmap(fd, 8 * (_HEADER_WORDS + ep_size * _ROW_WORDS), prot=mmap.PROT_READ), ep_size, None)
        finally:
            os.close(fd)

    @property
    def address(self) -> str:
        """How a rank opens this board, as long as its creator lives."""
        assert self._fd is not None, "only the board's creator can hand out its address"
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def version(self) -> int:
        """Grows with every notice: one cheap load tells a waiting loop that there is nothing new."""
        return self._version[0]

    def declare_dead(self, rank: int, incarnation: int, cause: Cause) -> None:
        """Every incarnation of `rank` up to this one is dead, as seen now. A second notice of the same is ignored."""
        row = self._rows[rank]
        if int(row[0]) >= incarnation:
            return
        row[1] = time.monotonic_ns()
        row[2] = _CAUSES.index(cause)
        fence = segment.memory_fence()
        fence()
        row[0] = incarnation
        fence()
        self._version[0] += 1

    def is_dead(self, member: Member) -> bool:
        """Whether this incarnation was declared dead."""
        return member.incarnation <= int(self._rows[member.rank, 0])

    @property
    def dead_words(self) -> npt.NDArray[np.int64]:
        """int64 [R], a cache line apart: the last dead incarnation of each rank (-1: none), for who polls the memory
        itself. A view of the board: read it, never keep it past `close`."""
        return self._rows[:, 0]

    def stamp_ns(self, rank: int) -> int:
        """When the last death of `rank` was seen, on the machine's monotonic clock; 0: never."""
        return int(self._rows[rank, 1])

    def cause(self, rank: int) -> Cause:
        """Why `rank` died last. Meaningful once `is_dead` is true for some incarnation."""
        return _CAUSES[int(self._rows[rank, 2])]

    def poke(self, members: Iterable[Member]) -> None:
        """Make sleeping members look at the board now. Members need a `comm_address`, or at least a `pid`."""
        for member in members:
            address = member.comm_address or segment.find_address(member.pid, member.rank, member.incarnation)
            if address:
                segment.wake_address(address)

    def close(self) -> None:
        """Unmap."""
        self._rows = np.zeros((0, _ROW_WORDS), np.int64)
        self._version.release()
        self._map.close()
        if self._fd is not None:
            os.close(self._fd)
