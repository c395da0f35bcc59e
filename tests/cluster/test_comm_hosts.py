"""What only links between hosts can do wrong: strangers, broken frames, frames of the past, streams that break."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
import torch
from comm_ranks import CLEAN, HIDDEN, PATIENCE_S, SLOTS, TOKEN, TOP_K, Channel, Hosts, Node, Ranks, masks_rank_0
from comm_reference import check_all_gather, check_exchange

from phalanx import wire
from phalanx.comm import tags
from phalanx.comm.frames import HEADER_BYTES, header
from phalanx.world import Member

pytestmark = pytest.mark.cluster


def apart(rank: int) -> str:
    return f"host {rank}"


def in_pairs(rank: int) -> str:
    return f"host {rank // 2}"


class Impostor:
    """The test itself in the place of rank 1: it knows the token, and says whatever it likes to rank 0."""

    def __init__(self, ranks: Ranks) -> None:
        self._listener = wire.listen("127.0.0.1")
        address = f"/proc/{os.getpid()}/fd/0 tcp://{wire.address_of(self._listener)}"
        ranks.members[1] = Member(1, 0, "elsewhere", os.getpid(), address)
        self.connection: socket.socket | None = None

    def answer(self) -> None:
        """Let rank 0 in; whatever it knocks for besides is not of interest."""
        self._listener.settimeout(PATIENCE_S)
        while True:
            connection, _ = self._listener.accept()
            try:
                hello = wire.welcome(connection, TOKEN, dict[str, msgspec.Raw], PATIENCE_S)  # type: ignore[type-abstract]
            except (OSError, wire.Refused):
                continue
            assert {"rank", "incarnation", "to_rank", "to_incarnation"} <= set(hello)
            connection.settimeout(PATIENCE_S)
            self.connection = connection
            return

    def say(self, *frames: bytes) -> None:
        assert self.connection
        self.connection.sendall(b"".join(frames))

    def hear(self, tag: int) -> None:
        """Read frames without a body until that one."""
        assert self.connection
        while self.connection.recv(HEADER_BYTES, socket.MSG_WAITALL) != header(tag, 0):
            pass

    def hang_up(self) -> None:
        assert self.connection
        self.connection.close()

    def close(self) -> None:
        self._listener.close()
        if self.connection:
            self.connection.close()


@contextmanager
def against_an_impostor(peer_timeout_s: float = 20.0) -> Iterator[tuple[Ranks, Impostor]]:
    """Rank 0 runs a barrier in each epoch that it is told of."""

    def body(node: Node) -> None:
        while True:
            node.adopt()
            node.comm.barrier()
            node.tell_status()

    with Ranks(2, hosts=apart, peer_timeout_s=peer_timeout_s) as ranks, ExitStack() as stack:
        ranks.spawn(0, body)
        impostor = Impostor(ranks)
        stack.callback(impostor.close)
        yield ranks, impostor


def barrier(epoch: int, number: int = 1) -> bytes:
    return header(tags.tag_of(epoch, number, tags.BARRIER), 0)


BROKEN = {
    "no frame": b"HTTP/1.1 200 OK\r\n\r\n",
    "too long": header(tags.tag_of(1, 1, tags.DISPATCH), 1 << 30),
    "a part of a token": header(tags.tag_of(1, 1, tags.DISPATCH), 7),
    "a body where none belongs": header(tags.tag_of(1, 1, tags.BARRIER), 8),
    "no kind": header(tags.tag_of(1, 1), 0),
    "an unknown kind": header(tags.tag_of(1, 1, 7), 0),
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN.keys())
def test_a_peer_that_sends_what_is_no_frame_is_lost_at_once(said: bytes) -> None:
    with against_an_impostor() as (ranks, impostor):
        ranks.meet(1, tell=[0])
        impostor.answer()
        impostor.say(said)
        assert ranks.hear(0)["causes"] == {"1": "notice"}


def test_frames_of_the_past_are_skipped_and_those_of_the_future_wait_for_their_epoch() -> None:
    with against_an_impostor() as (ranks, impostor):
        ranks.meet(5, tell=[0])
        impostor.answer()
        token = HIDDEN * 2 + TOP_K * 4 + 4
        impostor.say(
            header(tags.tag_of(4, 1, tags.DISPATCH), 3 * token) + b"x" * (3 * token), barrier(4), barrier(1, 9)
        )
        impostor.hear(tags.tag_of(5, 1, tags.BARRIER))
        assert ranks.channels[0].silent_for(0.02), "a frame of an earlier epoch ended a barrier"
        impostor.say(barrier(5))
        assert ranks.hear(0) == CLEAN
        ranks.meet(6, tell=[0])
        impostor.hear(tags.tag_of(6, 1, tags.BARRIER))
        impostor.say(barrier(8))
        assert ranks.hear(0) == CLEAN | {"interrupted": 8}, "a later epoch means that a roll call was open"
        ranks.meet(8, tell=[0])
        assert ranks.hear(0) == CLEAN, "what came early was not kept"


def test_a_peer_that_goes_on_alone_is_lost() -> None:
    with against_an_impostor() as (ranks, impostor):
        ranks.meet(1, tell=[0])
        impostor.answer()
        impostor.say(barrier(1, 3))
        assert ranks.hear(0)["causes"] == {"1": "timeout"}


def test_a_stream_that_broke_is_made_anew_when_the_next_view_has_its_peer() -> None:
    with against_an_impostor() as (ranks, impostor):
        for epoch in (1, 3):
            ranks.meet(epoch, tell=[0])
            impostor.answer()
            impostor.say(barrier(epoch))
            assert ranks.hear(0) == CLEAN
            ranks.meet(epoch + 1, tell=[0])
            impostor.hear(tags.tag_of(epoch + 1, 1, tags.BARRIER))
            impostor.hang_up()
            assert ranks.hear(0)["causes"] == {"1": "notice"}


def test_a_peer_that_never_finishes_the_handshake_is_silent_like_any_other() -> None:
    with against_an_impostor(peer_timeout_s=0.3) as (ranks, _):
        ranks.meet(1, tell=[0])
        assert ranks.hear(0)["causes"] == {"1": "timeout"}


class Hello(msgspec.Struct):
    """What a rank says when it calls another one."""

    rank: int
    incarnation: int
    to_rank: int
    to_incarnation: int
    shape: tuple[int, ...]
    purpose: str = "comm"


def test_strangers_and_callers_who_mean_someone_else_are_refused_and_disturb_nobody() -> None:
    def body(node: Node) -> None:
        for epoch in (1, 2):
            node.adopt()
            for round_ in range(4):
                check_exchange(node, epoch, round_)
            node.tell_status()
        node.hear()

    with Ranks(2, hosts=apart) as ranks, ExitStack() as stack:
        for rank in range(2):
            ranks.spawn(rank, body)
        ranks.meet(1)
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2
        address = ranks.members[1].comm_address.split("tcp://")[1]
        mute, rude = (stack.enter_context(socket.create_connection(wire.split_address(address))) for _ in range(2))
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
        with pytest.raises((wire.Refused, ConnectionError)):
            wire.connect(address, b"another token altogether", Hello(0, 0, 1, 0, ()), PATIENCE_S)
        shape = (2, 17, HIDDEN, TOP_K, 2)
        for hello in (
            Hello(0, 0, 1, 7, shape),  # means another incarnation
            Hello(0, 0, 0, 0, shape),  # means another rank
            Hello(1, 0, 1, 0, shape),  # is not the one that dials
            Hello(0, 0, 1, 0, (2, 17, 8, TOP_K, 2)),  # has other messages
            Hello(0, 0, 1, 0, shape, "vault"),
        ):
            caller = stack.enter_context(wire.connect(address, TOKEN, hello, PATIENCE_S))
            caller.settimeout(PATIENCE_S)
            assert caller.recv(100) == b"", f"{hello} was let in"
        ranks.meet(2)
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2
        assert not select.select([mute], [], [], 0)[0] or mute.recv(100).startswith(wire.MAGIC)


def test_messages_beyond_all_buffers_travel_both_ways_at_once() -> None:
    shape = {"hidden": 1024, "top_k": 2, "slots_per_rank": 1, "max_tokens": 4096}  # 8 MB there, 16 MB back

    def body(node: Node) -> None:
        node.adopt()
        T, D, other = shape["max_tokens"], shape["hidden"], 1 - node.rank
        x_TD = (torch.arange(T * D) % 97 + node.rank).to(torch.bfloat16).view(T, D)
        slots_TK = torch.full((T, 2), other, dtype=torch.int32)
        for _ in range(2):
            got = node.comm.dispatch(x_TD, slots_TK)
            assert torch.equal(got.x_ND, (torch.arange(T * D) % 97 + other).to(torch.bfloat16).view(T, D))
            out = node.comm.combine(got.x_ND[got.row_M] * (got.slot_M[:, None] + 2), got)
            assert torch.equal(out, (x_TD * 2)[:, None].expand(T, 2, D))
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=apart, shape=shape) as ranks:
        for rank in range(2):
            ranks.spawn(rank, body)
        ranks.meet(1)
        assert [ranks.hear(rank) for rank in range(2)] == [CLEAN] * 2


@pytest.mark.parametrize("passes", [1, 2, 5])
@pytest.mark.parametrize("hosts", [apart, in_pairs])
def test_a_rank_killed_in_the_middle_of_a_frame_leaves_the_others_exact(passes: int, hosts: Hosts) -> None:
    """The half that came is never taken for the whole."""
    left = [passes]

    def die(_: Channel, passed: str) -> None:
        left[0] -= passed == "half_framed"
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def body(node: Node) -> None:
        node.adopt()
        slots = torch.arange(TOP_K, dtype=torch.int32).expand(4, TOP_K) * SLOTS  # a token to each of the first ranks
        while node.comm.status().clean:
            got = node.comm.dispatch(torch.ones(4, HIDDEN, dtype=node.comm.dtype), slots.contiguous())
            node.comm.combine(torch.ones(got.row_M.numel(), HIDDEN, dtype=node.comm.dtype), got)
        node.tell_status()
        node.comm.interrupt(2)  # who had everything goes on into a collective for which the others do not come
        node.adopt()
        for round_ in range(3):
            check_exchange(node, 3, round_, dead={1})
            check_all_gather(node, 3, round_, dead={1})
        node.tell_status()
        node.hear()

    with Ranks(4, hosts=hosts, board=False) as ranks:
        for rank in range(4):
            ranks.spawn(rank, body, fault_point=die if rank == 1 else None)
        ranks.meet(1)
        ranks.bury(1)
        others = [0, 2, 3]
        causes = [ranks.hear(rank)["causes"] for rank in others]
        assert {"1": "notice"} in causes
        assert all(cause in ({}, {"1": "notice"}) for cause in causes), causes
        ranks.meet(2, others)
        assert [ranks.hear(rank) for rank in others] == [CLEAN] * 3


def test_a_rank_that_the_others_masked_is_told_nothing_and_times_out() -> None:
    """What it has received is whole and its own, so only its next wait can tell."""

    def masked(node: Node) -> None:
        node.adopt()
        slots = torch.zeros(1, TOP_K, dtype=torch.int32)
        with node.comm.patience(PATIENCE_S):
            node.comm.dispatch(torch.ones(1, HIDDEN, dtype=node.comm.dtype), slots)
        node.tell_status()
        node.comm.barrier()
        node.tell_status()
        node.hear()

    with Ranks(2, hosts=apart, peer_timeout_s=0.5) as ranks:
        ranks.spawn(0, masked)
        ranks.spawn(1, masks_rank_0)
        ranks.meet(1)
        assert ranks.hear(1)["causes"] == {"0": "operator"}
        assert ranks.hear(0) == CLEAN
        assert ranks.hear(0)["causes"] == {"1": "timeout"}
