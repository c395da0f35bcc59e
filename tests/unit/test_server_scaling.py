"""Scaling, driven by messages alone: who is told what, when it is over, and what is in use then."""

from __future__ import annotations

import pytest
from test_server_router import Desk, recovered

from phalanx import messages as m
from phalanx.server.flight import ToLauncher
from phalanx.server.roster import Identity
from phalanx.server.scaling import Scale, Scaler, ScaleRefused


class Office(Desk):
    """A desk from which the service is scaled. Nothing happens between two messages but `wait`."""

    def __init__(self, ranks: int = 3, places: int = 5, min_ranks: int = 1) -> None:
        super().__init__(ranks, places=places)
        self.scaler = Scaler(self.router, min_ranks=min_ranks, patience_s=60.0, clock=self.clock)
        self.ended: list[Scale] = []
        self.meet(*[(rank, 0) for rank in range(ranks)])

    def hear(self, message: m.ToServer) -> None:
        super().hear(message)
        if hasattr(self, "scaler"):
            self.wait(0)

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.scaler.advance()
        self.sent += self.router.take()

    def scale(self, ranks: set[int], drain_s: float = 10.0) -> None:
        self.scaler.begin(frozenset(ranks), drain_s, self.ended.append)
        self.wait(0)

    def resize(self, size: int, drain_s: float = 10.0) -> None:
        self.scale(set(self.scaler.resized(size)), drain_s)

    @property
    def used(self) -> list[list[int]]:
        """What the launcher was told to use."""
        return [
            e.message.ranks for e in self.sent if isinstance(e, ToLauncher) and isinstance(e.message, m.UseRanks)
        ]  # fmt: skip

    def told(self, rank: int) -> list[m.ToWorker]:
        """What a rank was told about where to be."""
        return [message for message in self.to(rank) if isinstance(message, m.Leave | m.Stay)]

    def outcome(self) -> tuple[list[int], str]:
        [scale] = self.ended
        assert tuple(sorted(scale.ranks)) == self.router.roster.in_use
        assert not self.scaler.running
        return sorted(scale.ranks), scale.failure


@pytest.fixture
def office() -> Office:
    return Office()


def test_more_ranks_are_wanted_of_the_launcher_and_it_is_over_when_they_serve(office: Office) -> None:
    office.resize(5)
    assert office.used == [[0, 1, 2, 3, 4]]
    for rank in (3, 4):
        office.hear(m.Spawned(rank=rank, incarnation=1, pid=7))
    office.meet((0, 0), (1, 0), (2, 0), (3, 1), trigger="scale")
    assert not office.ended
    assert office.router.roster.status()["ep_size"] == 3
    office.meet((0, 0), (1, 0), (2, 0), (3, 1), (4, 1), trigger="scale")
    assert office.outcome() == ([0, 1, 2, 3, 4], "")
    assert office.router.roster.status()["ep_size"] == 5


def test_ranks_that_leave_get_no_new_requests_and_are_told_when_their_last_one_has_ended(office: Office) -> None:
    office.submit()
    office.submit()
    office.submit()
    office.resize(2)
    assert office.router.roster.state(2) == "leaving"
    new = [office.submit() for _ in range(4)]
    assert {rank for rank, submit in office.submits()[3:]} == {0, 1}
    assert len(new) == 4
    assert office.told(2) == []
    [own] = [submit for rank, submit in office.submits() if rank == 2]
    office.token(2, own, 0, finish="length")
    assert office.told(2) == [m.Leave(members=[(2, 0)])]
    office.meet((0, 0), (1, 0), trigger="scale", left=(2,))
    assert office.outcome() == ([0, 1], "")
    assert [rank["rank"] for rank in office.router.roster.status()["ranks"]] == [0, 1]
    assert office.value("phalanx_requests_moved_total") == 0


def test_after_the_time_for_draining_the_others_go_on_with_what_the_client_has(office: Office) -> None:
    for _ in range(3):
        office.submit()
    office.resize(2, drain_s=5.0)
    [own] = [submit for rank, submit in office.submits() if rank == 2]
    office.token(2, own, 0)
    office.wait(4.9)
    assert office.told(2) == []
    office.wait(0.2)
    abort, leave = office.to(2)[-2:]
    assert (abort, leave) == (m.Abort(request_id=own.request_id), m.Leave(members=[(2, 0)]))
    rank, moved = office.last(own.request_id)
    assert (rank in (0, 1), moved.attempt, len(moved.output_ids)) == (True, own.attempt + 1, 1)
    office.token(2, own, 1)  # too late: it has the request no more
    office.token(rank, moved, 1)
    assert office.value("phalanx_requests_moved_total") == 1


