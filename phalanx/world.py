"""View, Placement, World: who is alive and what each slot is to hold. Frozen values, no torch.

A World is agreed once for an epoch; equal epoch means equal World. Masks read 1 = alive.
Shape suffixes: R ranks, L MoE layers, E experts, S slots a rank, P = R*S slots in all, X replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

EMPTY = -1
"""What a slot that holds no expert says in a placement."""


@dataclass(frozen=True, order=True)
class Member:
    """One process in one rank's place. Identity is (rank, incarnation); the rest says how to reach it.

    host: the host's name, for placement over failure domains.
    pid: process id on that host.
    comm_address: opaque to all but the communicator: how peers map this member's messages.
    weights_address: opaque to all but `elastic.restore`: how peers read this member's expert slots.
    """

    rank: int
    incarnation: int
    host: str = field(default="localhost", compare=False)
    pid: int = field(default=0, compare=False)
    comm_address: str = field(default="", compare=False)
    weights_address: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"


@dataclass(frozen=True)
class View:
    """Who is in, under one epoch. `ep_size` is R, the number of places; `members` are in rank order."""

    epoch: int
    ep_size: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        ranks = [m.rank for m in self.members]
        assert ranks == sorted(set(ranks)), f"members must be in rank order, one a rank: {ranks}"
        assert all(0 <= r < self.ep_size for r in ranks), f"ranks {ranks} outside ep_size {self.ep_size}"

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The living ranks, ascending."""
        return tuple(m.rank for m in self.members)

    @cached_property
    def mask_R(self) -> npt.NDArray[np.uint8]:
        """uint8 [R], 1 = alive."""
        mask = np.zeros(self.ep_size, np.uint8)
        mask[list(self.ranks)] = 1
        mask.flags.writeable = False
        return mask

    def member(self, rank: int) -> Member | None:
        """The member in `rank`'s place, or None when the place is empty."""
        return next((m for m in self.members if m.rank == rank), None)

    def __contains__(self, member: object) -> bool:
        return member in self.members

    def successor(self, epoch: int, members: Iterable[Member]) -> View:
        """The view of a later epoch. LOCAL."""
        assert epoch > self.epoch, f"epochs grow: {self.epoch} -> {epoch}"
        return View(epoch, self.ep_size, tuple(sorted(members)))


@dataclass(frozen=True, eq=False)
class Placement:
    """Where each expert's replicas are to stand.

    slots_LP: int32 [L, P], slot -> expert; EMPTY for slots of dead ranks and for unused ones.
    Slot p belongs to rank p // slots_per_rank and is that rank's local slot p % slots_per_rank.
    """

    slots_LP: IntArray
    num_experts: int
    slots_per_rank: int

    def __post_init__(self) -> None:
        slots = np.ascontiguousarray(self.slots_LP, np.int32)
        assert slots.ndim == 2, slots.shape
        assert slots.shape[1] % self.slots_per_rank == 0, slots.shape
        slots.flags.writeable = False
        object.__setattr__(self, "slots_LP", slots)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placement)
            and self.num_experts == other.num_experts
            and self.slots_per_rank == other.slots_per_rank
            and np.array_equal(self.slots_LP, other.slots_LP)
        )

    def __hash__(self) -> int:
        return hash((self.num_experts, self.slots_per_rank, self.slots_LP.tobytes()))

    @property
    def num_layers(self) -> int:
        return int(self.slots_LP.shape[0])

    @property
    def ep_size(self) -> int:
        return int(self.slots_LP.shape[1]) // self.slots_per_rank

    def of_rank(self, rank: int) -> IntArray:
        """int32 [L, S]: what `rank`'s local slots are to hold."""
        return self.slots_LP[:, rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    @cached_property
    def count_LE(self) -> IntArray:
        """int32 [L, E]: replicas of each expert."""
        cells = self.num_layers * self.num_experts
        count = np.bincount(self._cells[self.slots_LP >= 0], minlength=cells).astype(np.int32)
        count = count.reshape(self.num_layers, self.num_experts)
        count.flags.writeable = False
        return count

    @cached_property
    def slots_LEX(self) -> IntArray:
        """int32 [L, E, X]: the slots of each expert in ascending order, then EMPTY. X = most replicas of any."""
        count = self.count_LE.reshape(-1)
        width = max(1, int(count.max(initial=0)))
        slots = max(1, self.slots_LP.shape[1])
        # Sorting one number for cell and slot is several times as fast as sorting slots by their cells.
        keys = (self._cells * slots + np.arange(self.slots_LP.shape[1]))[self.slots_LP >= 0]
        keys.sort()
        nth = np.arange(keys.size) - np.repeat(np.cumsum(count) - count, count)
        table = np.full(count.size * width, EMPTY, np.int32)
        table[np.repeat(np.arange(count.size), count) * width + nth] = keys % slots
        table.flags.writeable = False
        return table.reshape(self.num_layers, self.num_experts, width)

    @property
    def _cells(self) -> npt.NDArray[np.int64]:
        """[L, P]: layer * E + expert of each slot; of empty ones something else."""
        return np.arange(self.num_layers)[:, None] * self.num_experts + self.slots_LP

    @cached_property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) pairs with no slot at all. A served placement has none."""
        return tuple((int(la), int(e)) for la, e in np.argwhere(self.count_LE == 0))


@dataclass(frozen=True)
class World:
    """What all ranks of one epoch agree on."""

    view: View
    placement: Placement

    @property
    def epoch(self) -> int:
        return self.view.epoch
