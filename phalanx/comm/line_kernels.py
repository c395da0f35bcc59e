"""The combine kernel of the mode `fast` (Triton): sums travel in lines of 128 bytes that say that they are there.

A line is 15 words of results and a word that is the number of the collective (epoch << 32 | sequence), stored by one
instruction of neighbouring threads. NVLink delivers such a store whole, so a reader that finds the word right has the
results, too (NCCL's protocol LL128 rests on the same). No fence, no flag, no read behind a flag: a row can be added as
soon as it is there, while others are still under way, and the ends need not cut their work alike.

The first programs send, in the order in which the others add. A line from an earlier collective or from a zombie has
another number and is not taken. Sums are made at the experts' rank, and added in the order of ranks from our own one
on. How a wait ends, the words of `state` and the shape suffixes are in `kernels`; here W is words of 8 bytes (4
results), L lines.

Between two collectives of a decode pass more weights than the device's caches hold, so all that a program reads first
comes from memory, a microsecond away. What does not depend on what else is read is therefore asked for at once, before
`begin`: places, weights of pairs, rows to add to.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,assignment"
# Triton's language is not typed: its functions are compiled, never called by Python. It knows no (*tuple, one).

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.comm.kernels import (
    MASK,
    POLL,
    SUMS,
    agreed,
    begin,
    bits_of,
    draw_ticket,
    either,
    now_ns,
    still_here,
    wait_for,
)

W: tl.constexpr = tl.constexpr(16)
"""Words of a line; the last one is its number."""


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
def _loaded(words, there, other, K: tl.constexpr):
    """K words that follow each other, as a tuple of scalars."""
    got = ()
    for j in tl.static_range(K):
        got += (tl.load(words + j, mask=there, other=other),)
    return got


@triton.jit
def _sum_held(y, ats, weights, rows, word, inside, K: tl.constexpr, D: tl.constexpr):
    """Of one token: the weighted sum of the rows that stand in y, a quarter of the columns each, and if there are any.
    ats, weights: of its K pairs."""
    y_words = y.to(tl.pointer_type(tl.int64))
    a = tl.zeros(word.shape, tl.float32)
    b = tl.zeros(word.shape, tl.float32)
    c = tl.zeros(word.shape, tl.float32)
    d = tl.zeros(word.shape, tl.float32)
    found = tl.full((), 0, tl.int32)
    for j in tl.static_range(K):
        here = (ats[j] >= 0) & (ats[j] < rows)
        weight = tl.where(here, weights[j], 0.0)  # whatever the caller has where there is no slot
        got = tl.load(y_words + ats[j].to(tl.int64) * (D // 4) + word, mask=inside & here, other=0)
        a += weight * _value(got, 0, y)
        b += weight * _value(got, 1, y)
        c += weight * _value(got, 2, y)
        d += weight * _value(got, 3, y)
        found += here.to(tl.int32)
    return a, b, c, d, found


@triton.jit
def _words_of(unit, D: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr):
    """A unit of work is a tile of lines of a token's row: the token, the tile's lines, its words of the row, and which
    of these there are."""
    UNITS: tl.constexpr = (LINES + TILE - 1) // TILE
    column = tl.arange(0, W)[None, :]
    line = (unit % UNITS * TILE + tl.arange(0, TILE))[:, None]
    word = line * (W - 1) + column
    return unit // UNITS, line, word, (column < W - 1) & (word < D // 4)


@triton.jit
def _put(
    base, a, b, c, d, t, line, here, expected, rank, y,
    T_MAX: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Store a tile of a row in lines at the owner of the token."""
    column = tl.arange(0, W)[None, :]
    place = (rank * T_MAX + t).to(tl.int64) * (LINES * W) + line * W + column
    got = tl.where(column == W - 1, expected, _words(a, b, c, d, y))
    tl.store(base + place, got, mask=(line < LINES) & here)


