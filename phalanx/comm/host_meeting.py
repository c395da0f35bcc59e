"""Where the hosts of ranks on devices meet: a row each, through their segments, while their devices compute.

A step's header is for the host, and the host must have it while the step before still runs. A kernel that gathers it
would wait for peers beside that step's own kernels: it takes a place on the device that their grids count on, and two
kernels that wait for peers' twins of each other wait for ever where a device has no room for both. The segments of one
host (`comm.segment`) are there for the handles anyway; a row through them takes some microseconds, no launch, no copy
and no wait for a stream, and what it finds does not touch the words that say what the device's collectives were.

It is `comm.cpu`'s all_gather in small, for peers of this host: the same tags, the same two areas, the same reasons to
stop waiting. A row has one word for all readers. Whoever went on because of it (to a World that all agreed on, say) has
seen the words of all; so when a rank sees that somebody went on, everything it waits for is there to be read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from phalanx.comm import tags
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.segment import GATHER_WORDS, ROLL_CALL, Layout, OwnSegment, PeerSegment, gone, memory_fence
from phalanx.comm.silence import Silence
from phalanx.world import View

_SPIN_NS = 300_000
"""A wait this long is not for a peer that comes at the same time: nap, and let other threads have the interpreter."""
_NAP_S = 20e-6
_ROUNDS_PER_LOOK = 16


class HostMeeting:
    """One rank's part. `lost` and `interrupted` say what ended its waits since `adopt`. One thread at a time."""

    def __init__(self, own: OwnSegment, rank: int, ep_size: int, notices: NoticeBoard | None = None) -> None:
        self._own, self._rank, self._ep_size, self._notices = own, rank, ep_size, notices
        self._layout: Layout = own.layout
        self._fence = memory_fence()
        self._view = View(0, ep_size, ())
        self._peers: dict[int, PeerSegment] = {}
        self._number = 0
        self.lost: dict[int, tuple[str, float]] = {}
        """Rank -> (notice, timeout or operator; seconds from the earliest sign until it was masked here)."""
        self.interrupted = 0
        """The latest roll call that ended a wait, or that this rank opened."""

    def adopt(self, view: View, peers: Mapping[int, PeerSegment], dead: Iterable[int] = ()) -> None:
        """Meet the members of `view` from now on; peers: those that could be mapped, dead: those known to be. LOCAL."""
        self._view, self._peers, self._number = view, dict(peers), 0
        self.lost = {rank: ("notice", 0.0) for rank in dead}
        if self.interrupted <= view.epoch:
            self.interrupted = 0

    def mask(self, rank: int, alive: bool) -> None:
        """An operator's word about a rank. LOCAL."""
        if alive:
            self.lost.pop(rank, None)
        else:
            self.lost[rank] = "operator", 0.0

    def interrupt(self, epoch: int) -> None:
        """This rank opens a roll call: it waits for nobody until `adopt`. May be called from any thread. LOCAL."""
        self.interrupted = max(self.interrupted, epoch)

    def meet(self, row: Sequence[int], timeout_s: float) -> npt.NDArray[np.int64]:
        """Everyone's row as int64 [R, len(row)], zeros for masked ranks. It means something only when nobody is `lost`
        and nothing has `interrupted` it. COLLECTIVE, waits."""
        words = len(row)
        assert words <= GATHER_WORDS, f"{words} words, a row holds {GATHER_WORDS}"
        rows_Rn = np.zeros((self._ep_size, words), np.int64)
        if self.interrupted > self._view.epoch:
            return rows_Rn
        self._number += 1
        parity, area = self._number & 1, self._layout.areas[self._number & 1]
        tag = tags.tag_of(self._view.epoch, self._number, tags.ALL_GATHER)
        own = self._own.words
        own[area + Layout.BEGUN] = tag
        self._fence()
        self._own.gather[parity][:words] = row
        self._fence()
        own[area + Layout.SENT] = tag
        if not self._wait(area + Layout.SENT, tag, timeout_s):
            return rows_Rn
        self._fence()
        rows_Rn[self._rank] = row
        for rank, peer in self._live():
            rows_Rn[rank] = peer.gather[parity][:words]
        self._fence()
        for rank, peer in self._live():
            begun = peer.words[area + Layout.BEGUN]
            if (epoch := begun >> tags.EPOCH_SHIFT) > self._view.epoch:  # it met us, and serves a later World by now
                self.interrupted = max(self.interrupted, epoch)
            elif begun != tag:  # it went on without us while we copied
                self.lost[rank] = "timeout", 0.0
        return rows_Rn

    def _live(self) -> list[tuple[int, PeerSegment]]:
        return [(rank, peer) for rank, peer in self._peers.items() if rank not in self.lost]

    def _wait(self, at: int, tag: int, timeout_s: float) -> bool:
        """Until the word at `at` of every peer that is not masked is `tag`; False when a roll call ended the wait."""
        began = time.monotonic_ns()
        rounds = 0
        silence: Silence | None = None
        while pending := [(rank, peer) for rank, peer in self._live() if peer.words[at] != tag]:
            rounds += 1
            waited = time.monotonic_ns() - began
            if silence is not None:
                silence.tick()
            elif waited > _SPIN_NS:
                silence = Silence(peer.pid for _, peer in pending)
            if silence is not None or rounds % _ROUNDS_PER_LOOK == 1:
                if self._is_open(at, tag):
                    return False
                self._look_for_deaths(pending, began)
                for rank, peer in pending:
                    if self._has_left(peer.words[at], tag):
                        self.lost.setdefault(rank, ("timeout", waited / 1e9))
            if silence is None:
                os.sched_yield()
                continue
            if silence.longest_ns >= timeout_s * 1e9:
                for rank, peer in pending:
                    silent = silence.of_ns(peer.pid)
                    if silent is not None and silent >= timeout_s * 1e9:
                        self.lost.setdefault(rank, ("timeout", waited / 1e9))
            time.sleep(_NAP_S)
        return True

    def _is_open(self, at: int, tag: int) -> bool:
        """Whether a roll call ends this wait. Its opener may have gone on because all met here; then all have."""
        opened = max((peer.words[ROLL_CALL] for _, peer in self._live()), default=0)
        if opened > self._view.epoch:
            self._fence()
            if any(peer.words[at] != tag for _, peer in self._live()):
                self.interrupted = max(self.interrupted, opened)
        return self.interrupted > self._view.epoch

    def _look_for_deaths(self, pending: list[tuple[int, PeerSegment]], began_ns: int) -> None:
        now = time.monotonic_ns()
        notices = self._notices
        for rank, peer in pending:
            member = self._view.member(rank)
            if notices is not None and member is not None and notices.is_dead(member):
                cause = "operator" if notices.cause(rank) == "operator" else "notice"
                self.lost.setdefault(rank, (cause, (now - max(began_ns, notices.stamp_ns(rank))) / 1e9))
            elif peer.died or gone(peer.pidfd):
                self.lost.setdefault(rank, ("notice", (now - began_ns) / 1e9))
        mine = self._view.member(self._rank)
        if notices is not None and mine is not None and notices.is_dead(mine):
            self.interrupted = max(self.interrupted, self._view.epoch + 1)  # we are out, and read so in the roll call

    def _has_left(self, word: int, tag: int) -> bool:
        """Whether a peer's word is of a later meeting of this epoch: it masked us."""
        return word >> tags.EPOCH_SHIFT == self._view.epoch and word > tag
