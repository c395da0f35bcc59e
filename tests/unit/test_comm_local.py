"""The communicator of one rank alone."""

from __future__ import annotations

import os

import torch

from phalanx.comm.local import LocalCommunicator
from phalanx.world import Member, View


def test_combine_returns_to_each_token_what_its_slots_made_of_it():
    comm = LocalCommunicator()
    x = torch.arange(6.0).view(3, 2)
    slots = torch.tensor([[1, 0], [2, -1], [-1, -1]], dtype=torch.int32)
    dispatched = comm.dispatch(x, slots)
    assert dispatched.row_M.tolist() == [0, 0, 1]
    assert dispatched.slot_M.tolist() == [1, 0, 2]
    y = dispatched.x_ND[dispatched.row_M] * (dispatched.slot_M + 1).unsqueeze(1)
    expected = torch.stack([torch.stack([x[0] * 2, x[0]]), torch.stack([x[1] * 3, x[1] * 0]), torch.zeros(2, 2)])
    assert torch.equal(comm.combine(y, dispatched), expected)


def test_no_tokens_go_through():
    comm = LocalCommunicator()
    dispatched = comm.dispatch(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int32))
    assert comm.combine(torch.zeros(0, 4), dispatched).shape == (0, 2, 4)


def test_gathering_from_oneself_gives_ones_own_row():
    assert LocalCommunicator().all_gather(torch.tensor([3, 4])).tolist() == [[3, 4]]


def test_an_interrupt_shows_until_a_view_of_its_epoch_is_adopted():
    comm = LocalCommunicator()
    assert comm.status().clean
    comm.interrupt(3)
    assert comm.failed
    assert comm.status().interrupted == 3
    assert comm.sleep(60.0)
    comm.adopt(View(2, 1, (Member(0, 0),)))
    assert comm.failed
    comm.adopt(View(3, 1, (Member(0, 0),)))
    assert comm.status().clean


def test_sleep_ends_when_a_descriptor_can_be_read():
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")
    assert not LocalCommunicator().sleep(60.0, (read_end,))
    os.close(read_end)
    os.close(write_end)
