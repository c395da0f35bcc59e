"""Reading another host's memory: the interface, and the engine that is always there, plain TCP.

    transport.register(stall)                      where a host's vault is served, as that host said in the store
    transport.read(host, pieces, ...)              a batch of ranges into buffers, within a time
    transport.drop(host)

What goes wrong is never an exception and never more than the time that was given: a piece of which `arrived` was not
told did not come, and nothing will write into its buffer any more. No torch here.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from phalanx import wire
from phalanx.elastic.vault.memory import VaultShape
from phalanx.elastic.vault.shares import Share
from phalanx.errors import PhalanxError
from phalanx.pages import FilePart

log = logging.getLogger("phalanx.elastic")

Bytes = npt.NDArray[np.uint8]

CONNECT_S = 2.0
"""How long another host may take to accept a connection and prove who it is."""

CHUNK_BYTES = 512 << 10
"""What is taken in at once: little enough to be in the cache when its digest is taken."""

_TICK_MS = 20
_LANE_BYTES = 4 << 20


class Stall(msgspec.Struct, frozen=True, array_like=True):
    """Where a host serves its memory to the others; what it leaves in the store under `stall_key`.

    node_rank: the host's number. host: its name, as its members say it. life: tells one serving process from the next.
    tcp: HOST:PORT. memory: the vault's token, "" when there is none (its ranks' slots are served nevertheless). shape:
    of the vault, see `shape_of`. mooncake: the name of its segment, "" for none; base: where the vault begins in it.
    """

    node_rank: int
    host: str
    life: str
    tcp: str
    memory: str = ""
    shape: tuple[int, ...] = ()
    mooncake: str = ""
    base: int = 0


class Greeting(msgspec.Struct, frozen=True, tag="vault"):
    """The hello of whoever comes to read. memory: the token of the vault that it means."""

    memory: str


class Request(msgspec.Struct, frozen=True, array_like=True):
    """What to send, in this order: (first byte, size) of each range, in the vault or, when `slots` is not empty, in
    the expert slots of a rank of that host that has them at this address."""

    ranges: list[tuple[int, int]]
    slots: str = ""


@dataclass(frozen=True, eq=False)
class Piece:
    """A range of another host's memory from byte `start` on, and where it goes: uint8 [size]. grew: told each part of
    the bytes as it comes, in order, for who wants to look at it while it is in the cache. file: of which `out` is a
    mapping whose pages are fresh, so that it is cheaper to write to the file; None: it is none."""

    start: int
    out: Bytes
    grew: Callable[[Bytes], object] = len
    file: FilePart | None = None

    def put(self, at: int, part: Bytes, gate: Gate) -> bool:
        """Put bytes in their place, `at` bytes from its beginning on; false: the gate is shut, or there is no memory.
        LOCAL."""
        with gate.writing() as may:
            if may and self.file is not None:
                try:
                    self.file.write(at, part)
                except OSError as error:
                    log.warning("what comes from another host cannot be kept: %s", error)
                    return False
            elif may:
                np.copyto(self.out[at : at + part.nbytes], part)
        return may


class Gate:
    """Whoever writes into a buffer that is not its own goes through here. Once it is shut nothing is written any more:
    that is how a transfer is abandoned of which nobody knows when it will end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_shut = False

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold the gate open, for as short as can be; false: it is shut, write nothing. LOCAL."""
        with self._lock:
            yield not self.is_shut

    def shut(self) -> None:
        """Returns when the last writer is through. LOCAL, takes as long as one write."""
        with self._lock:
            self.is_shut = True


Arrived = Callable[[int], None]
"""Told the number of each piece whose bytes are all there."""


class Transport(Protocol):
    """One way to read other hosts' memory. For several threads, of which each reads from another host."""

    name: str

    def register(self, stall: Stall) -> None:
        """From now on this is where that host is; what is known of an earlier life of it is dropped. LOCAL."""

    def serves(self, node_rank: int, slots: str) -> bool:
        """Whether this transport can read that host's vault (or, named by address, slots of its ranks). LOCAL."""

    def read(
        self, node_rank: int, pieces: Sequence[Piece], timeout_s: float, arrived: Arrived, gate: Gate, slots: str = ""
    ) -> None:
        """Read what can be read within the time; `arrived` is called in this thread. Raises nothing."""

    def drop(self, node_rank: int) -> None:
        """Forget a host. LOCAL."""


def stall_key(node_rank: int) -> str:
    """The store's key for where a host serves its memory. LOCAL."""
    return f"vault/{node_rank}"


def shape_of(stall: Stall) -> VaultShape | None:
    """The shape of a host's vault; None when it has none. LOCAL."""
    if not stall.memory:
        return None
    layers, experts, expert_bytes, dense_bytes, dense_tensors, *share = stall.shape
    return VaultShape(layers, experts, expert_bytes, dense_bytes, dense_tensors, Share(*share))


def encoded_shape(shape: VaultShape) -> tuple[int, ...]:
    """What `shape_of` reads. LOCAL."""
    share = shape.share
    return (
        shape.num_layers, shape.num_experts, shape.expert_bytes, shape.dense_bytes, shape.dense_tensors,
        share.node_rank, share.nnodes, share.copies,
    )  # fmt: skip


def send_request(connection: socket.socket, request: Request) -> None:
    """Ask for ranges. Raises OSError. LOCAL."""
    body = msgspec.msgpack.encode(request)
    connection.sendall(struct.pack("<I", len(body)) + body)


