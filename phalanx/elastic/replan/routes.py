"""Which replica a token takes: the rank's own one, else by shares that even the load out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import Floats, Ints
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
    slots, count = _living(placement, view)
    layers, experts, most = slots.shape
    table = np.empty((layers, experts, width), np.int32)
    table[...] = slots[:, :, :1]
    own = np.where(slots // placement.slots_per_rank == rank, slots, EMPTY).max(axis=2)
    if most > 1:
        layer, expert = np.nonzero((count > 1) & (own == EMPTY))
        share = shares(placement, view, load_LE)[layer, expert]
        column = _columns(share, count[layer, expert], expert, rank, view, width)
        table[layer, expert] = np.take_along_axis(slots[layer, expert], column, 1)
    here = np.nonzero(own != EMPTY)
    table[here] = own[here][:, None]
    return table


def shares(placement: Placement, view: View, load_LE: npt.ArrayLike | None = None) -> Floats:
    """[L, E, X]: which part of the tokens from ranks without an own replica each replica gets, in the order of
    `placement.slots_LEX` without dead ranks' slots. Sums to 1 over X; tokens are taken to come evenly from all ranks.
    """
    slots, count = _living(placement, view)
    layers, experts, most = slots.shape
    valid = np.arange(most) < count[:, :, None]
    out: Floats = np.where(valid, 1.0 / np.maximum(count, 1)[:, :, None], 0.0)
    load = np.ones((layers, experts)) if load_LE is None else np.asarray(load_LE, np.float64)
    if most == 1 or not load.any():
        return out
    layer, expert = np.nonzero(count > 1)
    replicas, living = count[layer, expert], len(view.ranks)
    # One entry a replica, not X an expert: few experts have many.
    row = np.repeat(np.arange(layer.size), replicas)
    first = np.cumsum(replicas) - replicas
    nth = np.arange(row.size) - first[row]
    cell = layer[row] * view.ep_size + slots[layer[row], expert[row], nth] // placement.slots_per_rank
    local = load[layer, expert] / living
    travelling = (local * np.maximum(living - replicas, 0))[row]
    one_layer, one = np.nonzero(count == 1)
    base = one_layer * view.ep_size + slots[one_layer, one, 0] // placement.slots_per_rank
    cells = layers * view.ep_size
    still = np.bincount(base, load[one_layer, one], cells) + np.bincount(cell, local[row], cells)
    mean = np.repeat(load.sum(axis=1) / living, view.ep_size)
    share = 1.0 / replicas[row]
    for _ in range(ITERATIONS):
        now = still + np.bincount(cell, share * travelling, cells)
        # A step of the multiplicative kind: shares on heavy ranks shrink, those on light ones grow, bounded both ways.
        share = share * np.clip(mean / np.maximum(now, 1e-12), 0.5, 2.0).take(cell)
        share /= np.add.reduceat(share, first)[row]
    out[layer[row], expert[row], nth] = share
    return out


def routed_loads(placement: Placement, view: View, load_LE: npt.ArrayLike) -> Floats:
    """[L, R]: the load that the router's rule puts on each rank when tokens come evenly from all living ranks."""
    slots, count = _living(placement, view)
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


def _living(placement: Placement, view: View) -> tuple[IntArray, IntArray]:
    """The placement's tables without slots of ranks that are not in the view."""
    alive = np.repeat(view.mask_R.astype(bool), placement.slots_per_rank)
    if alive.all() or not (placement.slots_LP[:, ~alive] != EMPTY).any():
        return placement.slots_LEX, placement.count_LE
    live = Placement(np.where(alive, placement.slots_LP, EMPTY), placement.num_experts, placement.slots_per_rank)
    return live.slots_LEX, live.count_LE


def _columns(share_KX: Floats, count_K: IntArray, expert_K: Ints, rank: int, view: View, width: int) -> Ints:
    """[K, W]: which replica each column takes: the cumulated shares cut at W evenly spaced points.

    The points are shifted by less than one column, differently for every rank and expert, so that over the ranks each
    replica gets its share exactly; columns are then strewn, so that neighbouring keys go to different replicas.
    """
    position = view.ranks.index(rank) if rank in view.ranks else len(view.ranks)
    shift = (position * GOLDEN + expert_K * GOLDEN * GOLDEN) % 1.0
    stride = next(s for s in range(max(1, round(width * GOLDEN)), 2 * width + 1) if np.gcd(s, width) == 1)
    strewn = (np.arange(width) * stride + position) % width
    point = (strewn[None, :] + shift[:, None]) / width
    column = np.zeros(point.shape, np.int64)
    edge = np.zeros(len(point))
    for replica in range(share_KX.shape[1] - 1):
        edge += share_KX[:, replica]
        more = np.nonzero(count_K > replica + 1)[0]
        column[more] += point[more] >= edge[more, None] - 1e-12
    return column
