"""Which hosts' vaults hold which experts. Pure, no torch.

Experts are numbered through all layers. Each block of N consecutive ones goes once around the N hosts, so every host
gets one of a block and, for each further copy, one more. How far the further copies stand from the first changes from
block to block: what a lost host held is then spread over all others, and they share the work of giving it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def hosts_of(layer: int, expert: int, num_experts: int, nnodes: int, copies: int) -> tuple[int, ...]:
    """The hosts (by number) whose vaults hold an expert, the first copy's first: `copies` different ones, or all
    `nnodes` when they are fewer. Hosts' shares differ by no more than `copies` experts. LOCAL, pure."""
    assert nnodes >= 1, nnodes
    assert copies >= 1, copies
    block, first = divmod(layer * num_experts + expert, nnodes)
    further = ((block + i) % (nnodes - 1) + 1 for i in range(min(copies, nnodes) - 1))
    return (first, *((first + step) % nnodes for step in further))


@dataclass(frozen=True)
class Share:
    """The part of all experts that one host's vault holds: that of host `node_rank` of `nnodes`, every expert on
    `copies` of them. By default there is one host, which holds everything."""

    node_rank: int = 0
    nnodes: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.node_rank < self.nnodes, (self.node_rank, self.nnodes)
        assert self.copies >= 1, self.copies

    def mask_LE(self, num_layers: int, num_experts: int) -> npt.NDArray[np.bool_]:
        """bool [L, E]: the experts of this share. LOCAL."""
        if self.copies >= self.nnodes:
            return np.ones((num_layers, num_experts), np.bool_)
        number = np.arange(num_layers * num_experts).reshape(num_layers, num_experts)
        block, first = np.divmod(number, self.nnodes)
        mine: npt.NDArray[np.bool_] = first == self.node_rank
        for i in range(self.copies - 1):
            step = (block + i) % (self.nnodes - 1) + 1
            mine |= (first + step) % self.nnodes == self.node_rank
        return mine


EVERYTHING = Share()
"""What a host alone holds."""
