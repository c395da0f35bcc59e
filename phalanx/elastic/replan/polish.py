"""A closer look at small layers: exchanges and changes of the replica counts, one layer at a time."""

from __future__ import annotations

import numpy as np

from phalanx.elastic.replan.order import Bools, Floats, Ints
from phalanx.elastic.replan.place import MANY, Deal

SMALL = 192
"""Slots times experts up to which a layer is small: there a few heavy replicas decide, and there is time to look."""

PATIENCE = 12
"""Steps without a new best after which the search of a layer ends."""

BUDGET = 400
"""Steps in all: some 50 ms at most."""


def polish(out: Deal, low_LE: Ints, may_grow_LE: Bools, anyone: bool = False) -> None:
    """Search small layers by exchanges and replacements, also through worse states, never through one twice. LOCAL.

    A replacement gives a slot to another expert: one replica less here, one more there, so that what the large cases
    get from counts alone is corrected where few replicas make up a rank. low_LE: replicas of each at least.
    may_grow_LE: experts that may get more. anyone: whoever is protected may change, as long as no more ranks are
    exposed. (This is a tabu search; it draws no random numbers.)
    """
    _, ranks, width, experts = out.shape
    if ranks < 2 or ranks * width * experts > SMALL:
        return
    budget, anyone = BUDGET, anyone and out.packed
    if anyone:
        low_LE, may_grow_LE = np.ones_like(low_LE), np.ones_like(may_grow_LE)
    for layer in np.argsort(-out.load_LN.max(axis=1) / out.load_LN.mean(axis=1), kind="stable").tolist():
        weight = out.count_LE[layer] * _parts(out, layer)
        least = weight.sum() / ranks * 1.005
        best, best_cost, fails = out.expert_LNM[layer].copy(), float(_cost(out.load_LN[layer])), 0
        seen = {_key(best)}
        most_exposed = _exposed(best, experts) if anyone else None
        while fails < PATIENCE and budget > 0 and out.load_LN[layer].max() > least:
            budget -= 1
            if not _step(out, layer, weight, low_LE[layer], may_grow_LE[layer], seen, most_exposed):
                break
            cost = float(_cost(out.load_LN[layer]))
            if cost < best_cost * (1 - 1e-9):
                best, best_cost, fails = out.expert_LNM[layer].copy(), cost, 0
            else:
                fails += 1
        if (best != out.expert_LNM[layer]).any():
            _rebuild(out, layer, best, weight)


def _key(expert: Ints) -> bytes:
    """The same for layers that differ only in the order of slots on a rank, or of ranks."""
    rows = np.sort(expert, axis=1)
    return rows[np.lexsort(rows.T[::-1])].tobytes()


def _exposed(expert: Ints, num_experts: int) -> int:
    """Ranks whose death loses an expert."""
    single = np.bincount(expert[expert >= 0], minlength=num_experts + 1) == 1
    return int((single[expert] & (expert >= 0)).any(axis=1).sum())


def _step(
    out: Deal, layer: int, weight: Floats, low_E: Ints, may_grow_E: Bools, seen: set[bytes], most_exposed: int | None
) -> bool:
    """Carry out the best change of a layer that leads to a state not seen yet; False when there is none. most_exposed:
    ranks; None: single experts do not come to safe ranks."""
    expert = out.expert_LNM[layer]
    swap = _swaps(out, layer, most_exposed is None)
    replaced = _replacements(out, layer, weight, low_E, may_grow_E)
    renamed = np.zeros(0) if most_exposed is None else _renamings(out, layer, weight)
    costs = np.concatenate([swap.ravel(), replaced.ravel(), renamed.ravel()])
    for at in np.argsort(costs, kind="stable")[:64].tolist():
        if not np.isfinite(costs[at]):
            return False
        after = expert.copy().ravel()
        if at < swap.size:
            p, q = divmod(at, swap.shape[1])
            after[p], after[q] = after[q], after[p]
        elif at < swap.size + replaced.size:
            p, new = divmod(at - swap.size, replaced.shape[1])
            after[p] = new
        else:
            p, q = divmod(at - swap.size - replaced.size, weight.size)
            after = np.where(after == p, q, np.where(after == q, p, after))
        after = after.reshape(expert.shape)
        if most_exposed is not None and _exposed(after, weight.size) > most_exposed:
            continue
        if (key := _key(after)) not in seen:
            seen.add(key)
            _rebuild(out, layer, after, weight)
            return True
    return False


def _rebuild(out: Deal, layer: int, expert: Ints, weight: Floats) -> None:
    """Let a layer be this one."""
    used = expert >= 0
    count = np.bincount(expert[used], minlength=weight.size)
    out.expert_LNM[layer], out.count_LE[layer], out.single_LE[layer] = expert, count, count == 1
    out.part_LNM[layer] = np.where(used, (weight / count)[expert], 0.0)
    out.load_LN[layer] = out.part_LNM[layer].sum(axis=1)
    if out.ground.host_matters:
        rank, slot = np.nonzero(used)
        out.room_LHE[layer] = np.where(count > 1, count - 1, MANY)
        np.subtract.at(out.room_LHE[layer], (out.ground.host_N[rank], expert[rank, slot]), 1)


