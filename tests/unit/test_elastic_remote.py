"""Restoring from hosts that fail in every way and order: the right bytes or none, and never a hang."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import pytest
import torch
from elastic_doubles import member

from phalanx.elastic.agree import Agreed
from phalanx.elastic.replan import diff
from phalanx.elastic.restore import PeerSource, Restore
from phalanx.elastic.store import MemoryStore, MonotonicClock
from phalanx.elastic.vault.memory import Vault, VaultMemory, VaultShape
from phalanx.elastic.vault.mooncake import BOUNCE_BYTES, ENTRY_GAP, MAX_ENTRIES, batches
from phalanx.elastic.vault.remote import Remote
from phalanx.elastic.vault.shares import Share
from phalanx.elastic.vault.transport import Arrived, Gate, Piece, Stall, encoded_shape, stall_key
from phalanx.moe.experts import SlotBank, digest
from phalanx.pages import FilePart, MemoryFile
from phalanx.world import Member, Placement, View

LAYERS, EXPERTS, HOSTS = 2, 6, 4
SIZE = 3 * 8 * 4 * 4
LIMIT_S = 60.0

Fails = Callable[[int], str]


def content(layer: int, expert: int) -> np.ndarray:
    return np.random.default_rng((layer, expert)).integers(0, 256, SIZE, np.uint8)


class Images:
    """The vaults of all hosts but the first, as bytes, and where they are in the store."""

    def __init__(self, copies: int = 2) -> None:
        self.store = MemoryStore(MonotonicClock())
        self.of: dict[int, bytes] = {}
        for node_rank in range(1, HOSTS):
            shape = VaultShape(LAYERS, EXPERTS, SIZE, 0, 1, Share(node_rank, HOSTS, copies))
            memory = VaultMemory(shape)
            vault = Vault.open_for_writing(memory.address)
            for layer, expert in np.argwhere(shape.share_LE).tolist():
                vault.write(shape.expert_start(layer, expert), content(layer, expert))
                vault.publish(layer, expert, digest(content(layer, expert).data))
            self.of[node_rank] = vault.everything.tobytes()
            stall = Stall(node_rank, f"host {node_rank}", "a", "", "memory", encoded_shape(shape))
            self.store.set(stall_key(node_rank), msgspec.msgpack.encode(stall))
            vault.close()
            memory.close()


class Hosts:
    """A transport out of memory. fails(host): what goes wrong in this read, see `read`; "" for nothing."""

    def __init__(self, name: str, images: Images, fails: Fails = lambda host: "") -> None:
        self.name, self._images, self._fails = name, images, fails
        self.late: list[threading.Thread] = []
        self.reads = 0

    def register(self, stall: Stall) -> None: ...

    def drop(self, node_rank: int) -> None: ...

    def serves(self, node_rank: int, slots: str) -> bool:
        return not slots

    def read(
        self, node_rank: int, pieces: Sequence[Piece], timeout_s: float, arrived: Arrived, gate: Gate, slots: str = ""
    ) -> None:
        self.reads += 1
        how = self._fails(node_rank)
        assert how != "bug", "a transport must not raise, and this one does"
        if how == "refused":
            return
        image = self._images.of[node_rank]
        end = len(pieces) if how in ("", "damaged", "half damaged") else len(pieces) // 2
        for number, piece in enumerate(pieces[:end]):
            data = np.frombuffer(image, np.uint8, piece.out.nbytes, piece.start).copy()
            if how == "damaged" or (how == "half damaged" and number % 2):
                data[number % len(data)] ^= 1
            if not piece.put(0, data, gate):
                return
            piece.grew(data)
            arrived(number)
        if how == "torn":
            for piece in pieces[end:]:
                piece.out[: piece.out.nbytes // 2] = 255
        if how == "late":  # gives up, and writes nevertheless as soon as it can, through the gate
            self.late.append(threading.Thread(target=_write_late, args=(pieces[end:], gate)))
            self.late[-1].start()


def _write_late(pieces: Sequence[Piece], gate: Gate) -> None:
    end = time.monotonic() + LIMIT_S
    while not gate.is_shut and time.monotonic() < end:
        time.sleep(0.001)
    for piece in pieces:
        piece.put(0, np.full(piece.out.nbytes, 170, np.uint8), gate)


class Disk:
    name = "disk"

    def __init__(self, has: Callable[[int, int], bool] = lambda layer, expert: True) -> None:
        self._has = has

    def adopt(self, agreed: Agreed) -> None: ...

    def copies(self, layer: int, expert: int) -> Iterator[Callable[[np.ndarray], None]]:
        if self._has(layer, expert):
            yield lambda out: np.copyto(out, content(layer, expert))


def agree(known: bool = True, ranks: int = 1) -> Agreed:
    wanted = np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, ranks))
    digest_LE = np.zeros((LAYERS, EXPERTS), np.uint64)
    for place in np.ndindex(LAYERS, EXPERTS) if known else ():
        digest_LE[place] = digest(content(*place).data)
    members = tuple(Member(rank, 0, f"host {rank}") for rank in range(ranks))
    held = np.concatenate([np.full((LAYERS, EXPERTS), -1, np.int32), wanted[:, EXPERTS:]], axis=1)
    zeros = np.zeros((LAYERS, EXPERTS), np.int64)
    return Agreed(View(1, ranks, members), Placement(wanted, EXPERTS, EXPERTS), held, digest_LE, zeros, "join", 0, 0.0)


def remote_of(images: Images, *transports: Hosts) -> Remote:
    return Remote(Member(0, 0, "host 0"), 0, HOSTS, images.store, transports, patience_s=0.5)


def restore(remote: Remote, bank: SlotBank, disk: Disk, known: bool = True) -> Restore:
    say = agree(known)
    job = Restore(diff(say.held_LP, say.placement, 0), say, bank, (remote, disk))
    end = time.monotonic() + LIMIT_S
    job.advance(lambda: time.monotonic() < end)
    assert job.remaining == 0, "it hangs"
    return job


def check(job: Restore, bank: SlotBank) -> int:
    """How many slots are filled, each with the right bytes; the others say that they are empty, and are lost."""
    held = bank.held_LS
    for layer, slot in np.argwhere(held >= 0).tolist():
        assert (bank.slot_bytes(layer, slot) == content(layer, int(held[layer, slot]))).all(), "a slot lies"
        assert bank.digest_LS[layer, slot] == digest(content(layer, slot).data)
    assert sorted(job.lost) == [tuple(place) for place in np.argwhere(held < 0).tolist()]
    return int((held >= 0).sum())


@pytest.fixture
def bank() -> Iterator[SlotBank]:
    bank = SlotBank(LAYERS, EXPERTS, 8, 4, torch.float32)
    yield bank
    bank.close()


WAYS_TO_FAIL = ("", "", "refused", "short", "torn", "late", "damaged", "half damaged", "bug")


@pytest.mark.parametrize("seed", range(60))
def test_hosts_that_fail_at_random_give_the_right_bytes_or_none_and_no_restore_hangs(bank: SlotBank, seed: int) -> None:
    images, chance = Images(), random.Random(seed)
    lock = threading.Lock()

    def fails(host: int) -> str:
        with lock:
            return chance.choice(WAYS_TO_FAIL)

    absent = {place for place in np.ndindex(LAYERS, EXPERTS) if chance.random() < 0.3}
    first, second = Hosts("first", images, fails), Hosts("second", images, fails)
    remote = remote_of(images, first, second)
    job = restore(remote, bank, Disk(lambda layer, expert: (layer, expert) not in absent), known=chance.random() < 0.5)
    remote.stop()
    for thread in first.late + second.late:
        thread.join(LIMIT_S)
    filled = check(job, bank)
    assert set(job.lost) <= absent
    assert filled * SIZE == sum(job.bytes_by_source.values())


@pytest.mark.parametrize("lost", range(1, HOSTS))
def test_any_host_may_fail_and_the_others_give_all_that_is_not_here(bank: SlotBank, lost: int) -> None:
    images = Images()
    job = restore(remote_of(images, Hosts("tcp", images, lambda host: "refused" * (host == lost))), bank, Disk())
    check(job, bank)
    shapes = [VaultShape(LAYERS, EXPERTS, SIZE, 0, 1, Share(n, HOSTS, 2)) for n in range(1, HOSTS) if n != lost]
    there = np.logical_or.reduce([shape.share_LE for shape in shapes])
    assert job.bytes_by_source.get("vault_remote") == there.sum() * SIZE
    assert job.bytes_by_source.get("disk", 0) == (~there).sum() * SIZE


def test_the_second_transport_is_asked_where_the_first_fails_and_a_host_that_failed_is_left_alone_for_a_while(
    bank: SlotBank,
) -> None:
    images = Images()
    first, second = Hosts("first", images, lambda host: "refused"), Hosts("second", images)
    remote = remote_of(images, first, second)
    job = restore(remote, bank, Disk())
    check(job, bank)
    assert job.bytes_by_source["vault_remote"] > 0
    asked = first.reads
    assert 0 < asked <= HOSTS - 1, "once each"
    for slot in range(EXPERTS):
        bank.clear(0, slot)
    restore(remote, bank, Disk())
    assert first.reads == asked


def test_a_host_whose_entry_in_the_store_makes_no_sense_is_as_good_as_absent(bank: SlotBank) -> None:
    images = Images()
    images.store.set(stall_key(1), b"\x93what is this")
    job = restore(remote_of(images, Hosts("tcp", images)), bank, Disk())
    check(job, bank)
    assert job.bytes_by_source["vault_remote"] > 0


def test_what_arrives_after_a_restore_was_given_up_is_written_nowhere(bank: SlotBank) -> None:
    images = Images()
    transport = Hosts("tcp", images, lambda host: "late")
    remote = remote_of(images, transport)
    say = agree()
    Restore(diff(say.held_LP, say.placement, 0), say, bank, (remote, Disk())).advance(lambda: True)
    assert transport.late, "something is still under way"
    again = Restore(diff(say.held_LP, say.placement, 0), say, bank, (remote,))  # shuts the gate
    for layer, slot in np.ndindex(LAYERS, EXPERTS):
        bank.slot_bytes(layer, slot)[:] = content(layer, slot)
    for thread in transport.late:
        thread.join(LIMIT_S)
    assert again.remaining
    for layer, slot in np.ndindex(LAYERS, EXPERTS):
        assert (bank.slot_bytes(layer, slot) == content(layer, slot)).all()


def test_bytes_for_which_there_is_no_memory_are_not_there_and_break_nothing() -> None:
    out = np.zeros(10, np.uint8)
    beyond_what_a_file_can_have = FilePart(MemoryFile("test", 10), (1 << 63) - 1)
    assert not Piece(0, out, file=beyond_what_a_file_can_have).put(0, out, Gate())
    shut = Gate()
    shut.shut()
    assert not Piece(0, out).put(0, np.ones(10, np.uint8), shut)
    assert not out.any()


def test_a_live_replica_on_another_host_is_not_opened_as_if_it_were_here() -> None:
    me, here, there = member(0), member(1), Member(2, 0, "elsewhere", 1, "", "bank:2.0")
    opened: list[str] = []

    def open_bank(address: str) -> SlotBank:
        opened.append(address)
        raise OSError("enough")

    wanted = Placement(np.zeros((1, 3), np.int32), 1, 1)
    held = np.array([[-1, 0, 0]], np.int32)
    zeros = np.zeros((1, 1), np.int64)
    source = PeerSource(me, open_bank)  # type: ignore[arg-type]
    source.adopt(Agreed(View(1, 3, (me, here, there)), wanted, held, zeros.astype(np.uint64), zeros, "join", 0, 0.0))
    for fetch in source.copies(0, 0):
        with pytest.raises(OSError, match="enough"):
            fetch(np.zeros(4, np.uint8))
    assert opened == ["bank:1.0"]


@pytest.mark.parametrize("seed", range(20))
def test_batches_for_the_transfer_engine_cover_every_piece_once_within_its_limits(seed: int) -> None:
    chance = random.Random(seed)
    starts = sorted(chance.sample(range(0, 1 << 30, 1 << 12), chance.randrange(1, 5000)))
    sizes = [min(chance.choice((100, 4096, 3 << 20, BOUNCE_BYTES)), b - a)
             for a, b in zip(starts, [*starts[1:], 1 << 31], strict=True)]  # fmt: skip
    backing = np.zeros(BOUNCE_BYTES, np.uint8)
    pieces = [Piece(start, backing[:size]) for start, size in zip(starts, sizes, strict=True)]
    chance.shuffle(pieces)
    seen: list[int] = []
    for batch in batches(pieces):
        assert 0 < len(batch) <= MAX_ENTRIES
        taken = [(entry.to, entry.to + entry.size) for entry in batch]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken)), "entries do not overlap"
        assert taken[-1][1] <= BOUNCE_BYTES
        for entry in batch:
            for number, at in entry.pieces:
                assert at - entry.to == pieces[number].start - entry.start
                assert at + pieces[number].out.nbytes <= entry.to + entry.size
                seen.append(number)
            assert entry.size <= sum(pieces[n].out.nbytes for n, _ in entry.pieces) + ENTRY_GAP * len(entry.pieces)
    assert sorted(seen) == list(range(len(pieces)))
