"""Expert slots: bytes in shared memory that this rank computes with and that its peers read."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from phalanx.moe.experts import PeerBank, SlotBank, StaleAddress, digest


@pytest.fixture
def bank():
    bank = SlotBank(num_layers=3, slots_per_rank=4, hidden=8, expert_width=6, dtype=torch.bfloat16)
    yield bank
    bank.close()


def fill(bank: SlotBank, layer: int, slot: int, seed: int) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 255, bank.expert_bytes, dtype=np.uint8)
    bank.slot_bytes(layer, slot)[:] = data
    return data


def test_a_slot_is_w13_then_w2_in_one_run_of_bytes(bank):
    w13 = torch.randn(12, 8).bfloat16()
    w2 = torch.randn(8, 6).bfloat16()
    flat = torch.cat([w13.flatten(), w2.flatten()]).view(torch.uint8).numpy()
    assert bank.expert_bytes == flat.size
    bank.slot_bytes(2, 3)[:] = flat
    got13, got2 = bank.weights(2, 3)
    assert torch.equal(got13, w13)
    assert torch.equal(got2, w2)


def test_weights_stay_at_their_address_when_the_slot_is_filled_again(bank):
    w13, _ = bank.weights(0, 0)
    fill(bank, 0, 0, 1)
    before = w13.clone()
    fill(bank, 0, 0, 2)
    assert bank.weights(0, 0)[0].data_ptr() == w13.data_ptr()
    assert not torch.equal(before.view(torch.int16), w13.view(torch.int16))


def test_held_and_digest_say_what_was_marked_and_are_copies(bank):
    data = fill(bank, 1, 2, 7)
    bank.mark(1, 2, expert=5, digest=digest(data))
    bank.held_LS[:] = 99
    assert bank.held_LS[1, 2] == 5
    assert (bank.held_LS >= 0).sum() == 1
    assert int(bank.digest_LS[1, 2]) == digest(bank.slot_bytes(1, 2))


def test_clearing_a_slot_forgets_it_and_leaves_its_neighbours(bank):
    kept = fill(bank, 1, 1, 1)
    bank.mark(1, 1, 0, digest(kept))
    bank.mark(1, 2, 1, digest(fill(bank, 1, 2, 2)))
    bank.clear(1, 2)
    assert bank.held_LS[1].tolist() == [-1, 0, -1, -1]
    assert bank.digest_LS[1, 2] == 0
    assert not bank.slot_bytes(1, 2).any()
    assert np.array_equal(bank.slot_bytes(1, 1), kept)


def test_empty_slots_take_no_memory():
    bank = SlotBank(num_layers=64, slots_per_rank=128, hidden=1024, expert_width=1024, dtype=torch.float32)
    path = bank.address.split(":")[0]
    assert os.stat(path).st_size > 90 << 30
    assert os.stat(path).st_blocks * 512 < 1 << 20
    bank.slot_bytes(3, 3)[:] = 1
    filled = os.stat(path).st_blocks
    bank.clear(3, 3)
    assert os.stat(path).st_blocks < filled
    bank.close()


def test_a_peer_reads_the_owners_bytes_and_cannot_write_them(bank):
    peer = PeerBank.open(bank.address)
    data = fill(bank, 2, 1, 3)
    assert np.array_equal(peer.slot_bytes(2, 1), data)
    with pytest.raises(ValueError, match="read-only"):
        peer.slot_bytes(2, 1)[0] = 1
    peer.close()


def test_a_slot_outside_the_bank_is_refused(bank):
    with pytest.raises(AssertionError):
        bank.slot_bytes(3, 0)
    with pytest.raises(AssertionError):
        bank.weights(0, 4)


def test_the_address_of_a_closed_bank_is_stale():
    bank = SlotBank(1, 1, 8, 8, torch.float32)
    address = bank.address
    bank.close()
    with pytest.raises(StaleAddress):
        PeerBank.open(address)


def test_a_reused_descriptor_number_is_told_apart():
    bank = SlotBank(1, 1, 8, 8, torch.float32)
    address = bank.address
    bank.close()
    other = SlotBank(1, 1, 8, 8, torch.float32)
    assert other.address.split(":")[0] == address.split(":")[0], "the test needs the kernel to reuse the number"
    with pytest.raises(StaleAddress, match="another"):
        PeerBank.open(address)
    other.close()


def test_a_mapped_bank_outlives_its_owner():
    read_end, write_end = os.pipe()
    owner = os.fork()
    if owner == 0:
        bank = SlotBank(1, 2, 8, 8, torch.float32)
        fill(bank, 0, 1, 11)
        os.write(write_end, bank.address.encode())
        signal.pause()
    address = os.read(read_end, 4096).decode()
    peer = PeerBank.open(address)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    expected = np.random.default_rng(11).integers(0, 255, peer.expert_bytes, dtype=np.uint8)
    assert np.array_equal(peer.slot_bytes(0, 1), expected)
    with pytest.raises(StaleAddress):
        PeerBank.open(address)
    peer.close()
    os.close(read_end)
    os.close(write_end)
