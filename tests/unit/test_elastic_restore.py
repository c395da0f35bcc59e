"""Restoring experts: which copy is read, how it is checked, and what a slot says when something goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from elastic_doubles import member

from phalanx.elastic.agree import Agreed
from phalanx.elastic.replan import diff
from phalanx.elastic.restore import DiskSource, PeerSource, Restore
from phalanx.errors import BadCheckpoint
from phalanx.moe.experts import SlotBank, digest
from phalanx.testing.faults import Fault, FaultInjector, InjectedFault
from phalanx.world import Member, Placement, View

LAYERS, EXPERTS, SLOTS, RANKS = 2, 4, 3, 2


def content(layer: int, expert: int, size: int) -> np.ndarray:
    return np.random.default_rng((layer, expert)).integers(0, 256, size, np.uint8)


class Disk:
    """A checkpoint that counts its reads and can lack experts."""

    def __init__(self, lacks: set[tuple[int, int]] | None = None) -> None:
        self.reads: list[tuple[int, int]] = []
        self.lacks = lacks or set()

    def read_expert(self, layer: int, expert: int, out: np.ndarray, dtype: torch.dtype) -> None:
        self.reads.append((layer, expert))
        if (layer, expert) in self.lacks:
            out[: out.size // 2] = 1  # cut off half-way
            raise BadCheckpoint("model.safetensors is cut off")
        out[:] = content(layer, expert, out.size)


class Ranks:
    """Two ranks' slots, and what is agreed on them."""

    def __init__(self) -> None:
        self.banks = [SlotBank(LAYERS, SLOTS, 8, 4, torch.float32) for _ in range(RANKS)]
        self.members = tuple(Member(r, 0, "here", os.getpid(), "", bank.address) for r, bank in enumerate(self.banks))
        self.digest_LE = np.zeros((LAYERS, EXPERTS), np.uint64)
        self.disk = Disk()

    def fill(self, rank: int, layer: int, slot: int, expert: int) -> None:
        bank = self.banks[rank]
        bank.slot_bytes(layer, slot)[:] = content(layer, expert, bank.expert_bytes)
        bank.mark(layer, slot, expert, digest(bank.slot_bytes(layer, slot).data))
        self.digest_LE[layer, expert] = bank.digest_LS[layer, slot]

    def agree(self, slots_LP: list[list[int]], members: tuple[Member, ...] | None = None) -> Agreed:
        members = self.members if members is None else members
        held_LP = np.concatenate([bank.held_LS for bank in self.banks], axis=1)
        for rank in range(RANKS):
            if all(m.rank != rank for m in members):
                held_LP[:, rank * SLOTS : (rank + 1) * SLOTS] = -1
        return Agreed(
            View(1, RANKS, members),
            Placement(np.array(slots_LP, np.int32), EXPERTS, SLOTS),
            held_LP,
            self.digest_LE,
            np.zeros((LAYERS, EXPERTS), np.int64),
            "failure",
            0,
            0.0,
        )

    def restore(self, agreed: Agreed, rank: int = 0, **options: object) -> Restore:
        moves = diff(agreed.held_LP, agreed.placement, rank)
        sources = (PeerSource(self.members[rank]), DiskSource(self.disk, torch.float32))
        return Restore(moves, agreed, self.banks[rank], sources, **options)  # type: ignore[arg-type]

    def holds(self, rank: int, layer: int, slot: int) -> int:
        """The expert that a slot says it holds, after its bytes were compared with the truth."""
        bank = self.banks[rank]
        expert = int(bank.held_LS[layer, slot])
        if expert >= 0:
            right = content(layer, expert, bank.expert_bytes)
            assert (bank.slot_bytes(layer, slot) == right).all(), f"slot {slot} of layer {layer} lies"
        return expert


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    for bank in ranks.banks:
        bank.close()


def all_of(ranks: Ranks, rank: int = 0) -> list[list[int]]:
    return [[ranks.holds(rank, layer, slot) for slot in range(SLOTS)] for layer in range(LAYERS)]


def test_nothing_held_anywhere_is_read_from_disk(ranks: Ranks) -> None:
    job = ranks.restore(ranks.agree([[0, 1, -1, 2, 3, -1], [3, 2, -1, 1, 0, -1]]))
    job.advance(lambda: True)
    assert all_of(ranks) == [[0, 1, -1], [3, 2, -1]]
    assert job.remaining == 0
    assert job.lost == []
    assert job.learned == 4
    assert job.bytes_by_source == {"disk": 4 * ranks.banks[0].expert_bytes}


def test_a_replica_that_a_peer_keeps_is_copied_from_it(ranks: Ranks) -> None:
    ranks.fill(1, 0, 0, 2)
    job = ranks.restore(ranks.agree([[2, -1, -1, 2, -1, -1], [-1] * 6]))
    job.advance(lambda: True)
    assert ranks.holds(0, 0, 0) == 2
    assert ranks.disk.reads == []
    assert job.bytes_by_source == {"peer": ranks.banks[0].expert_bytes}
    assert job.learned == 0


def test_a_slot_that_its_owner_is_about_to_overwrite_is_not_read(ranks: Ranks) -> None:
    ranks.fill(1, 0, 0, 2)
    ranks.restore(ranks.agree([[2, -1, -1, 3, -1, -1], [-1] * 6])).advance(lambda: True)
    assert ranks.holds(0, 0, 0) == 2
    assert ranks.disk.reads == [(0, 2)]


