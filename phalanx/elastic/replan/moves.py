"""Plans that start from what the slots hold: fill what is missing and nothing else, or improve with few moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.counts import Priority, protected_room
from phalanx.elastic.replan.ground import Ground
from phalanx.elastic.replan.order import Bools, Floats, Ints, along, ascending, descending, turns
from phalanx.elastic.replan.place import Deal
from phalanx.world import EMPTY

HOST_HAS_ONE, OTHER_KIND, HAS_ONE, LOSES_SAFETY = 1, 2, 4, 8
"""What speaks against a rank that a replica could be put on, the last the most: its host has one; it is safe and the
expert is single, or neither; it has one itself; it is safe, and would not be any more."""


def fill_missing(ground: Ground, w_LE: Floats, held_LNS: Ints, priority: Priority) -> Ints:
    """[L, N, S]: what is held, with every expert that no slot holds put somewhere, and nothing else changed. LOCAL.

    A slot to fill is looked for in this order: an empty one, as long as the budget allows; a second replica on one
    rank; one of three or more replicas; one of two, the coldest expert's first ("balance": wherever load is least).
    Among equals the lightest rank takes the hottest missing expert.
    """
    layers, ranks, width = held_LNS.shape
    out = held_LNS.copy()
    flat = out.reshape(layers, -1)
    count, part, load = _held_loads(flat, w_LE, ranks)
    missing = count == 0
    times = missing.sum(axis=1)
    rows = np.nonzero(times)[0]
    if not rows.size:
        return out
    hottest_first = descending(np.where(missing[rows], w_LE[rows] + 1.0, 0.0))[:, : int(times.max())]
    cost = _costs(ground, flat[rows], count[rows], w_LE[rows], priority)
    count, load, part, times = count[rows], load[rows], part[rows], times[rows]
    # Loads stay far below 1 so that they decide within one step of the cost only.
    scale = 1 / (w_LE[rows].sum(axis=1) * 64)
    room = ground.total - (flat[rows] != EMPTY).sum(axis=1)
    empties = bool((flat[rows] == EMPTY).any())
    open_ = np.arange(rows.size)
    for k in range(int(times.max())):
        open_ = open_[times[open_] > k]
        price = cost[open_].reshape(open_.size, ranks, width) + (load[open_] * scale[open_, None])[:, :, None]
        price = price.reshape(open_.size, -1)
        if empties:
            price[(room[open_] <= 0)[:, None] & (flat[rows[open_]] == EMPTY)] += 1e9
        at = price.argmin(axis=1)
        layer, expert = rows[open_], hottest_first[open_, k]
        gone = flat[layer, at]
        flat[layer, at] = expert
        cost[open_, at] = np.inf
        load[open_, at // width] += w_LE[layer, expert]
        room[open_[gone == EMPTY]] -= 1
        evicted = gone != EMPTY
        if evicted.any():
            _evict(
                open_[evicted], layer[evicted], gone[evicted], at[evicted] // width, flat, cost, count, load, part, w_LE
            )
    return out


def _held_loads(flat_LP: Ints, w_LE: Floats, ranks: int) -> tuple[Ints, Floats, Floats]:
    """Replicas and load a replica of each expert, and the load of each rank."""
    layers, experts = w_LE.shape
    shifted = np.arange(layers)[:, None] * (experts + 1) + flat_LP + 1
    count = np.bincount(shifted.ravel(), minlength=layers * (experts + 1)).reshape(layers, experts + 1)
    part = np.zeros((layers, experts + 1))
    part[:, 1:] = w_LE / np.maximum(count[:, 1:], 1)
    load = part.take(shifted).reshape(layers, ranks, -1).sum(axis=2)
    return count[:, 1:], part[:, 1:], load


def _costs(ground: Ground, flat_LP: Ints, count_LE: Ints, w_LE: Floats, priority: Priority) -> Floats:
    """[L, P]: what it costs to give up a slot, in whole steps; infinite where it must stay."""
    layers, experts = w_LE.shape
    ranks = ground.size
    width = flat_LP.shape[1] // ranks
    key = np.arange(layers)[:, None] * experts + np.maximum(flat_LP, 0)
    count = count_LE.take(key)
    if priority == "balance":
        pair_cost = np.full(count.shape, 3.0)
    else:
        hotness = np.empty((layers, experts))
        np.put_along_axis(hotness, descending(w_LE), np.arange(experts, 0.0, -1.0)[None, :], axis=1)
        pair_cost = 3.0 + hotness.take(key)
    cost = np.where(count > 2, 2.0, np.where(count == 2, pair_cost, np.inf))
    by_rank = flat_LP.reshape(layers, ranks, width)
    ordered = np.sort(by_rank, axis=2)
    if ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any():
        earlier = np.tri(width, width, -1, bool)
        twice = ((by_rank[..., :, None] == by_rank[..., None, :]) & earlier).any(axis=-1) & (by_rank >= 0)
        cost[twice.reshape(layers, -1)] = 1.0
    filled = (by_rank != EMPTY).sum(axis=2)
    beyond = filled >= ground.fill_N
    empty = np.where(np.repeat(beyond, width, axis=1), 0.5, 0.0)
    usable = (np.arange(width) < ground.slots_N[:, None]).ravel()
    cost = np.where(flat_LP == EMPTY, empty, cost)
    cost[:, ~usable] = np.inf
    return cost


def _evict(
    row: Ints, layer: Ints, gone: Ints, rank: Ints, flat: Ints, cost: Floats, count: Ints, load: Floats, part: Floats,
    w_LE: Floats,
) -> None:  # fmt: skip
    """Book that one replica of each `gone` expert was given up; the last one left is then nobody's to take."""
    load[row, rank] -= part[row, gone]
    count[row, gone] -= 1
    last = count[row, gone] == 1
    hit = flat[layer[last]] == gone[last][:, None]
    where = cost[row[last]]
    where[hit] = np.inf
    cost[row[last]] = where


