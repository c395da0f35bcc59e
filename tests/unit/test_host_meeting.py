"""Rows that pass between hosts of devices: whole or known not to be, whoever dies, stops or goes on meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import pytest

from phalanx.comm import tags
from phalanx.comm.device_peers import segment_layout
from phalanx.comm.host_meeting import HostMeeting
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.segment import ROLL_CALL, OwnSegment, PeerSegment
from phalanx.world import Member, View

FORK = get_context("fork")
PATIENCE_S = 120.0
LONG_S = 60.0


class Rank:
    """One process's part: its segment, its peers, its meeting."""

    def __init__(self, rank: int, ranks: int, address: Callable[[str], list[str]], board: NoticeBoard | None) -> None:
        layout = segment_layout(ranks)
        self.rank, self.own = rank, OwnSegment(layout, rank, 0)
        addresses = address(self.own.address)
        self.members = tuple(Member(r, 0) for r in range(ranks))
        self.peers = {r: PeerSegment(a, layout, r, 0) for r, a in enumerate(addresses) if r != rank}
        self.meeting = HostMeeting(self.own, rank, ranks, board)
        self.epoch = 0

    def adopt(self) -> None:
        """As the communicator does: who waits under an earlier epoch learns from the word that it waits in vain."""
        self.epoch += 1
        self.own.words[ROLL_CALL] = self.epoch
        self.meeting.adopt(View(self.epoch, len(self.members), self.members), self.peers)

    def meet(self, *row: int, timeout_s: float = LONG_S) -> list[list[int]]:
        rows: list[list[int]] = self.meeting.meet(row, timeout_s).tolist()
        return rows


