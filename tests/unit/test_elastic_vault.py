"""The vault: what readers see of it while it fills, when it is damaged, and when it is gone."""

from __future__ import annotations

import itertools
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from model_rig import solo
from test_elastic_restore import EXPERTS, LAYERS, Ranks, content

from phalanx import messages as m
from phalanx.config import ServeConfig
from phalanx.custodian import Custodian
from phalanx.elastic.agree import Agreed
from phalanx.elastic.replan import diff
from phalanx.elastic.restore import DiskSource, PeerSource, Restore, VaultSource
from phalanx.elastic.vault.memory import Follower, Vault, VaultGone, VaultMemory, VaultShape
from phalanx.elastic.vault.room import room_for
from phalanx.halts import HELPER_HALT_S, LOOK_S
from phalanx.model.layers import DenseWeights
from phalanx.model.loader import Checkpoint
from phalanx.moe.experts import BorrowedSlot, PeerBank, SlotBank, digest
from phalanx.process import VaultSpec
from phalanx.testing.damage import damage_vault
from phalanx.testing.tiny import make_tiny

EXPERT_BYTES = 3 * 8 * 4 * 4
SHAPE = VaultShape(LAYERS, EXPERTS, EXPERT_BYTES, dense_bytes=0, dense_tensors=1)


class Open:
    """A vault with its three hands: the launcher's, the keeper's and a reader's."""

    def __init__(self, shape: VaultShape = SHAPE) -> None:
        self.memory = VaultMemory(shape)
        self.keeper = Vault.open_for_writing(self.memory.address)
        self.reader = Vault.open(self.memory.address)

    def fill(self, layer: int, expert: int) -> None:
        data = content(layer, expert, self.keeper.shape.expert_bytes)
        self.keeper.write(self.keeper.shape.expert_start(layer, expert), data)
        self.keeper.publish(layer, expert, digest(data.data))

    def fill_all(self) -> None:
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                self.fill(layer, expert)

    def close(self) -> None:
        for hand in (self.reader, self.keeper, self.memory):
            hand.close()


@pytest.fixture
def opened() -> Iterator[Open]:
    opened = Open()
    yield opened
    opened.close()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    for bank in ranks.banks:
        bank.close()


def restore(ranks: Ranks, vault: Vault, agreed: Agreed, rank: int = 0) -> Restore:
    sources = (VaultSource(vault), PeerSource(ranks.members[rank]), DiskSource(ranks.disk, torch.float32))
    job = Restore(diff(agreed.held_LP, agreed.placement, rank), agreed, ranks.banks[rank], sources)
    job.advance(lambda: True)
    return job


def weights_of(bank: SlotBank, layer: int, slot: int) -> bytes:
    return b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in bank.weights(layer, slot))


# --- the index


def test_a_reader_sees_an_expert_from_the_moment_it_is_published(opened: Open) -> None:
    assert opened.reader.expert(1, 2) is None
    assert not opened.reader.filled_LE.any()
    opened.fill(1, 2)
    entry = opened.reader.expert(1, 2)
    assert entry is not None
    data, named = entry
    assert data.tobytes() == content(1, 2, EXPERT_BYTES).tobytes()
    assert named == digest(data.data)
    assert np.argwhere(opened.reader.filled_LE).tolist() == [[1, 2]]
    assert opened.reader.filled_bytes == EXPERT_BYTES


