"""Filling slots with experts, from a peer's live replica or from disk, each checked by digest: the only I/O on weights.

A slot says what it holds at every moment: it is cleared before it is overwritten and marked after the check. So a
restore that is cut off anywhere leaves slots that hold what they say, and the next one starts from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phalanx.elastic.agree import Agreed
from phalanx.elastic.replan import Move
from phalanx.errors import PhalanxError
from phalanx.moe.experts import PeerBank, digest
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import Member

Bytes = npt.NDArray[np.uint8]
Fetch = Callable[[Bytes], None]
"""Reads one copy of an expert into uint8 [expert_bytes]. Raises OSError or PhalanxError when it cannot."""

TROUBLE = (OSError, PhalanxError)
"""What a source may raise: it means "take the next copy"."""


class Bank(Protocol):
    """This rank's expert slots, `moe.experts.SlotBank` in a service."""

    @property
    def held_LS(self) -> npt.NDArray[np.int32]: ...

    @property
    def digest_LS(self) -> npt.NDArray[np.uint64]: ...

    def slot_bytes(self, layer: int, slot: int) -> Bytes: ...

    def clear(self, layer: int, slot: int) -> None: ...

    def mark(self, layer: int, slot: int, expert: int, digest: int) -> None: ...


class Reader(Protocol):
    """Another rank's slots, read-only, `moe.experts.PeerBank` in a service."""

    def slot_bytes(self, layer: int, slot: int) -> Bytes: ...

    def close(self) -> None: ...


class Source(Protocol):
    """One place that experts can be restored from."""

    name: str
    """peer | vault | disk: under this name its bytes are counted."""

    def adopt(self, agreed: Agreed) -> None:
        """What is agreed from now on. LOCAL, and cheap: it is called in every recovery."""

    def copies(self, layer: int, expert: int) -> Iterable[Fetch]:
        """Every copy that this source could read, the best first. LOCAL."""


class PeerSource:
    """Live replicas on other ranks, read out of their memory.

    Only slots that keep their expert under the new placement are read, so that nobody reads what its owner overwrites.
    Should it happen nevertheless (the owner is an epoch ahead), the digest tells."""

    name = "peer"

    def __init__(self, me: Member, open_bank: Callable[[str], Reader] = PeerBank.open) -> None:
        self._me = me
        self._open = open_bank
        self._agreed: Agreed | None = None
        self._readers: dict[Member, Reader] = {}

    def adopt(self, agreed: Agreed) -> None:
        self._agreed = agreed
        placement = agreed.placement
        self._kept_LP = (agreed.held_LP == placement.slots_LP) & (placement.slots_LP >= 0)
        for member in [m for m in self._readers if m not in agreed.view]:
            self._readers.pop(member).close()

    def copies(self, layer: int, expert: int) -> Iterator[Fetch]:
        assert self._agreed is not None, "copies of what? Nothing is agreed yet"
        placement, view = self._agreed.placement, self._agreed.view
        width, mine = placement.slots_per_rank, self._me.rank
        slots = np.flatnonzero(self._kept_LP[layer] & (placement.slots_LP[layer] == expert)).tolist()
        turn = mine % max(1, len(slots))  # each rank starts at another replica, so that not all read from one
        for slot in slots[turn:] + slots[:turn]:
            member = view.member(slot // width)
            if member is not None and member != self._me:
                yield self._fetch(member, layer, slot % width)

    def close(self) -> None:
        """Unmap all. LOCAL."""
        while self._readers:
            self._readers.popitem()[1].close()

    def _fetch(self, member: Member, layer: int, slot: int) -> Fetch:
        def fetch(out: Bytes) -> None:
            reader = self._readers.get(member)
            if reader is None:
                reader = self._readers[member] = self._open(member.weights_address)
            np.copyto(out, reader.slot_bytes(layer, slot))

        return fetch


class ExpertReader(Protocol):
    """A checkpoint's experts in slot layout, `model.loader.Checkpoint` in a service."""

    def read_expert(self, layer: int, expert: int, out: Bytes, dtype: Any) -> None: ...


class DiskSource:
    """The checkpoint: slow, but it has every expert."""

    name = "disk"

    def __init__(self, checkpoint: ExpertReader, dtype: Any) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def adopt(self, agreed: Agreed) -> None:
        pass

    def copies(self, layer: int, expert: int) -> tuple[Fetch, ...]:
        return (lambda out: self._checkpoint.read_expert(layer, expert, out, self._dtype),)


class Restore:
    """The filling of one rank's slots, which can be done in pieces and cut off anywhere."""

    def __init__(
        self,
        moves: Sequence[Move],
        agreed: Agreed,
        bank: Bank,
        sources: Sequence[Source],
        *,
        progress: Callable[[int, int], None] | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        """progress: called with (done, total) after each expert. sources: the fastest first."""
        self._moves, self._agreed, self._bank, self._sources = moves, agreed, bank, sources
        self._progress, self._faults = progress, faults
        self._next = 0
        self.lost: list[tuple[int, int]] = []
        """(layer, expert) that no source could give."""
        self.learned = 0
        """How many digests this restore was the first to know."""
        self.bytes_by_source: dict[str, int] = {}
        for source in sources:
            source.adopt(agreed)

    @property
    def remaining(self) -> int:
        return len(self._moves) - self._next

    def advance(self, goes_on: Callable[[], bool]) -> None:
        """Restore expert by expert until all are done, or until `goes_on()`, asked before each, is false. LOCAL."""
        while self.remaining and goes_on():
            move = self._moves[self._next]
            self._faults.point("restore")
            if not self._fill(move):
                self.lost.append((move.layer, move.expert))
            self._next += 1
            if self._progress is not None:
                self._progress(self._next, len(self._moves))

    def _fill(self, move: Move) -> bool:
        layer, slot, expert = move
        self._bank.clear(layer, slot)
        out = self._bank.slot_bytes(layer, slot)
        wanted = int(self._agreed.digest_LE[layer, expert])
        for source in self._sources:
            for fetch in source.copies(layer, expert):
                with suppress(*TROUBLE):
                    fetch(out)
                    found = digest(out.data)
                    if wanted in (0, found):
                        self._bank.mark(layer, slot, expert, found)
                        self.learned += wanted == 0
                        self.bytes_by_source[source.name] = self.bytes_by_source.get(source.name, 0) + out.nbytes
                        return True
        return False
