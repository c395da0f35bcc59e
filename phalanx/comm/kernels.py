"""The CUDA communicator's kernels, in Triton: dispatch, combine, gather, and the waits that never hang.

One kernel is one collective of one rank. Its programs first send, then wait: no program waits for another one of its
own rank, so a grid that fits the device at once cannot deadlock with the peers' grids.

How ranks meet. A sender stores straight into the receiver's exported buffer (`peer_memory.Layout`), makes the stores
visible to the whole system, and then raises a flag word there. A flag word carries `epoch << 32 | sequence`, only ever
grows (it is raised by an atomic maximum, so that not even a stale writer can lower it), and is compared with >=.
Receiving programs poll their own device's memory. Every kind of collective has a sequence of its own, counted on the
device, so that a CUDA graph's replay needs no new argument; its parity picks one of two receive buffers.

How a wait ends early. Every `POLL` rounds it reads whether another program has masked the peer, whether the peer has
cut us off or opened a roll call (words that peers store in our buffer), and the time; when it is its turn, also what
the launcher and the operator say (words of host memory, mapped). It then takes zero tokens from the silent peer, writes
the mask and the cause in the state words, and goes on: no trap, no error, no poisoned context. A rank that gives up on
a peer stores its epoch in that peer's `cut` word: the peer, should it still run, ends its waits for us and sends us
nothing more, also from graphs that were launched already. A rank that opens a roll call stores its epoch in every
peer's `opened` word, and all waits of earlier epochs end.

Words of `state` (int64, private to the rank): EPOCH, TIMEOUT_NS, INTERRUPTED, a ticket counter for each kind of
collective, then P words each of mask, cause, nanoseconds waited, incarnation, and the distance in bytes from our own
exported buffer to the peer's. Words of `host` (int64, pinned host memory, written by this rank's host): P words, 1 =
masked by the operator, then the roll call that this rank opened.
Shape suffixes: T tokens, D width, K top-k, R ranks (P: padded to a power of two), S slots a rank, M pairs.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

EPOCH: tl.constexpr = tl.constexpr(0)
TIMEOUT_NS: tl.constexpr = tl.constexpr(1)
INTERRUPTED: tl.constexpr = tl.constexpr(2)
TICKET: tl.constexpr = tl.constexpr(8)
MASK: tl.constexpr = tl.constexpr(16)
# MASK, CAUSE, WAITED, INCARNATION, PEER: P words each, from word 16 on.

NOTICE: tl.constexpr = tl.constexpr(1)
TIMEOUT: tl.constexpr = tl.constexpr(2)
OPERATOR: tl.constexpr = tl.constexpr(3)
CUT: tl.constexpr = tl.constexpr(4)

DISPATCH: tl.constexpr = tl.constexpr(0)
COMBINE: tl.constexpr = tl.constexpr(1)
GATHER: tl.constexpr = tl.constexpr(2)

ROWS: tl.constexpr = tl.constexpr(0)
EXACT: tl.constexpr = tl.constexpr(1)
FAST: tl.constexpr = tl.constexpr(2)

POLL: tl.constexpr = tl.constexpr(64)
"""Rounds of a wait (of about 0.1 us on an H200) between two looks at what may end it."""
TURN_BITS: tl.constexpr = tl.constexpr(16)
"""A program's turn to read host memory lasts 2**16 ns."""
PATIENT_NS: tl.constexpr = tl.constexpr(200_000)
"""Waits shorter than this never read host memory."""


@triton.jit
def _look(pointers, INTERPRETED: tl.constexpr):
    """Load flag words so that what their writers stored before is seen after. One element a thread is enough: a barrier
    follows before anybody uses it."""
    if INTERPRETED:
        return tl.load(pointers, volatile=True)
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l,~{memory}", [pointers], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _now(INTERPRETED: tl.constexpr):
    """Nanoseconds of the device's clock. The interpreter has no clock: no wait times out there."""
    if INTERPRETED:
        return tl.full((), 0, tl.int64)
    return globaltimer()


