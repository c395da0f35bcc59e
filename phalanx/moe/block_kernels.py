"""Triton kernels of experts whose weights are e4m3 with a float32 scale a block of 128 x 128: the tiles of
`moe.expert_kernels`, over half the bytes.

Activations stay bfloat16. Weights become bfloat16 on their way to the tensor cores, which every e4m3 value is exactly;
the float32 sum over 128 inputs, one block deep, is then multiplied by the block's scale. So nothing is rounded but what
a product of bfloat16 weights rounds, too.

Shape suffixes: as in `moe.expert_kernels`; FB, DB: blocks of 128 in F and D, the last of which may be cut off.
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
def _product(x_MK, bits_NK):
    """[BM, BN] float32: of one block's depth, without its scale."""
    if INTERPRETED:
        return tl.dot(x_MK.to(tl.float32), tl.trans(widen(bits_NK).to(tl.float32)))
    else:
        return tl.dot(x_MK, tl.trans(widen(bits_NK)))


@triton.jit
def block_up_tile(
    x, row_M, weights, h, slot, start, end, column,
    F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, AT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """See `expert_kernels.up_tile`. weights: uint8 [S, X], a slot's w13 [2F, D] first, from byte AT on its scales
    (`moe.layout`); BK is 128 and BN divides it."""
    d = tl.arange(0, BK)
    FB: tl.constexpr = (F + BK - 1) // BK
    DB: tl.constexpr = (D + BK - 1) // BK
    m = start + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    row = tl.load(row_M + m, mask=m < end, other=0)
    x_at = x + row[:, None] * D + d[None, :]
    expert = weights + slot.to(tl.int64) * X
    w_at = expert + n[:, None] * D + d[None, :]
    scale_at = (expert + AT).to(tl.pointer_type(tl.float32)) + column * BN // BK * DB
    gate_MN = tl.zeros([BM, BN], tl.float32)
    up_MN = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        gate_scale = tl.load(scale_at + k // BK)
        up_scale = tl.load(scale_at + k // BK + FB * DB)
        if D % BK == 0 and F % BN == 0:
            x_MK = tl.load(x_at + k, mask=(m < end)[:, None], other=0.0)
            gate_NK = tl.load(w_at + k)
            up_NK = tl.load(w_at + k + F * D)
        else:
            inside = (k + d < D)[None, :]
            x_MK = tl.load(x_at + k, mask=(m < end)[:, None] & inside, other=0.0)
            gate_NK = tl.load(w_at + k, mask=(n < F)[:, None] & inside, other=0)
            up_NK = tl.load(w_at + k + F * D, mask=(n < F)[:, None] & inside, other=0)
        gate_MN += _product(x_MK, gate_NK) * gate_scale
        up_MN += _product(x_MK, up_NK) * up_scale
    out = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    at = h + m[:, None].to(tl.int64) * F + n[None, :]
    tl.store(at, out.to(h.dtype.element_ty), mask=(m < end)[:, None] & (n < F)[None, :])


@triton.jit
def block_down_tile(
    h, weights, y, slot, start, end, column,
    F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, AT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """See `expert_kernels.down_tile`. w2 [D, F] follows w13, and so do their scales."""
    f = tl.arange(0, BK)
    FB: tl.constexpr = (F + BK - 1) // BK
    DB: tl.constexpr = (D + BK - 1) // BK
    m = start + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    h_at = h + m[:, None].to(tl.int64) * F + f[None, :]
    expert = weights + slot.to(tl.int64) * X
    w_at = expert + 2 * F * D + n[:, None] * F + f[None, :]
    scale_at = (expert + AT).to(tl.pointer_type(tl.float32)) + 2 * FB * DB + column * BN // BK * FB
    sum_MN = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, F, BK, num_stages=STAGES):
        scale = tl.load(scale_at + k // BK)
        if F % BK == 0 and D % BN == 0:
            h_MK = tl.load(h_at + k, mask=(m < end)[:, None], other=0.0)
            w_NK = tl.load(w_at + k)
        else:
            inside = (k + f < F)[None, :]
            h_MK = tl.load(h_at + k, mask=(m < end)[:, None] & inside, other=0.0)
            w_NK = tl.load(w_at + k, mask=(n < D)[:, None] & inside, other=0)
        sum_MN += _product(h_MK, w_NK) * scale
    at = y + m[:, None].to(tl.int64) * D + n[None, :]
    tl.store(at, sum_MN.to(y.dtype.element_ty), mask=(m < end)[:, None] & (n < D)[None, :])
