"""The board of deaths."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import pytest

from phalanx.comm.notices import NoticeBoard
from phalanx.world import Member


@pytest.fixture
def board() -> Iterator[NoticeBoard]:
    board = NoticeBoard.create(3)
    yield board
    board.close()


def test_a_fresh_board_knows_of_no_death(board: NoticeBoard) -> None:
    reader = NoticeBoard.open(board.address)
    assert reader.ep_size == 3
    assert not any(reader.is_dead(Member(rank, 0)) for rank in range(3))
    assert [reader.stamp_ns(rank) for rank in range(3)] == [0, 0, 0]
    reader.close()


def test_a_death_is_read_through_the_address_with_its_stamp_and_cause(board: NoticeBoard) -> None:
    reader = NoticeBoard.open(board.address)
    before, version = time.monotonic_ns(), reader.version
    board.declare_dead(1, 2, "signal")
    assert reader.version > version
    assert before <= reader.stamp_ns(1) <= time.monotonic_ns()
    assert reader.cause(1) == "signal"
    assert [reader.is_dead(Member(1, incarnation)) for incarnation in range(4)] == [True, True, True, False]
    assert not reader.is_dead(Member(0, 0))
    reader.close()


def test_the_first_notice_of_a_death_stands_and_a_later_incarnations_replaces_it(board: NoticeBoard) -> None:
    board.declare_dead(0, 1, "operator")
    stamp, version = board.stamp_ns(0), board.version
    board.declare_dead(0, 1, "exit")
    board.declare_dead(0, 0, "exit")
    assert (board.stamp_ns(0), board.cause(0), board.version) == (stamp, "operator", version)
    board.declare_dead(0, 2, "exception")
    assert board.stamp_ns(0) > stamp
    assert board.cause(0) == "exception"


def test_nobody_but_its_creator_can_write_on_a_board(board: NoticeBoard) -> None:
    fd = os.open(board.address, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 64)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 64)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_a_reader_keeps_its_board_when_the_launcher_has_closed_it() -> None:
    board = NoticeBoard.create(1)
    address = board.address
    reader = NoticeBoard.open(address)
    board.declare_dead(0, 0, "exit")
    board.close()
    assert reader.is_dead(Member(0, 0))
    with pytest.raises(OSError, match="No such file"):
        NoticeBoard.open(address)
    reader.close()


def test_poking_members_that_are_gone_or_unknown_harms_nobody(board: NoticeBoard) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    board.poke([Member(0, 0, pid=pid), Member(1, 0, comm_address=f"/proc/{pid}/fd/5"), Member(2, 0, pid=os.getpid())])
