"""DeepEP's low-latency interface over the CPU communicator, between real processes, against a reference by hand."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
import torch
from comm_ranks import Channel, Hosts, Node, Ranks
from deep_ep_reference import WAYS, Way, check_round, inputs
from torch import distributed as dist
from two_hosts import free_port

from phalanx.comm.deep_ep import Buffer, Shape
from phalanx.errors import BadRequest, PhalanxError

pytestmark = pytest.mark.cluster

R, EXPERTS = 3, 2
SHAPE = Shape(max_tokens=9, hidden=256, top_k=3, num_experts=R * EXPERTS)
SIZES = {"max_tokens": 9, "hidden": 256, "top_k": 3, "slots_per_rank": EXPERTS}
TOKENS = ([9, 9, 9], [0, 0, 0], [9, 0, 1], [4, 7, 2])
EVERYBODY = range(R)
PAIR = Shape(max_tokens=9, hidden=256, top_k=3, num_experts=2 * EXPERTS)
"""The same for two ranks."""


def buffer_of(node: Node, **options: object) -> Buffer:
    return Buffer(communicator=node.comm, low_latency_mode=True, enable_shrink=True, **options)


def mask_of(buffer: Buffer) -> list[int]:
    mask = torch.full((buffer.group_size,), 9, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(mask)
    return mask.tolist()


def test_every_way_to_call_gives_what_the_reference_computes_by_hand(hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        buffer = buffer_of(node)
        for i, way in enumerate(WAYS):
            for j, tokens in enumerate(TOKENS):
                check_round(buffer, 10 * i + j, tokens, SHAPE, way, alive=EVERYBODY)
        buffer.clean_low_latency_buffer(9, 256, R * EXPERTS)
        smaller = Shape(5, 256, 3, R * EXPERTS)
        check_round(buffer, 77, [5, 0, 3], smaller, Way(), alive=EVERYBODY)
        node.tell(mask_of(buffer))
        node.hear()

    with Ranks(R, hosts=hosts, shape=SIZES) as ranks:
        ranks.start(body)
        assert [ranks.hear(rank) for rank in range(R)] == [[0, 0, 0]] * R


def test_a_dispatch_with_a_hook_returns_before_its_peers_began_and_the_hook_waits(pair_hosts: Hosts | None) -> None:
    def begin(buffer: Buffer, seed: int) -> tuple:
        mine = inputs(seed, buffer.rank, 6, PAIR)
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            mine.x.clone(), mine.topk_idx, 9, 2 * EXPERTS, use_fp8=False, return_recv_hook=True
        )
        return recv_x, count, handle, hook, mine

    def body(node: Node) -> None:
        node.adopt()
        buffer = buffer_of(node)
        if node.rank == 1:
            node.hear()
        first = begin(buffer, 1)
        assert not first[1].any(), "nothing was received yet"
        node.tell("sent")
        node.hear()
        second = begin(buffer, 2)  # a second batch: this finishes the first dispatch
        wanted = [sum((inputs(1, r, 6, PAIR).topk_idx == e).sum().item() for r in range(2)) for e in owned(node.rank)]
        assert first[1].tolist() == wanted
        for recv_x, _, handle, hook, mine in (first, second):
            hook()
            hook()  # has nothing left to do
            out, _, combine_hook = buffer.low_latency_combine(
                recv_x.clone(), mine.topk_idx, mine.weights, handle, return_recv_hook=True
            )
            combine_hook()
            weight = mine.weights.masked_fill(mine.topk_idx < 0, 0).sum(1, keepdim=True)
            assert torch.allclose(out.float(), mine.x.float() * weight, rtol=0.02, atol=0.02)
        node.tell("done")
        node.hear()

    def owned(rank: int) -> range:
        return range(rank * EXPERTS, (rank + 1) * EXPERTS)

    with Ranks(2, hosts=pair_hosts, shape=SIZES) as ranks:
        ranks.start(body)
        assert ranks.hear(0) == "sent"  # rank 1 has not begun
        ranks.tell(1)
        assert ranks.hear(1) == "sent"
        for rank in range(2):
            ranks.tell(rank)
        assert [ranks.hear(rank) for rank in range(2)] == ["done"] * 2


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_a_rank_killed_in_mid_flight_is_masked_and_its_place_can_be_taken_again(
    hosts: Hosts | None, phase: str
) -> None:
    def die_in_the_second(channel: Channel, name: str, seen: list[str] = []) -> None:  # noqa: B006
        if name == phase:
            seen.append(name)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def victim(node: Node) -> None:
        node.adopt()
        buffer = buffer_of(node)
        for seed in range(3):
            check_round(buffer, seed, TOKENS[0], SHAPE, Way(), alive=EVERYBODY)

    def survivor(node: Node) -> None:
        node.adopt()
        buffer = buffer_of(node)
        check_round(buffer, 0, TOKENS[0], SHAPE, Way(), alive=EVERYBODY)
        mine = inputs(1, node.rank, 9, SHAPE)
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, 9, R * EXPERTS, use_fp8=False, return_recv_hook=True
        )
        hook()
        buffer.low_latency_combine(recv_x, mine.topk_idx, mine.weights, handle)
        buffer.clean_low_latency_buffer(9, 256, R * EXPERTS)  # who died after it gave its part is missed here
        assert mask_of(buffer) == [0, 0, 1]
        for seed, way in enumerate(WAYS, 2):
            check_round(buffer, seed, TOKENS[3], SHAPE, way, alive=(0, 1))
        buffer.low_latency_clean_mask_buffer()
        assert mask_of(buffer) == [0, 0, 0]
        check_round(buffer, 9, TOKENS[0], SHAPE, Way(), alive=(0, 1))
        assert mask_of(buffer) == [0, 0, 1], "the dead are found again"
        node.tell("found")
        node.hear()
        buffer.low_latency_update_mask_buffer(1 - node.rank, True)
        assert mask_of(buffer) == [node.rank, 1 - node.rank, 1]
        check_round(buffer, 10, TOKENS[0], SHAPE, Way(fp8=True), alive=(node.rank,))
        node.tell("alone")
        node.hear()
        buffer.low_latency_update_mask_buffer(1 - node.rank, False)
        check_round(buffer, 11, TOKENS[0], SHAPE, Way(), alive=(0, 1))
        node.tell("together")
        together(node, buffer)

    def newcomer(node: Node) -> None:
        together(node, buffer_of(node))

    def together(node: Node, buffer: Buffer) -> None:
        node.adopt()
        check_round(buffer, 12, TOKENS[0], SHAPE, Way(end="hook"), alive=EVERYBODY)
        node.tell(mask_of(buffer))
        node.hear()

    with Ranks(R, hosts=hosts, shape=SIZES) as ranks:
        ranks.spawn(0, survivor)
        ranks.spawn(1, survivor)
        ranks.spawn(2, victim, fault_point=die_in_the_second)
        ranks.meet(1)
        ranks.bury(2)
        for said in ("found", "alone"):
            assert [ranks.hear(rank) for rank in (0, 1)] == [said] * 2
            for rank in (0, 1):
                ranks.tell(rank)
        assert [ranks.hear(rank) for rank in (0, 1)] == ["together"] * 2
        ranks.spawn(2, newcomer, incarnation=1)
        ranks.meet(2)
        assert [ranks.hear(rank) for rank in range(R)] == [[0, 0, 0]] * R


@pytest.mark.parametrize("own", [True, False], ids=["its own communicator", "a given one"])
def test_without_shrinking_a_lost_rank_is_an_error_and_masks_are_refused(own: bool) -> None:
    port = free_port()

    def body(node: Node) -> None:
        node.adopt()
        if own:
            buffer = Buffer(
                store=f"127.0.0.1:{port}", rank=node.rank, size=R, shape=SHAPE, low_latency_mode=True, device="cpu"
            )
        else:
            buffer = Buffer(communicator=node.comm, low_latency_mode=True)
        node.tell("made")
        mine = inputs(0, node.rank, 3, SHAPE)
        with pytest.raises(PhalanxError, match="enable_shrink"):
            buffer.low_latency_query_mask_buffer(torch.zeros(R, dtype=torch.int32))
        node.hear()
        try:
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, 9, R * EXPERTS)
        except PhalanxError as error:
            node.tell([type(error).__name__, str(error)])
        node.hear()

    with Ranks(R, shape=SIZES) as ranks:
        ranks.start(body)
        assert [ranks.hear(rank) for rank in range(R)] == ["made"] * R
        ranks.kill(1)
        for rank in (0, 2):
            ranks.tell(rank)
        said = [ranks.hear(rank) for rank in (0, 2)]
        assert [name for name, _ in said] == ["PeerDied" if own else "PeerLost"] * 2
        assert all(text.startswith("rank 1 died" if own else "lost ranks [1]") for _, text in said)


def test_a_view_adopted_before_the_hook_makes_it_find_nothing(pair_hosts: Hosts | None) -> None:
    def body(node: Node) -> None:
        node.adopt()
        buffer = buffer_of(node)
        mine = inputs(0, node.rank, 9, PAIR)
        _, count, handle, _, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, 9, 2 * EXPERTS, return_recv_hook=True
        )
        with pytest.raises(AssertionError, match="dispatch was begun and is not finished"):
            node.comm.barrier()
        node.tell("begun")
        node.adopt()
        hook()
        assert not count.any()
        out, _, _ = buffer.low_latency_combine(
            buffer.get_next_low_latency_combine_buffer(handle), mine.topk_idx, mine.weights, handle
        )
        assert not out.any()
        check_round(buffer, 3, [9, 4], PAIR, Way(), alive=range(2))
        node.tell(mask_of(buffer))
        node.hear()

    with Ranks(2, hosts=pair_hosts, shape=SIZES) as ranks:
        for rank in range(2):
            ranks.spawn(rank, body)
        ranks.meet(1)
        assert [ranks.hear(rank) for rank in range(2)] == ["begun"] * 2
        ranks.meet(2)
        assert [ranks.hear(rank) for rank in range(2)] == [[0, 0]] * 2


def through_group(node: Node, port: int) -> Buffer:
    """As DeepEP's callers do it: nothing but the import is different."""
    store = dist.TCPStore("127.0.0.1", port, R, node.rank == 0, timedelta(seconds=30), False)
    dist.init_process_group("gloo", store=store, rank=node.rank, world_size=R)
    nbytes = Buffer.get_low_latency_rdma_size_hint(9, 256, R, R * EXPERTS)
    return Buffer(
        dist.group.WORLD, 0, nbytes, low_latency_mode=True, num_qps_per_rank=EXPERTS, enable_shrink=True, device="cpu"
    )


