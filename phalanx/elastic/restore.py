"""Filling slots with experts, each checked by its digest: the only I/O on weights.

Sources are asked in the order of their speed: the vault of this host, whose bytes a slot borrows without a copy; a live
replica on a peer of this host, which is copied; other hosts (`vault.remote`), of which everything that nobody here
has is asked at once, and comes while the rest is filled; the checkpoint on disk. A copy that is missing, damaged or
gone costs no more than the next. Where this rank has CPUs to spare, what is lent is digested ahead (`elastic.digests`).

A slot says what it holds at every moment: it is cleared before it is overwritten and marked after the check. So a
restore that is cut off anywhere leaves slots that hold what they say, and the next one starts from there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from phalanx.elastic.agree import Agreed
from phalanx.elastic.digests import Digests
from phalanx.elastic.replan import Move
from phalanx.elastic.store import Clock, MonotonicClock
from phalanx.elastic.vault.remote import Arrival, Remote, Want
from phalanx.errors import PhalanxError
from phalanx.moe.experts import PeerBank, digest
from phalanx.pages import FilePart
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import Member

Bytes = npt.NDArray[np.uint8]
Fetch = Callable[[Bytes], None]
"""Reads one copy of an expert into uint8 [expert_bytes]. Raises OSError or PhalanxError when it cannot."""

log = logging.getLogger("phalanx.elastic")

ARRIVAL_WAIT_S = 0.01
"""How long at most a restore that has nothing else to do looks for what comes from other hosts before it asks again
whether it is to go on."""

TROUBLE = (OSError, PhalanxError)
"""What a source may raise: it means "take the next copy"."""


@dataclass(frozen=True, eq=False)
class Loan:
    """A copy of an expert that need not be read: uint8 [expert_bytes] in memory that stays as it is, which a slot may
    borrow. digest: what whoever put it there says it is."""

    data: Bytes
    digest: int


class Bank(Protocol):
    """This rank's expert slots, `moe.experts.SlotBank` in a service."""

    @property
    def held_LS(self) -> npt.NDArray[np.int32]: ...

    @property
    def digest_LS(self) -> npt.NDArray[np.uint64]: ...

    def slot_bytes(self, layer: int, slot: int) -> Bytes: ...

    def slot_file(self, layer: int, slot: int) -> FilePart | None: ...

    def clear(self, layer: int, slot: int) -> None: ...

    def mark(self, layer: int, slot: int, expert: int, digest: int) -> None: ...

    def borrow(self, layer: int, slot: int, expert: int, digest: int, data: Bytes) -> None: ...

    def settle(self) -> None: ...


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

    def copies(self, layer: int, expert: int) -> Iterable[Fetch | Loan]:
        """Every copy that this source could read, the best first. LOCAL."""


