"""Everything an operator can choose, as one frozen value that travels to every process.

`ServeConfig` is what `phalanx serve` builds from its flags; a field's name is its flag's name with underscores.
Seconds end in `_s`. How the time-outs relate is in docs/assumptions.md and checked by `check()`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec

from phalanx.errors import BadConfig
from phalanx.wire import split_address

Dtype = Literal["bfloat16", "float32"]
Device = Literal["cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
Quantization = Literal["none", "fp8"]
Backup = Literal["dram", "disk", "none"]
VaultTransport = Literal["auto", "mooncake", "tcp"]

ELEMENT_BYTES: Mapping[Dtype, int] = MappingProxyType({"bfloat16": 2, "float32": 4})


USUAL_KV_MB = 512
"""Memory a rank for its KV cache where nothing is said and no device can be asked."""

MAX_DEVICE_PLACES = 62
"""Ranks on devices are told by the bits of one word (`comm.cuda`)."""

MAX_SECONDS = 10_000_000
"""The longest time-out, 116 days: no clock and no wait of the system overflows."""

MAX_COUNT = (1 << 63) - 1
"""The largest number that every process can be told."""

MAX_PLACES = 1024
"""Places for ranks: with a hundred times as many a single plan is more than the store takes."""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One service: model, ranks, limits, time-outs, HTTP."""

    model: str
    served_model_name: str = ""
    dtype: Dtype = "bfloat16"
    load_format: LoadFormat = "auto"
    """Where the weights come from: the checkpoint, or a generator of random ones (for benchmarks)."""
    quantization: Quantization = "none"
    """What the experts of a checkpoint in a wider type are made into when they are read."""
    device: Device = "cpu"
    deterministic: bool = False
    """On cuda: every sum in one order whatever the batch and the placement, at a price. On cpu it is always so."""
    cuda_graph_max_bs: int = 256
    """The largest batch of decodes that a CUDA graph is captured for; 0: nothing is captured."""
    cuda_graph_max_tokens: int = 2048
    """The most tokens of a step with prefills that a CUDA graph is captured for; 0: such steps are launched eagerly."""
    chat_template: str = ""
    seed: int = 0

    # ranks and experts
    ep_size: int = 1
    max_ep_size: int = 0
    """Places for ranks: as many as the service can be scaled up to while it serves; 0: `ep_size`. It starts with
    `ep_size` ranks in the first places."""
    min_ranks: int = 1
    num_redundant_experts: int = 0
    slots_per_rank: int = 0
    """Slots a rank and layer; 0: as many as the last `min_ranks` ranks need to hold every expert. Slots that hold no
    expert cost address space, not memory."""
    enable_eplb: bool = False
    """Balance the experts' load while serving. After a change of membership replicas are made up for and balanced
    without it, too, when there are redundant experts."""
    eplb_window: int = 1000
    """Steps over which the load is counted."""
    eplb_interval: int = 3000
    """Steps from one plan to the next; 0: none."""
    eplb_min_gain: float = 0.05
    """The part of the experts' time that a plan must save to be carried out."""
    expert_backup: Backup = "dram"
    """What a recovery restores experts from when no live replica is left: a copy of all weights in host memory (the
    vault; disk when it does not fit), the checkpoint on disk, or nothing."""
    vault_copies: int = 2
    """With several hosts: on how many of them each expert is kept; on all of them when they are fewer."""
    vault_transport: VaultTransport = "auto"
    """How another host's vault is read; auto: by mooncake where there are RDMA devices and the package, else by tcp."""
    ib_device: str = ""
    """The RDMA devices for mooncake, separated by commas; empty: all of them."""
    elastic: bool = True
    max_restarts: int = 3
    """How often a rank that died is started again within `restart_window_s`; 0: never."""
    restart_window_s: float = 60.0
    threads_per_rank: int = 1

    # hosts
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str = ""
    """HOST:PORT at which the first host (`node_rank` 0) listens for the launchers of the others."""
    node_host: str = ""
    """The address under which other hosts reach this one; "": the one that it has towards the first host."""
    cluster_token_file: str = ""
    elastic_ep_rejoin: bool = False
    """A start that finds no cluster is an error."""

    # engine limits
    max_model_len: int = 0
    """Tokens of prompt and answer together; 0: the model's own limit."""
    max_num_seqs: int = 64
    """Sequences a rank runs at once."""
    max_num_batched_tokens: int = 512
    """Tokens a rank computes in one step; a longer prompt is prefilled in chunks."""
    block_size: int = 16
    num_kv_blocks: int = 0
    """KV blocks a rank; 0: from `kv_cache_memory_mb`."""
    kv_cache_memory_mb: int = 0
    """0: on cuda what `mem_fraction_static` leaves, when a rank has a device to itself; else 512."""
    mem_fraction_static: float = 0.9
    """On cuda: the part of a device that weights and KV cache may take together."""
    enable_prefix_caching: bool = True
    """Keep the KV of finished requests as long as there is room, for later prompts that begin the same."""
    max_queued_requests: int = 1024
    """Requests the service holds beyond those that run; more are answered 429."""

    # time-outs; comm < roll call < restore
    peer_timeout_s: float = 2.0
    roll_call_timeout_s: float = 5.0
    restore_timeout_s: float = 120.0
    warmup_timeout_s: float = 300.0
    heartbeat_interval_s: float = 1.0
    drain_timeout_s: float = 10.0
    request_patience_s: float = 300.0
    """How long a request that is in flight waits while no rank can serve it."""

    # HTTP
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    enable_chaos: bool = False

    # observation
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    events_file: str = ""

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or os.path.basename(os.path.normpath(self.model))

    @property
    def places(self) -> int:
        """R, the number of places for ranks, vacant ones included."""
        return self.max_ep_size or self.ep_size

    def expert_slots(self, num_experts: int) -> int:
        """S, the slots a rank and layer; BadConfig when they cannot hold what is asked for. LOCAL."""
        wanted = num_experts + self.num_redundant_experts
        if wanted > num_experts * self.ep_size:
            raise BadConfig(
                f"--num-redundant-experts {self.num_redundant_experts} is more than {self.ep_size} ranks can use: with "
                f"{num_experts} experts at most {num_experts * (self.ep_size - 1)}"
            )
        filled = -(-wanted // self.ep_size)
        spare = filled < num_experts and (self.enable_eplb or self.num_redundant_experts > 0)  # one to stage into
        slots = self.slots_per_rank or max(-(-num_experts // self.min_ranks), filled + spare)
        if slots > num_experts:
            raise BadConfig(f"--slots-per-rank {slots} is more than the model's {num_experts} experts a layer")
        if slots * self.ep_size < wanted:
            raise BadConfig(
                f"--slots-per-rank {slots} on {self.ep_size} ranks holds {slots * self.ep_size} experts a layer, but "
                f"{wanted} are to be held: raise it to {-(-wanted // self.ep_size)}"
            )
        if self.max_ep_size and slots * self.min_ranks < num_experts:
            raise BadConfig(
                f"--max-ep-size lets the service shrink to --min-ranks {self.min_ranks}, whose "
                f"{slots * self.min_ranks} slots a layer cannot hold {num_experts} experts: raise --min-ranks to "
                f"{-(-num_experts // slots)} or --slots-per-rank to {-(-num_experts // self.min_ranks)}"
            )
        if self.enable_eplb and slots == filled and slots * self.ep_size == wanted and slots < num_experts:
            raise BadConfig(
                f"--enable-eplb moves experts by way of empty slots, and --slots-per-rank {slots} leaves none: raise "
                f"it to {slots + 1} (an empty slot takes no memory)"
            )
        return slots

    def context_length(self, max_position: int) -> int:
        """The most tokens a request may have, prompt and answer together, with a model of `max_position` positions.
        BadConfig when they are more than it has, or too few for both. LOCAL."""
        length = self.max_model_len or max_position
        if length > max_position:
            raise BadConfig(
                f"--max-model-len {length} is more than the {max_position} positions of the model: lower it"
            )
        if length < 2:
            raise BadConfig(f"--max-model-len {length} has no room for a prompt and an answer: raise it")
        return length

    def kv_blocks(self, bytes_per_block: int) -> int:
        """KV blocks a rank, whatever its device has room for. BadConfig when the memory for them holds none. LOCAL."""
        memory = self.kv_cache_memory_mb or USUAL_KV_MB
        blocks = self.num_kv_blocks or memory * (1 << 20) // bytes_per_block
        if blocks < 1:
            raise BadConfig(
                f"--kv-cache-memory-mb {memory} is less than one KV block of {bytes_per_block} bytes: raise it, or "
                "lower --block-size"
            )
        return blocks

    @property
    def kv_is_unsaid(self) -> bool:
        """Whether the operator left the size of the KV cache open."""
        return not self.num_kv_blocks and not self.kv_cache_memory_mb

    def check(self) -> None:
        """Raise BadConfig for values that contradict themselves. LOCAL."""
        at_least_one = (
            "ep_size", "min_ranks", "threads_per_rank", "max_num_seqs", "max_num_batched_tokens", "block_size",
            "max_queued_requests", "eplb_window", "vault_copies", "nnodes",
        )  # fmt: skip
        for field in at_least_one:
            if getattr(self, field) < 1:
                raise BadConfig(f"{_flag(field)} must be at least 1, not {getattr(self, field)}")
        not_negative = (
            "num_redundant_experts", "slots_per_rank", "max_restarts", "max_model_len", "num_kv_blocks",
            "kv_cache_memory_mb", "eplb_interval", "eplb_min_gain", "max_ep_size", "cuda_graph_max_bs",
            "cuda_graph_max_tokens",
        )  # fmt: skip
        for field in not_negative:
            if getattr(self, field) < 0:
                raise BadConfig(f"{_flag(field)} must not be negative, it is {getattr(self, field)}")
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field.endswith("_s") and not 0 < value <= MAX_SECONDS:
                raise BadConfig(f"{_flag(field)} must be more than 0 seconds, {MAX_SECONDS} at most, not {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise BadConfig(f"{_flag(field)} must be a finite number, not {value}")
            if isinstance(value, int) and abs(value) > MAX_COUNT:
                raise BadConfig(f"{_flag(field)} must be {MAX_COUNT} at most, not {value}")
        self._check_device()
        if self.min_ranks > self.ep_size:
            raise BadConfig(f"--min-ranks {self.min_ranks} is more than --ep-size {self.ep_size}")
        if self.max_ep_size and self.max_ep_size < self.ep_size:
            raise BadConfig(
                f"--max-ep-size {self.max_ep_size} is less than the --ep-size {self.ep_size} that the service starts "
                "with: raise it, or leave it out"
            )
        if self.places > self.ep_size and not self.elastic:
            raise BadConfig("--max-ep-size is of no use with --no-elastic: leave one of them out")
        if self.places > MAX_PLACES:
            raise BadConfig(
                f"{'--max-ep-size' if self.max_ep_size else '--ep-size'} {self.places} is more than {MAX_PLACES}: each "
                "change of membership carries what every place's slots hold; lower it"
            )
        self._check_hosts()
        if not 0 <= self.port <= 65535:
            raise BadConfig(f"--port must lie between 0 and 65535, not {self.port}")
        if self.roll_call_timeout_s <= self.peer_timeout_s:
            raise BadConfig(
                f"--roll-call-timeout ({self.roll_call_timeout_s} s) must be longer than --peer-timeout "
                f"({self.peer_timeout_s} s) and the longest step, or a slow rank is evicted: raise it"
            )

    def _check_device(self) -> None:
        if not 0 < self.mem_fraction_static < 1:
            raise BadConfig(
                f"--mem-fraction-static must lie between 0 and 1, not {self.mem_fraction_static}: it is the part of a "
                "device for weights and KV cache"
            )
        if self.device != "cuda":
            return
        if self.dtype != "bfloat16":
            raise BadConfig(f"--device cuda computes in bfloat16, not in --dtype {self.dtype}: leave it out")
        if self.nnodes > 1:
            raise BadConfig(
                f"--device cuda serves one host in this version, not --nnodes {self.nnodes}: leave that out, or serve "
                "with --device cpu"
            )
        if self.places > MAX_DEVICE_PLACES:
            raise BadConfig(
                f"{'--max-ep-size' if self.max_ep_size else '--ep-size'} {self.places} is more than the "
                f"{MAX_DEVICE_PLACES} ranks that can meet with --device cuda: lower it"
            )

    def _check_hosts(self) -> None:
        if self.nnodes > self.ep_size:
            raise BadConfig(
                f"--ep-size {self.ep_size} leaves some of the hosts of --nnodes {self.nnodes} without a rank: raise it"
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise BadConfig(
                f"--node-rank must lie between 0 and {self.nnodes - 1} (--nnodes {self.nnodes}), not {self.node_rank}"
            )
        if self.nnodes > 1:
            try:
                _, port = split_address(self.dist_init_addr)
            except ValueError:
                port = 0
            if not port:
                raise BadConfig(
                    f"--dist-init-addr {self.dist_init_addr!r} must be HOST:PORT, an address of the first host, the "
                    "same on all, with a port of your choice"
                )
            if self.elastic_ep_rejoin and not self.node_rank:
                raise BadConfig(
                    "--elastic-ep-rejoin: the first host (--node-rank 0) has the store, and cannot come back to a "
                    "cluster that ended with it: leave the flag out, and the other hosts come in by themselves"
                )


def _flag(field: str) -> str:
    return "--" + field.removesuffix("_s").replace("_", "-")
