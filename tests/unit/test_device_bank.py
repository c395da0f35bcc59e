"""Slots in device memory, on the CPU as the device: what is marked is sent, and peers are told to look elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from phalanx.moe.cuda import DeviceBank, DeviceLoad
from phalanx.moe.experts import BorrowedSlot, PeerBank, digest

LAYERS, SLOTS, HIDDEN, WIDTH = 2, 3, 16, 8


@pytest.fixture(params=["plain", "fp8"])
def bank(request: pytest.FixtureRequest) -> Iterator[DeviceBank]:
    made = DeviceBank(LAYERS, SLOTS, HIDDEN, WIDTH, torch.bfloat16, torch.device("cpu"), request.param)
    made.weights_LSX.zero_()
    yield made
    made.close()


def expert(bank: DeviceBank, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, bank.expert_bytes, np.uint8)


def sent(bank: DeviceBank, layer: int, slot: int) -> bytes:
    bank.ready()
    return bank.weights_LSX[layer, slot].view(torch.uint8).numpy().tobytes()


def test_an_expert_that_a_source_wrote_is_sent_to_its_slot_and_no_other(bank: DeviceBank) -> None:
    data = expert(bank, 1)
    bank.slot_bytes(1, 2)[:] = data
    assert bank.held_LS[1, 2] == -1
    bank.mark(1, 2, 7, digest(data.data))
    assert sent(bank, 1, 2) == data.tobytes()
    assert (bank.held_LS[1, 2], bank.digest_LS[1, 2]) == (7, digest(data.data))
    assert bank.weights_LSX.count_nonzero() == bank.weights_LSX[1, 2].count_nonzero()


def test_an_expert_that_is_lent_is_copied_so_that_the_lender_may_go(bank: DeviceBank) -> None:
    data = expert(bank, 2)
    kept = data.tobytes()
    bank.borrow(0, 1, 4, digest(data.data), data)
    bank.ready()
    data[:] = 0
    assert sent(bank, 0, 1) == kept
    assert bank.held_LS[0, 1] == 4


def test_a_slot_keeps_its_address_whatever_it_holds(bank: DeviceBank) -> None:
    before = bank.weights_LSX.data_ptr()
    for number in range(4):
        bank.slot_bytes(0, 0)[:] = expert(bank, number)
        bank.mark(0, 0, number, number)
        bank.clear(0, 0)
    assert bank.held_LS[0, 0] == -1
    assert bank.weights_LSX.data_ptr() == before


def test_a_copy_that_was_refused_leaves_the_slot_empty_for_the_next(bank: DeviceBank) -> None:
    bank.slot_bytes(0, 0)[:] = expert(bank, 1)  # damaged: never marked
    data = expert(bank, 2)
    bank.slot_bytes(0, 1)[:] = data
    bank.mark(0, 1, 5, digest(data.data))
    assert bank.held_LS[0].tolist() == [-1, 5, -1]
    assert sent(bank, 0, 1) == data.tobytes()


def test_a_slot_that_nobody_filled_is_not_marked(bank: DeviceBank) -> None:
    bank.slot_bytes(0, 1)
    with pytest.raises(AssertionError, match="slot 2 of layer 0 was not filled"):
        bank.mark(0, 2, 1, 1)


def test_peers_are_told_that_there_is_nothing_to_read(bank: DeviceBank) -> None:
    bank.slot_bytes(0, 0)[:] = expert(bank, 3)
    bank.mark(0, 0, 1, 1)
    peer = PeerBank.open(bank.address.replace("/proc/self", f"/proc/{os.getpid()}"))
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            with pytest.raises(BorrowedSlot):
                peer.slot_bytes(layer, slot)
    bank.clear(0, 0)
    with pytest.raises(BorrowedSlot):
        peer.slot_bytes(0, 0)
    peer.close()


def test_only_loads_of_whole_steps_are_counted_although_the_next_step_runs_by_then() -> None:
    load = DeviceLoad(1, 3, torch.device("cpu"))
    landings = [load.landing() for _ in range(3)]
    for row, landing in zip(([1, 2, 3], [4, 0, 1], [1, 0, 0]), landings, strict=True):
        load.step_LE += torch.tensor([row], dtype=torch.int32)
        load.end(landing)
    load.count(landings[1])  # the one before it was not whole
    before = load.read()
    load.count(landings[2])
    assert load.read().tolist() == [[5, 0, 1]]
    assert before.tolist() == [[4, 0, 1]]
