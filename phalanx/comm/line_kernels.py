"""The combine kernel of the mode `fast` (Triton): sums travel in lines of 128 bytes that say that they are there.

A line is 15 words of results and a word that is the number of the collective (epoch << 32 | sequence), stored by one
instruction of neighbouring threads. NVLink delivers such a store whole, so a reader that finds the word right has the
results, too (NCCL's protocol LL128 rests on the same). No fence, no flag, no read behind a flag: a row can be added as
soon as it is there, while others are still under way, and the ends need not cut their work alike.

The first programs send, in the order in which the others add. A line from an earlier collective or from a zombie has
another number and is not taken. Sums are made at the experts' rank, and added in the order of ranks from our own one
on. How a wait ends, the words of `state` and the shape suffixes are in `kernels`; here W is words of 8 bytes (4
results), L lines.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,assignment"
# Triton's language is not typed: its functions are compiled, never called by Python. It knows no (*tuple, one).

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.comm.kernels import (
    MASK,
    PATIENT_NS,
    POLL,
    SUMS,
    TURN_BITS,
    agreed,
    begin,
    bits_of,
    draw_ticket,
    give_up,
    now_ns,
    wait_for,
)

W: tl.constexpr = tl.constexpr(16)
"""Words of a line; the last one is its number."""


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _value(words, part: tl.constexpr, like):
    """One of the four results in each word, as float32."""
    half = ((words >> (16 * part)) & 0xFFFF).to(tl.int16)
    return half.to(like.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _rounded(total, part: tl.constexpr, like):
    """The same backwards: rounded, and moved to its place in a word."""
    half = total.to(like.dtype.element_ty).to(tl.int16, bitcast=True)
    return (half.to(tl.int64) & 0xFFFF) << (16 * part)


@triton.jit
def _words(a, b, c, d, like):
    return _rounded(a, 0, like) | _rounded(b, 1, like) | _rounded(c, 2, like) | _rounded(d, 3, like)


@triton.jit
def _sum_held(
    y, places, weights, rows, word, inside,
    K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of one token: the weighted sum of the rows that stand in y, a quarter of the columns each, and if there are any.
    places, weights: where those of its K pairs are."""
    y_words = y.to(tl.pointer_type(tl.int64))
    a = tl.zeros(word.shape, tl.float32)
    b = tl.zeros(word.shape, tl.float32)
    c = tl.zeros(word.shape, tl.float32)
    d = tl.zeros(word.shape, tl.float32)
    found = tl.full((), 0, tl.int32)
    for j in tl.static_range(K):
        at = tl.load(places + j)
        here = (at >= 0) & (at < rows)
        weight = tl.where(here, tl.load(weights + j), 0.0)  # whatever the caller has where there is no slot
        got = tl.load(y_words + at.to(tl.int64) * (D // 4) + word, mask=inside & here, other=0)
        a += weight * _value(got, 0, y)
        b += weight * _value(got, 1, y)
        c += weight * _value(got, 2, y)
        d += weight * _value(got, 3, y)
        found += here.to(tl.int32)
    return a, b, c, d, found


@triton.jit
def _send(
    base, y, position, weights, count, to, first, programs, rows, expected, rank,
    K: tl.constexpr, D: tl.constexpr, T_MAX: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row a token: store the weighted sums of our experts' results at the owner of the token."""
    UNITS: tl.constexpr = (LINES + TILE - 1) // TILE
    column = tl.arange(0, W)[None, :]
    for unit in range(first, count * UNITS, programs):
        t = unit // UNITS
        line = (unit % UNITS * TILE + tl.arange(0, TILE))[:, None]
        word = line * (W - 1) + column
        inside = (column < W - 1) & (word < D // 4)
        a, b, c, d, found = _sum_held(
            y, position + (to * T_MAX + t) * K, weights + (to * T_MAX + t) * K, rows, word, inside, K, D
        )
        row = (rank * T_MAX + t).to(tl.int64)
        place = (row * LINES + line) * W + column
        got = tl.where(column == W - 1, expected, _words(a, b, c, d, y))
        tl.store(base + place, got, mask=(line < LINES) & (found > 0))


@triton.jit
def _wanted(slots, t, S: tl.constexpr, K: tl.constexpr):
    """A bit for each rank that owns a slot of one of our tokens."""
    wanted = tl.full((), 0, tl.int64)
    for j in tl.static_range(K):
        slot = tl.load(slots + t * K + j)
        owner = tl.where(slot >= 0, slot // S, 0).to(tl.int64)
        wanted |= tl.where(slot >= 0, tl.full((), 1, tl.int64) << owner, 0)
    return wanted


@triton.jit
def _arrived(received, row, source, wanted, expected, line, column, LINES: tl.constexpr, BITS: tl.constexpr):
    """A tile of a row from `source`, [TILE, W], as far as it is there, zeros if it is not wanted. Also where a line is
    missing: the source's bit."""
    theirs = (((wanted >> source) & 1) > 0) & (line < LINES)
    place = received + row.to(tl.int64) * (LINES * W) + line * W + column
    got = tl.load(place, mask=theirs, other=0, volatile=True)
    missing = theirs & (column == W - 1) & (got != expected)
    return got, tl.where(missing, tl.full((), 1, BITS) << source.to(BITS), 0)


@triton.jit
def _still_here(
    own, state, host, notice, notice_stride, cut_at, opened_at, rank, expected, here_bits, late, started, rounds,
    R: tl.constexpr, P: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """After a round of waiting for the ranks in `late`: the ranks that are here, less those that are given up."""
    if GUARD:  # noqa: SIM102  (compiled away)
        if (rounds % POLL == 0) and (late != 0):
            now = now_ns(INTERPRETED)
            elapsed = now - started
            waiting_P = ((late >> tl.arange(0, P).to(tl.int64)) & 1).to(tl.int32)
            turn = (now >> TURN_BITS) % tl.num_programs(0) == tl.program_id(0)
            turn = INTERPRETED or (turn and elapsed > PATIENT_NS)
            still_P = give_up(
                own, state, host, notice, notice_stride, cut_at, opened_at, rank, expected >> 32, waiting_P, elapsed,
                turn, R, P,
            )  # fmt: skip
            here_bits = here_bits & ~(late & ~bits_of(still_P, P))
    return here_bits


@triton.jit
def _receive(
    y, position, slots, weights, out, own, state, host, notice,
    notice_stride, tokens, rank, rows, program, programs, expected, parity, alive_P,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, T_MAX: tl.constexpr,
    LINES: tl.constexpr, TILE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, SUMS_AT: tl.constexpr,
):  # fmt: skip
    """Of every `programs`-th tile of our own tokens' rows: wait for its lines, add them, store the sum.

    out[t] = our own experts' weighted sum + one row from each other rank that holds a slot of t."""
    UNITS: tl.constexpr = (LINES + TILE - 1) // TILE
    column = tl.arange(0, W)[None, :]
    half: tl.constexpr = R * T_MAX * LINES * W  # words of one of the two buffers
    received = (own + SUMS_AT).to(tl.pointer_type(tl.int64)) + parity.to(tl.int64) * half
    BITS: tl.constexpr = tl.int32 if P <= 16 else tl.int64
    out_words = out.to(tl.pointer_type(tl.int64))
    here_bits = bits_of(alive_P, P)
    started = now_ns(INTERPRETED)
    rounds = 0
    for unit in range(program, tokens * UNITS, programs):
        t = unit // UNITS
        line = (unit % UNITS * TILE + tl.arange(0, TILE))[:, None]
        word = line * (W - 1) + column
        inside = (column < W - 1) & (word < D // 4)
        wanted = _wanted(slots, t, S, K)
        # What our own experts made is added while the others' is under way.
        a0, b0, c0, d0, _ = _sum_held(y, position + (rank * T_MAX + t) * K, weights + t * K, rows, word, inside, K, D)
        late = tl.full((), 1, tl.int64)
        while late != 0:
            late_LW = tl.zeros(word.shape, BITS)
            own_part = tl.where(((here_bits >> rank) & 1) > 0, 1.0, 0.0)
            a, b, c, d = a0 * own_part, b0 * own_part, c0 * own_part, d0 * own_part
            for step in tl.static_range(R - 1):
                source = (rank + 1 + step) % R
                got, missing = _arrived(
                    received, source * T_MAX + t, source, wanted & here_bits, expected, line, column, LINES, BITS
                )
                late_LW |= missing
                a += _value(got, 0, y)
                b += _value(got, 1, y)
                c += _value(got, 2, y)
                d += _value(got, 3, y)
            late = tl.reduce(late_LW, None, _either).to(tl.int64)
            row = out_words + tl.cast(t, tl.int64) * (D // 4)
            tl.store(row + word, _words(a, b, c, d, y), mask=inside & (late == 0))
            rounds += 1
            here_bits = _still_here(
                own, state, host, notice, notice_stride, CUT_AT, OPENED_AT, rank, expected, here_bits, late,
                started, rounds, R, P, GUARD, INTERPRETED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride", "rows", "senders"])
def line_combine_kernel(
    y, position, counts, slots, weights, out, own, state, host, notice,
    notice_stride, tokens, rank, rows, senders,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, WEIGHTS: tl.constexpr, SUMS_AT: tl.constexpr, BEGUN: tl.constexpr,
):  # fmt: skip
    """Bring the experts' results back to their tokens' owners, and add them. COLLECTIVE. rows: how many y has.

    Grid: `senders` programs, a multiple of R - 1, that send to one rank each, then any number that receive. The grid
    may have another size in every launch and on every rank.
    """
    pid = tl.program_id(0)
    r = tl.arange(0, P)
    if pid < senders:
        ends: tl.constexpr = R - 1 if R > 1 else 1
        to = (rank + 1 + pid % ends) % R
        first = pid // ends
        # What we send, and from where, does not depend on what begin reads: all of it is asked for at once.
        count = tl.minimum(tl.maximum(tl.load(counts + to), 0), T_MAX)
        sent_parity = tl.load(counts + P)
        peer = tl.load(state + MASK + 4 * P + to)
        begun = tl.load((own + BEGUN).to(tl.pointer_type(tl.int64)) + to, volatile=True)
        expected, parity, alive_P = begin(own, state, CUT_AT, SUMS, R, P, GUARD)
        draw_ticket(state, expected, SUMS)
        theirs = own + tl.multiple_of(peer, 128)
        half: tl.constexpr = R * T_MAX * LINES * W
        base = (theirs + SUMS_AT).to(tl.pointer_type(tl.int64)) + parity.to(tl.int64) * half
        lives = ((bits_of(alive_P, P) >> to) & 1) > 0
        if first == 0:
            tl.atomic_max(
                (theirs + BEGUN).to(tl.pointer_type(tl.int64)) + rank, expected, mask=lives, sem="relaxed", scope="sys"
            )
        # Whoever has no token waits for nobody and may be far ahead. The place of a line is free once its reader has
        # begun the collective after the one that used it before.
        ahead = (begun < expected - 1) & ((expected & 0xFFFFFFFF) > 2)
        sends = agreed(tl.where(lives, tl.where(ahead, 1, 2), 0).to(tl.int64))
        if sends == 1:
            begun_P = wait_for(
                own, state, host, notice, notice_stride, BEGUN, 1, CUT_AT, OPENED_AT, rank, expected - 1,
                (r == to).to(tl.int32), R, P, GUARD, INTERPRETED,
            )  # fmt: skip
            sends = agreed(bits_of(begun_P, P))
        count = tl.where(sends > 0, count, 0)
        early = (own + WEIGHTS).to(tl.pointer_type(tl.float32)) + sent_parity * (R * T_MAX * K)
        _send(
            base, y, position, early, count, to, first, senders // ends, rows, expected, rank, K, D, T_MAX, LINES, TILE
        )
    else:
        expected, parity, alive_P = begin(own, state, CUT_AT, SUMS, R, P, GUARD)
        draw_ticket(state, expected, SUMS)
        _receive(
            y, position, slots, weights, out, own, state, host, notice,
            notice_stride, tokens, rank, rows, pid - senders, tl.num_programs(0) - senders, expected, parity, alive_P,
            R, P, S, K, D, T_MAX, LINES, TILE, GUARD, INTERPRETED, CUT_AT, OPENED_AT, SUMS_AT,
        )  # fmt: skip
