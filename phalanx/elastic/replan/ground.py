"""What a plan stands on: the living ranks, their hosts, and how many slots of each are to be filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phalanx.elastic.replan.order import Ints, nth
from phalanx.errors import TooFewSlots
from phalanx.world import View


@dataclass(frozen=True, eq=False)
class Ground:
    """The living ranks of a view, numbered 0..N-1 in rank order. The same for every layer.

    rank_N: the rank of each. host_N: a number for its host, in order of first appearance. slots_N: the slots it has.
    fill_N: how many of them a plan fills.
    """

    rank_N: Ints
    host_N: Ints
    slots_N: Ints
    fill_N: Ints

    @property
    def size(self) -> int:
        return int(self.rank_N.size)

    @cached_property
    def total(self) -> int:
        """Slots to fill in a layer."""
        return int(self.fill_N.sum())

    @cached_property
    def num_hosts(self) -> int:
        return int(self.host_N.max()) + 1

    @cached_property
    def host_matters(self) -> bool:
        """Whether different hosts say more than different ranks: more hosts than one, fewer than ranks."""
        return 1 < self.num_hosts < self.size

    @cached_property
    def sequence_N(self) -> Ints:
        """The living in an order in which neighbours are on different hosts, as far as that can be."""
        return spread(self.host_N)

    @cached_property
    def regular(self) -> bool:
        """Whether all hosts have equally many ranks and all ranks equally many slots."""
        sizes = np.bincount(self.host_N)
        return bool((sizes == sizes[0]).all() and (self.fill_N == self.fill_N[0]).all())


def spread(host_N: Ints) -> Ints:
    """An order of 0..N-1 in which the members of each host lie evenly: the i-th of m stands at (i + 1/2) / m."""
    size = np.bincount(host_N)
    by_host = np.argsort(host_N, kind="stable")
    before = np.empty(host_N.size, np.int64)
    before[by_host] = nth(size)
    mine = size[host_N]
    return np.lexsort((host_N, -mine, (before + 0.5) / mine))


def survey(
    view: View,
    num_experts: int,
    slots_per_rank: int,
    num_replicas: int | None,
    rank_slots: Sequence[int] | None,
) -> Ground:
    """Look at who is alive and decide how many slots each is to fill. Raises TooFewSlots."""
    rank = np.array(view.ranks, np.int64)
    names: dict[str, int] = {}
    host = np.array([names.setdefault(m.host, len(names)) for m in view.members], np.int64)
    slots = np.full(rank.size, slots_per_rank, np.int64)
    if rank_slots is not None:
        slots = np.clip(np.asarray(rank_slots, np.int64)[rank], 0, slots_per_rank)
    # A second copy of an expert on one rank serves nobody, so a rank never fills more slots than there are experts.
    limit = np.minimum(slots, num_experts)
    every = int(limit.sum())
    total = every if num_replicas is None else min(num_replicas, every)
    if total < num_experts:
        raise TooFewSlots(total, num_experts)
    return Ground(rank, host, slots, limit if total == every else pour(limit, total, spread(host)))


def pour(limit_N: Ints, total: int, sequence_N: Ints) -> Ints:
    """[N]: `total` slots, poured evenly over ranks that hold at most `limit_N`; the last few go to the first ranks of
    `sequence_N` that have room."""
    low, high = total // limit_N.size, int(limit_N.max())
    while low < high:
        level = (low + high + 1) // 2
        if int(np.minimum(limit_N, level).sum()) <= total:
            low = level
        else:
            high = level - 1
    fill = np.minimum(limit_N, low)
    more = sequence_N[limit_N[sequence_N] > low]
    fill[more[: total - int(fill.sum())]] += 1
    return fill