@contextlib.contextmanager
def crowd(
    ranks: int, work: Callable[[Rank, Any], Any], board: NoticeBoard | None = None
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Processes that run `work`, and our ends of their pipes."""
    barrier = FORK.Barrier(ranks)
    ours, theirs = zip(*(FORK.Pipe() for _ in range(ranks)), strict=True)

    def run(rank: int) -> None:
        def exchange(address: str) -> list[str]:
            theirs[rank].send(address)
            addresses: list[str] = theirs[rank].recv()
            return addresses

        made = Rank(rank, ranks, exchange, board)
        made.adopt()
        barrier.wait(PATIENCE_S)
        theirs[rank].send(work(made, barrier))
        theirs[rank].recv()  # its segment is read until the test is over

    processes = [FORK.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        addresses = [heard(pipe) for pipe in ours]
        for pipe in ours:
            pipe.send(addresses)
        yield processes, list(ours)
    finally:
        for process in processes:
            process.kill()
            process.join()


def heard(pipe: Any) -> Any:
    assert pipe.poll(PATIENCE_S), "a rank does not answer"
    return pipe.recv()


def test_everybodys_rows_come_to_everybody_meeting_after_meeting_and_epoch_after_epoch() -> None:
    def work(rank: Rank, barrier: Any) -> list[str]:
        wrong = []
        for _ in range(12):
            for number in range(40):
                rows = rank.meet(rank.rank, number, rank.epoch)
                if rows != [[r, number, rank.epoch] for r in range(3)]:
                    wrong.append(f"{rows} in meeting {number} of epoch {rank.epoch}")
            # Whoever met goes on at once, while others may still wait for words that are there by now.
            rank.adopt()
            barrier.wait(PATIENCE_S)
            wrong += [str(rank.meeting.lost)] if rank.meeting.lost or rank.meeting.interrupted else []
        return wrong

    with crowd(3, work) as (_, pipes):
        assert [heard(pipe) for pipe in pipes] == [[], [], []]


def test_a_killed_peer_is_lost_without_a_time_out() -> None:
    def work(rank: Rank, barrier: Any) -> Any:
        if rank.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = rank.meet(7)
        return rows, rank.meeting.lost

    with crowd(3, work) as (_, pipes):
        for rank in (0, 1):
            rows, lost = heard(pipes[rank])
            assert rows == [[7], [7], [0]]
            assert {r: cause for r, (cause, _) in lost.items()} == {2: "notice"}
            assert lost[2][1] < LONG_S


def test_a_stopped_peer_is_lost_after_the_time_out() -> None:
    def work(rank: Rank, barrier: Any) -> Any:
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        rank.meet(7, timeout_s=0.3)
        return rank.meeting.lost

    with crowd(2, work) as (_, pipes):
        lost = heard(pipes[0])
        assert lost[1][0] == "timeout"
        assert lost[1][1] >= 0.3


def test_a_peer_that_was_declared_dead_is_not_waited_for_and_one_that_reads_so_of_itself_stops() -> None:
    board = NoticeBoard.create(2)

    def work(rank: Rank, barrier: Any) -> Any:
        if rank.rank == 1:
            barrier.wait(PATIENCE_S)  # it comes when it is too late
            rank.meet(7)
            return rank.meeting.interrupted
        rank.meet(7)
        barrier.wait(PATIENCE_S)
        return rank.meeting.lost

    with crowd(2, work, board) as (_, pipes):
        board.declare_dead(1, 0, "signal")
        assert heard(pipes[0])[1][0] == "notice"
        # Rank 0's row was there for it, so it may also have met; what it then does is found in the roll call.
        assert heard(pipes[1]) in (0, 2)
    board.close()


def test_an_open_roll_call_ends_a_wait() -> None:
    def work(rank: Rank, barrier: Any) -> Any:
        if rank.rank == 1:
            rank.own.words[ROLL_CALL] = 5
            return None
        rank.meet(7)
        return rank.meeting.interrupted, rank.meeting.lost

    with crowd(2, work) as (_, pipes):
        assert heard(pipes[0]) == (5, {})


def test_a_peer_that_went_on_without_us_is_lost() -> None:
    def work(rank: Rank, barrier: Any) -> Any:
        if rank.rank == 1:
            rank.meeting.mask(0, alive=False)
            for _ in range(3):
                rank.meet(7)
            barrier.wait(PATIENCE_S)
            return None
        barrier.wait(PATIENCE_S)
        rank.meet(7)
        return rank.meeting.lost

    with crowd(2, work) as (_, pipes):
        assert heard(pipes[1]) is None
        assert heard(pipes[0])[1][0] == "timeout"


def test_a_rank_that_opened_a_roll_call_itself_waits_for_nobody_until_it_adopts() -> None:
    own = OwnSegment(segment_layout(2), 0, 0)
    meeting = HostMeeting(own, 0, 2)
    other = OwnSegment(segment_layout(2), 1, 0)
    peer = PeerSegment(other.address, segment_layout(2), 1, 0)
    view = View(1, 2, (Member(0, 0), Member(1, 0)))
    meeting.adopt(view, {1: peer})
    opener = threading.Timer(0.05, lambda: meeting.interrupt(2))
    opener.start()
    began = time.monotonic()
    meeting.meet([4], LONG_S)
    assert meeting.interrupted == 2
    assert time.monotonic() - began < LONG_S
    assert meeting.meet([4], LONG_S).tolist() == [[0], [0]]
    meeting.adopt(View(2, 2, (Member(0, 0),)), {})
    assert meeting.interrupted == 0
    assert meeting.meet([4], LONG_S).tolist() == [[4], [0]]
    opener.join()
    peer.close()
    other.close()
    own.close()


def test_a_peer_that_serves_the_next_world_while_its_row_is_copied_is_not_lost() -> None:
    layout = segment_layout(2)
    own, other = OwnSegment(layout, 0, 0), OwnSegment(layout, 1, 0)
    members = (Member(0, 0), Member(1, 0))
    ours, theirs = HostMeeting(own, 0, 2), HostMeeting(other, 1, 2)
    back = PeerSegment(own.address, layout, 0, 0)

    def meet_alone(epoch: int) -> None:
        theirs.adopt(View(epoch, 2, members), {0: back})
        theirs.mask(0, alive=False)
        theirs.meet([epoch], LONG_S)

    class Hasty(PeerSegment):
        """A peer that goes on just when it is read."""

        def __getattribute__(self, name: str) -> Any:
            if name == "gather":
                meet_alone(2)
            return super().__getattribute__(name)

    peer = Hasty(other.address, layout, 1, 0)
    ours.adopt(View(1, 2, members), {1: peer})
    meet_alone(1)
    ours.meet([7], LONG_S)
    assert (ours.lost, ours.interrupted) == ({}, 2)
    for each in (peer, back, other, own):
        each.close()


@pytest.mark.parametrize("dead", [True, False])
def test_members_that_could_not_be_reached_are_lost_from_the_start(dead: bool) -> None:
    own = OwnSegment(segment_layout(2), 0, 0)
    meeting = HostMeeting(own, 0, 2)
    meeting.adopt(View(3, 2, (Member(0, 0), Member(1, 0))), {}, [1] if dead else [])
    meeting.meet([4], LONG_S)
    assert bool(meeting.lost) == dead
    assert own.words[own.layout.areas[1] + own.layout.SENT] == tags.tag_of(3, 1, tags.ALL_GATHER)
    own.close()
