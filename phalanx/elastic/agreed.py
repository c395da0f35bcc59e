"""What ranks say in a roll call, and what comes of it: the values of `elastic.agree`, and how they travel. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from phalanx.messages import Trigger
from phalanx.world import EMPTY, IntArray, Member, Placement, View, World

Digests = npt.NDArray[np.uint64]
Loads = npt.NDArray[np.int64]


class Notices(Protocol):
    """What is known for certain about deaths, `comm.notices.NoticeBoard` in a service."""

    def is_dead(self, member: Member) -> bool: ...

    def cause(self, rank: int) -> str: ...


@dataclass(frozen=True)
class Change:
    """Why the members must meet.

    lost: ranks that seem lost (suspicion, not eviction); causes: why, by rank; detect_s: from the first sign of
    trouble until it was certain, and nothing of the step ran any more; epoch: the highest epoch for which a roll call
    is known to be open, 0 for none.
    """

    trigger: Trigger
    lost: tuple[int, ...] = ()
    causes: Mapping[int, str] = field(default_factory=dict)
    detect_s: float = 0.0
    epoch: int = 0


@dataclass(frozen=True)
class Shape:
    """L, E, R and S of a service, and how many slots beyond one an expert are to be filled in each layer."""

    num_layers: int
    num_experts: int
    ep_size: int
    slots_per_rank: int
    num_redundant: int = 0
    starting: int = 0
    """The ranks that the first meeting expects: those in the first places; 0: all."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds in seconds; how they relate is in docs/assumptions.md.

    roll_call_s: a member that has not answered after so long is out; must exceed comm's time-out and the longest step.
    start_s: the same for the first meeting, where some still load. join_s: how long members wait for a newcomer's
    answer. succession_s: how long the next in line waits for a World from the lower ranks once the roll call is over.
    restore_s: how long peers wait for each other in the first loading. slice_s: how long a rank restores before it
    meets the others again.
    """

    roll_call_s: float = 5.0
    start_s: float = 300.0
    join_s: float = 1.0
    succession_s: float = 0.5
    restore_s: float = 120.0
    slice_s: float = 0.25
    min_ranks: int = 1


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says in a roll call. Arrays travel as bytes: held int32 [L, S], digests uint64 [L, S], load int64
    [L, E]. step: the last step it committed. leaving: who, by (rank, incarnation), is to leave, itself among them, as
    the service is scaled down. scaled: it is a newcomer because the service is scaled up."""

    member: Member
    step: int
    held: bytes
    digests: bytes
    load: bytes
    leaving: tuple[tuple[int, int], ...] = ()
    scaled: bool = False


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """An `Agreed` as it stands in the store; arrays as bytes."""

    epoch: int
    trigger: Trigger
    members: tuple[Member, ...]
    step: int
    replan_s: float
    slots: bytes
    held: bytes
    digests: bytes
    load: bytes
    leaving: tuple[Member, ...] = ()


@dataclass(frozen=True, eq=False)
class Agreed:
    """The outcome of a roll call, the same on every member.

    placement: what each slot is to hold; with `missing` experts when the living have too few slots.
    held_LP: int32 [L, P], what each slot held when its rank answered. digest_LE: uint64 [L, E], 0 = not known.
    load_LE: int64 [L, E], tokens by expert, summed over the members. step: the last step that anybody committed.
    replan_s: what planning cost the one who planned. leaving: ranks outside the view that asked to be left out of it or
    of an earlier one, and still live: what `held_LP` says of their slots can be read.
    """

    view: View
    placement: Placement
    held_LP: IntArray
    digest_LE: Digests
    load_LE: Loads
    trigger: Trigger
    step: int
    replan_s: float
    leaving: tuple[Member, ...] = ()

    @property
    def epoch(self) -> int:
        return self.view.epoch

    @property
    def world(self) -> World:
        return World(self.view, self.placement)


def learn(digest_LE: Digests, answer: Answer, slots_per_rank: int) -> IntArray:
    """Enter a rank's digests in the table where it has none. Returns int32 [L, S], what the rank holds: a slot whose
    digest is not the table's holds nothing, as two versions of one expert must never serve together. LOCAL."""
    held_LS = np.frombuffer(answer.held, np.int32).reshape(-1, slots_per_rank).copy()
    digest_LS = np.frombuffer(answer.digests, np.uint64).reshape(held_LS.shape)
    layer, slot = np.nonzero(held_LS >= 0)
    expert, digest = held_LS[layer, slot], digest_LS[layer, slot]
    new = digest_LE[layer, expert] == 0
    digest_LE[layer[new], expert[new]] = digest[new]
    wrong = digest_LE[layer, expert] != digest
    held_LS[layer[wrong], slot[wrong]] = EMPTY
    return held_LS


def decoded(value: bytes, shape: Shape) -> Agreed:
    """The World that a plan in the store describes. LOCAL."""
    plan = msgspec.msgpack.decode(value, type=Plan)
    layers = shape.num_layers
    return Agreed(
        View(plan.epoch, shape.ep_size, tuple(sorted(plan.members))),
        Placement(
            np.frombuffer(plan.slots, np.int32).reshape(layers, -1).copy(), shape.num_experts, shape.slots_per_rank
        ),
        np.frombuffer(plan.held, np.int32).reshape(layers, -1),
        np.frombuffer(plan.digests, np.uint64).reshape(layers, -1),
        np.frombuffer(plan.load, np.int64).reshape(layers, -1),
        plan.trigger,
        plan.step,
        plan.replan_s,
        plan.leaving,
    )
