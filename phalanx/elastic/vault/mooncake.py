"""Other hosts' vaults by Mooncake's Transfer Engine: RDMA where there are devices, TCP elsewhere.

The engine is a native library that we neither see into nor can stop, so it gets nothing to break: it writes only into
bounce buffers of its own, never into a slot, and every call runs in a thread that is left behind when its time is over.
The engine and the buffer of such a call are never used again, and both stay for as long as the call may write.

What is known of its version 0.3.13: a batch of 3000 entries fails (2048 work), and entries below 1 MiB are slow; a peer
that is killed is an error within milliseconds, one that is stopped only after 30 s; a peer that comes back on the same
address is not recognised unless the cache of segments is off.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from phalanx.elastic.vault.transport import CHUNK_BYTES, Arrived, Bytes, Gate, Piece, Stall
from phalanx.errors import PhalanxError

log = logging.getLogger("phalanx.vault")

BOUNCE_BYTES = 32 << 20
"""What a call brings at most; a piece that is larger goes by another transport."""

MAX_ENTRIES = 2048
ENTRY_GAP = 64 << 10
"""Pieces that lie no farther apart are read as one entry, with what is between them."""

MAX_ABANDONED = 3
"""Calls that may be left behind in a process before it uses this engine no more: each keeps a buffer."""


class EngineTrouble(PhalanxError):
    """The Transfer Engine is not there, or refuses."""


def _engine(host: str, protocol: str, devices: str) -> Any:
    os.environ.setdefault("MC_DISABLE_METACACHE", "1")  # or a peer that comes back on the same address stays unknown
    os.environ.setdefault("MC_LOG_LEVEL", "FATAL")  # it logs on standard error what its return codes say, too
    os.environ.setdefault("GLOG_minloglevel", "3")
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise EngineTrouble(f"the Transfer Engine cannot be loaded: {error}") from error
    engine = TransferEngine()
    code = engine.initialize(host, "P2PHANDSHAKE", protocol, devices)
    if code != 0:
        raise EngineTrouble(f"the Transfer Engine does not start on {host} by {protocol} (code {code})")
    return engine


class Segment:
    """Memory that other hosts may read, for as long as this object lives."""

    def __init__(self, host: str, protocol: str, devices: str, memory: Bytes) -> None:
        """memory: writable pages. Raises EngineTrouble. LOCAL."""
        self._memory = memory
        self._engine = _engine(host, protocol, devices)
        self.base = int(memory.ctypes.data)
        """Where it begins, as others name it."""
        code = self._engine.register_memory(self.base, memory.nbytes)
        if code != 0:
            raise EngineTrouble(f"the Transfer Engine cannot register {memory.nbytes} bytes (code {code})")
        self.name = f"{host}:{self._engine.get_rpc_port()}"
        """What others call it."""


class MooncakeTransport:
    """Reads vaults whose hosts offer them by the Transfer Engine; ranks' slots it does not read."""

    name = "mooncake"

    def __init__(self, host: str, protocol: str, devices: str) -> None:
        """Starts nothing yet: an engine starts with the first read, and another one for each that runs beside it."""
        self._settings = host, protocol, devices
        self._stalls: dict[int, Stall] = {}
        self._idle: deque[_Hand] = deque()
        self._abandoned = 0

    def register(self, stall: Stall) -> None:
        self._stalls[stall.node_rank] = stall

    def serves(self, node_rank: int, slots: str) -> bool:
        stall = self._stalls.get(node_rank)
        return stall is not None and bool(stall.mooncake) and not slots and self._abandoned < MAX_ABANDONED

    def drop(self, node_rank: int) -> None:
        self._stalls.pop(node_rank, None)

    def read(
        self, node_rank: int, pieces: Sequence[Piece], timeout_s: float, arrived: Arrived, gate: Gate, slots: str = ""
    ) -> None:
        deadline = time.monotonic() + timeout_s
        stall = self._stalls.get(node_rank)
        if stall is None or not self.serves(node_rank, slots):
            return
        try:
            hand = self._idle.pop()
        except IndexError:
            hand = _Hand(self._settings)
        for batch in batches(pieces):
            outcome = False if gate.is_shut else hand.read(stall, batch, deadline)
            if outcome is None:
                self._abandoned += 1
                log.warning("a transfer from %s does not end: left behind (%d so far)", stall.host, self._abandoned)
                return
            if not outcome or not _hand_out(batch, pieces, hand.bounce, arrived, gate):
                break
        self._idle.append(hand)


