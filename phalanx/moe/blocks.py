"""Weights as e4m3 with a float32 scale a block of 128 x 128: made, read back, and computed with on CPUs.

The scales that we choose are powers of two, the smallest with which a block's largest weight fits. So dividing by them
is exact, and so is what is read back in bfloat16; e4m3 has as many digits at every size, so this costs no precision but
of weights 2^14 times smaller than their block's largest. Checkpoints may bring any scales.

Shape suffixes: O outputs, I inputs; OB, IB: blocks of 128 in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.errors import PhalanxError
from phalanx.moe.layout import BLOCK, ExpertLayout, blocks_in
from phalanx.moe.linear import Products, SwiGlu

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""

_BF16_BITS = 0x87F0 - 0x10000
"""Sign, and the bits of exponent and mantissa that e4m3 has, as an int16 of bfloat16 has them."""

_BIAS = 2.0**120
"""Between the exponents of both."""


class NotFinite(PhalanxError):
    """Weights hold something that is no finite number: no block has a scale for that."""


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """One expert's bytes as tensors: e4m3 w13 [2F, D] and w2 [D, F], float32 scales of both, [2FB, DB] and [DB, FB].

    Of 2FB rows of scales the first half is the gate's, also where F is no multiple of 128."""

    w13: Tensor
    w2: Tensor
    scales13: Tensor
    scales2: Tensor

    @classmethod
    def of(cls, data: Tensor, layout: ExpertLayout) -> BlockWeights:
        """Views of an expert's bytes, uint8 [total_bytes]. LOCAL."""
        width, hidden = layout.width, layout.hidden
        FB, DB = blocks_in(width), blocks_in(hidden)
        flat = data[: layout.weight_bytes].view(E4M3)
        scales = data[layout.scales_start :][: 4 * layout.scales].view(torch.float32)
        return cls(
            flat[: 2 * width * hidden].view(2 * width, hidden),
            flat[2 * width * hidden :].view(hidden, width),
            scales[: 2 * FB * DB].view(2 * FB, DB),
            scales[2 * FB * DB :].view(DB, FB),
        )

    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(weight, scales) of the gate, the up projection and w2. LOCAL."""
        width, FB = self.w13.shape[0] // 2, self.scales13.shape[0] // 2
        return (
            (self.w13[:width], self.scales13[:FB]),
            (self.w13[width:], self.scales13[FB:]),
            (self.w2, self.scales2),
        )


def scales_of(w_OI: Tensor) -> Tensor:
    """float32 [OB, IB], powers of two: those that `quantize` uses. Raises NotFinite. LOCAL."""
    rows, columns = w_OI.shape
    most = w_OI.new_zeros(blocks_in(rows) * BLOCK, blocks_in(columns) * BLOCK)
    most[:rows, :columns] = w_OI.abs()
    most = most.view(blocks_in(rows), BLOCK, blocks_in(columns), BLOCK).amax((1, 3)).float()
    if not torch.isfinite(most).all():
        raise NotFinite("it holds weights that are not finite numbers")
    mantissa, exponent = torch.frexp(most / LARGEST)  # in [0.5, 1), or 0
    power = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(-126, 127)
    return torch.ldexp(torch.ones_like(most), power)


def quantize(w_OI: Tensor, weight: Tensor, scales: Tensor) -> None:
    """Write weights over e4m3 `weight` [O, I] and float32 `scales` [OB, IB]. Raises NotFinite. LOCAL."""
    scales.copy_(scales_of(w_OI))
    each = scales.reciprocal().repeat_interleave(BLOCK, 0)[: w_OI.shape[0]]
    for block, at in enumerate(range(0, w_OI.shape[1], BLOCK)):
        weight[:, at : at + BLOCK] = (w_OI[:, at : at + BLOCK].float() * each[:, block, None]).to(E4M3)


def dequantized(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, I] in `dtype`, by way of float32, on the device of `weight`. LOCAL."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize(weight, scales, out)
    return out


def dequantize(weight: Tensor, scales: Tensor, out: Tensor) -> None:
    """The same, written over `out` [O, I]. LOCAL."""
    each = scales.float().repeat_interleave(BLOCK, 0)[: weight.shape[0]]
    for block, at in enumerate(range(0, weight.shape[1], BLOCK)):
        # Sign, exponent and mantissa put where bfloat16 has them: many times faster than the library's conversion.
        bits = weight[:, at : at + BLOCK].view(torch.int8).to(torch.int16)
        values = bits.bitwise_left_shift_(4).bitwise_and_(_BF16_BITS).view(torch.bfloat16).float()
        out[:, at : at + BLOCK] = values.mul_(_BIAS).mul_(each[:, block, None])


def check_numbers(weight: Tensor) -> None:
    """Raise NotFinite for e4m3 weights that hold what is not a number; computed with, that would be 480. LOCAL."""
    if (weight.view(torch.uint8) & 0x7F).max() == 0x7F:
        raise NotFinite("it holds weights that are not numbers")


class BlockSwiGlu:
    """An expert like `SwiGlu`, whose weights are read back from their blocks at every call and kept by nobody: the
    reference of what devices compute, and half the memory, not half the time."""

    def __init__(self, weights: BlockWeights, products: Products, dtype: torch.dtype) -> None:
        self._weights, self._products, self._dtype = weights, products, dtype

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]. LOCAL."""
        blocks = self._weights
        w13, w2 = (torch.empty(weight.shape, dtype=self._dtype) for weight in (blocks.w13, blocks.w2))
        for (weight, scales), out in zip(blocks.parts(), (*w13.chunk(2), w2), strict=True):
            dequantize(weight, scales, out)
        return SwiGlu(w13, w2, self._products, packed=False)(x_ND)
