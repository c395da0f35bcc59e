"""Products with weights in e4m3 that have a float32 scale a block of 128 x 128 (Triton), for `moe.expert_kernels`.

Activations stay bfloat16. Weights become bfloat16 on their way to the tensor cores, which every e4m3 value is exactly;
the float32 sum over 128 inputs, one block deep, is then multiplied by the block's scale. So nothing is rounded but what
a product of bfloat16 weights rounds, too.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.moe.kernels import INTERPRETED

# Four bytes of e4m3 to four bfloat16: sign, exponent and mantissa fall into place, and 2^120 corrects the exponent's
# bias, also of the values below 2^-6. Five instructions for two weights.
_WIDEN: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, sign, bias;
    mov.b32 bias, 0x7b807b80;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, low, 0x80008000;
    shr.u32 low, low, 4;
    and.b32 low, low, 0x07f007f0;
    or.b32 low, low, sign;
    and.b32 sign, high, 0x80008000;
    shr.u32 high, high, 4;
    and.b32 high, high, 0x07f007f0;
    or.b32 high, high, sign;
    mul.rn.bf16x2 $0, low, bias;
    mul.rn.bf16x2 $1, high, bias;
}""")


@triton.jit
def widen(bits):
    """bfloat16 of the e4m3 values whose bits these are, uint8. Exact; what is not a number in e4m3 becomes 480."""
    if INTERPRETED:
        wide = bits.to(tl.uint32)
        value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
        return (value * 1.329227995784916e36).to(tl.bfloat16)  # 2^120
    else:
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def block_product(x_MK, bits_NK):
    """[BM, BN] float32: of one block's depth, without its scale."""
    if INTERPRETED:
        return tl.dot(x_MK.to(tl.float32), tl.trans(widen(bits_NK).to(tl.float32)))
    else:
        return tl.dot(x_MK, tl.trans(widen(bits_NK)))
