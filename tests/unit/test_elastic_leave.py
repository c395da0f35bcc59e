"""Who may leave, what the others may read of it, and what a plan may build on."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from elastic_doubles import SHAPE, Announcements, HookedStore, answer, member, planner

from phalanx.elastic.agree import Agreed, FakeClock, Limits, RollCall
from phalanx.elastic.leave import granted, within
from phalanx.errors import Evicted, Left
from phalanx.world import EMPTY, View

LIMITS = Limits(roll_call_s=5.0, start_s=30.0, join_s=1.0, succession_s=0.5)


class Table:
    """Roll calls in which some ask to be left out. The others' answers are written before rank 0 holds one."""

    def __init__(self, limits: Limits = LIMITS, starting: int = 0) -> None:
        self.clock = FakeClock()
        self.store = HookedStore(self.clock)
        self.notices = Announcements()
        self.limits, self.shape = limits, dataclasses.replace(SHAPE, starting=starting)

    def rank(self, rank: int) -> RollCall:
        return RollCall(
            member(rank), self.shape, self.limits,
            store=self.store, clock=self.clock, notices=self.notices, plan=planner,
        )  # fmt: skip

    def hold(self, base: Agreed | None, *others: int, leaving: tuple[int, ...] = (), by: int = 0) -> Agreed:
        epoch = (base.epoch if base else 0) + 1
        names = tuple((rank, 0) for rank in leaving)
        for rank in (*others, by):
            mine = msgspec.structs.replace(answer(member(rank), held=rank), leaving=names if rank in leaving else ())
            self.store.set(f"entry/{epoch}/{member(rank)}", msgspec.msgpack.encode(mine))
        trigger = "start" if base is None else "scale"
        return self.rank(by).hold(base, trigger, mine)


def test_all_that_ask_may_leave_or_nobody() -> None:
    two = (member(2), member(3))
    assert granted(two, 4, 2) == two
    assert granted(two, 4, 3) == ()
    assert granted((), 4, 4) == ()


def test_a_view_is_made_without_those_that_leave_and_says_what_they_hold() -> None:
    table = Table()
    base = table.hold(None, 1, 2, 3)
    agreed = table.hold(base, 1, 2, 3, leaving=(2, 3))
    assert (agreed.view.ranks, agreed.trigger) == ((0, 1), "scale")
    assert agreed.leaving == (member(2), member(3))
    assert agreed.held_LP[0, :: SHAPE.slots_per_rank].tolist() == [0, 1, 2, 3]


def test_who_leaves_is_told_so_and_who_is_lost_is_told_something_else() -> None:
    table = Table()
    base = table.hold(None, 1, 2, 3)
    table.hold(base, 1, 2, leaving=(2,))  # and rank 3 does not answer
    with pytest.raises(Left, match=r"2\.0 has left, epoch 2"):
        table.rank(2).follow(base)
    with pytest.raises(Evicted):
        table.rank(3).follow(base)


def test_a_death_besides_makes_a_failure_of_it() -> None:
    table = Table()
    base = table.hold(None, 1, 2, 3)
    table.notices.announce(1, 0)
    agreed = table.hold(base, 2, 3, leaving=(3,))
    assert (agreed.view.ranks, agreed.leaving, agreed.trigger) == ((0, 2), (member(3),), "failure")


def test_the_rank_that_plans_may_be_the_one_that_leaves() -> None:
    table = Table()
    base = table.hold(None, 1, 2, 3)
    with pytest.raises(Left):
        table.hold(base, 1, 2, 3, leaving=(0,))
    agreed = table.rank(1).follow(base)
    assert agreed is not None
    assert agreed.view.ranks == (1, 2, 3)


def test_a_rank_that_left_is_remembered_until_it_is_dead() -> None:
    table = Table()
    base = table.hold(None, 1, 2, 3)
    second = table.hold(base, 1, 2, 3, leaving=(3,))
    third = table.hold(second, 1)
    assert (third.view.ranks, third.leaving, third.trigger) == ((0, 1), (member(3),), "failure")
    assert third.held_LP[0, :: SHAPE.slots_per_rank].tolist() == [0, 1, EMPTY, 3]
    table.notices.announce(3, 0)
    fourth = table.hold(third, 1)
    assert (fourth.leaving, fourth.held_LP[0, 3 * SHAPE.slots_per_rank]) == ((), EMPTY)


def test_nobody_leaves_when_too_few_would_be_left() -> None:
    table = Table(dataclasses.replace(LIMITS, min_ranks=3))
    base = table.hold(None, 1, 2, 3)
    agreed = table.hold(base, 1, 2, 3, leaving=(2, 3))
    assert (agreed.view.ranks, agreed.leaving) == ((0, 1, 2, 3), ())


def test_the_first_meeting_expects_only_those_that_start() -> None:
    table = Table(starting=2)
    agreed = table.hold(None, 1)
    assert (agreed.view.ranks, agreed.view.ep_size) == ((0, 1), SHAPE.ep_size)
    assert table.clock.now() < 0.1


def test_a_plan_builds_only_on_what_members_hold() -> None:
    held_LP = np.arange(8, dtype=np.int32).reshape(1, 8)
    view = View(1, 4, (member(1), member(3)))
    assert within(held_LP, view, 2).tolist() == [[EMPTY, EMPTY, 2, 3, EMPTY, EMPTY, 6, 7]]
