"""Attention of decodes that places its own keys: `kernels.place_kernel`, `decode_kernel` and `merge_kernel` in one.

For batches in which no row looks at the key of another row of the same batch: every row is the next token of a sequence
of its own. A program has the query heads of one KV head and a split of the context. Each of its warps walks over blocks
of KEYS keys by itself, with what it has seen so far in its registers, so warps meet once, at the end; the next blocks
are on their way meanwhile. The new key does not go through memory: its score is computed from the registers in which
it was normed and turned. Of a context in several splits the program that ends last puts the parts together.

What a small batch waits for is memory that no cache has, one answer after the other; here there are three: an item's
record, all block ids of its split beside the row and its angles, and keys.

Sums are taken in another order than in `kernels`, and in one that depends on how warps are cut, so `--deterministic`
does not use this. Suffixes: as in `kernels`, and W warps.
"""
# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.model import device_tables
from phalanx.model.decode_options import KEYS
from phalanx.model.kernels import _lowest, _normed
from phalanx.moe.kernels import dot

_ITEM_WORDS: tl.constexpr = tl.constexpr(device_tables.ITEM_WORDS)
_N: tl.constexpr = tl.constexpr(KEYS)


@triton.jit
def _record(tail, item):
    """Row, split, position, place of the new key, first block, and how many items the row has."""
    at = tail + item * _ITEM_WORDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 6)


@triton.jit
def _turned(at, inside, weight, cos_C, sin_C, eps, C: tl.constexpr, NORM: tl.constexpr):
    """The halves of heads that begin at `at` [M, 1]: normed, rounded, turned. Two of [M, C / 2]."""
    kind: tl.constexpr = at.dtype.element_ty
    HALF: tl.constexpr = C // 2
    c = tl.arange(0, HALF)
    low = tl.load(at + c[None, :], mask=inside, other=0.0)
    high = tl.load(at + HALF + c[None, :], mask=inside, other=0.0)
    if NORM:
        low, high = _normed(low, high, weight, eps, c, C, HALF)
    a, b = low.to(tl.float32), high.to(tl.float32)
    return (a * cos_C - b * sin_C).to(kind), (b * cos_C + a * sin_C).to(kind)


