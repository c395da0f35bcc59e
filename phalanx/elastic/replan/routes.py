"""Which replica a token takes: the rank's own one, else by shares that even the load out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import Floats, Ints, nth
from phalanx.world import EMPTY, IntArray, Placement, View

ITERATIONS = 6
"""Steps by which shares move load from heavy to light ranks; more change little."""

GOLDEN = 0.6180339887498949


def routes(placement: Placement, view: View, rank: int, width: int, load_LE: npt.ArrayLike | None = None) -> IntArray:
    """int32 [L, E, W]: the global slot that a token with key p takes on `rank` is column p % W. LOCAL, pure.

    `rank`'s own replica takes all of its tokens: they need not travel. Otherwise the living replicas share the columns,
    those on ranks that are expected to carry less get more of them; `load_LE` (None: all experts alike) says what is
    expected. Rounding to whole columns differs from rank to rank, so that it evens out. An expert without a living
    replica has EMPTY in all columns. Every rank gets the same answer for the same arguments.
    """
    assert width > 0, width
    live = _living(placement, view)
    table = np.repeat(live.slots_LEX[:, :, :1], width, axis=2)
    choice = _choice(live)
    if choice.cell.size:
        share = _even_shares(choice, live, view, load_LE)
        table.reshape(-1, width)[choice.cell] = _columns(choice, share, live.num_experts, rank, view, width)
    mine = live.of_rank(rank)
    layer, slot = np.nonzero(mine != EMPTY)
    table[layer, mine[layer, slot]] = (rank * live.slots_per_rank + slot)[:, None]
    return table


def shares(placement: Placement, view: View, load_LE: npt.ArrayLike | None = None) -> Floats:
    """[L, E, X]: which part of the tokens from ranks without an own replica each replica gets, in the order of
    `placement.slots_LEX` without dead ranks' slots. Sums to 1 over X; tokens are taken to come evenly from all ranks.
    """
    live = _living(placement, view)
    layers, experts, most = live.slots_LEX.shape
    out = np.zeros((layers, experts, most))
    out[:, :, 0] = live.count_LE > 0
    choice = _choice(live)
    if choice.cell.size:
        share = _even_shares(choice, live, view, load_LE)
        out.reshape(-1)[choice.cell[choice.row] * most + nth(choice.replicas)] = share
    return out


@dataclass(frozen=True, eq=False)
class _Choice:
    """The experts that have several living replicas, and these replicas one after another.

    cell: layer * E + expert of each. replicas: how many it has. first: where these begin.
    slot: of each replica. row: which of the experts it is of.
    """

    cell: Ints
    replicas: Ints
    first: Ints
    slot: IntArray
    row: Ints


def _choice(live: Placement) -> _Choice:
    slots, count = live.slots_LEX, live.count_LE
    cell = np.flatnonzero(count > 1)
    replicas = count.take(cell).astype(np.int64)
    row = np.repeat(np.arange(cell.size), replicas)
    slot = slots.take(cell[row] * slots.shape[2] + nth(replicas))
    return _Choice(cell, replicas, np.cumsum(replicas) - replicas, slot, row)


def _even_shares(choice: _Choice, live: Placement, view: View, load_LE: npt.ArrayLike | None) -> Floats:
    """What each of the replicas gets of the tokens that travel to its expert."""
    layers, experts = live.count_LE.shape
    load = np.ones((layers, experts)) if load_LE is None else np.asarray(load_LE, np.float64)
    row, living, width = choice.row, len(view.ranks), live.slots_per_rank
    share = (1.0 / choice.replicas)[row]
    if not load.any():
        return share
    rank_of = choice.cell[row] // experts * view.ep_size + choice.slot // width
    local = load.take(choice.cell) / living
    travelling = (local * np.maximum(living - choice.replicas, 0))[row]
    alone = np.flatnonzero(live.count_LE == 1)
    rank_alone = alone // experts * view.ep_size + live.slots_LEX[:, :, 0].take(alone) // width
    ranks = layers * view.ep_size
    still = np.bincount(rank_alone, load.take(alone), ranks) + np.bincount(rank_of, local[row], ranks)
    mean = np.repeat(load.sum(axis=1) / living, view.ep_size)
    for _ in range(ITERATIONS):
        now = still + np.bincount(rank_of, share * travelling, ranks)
        # A step of the multiplicative kind: shares on heavy ranks shrink, those on light ones grow, bounded both ways.
        share *= np.clip(mean / np.maximum(now, 1e-12), 0.5, 2.0).take(rank_of)
        share /= np.bincount(row, share).take(row)
    return share


def routed_loads(placement: Placement, view: View, load_LE: npt.ArrayLike) -> Floats:
    """[L, R]: the load that the router's rule puts on each rank when tokens come evenly from all living ranks."""
    live = _living(placement, view)
    slots, count = live.slots_LEX, live.count_LE
    load = np.asarray(load_LE, np.float64)
    living = len(view.ranks)
    valid = slots != EMPTY
    local = np.minimum(count, living)[:, :, None] / living
    share = shares(placement, view, load) * (1 - local) + np.where(valid, 1.0 / living, 0.0)
    layer = np.arange(load.shape[0])[:, None, None]
    key = np.where(valid, layer * view.ep_size + slots // placement.slots_per_rank, 0)
    part = np.where(valid, share * load[:, :, None], 0.0)
    out = np.bincount(key.ravel(), part.ravel(), load.shape[0] * view.ep_size)
    return np.asarray(out, np.float64).reshape(load.shape[0], -1)


def _living(placement: Placement, view: View) -> Placement:
    """The placement without slots of ranks that are not in the view."""
    alive = np.repeat(view.mask_R.astype(bool), placement.slots_per_rank)
    if alive.all() or not (placement.slots_LP[:, ~alive] != EMPTY).any():
        return placement
    return Placement(np.where(alive, placement.slots_LP, EMPTY), placement.num_experts, placement.slots_per_rank)


def _columns(choice: _Choice, share: Floats, experts: int, rank: int, view: View, width: int) -> IntArray:
    """[K, W]: the slot that each column takes: the cumulated shares cut at W evenly spaced points.

    The points are shifted by less than one column, differently for every rank and expert, so that over the ranks each
    replica gets its share exactly; columns are then strewn, so that neighbouring keys go to different replicas.
    """
    position = view.ranks.index(rank) if rank in view.ranks else len(view.ranks)
    shift = (position * GOLDEN + choice.cell % experts * GOLDEN * GOLDEN) % 1.0
    edge = np.cumsum(share)
    edge -= (edge[choice.first] - share[choice.first])[choice.row]
    # The first point that is not before the edge; the margin makes up for rounding in the sum over all experts.
    until = np.ceil((edge - 1e-9) * width - shift[choice.row]).astype(np.int64)
    until[choice.first + choice.replicas - 1] = width
    points = np.diff(until, prepend=0)
    points[choice.first] = until[choice.first]
    stride = next(s for s in range(max(1, round(width * GOLDEN)), 2 * width + 1) if np.gcd(s, width) == 1)
    strewn = (np.arange(width) * stride + position) % width
    by_point: IntArray = np.repeat(choice.slot, points).reshape(-1, width)
    return by_point.take(strewn, axis=1)