@triton.jit
def _at(vector_P, index, P: tl.constexpr):
    """vector_P[index], for a vector in registers."""
    return tl.sum(tl.where(tl.arange(0, P) == index, vector_P, 0))


@triton.jit
def _begin(
    own, state, cut_at, kind: tl.constexpr, PROGRAMS: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """What every program reads first: (expected flag word, parity, alive_P).

    The number of this collective follows from a ticket that each of the grid's PROGRAMS programs draws once (`_count`),
    after it has read it: nobody has to reset it, and no program waits for another."""
    r = tl.arange(0, P)
    epoch = tl.load(state + EPOCH)
    sequence = tl.load(state + TICKET + kind) // PROGRAMS + 1
    if GUARD:
        alive_P = tl.load(state + MASK + r, mask=r < R, other=0).to(tl.int32)
        cut_P = tl.load((own + cut_at).to(tl.pointer_type(tl.int64)) + r, mask=r < R, other=0, volatile=True)
        interrupted = tl.load(state + INTERRUPTED)
        newly_cut = (alive_P > 0) & (cut_P >= epoch)
        tl.store(state + MASK + P + r, CUT, mask=newly_cut)
        tl.store(state + MASK + r, 0, mask=newly_cut)
        alive_P = tl.where(newly_cut | (interrupted > epoch), 0, alive_P)
    else:
        alive_P = (r < R).to(tl.int32)
    return (epoch << 32) | sequence, (sequence & 1).to(tl.int32), alive_P


@triton.jit
def _count(state, expected, kind: tl.constexpr):
    """Draw this program's ticket. What is added depends on the number read, so the read is over before: no fence."""
    tl.atomic_add(state + TICKET + kind, (expected >= 0).to(tl.int64), sem="relaxed", scope="gpu")


@triton.jit
def _give_up(
    own, state, host, notice, notice_stride, cut_at, opened_at, rank, epoch, waiting_P, elapsed, turn,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Look at everything that may end a wait. Returns which ranks are still awaited, [P] int32.

    Host memory is far: reads of it pass one by one (1 us each on an H200, whoever reads), so if all programs read it,
    they queue up for longer than a collective takes, and make the peers wait, and so on for ever. So programs take
    turns, only after a long wait, and the others learn from the state words what one of them found.
    """
    r = tl.arange(0, P)
    inside = r < R
    mine = own.to(tl.pointer_type(tl.int64))
    masked_P = tl.load(state + MASK + r, mask=inside, other=1, volatile=True) == 0
    cut_P = tl.load(mine + cut_at // 8 + r, mask=inside, other=0, volatile=True)
    opened = tl.max(tl.load(mine + opened_at // 8 + r, mask=inside, other=0, volatile=True))
    opened = tl.maximum(opened, tl.load(state + INTERRUPTED, volatile=True))
    late = elapsed > tl.load(state + TIMEOUT_NS, volatile=True)
    cause_P = tl.where(late, TIMEOUT, 0) + tl.zeros([P], tl.int32)
    cause_P = tl.where(cut_P >= epoch, CUT, cause_P)
    if turn:
        dead_P = tl.load(notice.to(tl.pointer_type(tl.int64)) + r * notice_stride, mask=inside, other=-1, volatile=True)
        operator_P = tl.load(host + r, mask=inside, other=0, volatile=True)
        opened = tl.maximum(opened, tl.load(host + P, volatile=True))
        dead_P = dead_P >= tl.load(state + MASK + 3 * P + r, mask=inside, other=0)
        cause_P = tl.where(operator_P != 0, OPERATOR, cause_P)
        cause_P = tl.where(dead_P, NOTICE, cause_P)
        # A rank that the launcher declared dead sends nothing more: it is a zombie, the others went on.
        opened = tl.maximum(opened, tl.where(_at(dead_P.to(tl.int32), rank, P) > 0, epoch + 1, 0))
    gone_P = (waiting_P > 0) & (cause_P > 0) & (masked_P == 0)
    if tl.max(gone_P.to(tl.int32)) > 0:
        peer_P = tl.load(state + MASK + 4 * P + r, mask=inside, other=0)
        tl.store(state + MASK + P + r, cause_P.to(tl.int64), mask=gone_P)
        tl.store(state + MASK + 2 * P + r, elapsed + tl.zeros([P], tl.int64), mask=gone_P)
        tl.store(state + MASK + r, 0, mask=gone_P)
        # Stores to a dead peer's buffer are harmless: the mapping outlives its owner.
        tl.atomic_max(
            mine + (peer_P + cut_at) // 8 + rank, epoch + tl.zeros([P], tl.int64), mask=gone_P,
            sem="relaxed", scope="sys",
        )  # fmt: skip
    waiting_P = tl.where(gone_P | masked_P, 0, waiting_P)
    if opened > epoch:
        tl.atomic_max(state + INTERRUPTED, opened, sem="relaxed", scope="gpu")
        waiting_P = tl.zeros([P], tl.int32)
    return waiting_P


@triton.jit
def _wait(
    own, state, host, notice, notice_stride, flags_at, stride, cut_at, opened_at, rank, expected, awaited_P,
    R: tl.constexpr, P: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Wait until the word at `flags_at + 8 * r * stride` of every awaited rank r reaches `expected`.

    Returns [P] int32: 1 = it did."""
    r = tl.arange(0, P)
    epoch = expected >> 32
    flag_P = (own + flags_at).to(tl.pointer_type(tl.int64)) + tl.minimum(r, R - 1) * stride
    seen_P = _look(flag_P, INTERPRETED)
    waiting_P = tl.where(seen_P >= expected, 0, awaited_P)
    started = _now(INTERPRETED)
    rounds = 0
    while tl.max(waiting_P) > 0:
        seen_P = _look(flag_P, INTERPRETED)
        waiting_P = tl.where(seen_P >= expected, 0, waiting_P)
        rounds += 1
        if GUARD:  # noqa: SIM102  (compiled away)
            if rounds % POLL == 0:
                now = _now(INTERPRETED)
                elapsed = now - started
                turn = (now >> TURN_BITS) % tl.num_programs(0) == tl.program_id(0)
                turn = INTERPRETED or (turn and elapsed > PATIENT_NS)
                waiting_P = _give_up(
                    own, state, host, notice, notice_stride, cut_at, opened_at, rank, epoch, waiting_P, elapsed, turn,
                    R, P,
                )  # fmt: skip
    tl.debug_barrier()
    arrived_P = (awaited_P > 0) & (seen_P >= expected)
    if GUARD:
        # A peer that is an epoch ahead has left this collective: its message is not ours to take.
        newest = tl.max(tl.where(arrived_P, seen_P >> 32, 0))
        arrived_P = arrived_P & ((seen_P >> 32) == epoch)
        if newest > epoch:
            tl.atomic_max(state + INTERRUPTED, newest, sem="relaxed", scope="gpu")
    return arrived_P.to(tl.int32)


@triton.jit
def _raise(own, state, flag_at, expected, alive_P, R: tl.constexpr, P: tl.constexpr):
    """Make this program's stores visible everywhere, then raise its flag at the living ranks."""
    r = tl.arange(0, P)
    peer_P = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)
    tl.debug_barrier()
    tl.atomic_max(
        own.to(tl.pointer_type(tl.int64)) + (peer_P + flag_at) // 8, expected + tl.zeros([P], tl.int64),
        mask=alive_P > 0, sem="release", scope="sys",
    )  # fmt: skip


@triton.jit
def _send_meta(
    own, state, slots, weights, tokens, rank, to, expected, parity, alive_P,
    META, COUNT, WEIGHTS, META_FLAG,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Tell rank `to` which of its slots each of our tokens wants (and with what weight)."""
    if _at(alive_P, to, P) > 0:
        peer = tl.multiple_of(tl.load(state + MASK + 4 * P + to), 128)
        base = own + peer
        place = parity * R + rank
        for start in range(0, tokens * K, BLOCK):
            i = start + tl.arange(0, BLOCK)
            slot = tl.load(slots + i, mask=i < tokens * K, other=-1)
            local = tl.where((slot >= 0) & (slot // S == to), slot - to * S, -1)
            tl.store((base + META).to(tl.pointer_type(tl.int32)) + place * (T_MAX * K) + i, local, mask=i < tokens * K)
            if WEIGHTED:
                weight = tl.load(weights + i, mask=i < tokens * K, other=0.0)
                at = (base + WEIGHTS).to(tl.pointer_type(tl.float32)) + place * (T_MAX * K) + i
                tl.store(at, weight, mask=i < tokens * K)
        tl.store((base + COUNT).to(tl.pointer_type(tl.int64)) + place, tokens.to(tl.int64))
        _raise(own, state, META_FLAG + rank * 8, expected, (tl.arange(0, P) == to).to(tl.int32), R, P)


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
            if _at(alive_P, to, P) > 0:
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
def _lay_out(
    own, rows_M, slots_M, position, first, program, programs, parity, count_P,
    META,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, T_MAX: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sort the pairs by slot; within a slot by (source rank, token, k). Each program makes the lists of its slots.

    A program counts by itself how many pairs belong to smaller slots: two passes over a few thousand words (in
    registers, when BLOCKS is 1) cost less than agreeing on offsets. Slot S stands for "not here": its pass marks those
    pairs with position -1.
    """
    lane = tl.arange(0, BLOCK)
    r = tl.arange(0, P)
    meta = (own + META).to(tl.pointer_type(tl.int32)) + parity * R * T_MAX * K
    if BLOCKS == 1:
        pair = r[:, None] * (T_MAX * K) + lane[None, :]
        v = tl.load(meta + pair, mask=(r < R)[:, None] & (lane < T_MAX * K)[None, :], other=-2)
        v = tl.where(lane[None, :] < (count_P * K)[:, None], v, -2)
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
    else:
        for slot in range(program, S + 1, programs):
            smaller = 0
            for source in range(R):
                pairs = _at(count_P, source, P) * K
                for start in range(0, pairs, BLOCK):
                    v = tl.load(meta + source * (T_MAX * K) + start + lane, mask=start + lane < pairs, other=-1)
                    smaller += tl.sum(((v >= 0) & (v < tl.minimum(slot, S))).to(tl.int32))
            tl.store(first + slot, smaller)
            filled = smaller
            for source in range(R):
                pairs = _at(count_P, source, P) * K
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


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride"])
def dispatch_kernel(
    x, slots, weights, rows_M, slots_M, position, first, counts, own, state, host, notice,
    notice_stride, tokens, rank,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, FP8: tl.constexpr, WEIGHTED: tl.constexpr, GUARD: tl.constexpr,
    INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, META: tl.constexpr, COUNT: tl.constexpr, WEIGHTS: tl.constexpr,
    X: tl.constexpr, SCALES: tl.constexpr, META_FLAG: tl.constexpr, DATA_FLAG: tl.constexpr,
):  # fmt: skip
    """Send every token once to each rank that holds one of its slots, and sort what arrives by slot. COLLECTIVE.

    Grid: R + CHUNKS * GROUPS programs. The first R send one rank its list of slots each and end; program (group, chunk)
    of the others moves a chunk of columns of every GROUPS-th token.
    """
    pid = tl.program_id(0)
    if pid < R:
        expected, parity, alive_P = _begin(own, state, CUT_AT, DISPATCH, R + CHUNKS * GROUPS, R, P, GUARD)
        _send_meta(
            own, state, slots, weights, tokens, rank, pid, expected, parity, alive_P,
            META, COUNT, WEIGHTS, META_FLAG, R, P, S, K, T_MAX, BLOCK, WEIGHTED,
        )  # fmt: skip
        _count(state, expected, DISPATCH)
    else:
        program = pid - R
        chunk = program % CHUNKS
        group = program // CHUNKS
        # Our own tokens are under way before we know the number of this collective.
        slot_TK, x_TD = _tile(x, slots, tokens, group, chunk * CHUNK + tl.arange(0, CHUNK), K, KP, D, GROUPS, TILE)
        expected, parity, alive_P = _begin(own, state, CUT_AT, DISPATCH, R + CHUNKS * GROUPS, R, P, GUARD)
        _send_tokens(
            own, state, x, slots, slot_TK, x_TD, tokens, rank, group, chunk, parity, alive_P,
            X, SCALES, R, P, S, K, KP, D, T_MAX, CHUNK, GROUPS, TILE, FP8,
        )  # fmt: skip
        _raise(own, state, DATA_FLAG + (rank * (CHUNKS * GROUPS) + program) * 8, expected, alive_P, R, P)
        _count(state, expected, DISPATCH)
        # The lists arrive long before the tokens: sort them while the tokens are under way.
        told_P = _wait(
            own, state, host, notice, notice_stride, META_FLAG, 1, CUT_AT, OPENED_AT, rank, expected, alive_P,
            R, P, GUARD, INTERPRETED,
        )  # fmt: skip
        r = tl.arange(0, P)
        count_P = tl.load((own + COUNT).to(tl.pointer_type(tl.int64)) + parity * R + r, mask=told_P > 0, other=0)
        count_P = tl.minimum(tl.maximum(count_P, 0), T_MAX).to(tl.int32)
        _lay_out(
            own, rows_M, slots_M, position, first, program, CHUNKS * GROUPS, parity, count_P,
            META, R, P, S, K, T_MAX, BLOCK, BLOCKS,
        )  # fmt: skip
        if program == 0:
            tl.store(counts + r, count_P, mask=r < R)
            tl.store(counts + P, parity)
        _wait(
            own, state, host, notice, notice_stride, DATA_FLAG + program * 8, CHUNKS * GROUPS, CUT_AT, OPENED_AT,
            rank, expected, told_P, R, P, GUARD, INTERPRETED,
        )  # fmt: skip


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
        if _at(alive_P, to, P) > 0:
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
def _send_sums(
    state, own, y, position, counts, rank, group, cols, parity, alive_P, rows,
    RESULTS, WEIGHTS,
    R: tl.constexpr, P: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the weighted sums of our experts' results for the other ranks' tokens at their owners, a row a token."""
    k = tl.arange(0, KP)
    sent_parity = tl.load(counts + P)
    for step in range(R - 1):
        to = (rank + 1 + step) % R
        if _at(alive_P, to, P) > 0:
            count = tl.minimum(tl.load(counts + to), T_MAX)
            base = own + tl.multiple_of(tl.load(state + MASK + 4 * P + to), 128)
            results = (base + RESULTS).to(tl.pointer_type(y.dtype.element_ty))
            weights = (own + WEIGHTS).to(tl.pointer_type(tl.float32)) + (sent_parity * R + to) * (T_MAX * K)
            places = position + to * (T_MAX * K)
            at = tl.load(places + group * K + k, mask=(k < K) & (group < count), other=-1)
            at = tl.where(at < rows, at, -1)
            weight = tl.load(weights + group * K + k, mask=at >= 0, other=0.0)
            for t in range(group, count, GROUPS):
                here = (at >= 0)[:, None] & (cols < D)[None, :]
                y_KD = tl.load(y + at[:, None].to(tl.int64) * D + cols[None, :], mask=here, other=0.0)
                wanted = (cols < D) & (tl.max(at) >= 0)
                total = tl.sum(y_KD.to(tl.float32) * weight[:, None], axis=0)
                after = t + GROUPS
                at = tl.load(places + after * K + k, mask=(k < K) & (after < count), other=-1)
                at = tl.where(at < rows, at, -1)
                weight = tl.load(weights + after * K + k, mask=at >= 0, other=0.0)
                row = ((parity * R + rank) * T_MAX + t).to(tl.int64)
                tl.store(results + row * D + cols, total.to(y.dtype.element_ty), mask=wanted)


@triton.jit
def _plan(
    position, slots, weights, tokens, rank, t, rows,
    S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, T_MAX: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of one of our tokens, for each k: the owner of its slot (-1: none), its row of y if that is us, its weight."""
    k = tl.arange(0, KP)
    inside = (k < K) & (t < tokens)
    slot_K = tl.load(slots + t * K + k, mask=inside, other=-1)
    at_K = tl.load(position + (rank * T_MAX + t) * K + k, mask=inside, other=-1)
    at_K = tl.where(at_K < rows, at_K, -1)
    owner_K = tl.where(slot_K >= 0, slot_K // S, -1)
    if MODE == ROWS:  # noqa: SIM108  (compiled away)
        weight_K = tl.zeros([KP], tl.float32)
    else:
        weight_K = tl.load(weights + t * K + k, mask=inside, other=0.0)
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
            here_K += tl.where(owner_K == r, _at(here_P, r, P), 0)
        mine_K = (owner_K == rank) & (at_K >= 0)
        valid_K = ((here_K > 0) & ((owner_K != rank) | mine_K)).to(tl.int32)
        row_K = tl.where(mine_K, at_K, t * K + k)
        total = tl.zeros([CHUNK], tl.float32)
        for j in tl.static_range(K):
            base = tl.where(_at(mine_K.to(tl.int32), j, KP) > 0, 0, buffer)
            at = base + _at(row_K, j, KP).to(tl.int64) * D
            row = tl.load(y + at + cols, mask=(cols < D) & (_at(valid_K, j, KP) > 0), other=0.0)
            if MODE == ROWS:
                tl.store(out + tl.cast(t * K + j, tl.int64) * D + cols, row, mask=cols < D)
            else:
                total += _at(weight_K, j, KP) * row.to(tl.float32)
        if MODE != ROWS:
            tl.store(out + tl.cast(t, tl.int64) * D + cols, total.to(out.dtype.element_ty), mask=cols < D)
        owner_K, at_K, weight_K = _plan(position, slots, weights, tokens, rank, t + GROUPS, rows, S, K, KP, T_MAX, MODE)


@triton.jit
def _add_sums(
    own, y, position, slots, weights, out, tokens, rank, group, cols, parity, here_P, rows,
    RESULTS,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """FAST: out[t] = our own experts' weighted sum + one row from each other rank that holds a slot of t."""
    k = tl.arange(0, KP)
    results = (own + RESULTS).to(tl.pointer_type(y.dtype.element_ty))
    for t in range(group, tokens, GROUPS):
        slot = tl.load(slots + t * K + k, mask=k < K, other=-1)
        at = tl.load(position + (rank * T_MAX + t) * K + k, mask=k < K, other=-1)
        at = tl.where(at < rows, at, -1)
        weight = tl.load(weights + t * K + k, mask=k < K, other=0.0)
        owner = tl.where(slot >= 0, slot // S, -1)
        held = ((owner == rank) & (at >= 0) & (_at(here_P, rank, P) > 0))[:, None] & (cols < D)[None, :]
        y_KD = tl.load(y + at[:, None].to(tl.int64) * D + cols[None, :], mask=held, other=0.0)
        total = tl.sum(y_KD.to(tl.float32) * weight[:, None], axis=0)
        for step in tl.static_range(R - 1):
            source = (rank + 1 + step) % R
            wants = (tl.max((owner == source).to(tl.int32)) > 0) & (_at(here_P, source, P) > 0)
            row = ((parity * R + source) * T_MAX + t).to(tl.int64)
            total += tl.load(results + row * D + cols, mask=(cols < D) & wants, other=0.0).to(tl.float32)
        tl.store(out + tl.cast(t, tl.int64) * D + cols, total.to(out.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["tokens", "rank", "notice", "notice_stride", "rows"])
def combine_kernel(
    y, position, counts, slots, weights, out, own, state, host, notice,
    notice_stride, tokens, rank, rows,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    T_MAX: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr, MODE: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, WEIGHTS: tl.constexpr, RESULTS: tl.constexpr,
    RESULT_FLAG: tl.constexpr,
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
    owner_K, at_K, weight_K = _plan(position, slots, weights, tokens, rank, group, rows, S, K, KP, T_MAX, MODE)
    if MODE != FAST:
        pair, at = _first_rows(position, counts, rank, group, rows, R, K, T_MAX, GROUPS, ROWS_AT_ONCE)
    expected, parity, alive_P = _begin(own, state, CUT_AT, COMBINE, PROGRAMS, R, P, GUARD)
    others_P = tl.where(r == rank, 0, alive_P)
    if MODE == FAST:
        _send_sums(
            state, own, y, position, counts, rank, group, cols, parity, alive_P, rows,
            RESULTS, WEIGHTS, R, P, K, KP, D, T_MAX, GROUPS,
        )  # fmt: skip
    else:
        _send_rows(
            state, own, y, position, counts, rank, group, cols, parity, alive_P, pair, at, rows,
            RESULTS, R, P, K, KP, D, T_MAX, GROUPS, ROWS_AT_ONCE,
        )  # fmt: skip
    _raise(own, state, RESULT_FLAG + (rank * PROGRAMS + pid) * 8, expected, others_P, R, P)
    _count(state, expected, COMBINE)
    here_P = _wait(
        own, state, host, notice, notice_stride, RESULT_FLAG + pid * 8, PROGRAMS, CUT_AT, OPENED_AT, rank,
        expected, others_P, R, P, GUARD, INTERPRETED,
    )  # fmt: skip
    here_P = tl.where(r == rank, alive_P, here_P)
    if MODE == FAST:
        _add_sums(
            own, y, position, slots, weights, out, tokens, rank, group, cols, parity, here_P, rows,
            RESULTS, R, P, S, K, KP, D, T_MAX, GROUPS, CHUNK,
        )  # fmt: skip
    else:
        _add_rows(
            own, y, position, slots, weights, out, tokens, rank, group, cols, parity, here_P,
            owner_K, at_K, weight_K, rows, RESULTS, R, P, S, K, KP, D, T_MAX, GROUPS, CHUNK, MODE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["words", "rank", "notice", "notice_stride"])
def gather_kernel(
    row, out, own, state, host, notice, notice_stride, words, rank,
    R: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, GUARD: tl.constexpr, INTERPRETED: tl.constexpr,
    CUT_AT: tl.constexpr, OPENED_AT: tl.constexpr, ROW: tl.constexpr, ROW_FLAG: tl.constexpr,
):  # fmt: skip
    """Everyone's row of `words` int64 to everyone: out [R, words], zeros for the masked. COLLECTIVE.

    0 words: a barrier. Grid: one program.
    """
    expected, parity, alive_P = _begin(own, state, CUT_AT, GATHER, 1, R, P, GUARD)
    r = tl.arange(0, P)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (column < words) & (r < R)
    value = tl.load(row + column + 0 * r, mask=inside, other=0)
    peer = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)
    mine = own.to(tl.pointer_type(tl.int64))
    place = ROW // 8 + parity * R * WIDTH
    tl.store(mine + peer // 8 + place + rank * WIDTH + column, value, mask=inside & (alive_P[:, None] > 0))
    _raise(own, state, ROW_FLAG + rank * 8, expected, alive_P, R, P)
    _count(state, expected, GATHER)
    here_P = _wait(
        own, state, host, notice, notice_stride, ROW_FLAG, 1, CUT_AT, OPENED_AT, rank, expected, alive_P,
        R, P, GUARD, INTERPRETED,
    )  # fmt: skip
    got = tl.load(mine + place + r * WIDTH + column, mask=inside & (here_P[:, None] > 0), other=0)
    tl.store(out + r * words + column, got, mask=inside)


@triton.jit(do_not_specialize=["whom", "epoch", "rank", "word_at"])
def tell_kernel(own, state, whom, epoch, rank, word_at, R: tl.constexpr, P: tl.constexpr):
    """Store `epoch` in our word of the `cut` or `opened` words of some ranks (bit r of `whom`: tell rank r). LOCAL."""
    r = tl.arange(0, P)
    whom_P = (whom >> r) & 1
    peer_P = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)
    word = own.to(tl.pointer_type(tl.int64)) + (peer_P + word_at) // 8 + rank
    tl.atomic_max(word, epoch + tl.zeros([P], tl.int64), mask=(r < R) & (whom_P > 0), sem="relaxed", scope="sys")
