"""Stopped processes: real ones for what the kernel says, made-up ones for what follows from it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from phalanx.halts import LOOK_S, Halt, Halts, wait_for_child

WORKS_WHEN_ASKED = """
import sys
for line in sys.stdin:
    sum(range(100_000))
    print("done", flush=True)
"""


class Child:
    """A process that works when it is asked to. What is done to it has happened when a call returns."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", WORKS_WHEN_ASKED]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.pid = self.process.pid
        self.work()

    def work(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("work", file=self.process.stdin)
        assert self.process.stdout.readline() == "done\n"

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        os.waitid(os.P_PID, self.pid, os.WCONTINUED)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.process.kill()
    child.process.communicate()


def test_a_process_that_runs_or_sleeps_is_not_stopped(child: Child) -> None:
    halt = Halt(child.pid)
    assert [halt.look(at) for at in (1.0, 2.0, 300.0)] == [None, None, None]
    assert Halt(os.getpid()).look(1.0) is None


def test_a_stopped_process_is_stopped_from_the_first_look_that_finds_it_so(child: Child) -> None:
    halt = Halt(child.pid, look_s=1.0)
    halt.look(100.0)
    child.stop()
    assert [halt.look(at) for at in (101.0, 102.0, 102.5)] == [0.0, 1.0, 0.5]
    assert halt.total_s == 1.5
    child.go_on()
    assert halt.look(103.0) is None
    assert halt.total_s == 0.0
    child.stop()
    assert halt.look(104.0) == 0.0


def test_time_in_which_nobody_looked_counts_as_two_looks_at_most(child: Child) -> None:
    halt = Halt(child.pid, look_s=1.0)
    child.stop()
    halt.look(100.0)
    assert halt.look(1000.0) == 2.0


def test_a_process_that_is_stopped_again_and_again_but_works_in_between_is_slow_not_stopped(child: Child) -> None:
    halt = Halt(child.pid)
    for at in range(5):
        child.stop()
        assert halt.look(float(at)) == 0.0
        child.go_on()
        child.work()
    assert halt.total_s == 0.0


def test_a_process_that_has_ended_is_not_stopped(child: Child) -> None:
    halt = Halt(child.pid)
    child.process.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert halt.look(1.0) is None
    child.process.wait()
    assert halt.look(2.0) is None


def test_a_child_that_stays_stopped_is_killed_and_one_that_ends_is_waited_for() -> None:
    stopped = os.fork()
    if stopped == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(7)
    assert os.waitstatus_to_exitcode(wait_for_child(stopped, limit_s=0.02, look_s=0.01)) == -signal.SIGKILL
    ending = os.fork()
    if ending == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(wait_for_child(ending, limit_s=0.02, look_s=0.01)) == 7


# --- what follows from the looks


MEMBERS = {(0, 0), (1, 3), (2, 0)}
LIMIT_S = 5.0


def looks(halts: Halts, rank: int, incarnation: int, seconds: float, members: set[tuple[int, int]] = MEMBERS) -> bool:
    """Look every half second for so long at a process that is stopped; whether the others are to go on without it."""
    found = [halts.heard(rank, incarnation, 0.0, members)]
    found += [halts.heard(rank, incarnation, LOOK_S, members) for _ in range(int(seconds / LOOK_S))]
    announced = [total for total in found if total is not None]
    assert len(announced) <= 1, "once is enough"
    return bool(announced)


def test_a_stop_shorter_than_the_time_out_evicts_nobody_and_a_longer_one_does() -> None:
    halts = Halts(LIMIT_S)
    assert not looks(halts, 1, 3, LIMIT_S)
    halts.heard(1, 3, None, MEMBERS)
    assert not looks(halts, 1, 3, LIMIT_S)
    assert looks(halts, 0, 0, LIMIT_S + LOOK_S)


def test_who_ran_between_two_looks_has_all_its_time_again() -> None:
    halts = Halts(LIMIT_S)
    for _ in range(3):
        assert not looks(halts, 1, 3, LIMIT_S)


def test_who_is_no_member_is_not_announced() -> None:
    assert not looks(Halts(LIMIT_S), 1, 4, 60.0), "a newcomer: nobody waits for it"
    assert not looks(Halts(LIMIT_S), 2, 0, 60.0, {(0, 0), (1, 3)}), "it left, or was masked"


def test_nobody_goes_on_without_the_only_one() -> None:
    assert not looks(Halts(LIMIT_S), 0, 0, 60.0, {(0, 0)})


def test_when_all_are_stopped_none_is_announced_and_who_goes_on_later_has_all_its_time() -> None:
    halts = Halts(LIMIT_S)
    for name in MEMBERS:
        assert halts.heard(*name, 0.0, MEMBERS) is None
    for _ in range(100):
        assert not any(halts.heard(*name, LOOK_S, MEMBERS) for name in MEMBERS)
    halts.heard(0, 0, None, MEMBERS)
    for _ in range(int(LIMIT_S / LOOK_S)):
        assert not any(halts.heard(*name, LOOK_S, MEMBERS) for name in ((1, 3), (2, 0)))
    halts.heard(1, 3, None, MEMBERS)
    assert halts.heard(2, 0, LOOK_S, MEMBERS) == LIMIT_S + LOOK_S


def test_a_stopped_process_that_died_holds_nobody_else_back() -> None:
    halts = Halts(LIMIT_S)
    pair = {(0, 0), (1, 0)}
    halts.heard(0, 0, 0.0, pair)
    halts.forget(0, 0)
    assert looks(halts, 1, 0, LIMIT_S + LOOK_S, {(0, 1), (1, 0)})


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_announced_was_stopped_for_longer_than_the_time_out_while_another_ran(seed: int) -> None:
    """Random stops of four ranks, looked at as a launcher looks; against a plain count beside it."""
    rng = random.Random(seed)
    halts = Halts(LIMIT_S)
    members = {(rank, 0) for rank in range(4)}
    stopped = dict.fromkeys(members, False)
    counted = dict.fromkeys(members, 0.0)
    announced: set[tuple[int, int]] = set()
    for _ in range(2000):
        fresh = set()
        for name in sorted(members):
            if rng.random() < (0.03 if stopped[name] else 0.02):
                stopped[name] = not stopped[name]
                fresh.add(name)
        for name in sorted(members):
            if not stopped[name]:
                counted[name] = 0.0
                announced.discard(name)
                assert halts.heard(*name, None, members) is None
        for name in sorted((name for name in members if stopped[name]), key=lambda name: name not in fresh):
            others_run = not all(stopped[other] for other in members if other != name)
            if name not in fresh and others_run:
                counted[name] += LOOK_S
            told = halts.heard(*name, 0.0 if name in fresh else LOOK_S, members)
            assert (told is not None) == (counted[name] > LIMIT_S and name not in announced)
            if told is not None:
                assert told == counted[name]
                announced.add(name)