def keep_slots(ground: Ground, expert_LNM: Ints, held_LNS: Ints, num_experts: int) -> Ints:
    """[L, N, S]: each rank's experts in its slots, those that it holds already where they are. New ones go to empty
    slots first."""
    layers, ranks, width = held_LNS.shape
    held = np.where(np.arange(width) < ground.slots_N[:, None], held_LNS, EMPTY)
    # As narrow as can be: this is a large table.
    slot_of = np.full((layers * ranks, num_experts + 1), -1, np.min_scalar_type(-width))
    cell = np.arange(layers * ranks)[:, None]
    slot_of[cell, held.reshape(-1, width)] = np.arange(width)
    slot_of[:, -1] = -1
    expert = expert_LNM.reshape(layers * ranks, -1)
    slot = slot_of[cell, expert]
    out = np.full((layers * ranks, width), EMPTY, np.int64)
    row, at = np.nonzero(slot >= 0)
    out[row, slot[row, at]] = expert[row, at]
    usable = np.broadcast_to(np.arange(width) < ground.slots_N[:, None], held.shape).reshape(-1, width)
    rank_key = (out != EMPTY) * 2 + (held.reshape(-1, width) != EMPTY) + 4 * ~usable
    free = np.argsort(rank_key, axis=1, kind="stable")
    new = (slot < 0) & (expert >= 0)
    nth = np.cumsum(new, axis=1) - 1
    row, at = np.nonzero(new)
    out[row, free[row, nth[row, at]]] = expert[row, at]
    return out.reshape(layers, ranks, width)


def continue_from(
    ground: Ground, held_LNS: Ints, w_LE: Floats, count_LE: Ints, single_LE: Bools, safe_N: Bools
) -> Deal:
    """A deal that keeps as much of what is held as the replica counts and the slots to fill allow. LOCAL.

    Surplus replicas go, those on the heaviest ranks first; then what is missing goes to the lightest ranks with room,
    heaviest first, on hosts that have none of it where there is such a one.
    """
    part = w_LE / count_LE
    kept = _keep(ground, held_LNS, part, count_LE, single_LE, safe_N)
    expert, part_LNM, out_count = _pack(ground, kept, part)
    out = Deal(ground, expert, part_LNM, part_LNM.sum(axis=2), count_LE, single_LE, safe_N)
    _fill_holes(out, part, out_count)
    if ground.host_matters:
        out.count_hosts()
    return out


