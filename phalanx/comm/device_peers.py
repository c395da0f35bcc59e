"""How ranks on devices find each other's buffers: by a handle, as text, in each rank's host segment.

The segment is of the kind that CPU ranks have, so the same address leads to it, the same pipe wakes a sleeper, and a
reused process number is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from phalanx.comm import segment
from phalanx.comm.peer_memory import PeerMemory, PeerMemoryError
from phalanx.world import Member

_HANDLE_BYTES = 2048


@dataclass(frozen=True)
class DevicePeer:
    """A member that this rank has mapped. pointer: its buffer, as this rank's device addresses it."""

    member: Member
    segment: segment.PeerSegment
    pointer: int


def segment_layout(ep_size: int) -> segment.Layout:
    """Host segments carry words and a handle, no rows: one row of `_HANDLE_BYTES`."""
    return segment.Layout(ep_size, 1, _HANDLE_BYTES // 4, 1, 4)


def publish_handle(own: segment.OwnSegment, memory: PeerMemory) -> None:
    """Leave the handle of this rank's buffer where peers look for it. LOCAL."""
    text = memory.handle().encode()
    assert len(text) < _HANDLE_BYTES, f"a handle of {len(text)} bytes"
    own.x[0].view(np.uint8).reshape(-1)[: len(text)] = np.frombuffer(text, np.uint8)


def map_peer(member: Member, ep_size: int, memory: PeerMemory) -> DevicePeer:
    """Map a member's segment and buffer. Raises segment.Unreachable when its process is gone. LOCAL."""
    peer = segment.PeerSegment(member.comm_address, segment_layout(ep_size), member.rank, member.incarnation)
    try:
        text = peer.x[0].view(np.uint8).tobytes().rstrip(b"\0").decode()
        return DevicePeer(member, peer, memory.open(text))
    except BaseException as error:
        died = isinstance(error, PeerMemoryError) and segment.gone(peer.pidfd)
        peer.close()
        if died:  # between mapping its segment and its buffer
            raise segment.Unreachable(f"rank {member}: {error}") from error
        raise


class Expected:
    """Peers that are mapped before a view has them: by a thread, for opening another process's memory takes a driver
    about a millisecond, in which steps can go on. LOCAL throughout; for one thread to use."""

    def __init__(self, reach: Callable[[Member], DevicePeer]) -> None:
        """reach: maps a member, as `map_peer` does; called by the thread."""
        self._reach = reach
        self._coming: dict[tuple[int, int], Future[DevicePeer]] = {}
        """By rank and incarnation."""

    def begin(self, members: Iterable[Member]) -> bool:
        """Have these mapped; whether all are by now, or turned out to be unreachable."""
        wanted = {(member.rank, member.incarnation): member for member in members}
        if new := wanted.keys() - self._coming.keys():
            pool = ThreadPoolExecutor(1, thread_name_prefix="phalanx-map")
            self._coming |= {name: pool.submit(self._reach, wanted[name]) for name in new}
            pool.shutdown(wait=False)  # the thread ends with its work
        return all(self._coming[name].done() for name in wanted)

    def take(self, member: Member) -> DevicePeer:
        """This member's mapping, which is made here if nobody expected it; it is the caller's from now on. Raises what
        `map_peer` raises."""
        coming = self._coming.pop((member.rank, member.incarnation), None)
        return self._reach(member) if coming is None else coming.result()

    def forget(self) -> list[DevicePeer]:
        """Those that nobody took; nothing is expected any more. Waits for what is under way."""
        left, self._coming = self._coming, {}
        return [coming.result() for coming in left.values() if coming.exception() is None]
