"""How ranks on devices find each other's buffers: by a handle, as text, in each rank's host segment.

The segment is of the kind that CPU ranks have, so the same address leads to it, the same pipe wakes a sleeper, and a
reused process number is noticed.
"""

from __future__ import annotations

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
