"""The memory in which ranks of one host meet: one segment a (rank, incarnation), which only that process writes.

A segment is a sealed memory file. Its owner maps it for writing and then forbids every later writable mapping
(F_SEAL_FUTURE_WRITE); peers map it read-only through `/proc/{pid}/fd/{n}`, which is its address. So a rank that was
evicted and wakes up can write only where nobody reads any more, and nothing stays behind when everybody is killed.

A segment is a page of words about its owner, two areas of control words, and two data buffers. Collective number n of
an epoch uses area and buffer n % 2. Two are enough: a rank begins n + 2 only after it saw everyone's n + 1, and
everyone sent n + 1 only after it had read all of n. A rank that masked a slow reader does not wait for it, so the
reader looks after its copy whether the owner has begun to use the buffer again (`BEGUN`).

Every message is named by a tag (epoch, number, kind), and is there when the word for its reader equals the tag.
An address may go on, after a blank, with how ranks of other hosts reach the same rank (`comm.links`): what is read here
is the part before it. No torch here: the launcher, too, uses this module, to wake a rank that sleeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MAGIC = 0x5048_414C_414E_5801
PAGE = 4096
LINE = 8
"""Words in a cache line."""

# Words of the first page: the header, then three words that change, each alone in its cache line.
_MAGIC, _RANK, _INCARNATION, _EP_SIZE, _MAX_TOKENS, _HIDDEN, _TOP_K, _ITEMSIZE, _WAKE_FD, _WAKE_INODE = range(10)
ROLL_CALL = 2 * LINE
"""The highest epoch for which the owner opened a roll call, or which it adopted."""
RINGING = 3 * LINE
"""The tag number that the owner was about to run when it last rang."""

LIFE = 4 * LINE
"""The lock that the owner holds for life (`_LifeLock`); with OWNER_DIED set in it once the owner's thread is gone."""
OWNER_DIED = 0x4000_0000
"""Linux's FUTEX_OWNER_DIED."""

GATHER_WORDS = 64
"""The longest row of an all_gather, in int64."""

_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; Python 3.11 has no name for it
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

Words = memoryview
Raw = npt.NDArray[np.uint8] | npt.NDArray[np.int16] | npt.NDArray[np.int32]


