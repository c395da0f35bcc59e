"""`replan`: where each expert's replicas go. `diff`: which slots a rank must fill to get there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.counts import Priority, Safety, protected_experts, replica_counts, safest
from phalanx.elastic.replan.even import even_out
from phalanx.elastic.replan.ground import Ground, survey
from phalanx.elastic.replan.groups import by_groups, fits_groups
from phalanx.elastic.replan.moves import continue_from, fill_missing, keep_slots
from phalanx.elastic.replan.order import Bools, Floats, Ints
from phalanx.elastic.replan.place import Deal, deal, on_one_host, repair
from phalanx.elastic.replan.polish import polish
from phalanx.world import EMPTY, IntArray, Placement, View

ROUNDS, ROUNDS_PACKED = 9, 6
"""Rounds of exchanges at most; a layer that is even, or that nothing helps, leaves them earlier. Where only some ranks
are safe little may be exchanged, and among many slots three rounds more would gain 0.5 % of balance for 15 % of the
time."""

MANY_SLOTS = 128
""""Many" in the sense of ROUNDS_PACKED; with fewer slots there is time."""

WORTH_MOVING = 0.01
"""A plan from scratch must be better balanced by this fraction than one that starts from what is held."""

GROUPS_MAY_COST = 0.01
"""Groups stay on one host when the heaviest ranks carry at most this fraction more than without groups."""


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
    priority: Priority = "even",
) -> Placement:
    """Place every expert of every layer on the living ranks of `view`. LOCAL, pure, deterministic.

    What it guarantees, the first before the second and so on:

    1. Every expert has a live slot.
    2. With two slots for each expert and two ranks: every expert has replicas on two ranks, and on two hosts where no
       host has more than half of the slots. With fewer slots: as few ranks a layer as possible have an expert that
       nobody else has; whom to protect is decided so that the load can be even (see `priority`).
    3. The load is even: replicas of an expert are expected to share its load equally.
    4. What is held stays where it is, where that costs next to no balance.

    load_LE: [L, E] tokens each expert is expected to get; any non-negative numbers.
    slots_per_rank: S, the capacity of a rank in a layer. num_replicas: slots to fill in a layer, evenly over the ranks;
    None: all live ones. The others stay EMPTY. Slots that could only hold a second replica on one rank stay EMPTY too.
    held_LP: [L, P], what each slot holds now; slots of dead ranks are ignored. May be narrower than P: ranks joined.
    num_groups: the router picks groups of experts first (DeepSeek); groups then stay on one host if that costs nothing.
    min_moves: for the moment after a failure. Touch nothing that need not move: fill in experts that no living rank
    holds, in empty slots or in place of surplus replicas, and no more. When nothing is held it is a full plan.
    rank_slots: [R] at most so many slots of each rank (its first ones); None: slots_per_rank everywhere.
    Raises TooFewSlots, and ValueError for what contradicts itself: shapes, loads that are negative or not finite.
    """
    load = _checked_load(load_LE, num_experts)
    _check_settings(view, num_groups, num_replicas, rank_slots, priority)
    if not load.size:
        return Placement(np.zeros((0, view.ep_size * slots_per_rank), np.int32), num_experts, slots_per_rank)
    ground = survey(view, num_experts, slots_per_rank, num_replicas, rank_slots)
    w = _weights(load)
    held = None if held_LP is None else _held_by_living(held_LP, ground, w.shape, view.ep_size, slots_per_rank)
    if held is not None and not (held != EMPTY).any():
        held = None
    if min_moves and held is not None:
        expert = fill_missing(ground, w, held, priority)
    else:
        expert = _full_plan(ground, w, held, num_groups, priority)
    slots = np.full((w.shape[0], view.ep_size, slots_per_rank), EMPTY, np.int32)
    slots[:, ground.rank_N, : expert.shape[2]] = expert
    return Placement(slots.reshape(w.shape[0], -1), num_experts, slots_per_rank)


def _checked_load(load_LE: npt.ArrayLike, num_experts: int) -> Floats:
    load = np.asarray(load_LE, np.float64)
    if num_experts < 1:
        raise ValueError(f"num_experts must be positive, it is {num_experts}")
    if load.ndim != 2 or load.shape[1] != num_experts:
        raise ValueError(f"load must be [layers, {num_experts}], it is {list(load.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        sums = load.sum(axis=1)
    if load.size and not (np.isfinite(sums).all() and load.min() >= 0):
        raise ValueError("load must be finite, in sum too, and not negative")
    return load


def _check_settings(
    view: View, num_groups: int, num_replicas: int | None, rank_slots: Sequence[int] | None, priority: Priority
) -> None:
    if priority not in get_args(Priority):
        raise ValueError(f"priority must be one of {', '.join(get_args(Priority))}, it is {priority!r}")
    if num_groups < 1 or (num_replicas is not None and num_replicas < 1):
        raise ValueError(f"num_groups ({num_groups}) and num_replicas ({num_replicas}) must be positive")
    if rank_slots is not None and (len(rank_slots) != view.ep_size or min(rank_slots, default=0) < 0):
        raise ValueError(f"rank_slots must be {view.ep_size} numbers that are not negative, it is {list(rank_slots)}")


def _weights(load_LE: Floats) -> Floats:
    """Loads scaled to a mean of 1 a layer and kept off zero, so that cold experts and layers are spread out too."""
    mean = load_LE.mean(axis=1, keepdims=True)
    if not mean.all():
        load_LE, mean = np.where(mean > 0, load_LE, 1.0), np.where(mean > 0, mean, 1.0)
    weights: Floats = load_LE / mean + 1e-4
    return weights


def _held_by_living(held_LP: IntArray, ground: Ground, shape: tuple[int, ...], ep_size: int, width: int) -> Ints:
    """int64 [L, N, S]."""
    layers, experts = shape
    held = np.asarray(held_LP)
    if held.ndim != 2 or held.shape[0] != layers or held.shape[1] % width or held.shape[1] > ep_size * width:
        raise ValueError(f"held must be [{layers}, {ep_size * width}], it is {list(held.shape)}")
    if held.dtype.kind not in "iu":
        raise ValueError(f"held must be whole numbers, it is {held.dtype.name}")
    if held.size and (held.max() >= experts or held.min() < EMPTY):
        raise ValueError(f"held names experts outside 0..{experts - 1}")
    every = np.full((layers, ep_size, width), EMPTY, np.int64)
    every[:, : held.shape[1] // width] = held.reshape(layers, -1, width)
    living = every[:, ground.rank_N]
    living[:, np.arange(width) >= ground.slots_N[:, None]] = EMPTY
    return living


def _full_plan(ground: Ground, w_LE: Floats, held_LNS: Ints | None, num_groups: int, priority: Priority) -> Ints:
    """[L, N, M] or, when something is held, [L, N, S] with experts that stay in their slots."""
    experts = w_LE.shape[1]
    safety = safest(ground, experts)
    if safety.protected < experts and priority == "balance":
        safety = Safety(np.zeros(ground.size, bool), 0)
    packed = bool(safety.safe_N.any() and not safety.safe_N.all())
    protected = protected_experts(w_LE, safety, ground, priority)
    counts = _counts(ground, w_LE, protected, packed)
    single = counts == 1
    new = deal(ground, w_LE / counts, counts.copy(), single.copy(), safety.safe_N)
    low = np.where(protected, 2, 1)
    grow = protected if packed else np.ones_like(protected)
    _improve(new, low, grow, priority)
    expert, heaviest = new.expert_LNM, new.load_LN.max(axis=1)
    if not packed and fits_groups(ground, experts, num_groups):
        grouped, load, _ = by_groups(ground, w_LE, 2 if ground.total >= 2 * experts else 1, num_groups, ROUNDS)
        if load.max(axis=1).sum() <= heaviest.sum() * (1 + GROUPS_MAY_COST):
            expert, heaviest = grouped, load.max(axis=1)
    if held_LNS is None:
        return expert
    stays = _good_as_held(ground, held_LNS, w_LE, heaviest, new)
    if stays.all():
        return held_LNS
    kept = continue_from(ground, held_LNS, w_LE, counts.copy(), single.copy(), safety.safe_N)
    _improve(kept, low, grow, priority)
    worse = kept.load_LN.max(axis=1) > heaviest * (1 + WORTH_MOVING)
    worse |= _lone_hosts(kept) > _lone_hosts(new)
    worse |= _exposed(kept.expert_LNM, kept.single_LE) > _exposed(new.expert_LNM, new.single_LE)
    moved = keep_slots(ground, np.where(worse[:, None, None], expert, kept.expert_LNM), held_LNS, experts)
    return np.where(stays[:, None, None], held_LNS, moved)


def _good_as_held(ground: Ground, held_LNS: Ints, w_LE: Floats, heaviest: Floats, new: Deal) -> Bools:
    """[L]: layers whose held slots are a whole plan, no less safe than the new one and about as even. They stay,
    whatever else could be found from there: planning twice for one load must not move anything."""
    layers, experts = w_LE.shape
    used = held_LNS >= 0
    key = np.arange(layers)[:, None, None] * (experts + 1) + np.where(used, held_LNS, experts)
    count = np.bincount(key.ravel(), minlength=layers * (experts + 1)).reshape(layers, experts + 1)[:, :experts]
    good: Bools = (used.sum(axis=2) == ground.fill_N).all(axis=1) & (count > 0).all(axis=1)
    if not good.any():  # the rest is worth its time only where somebody could stay
        return good
    in_order = np.sort(held_LNS, axis=2)
    good &= ~((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] >= 0)).any(axis=(1, 2))
    part = np.append(w_LE / np.maximum(count, 1), np.zeros((layers, 1)), axis=1)
    good &= part.take(key).sum(axis=2).max(axis=1) <= heaviest * (1 + WORTH_MOVING)
    good &= _exposed(held_LNS, count == 1) <= _exposed(new.expert_LNM, new.single_LE)
    if ground.host_matters:
        host = np.broadcast_to(ground.host_N[:, None], held_LNS.shape)[used]
        hosts = np.zeros((layers, ground.num_hosts, experts), bool)
        hosts[np.nonzero(used)[0], host, held_LNS[used]] = True
        good &= ((count > 1) & (hosts.sum(axis=1) == 1)).sum(axis=1) <= _lone_hosts(new)
    return good


def _counts(ground: Ground, w_LE: Floats, protected_LE: Bools, packed: bool) -> Ints:
    """[L, E] replicas. packed: what is not protected gets one, so only the protected few share what is left."""
    ranks = int((ground.fill_N > 0).sum())
    if not packed:
        return replica_counts(w_LE, np.where(protected_LE, 2, 1), np.full(w_LE.shape, ranks), ground.total)
    few = np.flatnonzero(protected_LE).reshape(w_LE.shape[0], -1)
    left = ground.total - w_LE.shape[1] + few.shape[1]
    counts = np.ones(w_LE.shape, np.int64)
    few_counts = replica_counts(w_LE.take(few), np.full(few.shape, 2), np.full(few.shape, ranks), left)
    counts.reshape(-1)[few] = few_counts
    return counts


def _improve(out: Deal, low_LE: Ints, may_grow_LE: Bools, priority: Priority) -> None:
    """Repair a deal, even it out and, if it is small, polish it."""
    repair(out)
    even_out(out, ROUNDS_PACKED if out.packed and out.ground.total > MANY_SLOTS else ROUNDS)
    polish(out, low_LE, may_grow_LE, anyone=priority == "even")


def _exposed(expert_LNM: Ints, single_LE: Bools) -> Ints:
    """[L]: ranks whose death loses an expert."""
    layers, experts = single_LE.shape
    single = single_LE.take(np.arange(0, layers * experts, experts)[:, None, None] + expert_LNM, mode="wrap")
    single &= expert_LNM >= 0
    exposed: Ints = single.any(axis=2).sum(axis=1)
    return exposed


def _lone_hosts(out: Deal) -> Ints:
    """[L]: experts with several replicas, all on one host."""
    if not out.ground.host_matters:
        return np.zeros(out.shape[0], np.int64)
    return np.asarray(on_one_host(out).sum(axis=1), np.int64)


def diff(held_LP: IntArray, placement: Placement, rank: int) -> tuple[Move, ...]:
    """What `rank` must fill, in a good order for a recovery: experts that no living rank holds first. LOCAL, pure.

    held_LP: what each slot holds now; slots of ranks that the placement leaves empty count as dead. Within each half
    the moves go by layer and slot, so that ranks work through the layers together."""
    width = placement.slots_per_rank
    held = np.full(placement.slots_LP.shape, EMPTY, np.int64)
    held[:, : np.shape(held_LP)[1]] = held_LP
    target = placement.of_rank(rank)
    mine = held[:, rank * width : (rank + 1) * width]
    layer, slot = np.nonzero((target != mine) & (target != EMPTY))
    if not layer.size:
        return ()
    serves = (placement.slots_LP != EMPTY).reshape(placement.num_layers, -1, width).any(axis=(0, 2))
    at, p = np.nonzero((held != EMPTY) & np.repeat(serves, width))
    has = np.zeros((placement.num_layers, placement.num_experts), bool)
    has[at, held[at, p]] = True
    expert = target[layer, slot]
    order = np.lexsort((slot, layer, has[layer, expert]))
    return tuple(
        Move(*m) for m in zip(layer[order].tolist(), slot[order].tolist(), expert[order].tolist(), strict=True)
    )