def test_an_expert_whose_bytes_are_there_in_part_is_not_shown(opened: Open) -> None:
    data = content(0, 3, EXPERT_BYTES)
    opened.keeper.write(SHAPE.expert_start(0, 3), data[: EXPERT_BYTES // 2])
    assert opened.reader.expert(0, 3) is None
    opened.keeper.write(SHAPE.expert_start(0, 3), data)
    assert opened.reader.expert(0, 3) is None, "complete, but nobody has said so"


def test_a_withdrawn_expert_is_not_shown_until_it_is_published_again(opened: Open) -> None:
    opened.fill(0, 0)
    opened.keeper.withdraw(0, 0)
    assert opened.reader.expert(0, 0) is None
    opened.fill(0, 0)
    assert opened.reader.expert(0, 0) is not None


def test_the_vault_is_full_only_with_every_expert_and_the_dense_weights(opened: Open) -> None:
    opened.fill_all()
    assert not opened.reader.is_full
    writer = opened.keeper.dense_writer()
    opened.keeper.publish_dense(writer.table)
    assert opened.reader.is_full


def test_experts_lie_apart_and_nothing_is_taken_by_what_is_not_filled(opened: Open) -> None:
    starts = [SHAPE.expert_start(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    assert starts == sorted(starts)
    assert all(b - a >= EXPERT_BYTES for a, b in itertools.pairwise(starts))
    before = os.stat(opened.memory.address.rsplit(":", 1)[0]).st_blocks
    opened.fill(LAYERS - 1, EXPERTS - 1)
    assert os.stat(opened.memory.address.rsplit(":", 1)[0]).st_blocks - before <= 2 * SHAPE.stride // 512


def test_progress_tells_a_keeper_that_gets_on_from_one_that_does_not(opened: Open) -> None:
    before = opened.memory.progress
    assert opened.memory.progress == before
    opened.fill(0, 0)
    filled = opened.memory.progress
    assert filled > before
    opened.keeper.found_full()
    assert opened.memory.progress > filled


# --- its life


def test_what_a_reader_has_mapped_outlives_the_keeper_and_the_launcher() -> None:
    opened = Open()
    opened.fill(0, 1)
    opened.keeper.close()
    opened.memory.close()
    entry = opened.reader.expert(0, 1)
    assert entry is not None
    assert entry[0].tobytes() == content(0, 1, EXPERT_BYTES).tobytes()
    del entry
    opened.reader.close()


def test_a_new_keeper_finds_what_the_last_one_left(opened: Open) -> None:
    opened.fill(1, 1)
    again = Vault.open_for_writing(opened.memory.address)
    assert np.argwhere(again.filled_LE).tolist() == [[1, 1]]
    again.close()


def test_a_stale_address_is_refused_whatever_has_taken_its_place() -> None:
    memory = VaultMemory(SHAPE)
    path, token = memory.address.rsplit(":", 1)
    with pytest.raises(VaultGone, match="something else"):
        Vault.open(f"{path}:{token[::-1]}")
    other = os.memfd_create("other")
    with pytest.raises(VaultGone, match="something else"):
        Vault.open(f"/proc/{os.getpid()}/fd/{other}:{token}")
    os.close(other)
    memory.close()
    with pytest.raises(VaultGone):
        Vault.open(memory.address)
    with pytest.raises(VaultGone, match="No such file"):
        Vault.open(f"/proc/4194304/fd/3:{token}")


def test_nobody_can_cut_the_vault_short_under_a_reader(opened: Open) -> None:
    with pytest.raises(PermissionError):
        os.truncate(opened.memory.address.rsplit(":", 1)[0], 4096)


def test_a_follower_ends_once_everything_is_within_reach(opened: Open) -> None:
    opened.fill(0, 0)
    follower = Follower(opened.reader, interval_s=0.001)
    follower.start()
    opened.fill_all()
    follower.join(30)
    assert not follower.is_alive()


# --- restoring from it


def test_an_expert_of_the_vault_is_lent_and_the_disk_not_touched(ranks: Ranks, opened: Open) -> None:
    opened.fill_all()
    job = restore(ranks, opened.reader, ranks.agree([[0, 1, -1, -1, -1, -1], [3, -1, 2, -1, -1, -1]]))
    bank = ranks.banks[0]
    assert bank.held_LS.tolist() == [[0, 1, -1], [3, -1, 2]]
    for layer, slot, expert in ((0, 0, 0), (0, 1, 1), (1, 0, 3), (1, 2, 2)):
        assert weights_of(bank, layer, slot) == content(layer, expert, EXPERT_BYTES).tobytes()
    assert job.bytes_by_source == {"vault": 4 * EXPERT_BYTES}
    assert job.seconds_by_source["vault"] > 0
    assert ranks.disk.reads == []


def test_lent_bytes_are_the_vaults_own(ranks: Ranks, opened: Open) -> None:
    opened.fill_all()
    restore(ranks, opened.reader, ranks.agree([[2, -1, -1, -1, -1, -1], [-1] * 6]))
    where = ranks.banks[0].weights(0, 0)[0].data_ptr()
    assert where == opened.reader.expert_bytes(0, 2).ctypes.data


@pytest.mark.parametrize("known", [True, False], ids=["digest known", "digest not known"])
def test_a_damaged_expert_is_taken_from_the_next_source(ranks: Ranks, opened: Open, known: bool) -> None:
    opened.fill_all()
    if known:
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            ranks.digest_LE[layer, expert] = digest(content(layer, expert, EXPERT_BYTES).data)
    assert damage_vault(opened.memory.address, layer=0, expert=1) == 1
    job = restore(ranks, opened.reader, ranks.agree([[0, 1, -1, -1, -1, -1], [-1] * 6]))
    assert job.bytes_by_source == {"vault": EXPERT_BYTES, "disk": EXPERT_BYTES}
    assert ranks.holds(0, 0, 1) == 1


def test_an_entry_of_another_checkpoint_is_refused(ranks: Ranks, opened: Open) -> None:
    opened.fill_all()
    ranks.fill(1, 0, 0, 2)  # this is what the ranks agree that expert 2 is
    other = content(9, 9, EXPERT_BYTES)
    opened.keeper.write(SHAPE.expert_start(0, 2), other)
    opened.keeper.publish(0, 2, digest(other.data))
    job = restore(ranks, opened.reader, ranks.agree([[2, -1, -1, 2, -1, -1], [-1] * 6]))
    assert job.bytes_by_source == {"peer": EXPERT_BYTES}


def test_what_the_vault_does_not_have_yet_comes_from_elsewhere(ranks: Ranks, opened: Open) -> None:
    opened.fill(0, 0)
    job = restore(ranks, opened.reader, ranks.agree([[0, 1, -1, -1, -1, -1], [-1] * 6]))
    assert job.bytes_by_source == {"vault": EXPERT_BYTES, "disk": EXPERT_BYTES}


def test_without_disk_a_recovery_reads_only_what_nobody_ever_held(ranks: Ranks) -> None:
    ranks.digest_LE[0, 1] = 12345
    agreed = ranks.agree([[0, 1, -1, -1, -1, -1], [-1] * 6])
    disk = DiskSource(ranks.disk, torch.float32, first_load_only=True)
    job = Restore(diff(agreed.held_LP, agreed.placement, 0), agreed, ranks.banks[0], (disk,))
    job.advance(lambda: True)
    assert ranks.disk.reads == [(0, 0)]
    assert job.lost == [(0, 1)]


# --- slots that borrow


def test_peers_are_told_that_a_slot_borrows_and_when_it_no_longer_does(ranks: Ranks, opened: Open) -> None:
    opened.fill_all()
    bank = ranks.banks[0]
    peer = PeerBank.open(bank.address)
    restore(ranks, opened.reader, ranks.agree([[2, -1, -1, -1, -1, -1], [-1] * 6]))
    with pytest.raises(BorrowedSlot):
        peer.slot_bytes(0, 0)
    bank.clear(0, 0)
    bank.slot_bytes(0, 0)[:] = content(0, 3, EXPERT_BYTES)
    bank.mark(0, 0, 3, 1)
    assert peer.slot_bytes(0, 0).tobytes() == content(0, 3, EXPERT_BYTES).tobytes()
    assert weights_of(bank, 0, 0) == content(0, 3, EXPERT_BYTES).tobytes()
    assert weights_of(opened_bank_of(opened), 0, 0) == content(0, 2, EXPERT_BYTES).tobytes(), "the vault is untouched"
    peer.close()


def opened_bank_of(opened: Open) -> SlotBank:
    bank = SlotBank(LAYERS, 1, 8, 4, torch.float32)
    bank.borrow(0, 0, 2, 1, opened.reader.expert_bytes(0, 2))
    return bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_borrowed_expert_computes_the_same_bits_as_a_copied_one(dtype: torch.dtype) -> None:
    hidden, width = 64, 32
    size = 3 * hidden * width * dtype.itemsize
    opened = Open(VaultShape(1, 2, size, 0, 1))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3 * hidden * width, generator=generator).to(dtype).view(torch.uint8).numpy()
    opened.keeper.write(opened.keeper.shape.expert_start(0, 1), weights)
    bank = SlotBank(1, 2, hidden, width, dtype)
    bank.slot_bytes(0, 0)[:] = weights
    bank.mark(0, 0, 1, digest(weights.data))
    bank.borrow(0, 1, 1, digest(weights.data), opened.reader.expert_bytes(0, 1))
    for rows in (1, 3, 8):
        x = torch.randn(rows, hidden, generator=generator).to(dtype)
        plain = bank.expert(0, 1)(x)
        assert torch.equal(bank.expert(0, 0)(x), plain)
    bank.pack()
    assert torch.equal(bank.expert(0, 1)(x), plain)
    bank.close()
    opened.close()


# --- dense weights, and room


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny(tmp_path_factory.mktemp("vault") / "tiny", "qwen3-moe", layers=2, dense_layers=(0,)))


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize("arch", ["qwen3-moe", "mixtral"])
def test_dense_weights_from_the_vault_are_those_of_the_checkpoint(tmp_path: Path, arch: str, tied: bool) -> None:
    checkpoint = Checkpoint.open(make_tiny(tmp_path / "model", arch, layers=2, tied=tied))  # type: ignore[arg-type]
    opened = Open(room_for(ServeConfig(model=str(checkpoint.path)), checkpoint).shape)
    writer = opened.keeper.dense_writer()
    for name, tensor in checkpoint.dense_parts(torch.bfloat16):
        assert opened.reader.dense_parts() is None, "not before all are there"
        writer.add(name, tensor)
    opened.keeper.publish_dense(writer.table)
    parts = opened.reader.dense_parts()
    assert parts is not None
    wanted = dict(checkpoint.dense_parts(torch.bfloat16))
    assert parts.keys() == wanted.keys()
    assert all(torch.equal(parts[name], wanted[name]) and parts[name].dtype == torch.bfloat16 for name in wanted)
    dense = DenseWeights.of(parts)
    assert len(dense.layers) == 2
    assert (dense.head is dense.embed) == tied
    assert dense.embed.data_ptr() % 64 == 0
    assert sum(opened.reader.dense_bytes(tensor).size for tensor in opened.reader.dense_table()) == (
        opened.reader.shape.dense_bytes
    )
    del parts, dense, wanted
    opened.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_on_the_vaults_dense_weights_gives_the_same_bits(tiny: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(tiny)
    name = str(dtype).removeprefix("torch.")
    opened = Open(room_for(ServeConfig(model=str(tiny), dtype=name), checkpoint).shape)  # type: ignore[arg-type]
    writer = opened.keeper.dense_writer()
    for part, tensor in checkpoint.dense_parts(dtype):
        writer.add(part, tensor)
    opened.keeper.publish_dense(writer.table)
    parts = opened.reader.dense_parts()
    assert parts is not None
    own, lent = solo(tiny, dtype), solo(tiny, dtype, DenseWeights.of(parts))
    sequences = [(list(range(3, 40)), np.arange(3, dtype=np.int32))]
    logits = [rank.logits(rank.run(sequences, [(0, 0, 37)], rank.kv(48))) for rank in (own, lent)]
    assert torch.equal(*logits)
    assert torch.equal(parts["embed"].view(torch.uint8), dict(checkpoint.dense_parts(dtype))["embed"].view(torch.uint8))


def test_damaged_dense_weights_are_not_used(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    opened = Open(room_for(ServeConfig(model=str(tiny)), checkpoint).shape)
    writer = opened.keeper.dense_writer()
    for name, tensor in checkpoint.dense_parts(torch.bfloat16):
        writer.add(name, tensor)
    opened.keeper.publish_dense(writer.table)
    opened.keeper.dense_bytes(writer.table[3])[1] ^= 1
    assert opened.reader.dense_parts() is None
    opened.close()


def test_room_counts_the_vault_the_slots_the_dense_weights_and_the_caches(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    config = ServeConfig(model=str(tiny), ep_size=2, kv_cache_memory_mb=100)
    small = room_for(config, checkpoint, available=0)
    assert not small.fits
    need = small.shape.total_bytes + small.ranks
    assert small.ranks > 2 * (100 << 20)
    assert not room_for(config, checkpoint, available=need).fits, "some must stay free"
    assert room_for(config, checkpoint, available=need + (1 << 30)).fits
    on_devices = room_for(msgspec.structs.replace(config, device="cuda"), checkpoint, available=0)
    assert on_devices.shape == small.shape
    assert on_devices.ranks < small.ranks - 2 * (100 << 20), "slots and caches are in the devices' memory"


@pytest.mark.parametrize(
    ("options", "why"),
    [({"expert_backup": "disk"}, ""), ({"expert_backup": "none"}, ""), ({"kv_cache_memory_mb": 10**9}, "does not fit")],
    ids=["disk", "none", "no room"],
)
def test_without_a_vault_workers_get_no_address_and_the_log_says_why(
    tiny: Path, caplog: pytest.LogCaptureFixture, options: dict[str, object], why: str
) -> None:
    told: list[m.VaultState] = []
    config = ServeConfig(model=str(tiny), **options)  # type: ignore[arg-type]
    custodian = Custodian(config, told.append)
    spec = VaultSpec(
        config=config, run_dir="", store_host="", store_port=0, notices="", launcher_pid=os.getpid(), vault=""
    )
    custodian.start(spec, lambda spec: pytest.fail("there is nothing to fill"))
    assert custodian.address == ""
    assert custodian.pidfd == -1
    assert [state.state for state in told] == ["off"]
    assert why in caplog.text
    custodian.close()


def custodian_of(model: Path) -> tuple[list[m.VaultState], Custodian, VaultSpec]:
    """A custodian of a model's vault, what it tells, and what its keepers are to be started with."""
    told: list[m.VaultState] = []
    config = ServeConfig(model=str(model), kv_cache_memory_mb=1)
    custodian = Custodian(config, told.append)
    spec = VaultSpec(
        config=config, run_dir="", store_host="", store_port=0, notices="", launcher_pid=os.getpid(),
        vault=custodian.address,
    )  # fmt: skip
    return told, custodian, spec


def test_keepers_that_end_to_no_effect_are_given_up_and_those_that_get_on_are_not(tiny: Path) -> None:
    told, custodian, spec = custodian_of(tiny)
    incarnations: list[int] = []

    def ask(spec: VaultSpec) -> None:
        incarnations.append(spec.incarnation)
        if len(incarnations) == 4:
            keeper = Vault.open_for_writing(custodian.address)
            keeper.publish(0, 0, 1)
            keeper.close()
        pid = os.posix_spawn("/bin/true", ["true"], {})
        custodian.born(pid, os.pidfd_open(pid))

    custodian.start(spec, ask)
    while custodian.pidfd >= 0:
        custodian.buried()
    assert incarnations == list(range(8)), "three to no effect, one that filled something, and four more to none"
    assert [state.state for state in told] == ["given_up"]
    vault = Vault.open(custodian.address)
    assert told[0].filled_bytes == vault.filled_bytes == vault.shape.expert_bytes, "what is there is still used"
    assert told[0].total_bytes == vault.shape.weight_bytes
    vault.close()
    custodian.close()


def test_a_keeper_that_stays_stopped_is_replaced_and_one_that_is_stopped_for_a_moment_is_not(tiny: Path) -> None:
    told, custodian, spec = custodian_of(tiny)
    incarnations: list[int] = []

    def ask(spec: VaultSpec) -> None:
        incarnations.append(spec.incarnation)
        pid = os.posix_spawn("/bin/sleep", ["sleep", "3600"], {})
        custodian.born(pid, os.pidfd_open(pid))

    def look(*seconds: float) -> bool:
        """Look so often; whether the keeper was killed by it."""
        for now_s in seconds:
            custodian.look(now_s)
        return bool(select.select([custodian.pidfd], [], [], 0)[0])

    custodian.start(spec, ask)
    assert not look(*(LOOK_S * n for n in range(200))), "it sleeps: that is no stop"
    pid = custodian.pid
    for _ in range(3):
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        assert not look(*np.arange(0.0, HELPER_HALT_S, LOOK_S))
        os.kill(pid, signal.SIGCONT)
        os.waitid(os.P_PID, pid, os.WCONTINUED)
        assert not look(1000.0)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    custodian.look(0.0)
    assert not look(3600.0), "whoever looks once an hour knows nothing of the hour"
    for now_s in np.arange(3600.0, 3600.0 + 2 * HELPER_HALT_S, LOOK_S):
        custodian.look(float(now_s))
    assert select.select([custodian.pidfd], [], [], 60)[0], "it was killed"
    custodian.buried()
    assert incarnations == [0, 1]
    assert custodian.pid != pid
    assert not told
    custodian.close()


def test_a_keeper_that_cannot_be_forked_any_more_is_given_up_and_the_vault_stays(tiny: Path) -> None:
    told, custodian, spec = custodian_of(tiny)
    asked: list[VaultSpec] = []
    custodian.nobody_is_born()
    assert not told, "nobody was asked for"
    custodian.start(spec, asked.append)
    custodian.nobody_is_born()
    assert len(asked) == 1
    assert [state.state for state in told] == ["given_up"]
    Vault.open(custodian.address).close()
    custodian.close()
