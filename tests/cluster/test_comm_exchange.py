"""Dispatch, combine, all_gather and barrier between healthy processes, against a dense computation."""

from __future__ import annotations

import os

import pytest
import torch
from comm_ranks import CLEAN, HIDDEN, MAX_TOKENS, TOP_K, Channel, Hosts, Node, Ranks
from comm_reference import check_all_gather, check_exchange

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_exchanges_equal_the_dense_computation(hosts: Hosts | None, ep_size: int, dtype: torch.dtype) -> None:
    def body(node: Node) -> None:
        node.adopt()
        for round_ in range(60):
            check_exchange(node, 11, round_)
            if round_ % 3 == 0:
                check_all_gather(node, 11, round_)
            if round_ % 7 == 0:
                node.comm.barrier()
        node.tell_status()
        node.hear()

    with Ranks(ep_size, dtype=dtype, hosts=hosts) as ranks:
        for rank in range(ep_size):
            ranks.spawn(rank, body)
        ranks.meet(1)
        assert [ranks.hear(rank) for rank in range(ep_size)] == [CLEAN] * ep_size


def test_a_reader_that_lags_by_a_whole_collective_never_reads_the_next_ones_data(hosts: Hosts | None) -> None:
    """Between what it heard and what it takes, one rank waits until the others have gone on as far as they can."""

    def lag(channel: Channel, name: str) -> None:
        if name == "received":
            channel.tell("received")
            channel.hear()

    def run(node: Node) -> None:
        node.adopt()
        for round_ in range(4):
            check_exchange(node, 5, round_)
        node.tell_status()
        node.hear()

    def ahead(channel: Channel, name: str) -> None:
        if name in ("dispatch", "combine"):
            channel.tell(name)

    with Ranks(3, hosts=hosts) as ranks:
        ranks.spawn(0, run, fault_point=lag)
        ranks.spawn(1, run, fault_point=ahead)
        ranks.spawn(2, run, fault_point=ahead)
        ranks.meet(1)
        for collective in range(8):
            for other in (1, 2):
                if collective == 0:
                    ranks.hear(other)
            assert ranks.hear(0) == "received"
            if collective < 7:  # the others have sent the next collective: they are as far ahead as they can be
                ahead_by_one = [ranks.hear(other) for other in (1, 2)]
                assert ahead_by_one == ["combine" if collective % 2 == 0 else "dispatch"] * 2
                assert all(ranks.channels[other].silent_for(0.005) for other in (1, 2)), "went on without rank 0"
            ranks.tell(0)
        assert [ranks.hear(rank) for rank in range(3)] == [CLEAN] * 3


def test_messages_sent_early_by_a_faster_peer_of_the_next_epoch_are_kept(pair_hosts: Hosts | None) -> None:
    def early(channel: Channel, name: str) -> None:
        if name == "dispatch":
            channel.tell("sent")

    def body(node: Node) -> None:
        for epoch in (1, 2):
            node.adopt()
            check_exchange(node, 7, epoch)
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.spawn(0, body, fault_point=early)
        ranks.spawn(1, body)
        ranks.meet(1)
        assert ranks.hear(0) == "sent"
        ranks.meet(2, tell=[0])
        assert ranks.hear(0) == "sent"  # under epoch 2, while rank 1 is still in epoch 1
        ranks.meet(2, tell=[1])
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2


def test_two_ranks_in_different_collectives_are_told_so_instead_of_mixing_their_data(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        try:
            if node.rank == 0:
                node.comm.barrier()
            else:
                node.comm.all_gather(torch.zeros(1, dtype=torch.int64))
        except AssertionError as error:
            node.tell(str(error))
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        for rank in range(2):
            ranks.spawn(rank, body)
        ranks.meet(1)
        assert ranks.hear(0) == "rank 1 runs all_gather while this rank runs barrier"
        assert ranks.hear(1) == "rank 0 runs barrier while this rank runs all_gather"


def test_wrong_shapes_and_too_many_tokens_are_refused_by_name() -> None:
    def body(node: Node) -> None:
        node.adopt()
        refused = []
        for x, slots in (
            (torch.zeros(MAX_TOKENS + 1, HIDDEN), torch.zeros(MAX_TOKENS + 1, TOP_K)),
            (torch.zeros(1, HIDDEN + 1), torch.zeros(1, TOP_K)),
            (torch.zeros(1, HIDDEN), torch.zeros(2, TOP_K)),
        ):
            with pytest.raises(AssertionError) as caught:
                node.comm.dispatch(x.bfloat16(), slots.to(torch.int32))
            refused.append(str(caught.value))
        node.tell(refused)

    with Ranks(1) as ranks:
        ranks.spawn(0, body)
        ranks.meet(1)
        assert ranks.hear(0)[0] == f"{MAX_TOKENS + 1} tokens are more than max_tokens={MAX_TOKENS}"


def test_adopting_views_leaks_neither_files_nor_mappings(pair_hosts: Hosts | None) -> None:
    """Twenty changes of the view, each with a new process in rank 1's place."""

    def stays(node: Node) -> None:
        for epoch in range(1, 41):
            node.adopt()
            node.comm.barrier()
            with open("/proc/self/maps") as maps:
                mapped = sum("phalanx-comm" in line for line in maps)
            node.tell([len(os.listdir("/proc/self/fd")), mapped, epoch])
        node.hear()

    def comes_and_goes(node: Node) -> None:
        node.adopt()
        node.comm.barrier()
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        ranks.spawn(0, stays)
        alone, together = set(), set()
        for i in range(20):
            ranks.spawn(1, comes_and_goes, incarnation=i)
            ranks.meet(2 * i + 1)
            together.add(tuple(ranks.hear(0)[:2]))
            ranks.kill(1)
            ranks.meet(2 * i + 2, [0])
            alone.add(tuple(ranks.hear(0)[:2]))
        assert len(together) == len(alone) == 1, (together, alone)
        assert alone.pop()[1] == 1
        mapped = 2 if pair_hosts is None else 1
        assert together.pop()[1] == mapped


def test_nothing_stays_behind_when_everybody_is_killed(hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        while True:
            node.comm.barrier()

    def shared_files() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if "phalanx-comm" in name}

    before = shared_files()
    with Ranks(3, hosts=hosts) as ranks:
        for rank in range(3):
            ranks.spawn(rank, body)
        ranks.meet(1)
        addresses = [member.comm_address.split()[0] for member in ranks.members.values()]
        assert all(os.path.exists(address) for address in addresses)
        for rank in range(3):
            ranks.kill(rank)
    assert not any(os.path.exists(address) for address in addresses)
    assert shared_files() <= before


def test_a_zero_length_row_and_the_longest_row_are_gathered(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        assert node.comm.all_gather(torch.zeros(0, dtype=torch.int64)).shape == (2, 0)
        rows = node.comm.all_gather(torch.arange(64) + node.rank)
        assert torch.equal(rows, torch.stack([torch.arange(64), torch.arange(64) + 1]))
        node.tell("gathered")
        node.hear()

    with Ranks(2, hosts=pair_hosts) as ranks:
        for rank in range(2):
            ranks.spawn(rank, body)
        ranks.meet(1)
        assert [ranks.hear(rank) for rank in range(2)] == ["gathered"] * 2
