"""Stories of ranks that come back: what the others feel, and whoever dies on the way."""

from __future__ import annotations

import dataclasses

import pytest
from sim_cluster import LIMITS, Cluster, Process
from test_recovery import Story

from phalanx.elastic.agree import Shape
from phalanx.elastic.recover import Adoption

FOUR = Shape(num_layers=2, num_experts=12, ep_size=4, slots_per_rank=12, num_redundant=4)
NEWCOMERS_POINTS = ("restore", "join", "replan", "barrier", "adopt", "step")
"""What a newcomer passes, in this order; it restores before it asks."""

HEALTHY_POINTS = ("roll_call", "publish", "replan", "barrier", "adopt", "step")
"""Only the lowest rank comes to publish."""


def story() -> Story:
    told = Story(FOUR)
    told.requests(count=8, length=40)
    return told


def joins(cluster: Cluster) -> list[tuple[int, Adoption]]:
    """(rank, adoption) of all that took a join in."""
    return [(m.rank, a) for m, a in cluster.adoptions if a.trigger == "join"]


def members(told: Story) -> list[str]:
    return [str(m) for m in told.cluster.latest_members()]


def comes_back(told: Story, rank: int, at_s: float, incarnation: int = 1) -> list[Process]:
    """The rank's next process, as soon as it is started."""
    started: list[Process] = []
    told.sim.after(at_s, lambda: started.append(told.cluster.start(rank, incarnation)))
    return started


def test_a_rank_comes_back_and_nobody_restores_a_byte_while_the_others_wait() -> None:
    told = story()
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.06)
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]
    felt = joins(told.cluster)
    assert sorted(rank for rank, _ in felt) == [0, 1, 2, 3]
    for rank, adoption in felt:
        assert adoption.joined == ((1,) if rank != 1 else (0, 1, 2, 3))
        assert bool(adoption.bytes_restored) == (rank == 1), "only the newcomer has read anything, beforehand"
        assert adoption.seconds.restore < 0.02


def test_after_a_return_the_experts_are_spread_as_before_and_no_more_slots_are_filled() -> None:
    told = story()
    for at_s, rank in ((0.02, 1), (0.2, 2)):
        told.sim.after(at_s, lambda rank=rank: told.kill(rank))
        comes_back(told, rank, at_s + 0.04)
    told.run()
    worlds = told.cluster.worlds
    filled = {
        epoch: [int((world.placement.of_rank(rank) >= 0).sum()) for rank in range(4)] for epoch, world in worlds.items()
    }
    assert filled[1] == filled[max(worlds)] == [8, 8, 8, 8]
    for epoch in {a.world.epoch for _, a in joins(told.cluster)}:  # as they came in; what is uneven is made good later
        assert sum(filled[epoch]) <= 36, filled
        assert max(filled[epoch]) - min(filled[epoch]) <= 5, filled
    last = worlds[max(worlds)].placement
    for process in (*told.ranks, *told.cluster.processes[4:]):
        if process.alive or process.member in told.cluster.latest_members():
            assert process.bank is not None
            surplus = (process.bank.held_LS >= 0) & (last.of_rank(process.member.rank) < 0)
            assert not surplus.any(), f"{process.member} keeps memory that nobody uses"


@pytest.mark.parametrize("point", NEWCOMERS_POINTS)
def test_a_newcomer_that_dies_on_its_way_in_disturbs_nobody_and_the_next_one_comes_in(point: str) -> None:
    told = story()
    told.sim.after(0.02, lambda: told.kill(1))
    first: list[Process] = []

    def start() -> None:
        told.on(1, point, "die")
        first.append(told.cluster.start(1, 1))

    told.sim.after(0.06, start)
    comes_back(told, 1, 0.25, incarnation=2)
    told.run()
    assert not first[0].alive, f"it never came to {point}"
    assert members(told) == ["0.0", "1.2", "2.0", "3.0"]


@pytest.mark.parametrize("point", NEWCOMERS_POINTS)
def test_a_newcomer_that_stops_on_its_way_in_is_left_behind(point: str) -> None:
    told = story()
    told.sim.after(0.02, lambda: told.kill(1))

    def start() -> None:
        told.on(1, point, "freeze")
        told.cluster.start(1, 1)

    told.sim.after(0.06, start)
    told.run(3.0)
    newcomer = told.cluster.processes[-1]
    assert newcomer.long_silent, f"it never came to {point}"
    assert {"0.0", "2.0", "3.0"} <= set(members(told))


@pytest.mark.parametrize(
    ("rank", "point"), [(r, p) for r in (0, 3) for p in HEALTHY_POINTS if r == 0 or p != "publish"]
)
def test_a_healthy_rank_that_dies_in_a_join_is_one_more_recovery(rank: int, point: str) -> None:
    told = story()
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.06)
    told.sim.after(0.06, lambda: told.on(rank, point, "die"))
    told.run()
    assert members(told) == [name for name in ("0.0", "1.1", "2.0", "3.0") if name != f"{rank}.0"]


def test_two_ranks_come_back_at_once() -> None:
    told = story()
    for rank in (0, 2):
        told.sim.after(0.02, lambda rank=rank: told.kill(rank))
        comes_back(told, rank, 0.06)
    told.run()
    assert members(told) == ["0.1", "1.0", "2.1", "3.0"]


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.002, 0.004, 0.008])
def test_a_rank_that_comes_back_during_another_recovery(delay_s: float) -> None:
    told = story()
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.06)
    told.sim.after(0.07 + delay_s, lambda: told.kill(3))
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0"]


