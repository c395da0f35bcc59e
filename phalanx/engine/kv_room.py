"""How many KV blocks a device has room for: what its weights leave, less what must stay free.

What must stay free is a part of the whole device, not of what is left, so that a model twice as large does not halve
the room for graphs and batches, which do not depend on its weights. The same rule as SGLang's flag of that name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from phalanx.moe.cuda import DeviceMemoryShort

log = logging.getLogger("phalanx.engine")

MOST_BLOCKS = 1 << 20
"""More are of no use to anyone, and each takes memory on the host, too."""


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory in bytes: free for this process, and in all. name: the device's."""

    free: int
    total: int
    name: str

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """As it is now, other processes' use included. LOCAL."""
        return cls(*torch.cuda.mem_get_info(device), str(device))


def blocks_that_fit(memory: DeviceMemory, fraction: float, block_bytes: int, block_size: int) -> int:
    """KV blocks for a rank whose weights stand on the device already, which it has to itself. LOCAL, pure but for a
    line of log.

    fraction: the part of the device that weights and KV may take together. block_bytes: what `block_size` tokens take
    in all layers; one block more is allocated, for rows that pad a batch. Raises DeviceMemoryShort."""
    kept = memory.total - int(memory.total * fraction)
    room = memory.free - kept
    blocks = min(room // block_bytes - 1, MOST_BLOCKS)
    if blocks < 1:
        raise DeviceMemoryShort(
            f"{memory.name} has {memory.free / 1e9:.1f} of {memory.total / 1e9:.1f} GB left beside the weights, of "
            f"which --mem-fraction-static {fraction:g} keeps {kept / 1e9:.1f} GB for graphs and batches: that leaves "
            f"nothing for the KV cache, of which a block takes {block_bytes / 1e6:.1f} MB; have each rank hold fewer "
            "experts (--slots-per-rank, --min-ranks), or raise --mem-fraction-static"
        )
    log.info(
        "%d tokens fit into the KV cache: %d blocks, %.1f GB; %.1f of %.1f GB of %s stay free for graphs and batches",
        blocks * block_size, blocks, blocks * block_bytes / 1e9, (memory.free - (blocks + 1) * block_bytes) / 1e9,
        memory.total / 1e9, memory.name,
    )  # fmt: skip
    return blocks


def check_fit(memory: DeviceMemory, blocks: int, block_bytes: int) -> None:
    """Raise DeviceMemoryShort when a KV cache of so many blocks, as an operator asked for it, has no room beside the
    weights. LOCAL, pure."""
    size = (blocks + 1) * block_bytes
    if size > memory.free:
        raise DeviceMemoryShort(
            f"a KV cache of {blocks} blocks takes {size / 1e9:.1f} GB, and {memory.name} has {memory.free / 1e9:.1f} "
            f"of {memory.total / 1e9:.1f} GB left beside the weights: lower --num-kv-blocks or --kv-cache-memory-mb"
        )
