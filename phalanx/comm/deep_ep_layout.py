"""DeepEP's expert-packed layout, and who fills it: a `Carrier`; here the one for communicators of hosts, with torch.

Each local expert has room for all that could come, C = num_max_dispatch_tokens_per_rank * R rows, filled from the
front: first what rank 0 sent, in the order of its tokens, then rank 1, and so on. DeepEP leaves both orders open; here
they are fixed. Shapes: M received pairs, S local experts, R ranks, D width, G = D / 128 groups of channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from phalanx.comm.base import Communicator, Dispatched

GROUP = 128
"""Channels that share a scale."""

_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_AMAX = 1e-4

Finish = Callable[[], Any]
"""What is left of a collective. COLLECTIVE, as its beginning was."""


@dataclass(frozen=True)
class Packed:
    """The tensors that one dispatch returns, at their full size from the start.

    x: [S, C, D], bf16 or e4m3. scales: float32 [S, C, G] whose last two dimensions lie column by column; None without
    fp8. count: int32 [S]. src_info: int32 [S, C]. layout_range: int64 [S, R].
    """

    x: Tensor
    scales: Tensor | None
    count: Tensor
    src_info: Tensor
    layout_range: Tensor

    @classmethod
    def empty(cls, experts: int, capacity: int, hidden: int, ranks: int, fp8: bool, device: torch.device) -> Packed:
        """Whatever nothing fills keeps what its memory held, as in DeepEP."""
        x_type = torch.float8_e4m3fn if fp8 else torch.bfloat16
        scales = torch.empty(experts, hidden // GROUP, capacity, device=device).transpose(1, 2) if fp8 else None
        return cls(
            torch.empty(experts, capacity, hidden, dtype=x_type, device=device),
            scales,
            torch.empty(experts, dtype=torch.int32, device=device),
            torch.empty(experts, capacity, dtype=torch.int32, device=device),
            torch.empty(experts, ranks, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class Order:
    """A dispatch as it was asked for, its arguments checked: as in `Buffer.low_latency_dispatch`. later: x may be
    written over before the dispatch comes to its end."""

    x: Tensor
    topk_idx: Tensor
    num_max: int
    num_experts: int
    fp8: bool
    round_scale: bool
    stats: Tensor | None
    later: bool


class Carrier(ABC):
    """Passes tokens between tensors in DeepEP's layout and a communicator."""

    @abstractmethod
    def dispatch(self, order: Order) -> tuple[Packed, Finish]:
        """Begin a dispatch: the tensors that it fills, at the latest in the call of the second result, which returns
        what its combine needs. COLLECTIVE."""

    @abstractmethod
    def combine(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, came: Any, out: Tensor) -> Finish:
        """Begin a combine into `out`, which is filled at the latest in the call of the result. COLLECTIVE.

        came: what the dispatch's end returned. The other arguments as in `Buffer.low_latency_combine`."""


@dataclass(frozen=True)
class Places:
    """Where each received pair stands: pair m at row `at_M[m]` of expert `expert_M[m]`, both int64 [M].

    count_SR: int64 [S, R], how many came from each rank. token_M: int64 [M], each pair's token at its source.
    """

    expert_M: Tensor
    at_M: Tensor
    token_M: Tensor
    count_SR: Tensor

    @classmethod
    def of(cls, comm: Communicator, got: Dispatched, experts: int) -> Places:
        source_M, token_M = comm.origins(got)
        expert_M = got.slot_M
        order_M = expert_M.argsort(stable=True)
        first_S = torch.searchsorted(expert_M[order_M], torch.arange(experts))
        at_M = torch.empty_like(expert_M)
        at_M[order_M] = torch.arange(len(expert_M)) - first_S[expert_M[order_M]]
        count = torch.bincount(expert_M * comm.ep_size + source_M, minlength=experts * comm.ep_size)
        return cls(expert_M, at_M, token_M, count.view(experts, comm.ep_size))

    @cached_property
    def layout_range(self) -> Tensor:
        """int64 [S, R]: the first row from each rank in the upper 32 bits, how many there are in the lower."""
        begin_SR = self.count_SR.cumsum(1) - self.count_SR
        return (begin_SR << 32) | self.count_SR

    def scatter(self, rows_M: Tensor, packed: Tensor) -> None:
        """Put pair m's row at its place. packed: [S, C, ...]. In place."""
        packed[self.expert_M, self.at_M] = rows_M

    def gather(self, packed_SCD: Tensor) -> Tensor:
        """[M, D]: the rows at the pairs' places, in the order of the pairs."""
        return packed_SCD[self.expert_M, self.at_M]


