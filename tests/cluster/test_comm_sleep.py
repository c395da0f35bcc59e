"""Ranks that sleep together: no wake-up is lost, and none comes without a reason."""

from __future__ import annotations

import os
import random
import time

import pytest
from comm_ranks import CLEAN, PATIENCE_S, Hosts, Node, Ranks
from comm_reference import check_all_gather

pytestmark = pytest.mark.cluster

ROUNDS = 1200
ROUNDS_BETWEEN_HOSTS = 300
PORTION = 100
"""Ranks say so after so many rounds: a loaded machine may take long for all of them."""


def dawdle(rng: random.Random) -> None:
    """Lose a random, mostly short, time, so that the races come in every order."""
    for _ in range(int(rng.expovariate(1 / 20))):
        os.sched_yield()


def test_thousands_of_random_rings_sleeps_and_steps_lose_no_wake_up_and_invent_none(hosts: Hosts | None) -> None:
    """In each round every rank either rings, or sleeps until someone rings, or nobody rings and nobody may wake."""

    rounds = ROUNDS_BETWEEN_HOSTS if hosts else ROUNDS

    def body(node: Node) -> None:
        node.adopt()
        comm = node.comm
        plan, own = random.Random(1), random.Random(100 + node.rank)  # the plan is everybody's
        slept = 0
        for round_ in range(rounds):
            ringers = {r for r in range(comm.ep_size) if plan.random() < 0.3}
            dawdle(own)
            if node.rank in ringers:
                comm.ring()
            elif ringers:
                began = time.monotonic()
                assert comm.sleep(PATIENCE_S), f"round {round_}: nothing woke rank {node.rank}, {ringers} rang"
                assert time.monotonic() - began < PATIENCE_S / 2
                slept += 1
            else:
                assert not comm.sleep(0.0), f"round {round_}: an old ring woke rank {node.rank}"
            dawdle(own)
            for _ in range(plan.randrange(1, 3)):
                check_all_gather(node, 0, round_)
            if round_ % PORTION == PORTION - 1:
                node.tell(round_)
        node.tell(slept)
        node.tell_status()
        node.hear()

    with Ranks(4, hosts=hosts) as ranks:
        ranks.start(body)
        for last in range(PORTION - 1, rounds, PORTION):
            assert [ranks.hear(rank) for rank in range(4)] == [last] * 4
        for rank in range(4):
            assert ranks.hear(rank) > rounds / 4
            assert ranks.hear(rank) == CLEAN


def test_a_ring_before_the_sleep_counts_and_a_ring_of_a_finished_collective_does_not(pair_hosts: Hosts | None) -> None:
    def ringer(node: Node) -> None:
        node.adopt()
        node.comm.ring()
        node.tell("rang")
        node.comm.barrier()
        node.hear()

    def sleeper(node: Node) -> None:
        node.adopt()
        node.hear()
        node.tell(node.comm.sleep(PATIENCE_S))
        node.comm.barrier()
        node.tell(node.comm.sleep(0.01))
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.start(ringer, sleeper)
        assert ranks.hear(0) == "rang"
        ranks.tell(1)
        assert ranks.hear(1) is True
        assert ranks.hear(1) is False


def test_a_ring_under_the_next_epoch_wakes_a_rank_that_adopts_it_later(pair_hosts: Hosts | None) -> None:
    def ringer(node: Node) -> None:
        node.adopt()
        node.comm.barrier()
        node.adopt()
        node.comm.ring()
        node.tell("rang")
        node.hear()

    def sleeper(node: Node) -> None:
        node.adopt()
        node.comm.barrier()
        node.adopt()
        node.tell(node.comm.sleep(PATIENCE_S))
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.start(ringer, sleeper)
        ranks.meet(2, tell=[0])
        assert ranks.hear(0) == "rang"
        ranks.meet(2, tell=[1])
        assert ranks.hear(1) is True


def test_a_readable_descriptor_ends_a_sleep_but_does_not_count_as_a_ring() -> None:
    def body(node: Node) -> None:
        node.adopt()
        read, write = os.pipe()
        os.write(write, b"x")
        node.tell(node.comm.sleep(PATIENCE_S, (read,)))
        os.read(read, 1)
        node.tell(node.comm.sleep(0.01, (read,)))
        node.hear()

    with Ranks(1) as ranks:
        ranks.spawn(0, body)
        ranks.meet(1)
        assert [ranks.hear(0), ranks.hear(0)] == [False, False]


@pytest.mark.parametrize("board", [False, True], ids=["kernel", "launcher"])
def test_the_death_of_a_peer_wakes_sleepers_and_is_in_their_status(hosts: Hosts | None, board: bool) -> None:
    def body(node: Node) -> None:
        node.adopt()
        node.comm.barrier()
        node.tell("asleep")
        node.tell(node.comm.sleep(PATIENCE_S))
        node.tell_status()
        node.hear()

    with Ranks(3, board=board, hosts=hosts) as ranks:
        ranks.start(body)
        assert [ranks.hear(rank) for rank in range(3)] == ["asleep"] * 3
        ranks.kill(0)
        assert [ranks.hear(rank) for rank in (1, 2)] == [True, True]
        assert [ranks.hear(rank)["causes"] for rank in (1, 2)] == [{"0": "notice"}] * 2


@pytest.mark.parametrize("by_address", [False, True], ids=["pid", "address"])
def test_the_launcher_wakes_sleepers_to_a_notice_about_a_living_rank(
    pair_hosts: Hosts | None, by_address: bool
) -> None:
    def body(node: Node) -> None:
        node.adopt()
        node.comm.barrier()
        node.tell("asleep")
        node.tell(node.comm.sleep(PATIENCE_S))
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.start(body)
        assert [ranks.hear(rank) for rank in range(2)] == ["asleep"] * 2
        assert ranks.board
        members = list(ranks.members.values())
        if not by_address:
            members = [type(m)(m.rank, m.incarnation, pid=m.pid) for m in members]
        ranks.board.poke(members)
        assert ranks.channels[0].silent_for(0.01), "a poke without news woke a rank"
        ranks.board.declare_dead(1, 0, "operator")
        ranks.board.poke(members)
        assert [ranks.hear(rank) for rank in range(2)] == [True, True]
        assert ranks.hear(0)["causes"] == {"1": "operator"}
        assert ranks.hear(1)["interrupted"] == 2


def test_an_interrupt_wakes_sleepers(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        if node.rank == 0:
            node.hear()
            node.comm.interrupt(4)
        else:
            node.tell("asleep")
            assert node.comm.sleep(PATIENCE_S)
        node.tell(node.comm.status().interrupted)
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.start(body)
        assert ranks.hear(1) == "asleep"
        ranks.tell(0)
        assert [ranks.hear(rank) for rank in range(2)] == [4, 4]
