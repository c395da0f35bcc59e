"""How ranks meet in the CUDA communicator's kernels (Triton), how a wait ends, and the kernels that carry no token.

Those are gather and tell; dispatch is in `dispatch_kernels`, combine in `combine_kernels` and `line_kernels`.

One kernel is one collective of one rank. Its programs first send, then wait: no program waits for another one of its
own rank, so a grid that fits the device at once cannot deadlock with the peers' grids.

How ranks meet. A sender stores straight into the receiver's exported buffer (`peer_memory.BufferLayout`), makes the
stores visible to the whole system, and then raises a flag word there. A flag word carries `epoch << 32 | sequence`,
only ever grows (it is raised by an atomic maximum, so that not even a stale writer can lower it), and is compared
with >=. Receiving programs poll their own device's memory. Every kind of collective has a sequence of its own, counted
on the device, so that a CUDA graph's replay needs no new argument; its parity picks one of two receive buffers.

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
SUMS: tl.constexpr = tl.constexpr(3)

POLL: tl.constexpr = tl.constexpr(64)
"""Rounds of a wait (of about 0.1 us on an H200) between two looks at what may end it."""
TURN_BITS: tl.constexpr = tl.constexpr(16)
"""A program's turn to read host memory lasts 2**16 ns."""
PATIENT_NS: tl.constexpr = tl.constexpr(200_000)
"""Waits shorter than this never read host memory."""
TICKETS: tl.constexpr = tl.constexpr(1 << 16)
"""Tickets that the programs of one launch draw together, however many they are."""


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
def now_ns(INTERPRETED: tl.constexpr):
    """Nanoseconds of the device's clock. The interpreter has no clock: no wait times out there."""
    if INTERPRETED:
        return tl.full((), 0, tl.int64)
    return globaltimer()


@triton.jit
def element(vector_P, index, P: tl.constexpr):
    """vector_P[index], for a vector in registers."""
    return tl.sum(tl.where(tl.arange(0, P) == index, vector_P, 0))


@triton.jit
def bits_of(flag_P, P: tl.constexpr):
    """Bit r is set where flag_P[r] > 0."""
    r = tl.arange(0, P).to(tl.int64)
    return tl.sum(tl.where(flag_P > 0, tl.full([P], 1, tl.int64) << r, 0))


@triton.jit
def begin(own, state, cut_at, kind: tl.constexpr, R: tl.constexpr, P: tl.constexpr, GUARD: tl.constexpr):
    """What every program reads first: (expected flag word, parity, alive_P).

    The number of this collective follows from the tickets that the programs of earlier launches drew, each after it
    had read it (`draw_ticket`): nobody has to reset it, and no program waits for another."""
    r = tl.arange(0, P)
    epoch = tl.load(state + EPOCH)
    sequence = tl.load(state + TICKET + kind) // TICKETS + 1
    if GUARD:
        alive_P = tl.load(state + MASK + r, mask=r < R, other=0).to(tl.int32)
        cut_P = tl.load((own + cut_at).to(tl.pointer_type(tl.int64)) + r, mask=r < R, other=0)
        interrupted = tl.load(state + INTERRUPTED)
        newly_cut = (alive_P > 0) & (cut_P >= epoch)
        tl.store(state + MASK + P + r, CUT, mask=newly_cut)
        tl.store(state + MASK + r, 0, mask=newly_cut)
        alive_P = tl.where(newly_cut | (interrupted > epoch), 0, alive_P)
    else:
        alive_P = (r < R).to(tl.int32)
    return (epoch << 32) | sequence, (sequence & 1).to(tl.int32), alive_P


@triton.jit
def draw_ticket(state, expected, kind: tl.constexpr):
    """Draw this program's ticket; the first program draws those that are left over. What is added depends on the number
    read, and all warps have read it before: no fence."""
    tl.debug_barrier()
    drawn = tl.where(tl.program_id(0) == 0, TICKETS - tl.num_programs(0) + 1, 1)
    tl.atomic_add(state + TICKET + kind, tl.where(expected >= 0, drawn, 0).to(tl.int64), sem="relaxed", scope="gpu")


@triton.jit
def agreed(value):
    """A scalar int64 that each warp may have loaded at another moment: the least of theirs, the same for all warps.

    Warps of a program must take the same way wherever barriers stand on it, and a reduction is one."""
    return tl.min(tl.zeros([1024], tl.int64) + value)


