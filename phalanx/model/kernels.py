"""Triton kernels of the decoder: embedding, norm, placing of queries and keys, paged attention, exact products.

What makes a row's bits its own: a decode looks at its KV in splits of fixed size, each walked in blocks of fixed size,
and the splits are merged in their order; a product walks its inner dimension in blocks of fixed size. Nothing here
depends on how many rows a batch has. What a row must not see is masked before the exponential and adds exact zeros.

Flash-decoding (Dao et al., 2023) is where the splits come from; the list of (row, split) items, which lets a captured
graph serve any mix of lengths with a grid of fixed size, is ours.

Memory: `kv` is one layer of `model.cuda.DeviceKV`, [blocks, 2, Hkv, block_size, C]; `tail` is the variable part of
`model.device_tables`. Shape suffixes: T tokens, D width, H Hkv heads, G query heads a KV head, C head size, M rows of
a tile, N KV positions.
"""
# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.model import device_tables
from phalanx.moe.kernels import dot, whole

_ITEM_WORDS: tl.constexpr = tl.constexpr(device_tables.ITEM_WORDS)


@triton.jit
def embed_kernel(tokens, chosen, embed, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """out = embed[token]; token -1 - i is chosen[i], what the batch before chose. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    token = tl.load(tokens + row).to(tl.int64)
    earlier = tl.load(chosen + tl.maximum(-1 - token, 0), mask=token < 0, other=0)
    token = tl.where(token < 0, earlier, token)
    tl.store(out + row * D + cols, tl.load(embed + token * D + cols, mask=cols < D, other=0.0), mask=cols < D)


@triton.jit
def norm_kernel(
    x, residual, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr
):
    """out = rms_norm(row) * weight; with ADD the row is residual + x, stored in `residual`. x: a product.

    Grid: rows."""
    at = tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    row = whole(x, at, cols < D, tl.num_programs(0).to(tl.int64) * D, PARTS, out.dtype.element_ty)
    if ADD:
        before = tl.load(residual + at, mask=cols < D, other=0.0)
        row = (row.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(residual + at, row, mask=cols < D)
    wide = row.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide) / D + eps)
    scaled = wide * tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=cols < D)


@triton.jit
def _normed(low, high, weight, eps, c, C: tl.constexpr, HALF: tl.constexpr):
    """RMS norm of rows given as their two halves, rounded as two products in the run's type would be."""
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    squares = tl.sum(wide_low * wide_low, axis=1) + tl.sum(wide_high * wide_high, axis=1)
    scale = tl.rsqrt(squares / C + eps)[:, None]
    w_low = tl.load(weight + c, mask=c < HALF, other=0.0)[None, :].to(tl.float32)
    w_high = tl.load(weight + HALF + c, mask=c < HALF, other=0.0)[None, :].to(tl.float32)
    low_out = (wide_low * scale).to(low.dtype).to(tl.float32) * w_low
    high_out = (wide_high * scale).to(low.dtype).to(tl.float32) * w_high
    return low_out.to(low.dtype), high_out.to(low.dtype)


@triton.jit
def place_kernel(
    qkv, positions, kv_rows, cos, sin, q_norm, k_norm, kv, eps,
    H: tl.constexpr, HKV: tl.constexpr, GP: tl.constexpr, C: tl.constexpr, HALF_P: tl.constexpr, BS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Norm and turn the queries in place; norm and turn the keys into `kv`; copy the values there.

    qkv: [T, (H + 2 Hkv) C], heads in their natural order. cos, sin: float32 [positions, C / 2].
    Grid: (T, Hkv); a program has the query heads of one KV head.
    """
    t = tl.program_id(0)
    h = tl.program_id(1)
    HALF: tl.constexpr = C // 2
    G: tl.constexpr = H // HKV
    g = tl.arange(0, GP)
    one = tl.arange(0, 1)
    c = tl.arange(0, HALF_P)
    position = tl.load(positions + t).to(tl.int64)
    cos_C = tl.load(cos + position * HALF + c, mask=c < HALF, other=0.0)[None, :]
    sin_C = tl.load(sin + position * HALF + c, mask=c < HALF, other=0.0)[None, :]
    row = qkv + t.to(tl.int64) * ((H + 2 * HKV) * C)
    inside = (g < G)[:, None] & (c < HALF)[None, :]
    at = row + (h * G + g)[:, None] * C + c[None, :]
    low = tl.load(at, mask=inside, other=0.0)
    high = tl.load(at + HALF, mask=inside, other=0.0)
    if NORM:
        low, high = _normed(low, high, q_norm, eps, c, C, HALF)
    a, b = low.to(tl.float32), high.to(tl.float32)
    tl.store(at, (a * cos_C - b * sin_C).to(qkv.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (b * cos_C + a * sin_C).to(qkv.dtype.element_ty), mask=inside)

    kv_row = tl.load(kv_rows + t).to(tl.int64)
    place = kv + (kv_row // BS) * (2 * HKV * BS * C) + h * (BS * C) + (kv_row % BS) * C
    inside = (one == 0)[:, None] & (c < HALF)[None, :]
    at = row + (H + h) * C + one[:, None] + c[None, :]
    low = tl.load(at, mask=inside, other=0.0)
    high = tl.load(at + HALF, mask=inside, other=0.0)
    if NORM:
        low, high = _normed(low, high, k_norm, eps, c, C, HALF)
    a, b = low.to(tl.float32), high.to(tl.float32)
    to = place + one[:, None] + c[None, :]
    tl.store(to, (a * cos_C - b * sin_C).to(kv.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (b * cos_C + a * sin_C).to(kv.dtype.element_ty), mask=inside)
    values = row + (H + HKV + h) * C + one[:, None] + c[None, :]
    to += HKV * BS * C
    tl.store(to, tl.load(values, mask=inside, other=0.0), mask=inside)
    tl.store(to + HALF, tl.load(values + HALF, mask=inside, other=0.0), mask=inside)


@triton.jit
def _walk(
    q_MC, position_M, tail, first_block, kv, h, lower, upper, scale,
    HKV: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries over positions lower..upper of its sequence: (sum_MC, greatest_M, weight_M).

    The sum is not divided by the weight; scores are in powers of two (`scale` holds log2 e)."""
    c = tl.arange(0, CP)
    greatest_M = tl.full([M], float("-inf"), tl.float32)
    weight_M = tl.zeros([M], tl.float32)
    sum_MC = tl.zeros([M, CP], tl.float32)
    for start in range(lower, upper, BN):
        n = start + tl.arange(0, BN)
        there = n < upper
        block = tl.load(tail + first_block + n // BS, mask=there, other=0).to(tl.int64)
        at = kv + (block * (2 * HKV * BS * C) + h * (BS * C) + (n % BS) * C)[:, None] + c[None, :]
        inside = there[:, None] & (c < C)[None, :]
        k_NC = tl.load(at, mask=inside, other=0.0)
        score_MN = dot(q_MC, tl.trans(k_NC), tl.zeros([M, BN], tl.float32)) * scale
        seen = there[None, :] & (n[None, :] <= position_M[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > position_M[:, None] - WINDOW)
        score_MN = tl.where(seen, score_MN, float("-inf"))
        new_M = tl.maximum(greatest_M, tl.max(score_MN, axis=1))
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        p_MN = tl.exp2(score_MN - base_M[:, None])
        keep_M = tl.exp2(greatest_M - base_M)
        weight_M = weight_M * keep_M + tl.sum(p_MN, axis=1)
        v_NC = tl.load(at + HKV * BS * C, mask=inside, other=0.0)
        sum_MC = dot(p_MN.to(v_NC.dtype), v_NC, sum_MC * keep_M[:, None])
        greatest_M = new_M
    return sum_MC, greatest_M, weight_M


@triton.jit
def _lowest(position, at_least, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Where to begin so that `position` sees all it may: a function of the position alone, at the start of a block."""
    lower = at_least
    if WINDOW > 0:
        lower = tl.maximum(lower, (position - WINDOW + 1) // BN * BN)
    return lower


@triton.jit
def decode_kernel(
    qkv, positions, first_blocks, first_items, tail, num_items, kv, out, sums, peaks, scale,
    H: tl.constexpr, HKV: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Attention of single tokens. tail: a record of each item; a row's items stand together, from first_items[row].

    A row of one split is finished here: out [T, H C]. Of the others, sums [items, H, C] and peaks [items, 2, H] keep a
    split's sum, greatest score and weight, for `merge_kernel`. Grid: PROGRAMS, whatever there is to do.
    """
    G: tl.constexpr = H // HKV
    g = tl.arange(0, M)
    c = tl.arange(0, CP)
    items = tl.load(num_items)
    for work in range(tl.program_id(0), items * HKV, PROGRAMS):
        item = work // HKV
        h = work % HKV
        row = tl.load(tail + _ITEM_WORDS * item)
        split = tl.load(tail + _ITEM_WORDS * item + 1)
        position = tl.load(positions + row)
        inside = (g < G)[:, None] & (c < C)[None, :]
        heads = (h * G + g)[:, None] * C + c[None, :]
        q_MC = tl.load(qkv + row.to(tl.int64) * ((H + 2 * HKV) * C) + heads, mask=inside, other=0.0)
        lower = _lowest(position, split * SPLIT, BN, WINDOW)
        upper = tl.minimum((split + 1) * SPLIT, position + 1)
        position_M = position + tl.zeros([M], tl.int32)
        sum_MC, greatest_M, weight_M = _walk(
            q_MC, position_M, tail, tl.load(first_blocks + row), kv, h, lower, upper, scale,
            HKV, C, CP, M, BS, BN, WINDOW,
        )  # fmt: skip
        if tl.load(first_items + row + 1) - tl.load(first_items + row) == 1:
            done = (sum_MC / weight_M[:, None]).to(out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * (H * C) + heads, done, mask=inside)
        else:
            tl.store(sums + tl.cast(item, tl.int64) * (H * C) + heads, sum_MC, mask=inside)
            peak = peaks + tl.cast(item, tl.int64) * (2 * H) + h * G + g
            tl.store(peak, greatest_M, mask=g < G)
            tl.store(peak + H, weight_M, mask=g < G)


@triton.jit
def merge_kernel(
    num_merges, merges_at, tail, out, sums, peaks,
    H: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Put the splits of decodes, and the parts of tiles, together, in their order; what is whole is done.

    tail: from merges_at[0] on, row, first entry, entries from one to the next, and how many. Grid: (any, H)."""
    head = tl.program_id(1)
    c = tl.arange(0, CP)
    table = tail + tl.load(merges_at)
    for work in range(tl.program_id(0), tl.load(num_merges), tl.num_programs(0)):
        row = tl.load(table + 4 * work)
        entry = tl.load(table + 4 * work + 1)
        step = tl.load(table + 4 * work + 2)
        count = tl.load(table + 4 * work + 3)
        greatest = tl.full((), float("-inf"), tl.float32)
        weight = tl.full((), 0.0, tl.float32)
        sum_C = tl.zeros([CP], tl.float32)
        for i in range(count):
            at = (entry + i * step).to(tl.int64)
            peak = peaks + at * (2 * H) + head
            theirs = tl.load(peak)
            new = tl.maximum(greatest, theirs)
            base = tl.where(new == float("-inf"), 0.0, new)
            keep, take = tl.exp2(greatest - base), tl.exp2(theirs - base)
            part_C = tl.load(sums + at * (H * C) + head * C + c, mask=c < C, other=0.0)
            sum_C = sum_C * keep + part_C * take
            weight = weight * keep + tl.load(peak + H) * take
            greatest = new
        to = out + row.to(tl.int64) * (H * C) + head * C + c
        tl.store(to, (sum_C / weight).to(out.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, w, bias, out, rows,
    OUT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out = x w^T (+ bias), every row with the same order of additions however many rows there are.

    x: [rows, D]; w: [OUT, D]; out: [rows, OUT]. Grid: (tiles of BM rows, tiles of BN outputs)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    x_at = x + m[:, None].to(tl.int64) * D + d[None, :]
    w_at = w + n[:, None].to(tl.int64) * D + d[None, :]
    sum_MN = tl.zeros([BM, BN], tl.float32)
    for start in range(0, D, BK):
        x_MK = tl.load(x_at + start, mask=(m < rows)[:, None] & (start + d < D)[None, :], other=0.0)
        w_NK = tl.load(w_at + start, mask=(n < OUT)[:, None] & (start + d < D)[None, :], other=0.0)
        sum_MN = dot(x_MK, tl.trans(w_NK), sum_MN)
    if BIAS:
        sum_MN = sum_MN.to(out.dtype.element_ty).to(tl.float32)
        sum_MN += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    at = out + m[:, None].to(tl.int64) * OUT + n[None, :]
    tl.store(at, sum_MN.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < OUT)[None, :])
