"""Triton kernels of an MoE layer between its exchanges: the gate, and the experts as one grouped product.

The experts' kernels read how many rows each slot got from the device, so a captured graph serves every batch. Their
grids have a fixed size; a program walks over the tiles that there are. A row's sums are added in one order, whatever
else its slot got.

Shape suffixes: T tokens, K top-k, E experts, S slots a rank, F expert width, D model width, M pairs received.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, total):
    """total + a b, in float32. Triton's interpreter cannot multiply bfloat16 and gets the same numbers in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def whole(product, at, inside, stride, PARTS: tl.constexpr, kind: tl.constexpr):
    """What stands at `at` of a product (`moe.thin`): as it is, or the sum of PARTS parts, `stride` apart, in `kind`."""
    value = tl.load(product + at, mask=inside, other=0.0)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            value += tl.load(product + part * stride + at, mask=inside, other=0.0)
        value = value.to(kind)
    return value


@triton.jit
def gate_kernel(
    logits, positions, num_rows, routes, weights, slots, load,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, W: tl.constexpr, SCALED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Softmax over the experts, the K largest (of equals the lowest ids), and the slots where they stand.

    logits: a product [T, E]; routes: int32 [E, W], one layer's; weights: float32 [T, K], slots: int32 [T, K], -1 in
    rows from num_rows[0] on, which pad a captured batch; load: int32 [E], counted up. Grid: T.
    """
    t = tl.program_id(0)
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    x_E = whole(logits, t * E + e, e < E, tl.num_programs(0) * E, PARTS, tl.float32).to(tl.float32)
    x_E = tl.where(e < E, x_E, float("-inf"))
    p_E = tl.exp(x_E - tl.max(x_E))
    left_E = tl.where(e < E, p_E / tl.sum(p_E), -1.0)
    expert_K = tl.zeros([KP], tl.int32)
    weight_K = tl.zeros([KP], tl.float32)
    for i in tl.static_range(K):
        best = tl.max(left_E)
        # A row that a lost peer left without meaning may hold no number at all: its index must be valid all the same.
        at = tl.minimum(tl.min(tl.where(left_E == best, e, E - 1)), E - 1)
        expert_K = tl.where(k == i, at, expert_K)
        weight_K = tl.where(k == i, best, weight_K)
        left_E = tl.where(e == at, -2.0, left_E)
    if SCALED:
        weight_K = weight_K / tl.sum(weight_K)
    wanted = (k < K) & (t < tl.load(num_rows))
    column = tl.load(positions + t) % W
    slot_K = tl.load(routes + expert_K * W + column, mask=wanted, other=-1)
    tl.store(weights + t * K + k, weight_K, mask=k < K)
    tl.store(slots + t * K + k, slot_K, mask=k < K)
    tl.atomic_add(load + expert_K, tl.full([KP], 1, tl.int32), mask=wanted, sem="relaxed")


@triton.jit
def _tiles(first, S: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr):
    """Of each slot: where its pairs begin and end, and how many tiles of BM pairs end with it or before."""
    s = tl.arange(0, SP)
    begin_S = tl.load(first + s, mask=s < S, other=0)
    end_S = tl.load(first + s + 1, mask=s < S, other=0)
    # A dispatch that was broken off may leave lists of two batches: no count may then be negative.
    tiles_S = tl.maximum(end_S - begin_S + BM - 1, 0) // BM
    return begin_S, end_S, tl.cumsum(tiles_S, 0), tiles_S


@triton.jit
def _pick(tile, begin_S, end_S, upto_S, tiles_S, SP: tl.constexpr, BM: tl.constexpr):
    """The slot of a tile, its first pair, and the end of the slot's pairs."""
    s = tl.arange(0, SP)
    slot = tl.sum((upto_S <= tile).to(tl.int32))
    here = s == slot
    within = tile - tl.sum(tl.where(here, upto_S - tiles_S, 0))
    return slot, tl.sum(tl.where(here, begin_S, 0)) + within * BM, tl.sum(tl.where(here, end_S, 0))


@triton.jit
def up_kernel(
    x, row_M, first, weights, h,
    S: tl.constexpr, SP: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """h[m] = silu(gate x[row_M[m]]) * up x[row_M[m]] with the weights of m's slot.

    weights: [S, 3 F D], a slot's w13 [2F, D] first; first: int32 [S + 1]; h: [M, F]. Grid: PROGRAMS."""
    begin_S, end_S, upto_S, tiles_S = _tiles(first, S, SP, BM)
    d = tl.arange(0, BK)
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    for work in range(tl.program_id(0), tl.sum(tiles_S) * COLUMNS, PROGRAMS):
        slot, start, end = _pick(work // COLUMNS, begin_S, end_S, upto_S, tiles_S, SP, BM)
        m = start + tl.arange(0, BM)
        n = (work % COLUMNS) * BN + tl.arange(0, BN)
        row = tl.load(row_M + m, mask=m < end, other=0)
        x_at = x + row[:, None] * D + d[None, :]
        w_at = weights + slot.to(tl.int64) * (3 * F * D) + n[:, None] * D + d[None, :]
        gate_MN = tl.zeros([BM, BN], tl.float32)
        up_MN = tl.zeros([BM, BN], tl.float32)
        for k in range(0, D, BK):
            if D % BK == 0 and F % BN == 0:
                x_MK = tl.load(x_at + k, mask=(m < end)[:, None], other=0.0)
                gate_NK = tl.load(w_at + k)
                up_NK = tl.load(w_at + k + F * D)
            else:
                inside = (k + d < D)[None, :]
                x_MK = tl.load(x_at + k, mask=(m < end)[:, None] & inside, other=0.0)
                gate_NK = tl.load(w_at + k, mask=(n < F)[:, None] & inside, other=0.0)
                up_NK = tl.load(w_at + k + F * D, mask=(n < F)[:, None] & inside, other=0.0)
            gate_MN = dot(x_MK, tl.trans(gate_NK), gate_MN)
            up_MN = dot(x_MK, tl.trans(up_NK), up_MN)
        out = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
        at = h + m[:, None].to(tl.int64) * F + n[None, :]
        tl.store(at, out.to(h.dtype.element_ty), mask=(m < end)[:, None] & (n < F)[None, :])


@triton.jit
def down_kernel(
    h, first, weights, y,
    S: tl.constexpr, SP: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """y[m] = w2 h[m] with the weights of m's slot. h: [M, F]; y: [M, D]; w2 [D, F] follows w13. Grid: PROGRAMS."""
    begin_S, end_S, upto_S, tiles_S = _tiles(first, S, SP, BM)
    f = tl.arange(0, BK)
    COLUMNS: tl.constexpr = (D + BN - 1) // BN
    for work in range(tl.program_id(0), tl.sum(tiles_S) * COLUMNS, PROGRAMS):
        slot, start, end = _pick(work // COLUMNS, begin_S, end_S, upto_S, tiles_S, SP, BM)
        m = start + tl.arange(0, BM)
        n = (work % COLUMNS) * BN + tl.arange(0, BN)
        h_at = h + m[:, None].to(tl.int64) * F + f[None, :]
        w_at = weights + slot.to(tl.int64) * (3 * F * D) + 2 * F * D + n[:, None] * F + f[None, :]
        sum_MN = tl.zeros([BM, BN], tl.float32)
        for k in range(0, F, BK):
            if F % BK == 0 and D % BN == 0:
                h_MK = tl.load(h_at + k, mask=(m < end)[:, None], other=0.0)
                w_NK = tl.load(w_at + k)
            else:
                inside = (k + f < F)[None, :]
                h_MK = tl.load(h_at + k, mask=(m < end)[:, None] & inside, other=0.0)
                w_NK = tl.load(w_at + k, mask=(n < D)[:, None] & inside, other=0.0)
            sum_MN = dot(h_MK, tl.trans(w_NK), sum_MN)
        at = y + m[:, None].to(tl.int64) * D + n[None, :]
        tl.store(at, sum_MN.to(y.dtype.element_ty), mask=(m < end)[:, None] & (n < D)[None, :])
