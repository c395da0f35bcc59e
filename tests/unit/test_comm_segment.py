"""Segments: what only their owner may write, and whom their address reaches."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.comm.segment import (
    ROLL_CALL,
    Layout,
    OwnSegment,
    PeerSegment,
    Unreachable,
    find_address,
    wake_address,
)

LAYOUT = Layout(ep_size=4, max_tokens=8, hidden=16, top_k=2, itemsize=2)


def test_a_peer_reads_what_the_owner_writes_and_cannot_write_itself() -> None:
    own = OwnSegment(LAYOUT, 3, 7)
    peer = PeerSegment(own.address, LAYOUT, 3, 7)
    own.words[ROLL_CALL] = 5
    own.x[1][2] = 9
    own.y[0][-1] = -4
    assert peer.words[ROLL_CALL] == 5
    assert (peer.x[1][2] == 9).all()
    assert (peer.y[0][-1] == -4).all()
    with pytest.raises(TypeError):
        peer.words[ROLL_CALL] = 6
    with pytest.raises(ValueError, match="read-only"):
        peer.x[0][0] = 1
    peer.close()
    own.close()


def test_no_writable_mapping_can_be_made_after_the_owners_own() -> None:
    own = OwnSegment(LAYOUT, 0, 0)
    fd = os.open(own.address, os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, LAYOUT.total_bytes)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    own.close()


@pytest.mark.parametrize(("rank", "incarnation"), [(2, 0), (1, 1)])
def test_an_address_that_leads_to_another_rank_or_incarnation_is_unreachable(rank: int, incarnation: int) -> None:
    own = OwnSegment(LAYOUT, 1, 0)
    with pytest.raises(Unreachable):
        PeerSegment(own.address, LAYOUT, rank, incarnation)
    own.close()


def test_an_address_that_leads_to_some_other_file_is_unreachable() -> None:
    """The number of a dead process may belong to any program by now."""
    fd = os.memfd_create("anything")
    with pytest.raises(Unreachable):
        PeerSegment(f"/proc/{os.getpid()}/fd/{fd}", LAYOUT, 0, 0)
    os.close(fd)
    with pytest.raises(Unreachable):
        PeerSegment(f"/proc/{os.getpid()}/fd/{fd}", LAYOUT, 0, 0)


def test_an_attempt_that_fails_leaves_no_descriptor_open() -> None:
    own = OwnSegment(LAYOUT, 1, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(Unreachable):
            PeerSegment(own.address, LAYOUT, 1, 9)
    assert len(os.listdir("/proc/self/fd")) == before
    own.close()


def test_another_geometry_is_a_bug_and_says_so() -> None:
    own = OwnSegment(LAYOUT, 0, 0)
    other = Layout(ep_size=4, max_tokens=8, hidden=32, top_k=2, itemsize=2)
    with pytest.raises(AssertionError, match="geometry"):
        PeerSegment(own.address, other, 0, 0)
    own.close()


def test_an_owner_is_woken_through_its_address_found_by_name() -> None:
    own = OwnSegment(LAYOUT, 2, 1)
    assert find_address(os.getpid(), 2, 1) == own.address
    assert find_address(os.getpid(), 2, 0) is None
    wake_address(own.address)
    assert select.select([own.wake_read], [], [], 5.0)[0]
    own.drain()
    assert not select.select([own.wake_read], [], [], 0)[0]
    peer = PeerSegment(own.address, LAYOUT, 2, 1)
    for _ in range(70_000):  # more than the pipe holds
        peer.wake()
    own.drain()
    assert not select.select([own.wake_read], [], [], 0)[0]
    peer.close()
    own.close()


@settings(deadline=None, max_examples=40)
@given(
    ep_size=st.integers(1, 70),
    max_tokens=st.integers(1, 64),
    hidden=st.integers(1, 40),
    top_k=st.integers(1, 9),
    itemsize=st.sampled_from([2, 4]),
)
def test_nothing_in_a_layout_overlaps(ep_size: int, max_tokens: int, hidden: int, top_k: int, itemsize: int) -> None:
    layout = Layout(ep_size, max_tokens, hidden, top_k, itemsize)
    own = OwnSegment(layout, 0, 0)
    marks = []
    for parity in (0, 1):
        marks += [own.gather[parity], own.x[parity].reshape(-1)[-2:], own.slots[parity][-2:]]
    for i, mark in enumerate(marks, 1):
        mark[:] = i
    for word, i in ((ROLL_CALL, 101), (layout.areas[0] + layout.COUNT + ep_size - 1, 102), (layout.areas[1], 103)):
        own.words[word] = i
    for i, mark in enumerate(marks, 1):
        assert (np.asarray(mark) == i).all()
    assert own.words[ROLL_CALL] == 101
    assert own.words[layout.areas[0] + layout.COUNT + ep_size - 1] == 102
    assert own.words[layout.areas[1]] == 103
    own.y[0][0] = own.y[0][-1] = 77
    assert (own.x[1].reshape(-1)[-2:] == 5).all(), "the buffers share bytes"
    assert own.words[layout.areas[1]] == 103
    del mark, marks
    own.close()


def test_the_life_lock_tells_of_a_death_before_the_process_can_be_reaped() -> None:
    layout = Layout(ep_size=2, max_tokens=4, hidden=8, top_k=2, itemsize=2)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        own = OwnSegment(layout, 1, 0)
        os.write(ready[1], own.address.encode())
        os.read(go[0], 1)
        os._exit(1)
    peer = PeerSegment(os.read(ready[0], 256).decode(), layout, 1, 0)
    assert not peer.died
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert peer.died
    os.waitpid(pid, 0)
    peer.close()
    for fd in (*ready, *go):
        os.close(fd)


def test_a_segment_that_is_closed_is_no_death_and_leaves_no_lock_behind() -> None:
    layout = Layout(ep_size=2, max_tokens=4, hidden=8, top_k=2, itemsize=2)
    own = OwnSegment(layout, 0, 0)
    peer = PeerSegment(own.address, layout, 0, 0)
    own.close()
    assert not peer.died
    peer.close()


FORGETFUL = """
import gc, threading
from phalanx.comm.segment import Layout, OwnSegment

layout = Layout(ep_size=4, max_tokens=8, hidden=16, top_k=2, itemsize=2)
OwnSegment(layout, 0, 0)  # nobody closes it
gc.collect()
larger = Layout(ep_size=4, max_tokens=4096, hidden=64, top_k=2, itemsize=2)  # it does not fit where the first was
OwnSegment(larger, 0, 1).close()

made, closed = threading.Event(), threading.Event()
box = []

def work():
    box.append(OwnSegment(layout, 1, 0))
    made.set()
    closed.wait()
    OwnSegment(larger, 1, 1).close()

thread = threading.Thread(target=work)
thread.start()
made.wait()
box.pop().close()  # by a thread that does not hold the lock
gc.collect()
closed.set()
thread.join()
"""


def test_a_lock_for_life_outlives_a_segment_that_was_dropped_or_closed_by_another_thread() -> None:
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
