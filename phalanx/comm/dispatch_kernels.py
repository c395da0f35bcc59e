"""The dispatch kernel (Triton): tokens to the ranks that want them, once each, and lists of what came, by slot.

How ranks meet, the words of `state` and the shape suffixes are in `kernels`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.comm.kernels import DISPATCH, MASK, agreed, begin, draw_ticket, element, raise_flag, wait_for


@triton.jit
def _send_meta(
    own, state, slots, weights, tokens, rank, to,
    META, COUNT, WEIGHTS, META_FLAG,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, GUARD: tl.constexpr, CUT_AT: tl.constexpr,
):  # fmt: skip
    """Tell rank `to` which of its slots each of our tokens wants (and with what weight)."""
    i = tl.arange(0, BLOCK)
    # What is to be told is under way before we know the number of this collective.
    slot = tl.load(slots + i, mask=i < tokens * K, other=-1)
    weight = tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + i, mask=i < tokens * K, other=0.0)
    base = own + tl.multiple_of(tl.load(state + MASK + 4 * P + to), 128)
    expected, parity, alive_P = begin(own, state, CUT_AT, DISPATCH, R, P, GUARD)
    if element(alive_P, to, P) > 0:
        place = parity * R + rank
        for _ in range(0, tokens * K, BLOCK):
            local = tl.where((slot >= 0) & (slot // S == to), slot - to * S, -1)
            tl.store((base + META).to(tl.pointer_type(tl.int32)) + place * (T_MAX * K) + i, local, mask=i < tokens * K)
            if WEIGHTED:
                at = (base + WEIGHTS).to(tl.pointer_type(tl.float32)) + place * (T_MAX * K) + i
                tl.store(at, weight, mask=i < tokens * K)
            i += BLOCK
            slot = tl.load(slots + i, mask=i < tokens * K, other=-1)
            if WEIGHTED:
                weight = tl.load(weights + i, mask=i < tokens * K, other=0.0)
        tl.store((base + COUNT).to(tl.pointer_type(tl.int64)) + place, tokens.to(tl.int64))
        raise_flag(own, state, META_FLAG + rank * 8, expected, (tl.arange(0, P) == to).to(tl.int32), R, P)
    draw_ticket(state, expected, DISPATCH)


@triton.jit
def _tile(
    x, slots, tokens, start, cols,
    K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of our own tokens: their slots [TILE, KP] and these columns of x [TILE, CHUNK]."""
    t = start + tl.arange(0, TILE) * GROUPS
    k = tl.arange(0, KP)
    slot_TK = tl.load(slots + t[:, None] * K + k[None, :], mask=(t < tokens)[:, None] & (k < K)[None, :], other=-1)
    inside = (t < tokens)[:, None] & (cols < D)[None, :]
    x_TD = tl.load(x + t[:, None].to(tl.int64) * D + cols[None, :], mask=inside, other=0.0)
    return slot_TK, x_TD


