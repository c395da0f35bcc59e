"""Experts from other hosts: from their vaults, and from live replicas on their ranks.

    remote.begin(wants)            all that nobody on this host has, at once; returns at once
    arrival = remote.poll(0.01)    one that came, or that cannot be had from there

A thread for each host reads batches from it, all hosts at the same time, and checks every expert by its digest. What
does not come in time, comes short, or is damaged is asked of the next host that has it, or of the same one by another
transport; a host that failed is asked nothing more for a while. So each want ends, after at most as many time-outs as
it has copies, and none of it in the thread that serves.

The buffers are slots. When something else is to become of them (`adopt`), the gate is shut: from then on nothing that
is still under way writes anywhere, and nobody waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from phalanx.elastic.agree import Agreed
from phalanx.elastic.store import Store
from phalanx.elastic.vault.memory import FILLED, VaultShape
from phalanx.elastic.vault.shares import hosts_of
from phalanx.elastic.vault.transport import Bytes, Gate, Piece, Stall, Transport, shape_of, stall_key
from phalanx.errors import PhalanxError
from phalanx.moe.experts import RunningDigest, SlotLayout
from phalanx.pages import FilePart, bring_within_reach
from phalanx.world import Member

log = logging.getLogger("phalanx.elastic")

VAULT, PEER = "vault_remote", "peer_remote"
"""Under these names bytes from other hosts are counted."""

BATCH_BYTES = 32 << 20
SLOWEST_BYTES_PER_S = 16 << 20
"""A host that gives less than this, beyond the patience that it is met with, counts as failed."""

AVOID_S = 10.0
"""How long a host that failed is asked nothing."""


@dataclass(frozen=True, eq=False)
class Want:
    """An expert and where it goes: uint8 [expert_bytes], and the file of which that is a mapping, None: it is none.
    wanted: the digest that all agree on, 0 when nobody knows."""

    layer: int
    expert: int
    out: Bytes
    wanted: int
    file: FilePart | None = None


@dataclass(frozen=True, eq=False)
class Arrival:
    """How a want ended. source: under which name its bytes count, "" when no other host could give them. seconds: what
    that took of the time of the thread that reads from that host."""

    want: Want
    source: str = ""
    digest: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Copy:
    """One way to one copy: which host, by which transport; of its vault, or of a slot of the rank at `slots`."""

    node_rank: int
    transport: Transport
    slots: str = ""
    slot: int = -1

    @property
    def way(self) -> tuple[int, str, str]:
        return self.node_rank, self.transport.name, self.slots


class Remote:
    """What this process reads from other hosts. All methods are for one thread, the one that owns `store`."""

    def __init__(
        self, me: Member, node_rank: int, nnodes: int, store: Store, transports: Sequence[Transport], patience_s: float
    ) -> None:
        """me: whose slots are filled; only its host and rank matter. transports: the fastest first. patience_s: how
        long a host may be silent."""
        self._me, self._nodes, self._store = me, [n for n in range(nnodes) if n != node_rank], store
        self._nnodes, self._transports, self._patience_s = nnodes, tuple(transports), patience_s
        self._agreed: Agreed | None = None
        self._run: _Run | None = None
        self._avoid: dict[tuple[int, str, str], tuple[str, float]] = {}

    def adopt(self, agreed: Agreed) -> None:
        """What is agreed from now on. What was under way is given up: nothing of it writes any more. LOCAL."""
        self.stop()
        self._agreed = agreed

    def stop(self) -> None:
        """Give up what is under way. LOCAL."""
        if self._run is not None:
            self._run.gate.shut()
            self._run = None

    def begin(self, wants: Sequence[Want]) -> None:
        """Have these read, beside what is being read already. Raises StoreLost. LOCAL: a look at the store for each
        other host."""
        if self._run is None:
            stalls = {n: stall for n in self._nodes if (stall := self._look_up(n)) is not None}
            self._run = _Run(stalls, self._patience_s, self._avoid)
        for want in wants:
            self._run.take(want, list(self._copies(want, self._run.stalls)))

    def poll(self, wait_s: float) -> Arrival | None:
        """One want that has ended, as soon as there is one. LOCAL."""
        if self._run is None:
            return None
        try:
            return self._run.ended.get(timeout=wait_s) if wait_s > 0 else self._run.ended.get_nowait()
        except queue.Empty:
            return None

    def _look_up(self, node_rank: int) -> Stall | None:
        value = self._store.get(stall_key(node_rank))
        if not value:
            return None
        try:
            stall = msgspec.msgpack.decode(value, type=Stall)
        except msgspec.DecodeError as error:
            log.warning("host %d serves its memory in a way that this version does not know: %s", node_rank, error)
            return None
        for transport in self._transports:
            transport.register(stall)
        return stall

    def _copies(self, want: Want, stalls: Mapping[int, Stall]) -> Iterator[_Copy]:
        """Every way to this expert, the best first: vaults of hosts that live, ranks' slots, other vaults."""
        alive = {m.host for m in self._agreed.view.members} if self._agreed is not None else set()
        holders = [n for n in stalls if self._may_have(stalls[n], want)]
        turn = (self._me.rank + want.expert) % max(1, len(holders))  # so that not all read from one
        holders = holders[turn:] + holders[:turn]
        late = [n for n in holders if alive and stalls[n].host not in alive]
        for node_rank in [n for n in holders if n not in late]:
            yield from self._ways(node_rank)
        if want.wanted:
            yield from self._slots(want, stalls)
        for node_rank in late:
            yield from self._ways(node_rank)

    def _may_have(self, stall: Stall, want: Want) -> bool:
        shape = shape_of(stall)
        if shape is None or shape.expert_bytes != want.out.nbytes or want.layer >= shape.num_layers:
            return False
        share = shape.share
        return stall.node_rank in hosts_of(want.layer, want.expert, shape.num_experts, share.nnodes, share.copies)

    def _ways(self, node_rank: int) -> Iterator[_Copy]:
        return (_Copy(node_rank, t) for t in self._transports if t.serves(node_rank, ""))

    def _slots(self, want: Want, stalls: Mapping[int, Stall]) -> Iterator[_Copy]:
        """Slots of ranks of other hosts that keep this expert under the new placement."""
        if self._agreed is None:
            return
        placement, view = self._agreed.placement, self._agreed.view
        row = placement.slots_LP[want.layer]
        kept = (row == want.expert) & (self._agreed.held_LP[want.layer] == row)
        nodes = {stall.host: n for n, stall in stalls.items()}
        for slot in np.flatnonzero(kept).tolist():
            rank, local = divmod(slot, placement.slots_per_rank)
            member = view.member(rank)
            if member is None or member.host == self._me.host or member.host not in nodes:
                continue
            for transport in self._transports:
                if transport.serves(nodes[member.host], member.weights_address):
                    yield _Copy(nodes[member.host], transport, member.weights_address, local)