def test_all_that_leave_are_told_at_once_and_of_each_other(office: Office) -> None:
    for _ in range(3):
        office.submit()
    office.scale({0})
    ends = {rank: submit for rank, submit in office.submits()}
    office.token(1, ends[1], 0, finish="length")
    assert office.told(1) == []
    office.token(2, ends[2], 0, finish="length")
    assert office.told(1) == office.told(2) == [m.Leave(members=[(1, 0), (2, 0)])]


def test_a_rank_that_left_is_no_failure_and_its_change_says_so(office: Office) -> None:
    office.resize(2)
    office.meet((0, 0), (1, 0), trigger="scale", left=(2,))
    office.hear(m.Died(rank=2, incarnation=0, cause="left", detail="stopped"))
    for rank in (0, 1):
        office.hear(recovered(rank, 2, 0.01, 0, []))
    last = office.router.roster.status()["last_recovery"]
    assert (last["trigger"], last["lost"], last["left"]) == ("scale", [], [2])
    assert office.value("phalanx_rank_failures_total", cause="left") == 0
    assert office.value("phalanx_recoveries_total", trigger="scale", outcome="complete") == 1
    assert office.router.roster.reasons() == {}


def test_a_rank_that_is_killed_before_it_left_is_a_failure_and_the_scaling_is_over_when_the_others_serve(
    office: Office,
) -> None:
    office.resize(2)
    office.died(2)
    assert not office.ended, "what only it held may be lost"
    office.meet((0, 0), (1, 0), lost=(2,))
    assert office.outcome() == ([0, 1], "")
    assert office.value("phalanx_rank_failures_total", cause="signal") == 1


def test_the_dead_leave_first_then_the_highest(office: Office) -> None:
    office.died(1)
    assert office.scaler.resized(2) == {0, 2}
    assert office.scaler.resized(1) == {0}
    assert office.scaler.resized(4) == {0, 1, 2, 3}
    assert office.scaler.without(frozenset({0})) == {1, 2}


def test_a_vacant_place_in_the_middle_is_taken_first(office: Office) -> None:
    office.scale({0, 2})
    office.died(1)
    assert office.scaler.resized(3) == {0, 1, 2}
    assert office.scaler.resized(5) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("size", "words"), [(0, "between 1 and 5"), (6, "between 1 and 5"), (-1, "--max-ep-size")])
def test_a_size_that_cannot_be_is_refused(office: Office, size: int, words: str) -> None:
    with pytest.raises(ScaleRefused, match=words) as refused:
        office.scaler.resized(size)
    assert not refused.value.busy


def test_what_the_others_could_not_serve_is_refused_with_the_numbers() -> None:
    office = Office(min_ranks=2)
    with pytest.raises(ScaleRefused, match="1 ranks would be left, and 2 are needed: --min-ranks is 2"):
        office.resize(1)
    office = Office()
    office.meet((0, 0), (1, 0), (2, 0), ranks_needed=3)
    with pytest.raises(ScaleRefused, match="2 ranks would be left, and 3 are needed: the slots of fewer than 3"):
        office.resize(2)
    assert office.used == []
    with pytest.raises(ScaleRefused, match="rank 4 is not in use: there are 0, 1, 2"):
        office.scaler.without(frozenset({0, 4}))
    with pytest.raises(ScaleRefused, match="no rank is named"):
        office.scaler.without(frozenset())


def test_the_living_must_not_leave_when_those_that_would_stay_are_given_up() -> None:
    office = Office(min_ranks=2)
    office.died(1)
    office.hear(m.GivenUp(rank=1, incarnation=0, reason="it dies on each start"))
    with pytest.raises(ScaleRefused, match=r"of the 2 ranks .* 1 are alive, and 2 are needed") as refused:
        office.scale({0, 1})
    assert refused.value.busy
    office.scale({0, 2})
    office.meet((0, 0), (2, 0), lost=(1,))
    assert office.outcome() == ([0, 2], "")


def test_one_scaling_at_a_time(office: Office) -> None:
    office.resize(4)
    with pytest.raises(ScaleRefused, match="being scaled to 4 ranks") as refused:
        office.resize(2)
    assert refused.value.busy
    assert office.router.roster.status()["scaling"]


def test_nothing_is_scaled_before_the_ranks_have_met() -> None:
    office = Office(ranks=1)
    fresh = Desk(2)
    scaler = Scaler(fresh.router, min_ranks=1, patience_s=1.0, clock=office.clock)
    with pytest.raises(ScaleRefused, match="starting"):
        scaler.begin(frozenset({0}), 0.0, lambda scale: None)


def test_a_rank_that_does_not_start_ends_the_scaling_with_the_reason_and_the_others_stay(office: Office) -> None:
    office.resize(5)
    office.hear(m.Spawned(rank=3, incarnation=1, pid=7))
    office.died(3, 1)
    office.hear(m.GivenUp(rank=3, incarnation=1, reason="it has no memory"))
    assert not office.ended, "the other one may still come"
    office.meet((0, 0), (1, 0), (2, 0), (4, 1), trigger="scale")
    assert office.outcome() == ([0, 1, 2, 4], "rank 3 does not start: it has no memory")
    assert office.used[-1] == [0, 1, 2, 4]


