"""The combine kernel for results that stand in exported memory (Triton): owners of tokens read them there.

The experts' kernels write their rows into the part `y` of the exported buffer. Nothing is packed or sent but a word a
(token, k), of 8 bytes: the number of the collective and the row of y in which the result stands, both in one store, so
there is no fence, no flag and no second look. Whoever owns the token polls its words in its own memory, and reads the
row over the link as soon as its word is there: all reads of a program are under way at once, and those of our own
experts' rows among them. That y is complete needs no fence either: the kernel that wrote it has ended.

When may y be written again? By the experts that follow the next dispatch: it ends when every peer has begun it, and a
peer begins it after its combine, with all its reads, has ended. Only a rank that stopped waiting for a peer can write
while that peer still reads. It tells the peer before: `cut` if it gave up on it, `opened` if it learned of a roll call,
from whomever (`kernels.go_on_alone`); its kernel ends, and with it those stores are done, before another one writes y.
So whoever reads looks at both words when it has read everything, and what it has read counts only if neither was there;
else its status says that the step was not whole. (`tests/sim/sim_reads.py` plays it.)

How a wait ends, the words of `state` and the shape suffixes are in `kernels`; N is rows of y.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.comm.combine_kernels import ROWS, plan
from phalanx.comm.kernels import (
    CUT,
    MASK,
    POLL,
    begin,
    bits_of,
    draw_ticket,
    either,
    element,
    go_on_alone,
    now_ns,
    still_here,
    wait_for,
)
from phalanx.comm.peer_memory import ROW_BITS as _ROW_BITS

PULLS: tl.constexpr = tl.constexpr(4)
"""The kind of collective: a ticket counter of its own in `state`."""
ROW_BITS: tl.constexpr = tl.constexpr(_ROW_BITS)
ROWS_MASK: tl.constexpr = tl.constexpr((1 << _ROW_BITS) - 1)
SEQUENCE_BITS: tl.constexpr = tl.constexpr(28)
SEQUENCE_MASK: tl.constexpr = tl.constexpr((1 << 28) - 1)
EPOCH_MASK: tl.constexpr = tl.constexpr((1 << 13) - 1)
"""A word is a tag of 41 bits and a row. What stands in a place is that of the last collective in which its pair was
there; to be mistaken for a new one it must be exactly 2**28 combines old, or 2**13 epochs."""


NOWHERE: tl.constexpr = tl.constexpr(-(1 << 62))


@triton.jit
def _tag(expected):
    """What of a collective's number travels with a row."""
    return (((expected >> 32) & EPOCH_MASK) << SEQUENCE_BITS) | (expected & SEQUENCE_MASK)


@triton.jit
def _has(bits, rank_K):
    """1 where the bit of that rank is set; rank -1 is nobody's."""
    return tl.where(rank_K >= 0, (bits >> tl.maximum(rank_K, 0).to(tl.int64)) & 1, 0).to(tl.int32)


