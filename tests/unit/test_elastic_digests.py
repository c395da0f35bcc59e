"""Digests computed ahead: the same checks, the same order, and no thread that outlives the restore."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from phalanx.elastic.agree import Agreed
from phalanx.elastic.digests import MOST_THREADS, WORTH_BYTES, Digests, threads_for
from phalanx.elastic.replan import diff
from phalanx.elastic.restore import DiskSource, Restore, VaultSource
from phalanx.errors import BadCheckpoint
from phalanx.moe.experts import SlotBank, digest
from phalanx.testing.faults import Fault, FaultInjector, InjectedFault
from phalanx.world import Member, Placement, View

LAYERS, EXPERTS = 2, 6
HIDDEN, WIDTH = 512, 512  # 3 x 512 x 512 float32: 3 MiB, worth a thread's turn


def content(layer: int, expert: int, size: int) -> np.ndarray:
    return np.random.default_rng((layer, expert)).integers(0, 256, size, np.uint8)


def digesting() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("digest")}


class Shelf:
    """A vault whose copies can be damaged or absent."""

    def __init__(self, size: int) -> None:
        self.data = {(la, e): content(la, e, size) for la in range(LAYERS) for e in range(EXPERTS)}
        self.digests = {key: digest(data.data) for key, data in self.data.items()}
        self.absent: set[tuple[int, int]] = set()

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, int] | None:
        key = layer, expert
        return None if key in self.absent else (self.data[key], self.digests[key])


class Disk:
    """A checkpoint that lacks some experts."""

    def __init__(self, lacks: set[tuple[int, int]]) -> None:
        self.lacks = lacks

    def read_expert(self, layer: int, expert: int, out: np.ndarray, dtype: torch.dtype) -> None:
        if (layer, expert) in self.lacks:
            raise BadCheckpoint("model.safetensors is cut off")
        out[:] = content(layer, expert, out.size)


class Rig:
    """One rank with empty slots for everything, a vault and a disk."""

    def __init__(self) -> None:
        self.bank = SlotBank(LAYERS, EXPERTS, HIDDEN, WIDTH, torch.float32)
        self.shelf, self.disk = Shelf(self.bank.expert_bytes), Disk(set())
        self.order: list[tuple[int, int]] = []

    def restore(self, threads: int, **options: object) -> Restore:
        placement = Placement(np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1)), EXPERTS, EXPERTS)
        digest_LE = np.array([[self.shelf.digests[la, e] for e in range(EXPERTS)] for la in range(LAYERS)], np.uint64)
        me = Member(0, 0, "here", os.getpid(), "", self.bank.address)
        agreed = Agreed(
            View(1, 1, (me,)), placement, self.bank.held_LS, digest_LE, np.zeros((LAYERS, EXPERTS), np.int64),
            "failure", 0, 0.0,
        )  # fmt: skip
        moves = diff(agreed.held_LP, placement, 0)
        self.order = [(move.layer, move.expert) for move in moves]
        sources = VaultSource(self.shelf), DiskSource(self.disk, torch.float32)
        return Restore(moves, agreed, self.bank, sources, threads=threads, **options)  # type: ignore[arg-type]

    def right(self) -> bool:
        """Whether every slot that says it holds an expert has that expert's bytes."""
        held_LS = self.bank.held_LS
        for layer, slot in np.argwhere(held_LS >= 0).tolist():
            parts = [w.flatten().view(torch.uint8).numpy() for w in self.bank.weights(layer, slot)]
            found = np.concatenate(parts)
            if not np.array_equal(found, content(layer, int(held_LS[layer, slot]), found.size)):
                return False
        return True


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.bank.close()


@pytest.mark.parametrize(
    ("cpus", "ranks", "threads"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 2, 1), (5, 2, 2), (16, 2, 7), (256, 2, MOST_THREADS)],
)
def test_a_rank_digests_with_the_cpus_that_are_its_share_of_all_but_one(cpus: int, ranks: int, threads: int) -> None:
    assert threads_for(cpus, ranks) == threads


def test_digests_begun_ahead_are_those_of_the_bytes_in_whatever_order_they_are_asked_for() -> None:
    parts = [content(0, i, WORTH_BYTES + i) for i in range(4)]
    with Digests(2) as digests:
        for i, data in enumerate(parts):
            digests.begin(i, data)
        assert digesting()
        for i in (2, 0, 3, 1):
            assert digests.digest(i, parts[i]) == digest(parts[i].data)
    assert not digesting()


def test_who_asks_for_the_last_first_gets_the_same_digests() -> None:
    parts = [content(1, i, 8 * WORTH_BYTES) for i in range(8)]
    with Digests(4) as digests:
        for i, data in enumerate(parts):
            digests.begin(i, data)
        found = [digests.digest(i, parts[i]) for i in reversed(range(8))]
        assert not any(i in digests for i in range(8))
    assert found[::-1] == [digest(data.data) for data in parts]


