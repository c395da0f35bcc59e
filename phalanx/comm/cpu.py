"""The communicator on CPUs, over shared memory within a host and TCP between hosts: the reference for every other one.

A rank writes what it has to say once, into its own segment (`comm.segment`), and then tells each reader by a word of
its own that it is there. Readers take what concerns them: in a dispatch the tokens that want one of their slots, in a
combine the rows of their tokens. So each byte is copied once into and once out of shared memory, nobody writes where
others write, and a rank that is stopped in the middle of anything leaves nothing locked.

A wait spins with `sched_yield` (4 ranks on 2 cores need each other's CPU), and naps while others compute. Only a wait
looks for trouble: notices of death, open roll calls, peers whose process ended, time-outs. What is ready when a rank
looks costs it no check but one: after copying, that the peer has not reused the buffer.

To a peer on another host (`comm.stream`) the same parts are sent as frames, and its words and areas are local memory
that is filled from them. A wait then sends and receives in each round, and also lasts until everything is sent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from phalanx.comm import rows, tags
from phalanx.comm.base import Communicator, Dispatched, Status
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.peers import Peer, Peers
from phalanx.comm.segment import (
    GATHER_WORDS,
    RINGING,
    ROLL_CALL,
    Layout,
    OwnSegment,
    PeerSegment,
    Raw,
    memory_fence,
)
from phalanx.comm.silence import Silence
from phalanx.comm.stream import Part, StreamPeer
from phalanx.comm.tags import KINDS
from phalanx.errors import Evicted
from phalanx.wire import Site
from phalanx.world import View

_SPIN_NS = 2_000_000
"""A wait this long is no longer about latency: look for trouble in each round."""
_TURN_NS = 300_000
"""A yield this long means that someone computes who had to wait for a CPU: nap, instead of asking for it back."""
_NAP_S = 50e-6
_ROUNDS_PER_LOOK = 16
"""While it spins, a wait looks for trouble every so many rounds (some 10 us)."""


class CpuCommunicator(Communicator):
    """Shared-memory mailboxes between the ranks of one host, streams between hosts. One thread at a time may use it.

    max_tokens: the most tokens a rank dispatches at once. slots_per_rank: slot s stands on rank s // slots_per_rank.
    peer_timeout_s: a silence this long masks a peer; time in which this rank, or the peer, was runnable but had no CPU,
    or in which this rank was stopped, does not count. notices: the launcher's board. elastic: False turns a lost peer
    into an error (CollectiveTimeout, PeerDied) and leaves the guards out, so that their price can be measured.
    site: where this rank stands among several hosts; it then listens there, and members whose `host` is not its own are
    reached over TCP. None: all members are on this host.
    fault_point: called with a name at each point where a test or an operator may want this rank to fail: the
    collective's name (dispatch, combine, all_gather, barrier) between what it sends and what it waits for, `half_sent`
    between its first and its second peer, `half_framed` in the middle of what it sends to a peer on another host,
    `received` when it has everything.
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
        site: Site | None = None,
    ) -> None:
        assert 0 <= rank < ep_size, f"rank {rank} outside ep_size {ep_size}"
        self.rank, self.ep_size, self.incarnation = rank, ep_size, incarnation
        self.dtype, self.slots_per_rank, self.elastic = dtype, slots_per_rank, elastic
        self._layout = Layout(ep_size, max_tokens, hidden, top_k, dtype.itemsize)
        self._raw_dtype = torch.int16 if dtype.itemsize == 2 else torch.int32
        self._own = OwnSegment(self._layout, rank, incarnation)
        self._peers = Peers(self._own, rank, incarnation, elastic, site)
        self._notices = notices
        self._notices_seen = -1
        self._timeout_ns = int(peer_timeout_s * 1e9)
        self._fault_point = fault_point
        self._fence = memory_fence()
        self._epoch = self._number = self._roll_call = 0
        self._failed = False
        self._parity = self._area = self._tag = self._begun = 0

    # --- who is in

    @property
    def address(self) -> str:
        return self._peers.address

    @property
    def failed(self) -> bool:
        return self._failed

    def adopt(self, view: View) -> None:
        assert view.ep_size == self.ep_size, f"ep_size {self.ep_size} cannot serve a view of {view.ep_size} ranks"
        assert self._epoch < view.epoch <= tags.MAX_EPOCH, f"epochs grow: {self._epoch} -> {view.epoch}"
        me = view.member(self.rank)
        if me is None or me.incarnation != self.incarnation:
            raise Evicted(self.rank, self.incarnation, view.epoch)
        self._epoch, self._number, self._begun = view.epoch, 0, 0
        if self._roll_call <= view.epoch:
            self._roll_call = 0
        # Whoever still waits under an earlier epoch learns from this word that it waits in vain.
        self._own.words[ROLL_CALL] = max(self._own.words[ROLL_CALL], view.epoch)
        unreachable = self._peers.adopt(view)
        self._failed = bool(self._roll_call)
        self._notices_seen = -1
        self._look("adopt")
        for rank in unreachable:
            self._lose(rank, "notice", 0.0, "adopt")

    def _lose(self, rank: int, cause: str, seconds: float, operation: str) -> None:
        self._peers.lose(rank, cause, seconds, operation)
        self._failed = True

    def query_mask(self) -> Tensor:
        mask = torch.zeros(self.ep_size, dtype=torch.uint8)
        mask[[rank for rank in self._peers.members if rank not in self._peers.lost]] = 1
        return mask

    def update_mask(self, rank: int, alive: bool) -> None:
        assert rank in self._peers.members, f"rank {rank} is not in epoch {self._epoch}"
        assert rank != self.rank, "a rank cannot mask itself"
        if not alive:
            self._lose(rank, "operator", 0.0, "update_mask")
        else:
            self._peers.clear(rank, self._number)
            self._failed = bool(self._peers.lost or self._roll_call)

    def status(self) -> Status:
        return Status(
            lost=frozenset(self._peers.lost),
            interrupted=self._roll_call,
            causes=tuple((rank, cause) for rank, (cause, _) in sorted(self._peers.lost.items())),
            detect_s=tuple((rank, seconds) for rank, (_, seconds) in sorted(self._peers.lost.items())),
        )

    def interrupt(self, epoch: int) -> None:
        if epoch <= self._epoch:
            return
        self._hear_roll_call(epoch)
        words = self._own.words
        words[ROLL_CALL] = max(words[ROLL_CALL], epoch)
        self._fence()
        self._peers.tell()

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
        self._peers.close()
        self._own.close()

    # --- collectives

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor) -> Dispatched:
        return self.dispatch_later(x_TD, slots_TK)()

    def dispatch_later(self, x_TD: Tensor, slots_TK: Tensor) -> Callable[[], Dispatched]:
        T, K, D = len(x_TD), self._layout.top_k, self._layout.hidden
        assert len(x_TD) <= self._layout.max_tokens, f"{T} tokens are more than max_tokens={self._layout.max_tokens}"
        assert (x_TD.shape, x_TD.dtype) == ((T, D), self.dtype), (x_TD.shape, x_TD.dtype)
        assert (slots_TK.shape, slots_TK.dtype) == ((T, K), torch.int32), (slots_TK.shape, slots_TK.dtype)
        if not self._begin(tags.DISPATCH):
            return partial(self._nothing, T)
        x, slots = self._raw(x_TD), slots_TK.numpy().reshape(-1)
        if self._peers.live:
            parity = self._parity
            np.copyto(self._own.x[parity][:T], x)
            self._own.slots[parity][: T * K] = slots
            self._own.words[self._area + Layout.TOKENS] = T
        if self._peers.streams:
            order_P, bounds = rows.sort_by_rank(slots, self.ep_size, self.slots_per_rank)
            wants = {peer.rank: rows.wanted_by(peer.rank, order_P, bounds, K) for peer in self._peers.streams}
            self._send(
                {
                    rank: (x[tokens], slots.reshape(T, K)[tokens], tokens.astype(np.int32))
                    for rank, tokens in wants.items()
                }
            )
        else:
            self._send()
            order_P, bounds = rows.sort_by_rank(slots, self.ep_size, self.slots_per_rank)
        return partial(self._take, self._tag, x, slots, order_P, bounds)

    def _take(
        self, tag: int, x: Raw, slots: rows.Int32Array, order_P: rows.Int64Array, bounds: list[int]
    ) -> Dispatched:
        """Wait, and copy from every source the tokens that want one of our slots."""
        if self._begun != tag or not self._receive():
            return self._nothing(len(x))
        layout, parity, tokens_word = self._layout, self._parity, self._area + Layout.TOKENS
        sources: list[rows.Tokens] = []
        numbers: dict[int, rows.Int32Array] = {}
        for peer in self._peers.sources:
            if peer is None:
                sources.append((self.rank, x, slots))
                continue
            # A count that is no count can only come from a peer that went on without us: see `_check_overtaken`.
            T = min(peer.words[tokens_word], layout.max_tokens)
            sources.append((peer.rank, peer.x[parity], peer.slots[parity][: T * layout.top_k]))
            if isinstance(peer, StreamPeer):
                numbers[peer.rank] = peer.numbers[parity][:T].copy()
        taken = rows.take(sources, self.rank, self.slots_per_rank, layout.top_k, layout.hidden, layout.raw)
        self._check_overtaken()
        return Dispatched(
            x_ND=torch.from_numpy(taken.x_ND).view(self.dtype),
            row_M=torch.from_numpy(taken.row_M),
            slot_M=torch.from_numpy(taken.slot_M),
            handle=rows.Handle(self._epoch, len(x), order_P, bounds, taken.cuts, taken.token_M, taken.starts, numbers),
        )

    def _nothing(self, tokens: int) -> Dispatched:
        """What an interrupted dispatch received."""
        none = torch.empty(0, dtype=torch.int64)
        x_ND = torch.empty(0, self._layout.hidden, dtype=self.dtype)
        empty = np.empty(0, np.int64)
        return Dispatched(x_ND, none, none, rows.Handle(0, tokens, empty, [], {}, empty, [], {}))

    def origins(self, dispatched: Dispatched) -> tuple[Tensor, Tensor]:
        source_M, token_M = rows.origins(cast(rows.Handle, dispatched.handle))
        return torch.from_numpy(source_M), torch.from_numpy(token_M)

    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        return self.combine_later(y_MD, dispatched)()

    def combine_later(self, y_MD: Tensor, dispatched: Dispatched) -> Callable[[], Tensor]:
        handle = cast(rows.Handle, dispatched.handle)
        K, D = self._layout.top_k, self._layout.hidden
        M = dispatched.row_M.numel()
        assert (y_MD.shape, y_MD.dtype) == ((M, D), self.dtype), (y_MD.shape, y_MD.dtype, M)
        if handle.epoch != self._epoch or not self._begin(tags.COMBINE):
            return partial(torch.zeros, handle.tokens, K, D, dtype=self.dtype)
        y = self._raw(y_MD)
        own_a, own_b = handle.cuts[self.rank]
        if self._peers.live:
            mine, words = self._own.y[self._parity], self._own.words
            np.copyto(mine[:own_a], y[:own_a])  # own rows need not travel
            np.copyto(mine[own_b:M], y[own_b:])
            start, count = self._area + self._layout.START, self._area + self._layout.COUNT
            for peer in self._peers.live:
                a, b = handle.cuts.get(peer.rank, (0, 0))
                words[start + peer.rank], words[count + peer.rank] = a, b - a
            frames = {peer.rank: handle.cuts.get(peer.rank, (0, 0)) for peer in self._peers.streams}
            self._send({rank: (np.ascontiguousarray(y[a:b]),) for rank, (a, b) in frames.items()})
        return partial(self._place, self._tag, y[own_a:own_b], handle)

    def _place(self, tag: int, y_own: Raw, handle: rows.Handle) -> Tensor:
        """Wait, and copy each rank's rows to where their pairs stand: [T, K, D]."""
        shape = (handle.tokens, self._layout.top_k, self._layout.hidden)
        if self._begun != tag or not self._receive():
            return torch.zeros(shape, dtype=self.dtype)
        area, layout = self._area, self._layout
        start_word, count_word = area + layout.START + self.rank, area + layout.COUNT + self.rank
        parts = []
        for peer in self._peers.sources:
            rank = peer.rank if peer else self.rank
            at = handle.order_P[handle.bounds[rank] : handle.bounds[rank + 1]]
            n = len(at)
            if peer:
                start = min(peer.words[start_word], layout.max_pairs - n)
                n = n if peer.words[count_word] == n else 0  # it did not hear our dispatch
            if n:
                parts.append((at, peer.y[self._parity][start : start + n] if peer else y_own))
        out = rows.place(parts, len(handle.order_P), layout.hidden, layout.raw)
        self._check_overtaken()
        return torch.from_numpy(out).view(self.dtype).view(shape)

    def all_gather(self, row: Tensor) -> Tensor:
        n = row.numel()
        assert n <= GATHER_WORDS, f"a row of {n} is longer than {GATHER_WORDS}"
        assert row.dtype == torch.int64, row.dtype
        rows_Rn = np.zeros((self.ep_size, n), np.int64)
        if self._begin(tags.ALL_GATHER):
            own = row.numpy().reshape(-1)
            if self._peers.live:
                self._own.gather[self._parity][:n] = own
                self._own.words[self._area + Layout.TOKENS] = n
                self._send({peer.rank: (np.ascontiguousarray(own),) for peer in self._peers.streams})
            if self._receive():
                for peer in self._peers.sources:
                    if peer:
                        rows_Rn[peer.rank] = peer.gather[self._parity][:n]
                    else:
                        rows_Rn[self.rank] = own
                self._check_overtaken()
        return torch.from_numpy(rows_Rn)

    def barrier(self) -> None:
        if self._begin(tags.BARRIER):
            self._send()
            self._receive()

    # --- one collective's protocol

    def _begin(self, kind: int) -> bool:
        """Number the collective and claim its buffer; False when a roll call is open. Before the first view: alone."""
        if self._roll_call:
            return False
        assert not self._begun, f"{KINDS[self._begun & tags.KIND_MASK]} was begun and is not finished"
        self._number += 1
        self._parity = self._number & 1
        self._area = self._layout.areas[self._parity]
        self._tag = self._begun = tags.tag_of(self._epoch, self._number, kind)
        self._own.words[self._area + Layout.BEGUN] = self._tag
        self._peers.begin(self._number)
        self._fence()
        return True

    def _send(self, frames: Mapping[int, Sequence[Part]] = MappingProxyType({})) -> None:
        """Tell each unmasked peer that everything is written. frames: what goes to those on other hosts, by rank."""
        self._fence()
        words, sent, tag, point = self._own.words, self._area + Layout.SENT, self._tag, self._fault_point
        cut = None if point is None else lambda: point("half_framed")
        for i, peer in enumerate(self._peers.live):
            if i == 1 and point is not None:
                point("half_sent")
            if isinstance(peer, StreamPeer):
                peer.send(tag, frames.get(peer.rank, ()), cut)
            else:
                words[sent + peer.rank] = tag
        if point is not None:
            point(KINDS[tag & tags.KIND_MASK])

    def _receive(self) -> bool:
        """Wait for every unmasked peer; False when a roll call ended the wait."""
        at, tag, self._begun = self._area + Layout.SENT + self.rank, self._tag, 0
        pending = self._missing(self._peers.live, at, tag)
        if pending:
            self._wait(pending, at, tag)
        self._fence()
        if self._fault_point is not None:
            self._fault_point("received")
        return not self._roll_call

    def _missing(self, peers: list[Peer], at: int, tag: int) -> list[Peer]:
        """Those whose part is not here yet, or who do not have ours in full."""
        for stream in self._peers.streams:
            if stream.unsent or stream.words[at] != tag:
                stream.pump()
        return [peer for peer in peers if peer.words[at] != tag or peer.unsent]

    def _wait(self, pending: list[Peer], at: int, tag: int) -> None:
        start = now = time.monotonic_ns()
        rounds = 0
        crowded = False
        silence: Silence | None = None
        while True:
            time.sleep(_NAP_S) if crowded else os.sched_yield()
            pending = self._missing(pending, at, tag)
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
            if any(peer.words[ROLL_CALL] > self._epoch for peer in self._peers.live):
                # Who opened it may have finished this very collective: then all parts are here, or will be at once.
                os.sched_yield()
                if not self._missing(pending, at, tag):
                    return
            self._look(KINDS[tag & tags.KIND_MASK], start)
            for peer in pending:
                self._check_word(peer, peer.words[at], tag)
            if silence is not None:
                self._look_for_hangups(KINDS[tag & tags.KIND_MASK], start)
                if silence.longest_ns >= self._timeout_ns:
                    self._time_out(pending, silence, (time.monotonic_ns() - start) / 1e9)
            if self._roll_call:
                return
            pending = [peer for peer in pending if peer.rank not in self._peers.lost]

    def _look(self, operation: str, since_ns: int | None = None) -> None:
        """Read what the launcher and the peers' segments say: deaths and open roll calls. since_ns: when a wait began,
        for which a peer's life lock, or the end of its stream, is looked at too."""
        for stream in self._peers.streams:
            stream.pump()
        for peer in self._peers.live:  # before deaths: what a peer said last counts
            if peer.words[ROLL_CALL] > self._epoch:
                self._hear_roll_call(peer.words[ROLL_CALL])
        if since_ns is not None:
            for peer in list(self._peers.live):
                if peer.died:
                    self._lose(peer.rank, "notice", (time.monotonic_ns() - since_ns) / 1e9, operation)
        if self._notices is not None and self._notices_seen != (version := self._notices.version):
            self._notices_seen = version
            now = time.monotonic_ns()
            for rank, member in self._peers.members.items():
                if not self._notices.is_dead(member):
                    continue
                if rank == self.rank:  # an operator took us out: stop, and read so in the roll call
                    self._hear_roll_call(self._epoch + 1)
                else:
                    cause = "operator" if self._notices.cause(rank) == "operator" else "notice"
                    self._lose(rank, cause, (now - self._notices.stamp_ns(rank)) / 1e9, operation)

    def _look_for_hangups(self, operation: str, since_ns: int) -> None:
        for rank in self._peers.hung_up():
            self._lose(rank, "notice", (time.monotonic_ns() - since_ns) / 1e9, operation)

    def _time_out(self, pending: list[Peer], silence: Silence, waited_s: float) -> None:
        for peer in pending:
            silent_ns = silence.of_ns(peer.pid)
            if silent_ns is not None and isinstance(peer, StreamPeer):  # a long message on a slow line is no silence
                silent_ns = min(silent_ns, time.monotonic_ns() - peer.heard_ns)
            if silent_ns is not None and silent_ns >= self._timeout_ns:
                self._lose(peer.rank, "timeout", waited_s, KINDS[self._tag & tags.KIND_MASK])

    def _check_word(self, peer: Peer, word: int, tag: int) -> None:
        """A word beyond ours: the peer stopped waiting for us. Another kind under our number: a bug of the caller."""
        if word >> tags.EPOCH_SHIFT != self._epoch or word == tag:
            return
        ours, theirs = tag >> tags.NUMBER_SHIFT, word >> tags.NUMBER_SHIFT
        assert ours != theirs, (
            f"rank {peer.rank} runs {KINDS[word & tags.KIND_MASK]} while this rank runs {KINDS[tag & tags.KIND_MASK]}"
        )
        if theirs > ours:
            self._lose(peer.rank, "timeout", 0.0, KINDS[tag & tags.KIND_MASK])

    def _check_overtaken(self) -> None:
        """After the copies: a peer that reuses this buffer already has masked us, and what we copied may be torn."""
        if not self.elastic:
            return
        self._fence()
        begun, tag = self._area + Layout.BEGUN, self._tag
        for peer in self._peers.live:
            if peer.words[begun] != tag:
                if peer.words[ROLL_CALL] > self._epoch:
                    self._hear_roll_call(peer.words[ROLL_CALL])
                else:
                    self._lose(peer.rank, "timeout", 0.0, KINDS[tag & tags.KIND_MASK])

    def _raw(self, rows: Tensor) -> Raw:
        return cast(Raw, rows.view(self._raw_dtype).numpy())

    # --- sleeping together

    def ring(self) -> None:
        self._own.words[RINGING] = tags.tag_of(self._epoch, self._number + 1)
        self._fence()
        for peer in self._peers.live:
            peer.wake()

    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        deadline = time.monotonic() + timeout_s
        finished = tags.tag_of(self._epoch, self._number)
        ready: set[int] = set()
        while True:
            self._own.drain()
            self._fence()
            self._look("sleep", time.monotonic_ns())
            for peer in list(self._peers.live):
                if isinstance(peer, PeerSegment) and peer.pidfd in ready:
                    self._lose(peer.rank, "notice", 0.0, "sleep")
            if self._failed or any(peer.words[RINGING] > finished for peer in self._peers.live):
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not ready.isdisjoint(wake_fds):
                return False
            ready = self._peers.await_sign(wake_fds, remaining)
