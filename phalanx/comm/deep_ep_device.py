"""DeepEP's layout over the CUDA communicator: a kernel behind a dispatch packs what came, and a combine reads the
experts' rows where they stand in the layout. No copy of the whole, no fill, no host wait: graph-safe.

Triton is imported when the first `DeviceCarrier` is made, not before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.deep_ep_layout import GROUP, Carrier, Finish, Order, Packed
from phalanx.comm.launch import power_of_two
from phalanx.comm.received import DeviceDispatched, Handle
from phalanx.errors import BadConfig, BadRequest


@dataclass(frozen=True)
class PackShape:
    """How `pack_kernel` cuts its work. chunk: columns that a program moves at once. movers: at most so many programs
    move rows. experts, lanes: whose lists a program writes, and how many rows of each at once."""

    chunk: int = 8192
    movers: int = 264
    warps: int = 8
    experts: int = 4
    lanes: int = 128


@dataclass(frozen=True)
class _Area:
    """Where a dispatch is packed to, made once. raw: `packed.x` as kernels write it. places_M: int32 [R * T * K], the
    row of [S * C] at which the pair (source, token, k) stands, or -1: what a combine sends back."""

    packed: Packed
    raw: Tensor
    scales: Tensor
    places_M: Tensor


@dataclass(frozen=True)
class _Came:
    """What a combine needs of its dispatch."""

    got: DeviceDispatched
    places_M: Tensor


class DeviceCarrier(Carrier):
    """What is returned lies in two areas that are used in turn: a dispatch's tensors are valid until the second one
    after it. They are made in the first dispatch of each C and type, at their full size, and stay."""

    def __init__(self, comm: CudaCommunicator, shape: PackShape | None = None) -> None:
        """Compiles and loads every kernel that it will launch, so that no peer waits for that. LOCAL. Raises BadConfig
        for a communicator that cannot serve this."""
        from phalanx.comm import deep_ep_kernels

        if comm.layout.fast:
            raise BadConfig("communicator: in the mode `fast` weights travel with the tokens, and a dispatch has none")
        if comm.layout.hidden % GROUP:
            raise BadConfig(f"communicator: its hidden of {comm.layout.hidden} is no multiple of {GROUP}")
        shape = shape or PackShape()
        self._comm, self._shape, self._code = comm, shape, deep_ep_kernels
        self._at: dict[tuple[int, bool], tuple[_Area, _Area]] = {}
        self._turn = 0
        layout = comm.layout
        self._device, self._pairs = comm.status_words.device, layout.ep_size * layout.max_tokens * layout.top_k
        chunk = min(shape.chunk, power_of_two(layout.hidden))
        self._chunks = -(-layout.hidden // chunk)
        self._lists = -(-comm.slots_per_rank // shape.experts)
        self._fixed = {
            "R": layout.ep_size, "P": power_of_two(layout.ep_size), "S": comm.slots_per_rank,
            "E": power_of_two(comm.slots_per_rank), "K": layout.top_k,
            "KP": power_of_two(layout.top_k), "D": layout.hidden, "T_MAX": layout.max_tokens, "CHUNK": chunk,
            "CHUNKS": self._chunks, "LISTS": self._lists, "LANES": shape.lanes, "EXPERTS": shape.experts,
            "num_warps": shape.warps,
        }  # fmt: skip
        self._warm_up()

    # -- the exchange -------------------------------------------------------------------------------------------------

    def dispatch(self, order: Order) -> tuple[Packed, Finish]:
        """See `Carrier`. Everything is launched here, on the current stream."""
        if self.sends_fp8 and (order.round_scale or not order.fp8):
            raise BadConfig("fp8_wire: tokens travel as e4m3 with plain scales: dispatch with use_fp8, no round_scale")
        self._turn ^= 1
        area = self._area(order.num_max, order.fp8)
        got = self._comm.dispatch(_aligned(order.x), _aligned(order.topk_idx))
        stats, capacity = order.stats, order.num_max * self._comm.ep_size
        if stats is None or stats.is_contiguous():
            self._pack(got, area, capacity, order.round_scale, stats)
        else:
            self._pack(got, area, capacity, order.round_scale, None)
            stats.add_(area.packed.count)
        came = _Came(got, area.places_M)
        return area.packed, lambda: came

    def combine(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, came: Any, out: Tensor) -> Finish:
        """See `Carrier`. Everything is launched here, on the current stream."""
        assert isinstance(came, _Came), came
        handle = Handle(came.places_M, came.got.handle.counts, _aligned(topk_idx))
        rows_MD = _aligned(x).view(-1, x.shape[2])
        direct = out if out.is_contiguous() and out.data_ptr() % 16 == 0 else None
        got = replace(came.got, handle=handle)
        combined = self._comm.combine_weighted(rows_MD, got, _aligned(topk_weights), out=direct)
        if direct is None:
            out.copy_(combined)
        return lambda: None

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def sends_fp8(self) -> bool:
        """Whether tokens travel as e4m3. LOCAL."""
        return self._comm.layout.x_itemsize == 1

    def _area(self, num_max: int, fp8: bool) -> _Area:
        """This turn's."""
        key = num_max, fp8
        if key not in self._at:
            self._at[key] = self._made(num_max, fp8), self._made(num_max, fp8)
        return self._at[key][self._turn]

    def _made(self, num_max: int, fp8: bool) -> _Area:
        comm, capacity = self._comm, num_max * self._comm.ep_size
        if comm.slots_per_rank * capacity >= 1 << 31:
            raise BadRequest(
                f"num_max_dispatch_tokens_per_rank: {num_max} are more rows than can be numbered",
                "num_max_dispatch_tokens_per_rank",
            )
        packed = Packed.empty(comm.slots_per_rank, capacity, comm.layout.hidden, comm.ep_size, fp8, self._device)
        scales = packed.count if packed.scales is None else packed.scales.transpose(1, 2)
        raw = packed.x.view(torch.uint8) if fp8 else packed.x
        return _Area(packed, raw, scales, torch.empty(self._pairs, dtype=torch.int32, device=self._device))

    def _pack(self, got: DeviceDispatched, area: _Area, capacity: int, round_scale: bool, stats: Tensor | None) -> None:
        how = self._code.COPY
        if area.packed.scales is not None:
            how = self._code.QUANTIZE if got.scale_ND is None else self._code.COPY_FP8
        x_ND = got.x_ND if got.scale_ND is None else got.x_ND.view(torch.uint8)
        packed, shape = area.packed, self._shape
        units = self._comm.layout.ep_size * self._comm.layout.max_tokens
        programs = min(units, max(1, shape.movers // self._chunks)) * self._chunks + self._lists
        self._code.pack_kernel[(programs,)](
            x_ND, packed.count if got.scale_ND is None else got.scale_ND, got.handle.position, got.row_M, got.first_S,
            got.handle.counts, area.raw, area.scales, area.places_M, packed.count, packed.src_info,
            packed.layout_range, packed.count if stats is None else stats, capacity, int(stats is not None),
            int(round_scale), HOW=how.value, **self._fixed,
        )  # fmt: skip

    def _warm_up(self) -> None:
        """Pack nothing, in each way: lists of zeros say that no token came."""
        comm, layout = self._comm, self._comm.layout
        zeros = torch.zeros(self._pairs, dtype=torch.int64, device=self._device)
        short = torch.zeros(
            self._pairs + comm.slots_per_rank + layout.ep_size + 2, dtype=torch.int32, device=self._device
        )
        kinds = torch.float8_e4m3fn if self.sends_fp8 else torch.bfloat16
        x_ND = torch.zeros(1, layout.hidden, device=self._device).to(kinds)
        scale_ND = torch.zeros(1, layout.hidden // GROUP, device=self._device) if self.sends_fp8 else None
        nothing = DeviceDispatched(x_ND, zeros, zeros, Handle(short, short, short), short, scale_ND)
        for fp8 in (True,) if self.sends_fp8 else (False, True):
            self._pack(nothing, self._made(1, fp8), comm.ep_size, False, None)
        for kind in (torch.int32, torch.int64):
            comm.prepare(kind)


def _aligned(tensor: Tensor) -> Tensor:
    """The same values as kernels were compiled for: rows that follow one another from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