class TcpTransport:
    """Byte streams to the process that serves a host's vault, a few in parallel. Reads are non-blocking; a stream that
    fails or is too slow is closed, so nothing can arrive late.

    Bytes for fresh pages of a memory file go there by way of a buffer that stays in the processor's cache: that copy
    costs less than the page faults which a read straight into the mapping would meet."""

    name = "tcp"

    def __init__(self, token: bytes, streams: int = 2) -> None:
        """token: the cluster's. streams: how many a read uses at most; it uses one for every 4 MiB."""
        self._token, self._streams = token, streams
        self._stalls: dict[int, Stall] = {}
        self._idle: dict[int, list[socket.socket]] = {}
        self._lock = threading.Lock()

    def register(self, stall: Stall) -> None:
        known = self._stalls.get(stall.node_rank)
        if known is None or (known.life, known.tcp, known.memory) != (stall.life, stall.tcp, stall.memory):
            self.drop(stall.node_rank)
        self._stalls[stall.node_rank] = stall

    def serves(self, node_rank: int, slots: str) -> bool:
        return node_rank in self._stalls

    def drop(self, node_rank: int) -> None:
        with self._lock:
            self._stalls.pop(node_rank, None)
            idle = self._idle.pop(node_rank, [])
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Hang up everywhere. LOCAL."""
        for node_rank in list(self._stalls):
            self.drop(node_rank)

    def read(
        self, node_rank: int, pieces: Sequence[Piece], timeout_s: float, arrived: Arrived, gate: Gate, slots: str = ""
    ) -> None:
        deadline = time.monotonic() + timeout_s
        stall = self._stalls.get(node_rank)
        lanes: list[_Lane] = []
        bounce = np.empty(CHUNK_BYTES, np.uint8)
        poller = select.poll()
        try:
            for part in _parts(pieces, self._streams) if stall is not None else ():
                assert stall is not None
                try:
                    lane = _Lane(self._connection(stall, deadline), part, pieces, slots)
                except (OSError, PhalanxError):
                    break  # the streams that there are bring what they can
                lanes.append(lane)
                poller.register(lane.connection, select.POLLIN)
            going = {lane.connection.fileno(): lane for lane in lanes}
            while going and not gate.is_shut and (left := deadline - time.monotonic()) > 0:
                for fd, _ in poller.poll(min(_TICK_MS, int(left * 1000) + 1)):
                    if not going[fd].take(bounce, arrived, gate):
                        poller.unregister(fd)
                        del going[fd]
        finally:
            for lane in lanes:
                self._put_back(stall, lane)

    def _connection(self, stall: Stall, deadline: float) -> socket.socket:
        with self._lock:
            idle = self._idle.get(stall.node_rank, [])
            while idle:
                connection = idle.pop()
                if not _hung_up(connection):
                    return connection
                connection.close()
        left = min(CONNECT_S, deadline - time.monotonic())
        return wire.connect(stall.tcp, self._token, Greeting(stall.memory), max(1e-3, left))

    def _put_back(self, stall: Stall | None, lane: _Lane) -> None:
        with self._lock:
            if lane.done and stall is not None and self._stalls.get(stall.node_rank) == stall:
                self._idle.setdefault(stall.node_rank, []).append(lane.connection)
                return
        lane.connection.close()


class _Lane:
    """One stream's part of a read."""

    def __init__(self, connection: socket.socket, part: list[int], pieces: Sequence[Piece], slots: str) -> None:
        self.connection = connection
        self._pieces = pieces
        self._due = deque(part)
        self._at = 0
        try:
            connection.settimeout(CONNECT_S)
            send_request(connection, Request([(pieces[i].start, pieces[i].out.nbytes) for i in part], slots))
            connection.setblocking(False)
        except BaseException:
            connection.close()
            raise

    @property
    def done(self) -> bool:
        """Whether all its pieces came, so that it can be used again."""
        return not self._due

    def take(self, bounce: Bytes, arrived: Arrived, gate: Gate) -> bool:
        """Read what is there; whether more is to come. bounce: where bytes that go to a file are in between."""
        piece = self._pieces[self._due[0]]
        try:
            if piece.file is None:
                part = piece.out[self._at : self._at + CHUNK_BYTES]
                with gate.writing() as may:
                    part = part[: self.connection.recv_into(part.data) if may else 0]
            else:
                part = bounce[: piece.out.nbytes - self._at]
                part = part[: self.connection.recv_into(part.data)]
                if not piece.put(self._at, part, gate):
                    return False
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not part.nbytes:
            return False
        piece.grew(part)
        self._at += part.nbytes
        if self._at == piece.out.nbytes:
            self._at = 0
            arrived(self._due.popleft())
        return bool(self._due)


def _parts(pieces: Sequence[Piece], streams: int) -> list[list[int]]:
    """Numbers of the pieces for each stream: neighbours together, about as many bytes in each."""
    total = sum(piece.out.nbytes for piece in pieces)
    count = max(1, min(streams, len(pieces), total // _LANE_BYTES))
    parts: list[list[int]] = [[] for _ in range(count)]
    before = 0
    for number, piece in enumerate(pieces):
        parts[min(count - 1, before * count // max(1, total))].append(number)
        before += piece.out.nbytes
    return [part for part in parts if part]


def _hung_up(connection: socket.socket) -> bool:
    """Whether a stream that should be silent has ended, or says something that nobody asked for."""
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(0))
