"""Public stand-ins for the failure path's surroundings: a store one can look into, a notice board, answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from phalanx.elastic.agree import Answer, MemoryStore, Shape
from phalanx.elastic.store import Clock
from phalanx.world import Member, Placement, View

SHAPE = Shape(num_layers=1, num_experts=8, ep_size=4, slots_per_rank=8)


def member(rank: int, incarnation: int = 0) -> Member:
    return Member(rank, incarnation, "here", 1000 + rank, f"comm:{rank}.{incarnation}", f"bank:{rank}.{incarnation}")


class NamedAnswer(Answer, frozen=True, array_like=True):
    """An answer of which a test can ask the digest of its first slot."""

    @property
    def digest_of_first(self) -> int:
        return int(np.frombuffer(self.digests, np.uint64)[0])


def answer(who: Member, held: int | None = None, digest: int | None = None) -> NamedAnswer:
    """A rank that holds one expert in its first slot, or nothing."""
    held_LS = np.full((SHAPE.num_layers, SHAPE.slots_per_rank), -1, np.int32)
    digest_LS = np.zeros(held_LS.shape, np.uint64)
    if held is not None:
        held_LS[0, 0], digest_LS[0, 0] = held, digest if digest is not None else 1000 + held
    load_LE = np.ones((SHAPE.num_layers, SHAPE.num_experts), np.int64)
    return NamedAnswer(who, 10 + who.rank, held_LS.tobytes(), digest_LS.tobytes(), load_LE.tobytes())


def planner(trigger: Any, view: View, held_LP: Any, load_LE: Any) -> Placement:
    """Everything on the lowest rank."""
    slots = np.full(held_LP.shape, -1, np.int32)
    first = view.ranks[0] * SHAPE.slots_per_rank
    slots[:, first : first + SHAPE.num_experts] = np.arange(SHAPE.num_experts)
    return Placement(slots, SHAPE.num_experts, SHAPE.slots_per_rank)


class Announcements:
    """A notice board."""

    def __init__(self) -> None:
        self._dead: dict[int, int] = {}

    def announce(self, rank: int, incarnation: int) -> None:
        self._dead[rank] = incarnation

    def forget(self) -> None:
        self._dead.clear()

    def is_dead(self, member: Member) -> bool:
        return self._dead.get(member.rank, -1) >= member.incarnation

    def cause(self, rank: int) -> str:
        return "signal"


class HookedStore(MemoryStore):
    """A store that lets something else happen right before an operation."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.before_get: Callable[[str], Any] | None = None
        self.before_compare_set: Callable[[str], Any] | None = None

    def get(self, key: str) -> bytes | None:
        if self.before_get is not None:
            self.before_get(key)
        return super().get(key)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        if self.before_compare_set is not None and key.startswith("world/"):
            self.before_compare_set(key)
        return super().compare_set(key, expected, desired)

    def size(self) -> int:
        """Bytes of all keys and values."""
        return sum(len(key) + len(value) for key, value in self._values.items())