@triton.jit
def _meet(
    own, state, host, notice, notice_stride, rank,
    R: tl.constexpr, P: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr, CUT_AT: tl.constexpr,
    OPENED_AT: tl.constexpr, READY: tl.constexpr,
):  # fmt: skip
    """Tell all others that we are here, and wait until they are: nobody's next combine but one may overtake this one,
    also if it has no token, and a peer that is gone is noticed by all."""
    r = tl.arange(0, P)
    peer_P = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)
    expected, _, alive_P = begin(own, state, CUT_AT, PULLS, R, P, GUARD)
    draw_ticket(state, expected, PULLS)
    others_P = tl.where(r == rank, 0, alive_P)
    tl.atomic_max(
        own.to(tl.pointer_type(tl.int64)) + (peer_P + READY) // 8 + rank, expected + tl.zeros([P], tl.int64),
        mask=others_P > 0, sem="relaxed", scope="sys",
    )  # fmt: skip
    wait_for(
        own, state, host, notice, notice_stride, READY, 1, CUT_AT, OPENED_AT, rank, expected, others_P,
        R, P, GUARD, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _point(
    own, state, position, counts, rank, rows, to, block,
    R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr, GUARD: tl.constexpr, CUT_AT: tl.constexpr,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Tell rank `to` in which rows of our y the results of its pairs stand."""
    # Nothing of what is loaded first depends on what begin reads: all of it is asked for at once.
    pair = block * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(position + to * (T_MAX * K) + pair, mask=pair < T_MAX * K, other=-1)
    pairs = tl.minimum(tl.load(counts + to), T_MAX) * K
    peer = tl.multiple_of(tl.load(state + MASK + 4 * P + to), 128)
    expected, parity, alive_P = begin(own, state, CUT_AT, PULLS, R, P, GUARD)
    draw_ticket(state, expected, PULLS)
    lives = element(alive_P, to, P) > 0
    words = (own + peer + WORDS).to(tl.pointer_type(tl.int64)) + (parity * R + rank) * (T_MAX * K)
    tag = _tag(expected) << ROW_BITS
    for _ in range(block, (T_MAX * K + BLOCK - 1) // BLOCK, BLOCKS):
        tl.store(words + pair, tag | at.to(tl.int64), mask=lives & (pair < pairs) & (at >= 0) & (at < rows))
        pair += BLOCKS * BLOCK
        at = tl.load(position + to * (T_MAX * K) + pair, mask=pair < T_MAX * K, other=-1)


@triton.jit
def _who_left(own, state, rank, expected, alive_P, R: tl.constexpr, P: tl.constexpr, CUT_AT: tl.constexpr,
              OPENED_AT: tl.constexpr):  # fmt: skip
    """After all reads of this program: note whoever went on without us, and may have written over what we read."""
    tl.debug_barrier()  # every thread has stored its sums, so it has read what they are of
    r = tl.arange(0, P)
    epoch = expected >> 32
    mine = own.to(tl.pointer_type(tl.int64))
    cut_P = tl.load(mine + CUT_AT // 8 + r, mask=r < R, other=0, volatile=True)
    opened_P = tl.load(mine + OPENED_AT // 8 + r, mask=r < R, other=0, volatile=True)
    left_P = (alive_P > 0) & (cut_P >= epoch)
    tl.store(state + MASK + P + r, CUT, mask=left_P)
    tl.store(state + MASK + r, 0, mask=left_P)
    opened = tl.max(opened_P)
    if opened > epoch:
        go_on_alone(own, state, OPENED_AT, rank, opened, R, P)


@triton.jit
def _take(
    position, slots, weights, out, own, state, host, notice,
    notice_stride, tokens, rank, rows, program, programs,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, WORDS: tl.constexpr, Y: tl.constexpr,
):  # fmt: skip
    """Of every `programs`-th chunk of our own tokens' rows: read the K rows, wherever they are, as soon as we know.

    ROWS: out[t, k] = the row of (t, k). EXACT: out[t] = their weighted sum, added in the order of k in float32."""
    UNITS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    # What is wanted does not depend on the peers, or on the number of this collective: know it before.
    owner_K, at_K, _ = plan(position, slots, weights, tokens, rank, program // UNITS, rows, S, K, KP, T_MAX, ROWS)
    expected, parity, alive_P = begin(own, state, CUT_AT, PULLS, R, P, GUARD)
    draw_ticket(state, expected, PULLS)
    k = tl.arange(0, KP)
    words = (own + WORDS).to(tl.pointer_type(tl.int64)) + parity * (R * T_MAX * K)
    y = (own + Y).to(tl.pointer_type(out.dtype.element_ty))
    tag = _tag(expected)
    here_bits = bits_of(alive_P, P)
    started = now_ns(INTERPRETED)
    rounds = 0
    for unit in range(program, tokens * UNITS, programs):
        t = unit // UNITS
        cols = unit % UNITS * CHUNK + tl.arange(0, CHUNK)
        away_K = tl.load(state + MASK + 4 * P + owner_K, mask=owner_K >= 0, other=0) // 16
        word_K = words + owner_K.to(tl.int64) * (T_MAX * K) + t * K + k
        here_K = _has(here_bits, owner_K)
        row_K = tl.where((owner_K == rank) & (here_K > 0), at_K, -1)
        late_K = tl.where(owner_K == rank, 0, here_K)
        while tl.max(late_K) > 0:
            got_K = tl.load(word_K, mask=late_K > 0, other=0, volatile=True)
            came_K = (late_K > 0) & ((got_K >> ROW_BITS) == tag)
            row_K = tl.where(came_K, (got_K & ROWS_MASK).to(tl.int32), row_K)
            late_K = tl.where(came_K, 0, late_K)
            rounds += 1
            if GUARD:  # noqa: SIM102  (compiled away)
                if rounds % POLL == 0:
                    late_bits_K = tl.where(
                        late_K > 0, tl.full(owner_K.shape, 1, tl.int64) << tl.maximum(owner_K, 0).to(tl.int64), 0
                    )
                    here_bits = still_here(
                        own, state, host, notice, notice_stride, CUT_AT, OPENED_AT, rank, expected, here_bits,
                        tl.reduce(late_bits_K, 0, either), started, R, P, INTERPRETED,
                    )  # fmt: skip
                    late_K = late_K & _has(here_bits, owner_K)
        # Without it the compiler takes the warps for diverged, and has each load wait for the one before it.
        tl.debug_barrier()
        next_t = (unit + programs) // UNITS
        next_owner_K, next_at_K, _ = plan(position, slots, weights, tokens, rank, next_t, rows, S, K, KP, T_MAX, ROWS)
        # A peer's y is at a fixed distance from ours. Plain loads: those past the first cache wait for each other, too.
        place_K = tl.where(row_K >= 0, away_K + row_K.to(tl.int64) * (D // 8), NOWHERE)
        got = ()
        for j in tl.static_range(K):
            place = element(place_K, j, KP)  # in units of 8 results, which a thread reads at once
            row = tl.load(y + place * 8 + cols, mask=(cols < D) & (place > NOWHERE), other=0.0)
            got = got + (row,)  # type: ignore[assignment]  # noqa: RUF005
        # The compiler saves registers, and would ask for some rows only when it has added others: 1.5 us more. Weights
        # that it cannot load before the barrier keep it from that.
        tl.debug_barrier()
        if MODE == ROWS:
            for j in tl.static_range(K):
                tl.store(out + tl.cast(t * K + j, tl.int64) * D + cols, got[j], mask=cols < D)
        else:
            weight_K = tl.load(weights + t * K + k, mask=(k < K) & (owner_K >= 0), other=0.0)
            total = tl.zeros([CHUNK], tl.float32)
            for j in tl.static_range(K):
                total += element(weight_K, j, KP) * got[j].to(tl.float32)
            tl.store(out + tl.cast(t, tl.int64) * D + cols, total.to(out.dtype.element_ty), mask=cols < D)
        owner_K, at_K = next_owner_K, next_at_K
    if GUARD:
        _who_left(own, state, rank, expected, alive_P, R, P, CUT_AT, OPENED_AT)


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride", "rows"])
def pull_kernel(
    position, counts, slots, weights, out, own, state, host, notice,
    notice_stride, tokens, rank, rows,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, MODE: tl.constexpr,
    GUARD: tl.constexpr, INTERPRETED: tl.constexpr, CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, WORDS: tl.constexpr,
    READY: tl.constexpr, Y: tl.constexpr,
):  # fmt: skip
    """Bring the experts' results, which stand in y, back to their tokens' owners, and add them. COLLECTIVE.

    rows: how many of y are results. Grid: one program that meets the peers,
    (R - 1) * BLOCKS that tell them where results stand, and any number that read and add. The first ones come first:
    what a program waits for is sent by programs that wait for nobody, or met by the first one of each grid.
    """
    pid = tl.program_id(0)
    tellers: tl.constexpr = (R - 1) * BLOCKS
    if pid == 0:
        _meet(own, state, host, notice, notice_stride, rank, R, P, GUARD, INTERPRETED, CUT_AT, OPENED_AT, READY)
    elif pid <= tellers:
        to = (rank + 1 + (pid - 1) // BLOCKS) % R
        _point(
            own, state, position, counts, rank, rows, to, (pid - 1) % BLOCKS,
            R, P, K, T_MAX, GUARD, CUT_AT, WORDS, BLOCK, BLOCKS,
        )  # fmt: skip
    else:
        first: tl.constexpr = tellers + 1
        _take(
            position, slots, weights, out, own, state, host, notice,
            notice_stride, tokens, rank, rows, pid - first, tl.num_programs(0) - first,
            R, P, S, K, KP, D, T_MAX, CHUNK, MODE, GUARD, INTERPRETED, CUT_AT, OPENED_AT, WORDS, Y,
        )  # fmt: skip