@triton.jit
def go_on_alone(own, state, opened_at, rank, opened, R: tl.constexpr, P: tl.constexpr):
    """A roll call for the epoch `opened` is open: from now on no kernel of ours waits for anybody.

    So we write over what the others may still be reading (`pull_kernels`). They are told before, whoever else tells
    them, and also those that are masked here."""
    r = tl.arange(0, P)
    tl.atomic_max(state + INTERRUPTED, opened, sem="relaxed", scope="gpu")
    peer_P = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)  # 0: ourselves, or no member
    tl.atomic_max(
        own.to(tl.pointer_type(tl.int64)) + (peer_P + opened_at) // 8 + rank, opened + tl.zeros([P], tl.int64),
        mask=peer_P != 0, sem="relaxed", scope="sys",
    )  # fmt: skip


@triton.jit
def give_up(
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
        opened = tl.maximum(opened, tl.where(element(dead_P.to(tl.int32), rank, P) > 0, epoch + 1, 0))
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
        go_on_alone(own, state, opened_at, rank, opened, R, P)
        waiting_P = tl.zeros([P], tl.int32)
    return waiting_P


@triton.jit
def _still_awaited(
    own, state, host, notice, notice_stride, cut_at, opened_at, rank, epoch, waiting_P, started,
    R: tl.constexpr, P: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`give_up` now, in a wait that began at `started`."""
    now = now_ns(INTERPRETED)
    elapsed = now - started
    turn = (now >> TURN_BITS) % tl.num_programs(0) == tl.program_id(0)
    turn = INTERPRETED or (turn and elapsed > PATIENT_NS)
    return give_up(
        own, state, host, notice, notice_stride, cut_at, opened_at, rank, epoch, waiting_P, elapsed, turn, R, P
    )


@triton.jit
def either(a, b):
    """For reductions of bits."""
    return a | b


@triton.jit
def still_here(
    own, state, host, notice, notice_stride, cut_at, opened_at, rank, expected, here_bits, late, started,
    R: tl.constexpr, P: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """In a wait for the ranks whose bits are set in `late`: the ranks that are here, less those that are given up."""
    waiting_P = ((late >> tl.arange(0, P).to(tl.int64)) & 1).to(tl.int32)
    still_P = _still_awaited(
        own, state, host, notice, notice_stride, cut_at, opened_at, rank, expected >> 32, waiting_P, started,
        R, P, INTERPRETED,
    )  # fmt: skip
    return here_bits & ~(late & ~bits_of(still_P, P))


@triton.jit
def wait_for(
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
    started = now_ns(INTERPRETED)
    rounds = 0
    while tl.max(waiting_P) > 0:
        seen_P = _look(flag_P, INTERPRETED)
        waiting_P = tl.where(seen_P >= expected, 0, waiting_P)
        rounds += 1
        if GUARD:  # noqa: SIM102  (compiled away)
            if rounds % POLL == 0:
                waiting_P = _still_awaited(
                    own, state, host, notice, notice_stride, cut_at, opened_at, rank, epoch, waiting_P, started,
                    R, P, INTERPRETED,
                )  # fmt: skip
    tl.debug_barrier()
    arrived_P = (awaited_P > 0) & (seen_P >= expected)
    if GUARD:
        # A peer that is an epoch ahead has left this collective: its message is not ours to take.
        newest = tl.max(tl.where(arrived_P, seen_P >> 32, 0))
        arrived_P = arrived_P & ((seen_P >> 32) == epoch)
        if newest > epoch:
            go_on_alone(own, state, opened_at, rank, newest, R, P)
    return arrived_P.to(tl.int32)


@triton.jit
def raise_flag(own, state, flag_at, expected, alive_P, R: tl.constexpr, P: tl.constexpr):
    """Make this program's stores visible everywhere, then raise its flag at the living ranks."""
    r = tl.arange(0, P)
    peer_P = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)
    tl.debug_barrier()
    tl.atomic_max(
        own.to(tl.pointer_type(tl.int64)) + (peer_P + flag_at) // 8, expected + tl.zeros([P], tl.int64),
        mask=alive_P > 0, sem="release", scope="sys",
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
    expected, parity, alive_P = begin(own, state, CUT_AT, GATHER, R, P, GUARD)
    r = tl.arange(0, P)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (column < words) & (r < R)
    value = tl.load(row + column + 0 * r, mask=inside, other=0)
    peer = tl.load(state + MASK + 4 * P + r, mask=r < R, other=0)
    mine = own.to(tl.pointer_type(tl.int64))
    place = ROW // 8 + parity * R * WIDTH
    tl.store(mine + peer // 8 + place + rank * WIDTH + column, value, mask=inside & (alive_P[:, None] > 0))
    raise_flag(own, state, ROW_FLAG + rank * 8, expected, alive_P, R, P)
    draw_ticket(state, expected, GATHER)
    here_P = wait_for(
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
