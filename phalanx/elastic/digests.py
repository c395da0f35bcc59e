"""Digests of experts computed before they are asked for, by a few threads.

One thread digests about as fast as one core reads memory, which is a fraction of what a device takes in from pinned
memory (and all there is to do for a CPU that borrows). So a restore has the next experts in its queue digested while
it is busy with this one. The hash releases the interpreter's lock while it runs; bytes are read where they lie, so
nothing is copied, and no more than `Digests.room` digests are ever begun and not yet asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from phalanx.moe.experts import Bytes, digest

log = logging.getLogger("phalanx.elastic")

MOST_THREADS = 12
"""They fill the way to a device (55 GB/s) when each has 5 GB/s of the memory's rate."""

WORTH_BYTES = 1 << 20
"""Below this a thread's turn takes longer than the digest."""


def threads_for(cpus: int, ranks: int) -> int:
    """How many threads a rank digests with, on a host with so many CPUs for so many ranks: its share of all but one,
    which the server and all else on the host have. At least 1: no thread besides the one that asks. LOCAL, pure.

    Where threads must share CPUs they are no gain: each digest then waits for the slowest of them."""
    return max(1, min(MOST_THREADS, (cpus - 1) // max(1, ranks)))


@dataclass(frozen=True, eq=False)
class _Begun:
    """data is kept so that nobody else's bytes can come to lie at its address. found: a number when it was computed by
    the thread that asks."""

    data: Bytes
    found: Future[int] | int


class Digests:
    """Digests of bytes, begun in one order and asked for in any. For one thread to use, in a `with`.

    That thread is one of `threads`: it digests, too, while there is anything that nobody has taken up. The others start
    with the first `begin`, and none is left when the `with` ends, however it does; what they had not taken up by then
    is never computed. So a process that forks between two `with`s has none."""

    def __init__(self, threads: int) -> None:
        """threads: 1 computes everything where it is asked for, and starts none."""
        assert threads >= 1, threads
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[Hashable, _Begun] = {}

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        self._begun.clear()
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._begun

    @property
    def room(self) -> int:
        """How many of the next digests should be begun: enough that no thread waits for the one who asks. LOCAL."""
        return 2 * self._threads if self._threads > 1 else 0

    def begin(self, key: Hashable, data: Bytes) -> None:
        """Have `data` digested, unless `key` is begun already, there is no room, or it is too little to be worth it.

        The bytes must not change from now on, as they must not between a check and their use. LOCAL, waits for
        nothing."""
        if key in self._begun or len(self._begun) >= self.room or data.nbytes < WORTH_BYTES:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="digest")
        try:
            self._begun[key] = _Begun(data, self._pool.submit(digest, data.data))
        except RuntimeError as error:  # the system has no thread to give: that costs speed, and no more
            log.info("digests are computed by one thread: %s", error)
            self._threads = 1

    def digest(self, key: Hashable, data: Bytes) -> int:
        """The digest of `data`: what was begun under `key`, if that was the same bytes, else computed here. LOCAL."""
        begun = self._begun.get(key)
        if begun is None or not _same(begun.data, data):
            return digest(data.data)
        del self._begun[key]
        while isinstance(begun.found, Future) and not begun.found.done():
            if begun.found.cancel():  # nobody has taken it up yet
                return digest(data.data)
            if not self._help():
                break
        return begun.found if isinstance(begun.found, int) else begun.found.result()

    def drop(self, key: Hashable) -> None:
        """Nobody will ask for `key` any more; there is room for another. LOCAL."""
        begun = self._begun.pop(key, None)
        if begun is not None and isinstance(begun.found, Future):
            begun.found.cancel()

    def _help(self) -> bool:
        """Digest the next that no thread has taken up; whether there was one."""
        for key, begun in self._begun.items():
            if isinstance(begun.found, Future) and begun.found.cancel():
                self._begun[key] = _Begun(begun.data, digest(begun.data.data))
                return True
        return False


def _same(one: Bytes, other: Bytes) -> bool:
    """Whether both are the same bytes in the same place."""
    return one.ctypes.data == other.ctypes.data and one.nbytes == other.nbytes
