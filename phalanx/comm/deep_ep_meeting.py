"""How the ranks of a DeepEP-like buffer make their communicator: they learn each other's addresses, once.

Each rank gives one text and gets everybody's, by way of a torch process group that the caller has anyway, or of a
`torch.distributed` store. Neither is needed afterwards, so neither's fate matters to the exchange of tokens. What
travels is text of fixed length, never a pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from phalanx.comm.base import Communicator
from phalanx.comm.cpu import CpuCommunicator
from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.notices import NoticeBoard
from phalanx.errors import BadConfig
from phalanx.world import Member, View

T = TypeVar("T")

_TEXT_BYTES = 1024
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Shape:
    """What is exchanged: max_tokens, the most that any rank dispatches at once; D; K; num_experts, a multiple of R."""

    max_tokens: int
    hidden: int
    top_k: int
    num_experts: int

    def suits(self, other: Shape) -> bool:
        """Whether a communicator that was made for this can exchange `other`."""
        return other.max_tokens <= self.max_tokens and (other.hidden, other.top_k, other.num_experts) == (
            self.hidden, self.top_k, self.num_experts,
        )  # fmt: skip


class Meeting(Protocol):
    """Ranks that can tell each other one text. COLLECTIVE; raises what its transport raises when a rank is missing."""

    rank: int
    size: int

    def all_gather(self, text: str) -> list[str]: ...


class GroupMeeting:
    """Over a torch process group, of any backend. The caller keeps the group, or destroys it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group

    def all_gather(self, text: str) -> list[str]:
        said = text.encode()
        assert len(said) < _TEXT_BYTES, f"a text of {len(said)} bytes"
        nccl = dist.get_backend(self._group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        mine = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        mine[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        texts = [torch.empty(_TEXT_BYTES, dtype=torch.uint8, device=device) for _ in range(self.size)]
        dist.all_gather(texts, mine.to(device), group=self._group)
        return [bytes(text.cpu().tolist()).rstrip(b"\0").decode() for text in texts]


class StoreMeeting:
    """Over a store that all ranks reach. `HOST:PORT`: rank 0 holds it there, until everybody has read."""

    def __init__(self, store: Store | str, rank: int, size: int, timeout_s: float = 300.0) -> None:
        """Raises BadConfig when the address is none, or the rank is none of these."""
        if not 0 <= rank < size:
            raise BadConfig(f"rank, size: {rank} is no rank of {size}, counted from 0 on")
        self.rank, self.size = rank, size
        if isinstance(store, str):
            host, colon, port = store.removeprefix("tcp://").rpartition(":")
            if not colon or not port.isdecimal() or int(port) > 65535:
                raise BadConfig(f"store: {store!r} is no HOST:PORT")
            store = TCPStore(host, int(port), size, rank == 0, timedelta(seconds=timeout_s), False)
        self._store = store

    def all_gather(self, text: str) -> list[str]:
        self._store.set(f"phalanx/{self.rank}", text)
        texts = [self._store.get(f"phalanx/{rank}").decode() for rank in range(self.size)]
        if self._store.add("phalanx/read", 1) == self.size:
            self._store.set("phalanx/done", "1")
        if self.rank == 0:  # who may hold the store, and would take it along
            self._store.wait(["phalanx/done"])
        return texts


class _Card(msgspec.Struct, frozen=True):
    """What ranks tell each other. wants: what each was told to make, so that a difference is an error that says so."""

    boot_id: str
    address: str
    wants: str


def make(
    meeting: Meeting,
    shape: Shape,
    device: torch.device,
    prepare: Callable[[Communicator], T],
    *,
    elastic: bool,
    peer_timeout_s: float,
    notices: NoticeBoard | None,
    fp8_wire: bool,
) -> tuple[Communicator, T]:
    """A communicator of all ranks, under its first view, and what `prepare` made of it before the ranks met: nobody
    waits in a collective while a peer prepares. COLLECTIVE. Raises BadConfig when ranks differ in what they
    want, or in their host."""
    for field, value in asdict(shape).items():
        if value < 1:
            raise BadConfig(f"{field}: a whole number from 1 on is wanted, not {value}")
    if shape.num_experts % meeting.size:
        raise BadConfig(f"num_experts: {shape.num_experts} do not divide among {meeting.size} ranks")
    made: Communicator
    if device.type == "cuda":
        made = CudaCommunicator(
            meeting.rank, meeting.size, incarnation=0, max_tokens=shape.max_tokens, hidden=shape.hidden,
            top_k=shape.top_k, slots_per_rank=shape.num_experts // meeting.size, dtype=torch.bfloat16,
            peer_timeout_s=peer_timeout_s, notices=notices, elastic=elastic, fp8=fp8_wire, device=device,
        )  # fmt: skip
    else:
        made = CpuCommunicator(
            meeting.rank, meeting.size, incarnation=0, max_tokens=shape.max_tokens, hidden=shape.hidden,
            top_k=shape.top_k, slots_per_rank=shape.num_experts // meeting.size, dtype=torch.bfloat16,
            peer_timeout_s=peer_timeout_s, notices=notices, elastic=elastic,
        )  # fmt: skip
    try:
        prepared = prepare(made)
        addresses = _exchange(meeting, made.address, f"{shape}, {device.type}, elastic={elastic}")
        members = (Member(rank, 0, comm_address=address) for rank, address in enumerate(addresses))
        made.adopt(View(1, meeting.size, tuple(members)))
    except BaseException:
        made.close()
        raise
    return made, prepared


def _exchange(meeting: Meeting, address: str, wants: str) -> list[str]:
    """Everybody's address, by rank."""
    card = _Card(_BOOT_ID.read_text().strip(), address, wants)
    cards = [msgspec.json.decode(text, type=_Card) for text in meeting.all_gather(msgspec.json.encode(card).decode())]
    for rank, theirs in enumerate(cards):
        if theirs.wants != wants:
            raise BadConfig(f"rank {rank} was made for {theirs.wants}, rank {meeting.rank} for {wants}")
        if theirs.boot_id != card.boot_id:
            raise BadConfig(
                f"rank {rank} is on another host than rank {meeting.rank}: give a communicator that spans hosts"
            )
    return [theirs.address for theirs in cards]
