"""Dense products of few rows on a device, and products that are still in parts. See `thin_kernels`.

Shape suffixes: N rows, D inner, O outputs, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PROGRAMS = 240
"""Programs that a product is cut into, at least, where its shape allows it: enough to ask for all that memory gives.
Half as many do with tiles of _MOST_ROWS: their programs have more rounds under way, and parts cost more to add."""

_OUTPUTS = 64
_DEPTH = 64
_MOST_ROWS = 64
_LEAST_DEPTH = 16
_MOST_PARTS = 16


@dataclass(frozen=True)
class Product:
    """A product as its reader finds it. parts 0: [N, O] in the run's type; else float32 [parts, N, O], to be added in
    their order and rounded."""

    data: Tensor
    parts: int = 0

    @classmethod
    def of(cls, value: Tensor | Product) -> Product:
        """What is no product yet is one without parts. LOCAL, pure."""
        return value if isinstance(value, Product) else cls(value)


@dataclass(frozen=True)
class ThinShape:
    """How a product is cut. rows: of a tile. depth: inputs a round. stages: rounds under way, and the one worked on."""

    rows: int
    depth: int
    parts: int
    stages: int

    @classmethod
    def of(cls, rows: int, outputs: int, inner: int) -> ThinShape | None:
        """The shape for [rows, inner] x [outputs, inner]; None: the inner dimension cannot be cut so. LOCAL, pure."""
        padded = min(_MOST_ROWS, max(16, 1 << max(0, rows - 1).bit_length()))
        programs, stages = (_PROGRAMS, 4) if padded < _MOST_ROWS else (_PROGRAMS // 2, 6)
        depth = _DEPTH
        while depth > _LEAST_DEPTH and (inner % depth or 4 * depth > inner):
            depth //= 2
        if inner % depth:
            return None
        tiles = -(-outputs // _OUTPUTS) * -(-rows // padded)
        parts = 1
        while tiles * parts < programs and inner % (2 * parts * depth) == 0 and parts < _MOST_PARTS:
            parts *= 2
        return cls(padded, depth, parts, min(stages, 1 + inner // (parts * depth)))


class ThinProducts:
    """Makes products without bias, of types of two bytes."""

    def __init__(self) -> None:
        from phalanx.moe import thin_kernels

        self._code = thin_kernels

    def __call__(self, x_ND: Tensor, w_OD: Tensor) -> Product | None:
        """None: not a product for this kernel. LOCAL, launches only."""
        rows, outputs, inner = x_ND.shape[0], *w_OD.shape
        shape = ThinShape.of(rows, outputs, inner)
        if shape is None:
            return None
        if shape.parts > 1:
            out = torch.empty(shape.parts, rows, outputs, dtype=torch.float32, device=x_ND.device)
        else:
            out = torch.empty(rows, outputs, dtype=x_ND.dtype, device=x_ND.device)
        self._code.thin_kernel[(-(-outputs // _OUTPUTS), shape.parts, -(-rows // shape.rows))](
            x_ND, w_OD, out, rows, OUT=outputs, D=inner, BM=shape.rows, BN=_OUTPUTS, BK=shape.depth,
            PARTS=shape.parts, num_warps=4, num_stages=shape.stages,
        )  # fmt: skip
        return Product(out, shape.parts if shape.parts > 1 else 0)