@pytest.mark.parametrize("given", [0, 1])
def test_a_system_without_threads_to_give_costs_no_digest(given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [content(2, i, WORTH_BYTES) for i in range(6)]
    start, started = threading.Thread.start, []

    def start_a_few(thread: threading.Thread) -> None:
        if len(started) >= given:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_a_few)
    with Digests(4) as digests:
        for i, data in enumerate(parts):
            digests.begin(i, data)
        assert [digests.digest(i, data) for i, data in enumerate(parts)] == [digest(data.data) for data in parts]
    assert not digesting()


def test_only_so_many_digests_are_begun_and_not_asked_for() -> None:
    data = content(0, 0, WORTH_BYTES)
    with Digests(2) as digests:
        for i in range(digests.room + 1):
            digests.begin(i, data)
        assert digests.room in range(2, 9)
        assert digests.room not in digests
        digests.drop(0)
        digests.begin(digests.room, data)
        assert digests.room in digests


def test_other_bytes_than_those_that_were_begun_are_digested_anew() -> None:
    stale, fresh = content(0, 0, WORTH_BYTES), content(0, 1, WORTH_BYTES)
    with Digests(2) as digests:
        digests.begin("expert", stale)
        assert digests.digest("expert", fresh) == digest(fresh.data)


def test_little_is_digested_where_it_is_asked_for() -> None:
    data = content(0, 0, WORTH_BYTES - 1)
    with Digests(4) as digests:
        digests.begin("expert", data)
        assert "expert" not in digests
        assert not digesting()
        assert digests.digest("expert", data) == digest(data.data)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_restore_gives_the_same_slots_in_the_same_order_with_any_number_of_threads(rig: Rig, threads: int) -> None:
    seen: list[tuple[int, int]] = []
    helpers: list[set[str]] = []

    def note(done: int, total: int) -> None:
        newly = rig.order[done - 1]
        held = {(la, e) for la, e in np.argwhere(rig.bank.held_LS >= 0).tolist()}
        assert held == set(rig.order[:done]), "experts are held in the order of the moves"
        seen.append(newly)
        helpers.append(digesting())

    job = rig.restore(threads, progress=note)
    job.advance(lambda: True)
    assert seen == rig.order
    assert job.bytes_by_source == {"vault": LAYERS * EXPERTS * rig.bank.expert_bytes}
    assert rig.right()
    assert all(helpers) if threads > 1 else not any(helpers)
    assert all(len(names) < threads for names in helpers), "the restore's own thread is one of them"
    assert not digesting()


def test_a_damaged_copy_or_an_absent_one_goes_to_the_next_source_and_without_one_the_slot_stays_empty(rig: Rig) -> None:
    rig.shelf.data[0, 2][7] ^= 1
    rig.shelf.data[1, 5][-1] ^= 1
    rig.shelf.absent = {(1, 1)}
    rig.disk.lacks = {(1, 1), (1, 5)}
    job = rig.restore(2)
    job.advance(lambda: True)
    size = rig.bank.expert_bytes
    assert job.bytes_by_source == {"vault": (LAYERS * EXPERTS - 3) * size, "disk": size}
    assert sorted(job.lost) == [(1, 1), (1, 5)]
    assert rig.bank.held_LS.tolist() == [[0, 1, 2, 3, 4, 5], [0, -1, 2, 3, 4, -1]]
    assert rig.right()


def test_an_interrupt_leaves_no_thread_and_nothing_held_that_was_not_taken(rig: Rig) -> None:
    asked = iter([True, True, True, False])
    job = rig.restore(4)
    job.advance(lambda: next(asked))
    assert not digesting()
    assert job.remaining == LAYERS * EXPERTS - 3
    assert (rig.bank.held_LS >= 0).sum() == 3, "what was only digested is not held"
    assert rig.right()
    job.advance(lambda: True)
    assert job.remaining == 0
    assert rig.right()


def test_bytes_that_are_damaged_between_two_slices_are_found_out(rig: Rig) -> None:
    """A digest that was begun in a slice that ended says nothing about the next."""
    asked = iter([True, False])
    job = rig.restore(2)
    job.advance(lambda: next(asked))
    victim = rig.order[1]
    rig.shelf.data[victim][0] ^= 1
    rig.disk.lacks = {victim}
    job.advance(lambda: True)
    assert job.lost == [victim]


def test_a_failure_in_the_middle_of_a_restore_leaves_no_thread(rig: Rig) -> None:
    job = rig.restore(2, faults=FaultInjector(Fault("raise", "restore", count=3)))
    with pytest.raises(InjectedFault):
        job.advance(lambda: True)
    assert not digesting()
    assert (rig.bank.held_LS >= 0).sum() == 2


def _restores(rig: Rig) -> None:
    job = rig.restore(2)
    job.advance(lambda: True)
    assert job.remaining == 0
    assert rig.right()


def test_a_process_forked_after_a_restore_restores_with_threads_of_its_own(rig: Rig) -> None:
    asked = iter([True, False])
    rig.restore(2).advance(lambda: next(asked))
    child = get_context("fork").Process(target=_restores, args=(rig,), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
