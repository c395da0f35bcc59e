"""How much memory a service takes on a host: the ranks, and the vault beside them; and what there is. No torch here."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from phalanx.config import ELEMENT_BYTES, ServeConfig
from phalanx.elastic.vault.memory import VaultShape
from phalanx.elastic.vault.shares import EVERYTHING, Share
from phalanx.errors import BadConfig
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
    shape = _shape(config, checkpoint, share)
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


def check_memory(config: ServeConfig, checkpoint: Checkpoint, there: int | None = None) -> None:
    """Raise BadConfig when the weights alone are more than this host can ever hold, even if nothing else ran on it.

    What is counted cannot be had for less: each expert once, in any of this host's ranks, and in each rank the other
    weights. there: bytes; by default `total_bytes`. Opens no weights. LOCAL."""
    if config.device != "cpu":
        return
    shape = _shape(config, checkpoint, EVERYTHING)
    ranks = -(-config.ep_size // config.nnodes)
    experts = shape.num_layers * shape.num_experts * shape.expert_bytes // config.nnodes
    there = total_bytes() if there is None else there
    if experts + ranks * shape.dense_bytes <= there:
        return
    ways = ["--nnodes spreads the experts over more hosts"]
    plain = checkpoint.config.expert_format == "plain"
    if plain:
        ways.append("--quantization fp8 makes them smaller")
    if config.dtype != "bfloat16":
        ways.append(f"--dtype bfloat16 halves {'both' if plain else 'the others'}")
    if ranks > 1:
        ways.append("a lower --ep-size has these fewer times")
    raise BadConfig(
        f"{config.model} does not fit into this host's memory: it needs at least "
        f"{gb(experts + ranks * shape.dense_bytes)} ({gb(experts)} of experts, and {gb(shape.dense_bytes)} of other "
        f"weights for each of its ranks, of which there are {ranks}), and there are {gb(there)} with swap: "
        + "; ".join(ways)
    )


def available_bytes() -> int:
    """Memory that this process and its children may still take: of the host, and within its control group. LOCAL."""
    room = _meminfo()["MemAvailable"]
    with suppress(OSError, ValueError, KeyError, StopIteration):  # no control groups of the second kind, or no limit
        directory = _control_group()
        limit, used = (int(_read(f"{directory}/memory.{name}")) for name in ("max", "current"))
        stat = dict(line.split() for line in _read(f"{directory}/memory.stat").splitlines())
        room = min(room, limit - used + int(stat["inactive_file"]))
    return max(0, room)


def total_bytes() -> int:
    """Memory and swap that this process and its children could ever take, if nobody else took any. LOCAL."""
    fields = _meminfo()
    room, swap = fields["MemTotal"], fields["SwapTotal"]
    with suppress(OSError, ValueError, StopIteration):
        room = min(room, int(_read(f"{_control_group()}/memory.max")))
    with suppress(OSError, ValueError, StopIteration):
        swap = min(swap, int(_read(f"{_control_group()}/memory.swap.max")))
    return room + swap


def _shape(config: ServeConfig, checkpoint: Checkpoint, share: Share) -> VaultShape:
    model, itemsize, dense = checkpoint.config, ELEMENT_BYTES[config.dtype], checkpoint.dense_elements()
    expert_bytes = model.expert_layout(itemsize).total_bytes
    return VaultShape(
        model.num_moe_layers, model.num_experts, expert_bytes, sum(dense) * itemsize, len(dense), share
    )  # fmt: skip


def _meminfo() -> dict[str, int]:
    """Bytes by the kernel's names for them."""
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {name.rstrip(":"): int(number) << 10 for name, number, *_ in lines}


def _control_group() -> str:
    """The directory of this process's control group. Raises StopIteration when it has none of the second kind."""
    lines = _read("/proc/self/cgroup").splitlines()
    group = next(line.split("::", 1)[1].strip() for line in lines if line.startswith("0::"))
    return _CGROUP + (group if os.path.exists(_CGROUP + group) else "")


def gb(size: int) -> str:
    """Bytes for people: in 10^9, in 10^6 when that is less than one. LOCAL."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
