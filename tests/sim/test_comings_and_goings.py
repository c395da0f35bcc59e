"""Stories of scaling: ranks that leave or are added because an operator wants it, and whoever dies meanwhile."""

from __future__ import annotations

import dataclasses

import pytest
from sim_cluster import LIMITS, Process
from test_recovery import Story

from phalanx.elastic.agree import Limits, Shape
from phalanx.elastic.recover import Adoption

FOUR = Shape(num_layers=2, num_experts=12, ep_size=4, slots_per_rank=12)
"""Every rank holds three experts a layer that nobody else holds."""

POINTS = ("step", "roll_call", "replan", "restore", "barrier", "adopt")


def story(shape: Shape = FOUR, limits: Limits = LIMITS) -> Story:
    told = Story(shape, limits)
    told.requests(count=8, length=40)
    return told


def leave(told: Story, *ranks: int, at_s: float = 0.02) -> None:
    told.sim.after(at_s, lambda: told.cluster.scale_down(ranks))


def add(told: Story, *ranks: int, at_s: float = 0.02) -> list[Process]:
    started: list[Process] = []

    def start() -> None:
        started.extend(told.cluster.start(rank, 1, scaled=True) for rank in ranks)

    told.sim.after(at_s, start)
    return started


def members(told: Story) -> list[str]:
    return [str(m) for m in told.cluster.latest_members()]


def of_epoch(told: Story, epoch: int) -> dict[int, Adoption]:
    """By rank, what it adopted under an epoch."""
    return {m.rank: a for m, a in told.cluster.adoptions if a.world.epoch == epoch}


@pytest.mark.parametrize("ranks", [(2, 3), (0, 2), (0,), (1, 2, 3)])
def test_ranks_leave_in_one_change_and_give_the_others_all_that_they_hold(ranks: tuple[int, ...]) -> None:
    told = story()
    leave(told, *ranks)
    told.run()
    stay = [rank for rank in range(4) if rank not in ranks]
    assert members(told) == [f"{rank}.0" for rank in stay]
    felt = of_epoch(told, 2)
    assert sorted(felt) == stay
    for adoption in felt.values():
        assert (adoption.trigger, adoption.left, adoption.lost) == ("scale", ranks, ())
        assert dict(adoption.causes) == {}
    restored = [source for adoption in felt.values() for source in adoption.bytes_restored]
    assert set(restored) == {"peer"}, "the ranks that leave still live, and are faster than the disk"
    assert all(told.ranks[rank].left and not told.ranks[rank].alive for rank in ranks)


def test_a_rank_leaves_that_only_another_one_has_named() -> None:
    told = story()

    told.ranks[3].deaf = True  # the word to it never comes
    leave(told, 2, 3)
    told.run()
    assert members(told) == ["0.0", "1.0"]
    assert len(told.cluster.worlds) == 2


def test_ranks_are_added_in_vacant_places_and_the_others_restore_nothing_for_them() -> None:
    told = story(dataclasses.replace(FOUR, starting=2))
    add(told, 2, 3)
    told.run()
    assert members(told) == ["0.0", "1.0", "2.1", "3.1"]
    assert len(told.cluster.worlds[1].view.members) == 2
    later = [(m.rank, a) for m, a in told.cluster.adoptions if a.world.epoch > 1]
    assert {a.trigger for _, a in later} == {"scale"}
    assert all(bool(a.bytes_restored) == (rank >= 2) for rank, a in later if rank < 2 or a.lost == ())
    filled = [int((told.cluster.worlds[max(told.cluster.worlds)].placement.of_rank(r) >= 0).sum()) for r in range(4)]
    assert filled == [6, 6, 6, 6]


@pytest.mark.parametrize("who", ["one that leaves", "one that stays", "the one that plans"])
@pytest.mark.parametrize("point", POINTS)
def test_a_death_while_ranks_leave_is_one_more_change(who: str, point: str) -> None:
    told = story()
    leaving, victim = ((0, 3), 0) if who == "one that leaves" else ((2, 3), {"one that stays": 1}.get(who, 0))
    leave(told, *leaving)
    told.sim.after(0.0201, lambda: told.on(victim, point, "kill"))
    told.run()
    dead = {victim} if who != "one that leaves" or told.ranks[victim].left else set()
    stay = [rank for rank in range(4) if rank not in {*leaving, *dead}]
    assert members(told) == [f"{rank}.0" for rank in stay]
    assert not told.cluster.cannot_serve


@pytest.mark.parametrize("point", ["restore", "barrier"])
def test_what_ranks_hold_that_left_can_be_had_until_the_others_serve(point: str) -> None:
    told = story(dataclasses.replace(FOUR, num_redundant=12))  # two replicas of each expert, on two ranks
    every = [(layer, expert) for layer in range(2) for expert in range(12)]
    told.sim.after(0.019, lambda: told.cluster.disk.missing.update(every))
    leave(told, 2, 3)
    told.sim.after(0.0201, lambda: told.on(1, point, "kill"))
    told.run()
    assert members(told) == ["0.0"]
    alone = of_epoch(told, 3)[0]
    assert (alone.lost, alone.left) == ((1,), (2, 3))
    assert set(alone.bytes_restored) == {"peer"}
    assert not told.cluster.cannot_serve


def test_too_few_others_keep_a_rank_until_one_of_them_is_back() -> None:
    told = story(limits=dataclasses.replace(LIMITS, min_ranks=2))
    told.sim.after(0.018, lambda: told.kill(1))
    leave(told, 2, 3)
    kept: list[str] = []
    told.sim.after(0.2, lambda: kept.extend(members(told)))
    told.sim.after(0.21, lambda: told.cluster.start(1, 1))
    told.run()
    assert kept == ["0.0", "2.0", "3.0"]
    assert members(told) == ["0.0", "1.1"]
    assert not told.cluster.cannot_serve


def test_a_newcomer_that_dies_while_the_service_is_scaled_up_is_followed_by_the_next_one() -> None:
    told = story(dataclasses.replace(FOUR, starting=2))
    started: list[Process] = []

    def start() -> None:
        told.on(2, "join", "die")
        started.append(told.cluster.start(2, 1, scaled=True))

    told.sim.after(0.02, start)
    told.sim.after(0.1, lambda: told.cluster.start(2, 2, scaled=True))
    told.run()
    assert not started[0].epochs
    assert members(told) == ["0.0", "1.0", "2.2"]


def test_ranks_come_and_go_at_once() -> None:
    told = story(dataclasses.replace(FOUR, starting=3))
    add(told, 3, at_s=0.02)
    leave(told, 0, 1, at_s=0.021)
    told.run()
    assert members(told) == ["2.0", "3.1"]
    assert {a.trigger for _, a in told.cluster.adoptions} == {"start", "scale"}
