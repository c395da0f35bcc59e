"""How the bytes of one expert lie in a slot, in the vault and on their way between ranks. Needs no torch.

Shape suffixes: F expert width, D model width; FB, DB: blocks of 128 in them, the last of which may be cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExpertFormat = Literal["plain", "fp8"]
"""plain: in the type that the run computes in. fp8: e4m3, with a float32 scale for each block of 128 x 128 weights, as
DeepSeek-V3 has them (https://arxiv.org/abs/2412.19437, section 3.3)."""

BLOCK = 128
"""Rows and columns that share a scale."""

_ALIGNED = 16
"""What devices load at once."""


def blocks_in(size: int) -> int:
    """Blocks in so many rows or columns. LOCAL."""
    return -(-size // BLOCK)


@dataclass(frozen=True)
class ExpertLayout:
    """w13 [2F, D] (the gate's rows, then the up projection's), then w2 [D, F]. With fp8 then, from the next multiple of
    16 bytes on, the scales: of the gate [FB, DB], of the up projection [FB, DB], of w2 [DB, FB].

    element_bytes: of a weight in the run's type, for plain experts."""

    hidden: int
    width: int
    element_bytes: int
    format: ExpertFormat = "plain"

    @property
    def weights(self) -> int:
        """How many weights an expert has."""
        return 3 * self.hidden * self.width

    @property
    def scales(self) -> int:
        """How many scales."""
        return 3 * blocks_in(self.hidden) * blocks_in(self.width) if self.format == "fp8" else 0

    @property
    def weight_bytes(self) -> int:
        return self.weights * (1 if self.format == "fp8" else self.element_bytes)

    @property
    def scales_start(self) -> int:
        """The byte from which on the scales lie."""
        return -(-self.weight_bytes // _ALIGNED) * _ALIGNED

    @property
    def total_bytes(self) -> int:
        """Bytes of an expert; with fp8 whole multiples of 16."""
        if self.format == "plain":
            return self.weight_bytes
        return -(-(self.scales_start + 4 * self.scales) // _ALIGNED) * _ALIGNED
