"""Ranks that leave because an operator wants it: planned, so nothing of theirs is lost while somebody needs it.

Ranks that are to leave say so in their answers to a roll call, each of them for all of them, and the next view is made
without them, whoever plans it, one of them included. A rank that left lives on, takes part in nothing, and its slots
stay readable, so that the others restore from them what nobody else holds; once they serve, the launcher asks it to
end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phalanx.world import EMPTY, IntArray, Member, View


def granted(asking: Sequence[Member], present: int, needed: int) -> tuple[Member, ...]:
    """Who may leave: all that ask, or nobody when fewer than `needed` of the `present` would be left. LOCAL, pure.

    Others may have died since the operator decided. Who is refused stays a member, goes on asking in every later roll
    call, and leaves with the first one that has enough others."""
    return tuple(asking) if present - len(asking) >= needed else ()


def still_readable(
    earlier: Sequence[Member], before_LP: IntArray, held_LP: IntArray, slots_per_rank: int
) -> tuple[Member, ...]:
    """Enter what ranks that left in an earlier change hold into `held_LP` (int32 [L, P], changed in place), as
    `before_LP` knew it: they change nothing any more. Returns them. LOCAL.

    This is for a change that was cut short, by another death, before the others had all they needed."""
    for member in earlier:
        here = slice(member.rank * slots_per_rank, (member.rank + 1) * slots_per_rank)
        held_LP[:, here] = before_LP[:, here]
    return tuple(earlier)


def within(held_LP: IntArray, view: View, slots_per_rank: int) -> IntArray:
    """int32 [L, P]: what the slots of `view`'s members hold, and EMPTY elsewhere: what a plan may build on. LOCAL,
    pure."""
    living = np.repeat(view.mask_R.astype(bool), slots_per_rank)
    return np.where(living, held_LP, EMPTY).astype(np.int32)
