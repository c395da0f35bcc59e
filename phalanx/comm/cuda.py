"""The communicator on NVLink: Triton kernels that store into the peers' buffers, under masks and time-outs.

The second implementation of `comm.base.Communicator`; `comm.cpu` is its reference. What differs, because nothing here
may wait for the host or move:

* `dispatch` returns a `DeviceDispatched`: tensors of full capacity, sorted by slot, with the counts on the device.
* `combine` can weigh and add on the way (`combine_weighted`), in the mode chosen at construction: `exact` (a row per
  (token, k) travels; the owner adds them in the order of k in float32) or `fast` (added at the expert's rank first).
* Every COLLECTIVE call but `meet` only launches a kernel: it may be captured in a CUDA graph. `adopt`, `update_mask`,
  `interrupt` and `patience` write words that kernels read at each launch or in their waits, so a graph goes on after
  all of them.
* What went wrong stands in `status_words`, on the device: copy it along with the step's result and give the copy to
  `decode_status`. `status()` does both at once, with a synchronisation.

Two memories a rank: the exported device buffer (`comm.peer_memory`), written by peers' kernels, and a host segment
(`comm.segment`), which carries the buffer's handle, wakes sleepers, is the address, and is where the hosts `meet`.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.comm import segment
from phalanx.comm.base import CollectiveTimeout, Communicator, Dispatched, PeerDied, Status, empty_view
from phalanx.comm.device_peers import DevicePeer, Expected, map_peer, publish_handle, segment_layout
from phalanx.comm.host_meeting import HostMeeting
from phalanx.comm.launch import Fixed, Kernels, LaunchShape, Mode, power_of_two
from phalanx.comm.notice_relay import NoticeRelay
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.peer_memory import GATHER_WORDS, BufferLayout, CudaIpcMemory, PeerMemory
from phalanx.comm.received import DeviceDispatched, Handle, Lists, RowNorm
from phalanx.errors import Evicted
from phalanx.world import Member, View

_EPOCH, _TIMEOUT_NS, _INTERRUPTED = 0, 1, 2
_TABLES = 16  # words before the tables a rank; see comm.kernels
_CAUSES = {1: "notice", 2: "timeout", 3: "operator", 4: "timeout"}  # 4: the peer went on without us
_NOTICE, _OPERATOR = 1, 3


class CudaCommunicator(Communicator):
    """One rank on one CUDA device; peers are processes of the same host. Not thread-safe, except `interrupt`."""

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
        dtype: torch.dtype = torch.bfloat16,
        peer_timeout_s: float = 2.0,
        notices: NoticeBoard | None = None,
        elastic: bool = True,
        mode: Mode = "exact",
        fp8: bool = False,
        shape: LaunchShape | None = None,
        guard: bool = True,
        memory: PeerMemory | None = None,
        device: torch.device | None = None,
    ) -> None:
        """max_tokens: the most that any rank sends in one dispatch. fp8: x travels as e4m3 with a scale a 128 channels.

        guard: False leaves masks and time-outs out of the kernels, to measure what they cost; never serve so.
        memory: where the buffer comes from; CUDA IPC on `device` unless a test brings its own.
        Compiles and runs every kernel once, alone, so that no failure path compiles anything.
        """
        assert dtype.itemsize == 2, f"rows of {dtype} are not supported: bfloat16 or float16"
        assert ep_size <= 62, f"ep_size {ep_size}: ranks are told by the bits of a word"
        self.rank, self.ep_size = rank, ep_size
        self._me = Member(rank, incarnation)
        self.slots_per_rank, self._top_k, self._hidden = slots_per_rank, top_k, hidden
        self._max_tokens, self._dtype, self._fp8, self._mode = max_tokens, dtype, fp8, mode
        self._elastic, self._timeout_s = elastic, peer_timeout_s
        self._padded = power_of_two(ep_size)
        device = device or torch.device("cuda", torch.cuda.current_device())
        self._shape = shape or LaunchShape.on(device, hidden, ep_size * max_tokens * top_k)
        self.layout = BufferLayout(
            ep_size, max_tokens, hidden, top_k, 1 if fp8 else dtype.itemsize, dtype.itemsize,
            self._shape.chunks(hidden) * self._shape.dispatch_groups,
            self._shape.chunks(hidden) * self._shape.combine_groups, mode == "fast",
        )  # fmt: skip
        self._memory = memory or CudaIpcMemory(self.layout.nbytes, device)
        self._own = self._memory.buffer
        self._device = self._own.device
        self._view = empty_view(ep_size)
        self._peers: dict[int, DevicePeer] = {}
        self._expected = Expected(lambda member: map_peer(member, ep_size, self._memory))
        self._retired: list[tuple[Any, int]] = []
        self._rings = 0
        self._state = torch.zeros(_TABLES + 5 * self._padded, dtype=torch.int64, device=self._device)
        pairs = ep_size * max_tokens * top_k
        self._lists = [Lists.of(pairs, slots_per_rank, self._padded, self._device) for _ in range(2)]
        self._turn = 0
        self._host = self._memory.host_words(self._padded + 1)
        self._segment = segment.OwnSegment(segment_layout(ep_size), rank, incarnation)
        publish_handle(self._segment, self._memory)
        self._meeting = HostMeeting(self._segment, rank, ep_size, notices)
        self._notices = notices
        self._relay: NoticeRelay | None = None
        notice_pointer, notice_stride = self._map_notices()
        self._kernels = Kernels(
            Fixed(
                rank=rank, ep_size=ep_size, padded=self._padded, slots=slots_per_rank, top_k=top_k, hidden=hidden,
                max_tokens=max_tokens, mode=mode, layout=self.layout, shape=self._shape, guard=guard, own=self._own,
                state=self._state, host=self._host, notice_pointer=notice_pointer, notice_stride=notice_stride,
            )
        )  # fmt: skip
        if guard:  # without it, a kernel alone would wait for ranks that are not there
            self._warm_up()

    # -- who is in ----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._segment.address

    def adopt(self, view: View) -> None:
        """See the contract. Kernels launched before still use the old mappings; those are unmapped once they ended.

        Raises Evicted when this process is not in the view. The caller has no collective of the old epoch in flight: it
        read their status before it joined the roll call.
        """
        assert view.ep_size == self.ep_size, f"ep_size {self.ep_size} cannot serve a view of {view.ep_size} ranks"
        assert self._view.epoch < view.epoch < 1 << 31, f"epochs grow: {self._view.epoch} -> {view.epoch}"
        if self._me not in view:
            raise Evicted(self.rank, self._me.incarnation, view.epoch)
        gone = [p for r, p in self._peers.items() if p.member not in view]
        if gone:
            # A process that the others left behind may still run: from now on its kernels send nothing to us.
            self._tell("cut", [p.member.rank for p in gone], view.epoch)
        for peer in gone:
            del self._peers[peer.member.rank]
        dead = []
        for member in self._new(view):
            try:
                self._peers[member.rank] = self._expected.take(member)
            except segment.Unreachable:
                dead.append(member.rank)
        for peer in (*gone, *self._expected.forget()):
            peer.segment.close()
            self._retired.append((self._memory.mark(), peer.pointer))
        self._view = view
        dead += self._known_dead()
        self._meeting.adopt(view, {rank: peer.segment for rank, peer in self._peers.items()}, dead)
        self._rings = 0
        self._host[: self._padded] = 0
        if int(self._host[self._padded]) <= view.epoch:
            self._host[self._padded] = 0
        self._write_state(dead)
        self._segment.words[segment.RINGING] = 0
        self._segment.words[segment.ROLL_CALL] = max(self._segment.words[segment.ROLL_CALL], view.epoch)
        self.reap()

    def expect(self, view: View) -> bool:
        """See the contract: a newcomer's segment and buffer are mapped by a thread."""
        return self._expected.begin(self._new(view))

    def _new(self, view: View) -> list[Member]:
        """The members, other than this rank, that it has not mapped as such."""
        known = {(peer.member.rank, peer.member.incarnation) for peer in self._peers.values()}
        return [m for m in view.members if m.rank != self.rank and (m.rank, m.incarnation) not in known]

    def query_mask(self) -> Tensor:
        return self._table("mask").cpu()[: self.ep_size].to(torch.uint8)

    def update_mask(self, rank: int, alive: bool) -> None:
        assert rank != self.rank, "a rank does not mask itself"
        assert self._view.member(rank) is not None, f"rank {rank} is no member of epoch {self._view.epoch}"
        # The host word ends a wait that is running; the state words, in stream order, are for the kernels after it.
        self._host[rank] = 0 if alive else 1
        self._meeting.mask(rank, alive)
        self._table("mask")[rank] = int(alive and rank in self._peers)
        self._table("cause")[rank] = 0 if alive else _OPERATOR
        if alive:
            self._word("cut")[rank] = 0

    def interrupt(self, epoch: int) -> None:
        """See the contract. May be called from another thread than the one that launches collectives."""
        if epoch <= self._view.epoch:
            return
        self._host[self._padded] = max(int(self._host[self._padded]), epoch)
        self._meeting.interrupt(epoch)
        self._segment.words[segment.ROLL_CALL] = max(self._segment.words[segment.ROLL_CALL], epoch)
        peers = list(self._peers)
        if peers:
            with self._memory.aside():
                self._tell("opened", peers, epoch)
        for rank in peers:
            self._peers[rank].segment.wake()

    def reap(self) -> None:
        """Unmap the buffers of processes that left, as far as no kernel can be using them any more. LOCAL."""
        kept = []
        for mark, pointer in self._retired:
            if self._memory.passed(mark):
                self._memory.unmap(pointer)
            else:
                kept.append((mark, pointer))
        self._retired = kept

    # -- collectives --------------------------------------------------------------------------------------------------

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor | None = None) -> DeviceDispatched:
        """See the contract; graph-safe. weights_TK: float32 [T, K], needed (and sent along) in the mode `fast`.
        slots_TK may be int64, after `prepare`."""
        tokens = self._check(x_TD, slots_TK)
        assert self._mode == "exact" or weights_TK is not None, "mode fast adds at the expert's rank: it needs weights"
        lists = self._lists[self._turn]
        self._turn ^= 1
        self._kernels.dispatch(x_TD, slots_TK, weights_TK, lists, tokens)
        x_ND, scale_ND = self._received()
        return DeviceDispatched(
            x_ND, lists.row_M, lists.slot_M, Handle(lists.position, lists.counts, slots_TK), lists.first_S, scale_ND
        )

    def prepare(self, slots_type: torch.dtype) -> None:
        """Compile and load dispatch and combine for slots of this integer type, so that no peer waits for that. LOCAL.

        The communicator comes with those for int32; int64 is what DeepEP's callers have. Not for the mode `fast`."""
        slots = torch.full((1, self._top_k), -1, dtype=slots_type, device=self._device)
        x = torch.zeros(1, self._hidden, dtype=self._dtype, device=self._device)
        weights = torch.zeros(1, self._top_k, device=self._device)
        lists = self._lists[0]
        self._kernels.dispatch(x, slots, None, lists, 1, launch=False)
        handle = Handle(lists.position, lists.counts, slots)
        self._kernels.combine(x, handle, weights, torch.empty_like(x), 1, "exact", launch=False)
        self._kernels.check_fit()

    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        """See the contract; graph-safe. Rows of y_MD stand in the order of the dispatch's pairs."""
        tokens = dispatched.handle.slots_TK.shape[0]
        out = torch.empty(tokens, self._top_k, self._hidden, dtype=self._dtype, device=self._device)
        self._kernels.combine(y_MD, dispatched.handle, None, out, tokens, "rows")
        return out

    @cached_property
    def results(self) -> Tensor:
        """[R * T * K, D]: where the experts' results stand best, one memory for all layers. LOCAL.

        With `layout.in_place` peers read them there: given to `combine` or `combine_weighted`, whole or its first rows
        and by all ranks alike, they are not sent. They may be written between a dispatch and its one combine, and at no
        other time: it is the dispatch that says that the peers have read the last ones. A rank that this one masks by
        `update_mask` is not waited for, and may read what comes next."""
        rows, at = self.layout.pairs, self.layout.offsets["y"]
        if not self.layout.in_place:
            return torch.empty(rows, self._hidden, dtype=self._dtype, device=self._device)
        part = self._own[at : at + rows * self._hidden * self._dtype.itemsize]
        return part.view(self._dtype).view(rows, self._hidden)

    @property
    def norms(self) -> int:
        """Up to how many tokens `combine_weighted` can norm its sums; 0: never. LOCAL."""
        return self._kernels.norms

    def combine_weighted(
        self,
        y_MD: Tensor,
        dispatched: Dispatched,
        weights_TK: Tensor,
        norm: RowNorm | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Like `combine`, but returns [T, D]: each token's rows times its weights (float32 [T, K]), added. COLLECTIVE.

        Graph-safe. Mode exact: in the order of k, in float32, rounded once: the same bits wherever the experts live.
        norm: for up to `norms` tokens: add that to a residual, and return its RMS norm instead. out: contiguous, where
        the result goes; without it a new tensor.
        """
        tokens = dispatched.handle.slots_TK.shape[0]
        assert weights_TK.shape == (tokens, self._top_k), weights_TK.shape
        assert weights_TK.dtype == torch.float32, weights_TK.dtype
        if out is None:
            out = torch.empty(tokens, self._hidden, dtype=self._dtype, device=self._device)
        self._kernels.combine(y_MD, dispatched.handle, weights_TK, out, tokens, self._mode, norm)
        return out

    def origins(self, dispatched: Dispatched) -> tuple[Tensor, Tensor]:
        """See the contract; graph-safe. A row of the receive buffers is the place of (turn, source, token)."""
        place_M = dispatched.row_M % (self.ep_size * self._max_tokens)
        return place_M // self._max_tokens, place_M % self._max_tokens

    def all_gather(self, row: Tensor) -> Tensor:
        """See the contract; the result is on the device. Graph-safe when `row` is on the device, too."""
        assert row.dtype == torch.int64, row.dtype
        assert row.dim() == 1, row.shape
        assert row.numel() <= GATHER_WORDS, f"{row.numel()} words, a row holds {GATHER_WORDS}"
        out = torch.empty(self.ep_size, row.numel(), dtype=torch.int64, device=self._device)
        self._rings += 1
        self._kernels.gather(row.to(self._device), out, row.numel())
        return out

    def meet(self, row: Sequence[int]) -> tuple[npt.NDArray[np.int64], Status]:
        """See the contract. Between the hosts (`comm.host_meeting`): a step that runs on the device is not waited for,
        and what its own collectives came to is no part of this status."""
        self._rings += 1
        rows = self._meeting.meet(row, self._timeout_s)
        for rank in self._meeting.lost:
            self._host[rank] = 1  # a kernel that waits for it need not find out by itself
        return rows, self._status(self._meeting.lost, self._meeting.interrupted)

    def watch(self) -> None:
        """End kernels' waits for peers whose processes are ending, as their life locks say: long before they can be
        reaped, and the launcher knows. For a host that waits for the device. LOCAL."""
        for rank, peer in self._peers.items():
            if peer.segment.died and rank not in self._meeting.lost:
                self._meeting.lost[rank] = "notice", 0.0
                self._host[rank] = 1

    def barrier(self) -> None:
        """Peers are here when the stream passes this point; the host does not wait."""
        self.all_gather(torch.empty(0, dtype=torch.int64, device=self._device))

    # -- what went wrong ----------------------------------------------------------------------------------------------

    @property
    def relayed(self) -> bool:
        """Whether a thread copies the launcher's notices, because the device cannot map the board itself. LOCAL."""
        return self._relay is not None

    @property
    def status_words(self) -> Tensor:
        """int64, on the device, at a fixed address: copy it to the host behind the step, for `decode_status`. LOCAL."""
        return self._state[: _TABLES + 3 * self._padded]

    def status(self) -> Status:
        on_device = self._read(self.status_words.cpu())
        return self._status({**on_device[0], **self._meeting.lost}, max(on_device[1], self._meeting.interrupted))

    def decode_status(self, words: Tensor) -> Status:
        """What a host copy of `status_words` says. Touches no device. LOCAL. Raises CollectiveFailed when a rank was
        lost and elasticity is off."""
        return self._status(*self._read(words))

    def _read(self, words: Tensor) -> tuple[dict[int, tuple[str, float]], int]:
        """Lost ranks with cause and seconds, and the latest roll call, as kernels found them."""
        mask, cause, waited = (t.tolist() for t in words[_TABLES:].view(3, self._padded))
        lost: dict[int, tuple[str, float]] = {}
        for member in self._view.members:
            r = member.rank
            if r != self.rank and not mask[r]:
                lost[r] = (_CAUSES[int(cause[r])], self._seconds_until_masked(r, int(cause[r]), waited[r] / 1e9))
        return lost, max(int(words[_INTERRUPTED]), int(self._host[self._padded]))

    def _status(self, lost: Mapping[int, tuple[str, float]], opened: int) -> Status:
        if lost and not self._elastic:
            rank, (why, seconds) = min(lost.items())
            failure = CollectiveTimeout if why == "timeout" else PeerDied
            raise failure(rank, "a collective", seconds)
        return Status(
            lost=frozenset(lost),
            interrupted=opened if opened > self._view.epoch else 0,
            causes=tuple((r, why) for r, (why, _) in sorted(lost.items())),
            detect_s=tuple((r, seconds) for r, (_, seconds) in sorted(lost.items())),
        )

    @property
    def failed(self) -> bool:
        """Whether this host can tell that the step is lost. Never waits for the device, so False proves nothing."""
        return bool(self._meeting.lost or self._known_dead()) or self._opened() > self._view.epoch

    # -- sleeping -----------------------------------------------------------------------------------------------------

    def ring(self) -> None:
        """Wake sleeping peers: this rank is about to run its next eager `all_gather` or `barrier` of this epoch.

        Collectives replayed by a graph are not counted; every step begins with an eager one."""
        self._segment.words[segment.RINGING] = self._ring_tag()
        for peer in self._peers.values():
            peer.segment.wake()

    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            self._segment.drain()
            if self._disturbed():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            pidfds = [peer.segment.pidfd for peer in self._peers.values()]
            ready, _, _ = select.select((self._segment.wake_read, *wake_fds, *pidfds), (), (), left)
            if any(fd in ready for fd in pidfds):
                return True  # the next collective finds out what this means
            if any(fd in ready for fd in wake_fds):
                return self._disturbed()

    @contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        before, self._timeout_s = self._timeout_s, timeout_s
        self._state[_TIMEOUT_NS] = int(timeout_s * 1e9)
        try:
            yield
        finally:
            self._timeout_s = before
            self._state[_TIMEOUT_NS] = int(before * 1e9)

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()
        self._memory.wait()
        for peer in (*self._peers.values(), *self._expected.forget()):
            peer.segment.close()
            self._memory.unmap(peer.pointer)
        self._peers.clear()
        self.reap()
        self._own = torch.empty(0, dtype=torch.uint8)
        self._memory.close()
        self._segment.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check(self, x_TD: Tensor, slots_TK: Tensor) -> int:
        tokens = x_TD.shape[0]
        assert (x_TD.shape, x_TD.dtype) == ((tokens, self._hidden), self._dtype), (x_TD.shape, x_TD.dtype)
        assert slots_TK.shape == (tokens, self._top_k), slots_TK.shape
        assert slots_TK.dtype in (torch.int32, torch.int64), slots_TK.dtype
        for tensor in (x_TD, slots_TK):
            assert tensor.is_contiguous(), "kernels read rows that follow one another"
        assert tokens <= self._max_tokens, f"{tokens} tokens, the buffers hold {self._max_tokens} a rank"
        return tokens

    def _received(self) -> tuple[Tensor, Tensor | None]:
        """The receive buffers of x and of its scales, as tensors."""
        rows, at = 2 * self.ep_size * self._max_tokens, self.layout.offsets
        itemsize = self.layout.x_itemsize
        x = self._own[at["x"] : at["x"] + rows * self._hidden * itemsize]
        if not self._fp8:
            return x.view(self._dtype).view(rows, self._hidden), None
        groups = self._hidden // 128
        scale = self._own[at["scales"] : at["scales"] + rows * groups * 4].view(torch.float32).view(rows, groups)
        return x.view(torch.float8_e4m3fn).view(rows, self._hidden), scale

    def _table(self, name: Literal["mask", "cause", "waited", "incarnation", "peer"]) -> Tensor:
        index = ("mask", "cause", "waited", "incarnation", "peer").index(name)
        return self._state[_TABLES + index * self._padded :][: self._padded]

    def _word(self, name: Literal["cut", "opened"]) -> Tensor:
        return self._own[self.layout.offsets[name] :][: 8 * self.ep_size].view(torch.int64)

    def _write_state(self, dead: list[int]) -> None:
        """The whole table in one copy, in stream order."""
        state = np.zeros(self._state.shape[0], np.int64)
        state[_EPOCH] = self._view.epoch
        state[_TIMEOUT_NS] = int(self._timeout_s * 1e9)
        tables = state[_TABLES:].reshape(5, self._padded)
        own = self._own.data_ptr()
        for member in self._view.members:
            r = member.rank
            peer = self._peers.get(r)
            tables[0, r] = int(r not in dead)
            tables[1, r] = _NOTICE if r in dead else 0
            tables[3, r] = member.incarnation
            tables[4, r] = peer.pointer - own if peer is not None else 0
        self._state.copy_(torch.from_numpy(state))

    def _tell(self, what: Literal["cut", "opened"], ranks: list[int], epoch: int) -> None:
        self._kernels.tell(sum(1 << r for r in ranks), epoch, self.layout.offsets[what])

    def _map_notices(self) -> tuple[int, int]:
        """Address and stride, in words, of what kernels poll: the board itself, or our copy that a thread keeps."""
        if self._notices is not None:
            words = self._notices.dead_words
            pointer = self._memory.map_readonly(words)
            if pointer is not None:
                return pointer, words.strides[0] // 8
        self._dead = self._memory.host_words(self._padded)
        self._dead.fill_(-1)
        if self._notices is not None:
            self._relay = NoticeRelay(self._notices, self._dead)
        return self._dead.data_ptr(), 1

    def _known_dead(self) -> list[int]:
        """Members that the launcher declared dead, whether or not a kernel has noticed."""
        if self._notices is None:
            return []
        return [m.rank for m in self._view.members if m.rank != self.rank and self._notices.is_dead(m)]

    def _seconds_until_masked(self, rank: int, cause: int, waited_s: float) -> float:
        """From the earliest sign: the launcher's notice if that was later than the start of our wait."""
        if cause != _NOTICE or self._notices is None:
            return waited_s
        return min(waited_s, max(0.0, (time.monotonic_ns() - self._notices.stamp_ns(rank)) / 1e9))

    def _opened(self) -> int:
        """The latest roll call that this host can see open."""
        opened = int(self._host[self._padded])
        for peer in self._peers.values():
            opened = max(opened, peer.segment.words[segment.ROLL_CALL])
        return opened

    def _ring_tag(self) -> int:
        return (self._view.epoch << 32) | (self._rings + 1)

    def _disturbed(self) -> bool:
        """Whether a peer rang for a collective that we have not begun, somebody died, or a roll call is open."""
        if self.failed:
            return True
        return any(p.segment.words[segment.RINGING] >= self._ring_tag() for p in self._peers.values())

    def _warm_up(self) -> None:
        """Run every kernel once with nobody else in."""
        self._view = View(1, self.ep_size, (self._me,))
        self._write_state([])
        slots = torch.full((1, self._top_k), -1, dtype=torch.int32, device=self._device)
        weights = torch.zeros(1, self._top_k, device=self._device)
        x = torch.zeros(1, self._hidden, dtype=self._dtype, device=self._device)
        sent = self.dispatch(x, slots, weights if self._mode == "fast" else None)
        y = torch.zeros(1, self._hidden, dtype=self._dtype, device=self._device)
        self.combine(y, sent)
        self.combine_weighted(y, sent, weights)
        if self.norms:
            self.combine_weighted(y, sent, weights, RowNorm(x, x[0].contiguous(), 1e-6))
        if self.layout.in_place:
            self.combine(self.results, sent)
            self.combine_weighted(self.results, sent, weights)
        self.barrier()
        self._tell("cut", [], 0)
        self._memory.wait()
        self._kernels.check_fit()
        self._view = empty_view(self.ep_size)
        self._rings = 0
        self._write_state([])
        self._own.zero_()
        self._memory.wait()