class HostCarrier(Carrier):
    """For communicators whose dispatch returns what came, no more, in the memory of the host."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def dispatch(self, order: Order) -> tuple[Packed, Finish]:
        """See `Carrier`: the receiving is left to the end."""
        ranks = self._comm.ep_size
        experts, hidden = order.num_experts // ranks, order.x.shape[1]
        packed = Packed.empty(experts, order.num_max * ranks, hidden, ranks, order.fp8, order.x.device)
        packed.count.zero_()
        packed.layout_range.zero_()
        # The caller may write over x before this rank's own tokens are read from it.
        x = order.x.clone(memory_format=torch.contiguous_format) if order.later else order.x.contiguous()
        receive = self._comm.dispatch_later(x, order.topk_idx.clamp_min(-1).to(torch.int32).contiguous())

        def finish() -> tuple[Dispatched, Places]:
            got = receive()
            places = Places.of(self._comm, got, experts)
            _fill(packed, places, got, order.round_scale)
            if order.stats is not None:
                order.stats.add_(packed.count)
            return got, places

        return packed, finish

    def combine(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, came: Any, out: Tensor) -> Finish:
        """See `Carrier`."""
        got, places = came
        weights_TK = topk_weights.masked_fill(topk_idx < 0, 0.0)
        receive = self._comm.combine_later(places.gather(x), got)
        return lambda: out.copy_(weigh(receive(), weights_TK))


def _fill(packed: Packed, places: Places, got: Dispatched, round_scale: bool) -> None:
    if packed.scales is None:
        places.scatter(got.x_ND[got.row_M], packed.x)
    else:
        x_ND, scale_ND = quantize(got.x_ND, round_scale)
        places.scatter(scale_ND[got.row_M], packed.scales)
        places.scatter(x_ND.view(torch.uint8)[got.row_M], packed.x.view(torch.uint8))  # torch indexes no float8
    places.scatter(places.token_M.int(), packed.src_info)
    packed.layout_range.copy_(places.layout_range)
    packed.count.copy_(places.count_SR.sum(1))


def quantize(x_ND: Tensor, round_scale: bool) -> tuple[Tensor, Tensor]:
    """e4m3 [N, D], and the float32 [N, G] that brings it back: the largest of each 128 channels becomes 448.

    round_scale: make each scale the next power of two, so that it adds no rounding of its own. DeepEP's formula."""
    groups = x_ND.float().view(x_ND.shape[0], x_ND.shape[1] // GROUP, GROUP)
    amax_NG = groups.abs().amax(2).clamp_min(_SMALLEST_AMAX)
    # Torch takes a number over a tensor for the number times the reciprocal, which is rounded twice; devices divide.
    scale_NG, factor_NG = amax_NG / _LARGEST, torch.full_like(amax_NG, _LARGEST) / amax_NG
    if round_scale:
        mantissa, exponent = scale_NG.frexp()
        scale_NG = torch.ldexp(torch.ones_like(scale_NG), exponent - (mantissa == 0.5).int())
        factor_NG = scale_NG.reciprocal()
    return (groups * factor_NG[..., None]).to(torch.float8_e4m3fn).flatten(1), scale_NG


def weigh(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D] in the rows' dtype: each token's rows times their weights, added in the order of k in float32."""
    total_TD = torch.zeros(rows_TKD.shape[0], rows_TKD.shape[2], device=rows_TKD.device)
    for k in range(rows_TKD.shape[1]):
        total_TD += rows_TKD[:, k].float() * weights_TK[:, k, None]
    return total_TD.to(rows_TKD.dtype)
