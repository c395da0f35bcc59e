"""Connections between ranks of different hosts: who dials, who answers, and who is refused.

Of two ranks the lower one dials and the other answers. Both prove that they know the cluster's token (`wire`), and the
hello names both sides by rank and incarnation, so a connection reaches the process that was meant or none. Handshakes
run in threads that live as long as they take; the communicator's own thread only looks whether a connection is there.

A refused connection means that nobody listens at that address any more: the process is gone. Whoever is to be dialled
by a peer that does not come knocks at the peer's door from time to time, to learn this too.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

import msgspec

from phalanx import wire

log = logging.getLogger("phalanx.comm")

_SCHEME = "tcp://"
_HANDSHAKE_S = 5.0
_AGAIN_S = 0.1
"""How soon a dial that failed for no certain reason is tried again."""
_KNOCK_S = 0.5
_HANDSHAKES = 64
"""Callers that may be in the middle of a handshake (`wire.Doorkeeper`)."""


class Hello(msgspec.Struct, frozen=True):
    """Who calls, whom it means, and the shape of their messages, which must be the same on both sides."""

    rank: int
    incarnation: int
    to_rank: int
    to_incarnation: int
    shape: tuple[int, ...]
    purpose: str = "comm"


class Line:
    """A connection that is being made. `done`: it is there to be taken, or never will be.

    greeting: what is sent first, asked for at the moment when the connection is there. So a word that this rank wrote
    before it took the connection gets through even if it never looks for the connection."""

    def __init__(self, greeting: Callable[[], bytes]) -> None:
        self.done = threading.Event()
        self._greeting = greeting
        self._socket: socket.socket | None = None
        self._dropped = False
        self._lock = threading.Lock()

    def give(self, connection: socket.socket | None) -> None:
        """The connection is there; None: it never will be. LOCAL, from any thread."""
        with self._lock:
            if connection is not None and (self._dropped or self.done.is_set()):
                connection.close()
            elif connection is not None:
                with contextlib.suppress(OSError):  # whoever reads from it finds out
                    connection.send(self._greeting())
                self._socket = connection
            self.done.set()

    def take(self) -> tuple[bool, socket.socket | None]:
        """Whether it is done, and the connection, once. LOCAL."""
        with self._lock:
            connection, self._socket = self._socket, None
            return self.done.is_set(), connection

    def drop(self) -> None:
        """Nobody wants it any more. LOCAL."""
        with self._lock:
            self._dropped = True
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            self.done.set()


class Links:
    """One rank's door and its calls to others. LOCAL throughout."""

    def __init__(
        self,
        site: wire.Site,
        rank: int,
        incarnation: int,
        shape: tuple[int, ...],
        arrived: Callable[[], None],
        greeting: Callable[[], bytes],
    ) -> None:
        """arrived, called when some line is done, and greeting (`Line`) are called in other threads. Raises OSError
        when site.host is not ours."""
        self._token, self.rank, self.incarnation, self._shape, self._arrived = (
            site.token, rank, incarnation, shape, arrived,
        )  # fmt: skip
        self._greeting = greeting
        listener = wire.listen(site.host)
        self.address = _SCHEME + wire.address_of(listener)
        self._lock = threading.Lock()
        self._closed = False
        self._expected: dict[tuple[int, int], Line] = {}
        self._parked: dict[int, tuple[int, socket.socket]] = {}  # who called before it was expected, one a rank
        self._keeper = wire.Doorkeeper(
            listener, self._token, Hello, _HANDSHAKE_S, most=_HANDSHAKES, admit=self._welcomed, refused=_refused
        )

    def open(self, rank: int, incarnation: int, address: str) -> Line:
        """A line to a peer: dial it, or wait for its call. `address`: the peer's `Links.address`."""
        line = Line(self._greeting)
        if rank > self.rank:
            hello = Hello(self.rank, self.incarnation, rank, incarnation, self._shape)
            self._start(self._dial, line, address, hello)
            return line
        with self._lock:
            self._expected[rank, incarnation] = line
            caller, connection = self._parked.pop(rank, (incarnation, None))
            if connection is not None and caller == incarnation:
                line.give(connection)
            elif connection is not None:
                connection.close()
        if not line.done.is_set():
            self._start(self._knock, line, address)
        return line

    def parked(self, rank: int, incarnation: int) -> bool:
        """Whether this peer called again, though it has a line: it gave the old one up."""
        with self._lock:
            return self._parked.get(rank, (None, None))[0] == incarnation

    def drop(self, rank: int, incarnation: int, line: Line) -> None:
        """The line is no longer wanted."""
        with self._lock:
            if self._expected.get((rank, incarnation)) is line:
                del self._expected[rank, incarnation]
        line.drop()

    def close(self) -> None:
        """Hang up, and answer nobody any more."""
        with self._lock:
            self._closed = True
            for _, connection in self._parked.values():
                connection.close()
            self._parked = {}
            for line in self._expected.values():
                line.drop()
            self._expected = {}
        self._keeper.close()

    # --- in threads of their own

    def _start(self, what: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=what, args=arguments, name="phalanx-link", daemon=True).start()

    def _welcomed(self, hello: Hello, connection: socket.socket) -> None:
        connection.setblocking(False)
        if hello.shape != self._shape:
            log.error("rank %d has messages of another shape: %s, not %s", hello.rank, hello.shape, self._shape)
        meant = (hello.to_rank, hello.to_incarnation) == (self.rank, self.incarnation)
        dials = 0 <= hello.rank < self.rank
        if not (meant and dials and hello.purpose == "comm" and hello.shape == self._shape):
            connection.close()
            return
        self._arrive(hello.rank, hello.incarnation, connection)

    def _arrive(self, rank: int, incarnation: int, connection: socket.socket) -> None:
        with self._lock:
            line = self._expected.get((rank, incarnation))
            if self._closed:
                connection.close()
                return
            if line is not None and not line.done.is_set():
                line.give(connection)
                self._arrived()
                return
            waiting, before = self._parked.get(rank, (-1, None))
            if before is not None and waiting > incarnation:
                connection.close()
                return
            if before is not None:
                before.close()
            self._parked[rank] = incarnation, connection

    def _dial(self, line: Line, address: str, hello: Hello) -> None:
        told = False
        while not (line.done.is_set() or self._closed):
            try:
                connection = wire.connect(address.removeprefix(_SCHEME), self._token, hello, _HANDSHAKE_S)
            except ConnectionRefusedError:
                self._finish(line, None)
            except (OSError, wire.Refused) as error:
                if not told:
                    log.warning("rank %d at %s cannot be reached yet: %s", hello.to_rank, address, error)
                told = True
                line.done.wait(_AGAIN_S)
            else:
                connection.setblocking(False)
                self._finish(line, connection)

    def _knock(self, line: Line, address: str) -> None:
        while not (line.done.wait(_KNOCK_S) or self._closed):
            try:
                socket.create_connection(wire.split_address(address.removeprefix(_SCHEME)), _HANDSHAKE_S).close()
            except ConnectionRefusedError:
                self._finish(line, None)
            except OSError:
                continue

    def _finish(self, line: Line, connection: socket.socket | None) -> None:
        with self._lock:
            line.give(connection)
            if self._closed:
                line.drop()
            else:
                self._arrived()


def _refused(reason: str) -> None:
    log.debug("a connection was refused: %s", reason)
