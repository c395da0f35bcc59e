"""How a newcomer comes in without making anybody wait: it prepares alone, and the plan of its meeting moves nothing.

Before it asks to be let in, a newcomer plans the World in which it will be one of the members, with the same planner as
everybody, and fills the slots that this plan gives it: from the vault or live peers' memory, which costs nobody
anything, or from disk.
The plan stays behind in the store as its wish. When the members let it in, whoever plans the next World plans nothing
new: what all hold stays where it is (`settled`), the newcomer's slots included, and those of the others are given up
that the wish has no use for. So the restore of a join is empty for everyone, and healthy ranks feel a step boundary.

A wish may be old by then: a rank died meanwhile, or another newcomer came. It is only a wish: an expert is given up
only where the others hold as many replicas of it as were wished for, and what nobody holds is restored as ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from phalanx.elastic.agree import Agreed, Digests, Shape
from phalanx.elastic.replan import replan
from phalanx.errors import TooFewSlots
from phalanx.world import EMPTY, IntArray, Member, Placement, View


def hoped_for(last: Agreed, members: Sequence[Member], me: Member, held_LS: IntArray, shape: Shape) -> Placement | None:
    """The plan in which `me` and `members` serve what `last` serves; None when they cannot hold all. LOCAL, pure.

    members: the living of the last view, and others that are coming. held_LS: int32 [L, S], what `me` holds already."""
    by_rank = {m.rank: m for m in (*members, me)}
    view = View(last.epoch + 1, shape.ep_size, tuple(sorted(by_rank.values())))
    try:
        return replan(
            last.load_LE,
            view,
            num_experts=shape.num_experts,
            slots_per_rank=shape.slots_per_rank,
            num_replicas=shape.num_experts + shape.num_redundant,
            held_LP=_with_own(last.placement, me.rank, held_LS),
        )
    except TooFewSlots:
        return None


def to_read_from(last: Agreed, digest_LE: Digests) -> Agreed:
    """`last` as a restore is to see it that takes no part in it: members hold what is placed. LOCAL, pure.

    digest_LE: all that is known. An expert without one is read from no peer: its slot may just be being filled."""
    placed_LP = last.placement.slots_LP
    layer = np.arange(placed_LP.shape[0])[:, None]
    known = (placed_LP >= 0) & (digest_LE[layer, np.maximum(placed_LP, 0)] != 0)
    return dataclasses.replace(last, held_LP=np.where(known, placed_LP, EMPTY).astype(np.int32), digest_LE=digest_LE)


def held_by_all(last: Agreed, me: Member, held_LS: IntArray) -> IntArray:
    """int32 [L, P]: what all slots hold as `me` prepares: the members' as placed, its own as they are. LOCAL, pure."""
    return _with_own(last.placement, me.rank, held_LS)


def settled(held_LP: IntArray, wish: Placement, view: View, newcomers: Sequence[int]) -> IntArray:
    """int32 [L, P]: what is to stay of what is held, so that nothing moves and `wish` comes as near as that allows.

    Newcomers keep all that they brought. The others give a slot up when the wish has something else or nothing there,
    and at least as many replicas of its expert stay as are wished for. LOCAL, pure."""
    width = wish.slots_per_rank
    living = np.repeat(view.mask_R.astype(bool), width)
    is_new = np.isin(np.arange(held_LP.shape[1]) // width, newcomers)
    wish_LP = np.where(living, wish.slots_LP, EMPTY)
    stays = (held_LP >= 0) & ((held_LP == wish_LP) | is_new)
    need_LE = np.maximum(_count(wish_LP, wish.num_experts), 1) - _count(
        np.where(stays, held_LP, EMPTY), wish.num_experts
    )
    for layer, slot in np.argwhere((held_LP >= 0) & ~stays).tolist():
        expert = held_LP[layer, slot]
        if need_LE[layer, expert] > 0:
            need_LE[layer, expert] -= 1
            stays[layer, slot] = True
    return np.where(stays, held_LP, EMPTY).astype(np.int32)


def _count(slots_LP: IntArray, num_experts: int) -> IntArray:
    """int32 [L, E]: slots of each expert."""
    layers = slots_LP.shape[0]
    key = np.arange(layers)[:, None] * (num_experts + 1) + slots_LP + 1
    return np.bincount(key.ravel(), minlength=layers * (num_experts + 1)).reshape(layers, -1)[:, 1:].astype(np.int32)


def _with_own(placement: Placement, rank: int, held_LS: IntArray) -> IntArray:
    slots_LP = placement.slots_LP.copy()
    width = placement.slots_per_rank
    slots_LP[:, rank * width : (rank + 1) * width] = held_LS
    return slots_LP