def test_when_too_few_are_left_to_stay_those_that_were_to_leave_are_told_to_stay() -> None:
    office = Office(min_ranks=2)
    office.resize(2)
    assert len(office.told(2)) == 1
    office.died(1)
    assert not office.ended, "the launcher may start it again"
    office.hear(m.GivenUp(rank=1, incarnation=0, reason="it is not started again"))
    assert office.told(2)[-1] == m.Stay()
    assert office.outcome() == ([0, 1, 2], "of the ranks that were to stay 1 are alive, and 2 are needed")
    assert office.used[-1] == [0, 1, 2]
    office.meet((0, 0), (2, 0), trigger="failure", lost=(1,))
    assert office.router.roster.state(2) == "healthy"


def test_ranks_that_leave_serve_as_long_as_nobody_else_does(office: Office) -> None:
    for _ in range(3):
        office.submit()
    office.scale({0}, drain_s=0.0)
    office.died(0)
    assert {rank for rank, _ in office.submits()[-3:]} <= {1, 2}, "they go on with all of them"
    office.submit()
    assert office.submits()[-1][0] in (1, 2)


def test_what_does_not_come_about_ends_some_time(office: Office) -> None:
    office.resize(4, drain_s=10.0)
    office.wait(69.0)
    assert not office.ended
    office.wait(2.0)
    assert office.outcome() == ([0, 1, 2], "ranks [3] have not come in within 70 s")


def test_a_place_that_was_left_is_known_to_nobody(office: Office) -> None:
    office.resize(2)
    office.meet((0, 0), (1, 0), trigger="scale", left=(2,))
    assert Identity(2, 0) not in {r.identity for r in office.router.roster.serving()}
    assert office.router.roster.shown() == [0, 1]


def test_a_place_whose_last_process_was_given_up_can_be_tried_again(office: Office) -> None:
    office.resize(4)
    office.died(3, 1)
    office.hear(m.GivenUp(rank=3, incarnation=1, reason="it has no memory"))
    [first] = office.ended
    assert first.failure == "rank 3 does not start: it has no memory"
    office.ended.clear()
    office.resize(4)
    assert not office.ended
    office.hear(m.Spawned(rank=3, incarnation=2, pid=8))
    office.meet((0, 0), (1, 0), (2, 0), (3, 2), trigger="scale")
    assert office.outcome() == ([0, 1, 2, 3], "")


def test_a_new_rank_that_is_in_stays_though_it_is_not_healthy_when_the_time_is_over(office: Office) -> None:
    office.resize(4)
    office.hear(m.Spawned(rank=3, incarnation=1, pid=7))
    office.epoch += 1
    office.adopted((0, 0), ((0, 0), (1, 0), (2, 0), (3, 1)), "scale")  # it has not said so itself yet
    office.wait(71.0)
    assert office.outcome()[0] == [0, 1, 2, 3]
    assert office.used[-1] == [0, 1, 2, 3]


def on_two_hosts(office: Office, other: m.HostPhase) -> None:
    """Ranks 0, 1 and 3 stand on the first host, 2 and 4 on the other."""
    office.hear(m.HostState(node_rank=0, state="alive", ranks=[0, 1, 3]))
    office.hear(m.HostState(node_rank=1, state=other, ranks=[2, 4], lost=[(2, 0)] if other == "lost" else []))


def test_places_of_hosts_that_are_not_there_are_taken_last_and_refused_by_name(office: Office) -> None:
    office.scale({0, 1})
    office.meet((0, 0), (1, 0), trigger="scale", left=(2,))
    office.ended.clear()
    on_two_hosts(office, "lost")
    assert office.scaler.resized(3) == {0, 1, 3}
    with pytest.raises(ScaleRefused, match="rank 2 cannot be started: its host 1 is lost") as refused:
        office.resize(4)
    assert refused.value.busy
    on_two_hosts(office, "alive")
    assert office.scaler.resized(3) == {0, 1, 2}
    office.resize(3)
    on_two_hosts(office, "lost")
    assert office.outcome() == ([0, 1], "rank 2 does not start: its host 1 is lost")


def test_nobody_leaves_in_favour_of_ranks_whose_host_is_lost(office: Office) -> None:
    on_two_hosts(office, "lost")
    with pytest.raises(ScaleRefused, match="of the 1 ranks that would be left 0 are alive"):
        office.scale({2})
    office.resize(2)
    office.meet((0, 0), (1, 0), lost=(2,))
    assert office.outcome() == ([0, 1], "")


LOST = "cannot restore layer 0 expert 1: no source has an intact copy"