class _Run:
    """All that is under way between two `adopt`s: a queue and, while it is not empty, a thread for each way."""

    def __init__(
        self, stalls: Mapping[int, Stall], patience_s: float, avoid: dict[tuple[int, str, str], tuple[str, float]]
    ) -> None:
        self.stalls, self.gate = stalls, Gate()
        self.ended: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._patience_s, self._avoid = patience_s, avoid
        self._lock = threading.Lock()
        self._due: dict[tuple[int, str, str], deque[tuple[Want, list[_Copy]]]] = {}

    def take(self, want: Want, copies: list[_Copy]) -> None:
        """Have a want read from the first of these that is not known to fail."""
        if self.gate.is_shut:
            return
        while copies and self._is_avoided(copies[0]):
            copies = copies[1:]
        if not copies:
            self.ended.put(Arrival(want))
            return
        with self._lock:
            due = self._due.get(copies[0].way)
            if due is not None:
                due.append((want, copies))
                return
            self._due[copies[0].way] = deque([(want, copies)])
        threading.Thread(target=self._read_all, args=(copies[0],), name="remote", daemon=True).start()

    def _is_avoided(self, copy: _Copy) -> bool:
        life, until = self._avoid.get(copy.way, ("", 0.0))
        return life == self.stalls[copy.node_rank].life and time.monotonic() < until

    def _read_all(self, first: _Copy) -> None:
        """The thread of one way, until nothing is due; then it has what came mapped, for which nobody waits."""
        shelf: _Shelf | None = None
        unmapped: list[Bytes] = []
        while True:
            with self._lock:
                batch = self._next_batch(self._due[first.way])
                if not batch:
                    del self._due[first.way]
            if not batch:
                self._map(unmapped)
                return
            done: set[int] = set()
            try:
                if shelf is None:
                    shelf = _shelf_of(first, self.stalls[first.node_rank], self._patience_s)
                self._read(first, shelf, batch, done)
            except PhalanxError as error:
                log.info("nothing can be had from host %d by %s: %s", first.node_rank, first.transport.name, error)
                self._avoid[first.way] = self.stalls[first.node_rank].life, time.monotonic() + AVOID_S
            except Exception:
                log.exception("reading from host %d by %s", first.node_rank, first.transport.name)
                self._avoid[first.way] = self.stalls[first.node_rank].life, time.monotonic() + AVOID_S
            unmapped += [batch[number][0].out for number in done if batch[number][0].file is not None]
            for number, (want, copies) in enumerate(batch):
                if number not in done:
                    self.take(want, copies[1:])
            if self.gate.is_shut:
                return

    def _map(self, outs: list[Bytes]) -> None:
        """Whoever uses these bytes next meets no page faults."""
        for out in outs:
            with self.gate.writing() as may:  # a slot that was cleared meanwhile must get no pages
                if not may:
                    return
                bring_within_reach(out)

    @staticmethod
    def _next_batch(due: deque[tuple[Want, list[_Copy]]]) -> list[tuple[Want, list[_Copy]]]:
        batch: list[tuple[Want, list[_Copy]]] = []
        size = 0
        while due and (not batch or size + due[0][0].out.nbytes <= BATCH_BYTES):
            batch.append(due.popleft())
            size += batch[-1][0].out.nbytes
        return batch

    def _read(self, first: _Copy, shelf: _Shelf, batch: list[tuple[Want, list[_Copy]]], done: set[int]) -> None:
        """Read one batch; `done`: the numbers of those that ended well. Raises when the host fails."""
        there = [(n, want, start, named) for n, (want, copies) in enumerate(batch)
                 if (entry := shelf.find(want, copies[0])) is not None for start, named in [entry]]  # fmt: skip
        began, came = time.monotonic(), 0
        digests = [RunningDigest() for _ in there]

        def arrived(i: int) -> None:
            nonlocal began, came
            number, want, _, named = there[i]
            came += 1
            found = digests[i].value
            if named in (0, found) and want.wanted in (0, found):
                done.add(number)
                self.ended.put(Arrival(want, PEER if first.slots else VAULT, found, time.monotonic() - began))
            else:
                log.warning(
                    "layer %d expert %d: the copy on host %d is damaged", want.layer, want.expert, first.node_rank
                )
            began = time.monotonic()

        pieces = [Piece(start, want.out, digests[i].add, want.file) for i, (_, want, start, _) in enumerate(there)]
        timeout_s = self._patience_s + sum(piece.out.nbytes for piece in pieces) / SLOWEST_BYTES_PER_S
        if pieces:
            first.transport.read(first.node_rank, pieces, timeout_s, arrived, self.gate, first.slots)
        if came < len(pieces) and not self.gate.is_shut:
            raise HostFails(f"{len(pieces) - came} of {len(pieces)} experts did not come within {timeout_s:.1f} s")


