"""How much memory the vault takes, what the ranks will need beside it, and what the host has. No torch here."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from phalanx.config import ELEMENT_BYTES, ServeConfig
from phalanx.elastic.vault.memory import VaultShape
from phalanx.elastic.vault.shares import EVERYTHING, Share
from phalanx.model.loader import Checkpoint

PROCESS_BYTES = 200 << 20
"""What a rank takes beside weights and KV: interpreter, buffers, allocator."""

RESERVE_BYTES = 256 << 20
"""What must stay free while the vault fills; below it, the keeper pauses."""

_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Room:
    """Whether a vault has room. Sizes in bytes."""

    shape: VaultShape
    available: int
    ranks: int
    """What the ranks need, when each has loaded what it holds."""

    @property
    def fits(self) -> bool:
        return self.shape.total_bytes + self.ranks + RESERVE_BYTES <= self.available

    def __str__(self) -> str:
        return (
            f"the vault takes {gb(self.shape.total_bytes)}; of {gb(self.available)} that are available the ranks will "
            f"need {gb(self.ranks)}, which leaves {gb(max(0, self.available - self.ranks - RESERVE_BYTES))}"
        )


def room_for(
    config: ServeConfig, checkpoint: Checkpoint, available: int | None = None, share: Share = EVERYTHING
) -> Room:
    """The room there is for this host's vault of a service that is about to start, and whose ranks are spread evenly
    over the hosts. Opens no weights. LOCAL."""
    model = checkpoint.config
    itemsize = ELEMENT_BYTES[config.dtype]
    dense = checkpoint.dense_elements()
    shape = VaultShape(
        model.num_moe_layers,
        model.num_experts,
        model.expert_layout(itemsize).total_bytes,
        sum(dense) * itemsize,
        len(dense),
        share,
    )
    copies = 2 if config.dtype == "bfloat16" else 1  # plain, and in the layout that oneDNN computes from
    copies_of_experts = copies if model.expert_format == "plain" else 1
    if config.device == "cuda":  # a rank's memory is the device's; the dense weights only pass through the host's
        ranks = -(-config.ep_size // share.nnodes) * (shape.dense_bytes + PROCESS_BYTES)
        return Room(shape, available_bytes() if available is None else available, ranks)
    experts = model.num_moe_layers * (model.num_experts + config.num_redundant_experts) * shape.stride
    block_bytes = model.kv_bytes(config.block_size, itemsize)
    kv = config.kv_blocks(block_bytes) * block_bytes
    a_rank = copies * shape.dense_bytes + kv + PROCESS_BYTES
    ranks = copies_of_experts * -(-experts // share.nnodes) + -(-config.ep_size // share.nnodes) * a_rank
    return Room(shape, available_bytes() if available is None else available, ranks)


def available_bytes() -> int:
    """Memory that this process and its children may still take: of the host, and within its control group. LOCAL."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    room = int(fields["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError, KeyError, StopIteration):  # no control groups of the second kind, or no limit
        with open("/proc/self/cgroup", encoding="ascii") as file:
            group = next(line.split("::", 1)[1].strip() for line in file if line.startswith("0::"))
        directory = _CGROUP + (group if os.path.exists(_CGROUP + group) else "")
        limit, used = (int(_read(f"{directory}/memory.{name}")) for name in ("max", "current"))
        stat = dict(line.split() for line in _read(f"{directory}/memory.stat").splitlines())
        room = min(room, limit - used + int(stat["inactive_file"]))
    return max(0, room)


def gb(size: int) -> str:
    """Bytes for people: in 10^9, in 10^6 when that is less than one. LOCAL."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