class Unreachable(Exception):
    """A peer's segment could not be mapped, because its process is gone (or its place has a new one)."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a segment; the same for all ranks of a service.

    Control words of an area: BEGUN and TOKENS, then for each reader r: SENT + r (the tag), START + r and COUNT + r
    (its rows of a combine), then the row of an all_gather.
    Data of a buffer: either x [max_tokens, D] and slots [max_tokens, K], or y [R * max_tokens * K, D].
    """

    ep_size: int
    max_tokens: int
    hidden: int
    top_k: int
    itemsize: int

    BEGUN = 0
    TOKENS = 1
    SENT = LINE

    def __post_init__(self) -> None:
        assert min(self.ep_size, self.max_tokens, self.hidden, self.top_k) >= 1, self
        assert self.itemsize in (2, 4), f"rows of {self.itemsize}-byte values are not supported"

    @cached_property
    def START(self) -> int:
        return self.SENT + _up(self.ep_size, LINE)

    @cached_property
    def COUNT(self) -> int:
        return self.START + _up(self.ep_size, LINE)

    @cached_property
    def GATHER(self) -> int:
        return self.COUNT + _up(self.ep_size, LINE)

    @cached_property
    def area_words(self) -> int:
        return _up(self.GATHER + GATHER_WORDS, PAGE // 8)

    @cached_property
    def areas(self) -> tuple[int, int]:
        """The first word of each control area."""
        return PAGE // 8, PAGE // 8 + self.area_words

    @cached_property
    def x_bytes(self) -> int:
        return self.max_tokens * self.hidden * self.itemsize

    @cached_property
    def max_pairs(self) -> int:
        """(token, k) pairs that one rank can receive in one dispatch."""
        return self.ep_size * self.max_tokens * self.top_k

    @cached_property
    def buffer_bytes(self) -> int:
        dispatch = _up(self.x_bytes, 64) + self.max_tokens * self.top_k * 4
        return _up(max(dispatch, self.max_pairs * self.hidden * self.itemsize), PAGE)

    @cached_property
    def control_bytes(self) -> int:
        return PAGE + 2 * self.area_words * 8

    @cached_property
    def total_bytes(self) -> int:
        """The file's length. It is sparse: only pages that were written take memory."""
        return self.control_bytes + 2 * self.buffer_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """What must be the same on both sides."""
        return self.ep_size, self.max_tokens, self.hidden, self.top_k, self.itemsize

    @property
    def raw(self) -> type[np.generic]:
        """Rows travel as raw values of their width: what the bits mean is the caller's business."""
        return np.int16 if self.itemsize == 2 else np.int32


class Segment:
    """Views of one mapped segment. The index of x, slots, y and gather is the parity of the collective's number."""

    __slots__ = ("_map", "gather", "layout", "slots", "words", "x", "y")

    def __init__(self, mapped: mmap.mmap, layout: Layout) -> None:
        self._map = mapped
        self.layout = layout
        whole = memoryview(mapped)
        self.words: Words = whole[: layout.control_bytes].cast("Q")
        self.gather: list[npt.NDArray[np.int64]] = []
        self.x: list[Raw] = []
        self.slots: list[npt.NDArray[np.int32]] = []
        self.y: list[Raw] = []
        D = layout.hidden
        for parity in (0, 1):
            at = layout.control_bytes + parity * layout.buffer_bytes
            T, K = layout.max_tokens, layout.top_k
            self.gather.append(np.frombuffer(whole, np.int64, GATHER_WORDS, (layout.areas[parity] + layout.GATHER) * 8))
            self.x.append(np.frombuffer(whole, layout.raw, T * D, at).reshape(T, D))
            self.slots.append(np.frombuffer(whole, np.int32, T * K, at + _up(layout.x_bytes, 64)))
            self.y.append(np.frombuffer(whole, layout.raw, layout.max_pairs * D, at).reshape(layout.max_pairs, D))

    def close(self) -> None:
        """Unmap. Nobody may hold a view any more. LOCAL."""
        self.gather, self.x, self.slots, self.y = [], [], [], []
        self.words.release()
        self._map.close()


class OwnSegment(Segment):
    """This rank's segment, and the pipe by which peers wake it. LOCAL throughout."""

    __slots__ = ("_fd", "_life", "_wake_write", "address", "wake_read")

    def __init__(self, layout: Layout, rank: int, incarnation: int) -> None:
        self._fd = os.memfd_create(_name(rank, incarnation), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, layout.total_bytes)
        super().__init__(mmap.mmap(self._fd, layout.total_bytes), layout)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        self.wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        header = _header(layout, rank, incarnation)
        header += [self._wake_write, os.fstat(self._wake_write).st_ino]
        for i, value in enumerate(header[1:], 1):
            self.words[i] = value
        self._life = _LifeLock(self._map, LIFE * 8)
        self.words[_MAGIC] = header[_MAGIC]
        self.address = f"/proc/{os.getpid()}/fd/{self._fd}"

    def wake(self) -> None:
        """Make this rank's own `sleep` look at its words: for another thread of this process."""
        poke_pipe(self._wake_write)

    def drain(self) -> None:
        """Take every pending wake-up out of the pipe; look at the words after it, never before."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.wake_read, 4096)) == 4096:
                pass

    def close(self) -> None:
        if self._life.release():
            super().close()
        for fd in (self._fd, self.wake_read, self._wake_write):
            os.close(fd)


class _LifeLock:
    """A lock in shared memory that a thread takes and holds until it ends: a robust mutex.

    When the thread ends, by whatever cause, the kernel sets OWNER_DIED in the lock's word before it tears down the
    process's memory and devices. A peer that polls the word so knows of the death long before the process can be
    reaped, which takes the longer the more memory it held. (Robust futexes: Linux's robust-futex-ABI.)

    The thread's list of such locks leads through this memory: libc writes there when the thread takes the next one.
    So the memory stays mapped until `release`, whatever becomes of the objects that refer to it."""

    _PROCESS_SHARED, _ROBUST, _ERRORCHECK = 1, 1, 2

    def __init__(self, mapped: mmap.mmap, offset: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._mutex = (ctypes.c_char * (LINE * 8)).from_buffer(mapped, offset)
        attributes = ctypes.create_string_buffer(16)
        self._call("pthread_mutexattr_init", attributes)
        self._call("pthread_mutexattr_setpshared", attributes, self._PROCESS_SHARED)
        self._call("pthread_mutexattr_setrobust", attributes, self._ROBUST)
        self._call("pthread_mutexattr_settype", attributes, self._ERRORCHECK)
        self._call("pthread_mutex_init", self._mutex, attributes)
        self._call("pthread_mutex_lock", self._mutex)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._mutex))  # given back by `release`

    def release(self) -> bool:
        """Let go, so that the memory may be unmapped. False when another thread holds it: then it must stay mapped,
        for the kernel will write to it when that thread ends. LOCAL."""
        code: int = self._libc.pthread_mutex_unlock(self._mutex)
        if code not in (0, errno.EPERM):
            raise OSError(code, "pthread_mutex_unlock failed")
        if code == 0:
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._mutex))
        del self._mutex
        return code == 0

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._libc, name)(*arguments)
        if code != 0:
            raise OSError(code, f"{name} failed")


class PeerSegment(Segment):
    """A peer's segment, read-only, with a pidfd that tells when its process is gone. LOCAL throughout."""

    __slots__ = ("_wake", "address", "incarnation", "pid", "pidfd", "rank")

    unsent = False
    """Whether something is still on its way to this peer: never, in shared memory."""
    broken = False
    """Whether the way to this peer must be made anew."""

    def __init__(self, address: str, layout: Layout, rank: int, incarnation: int) -> None:
        """Raises Unreachable when the process is gone, whatever has its number by now."""
        self.address, self.rank, self.incarnation, self.pid = address, rank, incarnation, pid_of(address)
        with contextlib.ExitStack() as undo:
            try:
                self.pidfd = os.pidfd_open(self.pid)
                undo.callback(os.close, self.pidfd)
                mapped = _map_readonly(address, _header(layout, rank, incarnation), layout.total_bytes)
                super().__init__(mapped, layout)
                self._wake = open_wake(self.pid, self.words)
            except OSError as error:
                # A process that is being torn down refuses with several codes; only a living one may not.
                if isinstance(error, PermissionError) and hasattr(self, "pidfd") and not gone(self.pidfd):
                    raise
                raise Unreachable(f"rank {rank}.{incarnation} at {address}: {error}") from error
            undo.pop_all()

    @property
    def died(self) -> bool:
        """Whether the owner's thread has ended: known as soon as the kernel begins to take its process down."""
        return bool(self.words[LIFE] & OWNER_DIED)

    def wake(self) -> None:
        """Make the peer's `sleep` look at its words."""
        poke_pipe(self._wake)

    def close(self) -> None:
        super().close()
        os.close(self._wake)
        os.close(self.pidfd)


def gone(pidfd: int) -> bool:
    """Whether the process has ended, reaped or not. LOCAL."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def path_of(address: str) -> str:
    """The segment's path in an address. LOCAL."""
    return address.partition(" ")[0]


def pid_of(address: str) -> int:
    """The process number in an address. LOCAL."""
    return int(address.split("/")[2])


def find_address(pid: int, rank: int, incarnation: int) -> str | None:
    """The address of (rank, incarnation)'s segment, found by its name among the open files of process `pid`. LOCAL."""
    wanted = f"/memfd:{_name(rank, incarnation)} (deleted)"
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == wanted:
                    return entry.path
    return None


def wake_address(address: str) -> None:
    """Wake whoever owns the segment at `address`; nothing happens when it is gone. LOCAL."""
    with contextlib.suppress(OSError, Unreachable):
        fd = os.open(path_of(address), os.O_RDONLY | os.O_CLOEXEC)
        try:
            words = memoryview(os.pread(fd, PAGE, 0)).cast("Q")
        finally:
            os.close(fd)
        if words[_MAGIC] == MAGIC:
            pipe = open_wake(pid_of(address), words)
            poke_pipe(pipe)
            os.close(pipe)


def open_wake(pid: int, words: Words) -> int:
    """Open the write end of the wake pipe that a segment's header names. LOCAL. Raises OSError, Unreachable."""
    fd = os.open(f"/proc/{pid}/fd/{words[_WAKE_FD]}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if os.fstat(fd).st_ino != words[_WAKE_INODE]:
        os.close(fd)
        raise Unreachable(f"process {pid} is no longer the one that was meant")
    return fd


def poke_pipe(fd: int) -> None:
    """A full pipe holds a wake-up already, a broken one has nobody to wake. LOCAL."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(fd, b"!")


def memory_fence() -> Callable[[], None]:
    """What orders the stores before it against those after it, and loads likewise. LOCAL.

    x86 keeps stores in order and loads in order, so nothing is needed there. Elsewhere two rounds of an uncontended
    lock do it: what precedes the first release may not pass it, and the second acquire may not pass that release."""
    if platform.machine().lower() in ("x86_64", "amd64", "i686"):
        return _no_fence
    lock = threading.Lock()

    def fence() -> None:
        for _ in range(2):
            with lock:
                pass

    return fence


def _no_fence() -> None:
    """x86: the processor's own order suffices."""


def _map_readonly(address: str, header: list[int], size: int) -> mmap.mmap:
    fd = os.open(path_of(address), os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = list(memoryview(os.pread(fd, 8 * len(header), 0).ljust(8 * len(header), b"\0")).cast("Q"))
        if found[: _INCARNATION + 1] != header[: _INCARNATION + 1]:
            raise Unreachable(f"{address} is not the segment of rank {header[_RANK]}.{header[_INCARNATION]} any more")
        assert found == header, f"{address} has another geometry: {found} against {header}"
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _header(layout: Layout, rank: int, incarnation: int) -> list[int]:
    return [MAGIC, rank, incarnation, *layout.shape]


def _name(rank: int, incarnation: int) -> str:
    return f"phalanx-comm-{rank}.{incarnation}"


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
