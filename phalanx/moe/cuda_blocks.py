"""Experts in e4m3 with a scale a block on a device: `DeviceExperts` with the kernels that read half the bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from phalanx.moe.cuda import DeviceBank, DeviceExperts, Tiling
from phalanx.moe.layout import BLOCK


@dataclass(frozen=True)
class BlockTiling(Tiling):
    """As `Tiling`, for weights in blocks: a round is always one block deep. up, down: divisors of 128.

    The defaults were the fastest with 8 pairs a slot (benchmarks/results/engine_gpu.md)."""

    depth: int = BLOCK
    programs: int = 4

    @classmethod
    def like(cls, tiling: Tiling) -> BlockTiling:
        """For the pairs that `tiling` was chosen for; those for `exact` ones give a row the same bits. LOCAL, pure."""
        if tiling.rows <= 16:
            return cls(up=tiling.up, down=tiling.down)
        if tiling.rows <= 32:
            return cls(rows=32, up_stages=4, down_stages=4, programs=2)
        return cls(rows=64, programs=2)


class BlockExperts(DeviceExperts):
    """The MoE layers of a rank whose bank holds blocks."""

    def experts(self, layer: int, x_ND: Tensor, row_M: Tensor, first_S: Tensor, tiling: Tiling) -> Tensor:
        """See `DeviceExperts.experts`. LOCAL."""
        cut = tiling if isinstance(tiling, BlockTiling) else BlockTiling.like(tiling)
        return super().experts(layer, x_ND, row_M, first_S, cut)


def kind_for(bank: DeviceBank) -> type[DeviceExperts]:
    """What computes with this bank's slots. LOCAL."""
    return DeviceExperts if bank.layout.format == "plain" else BlockExperts