def _keep(ground: Ground, held_LNS: Ints, part_LE: Floats, count_LE: Ints, single_LE: Bools, safe_N: Bools) -> Ints:
    """[L, N, S] what of the held may stay: no expert more often than it should, no rank fuller than it should be."""
    layers, ranks, width = held_LNS.shape
    experts = part_LE.shape[1]
    flat = held_LNS.reshape(layers, -1).copy()
    layer_key = np.arange(layers)[:, None] * experts
    part = np.where(flat >= 0, part_LE.take(layer_key + np.maximum(flat, 0)), 0.0)
    load = part.reshape(layers, ranks, width).sum(axis=2)
    if safe_N.any() and not safe_N.all():
        single = (flat >= 0) & single_LE.take(layer_key + np.maximum(flat, 0))
        flat[single & np.repeat(safe_N, width)] = EMPTY
        # Ranks that are not safe leave room for the singles: they keep few replicas of protected experts.
        others = ((flat >= 0) & ~single).reshape(layers, ranks, width)
        room = protected_room(ground, safe_N, ground.total - int(single_LE[0].sum()))
        flat[(others & (np.cumsum(others, axis=2) > room[:, None])).reshape(layers, -1)] = EMPTY
    # Replicas sorted by (expert, load of their rank): of each expert the first few stay.
    turn = np.repeat(turns(ascending(load)), width, axis=1)
    key = (np.where(flat >= 0, flat, experts) * ranks + turn) * width * ranks + np.arange(ranks * width)
    key.sort(axis=1)
    place = key % (ranks * width)
    expert = key // (width * ranks) // ranks
    fresh = np.ones(expert.shape, bool)
    fresh[:, 1:] = expert[:, 1:] != expert[:, :-1]
    column = np.arange(ranks * width)
    nth = column - np.maximum.accumulate(np.where(fresh, column, 0), axis=1)
    allowed = np.concatenate([count_LE, np.zeros((layers, 1), np.int64)], axis=1)
    same_rank = np.zeros(expert.shape, bool)
    same_rank[:, 1:] = ~fresh[:, 1:] & (place[:, 1:] // width == place[:, :-1] // width)
    stays = (nth < np.take_along_axis(allowed, expert, 1)) & ~same_rank
    mask = np.empty_like(stays)
    np.put_along_axis(mask, place, stays, axis=1)
    flat[~mask] = EMPTY
    kept = flat.reshape(layers, ranks, width)
    # A rank that holds more than it is to fill gives up its last ones.
    over = np.cumsum(kept != EMPTY, axis=2) > ground.fill_N[:, None]
    kept[over] = EMPTY
    return kept


def _pack(ground: Ground, kept_LNS: Ints, part_LE: Floats) -> tuple[Ints, Floats, Ints]:
    """Move what stays to the front of each rank's row of M places. Also counts each expert's."""
    layers, experts = part_LE.shape
    width = int(ground.fill_N.max())
    order = np.argsort(kept_LNS == EMPTY, axis=2, kind="stable")
    expert = np.take_along_axis(kept_LNS, order, 2)[:, :, :width]
    key = np.arange(layers)[:, None, None] * experts + expert
    part = np.where(expert >= 0, part_LE.take(np.maximum(key, 0)), 0.0)
    count = np.bincount(key[expert >= 0], minlength=layers * experts).reshape(layers, experts)
    return np.ascontiguousarray(expert), part, count


def _fill_holes(out: Deal, part_LE: Floats, kept_LE: Ints) -> None:
    """Put the replicas that are still to be placed into the holes, heaviest first, on the lightest rank that fits."""
    ground = out.ground
    layers, ranks, width, experts = out.shape
    need = np.maximum(out.count_LE - kept_LE, 0)
    times = need.sum(axis=1)
    if not times.any():
        return
    # One of each layer at a time. Layers with most to do come first: those with something left are always the first n.
    layer = np.argsort(-times, kind="stable")
    times = times[layer]
    wanted = along(descending(part_LE * (need > 0)))[layer].ravel()
    wanted = wanted[need.take(wanted) > 0]
    copies = need.take(wanted)
    item = np.zeros((layers, int(times[0])), np.int64)  # which of the wanted
    item[np.arange(item.shape[1]) < times[:, None]] = np.repeat(np.arange(wanted.size), copies)
    part, expert = part_LE.take(wanted), wanted % experts
    against = _against(out, wanted)
    step = float(out.load_LN.max() + part_LE.max()) * 2 + 1.0  # more than any rank's load
    several = bool((out.count_LE.take(wanted) > 1).any())
    filled = (out.expert_LNM >= 0).sum(axis=2)[layer]
    load = np.where(filled < ground.fill_N, out.load_LN[layer], np.inf)
    for k in range(item.shape[1]):
        n = int((times > k).sum())
        row, one = np.arange(n), item[:n, k]
        objections = against.take(one, axis=0)
        rank = (load[:n] + step * objections).argmin(axis=1)
        slot, more = filled[row, rank], part.take(one)
        cell = layer[:n] * ranks + rank
        out.expert_LNM.reshape(-1)[cell * width + slot] = expert.take(one)
        out.part_LNM.reshape(-1)[cell * width + slot] = more
        out.load_LN.reshape(-1)[cell] += more
        filled[row, rank] += 1
        load[row, rank] = np.where(slot + 1 < ground.fill_N.take(rank), load[row, rank] + more, np.inf)
        double = (objections[row, rank] & HAS_ONE) > 0
        if double.any():
            out.doubled.append(np.stack([layer[:n][double], rank[double], slot[double]]))
        if several:
            against[one] |= np.int8(HOST_HAS_ONE) * (ground.host_N == ground.host_N.take(rank)[:, None])
            against[one, rank] |= HAS_ONE


def _against(out: Deal, wanted: Ints) -> npt.NDArray[np.int8]:
    """[U, N]: what else than load speaks against a rank for each of the replicas that are wanted, flat layer and
    expert: the sum of HOST_HAS_ONE, OTHER_KIND, HAS_ONE and LOSES_SAFETY."""
    layers, _, _, experts = out.shape
    number = np.full(layers * experts, -1)
    number[wanted] = np.arange(wanted.size)
    layer, rank, slot = np.nonzero(out.expert_LNM >= 0)
    held = number.take(layer * experts + out.expert_LNM[layer, rank, slot])
    held, rank = held[held >= 0], rank[held >= 0]
    on_host = np.zeros((wanted.size, out.ground.num_hosts), np.int8)
    on_host[held, out.ground.host_N[rank]] = HOST_HAS_ONE
    against = on_host.take(out.ground.host_N, axis=1)
    against[held, rank] |= HAS_ONE
    if out.packed:
        single = out.single_LE.take(wanted)[:, None]
        against |= np.where(out.safe_N == single, OTHER_KIND, 0).astype(np.int8)
        against |= np.where(out.safe_N & single, LOSES_SAFETY, 0).astype(np.int8)
    return against
