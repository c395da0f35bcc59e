"""The experts of an MoE layer as one Triton kernel: both grouped products, without a pause of the memory between them.

With the few rows of a decode the time is that of the weights' way from memory; a second kernel would begin with
nothing under way, after the last program of the first one had ended. So one kernel makes the tiles of both products:
each program its share of w13's, then w2's, which wait until their rows are there. Whoever is free draws the next tile
of w2, so all programs end together (a persistent grid, as in CUTLASS; draining evenly is stream-K's aim, too).
A program may wait for any other, so a grid is no larger than what runs at once.

How many rows each slot got is read from the device, so a captured graph serves every batch. A row's sums are added in
one order, whatever else its slot got, and whoever adds them.

Shape suffixes: S slots a rank, F expert width, D model width, M pairs received; FB, DB: blocks in F and D, of which the
last may be cut off.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.moe.block_kernels import block_product
from phalanx.moe.kernels import dot

DRAWN: tl.constexpr = tl.constexpr(0)
"""Word of `turns`: tiles drawn so far."""
ENDED: tl.constexpr = tl.constexpr(1)
"""Programs that have ended."""
READY: tl.constexpr = tl.constexpr(2)
"""From here on: of each tile of rows, how many tiles of w13 have been stored."""


@triton.jit
def _add(total, x_MK, w_NK, scale, AT: tl.constexpr):
    """total + x w^T; AT > 0: of e4m3 weights with this scale."""
    if AT > 0:
        return total + block_product(x_MK, w_NK) * scale
    else:
        return dot(x_MK, tl.trans(w_NK), total)


@triton.jit
def _up_tile(
    x, row_M, weights, h, slot, start, end, column,
    F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, AT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[m] = silu(gate x[row_M[m]]) * up x[row_M[m]] for BM rows from `start` on, and BN columns.

    weights: [S, X], a slot's w13 [2F, D] first."""
    d = tl.arange(0, BK)
    FB: tl.constexpr = (F + BK - 1) // BK
    DB: tl.constexpr = (D + BK - 1) // BK
    m = start + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    row = tl.load(row_M + m, mask=m < end, other=0)
    x_at = x + row[:, None] * D + d[None, :]
    expert = weights + slot.to(tl.int64) * X
    w_at = expert + n[:, None] * D + d[None, :]
    gate_MN = tl.zeros([BM, BN], tl.float32)
    up_MN = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        gate_scale, up_scale = 1.0, 1.0
        if AT > 0:
            scale_at = (expert + AT).to(tl.pointer_type(tl.float32)) + column * BN // BK * DB
            gate_scale, up_scale = tl.load(scale_at + k // BK), tl.load(scale_at + k // BK + FB * DB)
        if D % BK == 0 and F % BN == 0:
            x_MK = tl.load(x_at + k, mask=(m < end)[:, None], other=0.0)
            gate_NK = tl.load(w_at + k)
            up_NK = tl.load(w_at + k + F * D)
        else:
            inside = (k + d < D)[None, :]
            x_MK = tl.load(x_at + k, mask=(m < end)[:, None] & inside, other=0.0)
            gate_NK = tl.load(w_at + k, mask=(n < F)[:, None] & inside, other=0)
            up_NK = tl.load(w_at + k + F * D, mask=(n < F)[:, None] & inside, other=0)
        gate_MN = _add(gate_MN, x_MK, gate_NK, gate_scale, AT)
        up_MN = _add(up_MN, x_MK, up_NK, up_scale, AT)
    out = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    at = h + m[:, None].to(tl.int64) * F + n[None, :]
    tl.store(at, out.to(h.dtype.element_ty), mask=(m < end)[:, None] & (n < F)[None, :])


@triton.jit
def _down_tile(
    h, weights, y, slot, start, end, column,
    F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, AT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[m] = w2 h[m] for BM rows from `start` on, and BN columns. h: [M, F]; y: [M, D]; w2 [D, F] follows w13."""
    f = tl.arange(0, BK)
    FB: tl.constexpr = (F + BK - 1) // BK
    DB: tl.constexpr = (D + BK - 1) // BK
    m = start + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    h_at = h + m[:, None].to(tl.int64) * F + f[None, :]
    expert = weights + slot.to(tl.int64) * X
    w_at = expert + 2 * F * D + n[:, None] * F + f[None, :]
    sum_MN = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, F, BK, num_stages=STAGES):
        scale = 1.0
        if AT > 0:
            scale_at = (expert + AT).to(tl.pointer_type(tl.float32)) + 2 * FB * DB + column * BN // BK * FB
            scale = tl.load(scale_at + k // BK)
        if F % BK == 0 and D % BN == 0:
            h_MK = tl.load(h_at + k, mask=(m < end)[:, None], other=0.0)
            w_NK = tl.load(w_at + k)
        else:
            inside = (k + f < F)[None, :]
            h_MK = tl.load(h_at + k, mask=(m < end)[:, None] & inside, other=0.0)
            w_NK = tl.load(w_at + k, mask=(n < D)[:, None] & inside, other=0)
        sum_MN = _add(sum_MN, h_MK, w_NK, scale, AT)
    at = y + m[:, None].to(tl.int64) * D + n[None, :]
    tl.store(at, sum_MN.to(y.dtype.element_ty), mask=(m < end)[:, None] & (n < D)[None, :])


@triton.jit
def _pick(tile, begin_S, end_S, upto_S, tiles_S, SP: tl.constexpr, BM: tl.constexpr):
    """The slot of a tile, its first pair, and the end of the slot's pairs."""
    s = tl.arange(0, SP)
    slot = tl.sum((upto_S <= tile).to(tl.int32))
    here = s == slot
    within = tile - tl.sum(tl.where(here, upto_S - tiles_S, 0))
    return slot, tl.sum(tl.where(here, begin_S, 0)) + within * BM, tl.sum(tl.where(here, end_S, 0))


@triton.jit
def experts_kernel(
    x, row_M, first, weights, h, y, turns,
    S: tl.constexpr, SP: tl.constexpr, F: tl.constexpr, D: tl.constexpr, X: tl.constexpr, AT: tl.constexpr,
    BM: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, BK: tl.constexpr, UP_STAGES: tl.constexpr,
    DOWN_STAGES: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """y[m] = w2 (silu(gate x[row_M[m]]) * up x[row_M[m]]) with the weights of m's slot.

    weights: [S, X], w13 and w2 of a slot; AT > 0: they are e4m3 bits, uint8, and from byte AT on stand their scales
    (`moe.layout`): then BK is 128, and UP and DOWN divide it. first: int32 [S + 1], where each slot's pairs begin; h:
    [M, F] and y: [M, D] are written; turns: int32 [READY + MOST], zeros before and after; MOST: the most tiles of rows
    that whole lists may ask for.
    Grid: as many programs as run at once, or fewer.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    s = tl.arange(0, SP)
    begin_S = tl.load(first + s, mask=s < S, other=0)
    end_S = tl.load(first + s + 1, mask=s < S, other=0)
    # A dispatch that was broken off may leave lists that do not fit each other: counts may then be negative, and
    # their sum more than there is room for.
    tiles_S = tl.maximum(end_S - begin_S + BM - 1, 0) // BM
    upto_S = tl.cumsum(tiles_S, 0)
    tiles = tl.minimum(tl.sum(tiles_S), MOST)
    UPS: tl.constexpr = (F + UP - 1) // UP
    DOWNS: tl.constexpr = (D + DOWN - 1) // DOWN
    for item in range(pid, tiles * UPS, programs):
        tile = item // UPS
        slot, start, end = _pick(tile, begin_S, end_S, upto_S, tiles_S, SP, BM)
        _up_tile(x, row_M, weights, h, slot, start, end, item % UPS, F, D, X, AT, BM, UP, BK, UP_STAGES)
        tl.debug_barrier()  # the whole tile is stored before it is counted
        tl.atomic_add(turns + READY + tile, 1, sem="release")
    # Whoever had fewer tiles of w13 begins with the first ones of w2; the rest goes to whoever is free.
    item = (pid + programs - (tiles * UPS) % programs) % programs
    while item < tiles * DOWNS:
        following = tiles * DOWNS
        if tiles * DOWNS > programs:
            following = programs + tl.atomic_add(turns + DRAWN, 1, sem="relaxed")
        tile = item // DOWNS
        slot, start, end = _pick(tile, begin_S, end_S, upto_S, tiles_S, SP, BM)
        stored = tl.atomic_add(turns + READY + tile, 0, sem="acquire")
        while stored < UPS:
            stored = tl.atomic_add(turns + READY + tile, 0, sem="acquire")
        tl.debug_barrier()
        _down_tile(h, weights, y, slot, start, end, item % DOWNS, F, D, X, AT, BM, DOWN, BK, DOWN_STAGES)
        item = following
    if tl.atomic_add(turns + ENDED, 1) == programs - 1:  # nobody reads them any more
        i = tl.arange(0, 256)
        for at in range(0, tiles + READY, 256):
            tl.store(turns + at + i, 0, mask=at + i < tiles + READY)
