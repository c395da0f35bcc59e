"""DeepEP's expert-packed layout, made from what a communicator's dispatch returned. No wait, no host sync: graph-safe.

Each local expert has room for all that could come, C = num_max_dispatch_tokens_per_rank * R rows, filled from the
front: first what rank 0 sent, in the order of its tokens, then rank 1, and so on. DeepEP leaves both orders open; here
they are fixed. Shapes: M received pairs, S local experts, R ranks, D width, G = D / 128 groups of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from phalanx.comm.base import Communicator, Dispatched

GROUP = 128
"""Channels that share a scale."""

_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_AMAX = 1e-4


@dataclass(frozen=True)
class Places:
    """Where each received pair stands: pair m at row `at_M[m]` of expert `expert_M[m]`, both int64 [M].

    expert_M is S for entries that are no pairs (the padding of a device's lists): an expert behind the last.
    count_SR: int64 [S, R], how many came from each rank. token_M: int64 [M], each pair's token at its source.
    """

    expert_M: Tensor
    at_M: Tensor
    token_M: Tensor
    count_SR: Tensor

    @classmethod
    def of(cls, comm: Communicator, got: Dispatched, experts: int, first_S: Tensor | None) -> Places:
        """first_S: where each expert's pairs begin, int32 [S + 1], when they come sorted by expert, from a device.
        None: they come by (source, token), and every entry is a pair."""
        source_M, token_M = comm.origins(got)
        index_M = torch.arange(len(source_M), device=source_M.device)
        expert_M = got.slot_M
        if first_S is None:
            order_M = expert_M.argsort(stable=True)
            first_S = torch.searchsorted(expert_M[order_M], torch.arange(experts + 1, device=expert_M.device))
            at_M = torch.empty_like(index_M)
            at_M[order_M] = index_M - first_S[expert_M[order_M]]
        else:
            real_M = index_M < first_S[experts]
            at_M = torch.where(real_M, index_M - first_S[expert_M], 0)
            expert_M = torch.where(real_M, expert_M, experts)
        count = torch.zeros((experts + 1) * comm.ep_size, dtype=torch.int64, device=expert_M.device)
        count.index_add_(0, expert_M * comm.ep_size + source_M, torch.ones_like(expert_M))
        return cls(expert_M, at_M, token_M, count.view(experts + 1, comm.ep_size)[:experts])

    @cached_property
    def layout_range(self) -> Tensor:
        """int64 [S, R]: the first row from each rank in the upper 32 bits, how many there are in the lower."""
        begin_SR = self.count_SR.cumsum(1) - self.count_SR
        return (begin_SR << 32) | self.count_SR

    def scatter(self, rows_M: Tensor, packed: Tensor) -> None:
        """Put pair m's row at its place. packed: [S + 1, C, ...], the last expert for what is no pair. In place."""
        packed[self.expert_M, self.at_M] = rows_M

    def gather(self, packed_SCD: Tensor) -> Tensor:
        """[M, D]: the rows at the pairs' places, in the order of the pairs; any row for what is no pair."""
        return packed_SCD[self.expert_M.clamp_max(packed_SCD.shape[0] - 1), self.at_M]


@dataclass(frozen=True)
class Packed:
    """The tensors that one dispatch returns, at their full size from the start; `fill` gives them their values.

    x: [S + 1, C, D], bf16 or e4m3. scales: float32 [S + 1, C, G] whose last two dimensions lie column by column; None
    without fp8. count: int32 [S]. src_info: int32 [S + 1, C]. layout_range: int64 [S, R]. The expert behind the last is
    a place for what is no pair; callers see views without it.
    """

    x: Tensor
    scales: Tensor | None
    count: Tensor
    src_info: Tensor
    layout_range: Tensor

    @classmethod
    def empty(cls, experts: int, capacity: int, hidden: int, ranks: int, fp8: bool, device: torch.device) -> Packed:
        """Rows that nothing fills keep whatever their memory held, as DeepEP's do."""
        x_type = torch.float8_e4m3fn if fp8 else torch.bfloat16
        scales = torch.empty(experts + 1, hidden // GROUP, capacity, device=device).transpose(1, 2) if fp8 else None
        return cls(
            torch.empty(experts + 1, capacity, hidden, dtype=x_type, device=device),
            scales,
            torch.zeros(experts, dtype=torch.int32, device=device),
            torch.empty(experts + 1, capacity, dtype=torch.int32, device=device),
            torch.zeros(experts, ranks, dtype=torch.int64, device=device),
        )

    def fill(self, places: Places, x_ND: Tensor, row_M: Tensor, scale_ND: Tensor | None, round_scale: bool) -> None:
        """x_ND, row_M: as in `Dispatched`. scale_ND: what x_ND is to be multiplied by, when it travelled as fp8."""
        if self.scales is not None:
            if scale_ND is None:
                x_ND, scale_ND = quantize(x_ND, round_scale)
            places.scatter(scale_ND[row_M], self.scales)
        if self.scales is None:
            places.scatter(x_ND[row_M], self.x)
        else:  # torch indexes no float8
            places.scatter(x_ND.view(torch.uint8)[row_M], self.x.view(torch.uint8))
        places.scatter(places.token_M.int(), self.src_info)
        self.layout_range.copy_(places.layout_range)
        self.count.copy_(places.count_SR.sum(1))


def quantize(x_ND: Tensor, round_scale: bool) -> tuple[Tensor, Tensor]:
    """e4m3 [N, D], and the float32 [N, G] that brings it back: the largest of each 128 channels becomes 448.

    round_scale: make each scale the next power of two, so that it adds no rounding of its own. DeepEP's formula."""
    groups = x_ND.float().view(x_ND.shape[0], x_ND.shape[1] // GROUP, GROUP)
    amax_NG = groups.abs().amax(2).clamp_min(_SMALLEST_AMAX)
    scale_NG, factor_NG = amax_NG / _LARGEST, _LARGEST / amax_NG
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