def _hand_out(batch: list[Entry], pieces: Sequence[Piece], bounce: Bytes, arrived: Arrived, gate: Gate) -> bool:
    """Copy what came to where it is wanted; false when nobody wants it any more."""
    for number, at in (place for entry in batch for place in entry.pieces):
        piece = pieces[number]
        for first in range(0, piece.out.nbytes, CHUNK_BYTES):
            part = bounce[at + first : at + min(first + CHUNK_BYTES, piece.out.nbytes)]
            piece.grew(part)
            if not piece.put(first, part, gate):
                return False
        arrived(number)
    return True


class Entry:
    """A run of bytes of the peer that is read at once. pieces: (number, where it lies in the bounce buffer)."""

    def __init__(self, start: int, to: int) -> None:
        self.start, self.to, self.size = start, to, 0
        self.pieces: list[tuple[int, int]] = []


def batches(pieces: Sequence[Piece]) -> list[list[Entry]]:
    """Pieces as entries of calls, each of which fits the bounce buffer. Those that do not are left out. LOCAL, pure."""
    found: list[list[Entry]] = []
    room = 0
    for number in sorted(range(len(pieces)), key=lambda n: pieces[n].start):
        start, size = pieces[number].start, pieces[number].out.nbytes
        if size > BOUNCE_BYTES:
            continue
        last = found[-1][-1] if found else None
        gap = start - (last.start + last.size) if last is not None else -1
        if last is None or not 0 <= gap <= ENTRY_GAP or gap + size > room:
            if last is None or size > room or len(found[-1]) == MAX_ENTRIES:
                found.append([])
                room = BOUNCE_BYTES
            last, gap = Entry(start, BOUNCE_BYTES - room), 0
            found[-1].append(last)
        last.size += gap
        last.pieces.append((number, last.to + last.size))
        last.size += size
        room -= gap + size
    return found


class _Hand:
    """One engine with one bounce buffer, for one call at a time."""

    def __init__(self, settings: tuple[str, str, str]) -> None:
        self._settings = settings
        self._engine: Any = None
        self.bounce: Bytes = np.frombuffer(mmap.mmap(-1, BOUNCE_BYTES), np.uint8)

    def read(self, stall: Stall, batch: list[Entry], deadline: float) -> bool | None:
        """Whether the bytes came; None: nobody knows, and this object must not be used again."""
        base = int(self.bounce.ctypes.data)

        def call() -> int:
            if self._engine is None:
                engine = _engine(*self._settings)
                if engine.register_memory(base, BOUNCE_BYTES) != 0:
                    raise EngineTrouble(f"the Transfer Engine cannot register {BOUNCE_BYTES} bytes")
                self._engine = engine
            code: int = self._engine.batch_transfer_sync_read(
                stall.mooncake,
                [base + entry.to for entry in batch],
                [stall.base + entry.start for entry in batch],
                [entry.size for entry in batch],
            )
            return code

        return _within(call, deadline)


def _within(call: Callable[[], int], deadline: float) -> bool | None:
    """Whether `call` ended with 0; None when it has not ended by the deadline."""
    codes: list[int] = []
    ended = threading.Event()

    def run() -> None:
        try:
            codes.append(call())
        except Exception as error:
            log.warning("the Transfer Engine: %s", error)
            codes.append(-1)
        finally:
            ended.set()

    threading.Thread(target=run, name="mooncake-call", daemon=True).start()
    ended.wait(max(0.0, deadline - time.monotonic()))
    return codes == [0] if ended.is_set() else None
