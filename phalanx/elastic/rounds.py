"""From one placement to another while both are served: which experts to stage, round by round. Pure.

A round is a whole placement. What it has more than the one before goes into slots that are EMPTY until then, so nothing
that serves is touched; what it has less is let go only once the expert stands everywhere it is wanted. So whoever dies,
and whenever, each expert has at least the replicas that the worse of the two placements gives it.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan import balancedness, gain, replan, worth_adopting
from phalanx.world import EMPTY, IntArray, Member, Placement, View

Bools = npt.NDArray[np.bool_]

STAGED_PART = 8
"""A round stages at most this part of the experts that a rank holds, though always one layer: the memory it takes."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What to plan for. slots: int32 [L, P], served now; load: int64 [L, E]. Arrays are bytes: it goes to a process."""

    members: tuple[Member, ...]
    ep_size: int
    num_experts: int
    slots_per_rank: int
    num_replicas: int
    slots: bytes
    load: bytes
    min_gain: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. rounds: int32 [L, P] each, none when what is served may stay.

    balancedness: of what is served now, then of each round. gain: of the whole plan (`replan.gain`)."""

    rounds: tuple[bytes, ...] = ()
    balancedness: tuple[float, ...] = ()
    gain: float = 0.0


def solve(problem: Problem) -> Outcome:
    """Plan, and say in which rounds to get there, if it is worth it. LOCAL, pure.

    Worth it: it gains more than `min_gain`, or an expert would be safer, or replicas are missing (after a failure)."""
    view = View(0, problem.ep_size, problem.members)
    load_LE = np.frombuffer(problem.load, np.int64).reshape(-1, problem.num_experts)
    slots_LP = np.frombuffer(problem.slots, np.int32).reshape(load_LE.shape[0], -1)
    if not load_LE.any():
        load_LE = np.ones_like(load_LE)  # nothing was served yet: all are alike
    now = Placement(slots_LP, problem.num_experts, problem.slots_per_rank)
    target = replan(
        load_LE,
        view,
        num_experts=problem.num_experts,
        slots_per_rank=problem.slots_per_rank,
        num_replicas=problem.num_replicas,
        held_LP=slots_LP,
    )
    even = balancedness(load_LE, now, view)
    gained = gain(load_LE, now, target, view)
    fuller = bool((target.count_LE.sum(axis=1) > now.count_LE.sum(axis=1)).any())
    if not (fuller or worth_adopting(load_LE, now, target, view, problem.min_gain)):
        return Outcome(balancedness=(even,), gain=gained)
    way = rounds(now, target)
    return Outcome(
        rounds=tuple(step.slots_LP.tobytes() for step in way),
        balancedness=(even, *(balancedness(load_LE, step, view) for step in way)),
        gain=gained,
    )


def rounds(now: Placement, target: Placement, part: int = STAGED_PART) -> tuple[Placement, ...]:
    """The placements on the way from `now` to where `target` has each expert; the slots within a rank may differ from
    `target`'s. Empty when there is nothing to do. Ends early where no rank has an EMPTY slot to go on with. LOCAL."""
    layers, width = now.num_layers, now.slots_per_rank
    wanted = _holds(target.slots_LP.reshape(layers, -1, width), now.num_experts)
    slots = now.slots_LP.reshape(layers, -1, width)
    budget = int((slots != EMPTY).sum(axis=(0, 2)).max(initial=0)) // part
    way: list[Placement] = []
    while (after := _next(slots, wanted, budget)) is not None:
        way.append(Placement(after.reshape(layers, -1), now.num_experts, width))
        slots = after
    return tuple(way)


def _next(slots_LRS: IntArray, wanted_LRE: Bools, budget: int) -> IntArray | None:
    """One round on; None when there is none. Whole layers, as long as no rank stages more than `budget` experts."""
    has = _holds(slots_LRS, wanted_LRE.shape[2])
    new = slots_LRS.copy()
    spent = np.zeros(slots_LRS.shape[1], np.int64)
    for layer in np.flatnonzero((has != wanted_LRE).any(axis=(1, 2))):
        now, wanted = slots_LRS[layer], wanted_LRE[layer]
        lacks = wanted & ~has[layer]
        room = (now == EMPTY).sum(axis=1)
        staged = lacks & (np.cumsum(lacks, axis=1) <= room[:, None])
        cost = staged.sum(axis=1)
        if spent.any() and (spent + cost).max() > budget:
            continue
        spent += cost
        there = has[layer] | staged
        settled = ~(wanted & ~there).any(axis=0)
        leaves = has[layer] & ~wanted & settled
        for rank in np.flatnonzero(cost):
            free = np.flatnonzero(now[rank] == EMPTY)[: cost[rank]]
            new[layer, rank, free] = np.flatnonzero(staged[rank])
        for rank in np.flatnonzero(leaves.any(axis=1)):
            gone = (now[rank] != EMPTY) & leaves[rank, now[rank]]
            new[layer, rank, gone] = EMPTY
    return None if np.array_equal(new, slots_LRS) else new


def _holds(slots_LRS: IntArray, num_experts: int) -> Bools:
    """[L, R, E]: which rank has which expert."""
    held = np.zeros((*slots_LRS.shape[:2], num_experts), bool)
    layer, rank, slot = np.nonzero(slots_LRS != EMPTY)
    held[layer, rank, slots_LRS[layer, rank, slot]] = True
    return held
