"""The communicator on CPUs of one host, over shared memory: the reference for every other one.

A rank writes what it has to say once, into its own segment (`comm.segment`), and then tells each reader by a word of
its own that it is there. Readers take what concerns them: in a dispatch the tokens that want one of their slots, in a
combine the rows of their tokens. So each byte is copied once into and once out of shared memory, nobody writes where
others write, and a rank that is stopped in the middle of anything leaves nothing locked.

A wait spins with `sched_yield` (4 ranks on 2 cores need each other's CPU), and naps while others compute. Only a wait
looks for trouble: notices of death, open roll calls, peers whose process ended, time-outs. What is ready when a rank
looks costs it no check but one: after copying, that the peer has not reused the buffer.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.comm.base import CollectiveTimeout, Communicator, Dispatched, PeerDied, Status
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.segment import (
    GATHER_WORDS,
    RINGING,
    ROLL_CALL,
    Layout,
    OwnSegment,
    PeerSegment,
    Raw,
    Unreachable,
    gone,
    memory_fence,
)
from phalanx.comm.silence import Silence
from phalanx.errors import Evicted
from phalanx.world import Member, View

Int64Array = npt.NDArray[np.int64]

# A tag names one message: epoch, number of the collective within it, kind. Equal tags, and only those, are the same.
_KINDS = ("", "barrier", "all_gather", "dispatch", "combine")
_BARRIER, _ALL_GATHER, _DISPATCH, _COMBINE = 1, 2, 3, 4
_NUMBER_SHIFT = 3
_EPOCH_SHIFT = 40

_SPIN_NS = 2_000_000
"""A wait this long is no longer about latency: look for trouble in each round."""
_TURN_NS = 300_000
"""A yield this long means that someone computes who had to wait for a CPU: nap, instead of asking for it back."""
_NAP_S = 50e-6
_ROUNDS_PER_LOOK = 16
"""While it spins, a wait looks for trouble every so many rounds (some 10 us)."""


@dataclass(frozen=True, slots=True)
class _Handle:
    """What `combine` must know of its dispatch.

    order_P: int64 [T*K], own pairs sorted by destination rank; bounds: where each rank's begin, by rank.
    cuts: for each source rank that was heard, the range of its pairs in y_MD.
    """

    epoch: int
    tokens: int
    order_P: Int64Array
    bounds: list[int]
    cuts: dict[int, tuple[int, int]]


class CpuCommunicator(Communicator):
    """Shared-memory mailboxes between the ranks of one host. One thread at a time may use it.

    max_tokens: the most tokens a rank dispatches at once. slots_per_rank: slot s stands on rank s // slots_per_rank.
    peer_timeout_s: a silence this long masks a peer; time in which this rank, or the peer, was runnable but had no CPU,
    or in which this rank was stopped, does not count. notices: the launcher's board. elastic: False turns a lost peer
    into an error (CollectiveTimeout, PeerDied) and leaves the guards out, so that their price can be measured.
    fault_point: called with a name at each point where a test or an operator may want this rank to fail: the
    collective's name (dispatch, combine, all_gather, barrier) between what it sends and what it waits for, `half_sent`
    between its first and its second peer, `received` when it has everything.
    """

    def __init__(
        self,
        rank: int,
        ep_size: int,
        *,
        incarnation: int,
        max_tokens: int,
        hidden: int,
        top_k: int,
        slots_per_rank: int,
        dtype: torch.dtype,
        peer_timeout_s: float,
        notices: NoticeBoard | None = None,
        elastic: bool = True,
        fault_point: Callable[[str], None] | None = None,
    ) -> None:
        assert 0 <= rank < ep_size, f"rank {rank} outside ep_size {ep_size}"
        self.rank, self.ep_size, self.incarnation = rank, ep_size, incarnation
        self.dtype, self.slots_per_rank, self.elastic = dtype, slots_per_rank, elastic
        self._layout = Layout(ep_size, max_tokens, hidden, top_k, dtype.itemsize)
        self._raw_dtype = torch.int16 if dtype.itemsize == 2 else torch.int32
        self._own = OwnSegment(self._layout, rank, incarnation)
        self._peers: dict[int, PeerSegment] = {}
        self._members: dict[int, Member] = {}
        self._notices = notices
        self._notices_seen = -1
        self._timeout_ns = int(peer_timeout_s * 1e9)
        self._fault_point = fault_point
        self._fence = memory_fence()
        self._epoch = self._number = self._roll_call = 0
        self._lost: dict[int, tuple[str, float]] = {}
        self._failed = False
        self._parity = self._area = self._tag = 0
        self._live: list[PeerSegment] = []
        self._sources: list[PeerSegment | None] = []  # the live peers and None, for this rank itself, in rank order
        self._regroup()

    # --- who is in

    @property
    def address(self) -> str:
        return self._own.address

    @property
    def failed(self) -> bool:
        return self._failed

    def adopt(self, view: View) -> None:
        assert view.ep_size == self.ep_size, f"ep_size {self.ep_size} cannot serve a view of {view.ep_size} ranks"
        assert self._epoch < view.epoch < 1 << (63 - _EPOCH_SHIFT), f"epochs grow: {self._epoch} -> {view.epoch}"
        me = view.member(self.rank)
        if me is None or me.incarnation != self.incarnation:
            raise Evicted(self.rank, self.incarnation, view.epoch)
        self._epoch, self._number, self._lost = view.epoch, 0, {}
        if self._roll_call <= view.epoch:
            self._roll_call = 0
        # Whoever still waits under an earlier epoch learns from this word that it waits in vain.
        self._own.words[ROLL_CALL] = max(self._own.words[ROLL_CALL], view.epoch)
        self._members = {m.rank: m for m in view.members}
        unreachable = self._map(view)
        self._regroup()
        self._notices_seen = -1
        self._look("adopt")
        for rank in unreachable:
            self._lose(rank, "notice", 0.0, "adopt")

    def _map(self, view: View) -> list[int]:
        """Unmap who is gone, map who is new; returns the ranks that died before they could be mapped."""
        wanted = {m.rank: m for m in view.members if m.rank != self.rank}
        for rank, peer in list(self._peers.items()):
            member = wanted.get(rank)
            if member and (member.incarnation, member.comm_address) == (peer.incarnation, peer.address):
                continue
            self._live, self._sources = [], []
            del self._peers[rank]
            peer.close()
        unreachable = []
        for rank, member in wanted.items():
            if rank not in self._peers:
                try:
                    self._peers[rank] = PeerSegment(member.comm_address, self._layout, rank, member.incarnation)
                except Unreachable:
                    unreachable.append(rank)
        return unreachable

    def _regroup(self) -> None:
        """Write down who is sent to and awaited, after any change of the mask."""
        self._live = [peer for rank, peer in sorted(self._peers.items()) if rank not in self._lost]
        self._sources = sorted([*self._live, None], key=lambda peer: peer.rank if peer else self.rank)
        self._hangups = select.poll()
        for peer in self._live:
            self._hangups.register(peer.pidfd, select.POLLIN)
        self._failed = bool(self._lost or self._roll_call)

    def _lose(self, rank: int, cause: str, seconds: float, operation: str) -> None:
        if rank in self._lost:
            return
        if not self.elastic and cause != "operator":
            if cause == "timeout":
                raise CollectiveTimeout(rank, operation, seconds)
            raise PeerDied(rank, operation, seconds)
        self._lost[rank] = (cause, seconds)
        self._regroup()

    def query_mask(self) -> Tensor:
        mask = torch.zeros(self.ep_size, dtype=torch.uint8)
        mask[[rank for rank in self._members if rank not in self._lost]] = 1
        return mask

    def update_mask(self, rank: int, alive: bool) -> None:
        assert rank in self._members, f"rank {rank} is not in epoch {self._epoch}"
        assert rank != self.rank, "a rank cannot mask itself"
        if not alive:
            self._lose(rank, "operator", 0.0, "update_mask")
        elif rank in self._peers:
            self._lost.pop(rank, None)
            self._regroup()

    def status(self) -> Status:
        return Status(
            lost=frozenset(self._lost),
            interrupted=self._roll_call,
            causes=tuple((rank, cause) for rank, (cause, _) in sorted(self._lost.items())),
            detect_s=tuple((rank, seconds) for rank, (_, seconds) in sorted(self._lost.items())),
        )

    def interrupt(self, epoch: int) -> None:
        if epoch <= self._epoch:
            return
        self._hear_roll_call(epoch)
        words = self._own.words
        words[ROLL_CALL] = max(words[ROLL_CALL], epoch)
        self._fence()
        for peer in self._peers.values():
            peer.wake()

    def _hear_roll_call(self, epoch: int) -> None:
        self._roll_call = max(self._roll_call, epoch)
        self._failed = True

    @contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        before, self._timeout_ns = self._timeout_ns, int(timeout_s * 1e9)
        try:
            yield
        finally:
            self._timeout_ns = before

    def close(self) -> None:
        self._live, self._sources = [], []
        for peer in self._peers.values():
            peer.close()
        self._peers = {}
        self._own.close()

    # --- collectives

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor) -> Dispatched:
        T, K, D = len(x_TD), self._layout.top_k, self._layout.hidden
        assert len(x_TD) <= self._layout.max_tokens, f"{T} tokens are more than max_tokens={self._layout.max_tokens}"
        assert (x_TD.shape, x_TD.dtype) == ((T, D), self.dtype), (x_TD.shape, x_TD.dtype)
        assert (slots_TK.shape, slots_TK.dtype) == ((T, K), torch.int32), (slots_TK.shape, slots_TK.dtype)
        if not self._begin(_DISPATCH):
            return self._nothing(T)
        x, slots = self._raw(x_TD), slots_TK.numpy().reshape(-1)
        if self._live:
            parity = self._parity
            np.copyto(self._own.x[parity][:T], x)
            self._own.slots[parity][: T * K] = slots
            self._own.words[self._area + Layout.TOKENS] = T
            self._send()
        order_P, bounds = self._sort_by_rank(slots)
        if not self._receive():
            return self._nothing(T)
        return self._take(x, slots, order_P, bounds)

    def _sort_by_rank(self, slots: npt.NDArray[np.int32]) -> tuple[Int64Array, list[int]]:
        """Own pairs by destination rank, within one in the order of (token, k), and where each rank's begin."""
        rank_P = slots // self.slots_per_rank
        count = np.bincount(rank_P + 1, minlength=self.ep_size + 1)
        assert count.size == self.ep_size + 1, f"slot {slots.max()} is on no rank"
        return rank_P.argsort(kind="stable"), count.cumsum().tolist()

    def _take(self, x: Raw, slots: npt.NDArray[np.int32], order_P: Int64Array, bounds: list[int]) -> Dispatched:
        """Copy from every source the tokens that want one of our slots."""
        K, parity, tokens_word = self._layout.top_k, self._parity, self._area + Layout.TOKENS
        starts, flats, rows = [0], [], []
        for peer in self._sources:
            # A count that is no count can only come from a peer that went on without us: see `_check_overtaken`.
            T = min(peer.words[tokens_word], self._layout.max_tokens) if peer else len(x)
            starts.append(starts[-1] + T)
            flats.append(peer.slots[parity][: T * K] if peer else slots)
            rows.append(peer.x[parity] if peer else x)
        local_P = (np.concatenate(flats) if len(flats) > 1 else slots) - self.rank * self.slots_per_rank
        # As unsigned numbers, -1 and the slots of lower ranks lie above all of ours. Methods cost half of functions.
        hit_M = (local_P.view(np.uint32) < self.slots_per_rank).nonzero()[0]
        token_M = hit_M // K
        first_M = np.ones(len(hit_M), bool)
        np.not_equal(token_M[1:], token_M[:-1], out=first_M[1:])
        token_N = token_M[first_M]
        x_ND = np.empty((len(token_N), self._layout.hidden), self._layout.raw)
        at_N, at_M = token_N.searchsorted(starts).tolist(), token_M.searchsorted(starts).tolist()
        cuts = {}
        for i, peer in enumerate(self._sources):
            a, b = at_N[i], at_N[i + 1]
            if a < b:
                rows[i].take(token_N[a:b] - starts[i], 0, x_ND[a:b], "clip")
            cuts[peer.rank if peer else self.rank] = (at_M[i], at_M[i + 1])
        self._check_overtaken()
        return Dispatched(
            x_ND=torch.from_numpy(x_ND).view(self.dtype),
            row_M=torch.from_numpy(first_M.cumsum() - 1),
            slot_M=torch.from_numpy(local_P[hit_M].astype(np.int64)),
            handle=_Handle(self._epoch, len(x), order_P, bounds, cuts),
        )

    def _nothing(self, tokens: int) -> Dispatched:
        """What an interrupted dispatch received."""
        none = torch.empty(0, dtype=torch.int64)
        x_ND = torch.empty(0, self._layout.hidden, dtype=self.dtype)
        return Dispatched(x_ND, none, none, _Handle(0, tokens, np.empty(0, np.int64), [], {}))

    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        handle = cast(_Handle, dispatched.handle)
        K, D = self._layout.top_k, self._layout.hidden
        M = dispatched.row_M.numel()
        assert (y_MD.shape, y_MD.dtype) == ((M, D), self.dtype), (y_MD.shape, y_MD.dtype, M)
        if handle.epoch != self._epoch or not self._begin(_COMBINE):
            return torch.zeros(handle.tokens, K, D, dtype=self.dtype)
        y = self._raw(y_MD)
        own_a, own_b = handle.cuts[self.rank]
        if self._live:
            mine, words = self._own.y[self._parity], self._own.words
            np.copyto(mine[:own_a], y[:own_a])  # own rows need not travel
            np.copyto(mine[own_b:M], y[own_b:])
            start, count = self._area + self._layout.START, self._area + self._layout.COUNT
            for peer in self._live:
                a, b = handle.cuts.get(peer.rank, (0, 0))
                words[start + peer.rank], words[count + peer.rank] = a, b - a
            self._send()
        if not self._receive():
            return torch.zeros(handle.tokens, K, D, dtype=self.dtype)
        out = self._place(y[own_a:own_b], handle)
        return torch.from_numpy(out).view(self.dtype).view(handle.tokens, K, D)

    def _place(self, y_own: Raw, handle: _Handle) -> Raw:
        """Copy each rank's rows to where their pairs stand: [T*K, D]."""
        area = self._area
        start_word = area + self._layout.START + self.rank
        count_word = area + self._layout.COUNT + self.rank
        parts = []
        placed = 0
        for peer in self._sources:
            rank = peer.rank if peer else self.rank
            at = handle.order_P[handle.bounds[rank] : handle.bounds[rank + 1]]
            n = len(at)
            if peer:
                start = min(peer.words[start_word], self._layout.max_pairs - n)
                n = n if peer.words[count_word] == n else 0  # it did not hear our dispatch
            if n:
                parts.append((at, peer.y[self._parity][start : start + n] if peer else y_own))
                placed += n
        shape = (len(handle.order_P), self._layout.hidden)
        out: Raw = (np.empty if placed == shape[0] else np.zeros)(shape, self._layout.raw)
        for at, rows in parts:
            out[at] = rows
        self._check_overtaken()
        return out

    def all_gather(self, row: Tensor) -> Tensor:
        n = row.numel()
        assert n <= GATHER_WORDS, f"a row of {n} is longer than {GATHER_WORDS}"
        assert row.dtype == torch.int64, row.dtype
        rows = np.zeros((self.ep_size, n), np.int64)
        if self._begin(_ALL_GATHER):
            own = row.numpy().reshape(-1)
            if self._live:
                self._own.gather[self._parity][:n] = own
                self._own.words[self._area + Layout.TOKENS] = n
                self._send()
            if self._receive():
                for peer in self._sources:
                    if peer:
                        rows[peer.rank] = peer.gather[self._parity][:n]
                    else:
                        rows[self.rank] = own
                self._check_overtaken()
        return torch.from_numpy(rows)

    def barrier(self) -> None:
        if self._begin(_BARRIER):
            self._send()
            self._receive()

    # --- one collective's protocol

    def _begin(self, kind: int) -> bool:
        """Number the collective and claim its buffer; False when a roll call is open. Before the first view: alone."""
        if self._roll_call:
            return False
        self._number += 1
        self._parity = self._number & 1
        self._area = self._layout.areas[self._parity]
        self._tag = self._epoch << _EPOCH_SHIFT | self._number << _NUMBER_SHIFT | kind
        self._own.words[self._area + Layout.BEGUN] = self._tag
        self._fence()
        return True

    def _send(self) -> None:
        """Tell each unmasked peer that everything is written."""
        self._fence()
        words, sent, tag = self._own.words, self._area + Layout.SENT, self._tag
        if self._fault_point is None:
            for peer in self._live:
                words[sent + peer.rank] = tag
            return
        for i, peer in enumerate(self._live):
            if i == 1:
                self._fault_point("half_sent")
            words[sent + peer.rank] = tag
        self._fault_point(_KINDS[tag & 7])

    def _receive(self) -> bool:
        """Wait for every unmasked peer; False when a roll call ended the wait."""
        at, tag = self._area + Layout.SENT + self.rank, self._tag
        pending = [peer for peer in self._live if peer.words[at] != tag]
        if pending:
            self._wait(pending, at, tag)
        self._fence()
        if self._fault_point is not None:
            self._fault_point("received")
        return not self._roll_call

    def _wait(self, pending: list[PeerSegment], at: int, tag: int) -> None:
        start = now = time.monotonic_ns()
        rounds = 0
        crowded = False
        silence: Silence | None = None
        while True:
            time.sleep(_NAP_S) if crowded else os.sched_yield()
            pending = [peer for peer in pending if peer.words[at] != tag]
            if not pending:
                return
            rounds += 1
            before, now = now, time.monotonic_ns()
            crowded = crowded or now - before > _TURN_NS or now - start > _SPIN_NS
            if silence is not None:
                silence.tick()
            elif now - start > _SPIN_NS:
                silence = Silence(peer.pid for peer in pending)
            elif rounds % _ROUNDS_PER_LOOK != 1:
                continue
            if any(peer.words[ROLL_CALL] > self._epoch for peer in self._live):
                # Who opened it may have finished this very collective: then all parts are here, or will be at once.
                os.sched_yield()
                if all(peer.words[at] == tag for peer in pending):
                    return
            self._look(_KINDS[tag & 7], start)
            for peer in pending:
                self._check_word(peer, peer.words[at], tag)
            if silence is not None:
                self._look_for_hangups(_KINDS[tag & 7], start)
                if silence.longest_ns >= self._timeout_ns:
                    self._time_out(pending, silence, (time.monotonic_ns() - start) / 1e9)
            if self._roll_call:
                return
            pending = [peer for peer in pending if peer.rank not in self._lost]

    def _look(self, operation: str, since_ns: int | None = None) -> None:
        """Read what the launcher and the peers' segments say: deaths and open roll calls. since_ns: when a wait began,
        for which a peer's life lock, too, is looked at."""
        if since_ns is not None:
            for peer in list(self._live):
                if peer.died:
                    self._lose(peer.rank, "notice", (time.monotonic_ns() - since_ns) / 1e9, operation)
        if self._notices is not None and self._notices_seen != (version := self._notices.version):
            self._notices_seen = version
            now = time.monotonic_ns()
            for rank, member in self._members.items():
                if not self._notices.is_dead(member):
                    continue
                if rank == self.rank:  # an operator took us out: stop, and read so in the roll call
                    self._hear_roll_call(self._epoch + 1)
                else:
                    cause = "operator" if self._notices.cause(rank) == "operator" else "notice"
                    self._lose(rank, cause, (now - self._notices.stamp_ns(rank)) / 1e9, operation)
        for peer in self._live:
            if peer.words[ROLL_CALL] > self._epoch:
                self._hear_roll_call(peer.words[ROLL_CALL])

    def _look_for_hangups(self, operation: str, since_ns: int) -> None:
        """Ask the kernel which peers' processes have ended."""
        if self._hangups.poll(0):
            seconds = (time.monotonic_ns() - since_ns) / 1e9
            for peer in list(self._live):
                if gone(peer.pidfd):
                    self._lose(peer.rank, "notice", seconds, operation)

    def _time_out(self, pending: list[PeerSegment], silence: Silence, waited_s: float) -> None:
        for peer in pending:
            silent_ns = silence.of_ns(peer.pid)
            if silent_ns is not None and silent_ns >= self._timeout_ns:
                self._lose(peer.rank, "timeout", waited_s, _KINDS[self._tag & 7])

    def _check_word(self, peer: PeerSegment, word: int, tag: int) -> None:
        """A word beyond ours: the peer stopped waiting for us. Another kind under our number: a bug of the caller."""
        if word >> _EPOCH_SHIFT != self._epoch or word == tag:
            return
        ours, theirs = tag >> _NUMBER_SHIFT, word >> _NUMBER_SHIFT
        assert ours != theirs, f"rank {peer.rank} runs {_KINDS[word & 7]} while this rank runs {_KINDS[tag & 7]}"
        if theirs > ours:
            self._lose(peer.rank, "timeout", 0.0, _KINDS[tag & 7])

    def _check_overtaken(self) -> None:
        """After the copies: a peer that reuses this buffer already has masked us, and what we copied may be torn."""
        if not self.elastic:
            return
        self._fence()
        begun, tag = self._area + Layout.BEGUN, self._tag
        for peer in self._live:
            if peer.words[begun] != tag:
                if peer.words[ROLL_CALL] > self._epoch:
                    self._hear_roll_call(peer.words[ROLL_CALL])
                else:
                    self._lose(peer.rank, "timeout", 0.0, _KINDS[tag & 7])

    def _raw(self, rows: Tensor) -> Raw:
        return cast(Raw, rows.view(self._raw_dtype).numpy())

    # --- sleeping together

    def ring(self) -> None:
        self._own.words[RINGING] = self._epoch << _EPOCH_SHIFT | (self._number + 1) << _NUMBER_SHIFT
        self._fence()
        for peer in self._live:
            peer.wake()

    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        deadline = time.monotonic() + timeout_s
        finished = self._epoch << _EPOCH_SHIFT | self._number << _NUMBER_SHIFT
        poller = select.poll()
        for fd in (self._own.wake_read, *wake_fds, *(peer.pidfd for peer in self._live)):
            poller.register(fd, select.POLLIN)
        ready: set[int] = set()
        while True:
            self._own.drain()
            self._fence()
            self._look("sleep", time.monotonic_ns())
            for peer in list(self._live):
                if peer.pidfd in ready:
                    self._lose(peer.rank, "notice", 0.0, "sleep")
            if self._failed or any(peer.words[RINGING] > finished for peer in self._live):
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not ready.isdisjoint(wake_fds):
                return False
            ready = {fd for fd, _ in poller.poll(math.ceil(remaining * 1000))}