def test_a_copy_with_the_wrong_digest_is_refused_and_the_next_source_is_taken(ranks: Ranks) -> None:
    ranks.fill(1, 0, 0, 2)
    ranks.banks[1].slot_bytes(0, 0)[7] ^= 1
    job = ranks.restore(ranks.agree([[2, -1, -1, 2, -1, -1], [-1] * 6]))
    job.advance(lambda: True)
    assert ranks.holds(0, 0, 0) == 2
    assert job.bytes_by_source == {"disk": ranks.banks[0].expert_bytes}


def test_the_disk_too_is_checked_once_the_digest_is_known(ranks: Ranks) -> None:
    ranks.digest_LE[0, 2] = 12345
    job = ranks.restore(ranks.agree([[2, -1, -1, -1, -1, -1], [-1] * 6]))
    job.advance(lambda: True)
    assert job.lost == [(0, 2)]
    assert ranks.holds(0, 0, 0) == -1


def test_a_peer_whose_memory_is_gone_costs_no_more_than_the_next_source(ranks: Ranks) -> None:
    ranks.fill(1, 0, 0, 2)
    address = ranks.members[1].weights_address
    stale = address[:-1] + ("1" if address.endswith("0") else "0")  # the token of a process that is no more
    ranks.members = (ranks.members[0], Member(1, 0, "here", 0, "", stale))
    job = ranks.restore(ranks.agree([[2, -1, -1, 2, -1, -1], [-1] * 6]))
    job.advance(lambda: True)
    assert ranks.holds(0, 0, 0) == 2
    assert list(job.bytes_by_source) == ["disk"]


def test_an_expert_that_no_source_has_leaves_an_empty_slot_and_the_others_are_filled(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    ranks.fill(0, 0, 0, 1)
    ranks.disk.lacks = {(0, 3), (1, 0)}
    job = ranks.restore(ranks.agree([[3, 2, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]]))
    job.advance(lambda: True)
    assert job.lost == [(0, 3), (1, 0)]
    assert all_of(ranks)[0] == [-1, 2, -1], "what was overwritten must not claim to be there"
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said.startswith("layer 0 expert 3 cannot be had from anywhere: disk: ")


def test_a_restore_that_is_cut_off_goes_on_from_what_is_held(ranks: Ranks) -> None:
    wanted = [[0, 1, 2, 3, -1, -1], [3, 2, 1, 0, -1, -1]]
    first = ranks.restore(ranks.agree(wanted))
    asked = iter([True, True, False])
    first.advance(lambda: next(asked))
    assert first.remaining == 4
    held = [e for row in all_of(ranks) for e in row if e >= 0]
    assert len(held) == 2
    second = ranks.restore(ranks.agree(wanted))
    assert second.remaining == 4
    second.advance(lambda: True)
    assert all_of(ranks) == [[0, 1, 2], [3, 2, 1]]
    assert len(ranks.disk.reads) == 6, "nothing is read twice"


def test_an_exception_in_the_middle_leaves_slots_that_tell_the_truth(ranks: Ranks) -> None:
    faults = FaultInjector(Fault("raise", "restore", count=3))
    job = ranks.restore(ranks.agree([[0, 1, 2, 3, -1, -1], [3, 2, 1, 0, -1, -1]]), faults=faults)
    with pytest.raises(InjectedFault):
        job.advance(lambda: True)
    assert sum(e >= 0 for row in all_of(ranks) for e in row) == 2


def test_progress_is_told_after_each_expert(ranks: Ranks) -> None:
    told: list[tuple[int, int]] = []
    job = ranks.restore(
        ranks.agree([[0, 1, -1, 2, 3, -1], [3, -1, -1, 1, 0, -1]]),
        progress=lambda done, total: told.append((done, total)),
    )
    job.advance(lambda: True)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_readers_of_one_expert_begin_at_different_replicas() -> None:
    members = tuple(member(r) for r in range(4))
    opened: list[str] = []

    class Memory:
        def slot_bytes(self, layer: int, slot: int) -> np.ndarray:
            return np.zeros(4, np.uint8)

        def close(self) -> None: ...

    def open_bank(address: str) -> Memory:
        opened.append(address)
        return Memory()

    held = np.array([[0, 0, -1, -1]], np.int32)
    wanted = Placement(np.array([[0, 0, 0, 0]], np.int32), 1, 1)
    zeros = np.zeros((1, 1), np.int64)
    agreed = Agreed(View(1, 4, members), wanted, held, zeros.astype(np.uint64), zeros, "failure", 0, 0.0)
    for rank in (2, 3):
        source = PeerSource(members[rank], open_bank)
        source.adopt(agreed)
        copies = list(source.copies(0, 0))
        assert len(copies) == 2
        copies[0](np.zeros(4, np.uint8))
    assert sorted(opened) == ["bank:0.0", "bank:1.0"]


def test_memory_of_a_member_that_left_is_unmapped() -> None:
    members = tuple(member(r) for r in range(2))
    closed: list[int] = []

    class Memory:
        def slot_bytes(self, layer: int, slot: int) -> np.ndarray:
            return np.zeros(4, np.uint8)

        def close(self) -> None:
            closed.append(1)

    source = PeerSource(members[0], lambda address: Memory())
    wanted = Placement(np.array([[0, 0]], np.int32), 1, 1)
    zeros = np.zeros((1, 1), np.int64)
    held = np.array([[-1, 0]], np.int32)
    source.adopt(Agreed(View(1, 2, members), wanted, held, zeros.astype(np.uint64), zeros, "failure", 0, 0.0))
    for fetch in source.copies(0, 0):
        fetch(np.zeros(4, np.uint8))
    again = Member(1, 1, "here", 0, "", "bank:1.1")
    source.adopt(Agreed(View(2, 2, (members[0], again)), wanted, held, zeros.astype(np.uint64), zeros, "join", 0, 0.0))
    assert closed == [1]
