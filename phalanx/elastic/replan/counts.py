"""How many replicas each expert gets, and which ranks can be made safe when there are fewer than two for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from phalanx.elastic.replan.ground import Ground, pour
from phalanx.elastic.replan.order import Bools, Floats, Ints, along, descending, turns

Priority = Literal["even", "safety", "balance"]
"""What comes first when slots do not suffice for two replicas of every expert.

even: as few ranks as possible whose death loses an expert; those experts are protected that let the load be even.
safety: just as few such ranks; the hottest experts are the protected ones, whatever that does to balance.
balance: replicas go where load is.
"""


ALONE = 0.5
"""An expert that carries more than this part of what a rank carries on average is too hot to have one replica."""

CLOSE = 0.02
"""Cold experts are protected for the sake of balance as long as the safe ranks' share is met within this part of it."""


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
    fill = ground.fill_N[order]
    # What the first k ranks to be safe ask for at least: it grows with k, so look from the top down.
    beyond = np.maximum(num_experts - (total - np.cumsum(fill)), fill)[:-1]
    # Each protected expert can stand on a rank once, so few of them cannot take many slots.
    least = np.maximum(beyond, -(-doubles // (order.size - 1)))
    for k in range(int((least <= doubles).sum()), 0, -1):
        needed = int(least[k - 1])
        mask = np.zeros(n, bool)
        mask[order[:k]] = True
        while needed <= doubles and int(protected_room(ground, mask, doubles + needed).max()) > needed:
            needed += 1
        if needed <= doubles:
            return Safety(mask, needed)
    return Safety(np.zeros(n, bool), 0)


def protected_room(ground: Ground, safe_N: Bools, replicas: int) -> Ints:
    """[N]: slots a rank for replicas of protected experts: the safe ranks' all, the rest evenly on the others."""
    room = np.where(safe_N, ground.fill_N, 0)
    left = min(replicas, ground.total) - int(room.sum())
    return room + pour(ground.fill_N - room, left, ground.sequence_N) if left > 0 else room


def protected_experts(w_LE: Floats, safety: Safety, ground: Ground, priority: Priority) -> Bools:
    """bool [L, E]: the experts that get two replicas at least."""
    num_layers, num_experts = w_LE.shape
    m = safety.protected
    if m in (0, num_experts):
        return np.full((num_layers, num_experts), bool(m))
    flat = along(descending(w_LE))
    if priority == "safety":
        place = np.broadcast_to(np.arange(num_experts) < m, (num_layers, num_experts))
    else:
        place = _mixture(w_LE.take(flat), safety, ground)
    out = np.empty(w_LE.shape, bool)
    out.reshape(-1)[flat] = place
    return out


def _mixture(w_LE: Floats, safety: Safety, ground: Ground) -> Bools:
    """bool [L, E]: whom to protect so that the safe ranks carry their share and no more, for loads in falling order.

    First the hottest: those that would weigh down a rank alone, though no more of them than the safe ranks can bear.
    Then some of the coldest, to stand beside these. The rest is a stretch from between that brings the sum closest to
    the safe ranks' share. Where that share asks for more load, fewer or none are cold ones.
    """
    (num_layers, num_experts), m = w_LE.shape, safety.protected
    ranks = int(safety.safe_N.sum())
    sums = np.zeros((num_layers, num_experts + 1))
    np.cumsum(w_LE, axis=1, out=sums[:, 1:])
    whole = sums[:, -1:]
    mean, share = whole / ground.size, whole * (ranks / ground.size)
    # With h hottest ones and else only coldest ones the safe ranks carry this; the hottest replica is the other limit.
    hottest = np.arange(m + 1)
    carried = (sums[:, : m + 1] + whole - sums[:, num_experts - m + hottest]) / ranks
    replicas = min(ground.size, ground.total - num_experts - m + 2)
    limit = np.maximum(np.maximum(carried, mean * ALONE), w_LE[:, :1] / replicas)
    fine = w_LE[:, : m + 1] <= limit
    fine[:, m] = True
    hot = fine.argmax(axis=1)[:, None]
    few = np.array(sorted({0, m // 4, m // 2}))
    rest = np.maximum(m - hot - few, 0)
    known = np.take_along_axis(sums, hot, 1) + whole - sums[:, num_experts - few]
    # The further down a stretch begins the less it carries: search for the last one that brings at least the share.
    flat, row = sums.ravel(), np.arange(num_layers)[:, None] * (num_experts + 1)
    low, last = row + hot + np.zeros_like(rest), row + np.maximum(num_experts - few - rest, hot)
    missing = share - known
    for bit in reversed(range(int((last - low).max()).bit_length())):
        trial = np.minimum(low + (1 << bit), last)
        low = np.where(flat.take(trial + rest) - flat.take(trial) >= missing, trial, low)
    at = np.stack([low, np.minimum(low + 1, last)])
    miss = np.abs(flat.take(at + rest) - flat.take(at) - missing)
    after = miss[1] < miss[0]
    at, off = np.where(after, at[1], at[0]), np.where(after, miss[1], miss[0])
    off[hot + few > m] = np.inf
    # As many cold ones as come about as close to the share as fewer would.
    best = few.size - 1 - (off <= off.min(axis=1, keepdims=True) + CLOSE * share)[:, ::-1].argmax(axis=1)[:, None]
    at, cold = np.take_along_axis(at, best, 1) - row, few[best]
    start = np.arange(num_experts)
    chosen: Bools = (start < hot) | ((start >= at) & (start < at + m - hot - cold)) | (start >= num_experts - cold)
    return chosen


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
    # Where only a few are left to give, one by one is quicker.
    for _ in range(7 if total - int(low_LE.sum(axis=1).min(initial=total)) > 3 else 0):
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
