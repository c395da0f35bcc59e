"""The combine kernel (Triton): the experts' results back to their tokens' owners, and added there.

Two modes: ROWS brings a row a (token, k) and adds nothing; EXACT adds those rows in the order of k. (The mode `fast` is
in `line_kernels`.) How ranks meet, the words of `state` and the shape suffixes are in `kernels`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.comm.kernels import COMBINE, MASK, begin, draw_ticket, element, raise_flag, wait_for

ROWS: tl.constexpr = tl.constexpr(0)
EXACT: tl.constexpr = tl.constexpr(1)


@triton.jit
def _first_rows(
    position, counts, rank, group, rows,
    R: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr, GROUPS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The first pairs of this program for the rank after ours, and where their results stand in y (-1: not here)."""
    lane = tl.arange(0, ROWS_AT_ONCE)
    to = (rank + 1) % R
    pair = (group + lane // K * GROUPS) * K + lane % K
    # Loaded beside the count, not after it: what lies behind the count is left from earlier, and not taken.
    at = tl.load(position + to * (T_MAX * K) + pair, mask=pair < T_MAX * K, other=-1)
    return pair, tl.where((pair < tl.load(counts + to) * K) & (at < rows), at, -1)


@triton.jit
def _send_rows(
    state, own, y, position, counts, rank, group, cols, parity, alive_P, pair, at, rows,
    RESULTS,
    R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, GROUPS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store our experts' results for the other ranks' tokens at their owners, a row a (token, k)."""
    lane = tl.arange(0, ROWS_AT_ONCE)
    for step in range(R - 1):
        to = (rank + 1 + step) % R
        if step > 0:
            pair, at = _first_rows(position, counts, to - 1 + R, group, rows, R, K, T_MAX, GROUPS, ROWS_AT_ONCE)
        if element(alive_P, to, P) > 0:
            count = tl.minimum(tl.load(counts + to), T_MAX)
            pairs = ((count - group + GROUPS - 1) // GROUPS) * K
            base = own + tl.multiple_of(tl.load(state + MASK + 4 * P + to), 128)
            results = (base + RESULTS).to(tl.pointer_type(y.dtype.element_ty)) + parity.to(tl.int64) * (T_MAX * K * D)
            for start in range(0, pairs, ROWS_AT_ONCE):
                here = (at >= 0)[:, None] & (cols < D)[None, :]
                y_MD = tl.load(y + at[:, None].to(tl.int64) * D + cols[None, :], mask=here, other=0.0)
                i = start + ROWS_AT_ONCE + lane
                next_pair = (group + i // K * GROUPS) * K + i % K
                next_at = tl.load(position + to * (T_MAX * K) + next_pair, mask=i < pairs, other=-1)
                tl.store(results + pair[:, None].to(tl.int64) * D + cols[None, :], y_MD, mask=here)
                pair, at = next_pair, tl.where(next_at < rows, next_at, -1)


@triton.jit
def plan(
    position, slots, weights, tokens, rank, t, rows,
    S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, T_MAX: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of one of our tokens, for each k: the owner of its slot (-1: none), its row of y if that is us, its weight, which
    is 0 where there is no slot, whatever the caller has there."""
    k = tl.arange(0, KP)
    inside = (k < K) & (t < tokens)
    slot_K = tl.load(slots + t * K + k, mask=inside, other=-1).to(tl.int32)
    at_K = tl.load(position + (rank * T_MAX + t) * K + k, mask=inside, other=-1)
    at_K = tl.where(at_K < rows, at_K, -1)
    owner_K = tl.where(slot_K >= 0, slot_K // S, -1)
    if MODE == ROWS:
        weight_K = tl.zeros([KP], tl.float32)
    else:
        weight_K = tl.load(weights + t * K + k, mask=inside, other=0.0)
        weight_K = tl.where(slot_K >= 0, weight_K, 0.0)
    return owner_K, at_K, weight_K


@triton.jit
def _add_rows(
    own, y, position, slots, weights, out, tokens, rank, group, cols, parity, here_P, owner_K, at_K, weight_K, rows,
    RESULTS,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """ROWS: out[t, k] = the row of (t, k). EXACT: out[t] = their weighted sum, added in the order of k in float32.

    Results of our own experts are read where they stand in y; the others' from our receive buffer, which is addressed
    as rows at a fixed distance from y. The plan of the first token is given.
    """
    k = tl.arange(0, KP)
    buffer = (own + RESULTS).to(tl.int64, bitcast=True) - y.to(tl.int64, bitcast=True)
    buffer = tl.multiple_of(buffer // 2, 8) + parity.to(tl.int64) * (T_MAX * K * D)
    for t in range(group, tokens, GROUPS):
        here_K = tl.zeros([KP], tl.int32)
        for r in tl.static_range(R):
            here_K += tl.where(owner_K == r, element(here_P, r, P), 0)
        mine_K = (owner_K == rank) & (at_K >= 0)
        valid_K = ((here_K > 0) & ((owner_K != rank) | mine_K)).to(tl.int32)
        row_K = tl.where(mine_K, at_K, t * K + k)
        total = tl.zeros([CHUNK], tl.float32)
        for j in tl.static_range(K):
            base = tl.where(element(mine_K.to(tl.int32), j, KP) > 0, 0, buffer)
            at = base + element(row_K, j, KP).to(tl.int64) * D
            row = tl.load(y + at + cols, mask=(cols < D) & (element(valid_K, j, KP) > 0), other=0.0)
            if MODE == ROWS:
                tl.store(out + tl.cast(t * K + j, tl.int64) * D + cols, row, mask=cols < D)
            else:
                total += element(weight_K, j, KP) * row.to(tl.float32)
        if MODE != ROWS:
            tl.store(out + tl.cast(t, tl.int64) * D + cols, total.to(out.dtype.element_ty), mask=cols < D)
        owner_K, at_K, weight_K = plan(position, slots, weights, tokens, rank, t + GROUPS, rows, S, K, KP, T_MAX, MODE)


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride", "rows"])
def combine_kernel(
    y, position, counts, slots, weights, out, own, state, host, notice,
    notice_stride, tokens, rank, rows,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr, MODE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, RESULTS: tl.constexpr, RESULT_FLAG: tl.constexpr,
):  # fmt: skip
    """Bring the experts' results back to their tokens' owners, and add them. COLLECTIVE. rows: how many y has.

    Grid: CHUNKS * GROUPS programs. Program (group, chunk) sends a chunk of columns of every GROUPS-th token of each
    other rank, and needs only its twins' flags: what they send is what it adds.
    """
    pid = tl.program_id(0)
    group = pid // CHUNKS
    cols = (pid % CHUNKS) * CHUNK + tl.arange(0, CHUNK)
    r = tl.arange(0, P)
    PROGRAMS: tl.constexpr = CHUNKS * GROUPS
    # What is to be sent and added where does not depend on the peers: know it before they answer.
    owner_K, at_K, weight_K = plan(position, slots, weights, tokens, rank, group, rows, S, K, KP, T_MAX, MODE)
    pair, at = _first_rows(position, counts, rank, group, rows, R, K, T_MAX, GROUPS, ROWS_AT_ONCE)
    expected, parity, alive_P = begin(own, state, CUT_AT, COMBINE, R, P, GUARD)
    others_P = tl.where(r == rank, 0, alive_P)
    _send_rows(
        state, own, y, position, counts, rank, group, cols, parity, alive_P, pair, at, rows,
        RESULTS, R, P, K, KP, D, T_MAX, GROUPS, ROWS_AT_ONCE,
    )  # fmt: skip
    raise_flag(own, state, RESULT_FLAG + (rank * PROGRAMS + pid) * 8, expected, others_P, R, P)
    draw_ticket(state, expected, COMBINE)
    here_P = wait_for(
        own, state, host, notice, notice_stride, RESULT_FLAG + pid * 8, PROGRAMS, CUT_AT, OPENED_AT, rank,
        expected, others_P, R, P, GUARD, INTERPRETED,
    )  # fmt: skip
    here_P = tl.where(r == rank, alive_P, here_P)
    _add_rows(
        own, y, position, slots, weights, out, tokens, rank, group, cols, parity, here_P,
        owner_K, at_K, weight_K, rows, RESULTS, R, P, S, K, KP, D, T_MAX, GROUPS, CHUNK, MODE,
    )  # fmt: skip