class HostFails(PhalanxError):
    """A host does not give what it should have."""


class _Shelf:
    """What a host said is there: index_LE2, uint64 [L, E, 2] of its vault, or borrowed_LS, uint8 [L, S] of a rank."""

    def __init__(
        self, vault: tuple[VaultShape, npt.NDArray[np.uint64]] | None, slots: tuple[SlotLayout, Bytes] | None
    ) -> None:
        self._vault, self._slots = vault, slots

    def find(self, want: Want, copy: _Copy) -> tuple[int, int] | None:
        """(where an expert begins, the digest it should have, 0: not said); None when it is not there. LOCAL."""
        if self._vault is not None:
            shape, index_LE2 = self._vault
            state, named = index_LE2[want.layer, want.expert].tolist()
            return (shape.expert_start(want.layer, want.expert), named) if state == FILLED else None
        assert self._slots is not None
        layout, borrowed_LS = self._slots
        if borrowed_LS[want.layer, copy.slot] or layout.expert_bytes != want.out.nbytes:
            return None
        return layout.slot_start(want.layer, copy.slot), 0


def _shelf_of(copy: _Copy, stall: Stall, timeout_s: float) -> _Shelf:
    """Ask a host what is there. Raises HostFails."""
    if copy.slots:
        layout = SlotLayout.at(copy.slots)
        data = _read_small(copy, layout.borrowed_start, layout.borrowed_bytes, timeout_s)
        return _Shelf(None, (layout, data.reshape(layout.num_layers, layout.slots_per_rank)))
    shape = shape_of(stall)
    assert shape is not None
    data = _read_small(copy, shape.index_start, shape.index_bytes, timeout_s)
    return _Shelf((shape, data.view(np.uint64).reshape(shape.num_layers, shape.num_experts, 2)), None)


def _read_small(copy: _Copy, start: int, size: int, timeout_s: float) -> Bytes:
    out = np.empty(size, np.uint8)
    came: list[int] = []
    gate = Gate()
    copy.transport.read(copy.node_rank, [Piece(start, out)], timeout_s, came.append, gate, copy.slots)
    gate.shut()
    if not came:
        raise HostFails("it does not say what it has")
    return out