@triton.jit
def _send(
    y, position, counts, early, own, state, host, notice, notice_stride, rank, rows, to, first, programs,
    R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, D: tl.constexpr, T_MAX: tl.constexpr, LINES: tl.constexpr,
    TILE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr, CUT_AT: tl.constexpr,
    OPENED_AT: tl.constexpr, SUMS_AT: tl.constexpr, BEGUN: tl.constexpr,
):  # fmt: skip
    """Of every `programs`-th tile of rank `to`'s rows: store the weighted sums of our experts' results there.

    early: the weights that came with the tokens, for each of two parities."""
    UNITS: tl.constexpr = (LINES + TILE - 1) // TILE
    r = tl.arange(0, P)
    # What we send first, and from where, does not depend on what begin reads, nor on how much there is to send.
    t, line, word, inside = _words_of(first, D, LINES, TILE)
    there = t < T_MAX
    of_token = (to * T_MAX + t) * K
    ats = _loaded(position + of_token, there, -1, K)
    count = tl.minimum(tl.maximum(tl.load(counts + to), 0), T_MAX)
    early += tl.load(counts + P) * (R * T_MAX * K)
    peer = tl.load(state + MASK + 4 * P + to)
    begun = tl.load((own + BEGUN).to(tl.pointer_type(tl.int64)) + to, volatile=True)
    expected, parity, alive_P = begin(own, state, CUT_AT, SUMS, R, P, GUARD)
    a, b, c, d, found = _sum_held(
        y, ats, _loaded(early + of_token, there, 0.0, K), rows, word, inside & (t < count), K, D
    )
    draw_ticket(state, expected, SUMS)
    theirs = own + tl.multiple_of(peer, 128)
    half: tl.constexpr = R * T_MAX * LINES * W  # words of one of the two buffers
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
    _put(base, a, b, c, d, t, line, (t < count) & (found > 0), expected, rank, y, T_MAX, LINES)
    for unit in range(first + programs, count * UNITS, programs):
        t, line, word, inside = _words_of(unit, D, LINES, TILE)
        of_token = (to * T_MAX + t) * K
        ats = _loaded(position + of_token, True, -1, K)
        a, b, c, d, found = _sum_held(y, ats, _loaded(early + of_token, True, 0.0, K), rows, word, inside, K, D)
        _put(base, a, b, c, d, t, line, found > 0, expected, rank, y, T_MAX, LINES)


