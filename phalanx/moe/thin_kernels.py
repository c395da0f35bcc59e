"""Triton kernels for dense products of few rows: what a decode multiplies with weights that are read once.

The weights' way from memory is all that such a product costs. So many programs read a tile each: OUT is cut in tiles,
and the inner dimension in PARTS, whose float32 results are left side by side. Whoever reads the product next (norm,
placing of keys, gate) adds them on the way, in the order of the parts: no program waits for another one.

Weights stand on the left of the product, rows on the right: the device multiplies at least 64 of the one at once, but
as few as 8 of the other. Shape suffixes: M rows, N outputs, K inner.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.moe.kernels import dot


@triton.jit(do_not_specialize=["rows"])
def thin_kernel(
    x, w, out, rows,
    OUT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[p, m] = the part p of x[m] w^T; x: [rows, D]; w: [OUT, D]; out: [PARTS, rows, OUT].

    D is a multiple of PARTS * BK. Grid: (tiles of BN outputs, PARTS, tiles of BM rows)."""
    DEPTH: tl.constexpr = D // PARTS
    first = tl.program_id(0) * BN
    part = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    n = first + tl.arange(0, BN)
    d = part * DEPTH + tl.arange(0, BK)
    x_at = x + m[:, None] * D + d[None, :]
    w_at = w + n.to(tl.int64)[:, None] * D + d[None, :]
    sum_NM = tl.zeros([BN, BM], tl.float32)
    for start in range(0, DEPTH, BK):
        x_MK = tl.load(x_at + start, mask=(m < rows)[:, None], other=0.0)
        if OUT % BN == 0:  # noqa: SIM108
            w_NK = tl.load(w_at + start)
        else:
            w_NK = tl.load(w_at + start, mask=(n < OUT)[:, None], other=0.0)
        sum_NM = dot(w_NK, tl.trans(x_MK), sum_NM)
    at = out + (part * rows).to(tl.int64) * OUT + m[None, :].to(tl.int64) * OUT + n[:, None]
    tl.store(at, sum_NM.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < OUT)[:, None])
