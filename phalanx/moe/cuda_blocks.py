"""Experts in e4m3 with a scale a block on a device: `DeviceExperts` with the kernels that read half the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phalanx.comm.launch import power_of_two
from phalanx.moe.cuda import DeviceBank, DeviceExperts, Tiling
from phalanx.moe.layout import BLOCK


@dataclass(frozen=True)
class BlockTiling:
    """As `Tiling`, for weights in blocks: a round is always one block deep. up, down: divisors of 128.

    programs: a processor. The defaults were the fastest with 8 pairs a slot (benchmarks/results/engine_gpu.md)."""

    rows: int = 16
    up: int = 64
    down: int = 64
    up_stages: int = 3
    down_stages: int = 4
    programs: int = 4

    @classmethod
    def of(cls, tiling: Tiling) -> BlockTiling:
        """For the pairs that `tiling` was chosen for; those for `exact` ones give a row the same bits. LOCAL, pure."""
        if tiling.rows <= 16:
            return cls(up=tiling.up)
        if tiling.rows <= 32:
            return cls(rows=32, up_stages=4, down_stages=6, programs=2)
        return cls(rows=64, down=128, down_stages=3, programs=2)


class BlockExperts(DeviceExperts):
    """The MoE layers of a rank whose bank holds blocks."""

    def __init__(self, *parts: Any, **sizes: Any) -> None:
        """See `DeviceExperts`."""
        from phalanx.moe import block_kernels

        super().__init__(*parts, **sizes)
        self._block_code = block_kernels

    def experts(self, layer: int, x_ND: Tensor, row_M: Tensor, first_S: Tensor, tiling: Tiling) -> Tensor:
        """See `DeviceExperts.experts`. LOCAL."""
        return self.products(layer, x_ND, row_M, first_S, BlockTiling.of(tiling))

    def products(self, layer: int, x_ND: Tensor, row_M: Tensor, first_S: Tensor, tiling: BlockTiling) -> Tensor:
        """The same, cut in this way. LOCAL."""
        bank, t = self._bank, tiling
        weights, programs = bank.weights_LSX[layer], t.programs * self._processors
        shape = {
            "S": bank.slots_per_rank, "SP": power_of_two(bank.slots_per_rank), "F": bank.expert_width,
            "D": bank.hidden, "X": bank.expert_bytes, "AT": bank.layout.scales_start, "PROGRAMS": programs,
            "BM": t.rows, "BK": BLOCK, "num_warps": 4,
        }  # fmt: skip
        self._block_code.up_kernel[(programs,)](
            x_ND, row_M, first_S, weights, self._h_MF, **shape, BN=t.up, num_stages=t.up_stages
        )
        self._block_code.down_kernel[(programs,)](
            self._h_MF, first_S, weights, self._y_MD, **shape, BN=t.down, num_stages=t.down_stages
        )
        return self._y_MD


def kind_for(bank: DeviceBank) -> type[DeviceExperts]:
    """What computes with this bank's slots. LOCAL."""
    return DeviceExperts if bank.layout.format == "plain" else BlockExperts
