"""Single stories of the background balance: replicas come back; a death half-way and a failed move harm nothing."""

from __future__ import annotations

import pytest
from sim_cluster import Cluster, Process, die
from sim_scheduler import Scheduler

from phalanx.elastic.agree import Shape
from phalanx.elastic.balance import Rules
from phalanx.elastic.replan import at_risk
from phalanx.world import EMPTY, World

SHAPE = Shape(num_layers=2, num_experts=6, ep_size=4, slots_per_rank=6, num_redundant=6)
"""Every expert stands on two ranks."""

OFTEN = Rules(window=4, interval=3, min_gain=0.0, num_redundant=6)
AFTER_CHANGES = Rules(window=4, interval=0, min_gain=0.0, num_redundant=6)

SWITCH = ("roll_call", "publish", "replan", "adopt", "barrier")


class Story:
    """A service under load whose ranks may die at a pass of a point."""

    def __init__(self, rules: Rules, shape: Shape = SHAPE, seed: int = 0) -> None:
        self.sim = Scheduler(seed, max_time_s=20.0)
        self.cluster = Cluster(self.sim, shape, balance=rules, on_point=self._passed)
        self.ranks = [self.cluster.start(rank) for rank in range(shape.ep_size)]
        self.fatal: dict[tuple[int, str], int] = {}
        self.armed_by_staging: tuple[int, str] | None = None
        self.died_at: list[str] = []
        for n in range(6):
            self.cluster.router.submit(1000 + n, 16)

    def kill(self, rank: int) -> None:
        process = self.ranks[rank]
        self.cluster.notices.declare_dead(process.member, "signal")
        die(self.cluster, process)

    def run(self, until_s: float = 1.0) -> World:
        """To the end, with every stream checked. The World that is served then."""
        self.sim.after(until_s, self.sim.stop)
        self.sim.run()
        self.cluster.router.check()
        assert self.cluster.router.done
        return self.cluster.worlds[max(self.cluster.worlds)]

    def triggers(self) -> list[str]:
        return [next(a.trigger for _, a in self.cluster.adoptions if a.world.epoch == n) for n in self.cluster.worlds]

    def _passed(self, process: Process, name: str) -> None:
        rank = process.member.rank
        if name == "stage" and self.armed_by_staging is not None:
            self.fatal[self.armed_by_staging] = 1
            self.armed_by_staging = None
        if (rank, name) in self.fatal:
            self.fatal[rank, name] -= 1
            if self.fatal[rank, name] == 0:
                self.died_at.append(name)
                self.kill(rank)


def test_experts_move_while_streams_go_on_and_nothing_is_restored_at_the_switch() -> None:
    story = Story(OFTEN)
    story.run()
    assert story.cluster.moves > 0
    switches = [a for _, a in story.cluster.adoptions if a.trigger == "rebalance"]
    assert switches
    assert not any(a.bytes_restored or a.lost or a.joined for a in switches)


def test_the_first_plan_does_not_wait_for_the_interval_but_for_a_window_of_counts() -> None:
    story = Story(Rules(window=4, interval=10_000, min_gain=0.0, num_redundant=6))
    story.run()
    assert "rebalance" in story.triggers()


def test_after_a_death_replicas_come_back_though_no_plan_is_ever_due() -> None:
    story = Story(AFTER_CHANGES)
    story.sim.after(0.02, lambda: story.kill(2))
    world = story.run()
    assert story.triggers()[:3] == ["start", "failure", "rebalance"]
    assert (world.placement.slots_LP != EMPTY).sum() == 2 * 12
    assert not at_risk(world.placement, world.view).any(), "one more death would lose an expert"


def test_what_the_world_does_not_use_gives_its_memory_back() -> None:
    story = Story(OFTEN)
    world = story.run()
    assert "rebalance" in story.triggers()
    for process in story.ranks:
        assert process.bank is not None
        unused = world.placement.of_rank(process.member.rank) == EMPTY
        assert (process.bank.held_LS[unused] == EMPTY).all()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_death_while_experts_are_staged_changes_no_stream(rank: int, passes: int) -> None:
    story = Story(OFTEN)
    story.fatal[rank, "stage"] = passes
    world = story.run()
    assert story.died_at == ["stage"]
    assert world.view.ranks == tuple(r for r in range(4) if r != rank)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("point", SWITCH)
def test_a_death_at_the_switch_changes_no_stream(rank: int, point: str) -> None:
    if rank == 3 and point == "publish":
        pytest.skip("only the lowest rank comes to publish")
    story = Story(OFTEN)
    story.armed_by_staging = (rank, point)  # what is passed at the start does not count
    world = story.run()
    assert story.died_at == [point]
    assert world.view.ranks == tuple(r for r in range(4) if r != rank)


def test_an_expert_that_cannot_be_staged_leaves_the_placement_as_it_is() -> None:
    story = Story(AFTER_CHANGES)

    def garble() -> None:
        story.kill(2)
        story.cluster.disk.missing = {(layer, e) for layer in range(2) for e in range(6)}
        story.cluster.garbage = 1.0

    story.sim.after(0.02, garble)
    world = story.run()
    assert story.triggers() == ["start", "failure"]
    for process in story.ranks:
        if process.alive:
            assert process.bank is not None
            unused = world.placement.of_rank(process.member.rank) == EMPTY
            assert (process.bank.held_LS[unused] == EMPTY).all(), "what others had staged is given back"
