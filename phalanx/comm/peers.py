"""The peers of a view: how each one is reached, in memory or over TCP, and which of them are masked."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Iterable

from phalanx.comm import tags
from phalanx.comm.base import CollectiveTimeout, PeerDied
from phalanx.comm.frames import header
from phalanx.comm.links import Links
from phalanx.comm.segment import ROLL_CALL, OwnSegment, PeerSegment, Unreachable, gone
from phalanx.comm.stream import StreamPeer
from phalanx.wire import Site
from phalanx.world import Member, View

Peer = PeerSegment | StreamPeer

_LINGER_S = 0.05
"""How long an interrupt waits for a frame that is on its way, so that what it says gets through behind it."""


class Peers:
    """What one rank knows of the others of its view. LOCAL throughout.

    live: the peers that are not masked, by rank; streams: those of them that are on other hosts; sources: the live ones
    and None, for this rank itself, in rank order. hangups: reports the ends of live processes of this host.
    lost: for each masked rank the cause and the seconds that it took to find out.
    """

    def __init__(self, own: OwnSegment, rank: int, incarnation: int, elastic: bool, site: Site | None) -> None:
        """site: None: all peers are on this host. Raises OSError when this host does not have its address."""
        self.rank = rank
        self._own, self._elastic = own, elastic
        shape = own.layout.shape
        self._links = Links(site, rank, incarnation, shape, own.wake, self._greeting) if site else None
        self._reached: dict[int, Peer] = {}
        self.members: dict[int, Member] = {}
        self.lost: dict[int, tuple[str, float]] = {}
        self.live: list[Peer] = []
        self.streams: list[StreamPeer] = []
        self.sources: list[Peer | None] = []
        self._regroup()

    @property
    def address(self) -> str:
        """How peers reach this rank: the segment, and the door for other hosts if there is one."""
        return f"{self._own.address} {self._links.address}" if self._links else self._own.address

    def adopt(self, view: View) -> list[int]:
        """Hang up on who is gone, reach who is new; returns the ranks that died before they could be reached."""
        self.lost = {}
        self.members = {m.rank: m for m in view.members}
        here = self.members[self.rank].host
        deadline = time.monotonic() + _LINGER_S
        for rank, peer in list(self._reached.items()):
            member = self.members.get(rank)
            if isinstance(peer, StreamPeer):  # it may have ended since we looked last
                peer.pump()
            same = member and (member.incarnation, member.comm_address) == (peer.incarnation, peer.address)
            if same and not peer.broken:
                continue
            self.live, self.sources, self.streams = [], [], []
            del self._reached[rank]
            if isinstance(peer, StreamPeer):  # the last that it hears: which epoch it is not in
                peer.wake()
                peer.linger(deadline - time.monotonic())
            peer.close()
        unreachable = []
        for rank, member in self.members.items():
            if rank != self.rank and rank not in self._reached:
                try:
                    self._reached[rank] = self._reach(member, here)
                except Unreachable:
                    unreachable.append(rank)
        for peer in self._reached.values():
            if isinstance(peer, StreamPeer):
                peer.adopt(view.epoch)
                peer.wake()
        self._regroup()
        return unreachable

    def _reach(self, member: Member, here: str) -> Peer:
        layout = self._own.layout
        if self._links is None or member.host == here:
            return PeerSegment(member.comm_address, layout, member.rank, member.incarnation)
        return StreamPeer(self._links, self._own.words, layout, member.rank, member.incarnation, member.comm_address)

    def begin(self, number: int) -> None:
        """Collective `number` begins: frames of it and of the next are wanted."""
        for peer in self.streams:
            peer.number = number

    def lose(self, rank: int, cause: str, seconds: float, operation: str) -> None:
        """Mask a rank. Without elasticity that is an error, unless it was by an operator's hand."""
        if rank in self.lost:
            return
        if not self._elastic and cause != "operator":
            if cause == "timeout":
                raise CollectiveTimeout(rank, operation, seconds)
            raise PeerDied(rank, operation, seconds)
        self.lost[rank] = (cause, seconds)
        self._regroup()

    def clear(self, rank: int, number: int) -> None:
        """Unmask a rank, in or after collective `number`."""
        if rank in self._reached:
            self.lost.pop(rank, None)
            self._regroup()
            self.begin(number)

    def hung_up(self) -> list[int]:
        """Live peers of this host whose process has ended, as the kernel says."""
        if not self.hangups.poll(0):
            return []
        return [peer.rank for peer in self.live if isinstance(peer, PeerSegment) and gone(peer.pidfd)]

    def await_sign(self, wake_fds: Iterable[int], timeout_s: float) -> set[int]:
        """Wait until somebody wakes this rank, a live peer's process ends, something comes over a stream, or one of
        `wake_fds` is readable; what of it is ready. LOCAL, waits."""
        poller = select.poll()
        for fd in (self._own.wake_read, *wake_fds):
            poller.register(fd, select.POLLIN)
        for peer in self.live:
            if isinstance(peer, StreamPeer):
                peer.register(poller)
            else:
                poller.register(peer.pidfd, select.POLLIN)
        return {fd for fd, _ in poller.poll(math.ceil(timeout_s * 1000))}

    def tell(self) -> None:
        """Have every peer, masked or not, read this rank's words, even behind a frame that is only half sent."""
        for peer in self._reached.values():
            peer.wake()
        deadline = time.monotonic() + _LINGER_S
        for peer in self._reached.values():
            if isinstance(peer, StreamPeer):
                peer.linger(deadline - time.monotonic())

    def close(self) -> None:
        """Hang up on everybody, and answer nobody any more."""
        self.live, self.sources, self.streams = [], [], []
        for peer in self._reached.values():
            peer.close()
        self._reached = {}
        if self._links is not None:
            self._links.close()

    def _regroup(self) -> None:
        """Write down who is sent to and awaited, after any change of the mask."""
        self.live = [peer for rank, peer in sorted(self._reached.items()) if rank not in self.lost]
        self.streams = [peer for peer in self.live if isinstance(peer, StreamPeer)]
        self.sources = sorted([*self.live, None], key=lambda peer: peer.rank if peer else self.rank)
        self.hangups = select.poll()
        for peer in self.live:
            if isinstance(peer, PeerSegment):
                self.hangups.register(peer.pidfd, select.POLLIN)

    def _greeting(self) -> bytes:
        """What a connection begins with: our roll call, or the epoch that we are in. Called in other threads."""
        return header(tags.tag_of(self._own.words[ROLL_CALL], 0, tags.ROLL_CALL), 0)
