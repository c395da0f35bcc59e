"""Single stories of the failure path, each told in full: what cannot be served, who is evicted, what is reported."""

from __future__ import annotations

import dataclasses

import pytest
from sim_cluster import LIMITS, PEER_TIMEOUT_S, Cluster, Process, die
from sim_scheduler import Scheduler

from phalanx.elastic.agree import Limits, Shape

SHAPE = Shape(num_layers=2, num_experts=4, ep_size=3, slots_per_rank=4)
FOUR = Shape(num_layers=1, num_experts=12, ep_size=4, slots_per_rank=12)
"""After a death each of the three survivors has one of the three lost experts to restore."""

POINTS = ("step", "roll_call", "publish", "replan", "restore", "barrier", "adopt")
"""Only the lowest rank comes to publish."""


class Story:
    """A service with requests, to which a test adds what happens."""

    def __init__(self, shape: Shape = SHAPE, limits: Limits = LIMITS, seed: int = 0) -> None:
        self.sim = Scheduler(seed, max_time_s=20.0)
        self.at_point: dict[tuple[int, str], list[str]] = {}
        self.cluster = Cluster(self.sim, shape, limits=limits, on_point=self._passed)
        self.ranks = [self.cluster.start(rank) for rank in range(shape.starting or shape.ep_size)]

    def requests(self, count: int = 4, length: int = 12) -> None:
        for n in range(count):
            self.cluster.router.submit(1000 + n, length)

    def on(self, rank: int, point: str, *actions: str) -> None:
        """What happens at the next passes of a point: nothing, kill, die (whichever incarnation it is),
        freeze (for long), or blink."""
        self.at_point[rank, point] = list(actions)

    def kill(self, rank: int) -> None:
        process = self.ranks[rank]
        self.cluster.notices.declare_dead(process.member, "signal")
        die(self.cluster, process)

    def run(self, until_s: float = 1.0) -> None:
        """Tell the story to its end, and check that every stream has its right text."""
        self.sim.after(until_s, self.sim.stop)
        self.sim.run()
        self.cluster.router.check()

    def _passed(self, process: Process, name: str) -> None:
        actions = self.at_point.get((process.member.rank, name), [])
        action = actions.pop(0) if actions else "nothing"
        if action == "kill":
            self.kill(process.member.rank)
        elif action == "die":
            self.cluster.notices.declare_dead(process.member, "signal")
            die(self.cluster, process)
        elif action in ("freeze", "blink"):
            assert process.task is not None
            process.long_silent |= action == "freeze"
            self.sim.freeze(process.task, 6 * LIMITS.roll_call_s if action == "freeze" else 0.8 * PEER_TIMEOUT_S)
            self.sim.pause()


def test_service_goes_on_until_one_rank_is_left() -> None:
    story = Story()
    story.requests()
    for rank, when in ((0, 0.02), (2, 0.04)):
        story.sim.after(when, lambda rank=rank: story.kill(rank))
    story.run()
    assert [str(m) for m in story.cluster.latest_members()] == ["1.0"]


def test_fewer_ranks_than_asked_for_wait_for_a_newcomer_and_then_serve_what_was_interrupted() -> None:
    story = Story(limits=dataclasses.replace(LIMITS, min_ranks=2))
    story.requests()
    story.sim.after(0.02, lambda: (story.kill(0), story.kill(1)))
    served_alone: list[int] = []
    story.sim.after(0.2, lambda: served_alone.extend(len(w.view.members) for w in story.cluster.worlds.values()))
    story.sim.after(0.3, lambda: story.cluster.start(1, 1))
    story.run()
    assert 1 not in served_alone
    (who, _, why), *_ = story.cluster.cannot_serve
    assert (who.rank, "--min-ranks" in why) == (2, True)
    assert [str(m) for m in story.cluster.latest_members()] == ["1.1", "2.0"]