def test_a_rank_that_comes_back_before_its_death_was_dealt_with() -> None:
    told = story()

    def replace() -> None:
        told.kill(1)
        told.cluster.start(1, 1)

    told.sim.after(0.02, replace)
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]


def test_all_ranks_die_and_all_come_back_from_disk() -> None:
    told = story()
    for rank in range(4):
        told.sim.after(0.06, lambda rank=rank: told.kill(rank))
        comes_back(told, rank, 0.08 + 0.003 * rank)
    told.run(2.0)
    assert members(told) == ["0.1", "1.1", "2.1", "3.1"]
    assert all("peer" not in a.bytes_restored for m, a in told.cluster.adoptions if a.world.epoch == 2)


def test_the_only_rank_dies_and_comes_back() -> None:
    told = Story(dataclasses.replace(FOUR, ep_size=1, num_redundant=0))
    told.requests(count=2, length=100)
    told.sim.after(0.06, lambda: told.kill(0))
    comes_back(told, 0, 0.08)
    told.run()
    assert members(told) == ["0.1"]


def test_a_rank_returns_at_idle() -> None:
    told = Story(FOUR)
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.06)
    told.run(0.4)
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]


def test_a_join_that_makes_enough_ranks_serves_what_was_held_meanwhile() -> None:
    told = Story(FOUR, limits=dataclasses.replace(LIMITS, min_ranks=4))
    told.requests(count=4, length=20)
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.2)
    told.run()
    assert {m.rank for m, _, why in told.cluster.cannot_serve if "--min-ranks" in why} == {0, 2, 3}
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]


def test_ranks_that_are_still_too_few_with_a_newcomer_wait_for_the_next_one_without_a_busy_moment() -> None:
    told = Story(FOUR, limits=dataclasses.replace(LIMITS, min_ranks=4))
    told.requests(count=4, length=20)
    for rank, back_s in ((1, 0.2), (2, 0.4)):
        told.sim.after(0.02, lambda rank=rank: told.kill(rank))
        comes_back(told, rank, back_s)
    told.run()  # who never sleeps never lets the clock go on
    assert {m.rank for m, epoch, _ in told.cluster.cannot_serve if epoch == 3} == {0, 1, 3}
    assert members(told) == ["0.0", "1.1", "2.1", "3.0"]


def test_newcomers_meet_at_once_though_whoever_let_the_first_one_in_is_dead() -> None:
    limits = dataclasses.replace(LIMITS, min_ranks=3, restore_s=10.0)
    told = Story(FOUR, limits=limits)
    told.requests(count=4, length=20)
    for rank in (1, 2, 3):
        told.sim.after(0.05, lambda rank=rank: told.kill(rank))
    comes_back(told, 1, 0.2)
    told.sim.after(0.3, lambda: told.kill(0))
    for rank in (2, 3):
        comes_back(told, rank, 0.4)
    told.run(2.0)
    assert members(told) == ["1.1", "2.1", "3.1"]
    assert told.cluster.router.done


def test_experts_beyond_the_living_slots_are_served_again_by_the_one_who_comes_back() -> None:
    told = Story(Shape(num_layers=1, num_experts=6, ep_size=3, slots_per_rank=2))
    told.requests(count=4, length=20)
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.2)
    told.run()
    assert {m.rank for m, _, why in told.cluster.cannot_serve if "cannot hold" in why} == {0, 2}
    assert members(told) == ["0.0", "1.1", "2.0"]


class LostMeanwhile(Story):
    """When the first newcomer asks to be let in, another rank dies."""

    def _passed(self, process: Process, name: str) -> None:
        if name == "join" and self.ranks[3].alive:
            self.kill(3)
        super()._passed(process, name)


def test_a_newcomer_that_has_much_to_restore_in_its_first_world_lets_nobody_wait_in_vain() -> None:
    limits = dataclasses.replace(LIMITS, restore_s=10.0, slice_s=0.0001)  # an expert a slice
    told = LostMeanwhile(dataclasses.replace(FOUR, num_redundant=0), limits)
    told.requests(count=8, length=40)
    told.sim.after(0.02, lambda: told.kill(1))
    comes_back(told, 1, 0.06)
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0"]
    felt = [(m, a) for m, a in told.cluster.adoptions if 1 in a.joined or m.incarnation]
    assert any(m.incarnation and a.bytes_restored for m, a in felt)
    assert all(a.seconds.restore < LIMITS.roll_call_s for _, a in felt), [a.seconds for _, a in felt]


@pytest.mark.parametrize("seed", range(3))
def test_newcomers_that_come_together_leave_no_rank_with_far_more_experts_than_the_others(seed: int) -> None:
    """Each prepares for the World that it sees, and brings what it hoped for there."""
    told = Story(dataclasses.replace(FOUR, num_redundant=0), seed=seed)
    told.requests(count=8, length=200)
    for rank, at_s in ((1, 0.06), (2, 0.064)):
        told.sim.after(0.02, lambda rank=rank: told.kill(rank))
        comes_back(told, rank, at_s)
    told.run(3.0)
    assert members(told) == ["0.0", "1.1", "2.1", "3.0"]
    filled = {
        epoch: [(world.placement.of_rank(rank) >= 0).sum(axis=1).tolist() for rank in range(4)]
        for epoch, world in told.cluster.worlds.items()
    }
    joined = max(a.world.epoch for _, a in joins(told.cluster))
    assert max(max(of_layers) for of_layers in filled[joined]) > 3, "this seed shows nothing"
    assert filled[max(filled)] == [[3, 3]] * 4
