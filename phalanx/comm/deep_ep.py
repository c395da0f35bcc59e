"""DeepEP's low-latency interface on a Phalanx communicator: for an engine that was written for `deep_ep.Buffer`.

Names, arguments, shapes, types and meanings are DeepEP's (github.com/deepseek-ai/DeepEP, the low-latency half of its
`Buffer`); what moves the tokens, and what happens when a rank dies, is the communicator's. docs/deep-ep.md tells what
is the same, what differs and what is refused. Masks read 1 = masked here, as DeepEP's callers expect; everywhere else
in Phalanx 1 = alive.

    from deep_ep import Buffer                        from phalanx.comm.deep_ep import Buffer
    buffer = Buffer(group, 0, rdma_bytes,             buffer = Buffer(group, 0, rdma_bytes,
                    low_latency_mode=True,                            low_latency_mode=True,
                    num_qps_per_rank=experts)                         num_qps_per_rank=experts)

Shapes: T tokens, K top-k, D width, R ranks, S local experts (num_experts / R; expert e is on rank e // S), C = R *
num_max_dispatch_tokens_per_rank, the rows that an expert has room for.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from phalanx.comm.base import Communicator
from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.deep_ep_calls import (
    EventOverlap,
    Handle,
    Hook,
    Sent,
    check,
    check_count,
    check_handle,
    check_tokens,
    check_ways,
)
from phalanx.comm.deep_ep_layout import GROUP, Carrier, HostCarrier, Order
from phalanx.comm.deep_ep_meeting import GroupMeeting, Meeting, Shape, StoreMeeting, make
from phalanx.comm.launch import LaunchShape
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.peer_memory import BufferLayout
from phalanx.errors import BadConfig, BadRequest, PeerLost

__all__ = ["Buffer", "EventOverlap", "Handle", "Shape", "topk_idx_t"]

topk_idx_t = torch.int64
"""The type of topk_idx that DeepEP's callers ask for by this name; int32 is taken, too."""

_HINTED_TOP_K = 16
"""`get_low_latency_rdma_size_hint` is not told the top-k: it answers for one that is larger than models have."""