@triton.jit
def _send_tokens(
    own, state, x, slots, slot_TK, x_TD, tokens, rank, group, chunk, parity, alive_P,
    X, SCALES,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Store this program's columns of its tokens once at every rank that wants them. The first tile is given."""
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    place = parity * R + rank
    for start in range(group, tokens, GROUPS * TILE):
        t = start + tl.arange(0, TILE) * GROUPS
        inside = (t < tokens)[:, None] & (cols < D)[None, :]
        owner_TK = tl.where(slot_TK >= 0, slot_TK // S, -1)
        if FP8:
            grouped = tl.reshape(x_TD.to(tl.float32), (TILE, CHUNK // 128, 128))
            largest = tl.maximum(tl.max(tl.abs(grouped), axis=2), 1e-4)
            scale = largest / 448.0
            quantized = (grouped * (448.0 / largest)[:, :, None]).to(tl.float8e4nv)
            out_TD = tl.reshape(quantized, (TILE, CHUNK)).to(tl.uint8, bitcast=True)
            scale_cols = chunk * (CHUNK // 128) + tl.arange(0, CHUNK // 128)
        else:
            out_TD = x_TD
        for step in range(R):
            to = (rank + 1 + step) % R
            if element(alive_P, to, P) > 0:
                need = (tl.max((owner_TK == to).to(tl.int32), axis=1) > 0)[:, None]
                base = own + tl.multiple_of(tl.load(state + MASK + 4 * P + to), 128)
                rows = (place * T_MAX + t)[:, None].to(tl.int64)
                if FP8:
                    at = (base + X).to(tl.pointer_type(tl.uint8)) + rows * D + cols[None, :]
                    tl.store(at, out_TD, mask=inside & need)
                    scales = (base + SCALES).to(tl.pointer_type(tl.float32)) + rows * (D // 128) + scale_cols[None, :]
                    tl.store(scales, scale, mask=(t < tokens)[:, None] & (scale_cols < D // 128)[None, :] & need)
                else:
                    at = (base + X).to(tl.pointer_type(x.dtype.element_ty)) + rows * D + cols[None, :]
                    tl.store(at, out_TD, mask=inside & need)
        slot_TK, x_TD = _tile(x, slots, tokens, start + GROUPS * TILE, cols, K, KP, D, GROUPS, TILE)


@triton.jit
def _lay_out_once(
    own, rows_M, slots_M, position, first, program, programs, parity, count_P,
    META,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_lay_out` where no source brought more than BLOCK pairs: all of them are in registers."""
    lane = tl.arange(0, BLOCK)
    r = tl.arange(0, P)
    meta = (own + META).to(tl.pointer_type(tl.int32)) + parity * R * T_MAX * K
    pair = r[:, None] * (T_MAX * K) + lane[None, :]
    v = tl.load(meta + pair, mask=(r < R)[:, None] & (lane[None, :] < (count_P * K)[:, None]), other=-2)
    v = tl.reshape(tl.where(v >= S, -1, v), (P * BLOCK,))
    i = tl.arange(0, P * BLOCK)
    source = i // BLOCK
    pair = source * (T_MAX * K) + i % BLOCK
    row = ((parity * R + source) * T_MAX + i % BLOCK // K).to(tl.int64)
    # Two slots at once, one in each half of a word: one scan places both.
    for slot in range(2 * program, S + 1, 2 * programs):
        smaller = tl.sum(((v >= 0) & (v < slot)).to(tl.int32))
        hits = (v == slot).to(tl.int32) + ((v == slot + 1).to(tl.int32) << 16)
        before = tl.cumsum(hits, 0) - hits
        smaller_next = smaller + tl.sum((v == slot).to(tl.int32))
        tl.store(first + slot, smaller)
        tl.store(first + slot + 1, smaller_next, mask=slot + 1 <= S)
        at = tl.where(v == slot, smaller + (before & 0xFFFF), smaller_next + (before >> 16))
        hit = hits > 0  # slot S is nobody's: no pair asks for it
        tl.store(position + pair, at, mask=hit)
        tl.store(rows_M + at, row, mask=hit)
        tl.store(slots_M + at, v.to(tl.int64), mask=hit)
        if slot + 2 > S:
            tl.store(position + pair, -1, mask=v == -1)


@triton.jit
def _lay_out_in_blocks(
    own, rows_M, slots_M, position, first, program, programs, parity, count_P,
    META,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_lay_out` for any number of pairs."""
    lane = tl.arange(0, BLOCK)
    meta = (own + META).to(tl.pointer_type(tl.int32)) + parity * R * T_MAX * K
    for slot in range(program, S + 1, programs):
        smaller = 0
        for source in range(R):
            pairs = element(count_P, source, P) * K
            for start in range(0, pairs, BLOCK):
                v = tl.load(meta + source * (T_MAX * K) + start + lane, mask=start + lane < pairs, other=-1)
                smaller += tl.sum(((v >= 0) & (v < tl.minimum(slot, S))).to(tl.int32))
        tl.store(first + slot, smaller)
        filled = smaller
        for source in range(R):
            pairs = element(count_P, source, P) * K
            for start in range(0, pairs, BLOCK):
                i = start + lane
                v = tl.load(meta + source * (T_MAX * K) + i, mask=i < pairs, other=-2)
                if slot == S:
                    tl.store(position + source * (T_MAX * K) + i, -1, mask=(v == -1) | (v >= S))
                else:
                    hit = v == slot
                    at = filled + tl.cumsum(hit.to(tl.int32), 0) - 1
                    tl.store(position + source * (T_MAX * K) + i, at, mask=hit)
                    tl.store(rows_M + at, ((parity * R + source) * T_MAX + i // K).to(tl.int64), mask=hit)
                    tl.store(slots_M + at, tl.zeros([BLOCK], tl.int64) + slot, mask=hit)
                    filled += tl.sum(hit.to(tl.int32))


@triton.jit
def _lay_out(
    own, rows_M, slots_M, position, first, program, programs, parity, count_P,
    META,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr, FEW: tl.constexpr,
    MANY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sort the pairs by slot; within a slot by (source rank, token, k). Each program makes the lists of its slots.

    A program counts by itself how many pairs belong to smaller slots: two passes over a few thousand words (in
    registers, where they fit) cost less than agreeing on offsets. Slot S stands for "not here": its pass marks those
    pairs with position -1. Buffers are for the largest batch, so what came decides which way is taken: FEW and MANY
    (0: none) are the pairs of a source up to which a smaller one does.
    """
    # All warps must take one way.
    most = agreed(tl.max(count_P).to(tl.int64)) * K if FEW > 0 else 0
    if FEW > 0 and most <= FEW:
        _lay_out_once(
            own, rows_M, slots_M, position, first, program, programs, parity, count_P, META, R, P, S, K, T_MAX, FEW
        )
    elif MANY > 0 and most <= MANY:
        _lay_out_once(
            own, rows_M, slots_M, position, first, program, programs, parity, count_P, META, R, P, S, K, T_MAX, MANY
        )
    elif BLOCKS == 1:
        _lay_out_once(
            own, rows_M, slots_M, position, first, program, programs, parity, count_P, META, R, P, S, K, T_MAX, BLOCK
        )
    else:
        _lay_out_in_blocks(
            own, rows_M, slots_M, position, first, program, programs, parity, count_P, META, R, P, S, K, T_MAX, BLOCK
        )


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride"])
def dispatch_kernel(
    x, slots, weights, rows_M, slots_M, position, first, counts, own, state, host, notice,
    notice_stride, tokens, rank,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, FP8: tl.constexpr,
    WEIGHTED: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, META: tl.constexpr, COUNT: tl.constexpr, WEIGHTS: tl.constexpr,
    X: tl.constexpr, SCALES: tl.constexpr, META_FLAG: tl.constexpr, DATA_FLAG: tl.constexpr,
):  # fmt: skip
    """Send every token once to each rank that holds one of its slots, and sort what arrives by slot. COLLECTIVE.

    Grid: R + CHUNKS * GROUPS programs. The first R send one rank its list of slots each and end; program (group, chunk)
    of the others moves a chunk of columns of every GROUPS-th token, and raises a flag of its own, if there is one.
    """
    pid = tl.program_id(0)
    if pid < R:
        _send_meta(
            own, state, slots, weights, tokens, rank, pid,
            META, COUNT, WEIGHTS, META_FLAG, R, P, S, K, T_MAX, BLOCK, WEIGHTED, GUARD, CUT_AT,
        )  # fmt: skip
    else:
        program = pid - R
        chunk = program % CHUNKS
        group = program // CHUNKS
        # Our own tokens are under way before we know the number of this collective.
        slot_TK, x_TD = _tile(x, slots, tokens, group, chunk * CHUNK + tl.arange(0, CHUNK), K, KP, D, GROUPS, TILE)
        expected, parity, alive_P = begin(own, state, CUT_AT, DISPATCH, R, P, GUARD)
        _send_tokens(
            own, state, x, slots, slot_TK, x_TD, tokens, rank, group, chunk, parity, alive_P,
            X, SCALES, R, P, S, K, KP, D, T_MAX, CHUNK, GROUPS, TILE, FP8,
        )  # fmt: skip
        if group < tokens:  # who has sent nothing need not say so: how many tokens come is told beside their slots
            raise_flag(own, state, DATA_FLAG + (rank * (CHUNKS * GROUPS) + program) * 8, expected, alive_P, R, P)
        draw_ticket(state, expected, DISPATCH)
        # The lists arrive long before the tokens: sort them while the tokens are under way.
        told_P = wait_for(
            own, state, host, notice, notice_stride, META_FLAG, 1, CUT_AT, OPENED_AT, rank, expected, alive_P,
            R, P, GUARD, INTERPRETED,
        )  # fmt: skip
        r = tl.arange(0, P)
        count_P = tl.load((own + COUNT).to(tl.pointer_type(tl.int64)) + parity * R + r, mask=told_P > 0, other=0)
        count_P = tl.minimum(tl.maximum(count_P, 0), T_MAX).to(tl.int32)
        # Where tokens are few the first programs send them, and the last ones sort.
        _lay_out(
            own, rows_M, slots_M, position, first, CHUNKS * GROUPS - 1 - program, CHUNKS * GROUPS, parity, count_P,
            META, R, P, S, K, T_MAX, FEW, MANY, BLOCK, BLOCKS,
        )  # fmt: skip
        if program == 0:
            tl.store(counts + r, count_P, mask=r < R)
            tl.store(counts + P, parity)
        wait_for(
            own, state, host, notice, notice_stride, DATA_FLAG + program * 8, CHUNKS * GROUPS, CUT_AT, OPENED_AT,
            rank, expected, tl.where(group < count_P, told_P, 0), R, P, GUARD, INTERPRETED,
        )  # fmt: skip