@triton.jit
def _walk_blocks(
    q_GC, ids, first_block, kv, lower, upper, position, scale,
    W: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, BLOCKS: tl.constexpr, STRIDE: tl.constexpr,
    VALUES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Attention of the queries q_GC over positions lower..upper, by warp: (sum_WCG, greatest_WG, weight_WG).

    ids: [BLOCKS], the blocks from `first_block` of the sequence on. kv: the keys of one head; its values are VALUES
    further on, the next block STRIDE. Queries stand on the right of the product, so that few heads waste nothing."""
    w = tl.arange(0, W)
    c = tl.arange(0, C)
    n = tl.arange(0, _N)
    kind: tl.constexpr = kv.dtype.element_ty
    ids_WB = tl.broadcast_to(ids[None, :], [W, BLOCKS])
    q_WCG = tl.broadcast_to(tl.trans(q_GC)[None, :, :], [W, C, G])
    greatest_WG = tl.full([W, G], float("-inf"), tl.float32)
    weight_WG = tl.zeros([W, G], tl.float32)
    sum_WCG = tl.zeros([W, C, G], tl.float32)
    for start in range(lower, upper, W * _N):
        first_W = start + w * _N
        nth_W = tl.minimum(first_W // BS - first_block, BLOCKS - 1)
        block_W = tl.reshape(tl.gather(ids_WB, nth_W[:, None], axis=1), [W]).to(tl.int64)
        at_W = kv + block_W * STRIDE + (first_W % BS) * C
        n_WN = first_W[:, None] + n[None, :]
        there_WN = n_WN < upper
        k_at = at_W[:, None, None] + (n * C)[None, :, None] + c[None, None, :]
        k_WNC = tl.load(k_at, mask=there_WN[:, :, None], other=0.0)
        score_WNG = dot(k_WNC, q_WCG, tl.zeros([W, _N, G], tl.float32)) * scale
        seen_WN = there_WN
        if WINDOW > 0:
            seen_WN = seen_WN & (n_WN > position - WINDOW)
        score_WNG = tl.where(seen_WN[:, :, None], score_WNG, float("-inf"))
        new_WG = tl.maximum(greatest_WG, tl.max(score_WNG, axis=1))
        base_WG = tl.where(new_WG == float("-inf"), 0.0, new_WG)
        p_WNG = tl.exp2(score_WNG - base_WG[:, None, :])
        keep_WG = tl.exp2(greatest_WG - base_WG)
        weight_WG = weight_WG * keep_WG + tl.sum(p_WNG, axis=1)
        # Addressed as the product wants them, so that they wait in shared memory; transposed later, in registers.
        v_at = at_W[:, None, None] + VALUES + (n * C)[None, None, :] + c[None, :, None]
        v_WCN = tl.load(v_at, mask=there_WN[:, None, :], other=0.0)
        sum_WCG = dot(v_WCN, p_WNG.to(kind), sum_WCG * keep_WG[:, None, :])
        greatest_WG = new_WG
    return sum_WCG, greatest_WG, weight_WG


@triton.jit
def _put_together(
    sums, peaks, first, count, at_G, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """What `count` splits from item `first` on give, in their order: [G, C]."""
    g = tl.arange(0, G)
    c = tl.arange(0, C)
    greatest_G = tl.full([G], float("-inf"), tl.float32)
    weight_G = tl.zeros([G], tl.float32)
    sum_GC = tl.zeros([G, C], tl.float32)
    for entry in range(first, first + count):
        peak = peaks + tl.cast(entry, tl.int64) * (2 * H) + at_G
        theirs_G = tl.load(peak, mask=g < GROUP, other=float("-inf"))
        more_G = tl.load(peak + H, mask=g < GROUP, other=0.0)
        part = sums + tl.cast(entry, tl.int64) * (H * C) + at_G[:, None] * C + c[None, :]
        part_GC = tl.load(part, mask=(g < GROUP)[:, None], other=0.0)
        new_G = tl.maximum(greatest_G, theirs_G)
        base_G = tl.where(new_G == float("-inf"), 0.0, new_G)
        keep_G, take_G = tl.exp2(greatest_G - base_G), tl.exp2(theirs_G - base_G)
        sum_GC = sum_GC * keep_G[:, None] + part_GC * take_G[:, None]
        weight_G = weight_G * keep_G + more_G * take_G
        greatest_G = new_G
    return sum_GC / weight_G[:, None]


@triton.jit
def placed_decode_kernel(
    qkv, cos, sin, q_norm, k_norm, tail, num_items, kv, out, sums, peaks, arrived, eps, scale,
    H: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr, ITEMS: tl.constexpr, SPLITS: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr,
    PROGRAMS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """See `kernels.decode_kernel` and `place_kernel`. qkv: [T, (H + 2 Hkv) C]; C, G and BLOCKS are powers of two, of
    which the last two are no less than 8, or the query heads of a KV head, and the blocks of a split.

    ITEMS: as many as there can be; SPLITS: as many as a row can have. arrived: int32 [T, Hkv], zeros, and zeros
    again when the kernel ends. Rows without items, which pad a captured batch, place nothing. Grid: PROGRAMS."""
    GROUP: tl.constexpr = H // HKV
    VALUES: tl.constexpr = HKV * BS * C
    kind: tl.constexpr = out.dtype.element_ty
    g = tl.arange(0, G)
    c = tl.arange(0, C)
    b = tl.arange(0, BLOCKS)
    one = tl.arange(0, 1)
    first_half = tl.arange(0, C // 2)[None, :]
    # Read beside the number of items, not behind it; what there is not is not looked at.
    row, split, position, kv_row, blocks_at, count = _record(tail, tl.minimum(tl.program_id(0) // HKV, ITEMS - 1))
    for work in range(tl.program_id(0), tl.load(num_items) * HKV, PROGRAMS):
        item = work // HKV
        h = work % HKV
        lower = _lowest(position, split * SPLIT, BS, WINDOW)
        upper = tl.minimum(split * SPLIT + SPLIT, position)
        first_block = lower // BS
        ids = tl.load(tail + blocks_at + first_block + b, mask=lower + b * BS < upper, other=0)
        start = qkv + row.to(tl.int64) * ((H + 2 * HKV) * C)
        angle = position.to(tl.int64) * (C // 2) + first_half
        cos_C, sin_C = tl.load(cos + angle), tl.load(sin + angle)
        value_C = tl.load(start + (H + HKV + h) * C + c)
        q_low, q_high = _turned(
            start + ((h * GROUP + g) * C)[:, None], (g < GROUP)[:, None], q_norm, cos_C, sin_C, eps, C, NORM
        )
        k_low, k_high = _turned(
            start + (H + h) * C + one[:, None], (one == 0)[:, None], k_norm, cos_C, sin_C, eps, C, NORM
        )
        # The new key belongs to the last split, which alone places and sees it.
        ours = position // SPLIT == split
        here = kv_row.to(tl.int64)
        place = kv + (here // BS) * (2 * VALUES) + h * (BS * C) + (here % BS) * C
        tl.store(place + one[:, None] + first_half, k_low, mask=ours)
        tl.store(place + C // 2 + one[:, None] + first_half, k_high, mask=ours)
        tl.store(place + VALUES + c, value_C, mask=ours)
        product = q_low.to(tl.float32) * k_low.to(tl.float32) + q_high.to(tl.float32) * k_high.to(tl.float32)
        score_G = tl.where(ours, tl.sum(product, axis=1) * scale, float("-inf"))

        q_GC = tl.reshape(tl.permute(tl.join(q_low, q_high), (0, 2, 1)), [G, C])
        sum_WCG, greatest_WG, weight_WG = _walk_blocks(
            q_GC, ids, first_block, kv + h * (BS * C), lower, upper, position, scale,
            W, G, C, BS, BLOCKS, 2 * VALUES, VALUES, WINDOW,
        )  # fmt: skip
        greatest_G = tl.maximum(tl.max(greatest_WG, axis=0), score_G)
        base_G = tl.where(greatest_G == float("-inf"), 0.0, greatest_G)
        keep_WG, own_G = tl.exp2(greatest_WG - base_G[None, :]), tl.exp2(score_G - base_G)
        weight_G = tl.sum(weight_WG * keep_WG, axis=0) + own_G
        sum_CG = tl.sum(sum_WCG * keep_WG[:, None, :], axis=0) + value_C.to(tl.float32)[:, None] * own_G[None, :]

        at_G = h * GROUP + g
        inside = (g < GROUP)[:, None] & (c < C)[None, :]
        heads = at_G[:, None] * C + c[None, :]
        to = out + row.to(tl.int64) * (H * C) + heads
        if (SPLITS == 1) | (count == 1):
            tl.store(to, tl.trans(sum_CG / weight_G[None, :]).to(kind), mask=inside)
        else:
            tl.store(sums + tl.cast(item, tl.int64) * (H * C) + heads, tl.trans(sum_CG), mask=inside)
            peak = peaks + tl.cast(item, tl.int64) * (2 * H) + at_G
            tl.store(peak, greatest_G, mask=g < GROUP)
            tl.store(peak + H, weight_G, mask=g < GROUP)
            tl.debug_barrier()  # all threads' parts are there before one of them says so
            before = arrived + row * HKV + h
            if tl.atomic_add(before, 1, sem="acq_rel") == count - 1:
                # Read here: Triton 3.6 keeps what a loop carries for a use this deep as it was in the first round.
                first = tl.load(tail + item * _ITEM_WORDS + 5)
                tl.store(to, _put_together(sums, peaks, first, count, at_G, H, G, C, GROUP).to(kind), mask=inside)
                tl.store(before, 0)
        row, split, position, kv_row, blocks_at, count = _record(tail, tl.minimum((work + PROGRAMS) // HKV, ITEMS - 1))
