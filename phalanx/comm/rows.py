"""Which rows go where: what `comm.cpu` copies out of its peers' areas in a dispatch and in a combine. Pure.

The order of everything is (source rank, token, k), so it depends on nothing but the view and the batch. Shapes: T
tokens, K top-k, D width, P = T*K own pairs, M received pairs, N received tokens. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phalanx.comm.segment import Raw

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

Tokens = tuple[int, Raw, Int32Array]
"""What one source offers in a dispatch: its rank, x_TD [T or more, D], slots_P [T*K]."""


@dataclass(frozen=True, slots=True)
class Handle:
    """What a combine must know of its dispatch.

    order_P: int64 [T*K], own pairs sorted by destination rank; bounds: where each rank's begin, by rank.
    cuts: for each source rank that was heard, the range of its pairs in y_MD.
    token_M: int64 [M], the received pairs' tokens, counted through all sources; starts: where each source's begin.
    numbers: for each source that sent some of its tokens only, which those are, int32.
    """

    epoch: int
    tokens: int
    order_P: Int64Array
    bounds: list[int]
    cuts: dict[int, tuple[int, int]]
    token_M: Int64Array
    starts: list[int]
    numbers: dict[int, Int32Array]


@dataclass(frozen=True, slots=True)
class Taken:
    """The tokens that want one of our slots: x_ND raw [N, D], row_M and slot_M int64 [M]; the rest as in `Handle`."""

    x_ND: Raw
    row_M: Int64Array
    slot_M: Int64Array
    cuts: dict[int, tuple[int, int]]
    token_M: Int64Array
    starts: list[int]


def origins(handle: Handle) -> tuple[Int64Array, Int64Array]:
    """Source rank and token within it of each received pair, int64 [M] both."""
    source_M, token_M = np.empty_like(handle.token_M), np.empty_like(handle.token_M)
    for (source, (a, b)), start in zip(handle.cuts.items(), handle.starts, strict=False):
        source_M[a:b] = source
        token_M[a:b] = handle.token_M[a:b] - start
        if source in handle.numbers:
            token_M[a:b] = handle.numbers[source][token_M[a:b]]
    return source_M, token_M


def sort_by_rank(slots_P: Int32Array, ep_size: int, slots_per_rank: int) -> tuple[Int64Array, list[int]]:
    """Own pairs by destination rank, within one in the order of (token, k), and where each rank's begin."""
    rank_P = slots_P // slots_per_rank
    count = np.bincount(rank_P + 1, minlength=ep_size + 1)
    assert count.size == ep_size + 1, f"slot {slots_P.max()} is on no rank"
    return rank_P.argsort(kind="stable"), count.cumsum().tolist()


def wanted_by(rank: int, order_P: Int64Array, bounds: list[int], top_k: int) -> Int64Array:
    """int64 [n]: the tokens that have a pair on `rank`, ascending, each once."""
    token_P = order_P[bounds[rank] : bounds[rank + 1]] // top_k
    first_P = np.ones(len(token_P), bool)
    np.not_equal(token_P[1:], token_P[:-1], out=first_P[1:])
    return token_P[first_P]


def take(
    sources: Sequence[Tokens], rank: int, slots_per_rank: int, top_k: int, hidden: int, raw: type[np.generic]
) -> Taken:
    """Copy from every source, in rank order, the tokens that want one of `rank`'s slots."""
    starts = [0]
    for _, _, slots_P in sources:
        starts.append(starts[-1] + len(slots_P) // top_k)
    flats = [slots_P for _, _, slots_P in sources]
    local_P = (np.concatenate(flats) if len(flats) > 1 else flats[0]) - rank * slots_per_rank
    # As unsigned numbers, -1 and the slots of lower ranks lie above all of ours. Methods cost half of functions.
    hit_M = (local_P.view(np.uint32) < slots_per_rank).nonzero()[0]
    token_M = hit_M // top_k
    first_M = np.ones(len(hit_M), bool)
    np.not_equal(token_M[1:], token_M[:-1], out=first_M[1:])
    token_N = token_M[first_M]
    x_ND = np.empty((len(token_N), hidden), raw)
    at_N, at_M = token_N.searchsorted(starts).tolist(), token_M.searchsorted(starts).tolist()
    cuts = {}
    for i, (source, x_TD, _) in enumerate(sources):
        a, b = at_N[i], at_N[i + 1]
        if a < b:
            x_TD.take(token_N[a:b] - starts[i], 0, x_ND[a:b], "clip")
        cuts[source] = (at_M[i], at_M[i + 1])
    return Taken(x_ND, first_M.cumsum() - 1, local_P[hit_M].astype(np.int64), cuts, token_M, starts)


def place(parts: Sequence[tuple[Int64Array, Raw]], pairs: int, hidden: int, raw: type[np.generic]) -> Raw:
    """Copy rows [n, D] to where their pairs stand (int64 [n], of P): [P, D], zeros for pairs without a row."""
    placed = sum(len(at) for at, _ in parts)
    out: Raw = (np.empty if placed == pairs else np.zeros)((pairs, hidden), raw)
    for at, rows in parts:
        out[at] = rows
    return out
