"""The Triton kernel of prefills' attention: tiles of tokens over paged KV, for a fixed number of programs.

What there is to do stands in device words (`model.tiles`), so a captured graph serves every mix of prompts, prefixes
and decodes. Most of a long context is seen by every token of a tile: those blocks go without any mask.

Online softmax over blocks of keys is flash attention (Dao et al., 2022). Shape suffixes: as in `model.kernels`.
"""
# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.moe.kernels import dot


@triton.jit
def _block(
    q_MC, kv_h, table, start, upper, position_M, sum_MC, greatest_M, weight_M, scale,
    HKV: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take BN positions from `start` on in. MASKED: some token may not see them all, or they end before.

    greatest_M is in powers of two (`scale` holds log2 e); the scores are scaled within the exponential."""
    c = tl.arange(0, CP)
    n = start + tl.arange(0, BN)
    if MASKED:
        block = tl.load(table + n // BS, mask=n < upper, other=0).to(tl.int64)
    else:
        block = tl.load(table + n // BS).to(tl.int64)
    at = kv_h + (block * (2 * HKV * BS * C) + (n % BS) * C)[:, None] + c[None, :]
    if MASKED:
        inside = (n < upper)[:, None] & (c < C)[None, :]
        k_NC = tl.load(at, mask=inside, other=0.0)
    elif C == CP:
        k_NC = tl.load(at)
    else:
        k_NC = tl.load(at, mask=(c < C)[None, :], other=0.0)
    score_MN = dot(q_MC, tl.trans(k_NC), tl.zeros([M, BN], tl.float32))
    if MASKED:
        seen = (n < upper)[None, :] & (n[None, :] <= position_M[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > position_M[:, None] - WINDOW)
        score_MN = tl.where(seen, score_MN, float("-inf"))
    new_M = tl.maximum(greatest_M, tl.max(score_MN, axis=1) * scale)
    base_M = new_M
    if MASKED:
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    p_MN = tl.exp2(score_MN * scale - base_M[:, None])
    keep_M = tl.exp2(greatest_M - base_M)
    weight_M = weight_M * keep_M + tl.sum(p_MN, axis=1)
    if MASKED:
        v_NC = tl.load(at + HKV * BS * C, mask=inside, other=0.0)
    elif C == CP:
        v_NC = tl.load(at + HKV * BS * C)
    else:
        v_NC = tl.load(at + HKV * BS * C, mask=(c < C)[None, :], other=0.0)
    sum_MC = dot(p_MN.to(v_NC.dtype), v_NC, sum_MC * keep_M[:, None])
    return sum_MC, new_M, weight_M


@triton.jit
def prefill_kernel(
    qkv, positions, first_blocks, num_pieces, pieces_at, tail, kv, out, sums, peaks, scale,
    H: tl.constexpr, HKV: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, WINDOW: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Attention of the pieces that stand in `tail` from pieces_at[0] on, each as `model.tiles` says.

    A whole tile is finished here: out [T, H C]. Of parts, sums [entries, H, C] and peaks [entries, 2, H] keep sum,
    greatest score and weight, for `merge_kernel`. Grid: PROGRAMS, whatever there is to do."""
    G: tl.constexpr = H // HKV
    m = tl.arange(0, M)
    c = tl.arange(0, CP)
    j = m // G
    table = tail + tl.load(pieces_at)
    for work in range(tl.program_id(0), tl.load(num_pieces) * HKV, PROGRAMS):
        piece = table + work // HKV * 5
        h = work % HKV
        row = tl.load(piece)
        tokens = tl.load(piece + 1)
        lower = tl.load(piece + 2)
        upper = tl.load(piece + 3)
        place = tl.load(piece + 4)
        first = tl.load(positions + row)
        blocks = tail + tl.load(first_blocks + row)
        kv_h = kv + h * (BS * C)
        inside = (j < tokens)[:, None] & (c < C)[None, :]
        heads = (h * G + m % G)[:, None] * C + c[None, :]
        row_M = (row + j).to(tl.int64)[:, None]
        q_MC = tl.load(qkv + row_M * ((H + 2 * HKV) * C) + heads, mask=inside, other=0.0)
        position_M = first + tl.minimum(j, tokens - 1)
        sum_MC = tl.zeros([M, CP], tl.float32)
        greatest_M = tl.full([M], float("-inf"), tl.float32)
        weight_M = tl.zeros([M], tl.float32)
        unmasked = lower
        if WINDOW == 0:
            unmasked = tl.maximum(lower, tl.minimum(upper, first + 1) // BN * BN)
            for start in range(lower, unmasked, BN):
                sum_MC, greatest_M, weight_M = _block(
                    q_MC, kv_h, blocks, start, upper, position_M, sum_MC, greatest_M, weight_M, scale,
                    HKV, C, CP, M, BS, BN, WINDOW, False,
                )  # fmt: skip
        for start in range(unmasked, upper, BN):
            sum_MC, greatest_M, weight_M = _block(
                q_MC, kv_h, blocks, start, upper, position_M, sum_MC, greatest_M, weight_M, scale,
                HKV, C, CP, M, BS, BN, WINDOW, True,
            )  # fmt: skip
        if place < 0:
            done = (sum_MC / weight_M[:, None]).to(out.dtype.element_ty)
            tl.store(out + row_M * (H * C) + heads, done, mask=inside)
        else:
            entry_M = (place + j).to(tl.int64)
            tl.store(sums + entry_M[:, None] * (H * C) + heads, sum_MC, mask=inside)
            peak_M = peaks + entry_M * (2 * H) + h * G + m % G
            tl.store(peak_M, greatest_M, mask=j < tokens)
            tl.store(peak_M + H, weight_M, mask=j < tokens)
