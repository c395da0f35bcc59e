"""Where each expert's replicas go, for any set of living ranks. Pure, deterministic, numpy only.

placement = replan(load_LE, view, ...)          what each slot is to hold
moves     = diff(held_LP, placement, rank)      which slots this rank must fill
table_LEW = routes(placement, view, rank, width)    which replica a token takes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phalanx.errors import TooFewSlots
from phalanx.world import EMPTY, IntArray, Placement, View


class Move(NamedTuple):
    """One slot of one rank to fill: `expert` of `layer` goes into the local `slot`."""

    layer: int
    slot: int
    expert: int


def replan(
    load_LE: npt.ArrayLike,
    view: View,
    *,
    num_experts: int,
    slots_per_rank: int,
    num_replicas: int | None = None,
    held_LP: IntArray | None = None,
    num_groups: int = 1,
    min_moves: bool = False,
    rank_slots: Sequence[int] | None = None,
) -> Placement:
    """Place every expert of every layer on the living ranks of `view`. LOCAL, pure, deterministic.

    load_LE: [L, E] tokens each expert is expected to get; any non-negative numbers.
    num_replicas: slots to fill in a layer; None: all live ones. slots_per_rank: S, the capacity.
    held_LP: int32 [L, P], what each slot holds now (EMPTY: nothing); slots of dead ranks are ignored.
    min_moves: touch nothing that need not move, fill only what is missing.
    rank_slots: [R] at most so many slots of each rank, None: slots_per_rank everywhere.
    Raises TooFewSlots.
    """
    load = np.nan_to_num(np.asarray(load_LE, np.float64))
    num_layers = load.shape[0]
    slots = np.full((num_layers, view.ep_size * slots_per_rank), EMPTY, np.int32)
    limit = {r: min(slots_per_rank, rank_slots[r] if rank_slots is not None else slots_per_rank) for r in view.ranks}
    capacity = sum(limit.values())
    total = capacity if num_replicas is None else min(capacity, num_replicas)
    if total < num_experts:
        raise TooFewSlots(total, num_experts)
    host = {m.rank: m.host for m in view.members}
    for layer in range(num_layers):
        start = held_LP[layer] if held_LP is not None else None
        _place_layer(slots[layer], load[layer], limit, host, total, start, slots_per_rank, min_moves)
    return Placement(slots, num_experts, slots_per_rank)


def _place_layer(
    out_P: IntArray,
    load_E: npt.NDArray[np.float64],
    limit: dict[int, int],
    host: dict[int, str],
    total: int,
    held_P: IntArray | None,
    width: int,
    min_moves: bool,
) -> None:
    num_experts = load_E.shape[0]
    live = [r * width + s for r in sorted(limit) for s in range(limit[r])]
    count = [0] * num_experts
    if min_moves and held_P is not None:
        for p in live:
            expert = int(held_P[p])
            if expert >= 0:
                out_P[p] = expert
                count[expert] += 1
        wanted = [e for e in range(num_experts) if count[e] == 0]
    else:
        replicas = [1] * num_experts
        for _ in range(min(total, num_experts * len(limit)) - num_experts):
            open_ = [e for e in range(num_experts) if replicas[e] < len(limit)]
            best = min(open_, key=lambda e: (replicas[e] > 1, -load_E[e] / replicas[e], e))
            replicas[best] += 1
        wanted = [e for e in range(num_experts) for _ in range(replicas[e])]
        count = [0] * num_experts
    wanted.sort(key=lambda e: (-load_E[e], e))
    for expert in wanted:
        _place_one(out_P, expert, limit, host, count, load_E, width)


def _place_one(
    out_P: IntArray,
    expert: int,
    limit: dict[int, int],
    host: dict[int, str],
    count: list[int],
    load_E: npt.NDArray[np.float64],
    width: int,
) -> None:
    mine = {r: out_P[r * width : r * width + limit[r]] for r in limit}
    holders = {r for r in limit if expert in mine[r]}
    hosts = {host[r] for r in holders}

    def key(rank: int) -> tuple[bool, bool, int, float, int]:
        used = [int(e) for e in mine[rank] if e >= 0]
        return (rank in holders, host[rank] in hosts, len(used), sum(load_E[e] for e in used), rank)

    free = [r for r in limit if (mine[r] == EMPTY).any()]
    if free:
        rank = min(free, key=key)
        mine[rank][int(np.argmax(mine[rank] == EMPTY))] = expert
    else:
        surplus = [(r, s) for r in limit for s in range(limit[r]) if count[int(mine[r][s])] > 1]
        rank, slot = min(surplus, key=lambda rs: (-count[int(mine[rs[0]][rs[1]])], *key(rs[0]), rs[1]))
        count[int(mine[rank][slot])] -= 1
        mine[rank][slot] = expert
    count[expert] += 1


def diff(held_LP: IntArray, placement: Placement, rank: int) -> tuple[Move, ...]:
    """What `rank` must fill, experts that no living rank holds first. LOCAL, pure."""
    width = placement.slots_per_rank
    target = placement.of_rank(rank)
    mine = held_LP[:, rank * width : (rank + 1) * width]
    layer, slot = np.nonzero((target != mine) & (target != EMPTY))
    served = (placement.slots_LP != EMPTY).reshape(placement.num_layers, -1, width).any(axis=(0, 2))
    live = np.where(np.repeat(served, width), held_LP, EMPTY)
    has = np.zeros((placement.num_layers, placement.num_experts), bool)
    la, p = np.nonzero(live >= 0)
    has[la, live[la, p]] = True
    expert = target[layer, slot]
    order = np.lexsort((slot, layer, has[layer, expert]))
    return tuple(Move(int(layer[i]), int(slot[i]), int(expert[i])) for i in order)


def routes(placement: Placement, view: View, rank: int, width: int, load_LE: npt.ArrayLike | None = None) -> IntArray:
    """int32 [L, E, W]: the slot that a token with key p takes on `rank` is column p % W. LOCAL, pure.

    The rank's own replica comes first; else the living replicas take turns."""
    alive = np.repeat(view.mask_R.astype(bool), placement.slots_per_rank)
    live = Placement(np.where(alive, placement.slots_LP, EMPTY), placement.num_experts, placement.slots_per_rank)
    slots, count = live.slots_LEX, live.count_LE
    column = (np.arange(width) + rank) % np.maximum(count, 1)[:, :, None]
    table = np.take_along_axis(slots, column, axis=2)
    own = np.where(slots // placement.slots_per_rank == rank, slots, EMPTY).max(axis=2)
    own[count == 0] = EMPTY
    return np.ascontiguousarray(np.where(own[:, :, None] >= 0, own[:, :, None], table), np.int32)