class Buffer:
    """One rank's end of the exchange. Not thread-safe.

    `low_latency_dispatch`, `low_latency_combine`, `clean_low_latency_buffer`, and the hooks, are COLLECTIVE: every rank
    that is not masked makes the same ones in the same order. All else is LOCAL.

    One collective is under way at a time. Whichever is called while a hook is outstanding finishes that first, as if
    the hook had been called; the hook then finds nothing to do. So an engine that overlaps two batches gets right
    results, and overlaps what it computes between a call and its hook.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object | None = None,
        *,
        communicator: Communicator | None = None,
        store: Store | str | None = None,
        rank: int = 0,
        size: int = 1,
        shape: Shape | None = None,
        device: torch.device | str | None = None,
        peer_timeout_s: float = 30.0,
        notices: NoticeBoard | None = None,
        fp8_wire: bool = False,
    ) -> None:
        """The arguments up to `comm` are DeepEP's, so that its callers change an import and nothing else.

        group: a torch process group, asked for rank and size, and used once more to exchange addresses when the
        communicator is made. It may be destroyed after that; whether it lives does not matter to any exchange.
        low_latency_mode: must be true; there is no other mode. enable_shrink: lost ranks are masked and the others go
        on; without it a lost rank is an error, and the calls about masks are refused.
        num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, allow_*, use_fabric: accepted, and of no consequence.
        explicitly_destroy: memory is given back by `destroy`, or else when this object goes; both work either way.
        comm: an MPI communicator, refused: give `store`.

        One of these in place of a group: communicator: an existing one of bfloat16, under a view, that its owner keeps,
        adopts views on and closes: for several hosts, for membership that changes. store, rank, size: a
        `torch.distributed` store, or HOST:PORT on which rank 0 opens one until all have met. Buffers that share a
        store need a PrefixStore each.

        shape: what will be exchanged. With it the communicator is made here, COLLECTIVE; without it in the first
        dispatch, which knows. device: where tensors are; CUDA if there is one. peer_timeout_s: a silence this long is a
        loss. notices: a launcher's board (see `comm.notices`), from which deaths are known at once; on CPUs they are
        seen without. fp8_wire: on CUDA, tokens travel as e4m3, for callers who always dispatch with use_fp8; otherwise
        they travel as bf16 and are quantized where they arrive, to the same values.

        Raises BadConfig for what cannot be honoured, and whatever group or store raise when a rank does not come.
        """
        if not low_latency_mode:
            raise BadConfig("low_latency_mode: there is only the low-latency half of DeepEP's interface here; set it")
        if comm is not None:
            raise BadConfig("comm: addresses are not exchanged over MPI; give `group`, or `store`, `rank` and `size`")
        if sum(way is not None for way in (group, communicator, store)) != 1:
            raise BadConfig("give exactly one of `group`, `communicator` and `store`")
        self.group, self.enable_shrink = group, enable_shrink
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if fp8_wire and self._device.type != "cuda":
            raise BadConfig(f"fp8_wire: the communicator of {self._device} sends bf16; leave it out")
        if not 0 < peer_timeout_s < math.inf:
            raise BadConfig(f"peer_timeout_s: seconds, more than 0 of them, are wanted, not {peer_timeout_s}")
        self._fp8_wire, self._timeout_s, self._notices = fp8_wire, peer_timeout_s, notices
        self._communicator = communicator
        self._carrier: Carrier | None = None if communicator is None else _carrier_for(communicator)
        self._meeting: Meeting | None = None
        if group is not None:
            self._meeting = GroupMeeting(group)
        elif store is not None:
            self._meeting = StoreMeeting(store, rank, size)
        self.rank = communicator.rank if communicator else self._meeting.rank if self._meeting else 0
        self.group_size = communicator.ep_size if communicator else self._meeting.size if self._meeting else 1
        self._made_for: Shape | None = None
        self._close: Hook = lambda: None
        self._unfinished: Hook | None = None
        self._staging: Tensor | None = None
        if shape is not None and communicator is None:
            self._open(shape)

    # -- the exchange -------------------------------------------------------------------------------------------------

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Handle, EventOverlap, Hook | None]:
        """Send each token to its experts. COLLECTIVE.

        x: bf16 [T, D], D a multiple of 128, T <= num_max_dispatch_tokens_per_rank, which is the same on all ranks.
        topk_idx: int64 (or int32) [T, K], experts; -1 selects none. cumulative_local_expert_recv_stats: int32 [S], the
        counts are added to it. round_scale: scales are powers of two. async_finish: the event tells streams when it is
        done. return_recv_hook: return when everything is sent; the call of the hook waits, and fills what was returned.

        Returns (recv_x, recv_count, handle, event, hook). recv_x: bf16 [S, C, D], or with use_fp8 a pair of e4m3
        [S, C, D] and float32 scales [S, C, D / 128] whose last two dimensions lie column by column. recv_count: int32
        [S]. Rows from recv_count on mean nothing. Within an expert rows stand by source rank, then by token.
        handle: see `Handle`, for one combine. hook: None unless asked for.

        A masked rank's tokens count as zero tokens. Raises BadConfig for what is refused (use_ue8m0,
        dispatch_wait_recv_cost_stats), BadRequest for wrong tensors, PeerLost or CollectiveFailed for a lost rank
        without enable_shrink.
        """
        if use_ue8m0:
            raise BadConfig("use_ue8m0: scales are float32 here; round_scale=True makes them powers of two")
        if dispatch_wait_recv_cost_stats is not None:
            raise BadConfig("dispatch_wait_recv_cost_stats: waiting is not counted by source; leave it out")
        check_ways(async_finish, return_recv_hook)
        num_max, ranks, stats = num_max_dispatch_tokens_per_rank, self.group_size, cumulative_local_expert_recv_stats
        check_tokens(x, topk_idx, num_max, num_experts, ranks, self._device if self._meeting is not None else None)
        experts = num_experts // ranks
        if stats is not None:
            check("cumulative_local_expert_recv_stats", stats, (experts,), torch.int32, device=x.device)
        self._settle()
        carrier = self._opened_for(Shape(num_max, x.shape[1], topk_idx.shape[1], num_experts))
        order = Order(x, topk_idx, num_max, num_experts, use_fp8, round_scale, stats, later=return_recv_hook)
        packed, receive = carrier.dispatch(order)
        sent = Sent(self.communicator, *topk_idx.shape)
        event = EventOverlap.of(x.device, async_finish or return_recv_hook)

        def finish() -> None:
            event.current_stream_wait()
            sent.came = receive()

        hook = self._finish(finish, return_recv_hook)
        recv_x = packed.x if packed.scales is None else (packed.x, packed.scales)
        handle = Handle.of(packed.src_info, packed.layout_range, num_max, x.shape[1], num_experts, sent)
        return recv_x, packed.count, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Bring the experts' rows back to their tokens, weigh and add them. COLLECTIVE.

        x: bf16 [S, C, D], the experts' outputs, each where its token stood. topk_idx: as dispatched; what is -1 here is
        left out. topk_weights: float32 [T, K]. handle: the dispatch's. zero_copy: take the rows from what
        `get_next_low_latency_combine_buffer` gave, not from x. out: bf16 [T, D], written and returned.
        async_finish, return_recv_hook: as in dispatch; the hook fills combined_x.

        Returns (combined_x bf16 [T, D], event, hook): added in the order of k in float32, rounded once. Experts of
        masked ranks add nothing; the remaining weights stay as they are. Raises as dispatch does; use_logfmt and
        combine_wait_recv_cost_stats are refused.
        """
        if use_logfmt:
            raise BadConfig("use_logfmt: rows travel back as bf16 only; leave it out")
        if combine_wait_recv_cost_stats is not None:
            raise BadConfig("combine_wait_recv_cost_stats: waiting is not counted by source; leave it out")
        check_ways(async_finish, return_recv_hook)
        check_handle(handle)
        communicator, sent = self.communicator, handle.sent
        if sent.communicator is not communicator:
            raise BadRequest("handle: another buffer's dispatch gave it; combine there", "handle")
        self._settle()  # it may be this handle's dispatch
        src_info, _, num_max, hidden, num_experts = handle
        device = src_info.device
        if sent.came is None or self._carrier is None:
            raise BadRequest("handle: its dispatch did not come to an end", "handle")
        check(
            "x", x, (num_experts // self.group_size, num_max * self.group_size, hidden), torch.bfloat16, device=device
        )
        check("topk_idx", topk_idx, (sent.tokens, sent.top_k), torch.int64, torch.int32, device=device)
        check("topk_weights", topk_weights, (sent.tokens, sent.top_k), torch.float32, device=device)
        out = torch.empty(sent.tokens, hidden, dtype=torch.bfloat16, device=device) if out is None else out
        check("out", out, (sent.tokens, hidden), torch.bfloat16, device=device)
        if zero_copy:
            if self._staging is None or self._staging.shape != x.shape:
                raise BadRequest("zero_copy: fill get_next_low_latency_combine_buffer(handle) first", "zero_copy")
            x = self._staging
        receive = self._carrier.combine(x, topk_idx, topk_weights, sent.came, out)
        event = EventOverlap.of(x.device, async_finish or return_recv_hook)

        def finish() -> None:
            event.current_stream_wait()
            receive()

        return out, event, self._finish(finish, return_recv_hook)

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """bf16 [S, C, D], for an engine's last kernel to write to, and then to combine with zero_copy=True. LOCAL.

        The same memory each time for a shape, valid until that combine. Here it spares a caller an allocation, not a
        copy: the rows that go back are read from it as they would be from any tensor."""
        check_handle(handle)
        src_info, _, num_max, hidden, num_experts = handle
        shape = (num_experts // self.group_size, num_max * self.group_size, hidden)
        if self._staging is None or self._staging.shape != shape:
            self._staging = torch.empty(shape, dtype=torch.bfloat16, device=src_info.device)
        return self._staging

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """A barrier. COLLECTIVE. There is nothing to clean: flags here only grow, and no other mode dirties them."""
        self._settle()
        if self._communicator is not None:
            self._communicator.barrier()
            self._check_whole()

    # -- masks: 1 = masked --------------------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank: nothing is sent to it or awaited from it; or unmask it. LOCAL.

        An unmasked rank must be at the same collective as this one, and unmask this one if it had masked it. Refused
        without enable_shrink, for this rank itself, and before there is a communicator. A rank that is dead is masked
        again by the next collective."""
        self._check_shrink()
        if not isinstance(rank_to_mask, int) or not 0 <= rank_to_mask < self.group_size or rank_to_mask == self.rank:
            raise BadRequest(f"rank_to_mask: {rank_to_mask} is no other rank of {self.group_size}", "rank_to_mask")
        self.communicator.update_mask(rank_to_mask, not mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write the mask into mask_status, int32 [R], 1 = masked. LOCAL. On CUDA it waits for the device."""
        self._check_shrink()
        check("mask_status", mask_status, (self.group_size,), torch.int32)
        if self._communicator is None:
            mask_status.zero_()
        else:
            mask_status.copy_(1 - self._communicator.query_mask().int())

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask every rank of the view. LOCAL. The dead are masked again by the next collective."""
        self._check_shrink()
        if self._communicator is not None:
            for rank in sorted(self._communicator.status().lost):
                self._communicator.update_mask(rank, True)

    # -- the rest of DeepEP's interface -------------------------------------------------------------------------------

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """How many bytes of each device's memory peers write to: at most this, for any top-k up to 16. LOCAL.

        For information: nothing is sized by what is given to the constructor. It does not grow with num_experts."""
        for name, value in (
            ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank), ("hidden", hidden),
            ("num_ranks", num_ranks), ("num_experts", num_experts),
        ):  # fmt: skip
            check_count(name, value)
        if hidden % GROUP:
            raise BadRequest(f"hidden: {hidden} is no multiple of {GROUP}", "hidden")
        if num_experts % num_ranks:
            raise BadRequest(f"num_experts: {num_experts} do not divide among {num_ranks} ranks", "num_experts")
        launch = LaunchShape.of(hidden)
        chunks = launch.chunks(hidden)
        return BufferLayout(
            num_ranks, num_max_dispatch_tokens_per_rank, hidden, _HINTED_TOP_K, 2, 2,
            chunks * launch.dispatch_groups, chunks * launch.combine_groups, False,
        ).nbytes  # fmt: skip

    @property
    def communicator(self) -> Communicator:
        """What moves the tokens, for `status()` and whatever else DeepEP has no word for. BadRequest before there is
        one."""
        if self._communicator is None:
            raise BadRequest(
                "there is no communicator before the first dispatch: give the constructor `shape`", "shape"
            )
        return self._communicator

    def destroy(self) -> None:
        """Give the memory back, unless the communicator was brought by the caller. LOCAL. May be called again."""
        self._unfinished = None
        self._close()
        if self._meeting is not None:
            self._communicator = self._meeting = self._carrier = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _open(self, shape: Shape) -> Carrier:
        """Make the communicator. COLLECTIVE."""
        if self._meeting is None:
            raise BadRequest("this buffer was destroyed: make another one")
        made, carrier = make(
            self._meeting, shape, self._device, _carrier_for, elastic=self.enable_shrink,
            peer_timeout_s=self._timeout_s, notices=self._notices, fp8_wire=self._fp8_wire,
        )  # fmt: skip
        self._communicator, self._carrier, self._made_for = made, carrier, shape
        self._close = weakref.finalize(self, made.close)
        return carrier

    def _opened_for(self, shape: Shape) -> Carrier:
        """What carries tokens over the communicator, which must suit what is to be exchanged."""
        if self._communicator is None or self._carrier is None:
            return self._open(shape)
        made = self._made_for
        if made is not None and not made.suits(shape):
            raise BadRequest(f"this buffer was made for {made}, not for {shape}: make another one")
        slots = getattr(self._communicator, "slots_per_rank", None)
        if slots is not None and slots * self.group_size != shape.num_experts:
            raise BadRequest(
                f"num_experts: {shape.num_experts}, the communicator has {slots} slots on each of {self.group_size} "
                "ranks: an expert a slot",
                "num_experts",
            )
        return self._carrier

    def _finish(self, finish: Hook, later: bool) -> Hook | None:
        """Do what is left of a collective: now, or in the hook that is returned."""
        self._unfinished = finish
        if not later:
            self._settle()
            return None
        return lambda: self._settle() if self._unfinished is finish else None

    def _settle(self) -> None:
        """Finish the collective whose hook was not called yet, if there is one."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished()
            self._check_whole()

    def _check_whole(self) -> None:
        """Without enable_shrink a lost rank is an error: nobody looks at masks."""
        if not self.enable_shrink and self.communicator.failed:
            status = self.communicator.status()
            raise PeerLost(status.lost, status.interrupted)

    def _check_shrink(self) -> None:
        if not self.enable_shrink:
            raise BadConfig("enable_shrink: masks are kept only by a buffer that was made with it")


def _carrier_for(communicator: Communicator) -> Carrier:
    if not isinstance(communicator, CudaCommunicator):
        return HostCarrier(communicator)
    from phalanx.comm.deep_ep_device import DeviceCarrier

    return DeviceCarrier(communicator)