def test_too_few_slots_are_the_same_error_on_every_survivor_until_someone_joins() -> None:
    story = Story(Shape(num_layers=1, num_experts=6, ep_size=4, slots_per_rank=2))
    story.requests()
    for rank in (0, 3):
        story.sim.after(0.02, lambda rank=rank: story.kill(rank))
    story.sim.after(0.3, lambda: story.cluster.start(3, 1))
    story.run()
    assert {(m.rank, why) for m, _, why in story.cluster.cannot_serve} == {
        (rank, "4 live slots a layer cannot hold 6 experts") for rank in (1, 2)
    }
    assert len({epoch for _, epoch, _ in story.cluster.cannot_serve}) == 1
    assert [m.rank for m in story.cluster.latest_members()] == [1, 2, 3]


def test_a_lost_expert_is_the_same_error_on_every_survivor_until_its_source_is_back() -> None:
    story = Story()
    story.requests()

    def lose() -> None:
        story.cluster.disk.missing = {(layer, e) for layer in range(2) for e in range(4)}
        story.kill(0)

    def retry() -> None:
        story.cluster.disk.missing = set()
        story.cluster.resume += 1

    story.sim.after(0.02, lose)
    story.sim.after(0.3, retry)
    story.run()
    reports = {(m.rank, epoch, why) for m, epoch, why in story.cluster.cannot_serve}
    assert {rank for rank, _, _ in reports} == {1, 2}
    assert len({(epoch, why) for _, epoch, why in reports}) == 1
    assert "cannot restore layer" in next(iter(reports))[2]
    assert [m.rank for m in story.cluster.latest_members()] == [1, 2]


@pytest.mark.parametrize(("rank", "point"), [(r, p) for r in (0, 2) for p in POINTS if r == 0 or p != "publish"])
def test_a_rank_that_is_stopped_for_long_ends_by_itself_wherever_it_wakes_up(rank: int, point: str) -> None:
    story = Story(FOUR)
    story.requests()
    story.sim.after(0.02, lambda: story.kill(1))
    story.sim.after(0.019, lambda: story.on(rank, point, "freeze"))
    story.run()
    stopped = story.ranks[rank]
    assert stopped.long_silent, f"it never came to {point}"
    assert stopped.evicted
    assert [m.rank for m in story.cluster.latest_members()] == [r for r in (0, 2, 3) if r != rank]


@pytest.mark.parametrize(("rank", "point"), [(r, p) for r in (0, 3) for p in POINTS if r == 0 or p != "publish"])
def test_a_second_death_in_the_recovery_from_the_first_is_one_more_recovery(rank: int, point: str) -> None:
    story = Story(FOUR)
    story.requests()
    story.sim.after(0.02, lambda: story.kill(1))
    story.sim.after(0.019, lambda: story.on(rank, point, "kill"))
    story.run()
    assert not story.ranks[rank].alive
    assert [m.rank for m in story.cluster.latest_members()] == [r for r in (0, 2, 3) if r != rank]


@pytest.mark.parametrize("point", POINTS)
def test_short_stops_evict_nobody(point: str) -> None:
    story = Story()
    for rank in range(3):
        story.on(rank, point, "blink", "nothing", "blink", "blink")
    story.requests(length=6)
    story.run()
    assert not any(actions and actions[0] == "blink" for (rank, _), actions in story.at_point.items() if rank == 0)
    assert len(story.cluster.latest_members()) == 3
    assert not any(process.evicted for process in story.ranks)


def test_an_adoption_says_who_was_lost_why_and_what_it_took() -> None:
    story = Story()
    story.requests()
    story.sim.after(0.02, lambda: story.kill(0))
    story.run()
    _, first = story.cluster.adoptions[0]
    assert (first.trigger, first.lost, first.joined) == ("start", (), (0, 1, 2))
    after = [a for _, a in story.cluster.adoptions if a.world.epoch == 2]
    assert len(after) == 2
    for adoption in after:
        assert (adoption.trigger, adoption.lost, adoption.joined) == ("failure", (0,), ())
        assert adoption.causes == {0: "signal"}
        assert adoption.seconds.agree < LIMITS.roll_call_s
        assert adoption.step >= 1
    experts = 2 * 4
    restored = sum(sum(a.bytes_restored.values()) for _, a in story.cluster.adoptions if a.world.epoch == 1)
    assert restored == experts * 16
