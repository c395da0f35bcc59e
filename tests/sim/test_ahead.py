"""Changes that are agreed on beside the steps: nobody stands for the agreement, and whoever dies at any point of it, no
stream changes."""

from __future__ import annotations

import pytest
from sim_cluster import Process
from test_balance import OFTEN
from test_balance import Story as BalanceStory
from test_recovery import Story
from test_return import FOUR, comes_back, joins, members


class Watched(Story):
    """A story under a long load, which notes how many tokens had been streamed when a rank first passed a point."""

    def __init__(self) -> None:
        self.tokens_at: dict[tuple[int, str], int] = {}
        self.watches = False
        super().__init__(FOUR)
        self.requests(count=8, length=200)
        self.sim.after(0.02, lambda: self.kill(1))
        self.sim.after(0.055, self.watch)

    def watch(self) -> None:
        self.watches = True

    def _passed(self, process: Process, name: str) -> None:
        if self.watches:
            streamed = sum(len(request.output) for request in self.cluster.router.requests)
            self.tokens_at.setdefault((process.member.rank, name), streamed)
        super()._passed(process, name)


def test_streams_go_on_while_a_join_is_agreed_on_and_no_healthy_rank_waits_for_the_agreement() -> None:
    told = Watched()
    comes_back(told, 1, 0.06)
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]
    for rank in (0, 2, 3):
        asked, switched = told.tokens_at[rank, "roll_call"], told.tokens_at[rank, "replan"]
        assert switched - asked >= 3 * len(told.cluster.latest_members()), "steps went on meanwhile"
    felt = [adoption for rank, adoption in joins(told.cluster) if rank != 1]
    assert len(felt) == 3
    for adoption in felt:
        assert adoption.joined == (1,)
        assert adoption.seconds.agree == adoption.seconds.replan == 0


def test_a_newcomer_is_mapped_beside_the_steps_by_all_who_let_it_in() -> None:
    told = Watched()
    comes_back(told, 1, 0.06)
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]
    healthy = [process.comm for process in told.cluster.processes if process.member.rank != 1]
    assert len(healthy) == 3
    for comm in healthy:
        assert comm is not None
        assert {epoch for epoch, _ in comm.mapped_in_adopt} == {1}, comm.mapped_in_adopt


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_whose_driver_takes_for_ever_to_map_a_newcomer_holds_nobody_up(rank: int) -> None:
    told = Watched()

    def slow() -> None:
        comm = told.cluster.processes[rank].comm
        assert comm is not None
        comm.map_s = 1e9

    told.sim.after(0.03, slow)
    comes_back(told, 1, 0.06)
    told.run()
    assert members(told) == ["0.0", "1.1", "2.0", "3.0"]
    mapped = told.cluster.processes[rank].comm
    assert mapped is not None
    assert {str(member) for epoch, member in mapped.mapped_in_adopt if epoch > 1} == {"1.1"}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("steps", range(1, 16, 3))
def test_a_rank_that_dies_in_any_step_while_a_join_is_agreed_on_is_one_more_recovery(rank: int, steps: int) -> None:
    told = Watched()
    comes_back(told, 1, 0.06)
    told.sim.after(0.061, lambda: told.on(rank, "step", *["nothing"] * steps, "die"))
    told.run()
    assert members(told) == [name for name in ("0.0", "1.1", "2.0", "3.0") if name != f"{rank}.0"]


@pytest.mark.parametrize("delay_ms", range(1, 30, 4))
def test_a_newcomer_that_dies_while_it_is_agreed_on_is_followed_by_the_next_one(delay_ms: int) -> None:
    told = Watched()
    first = comes_back(told, 1, 0.06)

    def strike() -> None:
        assert first[0].task is not None
        told.cluster.notices.declare_dead(first[0].member, "signal")
        told.sim.kill(first[0].task)

    told.sim.after(0.06 + 0.001 * delay_ms, strike)
    comes_back(told, 1, 0.3, incarnation=2)
    told.run()
    assert members(told) == ["0.0", "1.2", "2.0", "3.0"]


def test_the_switch_to_balanced_experts_takes_nobodys_time_for_an_agreement() -> None:
    told = BalanceStory(OFTEN)
    told.run()
    switches = [adoption for _, adoption in told.cluster.adoptions if adoption.trigger == "rebalance"]
    assert switches
    assert all(adoption.seconds.agree == adoption.seconds.replan == 0 for adoption in switches)
