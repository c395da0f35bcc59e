"""What launchers say to each other, and the connection on which they say it: length, then MessagePack.

Nothing here waits. What is read and what waits to be written is bounded, and whatever does not keep to the protocol
has hung up: the other launcher then counts as lost, and with it all that it looks after.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from typing import Any, Literal

import msgspec

from phalanx import messages as m
from phalanx.errors import PhalanxError
from phalanx.hosts.places import Terms

MAX_MESSAGE = 1 << 20
MAX_WAITING = 16 << 20
_LENGTH = struct.Struct("<I")

NoticeCause = Literal["exit", "signal", "exception", "evicted", "operator", "host", "halted"]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection between hosts is for.

    launcher: the two launchers' own. store, server: brings the caller to the first host's store or HTTP server. worker:
    brings the first host's server to a worker. session: as the Welcome said; 0 before it."""

    purpose: Literal["launcher", "store", "server", "worker"]
    node_rank: int
    session: int = 0
    rank: int = -1
    incarnation: int = -1


# --- to the first host


class Register(m.Message, frozen=True):
    """A host asks for its place. host: where its ranks are reached; gate: its gate's HOST:PORT."""

    node_rank: int
    host: str
    gate: str
    terms: Terms


class Beat(m.Message, frozen=True):
    """I live."""


class Leaving(m.Message, frozen=True):
    """This host was asked to stop: its ranks are out from now on."""


class Halted(m.Message, frozen=True):
    """What a look at a worker's process found that is stopped, or was at the look before (`halts.Halt`)."""

    rank: int
    incarnation: int
    seconds: float | None


Report = m.Spawned | m.Died | m.VaultState | Halted
"""What whoever looks after processes says of them."""

ToFirst = Register | Beat | Leaving | Report


# --- from the first host


class Welcome(m.Message, frozen=True):
    """You are in. cluster: another one when the first host was started anew, with an empty store. dead: (rank,
    incarnation, cause) of the last death of each rank."""

    cluster: str
    session: int
    dead: list[tuple[int, int, NoticeCause]]


class Refuse(m.Message, frozen=True):
    """You are not let in. final: asking again is of no use."""

    reason: str
    final: bool


class StartWorker(m.Message, frozen=True):
    rank: int
    incarnation: int
    scaled: bool = False


class SignalWorker(m.Message, frozen=True):
    """Send a signal, by name, to one incarnation of a rank, if it still lives."""

    rank: int
    incarnation: int
    name: str


class Notice(m.Message, frozen=True):
    """Every incarnation of a rank up to this one is dead: to be written on the host's notice board."""

    rank: int
    incarnation: int
    cause: NoticeCause


class End(m.Message, frozen=True):
    """The service ends. failed: not because somebody asked it to."""

    reason: str
    failed: bool = False


ToOther = Welcome | Refuse | Beat | StartWorker | SignalWorker | Notice | End


class HungUp(PhalanxError):
    """The other launcher is gone, or does not keep to the protocol."""


class Channel:
    """One end of a connection between two launchers."""

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        """connection: past the handshake; the channel owns it. incoming: the union of what may come."""
        connection.setblocking(False)
        self._socket = connection
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._in, self._out = bytearray(), bytearray()

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    @property
    def local_host(self) -> str:
        """The address that this end has. LOCAL."""
        return str(self._socket.getsockname()[0])

    @property
    def wants_to_write(self) -> bool:
        """Whether `flush` has something to do, once the connection is writable. LOCAL."""
        return bool(self._out)

    def send(self, message: m.Message) -> None:
        """Say something. Raises HungUp. LOCAL."""
        data = m.encode(message)
        self._out += _LENGTH.pack(len(data)) + data
        if len(self._out) > MAX_WAITING:
            raise HungUp("it takes no messages")
        self.flush()

    def flush(self) -> None:
        """Write as much as goes. Raises HungUp. LOCAL."""
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise HungUp(f"hang-up ({error.strerror})") from None

    def receive(self) -> list[Any]:
        """What has come, as far as it is whole. Raises HungUp, at the earliest once all that came before was given.
        LOCAL."""
        try:
            part = self._socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise HungUp(f"hang-up ({error.strerror})") from None
        if not part:
            raise HungUp("hang-up")
        self._in += part
        found = []
        while len(self._in) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._in)
            if size > MAX_MESSAGE:
                raise HungUp(f"it says a message of {size} bytes, and none has more than {MAX_MESSAGE}")
            if len(self._in) < _LENGTH.size + size:
                break
            try:
                found.append(self._decoder.decode(bytes(self._in[_LENGTH.size : _LENGTH.size + size])))
            except msgspec.DecodeError as error:
                raise HungUp(f"it says what this version does not understand: {error}") from None
            del self._in[: _LENGTH.size + size]
        return found

    def close(self) -> None:
        self._socket.close()


class News:
    """Things that happened in other threads, for a loop that waits on file descriptors."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is news."""
        self._items: deque[Any] = deque()

    def post(self, item: object) -> None:
        """From any thread. LOCAL."""
        self._items.append(item)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[Any]:
        """What was posted since the last call. LOCAL."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._items.popleft())
        return found