def through_store(node: Node, port: int) -> Buffer:
    return Buffer(
        store=f"127.0.0.1:{port}", rank=node.rank, size=R, shape=SHAPE, low_latency_mode=True, enable_shrink=True,
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("way_to_meet", [through_group, through_store])
def test_a_buffer_makes_its_own_communicator_and_outlives_a_rank_and_the_group(way_to_meet: object) -> None:
    port = free_port()

    def body(node: Node) -> None:
        buffer = way_to_meet(node, port)
        assert (buffer.rank, buffer.group_size, mask_of(buffer)) == (node.rank, R, [0, 0, 0])
        check_round(buffer, 1, TOKENS[0], SHAPE, Way(fp8=True), alive=EVERYBODY)
        if dist.is_initialized():
            dist.destroy_process_group()
        node.tell("met")
        node.hear()
        check_round(buffer, 2, TOKENS[0], SHAPE, Way(end="hook"), alive=(1, 2))
        node.tell(mask_of(buffer))
        node.hear()
        more = inputs(0, node.rank, 12, SHAPE)
        with pytest.raises(BadRequest, match="make another one"):
            buffer.low_latency_dispatch(more.x, more.topk_idx, 12, R * EXPERTS)
        buffer.destroy()
        buffer.destroy()
        with pytest.raises(BadRequest, match="destroyed"):
            buffer.low_latency_dispatch(more.x[:9], more.topk_idx[:9], 9, R * EXPERTS)
        node.tell("destroyed")

    with Ranks(R, shape=SIZES) as ranks:
        for rank in range(R):
            ranks.spawn(rank, body)
        assert [ranks.hear(rank) for rank in range(R)] == ["met"] * R
        ranks.kill(0)
        for rank in (1, 2):
            ranks.tell(rank)
        assert [ranks.hear(rank) for rank in (1, 2)] == [[1, 0, 0]] * 2
        for rank in (1, 2):
            ranks.tell(rank)
        assert [ranks.hear(rank) for rank in (1, 2)] == ["destroyed"] * 2


def test_ranks_that_want_different_things_are_told_which() -> None:
    port = free_port()

    def body(node: Node) -> None:
        shape = Shape(9 + node.rank, 256, 3, 2 * EXPERTS)
        try:
            Buffer(store=f"127.0.0.1:{port}", rank=node.rank, size=2, shape=shape, low_latency_mode=True, device="cpu")
        except PhalanxError as error:
            node.tell(str(error))
        node.hear()

    with Ranks(2, shape=SIZES) as ranks:
        for rank in range(2):
            ranks.spawn(rank, body)
        assert all("max_tokens=9" in said and "max_tokens=10" in said for said in map(ranks.hear, range(2)))
