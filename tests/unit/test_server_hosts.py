"""What the server makes of whole hosts: they come and go with all their ranks at once."""

from __future__ import annotations

import pytest
from test_server_router import Desk

from phalanx import messages as m
from phalanx.server.flight import Connect, Disconnect, Lost


@pytest.fixture
def desk() -> Desk:
    """Four serving ranks on two hosts."""
    desk = Desk(4)
    for node, host in enumerate(("10.0.0.1", "10.0.0.2")):
        ranks = [2 * node, 2 * node + 1]
        desk.hear(m.HostState(node_rank=node, host=host, state="alive", ranks=ranks))
        for rank in ranks:
            desk.hear(m.Spawned(rank=rank, incarnation=0, pid=100 + rank, host=host))
    desk.meet((0, 0), (1, 0), (2, 0), (3, 0))
    return desk


def lose_host_1(desk: Desk) -> None:
    names = [(2, 0), (3, 0)]
    desk.hear(m.HostState(node_rank=1, state="lost", ranks=[2, 3], reason="hang-up", lost=names))


def test_no_request_of_a_lost_host_moves_to_another_rank_of_it(desk: Desk) -> None:
    for _ in range(8):
        desk.submit()
    moved = {submit.request_id for rank, submit in desk.submits() if rank in (2, 3)}
    assert len(moved) == 4
    desk.sent.clear()
    lose_host_1(desk)
    assert {submit.request_id for _, submit in desk.submits()} == moved
    assert {rank for rank, _ in desk.submits()} == {0, 1}
    assert all(submit.attempt == 1 for _, submit in desk.submits())
    assert [desk.router.roster.state(rank) for rank in range(4)] == ["recovering", "recovering", "dead", "dead"]


def test_a_lost_host_is_told_with_its_reason_and_its_ranks_are_counted_once(desk: Desk) -> None:
    desk.sent.clear()
    lose_host_1(desk)
    lost = [effect for effect in desk.sent if isinstance(effect, Lost)]
    assert [effect.identity.rank for effect in lost] == [2, 3]
    assert all("host 1 is lost: hang-up" in effect.detail for effect in lost)
    assert sum(isinstance(effect, Disconnect) for effect in desk.sent) == 2
    lose_host_1(desk)
    desk.hear(m.Died(rank=2, incarnation=0, cause="signal", detail="said late"))
    assert desk.value("phalanx_rank_failures_total", cause="host") == 2
    assert desk.value("phalanx_rank_failures_total", cause="signal") == 0


def test_status_and_metrics_show_hosts_and_what_runs_where(desk: Desk) -> None:
    status = desk.router.roster.status()
    assert [host["host"] for host in status["hosts"]] == ["10.0.0.1", "10.0.0.2"]
    assert desk.value("phalanx_hosts_alive") == 2
    for node in (0, 1):
        full = m.VaultState(state="full", node_rank=node, filled_bytes=10, total_bytes=10 + node)
        desk.hear(full)
    assert desk.value("phalanx_vault_filled_bytes") == 20
    assert desk.value("phalanx_vault_total_bytes") == 21
    lose_host_1(desk)
    here, there = desk.router.roster.status()["hosts"]
    assert (here["state"], here["ranks"], here["vault"]["state"]) == ("alive", [0, 1], "full")
    assert (there["host"], there["state"], there["reason"]) == ("10.0.0.2", "lost", "hang-up")
    assert there["vault"]["state"] == "off"
    assert desk.value("phalanx_hosts_alive") == 1
    assert desk.value("phalanx_vault_filled_bytes") == 10
    desk.hear(m.HostState(node_rank=1, host="10.0.0.2", state="alive", ranks=[2, 3]))
    assert desk.router.roster.status()["hosts"][1]["vault"]["state"] == "full", "a cut does not empty a vault"
    assert desk.value("phalanx_vault_filled_bytes") == 20


def test_a_host_that_comes_back_brings_the_next_incarnations(desk: Desk) -> None:
    lose_host_1(desk)
    desk.meet((0, 0), (1, 0), trigger="failure")
    desk.hear(m.HostState(node_rank=1, host="10.0.0.2", state="alive", ranks=[2, 3]))
    desk.sent.clear()
    for rank in (2, 3):
        desk.hear(m.Spawned(rank=rank, incarnation=1, pid=200 + rank, host="10.0.0.2"))
        assert desk.router.roster.state(rank) == "rejoining"
    assert [e.identity for e in desk.sent if isinstance(e, Connect)] == [(2, 1), (3, 1)]
    assert desk.value("phalanx_hosts_alive") == 2


def test_a_knock_goes_to_all_members_but_the_newcomers_own_place(desk: Desk) -> None:
    lose_host_1(desk)
    desk.meet((0, 0), (1, 0), trigger="failure")
    desk.hear(m.Spawned(rank=2, incarnation=1, pid=202))
    desk.hear(m.Knock(rank=2, incarnation=1))
    assert [m.Knock(rank=2, incarnation=1)] == desk.to(0) == desk.to(1)
    assert not any(isinstance(message, m.Knock) for message in desk.to(2, 1))


def test_a_knock_goes_to_members_that_wait_because_they_cannot_serve(desk: Desk) -> None:
    lose_host_1(desk)
    for rank in (0, 1):
        desk.hear(m.CannotServe(rank=rank, incarnation=0, epoch=2, reason="--min-ranks is 4"))
    desk.hear(m.Spawned(rank=2, incarnation=1, pid=202))
    desk.hear(m.Knock(rank=2, incarnation=1))
    assert [m.Knock(rank=2, incarnation=1)] == desk.to(0) == desk.to(1)
    desk.hear(m.CannotServe(rank=2, incarnation=1, epoch=3, reason="--min-ranks is 4"))  # it was let in
    desk.hear(m.Spawned(rank=3, incarnation=1, pid=203))
    desk.hear(m.Knock(rank=3, incarnation=1))
    assert desk.to(2, 1)[-1] == m.Knock(rank=3, incarnation=1)
