"""How many replicas each expert gets, and which ranks can be made safe when there are fewer than two for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from phalanx.elastic.replan.ground import Ground
from phalanx.elastic.replan.order import Bools, Floats, Ints, descending, turns

Priority = Literal["safety", "even", "balance"]
"""What comes first when slots do not suffice for two replicas of every expert.

safety: as few ranks as possible whose death loses an expert; the hottest experts are the protected ones; then balance.
even: just as few such ranks, but those experts are protected that let the load be even.
balance: replicas go where load is.
"""


@dataclass(frozen=True, eq=False)
class Safety:
    """Which ranks are to hold only experts that have another replica elsewhere.

    safe_N: those ranks. protected: how many experts get two replicas at least; the rest get one each.
    """

    safe_N: Bools
    protected: int


def safest(ground: Ground, num_experts: int) -> Safety:
    """The most ranks that can be made safe with the slots there are. Singles are packed on as few ranks as hold them.

    With P slots for E < P < 2E experts at most P - E experts can have two replicas. k ranks are safe when the others
    have room for all single experts and the protected ones suffice to fill each safe rank with different ones.
    """
    n, total = ground.size, ground.total
    used = ground.sequence_N[ground.fill_N[ground.sequence_N] > 0]
    if used.size < 2:
        return Safety(np.zeros(n, bool), 0)
    if total >= 2 * num_experts:
        return Safety(np.ones(n, bool), num_experts)
    doubles = total - num_experts
    order = used[np.argsort(ground.fill_N[used], kind="stable")]
    best = Safety(np.zeros(n, bool), 0)
    for k in range(1, order.size):
        safe = order[:k]
        needed = max(num_experts - int(ground.fill_N[order[k:]].sum()), int(ground.fill_N[safe].max()))
        # Each protected expert can stand on a rank once, so few of them cannot take many slots.
        needed = max(needed, -(-doubles // (order.size - 1)))
        if needed > doubles:
            break
        mask = np.zeros(n, bool)
        mask[safe] = True
        while needed <= doubles and int(protected_room(ground, mask, doubles + needed).max()) > needed:
            needed += 1
        if needed <= doubles:
            best = Safety(mask, needed)
    return best


def protected_room(ground: Ground, safe_N: Bools, replicas: int) -> Ints:
    """[N]: slots a rank for replicas of protected experts: the safe ranks' all, the rest evenly on the others."""
    room = np.where(safe_N, ground.fill_N, 0)
    others = [i for i in ground.sequence_N if not safe_N[i]]
    left = min(replicas, ground.total) - int(room.sum())
    while left > 0:
        for i in others:
            if left > 0 and room[i] < ground.fill_N[i]:
                room[i] += 1
                left -= 1
    return room


def protected_experts(w_LE: Floats, safety: Safety, ground: Ground, priority: Priority) -> Bools:
    """bool [L, E]: the experts that get two replicas at least.

    In "even" mode the safe ranks' share of the load decides: as many of the hottest as their room allows, then a
    stretch of colder ones that brings the sum of the loads closest to it.
    """
    num_layers, num_experts = w_LE.shape
    m = safety.protected
    if m in (0, num_experts):
        return np.full((num_layers, num_experts), bool(m))
    order_LE = descending(w_LE)
    if priority == "safety":
        place = np.broadcast_to(np.arange(num_experts) < m, (num_layers, num_experts))
    else:
        total = np.zeros((num_layers, num_experts + 1))
        np.cumsum(np.take_along_axis(w_LE, order_LE, 1), axis=1, out=total[:, 1:])
        target = total[:, -1:] * (safety.safe_N.sum() / ground.size)
        hot = np.arange(m + 1)
        least = total[:, hot] + total[:, -1:] - total[:, num_experts - m + hot]
        taken = np.maximum((least <= target).sum(axis=1) - 1, 0)
        rest = m - taken
        start = np.arange(num_experts + 1)[None, :]
        stop = np.minimum(start + rest[:, None], num_experts)
        window = np.take_along_axis(total, stop, 1) - total + np.take_along_axis(total, taken[:, None], 1)
        possible = (start >= taken[:, None]) & (start + rest[:, None] <= num_experts)
        first = np.argmin(np.where(possible, np.abs(window - target), np.inf), axis=1)
        at = np.arange(num_experts)[None, :]
        place = (at < taken[:, None]) | ((at >= first[:, None]) & (at < (first + rest)[:, None]))
    out = np.zeros_like(place)
    np.put_along_axis(out, order_LE, place, axis=1)
    return out


def replica_counts(w_LE: Floats, low_LE: Ints, high_LE: Ints, total: int) -> Ints:
    """int64 [L, E] with `total` replicas a layer, low <= count <= high, and the largest load of a replica minimal.

    Adams' divisor method: the next replica always goes to the expert whose replicas carry most. Instead of one at a
    time, a search for the divisor gives all but the last few at once. w_LE must be positive.
    """
    assert int(low_LE.sum(axis=1).max(initial=0)) <= total <= int(high_LE.sum(axis=1).min(initial=total)), total
    below = np.zeros((w_LE.shape[0], 1))
    above = total / w_LE.sum(axis=1, keepdims=True)
    count = low_LE
    step = above
    for _ in range(7):
        trial = np.minimum(np.maximum(np.ceil(w_LE * step), low_LE), high_LE)
        fits = trial.sum(axis=1, keepdims=True) <= total
        count = np.where(fits, trial, count)
        below, above = np.where(fits, step, below), np.where(fits, above, step)
        step = (below + above) / 2
    count = count.astype(np.int64)
    left = total - count.sum(axis=1, keepdims=True)
    while left.any():
        carried = np.where(count < high_LE, w_LE / count, -1.0)
        second = np.where(count + 1 < high_LE, w_LE / (count + 1), -1.0).max(axis=1, keepdims=True)
        turn = turns(descending(np.maximum(carried, 0.0)))
        sure = (carried >= second) | (turn == 0)
        more = sure & (turn < left) & (carried >= 0)
        count += more
        left = left - more.sum(axis=1, keepdims=True)
    return count
