"""What dispatch and combine must give, computed densely from everybody's inputs in one process."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from comm_ranks import HIDDEN, MAX_TOKENS, SLOTS, TOP_K, Node
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """One rank's tokens and slots in one round; every rank can compute everybody's."""

    x_TD: Tensor
    slots_TK: Tensor


def inputs(seed: int, round_: int, rank: int, ep_size: int, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed((seed * 1009 + round_) * 64 + rank)
    T = int(torch.randint(0, MAX_TOKENS + 1, (), generator=g))
    if int(torch.randint(0, 5, (), generator=g)) == 0:
        T = (0, MAX_TOKENS)[rank % 2]
    wide = torch.randn(T, HIDDEN + 8, generator=g).to(dtype)
    slots = torch.randint(-1, ep_size * SLOTS, (T, TOP_K), generator=g, dtype=torch.int32)
    return Inputs(wide[:, 8:], slots)  # rows that do not lie close together, as a caller's slice may be


def expert(slot: int, x: Tensor) -> Tensor:
    """What the expert in a global slot makes of a token."""
    return x * (slot + 1)


def check_exchange(node: Node, seed: int, round_: int, *, dead: Set[int] = frozenset()) -> None:
    """One dispatch and one combine, compared with the dense computation without `dead`."""
    comm = node.comm
    everybody = [inputs(seed, round_, r, comm.ep_size, comm.dtype) for r in range(comm.ep_size)]
    mine = everybody[node.rank]
    got = comm.dispatch(mine.x_TD, mine.slots_TK)
    pairs, tokens = [], []
    for source, theirs in enumerate(everybody):
        if source in dead:
            continue
        for t, row in enumerate(theirs.slots_TK.tolist()):
            here = [slot for slot in row if slot >= 0 and slot // SLOTS == node.rank]
            if here:
                tokens.append(theirs.x_TD[t])
            pairs += [(len(tokens) - 1, slot) for slot in here]
    where = f"rank {node.rank}, seed {seed}, round {round_}"
    assert got.row_M.tolist() == [row for row, _ in pairs], where
    assert got.slot_M.tolist() == [slot % SLOTS for _, slot in pairs], where
    assert got.x_ND.dtype == comm.dtype
    assert torch.equal(got.x_ND, torch.stack(tokens) if tokens else torch.zeros(0, HIDDEN, dtype=comm.dtype)), where
    y = [expert(slot, got.x_ND[row]) for row, slot in pairs]
    out = comm.combine(torch.stack(y) if y else torch.zeros(0, HIDDEN, dtype=comm.dtype), got)
    expected = torch.zeros(len(mine.x_TD), TOP_K, HIDDEN, dtype=comm.dtype)
    for t, row in enumerate(mine.slots_TK.tolist()):
        for k, slot in enumerate(row):
            if slot >= 0 and slot // SLOTS not in dead:
                expected[t, k] = expert(slot, mine.x_TD[t])
    assert torch.equal(out, expected), where


def check_all_gather(node: Node, seed: int, round_: int, *, dead: Set[int] = frozenset()) -> None:
    row = torch.tensor([seed, round_, node.rank, -1], dtype=torch.int64)
    expected = torch.zeros(node.comm.ep_size, 4, dtype=torch.int64)
    for rank in range(node.comm.ep_size):
        if rank not in dead:
            expected[rank] = torch.tensor([seed, round_, rank, -1])
    assert torch.equal(node.comm.all_gather(row), expected), f"rank {node.rank}, round {round_}"
