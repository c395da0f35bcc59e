"""How even a placement is, whether another one is worth its moves, and the window over which load is counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import Floats
from phalanx.elastic.replan.risk import at_risk
from phalanx.elastic.replan.routes import routed_loads
from phalanx.world import EMPTY, Placement, View

Counts = npt.NDArray[np.int64]


def rank_loads(load_LE: npt.ArrayLike, placement: Placement, view: View, *, routed: bool = False) -> Floats:
    """[L, N]: the load that each living rank of `view` is expected to carry, in rank order.

    Replicas of an expert share its load equally, or, `routed`, by the router's rule (`routes`). Load of experts without
    a living replica is nobody's."""
    load = np.asarray(load_LE, np.float64)
    ranks = list(view.ranks)
    if routed:
        return routed_loads(placement, view, load)[:, ranks]
    slots = placement.slots_LP.reshape(load.shape[0], -1, placement.slots_per_rank)[:, ranks].reshape(load.shape[0], -1)
    experts = load.shape[1]
    key = np.arange(load.shape[0])[:, None] * (experts + 1) + slots + 1
    count = np.bincount(key.ravel(), minlength=load.shape[0] * (experts + 1)).reshape(-1, experts + 1)
    part = np.zeros_like(count, np.float64)
    part[:, 1:] = load / np.maximum(count[:, 1:], 1)
    out: Floats = np.where(slots != EMPTY, part.take(key), 0.0).reshape(load.shape[0], len(ranks), -1).sum(axis=2)
    return out


def balancedness(load_LE: npt.ArrayLike, placement: Placement, view: View, *, routed: bool = False) -> float:
    """Mean over max of the living ranks' expected loads, averaged over the layers: 1 is perfectly even, 1/N the worst.

    A layer without load counts as even. All ranks wait for the heaviest, so this is the part of their time that they
    work. LOCAL, pure."""
    loads = rank_loads(load_LE, placement, view, routed=routed)
    most = loads.max(axis=1)
    return float(np.where(most > 0, loads.mean(axis=1) / np.where(most > 0, most, 1.0), 1.0).mean())


def gain(load_LE: npt.ArrayLike, old: Placement, new: Placement, view: View) -> float:
    """Which fraction of the experts' time `new` saves against `old`: 1 - the sums over layers of the heaviest rank's
    load. Negative when `new` is worse. LOCAL, pure."""
    before = rank_loads(load_LE, old, view).max(axis=1).sum()
    after = rank_loads(load_LE, new, view).max(axis=1).sum()
    return float(1 - after / before) if before > 0 else 0.0


def worth_adopting(load_LE: npt.ArrayLike, old: Placement, new: Placement, view: View, min_gain: float) -> bool:
    """Whether a periodic plan is to be adopted: it gains more than `min_gain` (--eplb-min-gain), or a rank's death
    would lose fewer experts under it (the moment after a failure leaves experts unprotected). LOCAL, pure."""
    return gain(load_LE, old, new, view) > min_gain or at_risk(new, view).sum() < at_risk(old, view).sum()


class LoadWindow:
    """Tokens per layer and expert over the last `length` observations, from one rank's counters.

    Counting goes on in the MoE layers, which only ever add; `observe` is called with the counters now and then (every
    few steps) and costs one subtraction. The windows of all ranks are added up by `merge`.
    """

    def __init__(self, num_layers: int, num_experts: int, length: int) -> None:
        assert length > 0, length
        self._parts: deque[Counts] = deque(maxlen=length)
        self._seen = np.zeros((num_layers, num_experts), np.int64)
        self._sum = np.zeros((num_layers, num_experts), np.int64)

    def observe(self, counter_LE: npt.ArrayLike) -> None:
        """Take note of a counter that only grows; one that shrank was started anew."""
        counter = np.array(counter_LE, np.int64)
        assert counter.shape == self._seen.shape, (counter.shape, self._seen.shape)
        part = counter if (counter < self._seen).any() else counter - self._seen
        self._seen = counter
        if len(self._parts) == self._parts.maxlen:
            self._sum -= self._parts[0]
        self._parts.append(part)
        self._sum += part

    @property
    def load_LE(self) -> Counts:
        """int64 [L, E]: what came in over the window. A copy."""
        return self._sum.copy()

    @property
    def full(self) -> bool:
        return len(self._parts) == self._parts.maxlen

    @staticmethod
    def merge(loads: Iterable[npt.ArrayLike]) -> Counts:
        """The load of all ranks from each one's `load_LE`. At least one."""
        total: Counts = np.sum([np.asarray(one, np.int64) for one in loads], axis=0, dtype=np.int64)
        return total
