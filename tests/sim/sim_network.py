"""The simulated outside of a rank: a store with preemption, a communicator, expert slots, a disk, a notice board.

`SimComm` obeys the contract of `comm.base`: the two masks, epochs, interrupts, rings, and patience.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sim_scheduler import Scheduler
from torch import Tensor

from phalanx.comm.base import Communicator, Dispatched, Status, empty_view
from phalanx.elastic.store import MemoryStore
from phalanx.errors import Evicted
from phalanx.world import Member, View

EXPERT_BYTES = 16


class SimStore(MemoryStore):
    """A store whose every operation is a point: before it, and after it before its answer arrives."""

    def __init__(self, sim: Scheduler) -> None:
        super().__init__(sim)
        self._sim = sim

    def get(self, key: str) -> bytes | None:
        self._sim.point()
        return super().get(key)

    def set(self, key: str, value: bytes) -> None:
        self._sim.point()
        super().set(key, value)
        self._sim.point()

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        self._sim.point()
        value = super().compare_set(key, expected, desired)
        self._sim.point()
        return value

    def coming(self, rank: int, incarnation: int) -> None:
        """What the launcher writes when it starts a newcomer: no task of the simulation does it."""
        super().set(f"coming/{rank}", str(incarnation).encode())

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        self._sim.pause(lambda: key in self._values, self._sim.now() + timeout_s)
        return super().get(key)


class SimNotices:
    """What the launcher announced: every incarnation up to so many is dead."""

    def __init__(self) -> None:
        self._dead: dict[int, tuple[int, str]] = {}

    def declare_dead(self, member: Member, cause: str) -> None:
        if self._dead.get(member.rank, (-1, ""))[0] < member.incarnation:
            self._dead[member.rank] = (member.incarnation, cause)

    def is_dead(self, member: Member) -> bool:
        return self._dead.get(member.rank, (-1, ""))[0] >= member.incarnation

    def cause(self, rank: int) -> str:
        return self._dead[rank][1]


class Wires:
    """What all communicators and banks share: messages in flight, rings and interrupts, memory that peers can map."""

    def __init__(self, sim: Scheduler, notices: SimNotices) -> None:
        self.sim, self.notices = sim, notices
        self.messages: dict[tuple[int, int, Member, Member], Any] = {}
        self.roll_call: dict[Member, int] = {}
        self.rung: dict[Member, tuple[int, int]] = {}
        """(epoch, number of the collective it is about to run), by member."""
        self.banks: dict[str, SimBank] = {}

    def forget_before(self, epoch: int) -> None:
        """Nobody can take a message that is several epochs old."""
        for key in [k for k in self.messages if k[0] < epoch]:
            del self.messages[key]


MAP_S = 0.005
"""How long mapping a newcomer takes beside the steps: a few steps."""


class SimComm(Communicator):
    """A communicator whose wires are a dictionary. Collectives are numbered within an epoch."""

    def __init__(self, wires: Wires, me: Member, ep_size: int, peer_timeout_s: float) -> None:
        self.rank, self.ep_size, self.me = me.rank, ep_size, me
        self._wires, self._sim, self._timeout_s = wires, wires.sim, peer_timeout_s
        self._view = empty_view(ep_size)
        self._number = 0
        self._lost: dict[int, tuple[str, float]] = {}
        self._roll_call = 0
        self.map_s = MAP_S
        self._mapped_s: dict[Member, float] = {}
        self.mapped_in_adopt: list[tuple[int, Member]] = []
        """(epoch, member) of each that nobody had expected in time, so that the view's adoption had to map it."""

    @property
    def address(self) -> str:
        return f"sim:{self.me}"

    @property
    def failed(self) -> bool:
        return bool(self._lost or self._roll_call)

    def adopt(self, view: View) -> None:
        assert view.epoch > self._view.epoch, f"epochs grow: {self._view.epoch} -> {view.epoch}"
        if self.me not in view:
            raise Evicted(self.me.rank, self.me.incarnation, view.epoch)
        self._sim.point()
        now = self._sim.now()
        late = [m for m in view.members if m != self.me and self._mapped_s.get(m, now + 1) > now]
        self.mapped_in_adopt += [(view.epoch, member) for member in late]
        self._mapped_s = dict.fromkeys(view.members, now)
        self._view, self._number, self._lost = view, 0, {}
        if self._roll_call <= view.epoch:
            self._roll_call = 0
        self._wires.roll_call[self.me] = max(self._wires.roll_call.get(self.me, 0), view.epoch)
        self._wires.forget_before(view.epoch - 3)
        self._look()

    def expect(self, view: View) -> bool:
        for member in view.members:
            self._mapped_s.setdefault(member, self._sim.now() + self.map_s)
        return all(self._mapped_s[member] <= self._sim.now() for member in view.members)

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor) -> Dispatched:
        width = self._slots_per_rank
        slots = slots_TK.tolist()
        wanted: dict[int, list[tuple[int, int, int]]] = {m.rank: [] for m in self._view.members}
        for t, row in enumerate(slots):
            for k, slot in enumerate(row):
                if slot >= 0 and slot // width in wanted:
                    wanted[slot // width].append((t, k, slot % width))
        received = self._exchange({rank: [(x_TD[t], s) for t, _, s in wanted[rank]] for rank in wanted})
        rows = [(rank, x, s) for rank in sorted(received) for x, s in received[rank]]
        x_ND = torch.stack([x for _, x, _ in rows]) if rows else x_TD[:0]
        slot_M = torch.tensor([s for _, _, s in rows], dtype=torch.int64)
        counts = {rank: len(received[rank]) for rank in sorted(received)}
        return Dispatched(x_ND, torch.arange(len(rows)), slot_M, (counts, wanted, slots_TK.shape))

    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        counts, wanted, (tokens, k_all) = dispatched.handle
        outgoing: dict[int, list[Tensor]] = {m.rank: [] for m in self._view.members}
        at = 0
        for rank, count in counts.items():
            outgoing[rank] = list(y_MD[at : at + count])
            at += count
        received = self._exchange(outgoing)
        out = torch.zeros((tokens, k_all, y_MD.shape[1]), dtype=y_MD.dtype)
        for rank, pairs in wanted.items():
            for (t, k, _), y in zip(pairs, received.get(rank, []), strict=False):
                out[t, k] = y
        return out

    def all_gather(self, row: Tensor) -> Tensor:
        assert row.dtype == torch.int64
        assert row.numel() <= 64
        received = self._exchange({m.rank: row.clone() for m in self._view.members})
        out = torch.zeros((self.ep_size, row.numel()), dtype=torch.int64)
        for rank, theirs in received.items():
            out[rank] = theirs
        return out

    def barrier(self) -> None:
        self._exchange({m.rank: None for m in self._view.members})

    def query_mask(self) -> Tensor:
        mask = torch.zeros(self.ep_size, dtype=torch.uint8)
        mask[[m.rank for m in self._view.members if m.rank not in self._lost]] = 1
        return mask

    def update_mask(self, rank: int, alive: bool) -> None:
        if alive:
            self._lost.pop(rank, None)
        else:
            self._lost.setdefault(rank, ("operator", 0.0))

    def status(self) -> Status:
        return Status(
            frozenset(self._lost),
            self._roll_call,
            tuple((rank, cause) for rank, (cause, _) in sorted(self._lost.items())),
            tuple((rank, seconds) for rank, (_, seconds) in sorted(self._lost.items())),
        )

    def interrupt(self, epoch: int) -> None:
        if epoch > self._view.epoch:
            self._sim.point()
            self._roll_call = max(self._roll_call, epoch)
            self._wires.roll_call[self.me] = max(self._wires.roll_call.get(self.me, 0), epoch)
            self._sim.point()

    def ring(self) -> None:
        self._wires.rung[self.me] = (self._view.epoch, self._number + 1)
        self._sim.point()

    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        return self.sleep_until(timeout_s, lambda: False)

    def sleep_until(self, timeout_s: float, mail: Callable[[], bool]) -> bool:
        """`sleep` with a function in place of file descriptors."""
        self._sim.pause(lambda: mail() or self._is_rung() or self._is_troubled(), self._sim.now() + timeout_s)
        self._look()
        return self._is_rung() or self.failed

    @contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        before, self._timeout_s = self._timeout_s, timeout_s
        try:
            yield
        finally:
            self._timeout_s = before

    def close(self) -> None:
        pass

    def sized(self, slots_per_rank: int) -> SimComm:
        self._slots_per_rank = slots_per_rank
        return self

    # --- parts

    def _exchange(self, payloads: dict[int, Any]) -> dict[int, Any]:
        """Give each live rank its payload, and take theirs, by rank. Points in between: a rank can die half-way."""
        self._look()
        if self.failed:
            return {}
        self._number += 1
        epoch, number, messages = self._view.epoch, self._number, self._wires.messages
        for member in self._live():
            self._sim.point()
            messages[epoch, number, self.me, member] = payloads.get(member.rank, [])
        self._sim.point()
        began = self._sim.now()
        end = began + self._timeout_s
        while True:
            absent = [m for m in self._live() if (epoch, number, m, self.me) not in messages]
            if not absent or self.failed:
                break
            if self._sim.now() >= end:
                self._lost.update({m.rank: ("timeout", self._sim.now() - began) for m in absent})
                break
            self._sim.pause(
                lambda absent=absent: (
                    all((epoch, number, m, self.me) in messages for m in absent) or self._is_troubled()
                ),
                end,
            )
            self._look()
        if self.failed:
            return {}
        return {m.rank: messages[epoch, number, m, self.me] for m in self._live()} | {self.rank: payloads[self.rank]}

    def _live(self) -> list[Member]:
        return [m for m in self._view.members if m.rank not in self._lost and m != self.me]

    def _is_rung(self) -> bool:
        mine = (self._view.epoch, self._number)
        return any(self._wires.rung.get(m, (0, 0)) > mine and self._wires.rung[m][0] == mine[0] for m in self._live())

    def _is_troubled(self) -> bool:
        return any(
            self._wires.notices.is_dead(m) or self._wires.roll_call.get(m, 0) > self._view.epoch for m in self._live()
        )

    def _look(self) -> None:
        """Take in notices of death and peers' open roll calls."""
        for member in self._live():
            if self._wires.notices.is_dead(member):
                self._lost[member.rank] = ("notice", 0.0)
            opened = self._wires.roll_call.get(member, 0)
            if opened > self._view.epoch:
                self._roll_call = max(self._roll_call, opened)


def true_bytes(layer: int, expert: int) -> npt.NDArray[np.uint8]:
    """What the checkpoint has for an expert."""
    return np.frombuffer(np.random.default_rng((layer, expert)).bytes(EXPERT_BYTES), np.uint8)


class SimBank:
    """Expert slots; peers read them for as long as they have them mapped, also after their owner's death."""

    def __init__(
        self,
        sim: Scheduler,
        num_layers: int,
        slots_per_rank: int,
        promised: Callable[[], bool] = lambda: False,
    ) -> None:
        """promised: whether others count on what is held, so that no slot may change."""
        self._sim, self._promised = sim, promised
        self._held_LS = np.full((num_layers, slots_per_rank), -1, np.int32)
        self._digest_LS = np.zeros((num_layers, slots_per_rank), np.uint64)
        self._bytes = np.zeros((num_layers, slots_per_rank, EXPERT_BYTES), np.uint8)

    @property
    def held_LS(self) -> npt.NDArray[np.int32]:
        return self._held_LS.copy()

    @property
    def digest_LS(self) -> npt.NDArray[np.uint64]:
        return self._digest_LS.copy()

    def slot_bytes(self, layer: int, slot: int) -> npt.NDArray[np.uint8]:
        return self._bytes[layer, slot]

    def clear(self, layer: int, slot: int) -> None:
        assert not self._promised(), "a slot is cleared while a World is agreed on that counts on it"
        self._sim.point()
        self._held_LS[layer, slot], self._digest_LS[layer, slot] = -1, 0
        self._bytes[layer, slot] = 0

    def mark(self, layer: int, slot: int, expert: int, digest: int) -> None:
        assert not self._promised(), "a slot is filled while a World is agreed on that counts on it"
        self._sim.point()
        self._held_LS[layer, slot], self._digest_LS[layer, slot] = expert, digest

    def settle(self) -> None:
        self._sim.point()


class SimPeer:
    """A peer's slots over a mapping that now and then returns something else than what stands there."""

    def __init__(self, sim: Scheduler, bank: SimBank, garbage: float) -> None:
        self._sim, self._bank, self._garbage = sim, bank, garbage

    def slot_bytes(self, layer: int, slot: int) -> npt.NDArray[np.uint8]:
        self._sim.point()
        stored = self._bank.slot_bytes(layer, slot)
        return stored ^ np.uint8(1) if self._sim.rng.random() < self._garbage else stored

    def close(self) -> None:
        pass


class SimDisk:
    """A checkpoint that takes its time, is written into the slot in two pieces, and may lack experts."""

    def __init__(self, sim: Scheduler, read_s: float) -> None:
        self._sim, self._read_s = sim, read_s
        self.missing: set[tuple[int, int]] = set()
        """(layer, expert) that cannot be read at present."""

    def read_expert(self, layer: int, expert: int, out: npt.NDArray[np.uint8], dtype: Any) -> None:
        if (layer, expert) in self.missing:
            raise OSError("the disk does not answer")
        content = true_bytes(layer, expert)
        out[: EXPERT_BYTES // 2] = content[: EXPERT_BYTES // 2]
        self._sim.sleep(self._read_s * self._sim.rng.random())
        out[EXPERT_BYTES // 2 :] = content[EXPERT_BYTES // 2 :]
