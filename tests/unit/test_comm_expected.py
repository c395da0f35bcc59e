"""Peers on devices are mapped before a view has them: by a thread, once, and let go when they are not taken."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from phalanx.comm.device_peers import DevicePeer, Expected
from phalanx.comm.segment import Layout, OwnSegment, PeerSegment, Unreachable
from phalanx.world import Member

LAYOUT = Layout(4, 1, 8, 1, 4)
PATIENCE_S = 30


class Reach:
    """Maps members' segments as a rank does, and counts it; their buffers are numbers. Waits for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached: list[Member] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, member: Member) -> DevicePeer:
        assert self.gate.wait(PATIENCE_S)
        self.reached.append(member)
        self.threads.append(threading.current_thread())
        segment = PeerSegment(member.comm_address, LAYOUT, member.rank, member.incarnation)
        return DevicePeer(member, segment, 1000 + member.rank)


@contextmanager
def newcomers(*places: tuple[int, int]) -> Iterator[list[Member]]:
    segments = [OwnSegment(LAYOUT, rank, incarnation) for rank, incarnation in places]
    try:
        yield [
            Member(rank, incarnation, comm_address=own.address)
            for (rank, incarnation), own in zip(places, segments, strict=True)
        ]
    finally:
        for own in segments:
            own.close()


def test_who_is_expected_is_mapped_by_a_thread_while_the_steps_go_on() -> None:
    reach = Reach()
    expected = Expected(reach)
    with newcomers((1, 1), (2, 5)) as members:
        assert not expected.begin(members)
        assert not expected.begin(members), "asked again, it neither waits nor begins anew"
        reach.gate.set()
        taken = [expected.take(member) for member in members]  # waits for what is under way
        assert expected.begin([])
        assert [(peer.member, peer.pointer) for peer in taken] == [(members[0], 1001), (members[1], 1002)]
        assert sorted(reach.reached) == members, "each once"
        assert threading.current_thread() not in reach.threads
        assert expected.forget() == []
        for peer in taken:
            peer.segment.close()


def test_who_was_not_expected_is_mapped_when_it_is_taken() -> None:
    reach = Reach()
    reach.gate.set()
    with newcomers((3, 0)) as (member,):
        peer = Expected(reach).take(member)
        assert reach.threads == [threading.current_thread()]
        peer.segment.close()


def test_a_place_whose_next_process_comes_is_mapped_again_and_who_was_not_let_in_is_given_back() -> None:
    reach = Reach()
    reach.gate.set()
    expected = Expected(reach)
    with newcomers((1, 1), (1, 2)) as (first, second):
        expected.begin([first])
        expected.begin([second])
        expected.take(second).segment.close()
        left = expected.forget()
        assert [peer.member for peer in left] == [first], "for its buffer to be unmapped"
        left[0].segment.close()
        assert expected.forget() == []


def test_who_dies_while_it_is_expected_is_found_when_it_is_taken() -> None:
    reach = Reach()
    expected = Expected(reach)
    child = "from phalanx.comm.segment import Layout, OwnSegment; import sys; " \
        "print(OwnSegment(Layout(4, 1, 8, 1, 4), 1, 1).address, flush=True); sys.stdin.read()"  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        died = Member(1, 1, comm_address=process.stdout.readline().strip())
        process.kill()
    expected.begin([died])
    reach.gate.set()
    with pytest.raises(Unreachable):
        expected.take(died)
    expected.begin([died])
    assert expected.forget() == [], "there is nothing to give back"