class PeerSource:
    """Live replicas on other ranks of this host, read out of their memory.

    Only slots that keep their expert under the new placement are read, so that nobody reads what its owner overwrites.
    Should it happen nevertheless (the owner is an epoch ahead), the digest tells."""

    name = "peer"

    def __init__(self, me: Member, open_bank: Callable[[str], Reader] = PeerBank.open) -> None:
        self._me = me
        self._open = open_bank
        self._agreed: Agreed | None = None
        self._readers: dict[Member, Reader] = {}
        self._where: dict[int, Member] = {}

    def adopt(self, agreed: Agreed) -> None:
        self._agreed = agreed
        placement = agreed.placement
        leaving = [m.rank for m in agreed.leaving]  # they change nothing any more
        stays = np.isin(np.arange(agreed.held_LP.shape[1]) // placement.slots_per_rank, leaving)
        self._kept_LP = ((agreed.held_LP == placement.slots_LP) | stays) & (agreed.held_LP >= 0)
        self._where = {m.rank: m for m in (*agreed.leaving, *agreed.view.members)}
        for member in [m for m in self._readers if m not in self._where.values()]:
            self._readers.pop(member).close()

    def copies(self, layer: int, expert: int) -> Iterator[Fetch]:
        assert self._agreed is not None, "copies of what? Nothing is agreed yet"
        width, mine = self._agreed.placement.slots_per_rank, self._me.rank
        slots = np.flatnonzero(self._kept_LP[layer] & (self._agreed.held_LP[layer] == expert)).tolist()
        turn = mine % max(1, len(slots))  # each rank starts at another replica, so that not all read from one
        for slot in slots[turn:] + slots[:turn]:
            member = self._where.get(slot // width)
            if member is not None and member != self._me and member.host == self._me.host:
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


class Shelf(Protocol):
    """Experts in this host's memory, in slot layout, `elastic.vault.memory.Vault` in a service."""

    def expert(self, layer: int, expert: int) -> tuple[Bytes, int] | None: ...


class VaultSource:
    """The vault of this host: its bytes are lent, not copied, and outlive the process that fills it."""

    name = "vault"

    def __init__(self, vault: Shelf) -> None:
        self._vault = vault

    def adopt(self, agreed: Agreed) -> None:
        pass

    def copies(self, layer: int, expert: int) -> Iterator[Loan]:
        entry = self._vault.expert(layer, expert)
        if entry is not None:
            yield Loan(*entry)


class ExpertReader(Protocol):
    """A checkpoint's experts in slot layout, `model.loader.Checkpoint` in a service."""

    def read_expert(self, layer: int, expert: int, out: Bytes, dtype: Any) -> None: ...


class DiskSource:
    """The checkpoint: slow, but it has every expert."""

    name = "disk"

    def __init__(self, checkpoint: ExpertReader, dtype: Any, *, first_load_only: bool = False) -> None:
        """first_load_only: read only experts that nobody has ever held, so that no recovery reads from disk."""
        self._checkpoint, self._dtype, self._first_only = checkpoint, dtype, first_load_only
        self._agreed: Agreed | None = None

    def adopt(self, agreed: Agreed) -> None:
        self._agreed = agreed

    def copies(self, layer: int, expert: int) -> tuple[Fetch, ...]:
        if self._first_only and self._agreed is not None and self._agreed.digest_LE[layer, expert]:
            return ()
        return (lambda out: self._checkpoint.read_expert(layer, expert, out, self._dtype),)


class Restore:
    """The filling of one rank's slots, which can be done in pieces and cut off anywhere."""

    def __init__(
        self,
        moves: Sequence[Move],
        agreed: Agreed,
        bank: Bank,
        sources: Sequence[Source | Remote],
        *,
        clock: Clock | None = None,
        progress: Callable[[int, int], None] | None = None,
        faults: Faults = NO_FAULTS,
        threads: int = 1,
    ) -> None:
        """progress: called with (done, total) after each expert. sources: the fastest first, other hosts at most once
        among them. threads: how many digest what is lent, while `advance` runs; 1: the caller's own alone."""
        self._clock = clock or MonotonicClock()
        self._agreed, self._bank = agreed, bank
        self._progress, self._faults = progress, faults
        self._total, self._done, self._begun = len(moves), 0, False
        self._digests = Digests(threads)
        self._due = deque(moves)
        self._awaited: dict[Want, Move] = {}
        at = next((i for i, source in enumerate(sources) if isinstance(source, Remote)), len(sources))
        self._before = [source for source in sources[:at] if not isinstance(source, Remote)]
        self._remote = next((source for source in sources if isinstance(source, Remote)), None)
        self._after = [source for source in sources[at:] if not isinstance(source, Remote)]
        self.lost: list[tuple[int, int]] = []
        """(layer, expert) that no source could give."""
        self.learned = 0
        """How many digests this restore was the first to know."""
        self.bytes_by_source: dict[str, int] = {}
        self.seconds_by_source: dict[str, float] = {}
        """How long the restore waited for that, the check of the digest included. What comes from several hosts at
        once adds up."""
        self._trouble: dict[tuple[int, int], str] = {}
        """What the last source said that failed, by (layer, expert)."""
        self._lender = ""
        """The source that lent last: what is lent may still be on its way to a device."""
        for source in sources:
            source.adopt(agreed)

    @property
    def remaining(self) -> int:
        return self._total - self._done

    def advance(self, goes_on: Callable[[], bool], wait_s: float = ARRIVAL_WAIT_S) -> None:
        """Restore expert by expert until all are done, or until `goes_on()`, asked before each, is false. LOCAL.

        With wait_s 0 it also returns when all that is left is still under way from other hosts."""
        with self._digests:
            while self.remaining and goes_on():
                if not self._begun:
                    self._begin()
                if self._due:
                    self._look_ahead()
                    self._restore_here(self._due.popleft())
                elif self._remote is not None and (arrival := self._remote.poll(wait_s)) is not None:
                    self._take_in(arrival)
                elif wait_s == 0:
                    return

    def settle(self) -> None:
        """Wait until what was restored so far stands where it is computed from. LOCAL."""
        began = self._clock.now()
        self._bank.settle()
        if self._lender:
            self._count(self._lender, 0, self._clock.now() - began)

    def _begin(self) -> None:
        """Ask other hosts for all that nobody on this one has."""
        self._begun = True
        if self._remote is not None:
            absent = [move for move in self._due if not self._is_here(move)]
            self._due = deque(move for move in self._due if move not in set(absent))
            self._ask(absent)

    def _is_here(self, move: Move) -> bool:
        return any(True for source in self._before for _ in source.copies(move.layer, move.expert))

    def _ask(self, moves: Sequence[Move]) -> None:
        assert self._remote is not None
        wants: list[Want] = []
        for move in moves:
            layer, slot, expert = move
            self._bank.clear(layer, slot)
            wanted = int(self._agreed.digest_LE[layer, expert])
            out, file = self._bank.slot_bytes(layer, slot), self._bank.slot_file(layer, slot)
            wants.append(Want(layer, expert, out, wanted, file))
            self._awaited[wants[-1]] = move
        if wants:
            self._remote.begin(wants)

    def _look_ahead(self) -> None:
        """Have what will be lent next digested while this thread is at other things."""
        for move in islice(self._due, self._digests.room):
            if move not in self._digests:
                copies = (copy for source in self._before for copy in source.copies(move.layer, move.expert))
                if isinstance(best := next(copies, None), Loan):
                    self._digests.begin(move, best.data)

    def _restore_here(self, move: Move) -> None:
        self._faults.point("restore")
        if self._fill(move, self._before):
            self._finish(move, filled=True)
        elif self._remote is not None:
            self._ask([move])
        else:
            self._finish(move, self._fill(move, self._after))

    def _take_in(self, arrival: Arrival) -> None:
        self._faults.point("restore")
        want = arrival.want
        move = self._awaited.pop(want)
        if arrival.source:
            self._bank.mark(move.layer, move.slot, move.expert, arrival.digest)
            self.learned += want.wanted == 0
            self._count(arrival.source, want.out.nbytes, arrival.seconds)
        self._finish(move, bool(arrival.source) or self._fill(move, self._after))

    def _finish(self, move: Move, filled: bool) -> None:
        self._digests.drop(move)  # another copy may have been taken than the one that was digested
        if not filled:
            if not self.lost:  # one says what is wrong: all may be lost
                why = self._trouble.get((move.layer, move.expert), "no source has a copy")
                log.warning("layer %d expert %d cannot be had from anywhere: %s", move.layer, move.expert, why)
            self.lost.append((move.layer, move.expert))
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _count(self, source: str, size: int, seconds: float) -> None:
        self.bytes_by_source[source] = self.bytes_by_source.get(source, 0) + size
        self.seconds_by_source[source] = self.seconds_by_source.get(source, 0.0) + seconds

    def _fill(self, move: Move, sources: Sequence[Source]) -> bool:
        layer, slot, expert = move
        self._bank.clear(layer, slot)
        for source in sources:
            for copy in source.copies(layer, expert):
                began = self._clock.now()
                try:
                    size = self._take(move, copy)
                except TROUBLE as error:
                    log.info("layer %d expert %d cannot be had from %s: %s", layer, expert, source.name, error)
                    self._trouble[layer, expert] = f"{source.name}: {error}"
                    continue
                if size:
                    self._lender = source.name if isinstance(copy, Loan) else self._lender
                    self._count(source.name, size, self._clock.now() - began)
                    return True
                log.warning("layer %d expert %d: the copy from %s is damaged", layer, expert, source.name)
        return False

    def _take(self, move: Move, copy: Fetch | Loan) -> int:
        """Fill a slot with one copy; its bytes, 0 when they are not those of the expert."""
        layer, slot, expert = move
        wanted = int(self._agreed.digest_LE[layer, expert])
        if isinstance(copy, Loan):
            data = copy.data
            found = self._digests.digest(move, data)
            if found != copy.digest or wanted not in (0, found):
                return 0
            self._bank.borrow(layer, slot, expert, found, data)
        else:
            data = self._bank.slot_bytes(layer, slot)
            copy(data)
            found = digest(data.data)
            if wanted not in (0, found):
                return 0
            self._bank.mark(layer, slot, expert, found)
        self.learned += wanted == 0
        return data.nbytes
