"""Counting what a service takes of its host: every process, open file, thread and zombie, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from phalanx.testing.census import listening_ports, take_census

PARENT = """
import os, socket, subprocess, sys, threading
files = [open(os.devnull) for _ in range(7)]
held = bytearray(50 << 20)
threading.Thread(target=threading.Event().wait, daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
ended = subprocess.Popen([sys.executable, "-c", ""])
os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
listener = socket.create_server(("127.0.0.1", 0))
print(child.pid, ended.pid, listener.getsockname()[1], flush=True)
input()
"""


@pytest.fixture
def family() -> Iterator[tuple[int, int, int, int]]:
    """Pids of a parent, its child and its ended child, and the port at which the parent listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    child, ended, port = map(int, process.stdout.readline().split())
    yield process.pid, child, ended, port
    process.kill()
    process.communicate()


def test_a_census_counts_a_process_and_all_that_descend_from_it(family: tuple[int, int, int, int]) -> None:
    parent, child, ended, _ = family
    census = take_census(parent, {child: "rank"})
    found = {process.pid: process for process in census.processes}
    assert found.keys() == {parent, child, ended}
    assert (found[parent].role, found[child].role) == ("launcher", "rank")
    assert found[parent].fds >= 7 + 3
    assert (found[parent].threads, found[child].threads) == (2, 1)
    assert found[parent].pss > 50 << 20 > found[child].pss > 0
    assert census.zombies == {ended}
    assert census.total("threads") == 3
    assert census.total("threads", "rank") == census.count("rank") == 1


def test_a_census_of_nobody_is_empty() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert take_census(ended.pid, {}).processes == ()


def test_listening_ports_are_those_of_that_process_alone(family: tuple[int, int, int, int]) -> None:
    parent, child, _, port = family
    assert listening_ports(parent) == [port]
    assert listening_ports(child) == []