def _holds(expert: Ints, num_experts: int) -> Bools:
    """[N, E]: which rank holds which expert of a layer."""
    holds: Bools = (expert[:, :, None] == np.arange(num_experts)).any(axis=1)
    return holds


def _parts(out: Deal, layer: int) -> Floats:
    """[E]: the load of one replica of each."""
    part = np.zeros(out.shape[3])
    used = out.expert_LNM[layer] >= 0
    part[out.expert_LNM[layer][used]] = out.part_LNM[layer][used]
    return part


def _cost(load: Floats) -> Floats:
    """The heaviest rank's load, and a little of the others': the sum of the eighth powers, its eighth root."""
    cost: Floats = load.max(axis=-1) + 1e-3 * (load**8).sum(axis=-1) ** 0.125
    return cost


def _swaps(out: Deal, layer: int, keep_safe: bool) -> Floats:
    """[P, P]: the cost after exchanging two slots' replicas; infinite where that is not allowed."""
    _, ranks, width, _ = out.shape
    expert, part = out.expert_LNM[layer].ravel(), out.part_LNM[layer].ravel()
    rank = np.repeat(np.arange(ranks), width)
    holds, single = _holds(out.expert_LNM[layer], out.shape[3]), out.single_LE[layer]
    used = expert >= 0
    bad = (
        ~used[:, None] | ~used[None, :] | holds[rank[None, :], expert[:, None]] | holds[rank[:, None], expert[None, :]]
    )
    if out.packed and keep_safe:
        bad |= (single[expert] & used)[:, None] & out.safe_N[rank][None, :]
        bad |= (single[expert] & used)[None, :] & out.safe_N[rank][:, None]
    if out.ground.host_matters:
        host = out.ground.host_N[rank]
        full = out.room_LHE[layer][host[None, :], expert[:, None]] <= 0
        lone = full & (host[:, None] != host[None, :])
        bad |= lone | lone.T
    load = np.broadcast_to(out.load_LN[layer], (expert.size, expert.size, ranks)).copy()
    delta = part[:, None] - part[None, :]
    i, j = np.indices(delta.shape)
    load[i, j, rank[:, None]] -= delta
    load[i, j, rank[None, :]] += delta
    return np.where(bad, np.inf, _cost(np.maximum(load, 0.0)))


def _renamings(out: Deal, layer: int, weight: Floats) -> Floats:
    """[E, E]: the cost after two experts changed places wherever they are: no rank's exposure changes by that."""
    holds, part = _holds(out.expert_LNM[layer], out.shape[3]).T, 1 / np.maximum(out.count_LE[layer], 1)
    more = weight[None, :] - weight[:, None]
    load = out.load_LN[layer] + holds[:, None, :] * (more * part[:, None])[:, :, None]
    load = load - holds[None, :, :] * (more * part[None, :])[:, :, None]
    return np.where(np.tri(weight.size, dtype=bool), np.inf, _cost(np.maximum(load, 0.0)))


def _replacements(out: Deal, layer: int, weight: Floats, low_E: Ints, may_grow_E: Bools) -> Floats:
    """[P, E]: the cost after giving a slot to another expert; infinite where that is not allowed."""
    _, ranks, width, _ = out.shape
    expert, count = out.expert_LNM[layer].ravel(), out.count_LE[layer]
    holds = _holds(out.expert_LNM[layer], weight.size)
    rank = np.repeat(np.arange(ranks), width)
    bad = (expert < 0)[:, None] | (count <= low_E)[expert][:, None] | ~may_grow_E[None, :] | holds[rank]
    if out.ground.host_matters:
        host = out.ground.host_N[rank]
        hosts = np.stack([holds[out.ground.host_N == h].sum(axis=0) for h in range(out.ground.num_hosts)], axis=1)[
            expert
        ]
        after = hosts.copy()
        after[np.arange(expert.size), host] -= 1
        bad |= ((hosts > 0).sum(axis=1) > 1)[:, None] & ((after > 0).sum(axis=1) < 2)[:, None]
    part = weight / count
    less = weight / np.maximum(count - 1, 1)
    more = weight / (count + 1)
    load = out.load_LN[layer][None, None, :] + (holds * (less - part)).T[expert][:, None, :]
    load = load + (holds * (more - part)).T[None, :, :]
    at = np.arange(expert.size)
    load[at, :, rank] += more[None, :] - less[expert][:, None]
    return np.where(bad, np.inf, _cost(np.maximum(load, 0.0)))
