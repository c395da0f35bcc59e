"""What a dispatch leaves on a device: the rows it received, the lists that say whose they are, and what combine needs.

Nothing here needs Triton or a device to be imported. Shape suffixes: as in `comm.base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phalanx.comm.base import Dispatched


@dataclass(frozen=True)
class DeviceDispatched(Dispatched):
    """What a rank received, on the device, with capacities in place of sizes.

    x_ND: [2 * R * T, D], the receive buffers themselves; only rows named by `row_M` mean anything. With fp8: e4m3.
    row_M, slot_M: int64 [R * T * K]; entries from `first_S[S]` on mean nothing, but are valid. Pairs stand sorted by
    slot, and within a slot by (source rank, token, k): what a grouped GEMM wants, and deterministic for a given view
    and batch.
    first_S: int32 [S + 1], where each slot's pairs begin; the last entry is M.
    scale_ND: float32 [2 * R * T, D / 128], what to multiply each group of 128 channels by; None without fp8.
    Valid until the second dispatch after this one (of the same graph, or of those launched eagerly).
    """

    first_S: Tensor
    scale_ND: Tensor | None

    def trimmed(self) -> Dispatched:
        """The same with real sizes, as the CPU communicator returns it. Synchronises: for tests and eager use."""
        pairs = int(self.first_S[-1])
        return Dispatched(self.x_ND, self.row_M[:pairs], self.slot_M[:pairs], self.handle)


@dataclass(frozen=True)
class Handle:
    """What combine needs of its dispatch. position: int32 [R * T * K], a pair's place in the sorted order or -1."""

    position: Tensor
    counts: Tensor
    slots_TK: Tensor


@dataclass(frozen=True, eq=False)
class RowNorm:
    """What a combine may do with its sums on the way: residual_TD += them, and return the RMS norm of that, times
    weight_D. Both in the run's type, rows that follow one another."""

    residual_TD: Tensor
    weight_D: Tensor
    eps: float


@dataclass(frozen=True)
class Lists:
    """What a dispatch writes about what it received. Allocated once, zeroed: whatever a broken-off dispatch leaves in
    them is a valid index, so that the experts' kernels of a step that will be discarded read no foreign memory."""

    row_M: Tensor
    slot_M: Tensor
    position: Tensor
    first_S: Tensor
    counts: Tensor

    @classmethod
    def of(cls, pairs: int, slots: int, padded: int, device: torch.device) -> Lists:
        """Lists for so many pairs and slots of a rank. LOCAL."""
        long, short = (partial(torch.zeros, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        return cls(long(pairs), long(pairs), short(pairs), short(slots + 1), short(padded + 1))
