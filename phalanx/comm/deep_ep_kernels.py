"""The kernel (Triton) between the CUDA communicator's lists and DeepEP's layout, for `deep_ep_device`.

`pack_kernel` runs behind a dispatch: it copies each token that came to its rows of the experts that want it, where it
is also quantized if it travelled as bf16, and writes the counts and where rows came from. It reads how much came on
the device, so its time goes by the tokens, not by the room that there is for them. A combine reads the experts' rows
where they stand: by the list of places that `pack_kernel` leaves. It is LOCAL and waits for no peer.

Shape suffixes: T tokens, D width, K top-k, R ranks (P: padded to a power of two), S slots (local experts) of a rank
(E: padded).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.comm.kernels import element

COPY: tl.constexpr = tl.constexpr(0)
COPY_FP8: tl.constexpr = tl.constexpr(1)
QUANTIZE: tl.constexpr = tl.constexpr(2)


@triton.jit
def _pack_lists(
    program, programs, rows_M, first, count, src_info, layout_range, stats, capacity, with_stats,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, T_MAX: tl.constexpr, LANES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """How many rows each expert got, how many of them from which rank, and each row's token there."""
    lane = tl.arange(0, LANES)
    r = tl.arange(0, P)
    for start in range(program * EXPERTS, S, programs * EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        begin = tl.load(first + e, mask=e < S, other=0)
        number = tl.load(first + e + 1, mask=e < S, other=0) - begin
        came_EP = tl.zeros([EXPERTS, P], tl.int32)
        for done in range(0, tl.max(number), LANES):
            at = done + lane
            here = at[None, :] < tl.minimum(number, capacity)[:, None]
            place = (tl.load(rows_M + begin[:, None] + at[None, :], mask=here, other=0) % (R * T_MAX)).to(tl.int32)
            tl.store(src_info + e[:, None].to(tl.int64) * capacity + at[None, :], place % T_MAX, mask=here)
            source = tl.where(here, place // T_MAX, -1)
            came_EP += tl.sum((source[:, :, None] == r[None, None, :]).to(tl.int32), axis=1)
        before_EP = tl.cumsum(came_EP, 1) - came_EP
        ranges = (before_EP.to(tl.int64) << 32) | came_EP.to(tl.int64)
        tl.store(layout_range + e[:, None] * R + r[None, :], ranges, mask=(e < S)[:, None] & (r < R)[None, :])
        number = tl.maximum(tl.minimum(number, capacity), 0)  # lists of a dispatch that was broken off may not fit
        tl.store(count + e, number, mask=e < S)
        if with_stats:
            tl.store(stats + e, tl.load(stats + e, mask=e < S, other=0) + number, mask=e < S)


@triton.jit
def _quantized(row, round_scale, CHUNK: tl.constexpr):
    """e4m3 as uint8 [CHUNK], and the float32 [CHUNK / 128] that bring it back: `deep_ep_layout.quantize`."""
    groups = tl.reshape(row.to(tl.float32), (CHUNK // 128, 128))
    largest = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-4)
    # Divided as the standard says: a scale that is a power of two already must not be taken for a larger one.
    scale, factor = tl.div_rn(largest, 448.0), tl.div_rn(448.0, largest)
    if round_scale:
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    values = (groups * factor[:, None]).to(tl.float8e4nv)
    return tl.reshape(values, (CHUNK,)).to(tl.uint8, bitcast=True), scale


@triton.jit
def _pack_rows(
    program, programs, x, scales, position, first, counts, packed, packed_scales, places, capacity, round_scale,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    D: tl.constexpr, T_MAX: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Each token that came, or these columns of it, to its places. It is read, and quantized, once.

    Place: expert * capacity + row, or -1. Token t of rank r is unit t * R + r, whatever the counts are, and whose a
    position is follows from where all experts' lists begin. So only the token itself is read after something else was:
    with few tokens, loads that wait for each other are most of the time.
    """
    k = tl.arange(0, KP)
    chunk = program % CHUNKS
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    groups = chunk * (CHUNK // 128) + tl.arange(0, CHUNK // 128)
    unit, stride = program // CHUNKS, programs // CHUNKS
    pair_K = (unit % R * T_MAX + unit // R) * K + k
    at_K = tl.load(position + pair_K, mask=(k < K) & (unit // R < T_MAX), other=-1)
    count_P = tl.load(counts + tl.arange(0, P), mask=tl.arange(0, P) < R, other=0)
    parity = tl.load(counts + P)
    e = tl.arange(0, E)
    first_E = tl.load(first + e, mask=e < S, other=0x7FFFFFFF)
    units = tl.max(count_P) * R
    while unit < units:
        came = unit // R < element(count_P, unit % R, P)
        at_K = tl.where(came, at_K, -1)
        wanted = tl.max(at_K) >= 0
        row = tl.cast((parity * R + unit % R) * T_MAX + unit // R, tl.int64)
        value = tl.load(x + row * D + cols, mask=wanted & (cols < D), other=0.0)
        if HOW == COPY_FP8:
            scale = tl.load(scales + row * (D // 128) + groups, mask=wanted & (groups < D // 128), other=0.0)
        # An expert without rows begins where the next one does: of those that begin at or before a position, the last.
        begun_KE = first_E[None, :] <= at_K[:, None]
        slot_K = tl.sum(begun_KE.to(tl.int32), axis=1) - 1
        local_K = at_K - tl.max(tl.where(begun_KE, first_E[None, :], 0), axis=1)
        # Of a dispatch that was broken off, programs may have written lists that do not fit each other.
        fits_K = (at_K >= 0) & (slot_K >= 0) & (local_K >= 0) & (local_K < capacity)
        place_K = tl.where(fits_K, slot_K * capacity + local_K, -1)
        if chunk == 0:
            tl.store(places + pair_K, place_K, mask=came & (k < K))
        if HOW == QUANTIZE:
            value, scale = _quantized(value, round_scale, CHUNK)
        unit += stride
        pair_K = (unit % R * T_MAX + unit // R) * K + k
        at_K = tl.load(position + pair_K, mask=(k < K) & (unit < units), other=-1)
        for j in tl.static_range(K):
            place = element(place_K, j, KP)
            if place >= 0:
                tl.store(packed + place.to(tl.int64) * D + cols, value, mask=cols < D)
                if HOW != COPY:
                    # An expert's scales stand group by group: one of each of its rows, then the next group's.
                    slot = (place // capacity).to(tl.int64)
                    group_at = slot * (D // 128 - 1) * capacity + place + groups.to(tl.int64) * capacity
                    tl.store(packed_scales + group_at, scale, mask=groups < D // 128)


@triton.jit(do_not_specialize=["capacity", "with_stats", "round_scale"], do_not_specialize_on_alignment=["stats"])
def pack_kernel(
    x, scales, position, rows_M, first, counts,
    packed, packed_scales, places, count, src_info, layout_range, stats, capacity, with_stats, round_scale,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    D: tl.constexpr, T_MAX: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LISTS: tl.constexpr,
    LANES: tl.constexpr, EXPERTS: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """What a dispatch brought (its lists, see `received.DeviceDispatched`) in DeepEP's layout. LOCAL.

    Grid: LISTS programs that write the lists, then any multiple of CHUNKS that move rows. capacity: rows an expert has
    room for; more do not come, unless a token names an expert twice: those are dropped.
    """
    pid = tl.program_id(0)
    movers = tl.num_programs(0) - LISTS
    if pid >= LISTS:
        _pack_rows(
            pid - LISTS, movers, x, scales, position, first, counts, packed, packed_scales, places, capacity,
            round_scale, R, P, S, E, K, KP, D, T_MAX, CHUNK, CHUNKS, HOW,
        )  # fmt: skip
    else:
        _pack_lists(
            pid, LISTS, rows_M, first, count, src_info, layout_range, stats, capacity, with_stats,
            R, P, S, T_MAX, LANES, EXPERTS,
        )  # fmt: skip