@triton.jit
def _wanted(slots, S: tl.constexpr, K: tl.constexpr):
    """A bit for each rank that owns one of these K slots of a token of ours."""
    wanted = tl.full((), 0, tl.int64)
    for j in tl.static_range(K):
        owner = tl.where(slots[j] >= 0, slots[j] // S, 0).to(tl.int64)
        wanted |= tl.where(slots[j] >= 0, tl.full((), 1, tl.int64) << owner, 0)
    return wanted


@triton.jit
def _arrived(received, row, source, wanted, expected, line, column, LINES: tl.constexpr, BITS: tl.constexpr):
    """A tile of a row from `source`, [TILE, W], as far as it is there, zeros if it is not wanted. Also where a line is
    missing: the source's bit."""
    theirs = (((wanted >> source) & 1) > 0) & (line < LINES)
    # A word a thread at a time, so that all tensors of a row lie alike and nothing passes through shared memory.
    place = tl.multiple_of(received + row.to(tl.int64) * (LINES * W) + line * W + column, [8, 8])
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
            here_bits = still_here(
                own, state, host, notice, notice_stride, cut_at, opened_at, rank, expected, here_bits, late, started,
                R, P, INTERPRETED,
            )  # fmt: skip
    return here_bits


@triton.jit
def _sum_all(
    held, received, t, rank, wanted, here_bits, expected, line, y,
    R: tl.constexpr, T_MAX: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What our own experts made of a tile of a row, and what the others' lines say as far as they are there; also,
    where a line is missing, its rank's bit."""
    column = tl.arange(0, W)[None, :]
    late_LW = tl.zeros(held[0].shape, BITS)
    own_part = tl.where(((here_bits >> rank) & 1) > 0, 1.0, 0.0)
    a, b, c, d = held[0] * own_part, held[1] * own_part, held[2] * own_part, held[3] * own_part
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
    return a, b, c, d, late_LW


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
    half: tl.constexpr = R * T_MAX * LINES * W  # words of one of the two buffers
    received = (own + SUMS_AT).to(tl.pointer_type(tl.int64)) + parity.to(tl.int64) * half
    BITS: tl.constexpr = tl.int32 if P <= 16 else tl.int64
    out_words = out.to(tl.pointer_type(tl.int64))
    here_bits = bits_of(alive_P, P)
    started = now_ns(INTERPRETED)
    rounds = 0
    for unit in range(program, tokens * UNITS, programs):
        t, line, word, inside = _words_of(unit, D, LINES, TILE)
        ats = _loaded(position + (rank * T_MAX + t) * K, True, -1, K)
        pair_weights = _loaded(weights + t * K, True, 0.0, K)
        wanted = _wanted(_loaded(slots + t * K, True, -1, K), S, K)
        # What our own experts made is added while the others' is under way.
        a0, b0, c0, d0, _ = _sum_held(y, ats, pair_weights, rows, word, inside, K, D)
        late = tl.full((), 1, tl.int64)
        while late != 0:
            a, b, c, d, late_LW = _sum_all(
                (a0, b0, c0, d0), received, t, rank, wanted, here_bits, expected, line, y, R, T_MAX, LINES, BITS
            )
            late = tl.reduce(late_LW, None, either).to(tl.int64)
            row = out_words + tl.cast(t, tl.int64) * (D // 4)
            tl.store(row + word, _words(a, b, c, d, y), mask=inside & (late == 0))
            rounds += 1
            here_bits = _still_here(
                own, state, host, notice, notice_stride, CUT_AT, OPENED_AT, rank, expected, here_bits, late,
                started, rounds, R, P, GUARD, INTERPRETED,
            )  # fmt: skip


@triton.jit
def _added(total, before, part: tl.constexpr, like):
    """One of four results, rounded as combine would store it, added to what stood there, and rounded again."""
    kind: tl.constexpr = like.dtype.element_ty
    return (total.to(kind).to(tl.float32) + _value(before, part, like)).to(kind).to(tl.float32)


@triton.jit
def _ready(sums, INTERPRETED: tl.constexpr):
    """The same four tensors, computed here: left alone, the compiler adds behind the wait what it loaded before."""
    a, b, c, d = sums
    if not INTERPRETED:
        a, b, c, d = tl.inline_asm_elementwise(
            "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;", "=f,=f,=f,=f,f,f,f,f", [a, b, c, d],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def _sum_row(
    held, received, t, rank, wanted, here_bits, expected, y,
    R: tl.constexpr, D: tl.constexpr, T_MAX: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`_sum_all` of all tiles of a row, a tuple of them each, and of whom a line is missing."""
    late_LW = tl.zeros([TILE, W], BITS)
    sums = ()
    for unit in tl.static_range((LINES + TILE - 1) // TILE):
        _, line, _, _ = _words_of(unit, D, LINES, TILE)
        a, b, c, d, missing = _sum_all(
            held[unit], received, t, rank, wanted, here_bits, expected, line, y, R, T_MAX, LINES, BITS
        )
        sums += ((a, b, c, d),)
        late_LW |= missing
    return sums, tl.reduce(late_LW, None, either).to(tl.int64)


@triton.jit
def _receive_row(
    y, position, slots, weights, out, residual, gain, eps, own, state, host, notice,
    notice_stride, tokens, rank, rows, t,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, T_MAX: tl.constexpr,
    LINES: tl.constexpr, TILE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, SUMS_AT: tl.constexpr,
):  # fmt: skip
    """Of one of our tokens' rows: wait for its lines, add them to the residual, store that and its RMS norm.

    residual[t] += the sum that `_receive` stores; out[t] = rms_norm(residual[t]) * gain; rounded wherever a combine and
    then a norm would. A row has one program, so nobody waits for another one's part of the squares. It stands in
    tuples of tiles, in registers: all tiles are asked for at once."""
    UNITS: tl.constexpr = (LINES + TILE - 1) // TILE
    residual_words = residual.to(tl.pointer_type(tl.int64)) + tl.cast(t, tl.int64) * (D // 4)
    there = t < tokens
    ats = _loaded(position + (rank * T_MAX + t) * K, there, -1, K)
    pair_weights = _loaded(weights + t * K, there, 0.0, K)
    wanted = _wanted(_loaded(slots + t * K, there, -1, K), S, K)
    before, gains = (), ()
    for unit in tl.static_range(UNITS):
        _, _, word, inside = _words_of(unit, D, LINES, TILE)
        before += (tl.load(residual_words + word, mask=inside & there, other=0),)
        gains += (tl.load(gain.to(tl.pointer_type(tl.int64)) + word, mask=inside & there, other=0),)
    expected, parity, alive_P = begin(own, state, CUT_AT, SUMS, R, P, GUARD)
    held = ()
    for unit in tl.static_range(UNITS):
        _, _, word, inside = _words_of(unit, D, LINES, TILE)
        a, b, c, d, _ = _sum_held(y, ats, pair_weights, rows, word, inside, K, D)
        held += (_ready((a, b, c, d), INTERPRETED),)
    draw_ticket(state, expected, SUMS)
    half: tl.constexpr = R * T_MAX * LINES * W
    received = (own + SUMS_AT).to(tl.pointer_type(tl.int64)) + parity.to(tl.int64) * half
    BITS: tl.constexpr = tl.int32 if P <= 16 else tl.int64
    here_bits = bits_of(alive_P, P)
    started = now_ns(INTERPRETED)
    rounds = 0
    late = tl.full((), 1, tl.int64)
    sums = held
    while late != 0:
        sums, late = _sum_row(held, received, t, rank, wanted, here_bits, expected, y, R, D, T_MAX, LINES, TILE, BITS)
        rounds += 1
        here_bits = _still_here(
            own, state, host, notice, notice_stride, CUT_AT, OPENED_AT, rank, expected, here_bits, late,
            started, rounds, R, P, GUARD, INTERPRETED,
        )  # fmt: skip
    # Nothing is late now. Triton 3.6 cannot compile a loop whose condition alone reads what it carries.
    there = there & (late == 0)
    # Ranks are below 62, so this is 0. The compiler, which does not know, keeps words in one piece until here.
    nothing = here_bits >> 63
    squares_LW = tl.zeros([TILE, W], tl.float32)
    whole = ()
    for unit in tl.static_range(UNITS):
        _, _, word, inside = _words_of(unit, D, LINES, TILE)
        stood = before[unit] ^ nothing
        a, b = _added(sums[unit][0], stood, 0, y), _added(sums[unit][1], stood, 1, y)
        c, d = _added(sums[unit][2], stood, 2, y), _added(sums[unit][3], stood, 3, y)
        tl.store(residual_words + word, _words(a, b, c, d, y), mask=inside & there)
        squares_LW += tl.where(inside, a * a + b * b + c * c + d * d, 0.0)
        whole += ((a, b, c, d),)
    scale = tl.rsqrt(tl.sum(squares_LW) / D + eps)
    out_words = out.to(tl.pointer_type(tl.int64)) + tl.cast(t, tl.int64) * (D // 4)
    for unit in tl.static_range(UNITS):
        _, _, word, inside = _words_of(unit, D, LINES, TILE)
        by = gains[unit] ^ nothing
        a, b = whole[unit][0] * scale * _value(by, 0, y), whole[unit][1] * scale * _value(by, 1, y)
        c, d = whole[unit][2] * scale * _value(by, 2, y), whole[unit][3] * scale * _value(by, 3, y)
        tl.store(out_words + word, _words(a, b, c, d, y), mask=inside & there)


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride", "rows", "senders"])
def line_combine_kernel(
    y, position, counts, slots, weights, out, residual, gain, eps, own, state, host, notice,
    notice_stride, tokens, rank, rows, senders,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr, GUARD: tl.constexpr,
    INTERPRETED: tl.constexpr, CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, WEIGHTS: tl.constexpr,
    SUMS_AT: tl.constexpr, BEGUN: tl.constexpr,
):  # fmt: skip
    """Bring the experts' results back to their tokens' owners, and add them. COLLECTIVE. rows: how many y has.

    NORM: the sums are added to the residual, and out is its norm; see `_receive_row`.
    Grid: `senders` programs, a multiple of R - 1, that send to one rank each, then any number that receive, with NORM
    one a token. The grid may have another size in every launch and on every rank.
    """
    pid = tl.program_id(0)
    if pid < senders:
        ends: tl.constexpr = R - 1 if R > 1 else 1
        _send(
            y, position, counts, (own + WEIGHTS).to(tl.pointer_type(tl.float32)), own, state, host, notice,
            notice_stride, rank, rows, (rank + 1 + pid % ends) % R, pid // ends, senders // ends,
            R, P, K, D, T_MAX, LINES, TILE, GUARD, INTERPRETED, CUT_AT, OPENED_AT, SUMS_AT, BEGUN,
        )  # fmt: skip
    elif NORM:
        _receive_row(
            y, position, slots, weights, out, residual, gain, eps, own, state, host, notice,
            notice_stride, tokens, rank, rows, pid - senders,
            R, P, S, K, D, T_MAX, LINES, TILE, GUARD, INTERPRETED, CUT_AT, OPENED_AT, SUMS_AT,
        )  # fmt: skip
    else:
        expected, parity, alive_P = begin(own, state, CUT_AT, SUMS, R, P, GUARD)
        draw_ticket(state, expected, SUMS)
        _receive(
            y, position, slots, weights, out, own, state, host, notice,
            notice_stride, tokens, rank, rows, pid - senders, tl.num_programs(0) - senders, expected, parity, alive_P,
            R, P, S, K, D, T_MAX, LINES, TILE, GUARD, INTERPRETED, CUT_AT, OPENED_AT, SUMS_AT,
        )  # fmt: skip