def cannot(office: Office, epoch: int, *members: tuple[int, int]) -> None:
    """All members of a view say that it cannot serve."""
    view = [
        m.MemberInfo(rank=rank, incarnation=incarnation, pid=1, host="h", device="cpu") for rank, incarnation in members
    ]
    for rank, incarnation in members:
        office.hear(m.CannotServe(rank=rank, incarnation=incarnation, epoch=epoch, reason=LOST, members=view))


def test_new_ranks_that_are_in_and_lack_experts_like_all_end_the_scaling_with_that_reason(office: Office) -> None:
    office.died(2)
    office.hear(m.GivenUp(rank=2, incarnation=0, reason="it is not started again"))
    cannot(office, 2, (0, 0), (1, 0))
    office.resize(4)
    assert not office.ended, "a new rank may be all that is needed"
    office.hear(m.Spawned(rank=3, incarnation=1, pid=7))
    cannot(office, 3, (0, 0), (1, 0), (3, 1))
    assert office.outcome() == ([0, 1, 2], f"ranks [0, 1, 3] are there, and cannot serve: {LOST}")
    assert office.used == [[0, 1, 2, 3], [0, 1, 2]]


def test_too_few_slots_are_no_end_of_a_scaling_while_a_rank_is_on_its_way(office: Office) -> None:
    office.died(2)
    cannot(office, 2, (0, 0), (1, 0))
    office.resize(4)
    office.hear(m.Spawned(rank=2, incarnation=1, pid=7))
    office.hear(m.Spawned(rank=3, incarnation=1, pid=8))
    cannot(office, 3, (0, 0), (1, 0), (3, 1))
    assert not office.ended
    office.meet((0, 0), (1, 0), (2, 1), (3, 1), trigger="join")
    assert office.outcome() == ([0, 1, 2, 3], "")


def test_who_could_not_serve_and_died_is_awaited_like_anybody(office: Office) -> None:
    office.died(2)
    office.hear(m.GivenUp(rank=2, incarnation=0, reason="it is not started again"))
    cannot(office, 2, (0, 0), (1, 0))
    office.resize(4)
    office.hear(m.Spawned(rank=3, incarnation=1, pid=7))
    office.died(0)
    cannot(office, 3, (1, 0), (3, 1))
    assert not office.ended
    office.hear(m.Spawned(rank=0, incarnation=1, pid=8))
    cannot(office, 4, (0, 1), (1, 0), (3, 1))
    assert office.outcome()[1].startswith("ranks [0, 1, 3] are there, and cannot serve")


def test_a_size_of_which_nobody_is_started_again_is_no_success(office: Office) -> None:
    for rank in range(3):
        office.died(rank)
        office.hear(m.GivenUp(rank=rank, incarnation=0, reason="it is not started again"))
    office.resize(3)
    assert office.outcome() == ([0, 1, 2], "of the ranks that are wanted 0 are alive, and 1 are needed")


def test_nobody_leaves_a_service_that_cannot_serve_without_its_experts(office: Office) -> None:
    cannot(office, 2, (0, 0), (1, 0), (2, 0))
    office.resize(2)
    assert office.outcome() == ([0, 1, 2], f"ranks [0, 1] are there, and cannot serve: {LOST}")
    assert [office.told(rank) for rank in range(3)] == [[], [], []]


def test_experts_that_a_leaving_rank_takes_along_when_it_is_killed_are_a_failed_scaling(office: Office) -> None:
    office.resize(2)
    assert len(office.told(2)) == 1
    office.died(2)
    cannot(office, 2, (0, 0), (1, 0))
    assert office.outcome() == ([0, 1, 2], f"ranks [0, 1] are there, and cannot serve: {LOST}")
    assert office.used[-1] == [0, 1, 2]


def test_a_size_that_is_there_and_does_not_serve_is_no_success(office: Office) -> None:
    cannot(office, 2, (0, 0), (1, 0), (2, 0))
    office.resize(3)
    assert office.outcome() == ([0, 1, 2], f"ranks [0, 1, 2] are there, and cannot serve: {LOST}")


def test_the_end_of_a_scaling_says_who_was_added_and_who_left(office: Office) -> None:
    office.scale({0, 2, 4})
    office.hear(m.Spawned(rank=4, incarnation=1, pid=7))
    office.meet((0, 0), (2, 0), (4, 1), trigger="scale", left=(1,))
    [scale] = office.ended
    assert (scale.added, scale.removed, scale.failure) == ([4], [1], "")


def test_the_end_of_the_service_ends_a_scaling_and_none_is_begun(office: Office) -> None:
    office.resize(4)
    office.scaler.close("the server is shutting down")
    assert office.outcome() == ([0, 1, 2], "the server is shutting down")
    with pytest.raises(ScaleRefused, match="shutting down") as refused:
        office.resize(2)
    assert refused.value.busy
