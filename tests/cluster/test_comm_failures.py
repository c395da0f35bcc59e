"""Ranks that die, stop, lag, or wake up too late, at every point of a collective."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from comm_ranks import CLEAN, HIDDEN, PATIENCE_S, PEER_TIMEOUT_S, TOP_K, Channel, Hosts, Node, Ranks, masks_rank_0
from comm_reference import check_all_gather, check_exchange

from phalanx.errors import Evicted
from phalanx.world import Member, View

pytestmark = pytest.mark.cluster


def die_at(name: str, passes: int) -> Callable[[Channel, str], None]:
    """SIGKILL to ourselves when we pass the point `name` for the `passes`-th time."""
    left = [passes]

    def fault_point(_: Channel, passed: str) -> None:
        left[0] -= passed == name
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault_point


def run_round(node: Node, round_: int) -> None:
    """One of each collective, without looking at what came."""
    comm = node.comm
    slots = torch.full((2, TOP_K), (node.rank + 1) % comm.ep_size, dtype=torch.int32)
    got = comm.dispatch(torch.ones(2, HIDDEN, dtype=comm.dtype), slots)
    comm.combine(torch.ones(got.row_M.numel(), HIDDEN, dtype=comm.dtype), got)
    comm.all_gather(torch.tensor([round_]))
    comm.barrier()


def survive(dead: set[int], lead_in: int = 4) -> Callable[[Node], None]:
    """Run into the death of `dead`, then go on masked, exactly, and say what was seen."""

    def body(node: Node) -> None:
        node.adopt()
        for round_ in range(lead_in):
            run_round(node, round_)
        for round_ in range(lead_in, lead_in + 4):
            check_exchange(node, 3, round_, dead=dead)
            check_all_gather(node, 3, round_, dead=dead)
        node.tell([node.comm.failed, node.comm.query_mask().tolist()])
        node.tell_status()
        node.hear()

    return body


POINTS = [
    (op, 2 if op == name else {"dispatch": 5, "combine": 6, "all_gather": 7, "barrier": 8}[op], name)
    for op in ("dispatch", "combine", "all_gather", "barrier")
    for name in (op, "half_sent", "received")
]


@pytest.mark.parametrize(("op", "passes", "name"), POINTS, ids=[f"{op}-{name}" for op, _, name in POINTS])
def test_the_others_go_on_masked_when_a_rank_is_killed_in_any_collective(
    hosts: Hosts | None, op: str, passes: int, name: str
) -> None:
    with Ranks(4, hosts=hosts) as ranks:
        victim = (passes + len(name)) % 4
        for rank in range(4):
            ranks.spawn(rank, survive({victim}), fault_point=die_at(name, passes) if rank == victim else None)
        ranks.meet(1)
        ranks.bury(victim)
        for rank in set(range(4)) - {victim}:
            assert ranks.hear(rank) == [True, [int(r != victim) for r in range(4)]]
            status = ranks.hear(rank)
            assert (status["lost"], status["interrupted"]) == ([victim], 0), (op, rank)
            assert status["causes"] == {str(victim): "notice"}
            assert status["detect_s"][str(victim)] < PEER_TIMEOUT_S / 2, "by the notice, not by waiting"


@pytest.mark.parametrize("dead", [{0, 3}, {0, 1, 2}])
def test_several_ranks_killed_at_once_leave_the_others_exact_down_to_one(hosts: Hosts | None, dead: set[int]) -> None:
    points = [("half_sent", 5), ("combine", 2), ("received", 7), ("dispatch", 2)]
    with Ranks(4, hosts=hosts) as ranks:
        for rank in range(4):
            ranks.spawn(rank, survive(dead), fault_point=die_at(*points[rank]) if rank in dead else None)
        ranks.meet(1)
        for victim in dead:
            ranks.bury(victim)
        for rank in set(range(4)) - dead:
            ranks.hear(rank)
            assert ranks.hear(rank)["lost"] == sorted(dead)


def test_a_death_is_seen_without_a_launcher_long_before_the_time_out(hosts: Hosts | None) -> None:
    with Ranks(3, board=False, hosts=hosts) as ranks:
        for rank in range(3):
            ranks.spawn(rank, survive({1}), fault_point=die_at("combine", 2) if rank == 1 else None)
        ranks.meet(1)
        for rank in (0, 2):
            ranks.hear(rank)
            status = ranks.hear(rank)
            assert status["causes"] == {"1": "notice"}
            assert status["detect_s"]["1"] < PEER_TIMEOUT_S / 2


def test_a_notice_alone_masks_a_rank_and_tells_it_to_stop(hosts: Hosts | None) -> None:
    """An operator takes rank 2 out while it lives: the others mask it at once, it leaves its own wait."""

    def body(node: Node) -> None:
        node.adopt()
        if node.rank != 0:
            node.comm.barrier()
            node.tell_status()
        node.hear()

    with Ranks(3, hosts=hosts) as ranks:
        ranks.start(body)
        assert ranks.board
        ranks.board.declare_dead(2, 0, "operator")
        assert ranks.hear(2)["interrupted"] == 2
        assert ranks.channels[1].silent_for(0.02), "rank 1 must still wait for rank 0"
        ranks.board.declare_dead(0, 0, "exit")
        assert ranks.hear(1)["causes"] == {"0": "notice", "2": "operator"}


def test_a_notice_for_an_earlier_incarnation_harms_nobody(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        for round_ in range(3):
            check_exchange(node, 1, round_)
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        assert ranks.board
        ranks.board.declare_dead(1, 4, "signal")
        ranks.spawn(0, body)
        ranks.spawn(1, body, incarnation=5)
        ranks.meet(1)
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2


def barriers(node: Node) -> None:
    """A barrier each time the test says so, and the status after it."""
    node.adopt()
    while node.hear() == "barrier":
        node.comm.barrier()
        node.tell_status()


def test_a_pause_shorter_than_the_time_out_evicts_nobody(hosts: Hosts | None) -> None:
    with Ranks(3, peer_timeout_s=5.0, hosts=hosts) as ranks:
        ranks.start(barriers)
        with ranks.stopped(2):
            for rank in range(3):
                ranks.tell(rank, "barrier")
            assert ranks.channels[0].silent_for(0.5), "went on without a rank that only paused"
        assert [ranks.hear(rank) for rank in range(3)] == [CLEAN] * 3


def test_a_waiter_that_was_stopped_for_longer_than_the_time_out_suspects_nobody(pair_hosts: Hosts | None) -> None:
    with Ranks(2, peer_timeout_s=1.0, hosts=pair_hosts) as ranks:
        ranks.start(barriers)
        ranks.tell(0, "barrier")
        assert ranks.channels[0].silent_for(0.05)
        with ranks.stopped(0):
            assert ranks.channels[0].silent_for(1.2)
        assert ranks.channels[0].silent_for(0.05)
        ranks.tell(1, "barrier")
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2


def test_patience_gives_a_slow_peer_more_time_and_then_takes_it_back(pair_hosts: Hosts | None) -> None:
    def patient(node: Node) -> None:
        node.adopt()
        with node.comm.patience(20.0):
            node.comm.barrier()
        node.tell_status()
        node.comm.barrier()
        node.tell_status()

    with Ranks(2, peer_timeout_s=0.2, hosts=pair_hosts) as ranks:
        ranks.start(patient, barriers)
        assert ranks.channels[0].silent_for(0.5)
        ranks.tell(1, "barrier")
        assert ranks.hear(0) == CLEAN
        assert ranks.hear(0)["causes"] == {"1": "timeout"}


def test_computing_ranks_on_a_machine_with_too_few_cpus_are_not_suspected() -> None:
    """Each round takes a rank less CPU time than the time-out and, among hogs on its CPU, more than it in wall time."""
    timeout_s, work_s = 0.15, 0.06
    cpu = {min(os.sched_getaffinity(0))}

    def body(node: Node) -> None:
        os.sched_setaffinity(0, cpu)
        node.adopt()
        slowest = 0.0
        for _ in range(3):
            began, enough = time.monotonic(), time.thread_time() + work_s * (1 + node.rank) / 3
            while time.thread_time() < enough:
                pass
            slowest = max(slowest, time.monotonic() - began)
            node.comm.barrier()
        node.tell([node.comm.status().clean, slowest])
        node.hear()

    def hog(node: Node) -> None:
        os.sched_setaffinity(0, cpu)
        node.tell("busy")
        while True:
            pass

    with Ranks(3, peer_timeout_s=timeout_s) as ranks, Ranks(4) as hogs:
        for i in range(4):
            hogs.spawn(i, hog)
            assert hogs.hear(i) == "busy"
        ranks.start(body)
        said = [ranks.hear(rank) for rank in range(3)]
        assert [clean for clean, _ in said] == [True] * 3
        assert max(slowest for _, slowest in said) > timeout_s, "the CPU was not loaded enough to show anything"


def zombie(node: Node) -> None:
    """Stops itself in mid-epoch; when it is woken it goes on as if nothing had happened, until it is told."""
    node.adopt()
    node.hear()
    with node.comm.patience(PATIENCE_S):
        check_exchange(node, 9, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    comm = node.comm
    for _ in range(200):
        got = comm.dispatch(torch.ones(1, HIDDEN, dtype=comm.dtype), torch.zeros(1, TOP_K, dtype=torch.int32))
        out = comm.combine(torch.ones(got.row_M.numel(), HIDDEN, dtype=comm.dtype), got)
        assert not out.any(), "a zombie's token was answered"
        assert not comm.all_gather(torch.tensor([1])).any()
        comm.ring()
    node.tell_status()
    successor = View(6, 3, (Member(2, 1),))
    with pytest.raises(Evicted):
        comm.adopt(successor)
    node.hear()


def test_a_rank_stopped_for_longer_than_the_time_out_is_masked_and_later_harms_nobody(hosts: Hosts | None) -> None:
    """It sleeps through two epochs and the birth of its own successor, wakes up, writes, and is heard by nobody."""

    def member(node: Node) -> None:
        node.adopt()
        node.hear()
        with node.comm.patience(PATIENCE_S):
            check_exchange(node, 9, 0)
        check_exchange(node, 9, 1, dead={2})
        node.comm.barrier()
        node.tell_status()
        with node.comm.patience(PATIENCE_S):
            for epoch, dead in ((2, {2}), (3, {2}), (4, set())):
                node.adopt()
                for round_ in range(10):
                    check_exchange(node, epoch, round_, dead=dead)
                node.tell_status()
            node.adopt()
            node.tell("racing the zombie")
            for round_ in range(300):
                check_exchange(node, 5, round_)
        node.tell_status()
        node.hear()

    def successor(node: Node) -> None:
        with node.comm.patience(PATIENCE_S):
            for epoch in (4, 5):
                node.adopt()
                for round_ in range(10 if epoch == 4 else 300):
                    check_exchange(node, epoch, round_)
                node.tell_status()
        node.hear()

    timeout_s = 2.0 if hosts else 0.3  # of a peer on another host nobody here knows that it only waits for a CPU
    with Ranks(3, peer_timeout_s=timeout_s, hosts=hosts) as ranks:
        for rank, body in enumerate((member, member, zombie)):
            ranks.spawn(rank, body)
        ranks.meet(1)
        for rank in range(3):
            ranks.tell(rank)
        for rank in (0, 1):
            status = ranks.hear(rank)
            assert status["causes"] == {"2": "timeout"}
            assert status["detect_s"]["2"] >= timeout_s
        old = ranks.pids[2], ranks.channels[2]
        ranks.spawn(2, successor, incarnation=1)
        for epoch, members in ((2, [0, 1]), (3, [0, 1]), (4, [0, 1, 2])):
            ranks.meet(epoch, members)
            assert [ranks.hear(rank) for rank in members] == [CLEAN] * len(members)
        ranks.meet(5)
        assert ranks.hear(0) == "racing the zombie"
        os.kill(old[0], signal.SIGCONT)
        assert old[1].hear()["interrupted"] >= 2
        ranks.hear(1)
        assert [ranks.hear(rank) for rank in range(3)] == [CLEAN] * 3


def test_an_interrupt_ends_every_wait_and_every_later_collective_until_its_epoch_is_adopted(
    hosts: Hosts | None,
) -> None:
    def body(node: Node) -> None:
        node.adopt()
        comm = node.comm
        if node.rank == 2:
            node.hear()
            comm.interrupt(2)
        else:
            node.tell("waiting")
        slots = torch.zeros(3, TOP_K, dtype=torch.int32)
        got = comm.dispatch(torch.ones(3, HIDDEN, dtype=comm.dtype), slots)
        assert got.x_ND.shape == (0, HIDDEN)
        assert not comm.combine(torch.zeros(0, HIDDEN, dtype=comm.dtype), got).any()
        assert not comm.all_gather(torch.tensor([7])).any()
        comm.barrier()
        assert comm.failed
        assert comm.sleep(10.0), "an open roll call ends a sleep"
        node.tell_status()
        node.adopt()
        check_exchange(node, 2, 2)
        node.tell_status()
        node.hear()

    with Ranks(3, hosts=hosts) as ranks:
        ranks.start(body)
        assert [ranks.hear(rank) for rank in (0, 1)] == ["waiting"] * 2
        ranks.tell(2)
        assert [ranks.hear(rank) for rank in range(3)] == [CLEAN | {"interrupted": 2}] * 3
        ranks.meet(2)
        assert [ranks.hear(rank) for rank in range(3)] == [CLEAN] * 3


def test_an_interrupt_for_a_later_epoch_outlives_the_adoption_of_an_earlier_one(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        if node.rank == 0:
            node.comm.interrupt(1)
            assert not node.comm.failed, "that roll call is over"
            node.comm.interrupt(3)
        node.comm.barrier()
        node.tell_status()
        node.adopt()
        node.comm.barrier()
        node.tell_status()
        node.adopt()
        node.comm.barrier()
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        for rank in range(2):
            ranks.spawn(rank, body)
        for epoch, interrupted in ((1, 3), (2, 3), (3, 0)):
            ranks.meet(epoch)
            assert [ranks.hear(rank)["interrupted"] for rank in range(2)] == [interrupted] * 2


def test_a_member_that_died_before_it_could_be_mapped_is_masked_by_notice(hosts: Hosts | None) -> None:
    with Ranks(3, board=False, hosts=hosts) as ranks:
        for rank in range(3):
            ranks.spawn(rank, barriers)
        ranks.kill(1)
        ranks.meet(1, tell=[0, 2])
        for rank in (0, 2):
            ranks.tell(rank, "barrier")
        for rank in (0, 2):
            assert ranks.hear(rank)["causes"] == {"1": "notice"}


def test_a_rank_that_the_others_masked_learns_so_from_a_buffer_in_use_again() -> None:
    """Rank 0 is heard, masked, and overtaken while it has not yet copied: it must not trust what it copies."""

    def dawdle(channel: Channel, name: str) -> None:
        if name == "received":
            channel.tell("received")
            channel.hear()

    def slow(node: Node) -> None:
        node.adopt()
        run_round(node, 0)
        node.tell_status()
        node.hear()

    with Ranks(2) as ranks:
        ranks.spawn(0, slow, fault_point=dawdle)
        ranks.spawn(1, masks_rank_0)
        ranks.meet(1)
        assert ranks.hear(0) == "received"
        assert ranks.hear(1)["causes"] == {"0": "operator"}
        ranks.tell(0)
        for _ in range(3):  # the rest of the round, with nobody left
            assert ranks.hear(0) == "received"
            ranks.tell(0)
        status = ranks.hear(0)
        assert status["causes"] == {"1": "timeout"}
        assert status["detect_s"] == {"1": 0.0}, "found by waiting, not by looking at the buffer"


def test_nothing_is_sent_to_a_masked_rank_and_a_cleared_one_is_heard_again(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        comm, other = node.comm, 1 - node.rank
        comm.barrier()
        comm.update_mask(other, False)
        assert comm.query_mask().tolist() == [int(r == node.rank) for r in range(2)]
        check_exchange(node, 4, 0, dead={other})
        assert comm.status().causes == ((other, "operator"),)
        node.tell("masked")
        node.hear()
        comm.update_mask(other, True)
        check_exchange(node, 4, 1)
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.start(body)
        assert [ranks.hear(rank) for rank in range(2)] == ["masked"] * 2
        for rank in range(2):
            ranks.tell(rank)
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2


@pytest.mark.parametrize("kill", [False, True], ids=["silent", "dead"])
def test_without_elasticity_a_lost_peer_is_an_error_that_names_it(pair_hosts: Hosts | None, kill: bool) -> None:
    def body(node: Node) -> None:
        node.adopt()
        node.hear()
        try:
            node.comm.barrier()
        except Exception as error:
            node.tell([type(error).__name__, str(error)])
        node.hear()

    timeout_s = PEER_TIMEOUT_S if kill else 0.2
    with Ranks(2, peer_timeout_s=timeout_s, elastic=False, board=False, hosts=pair_hosts) as ranks:
        ranks.start(body)
        if kill:
            ranks.kill(1)
        ranks.tell(0)
        name, message = ranks.hear(0)
        assert name == ("PeerDied" if kill else "CollectiveTimeout")
        assert message.startswith("rank 1 ")
        assert "barrier" in message
