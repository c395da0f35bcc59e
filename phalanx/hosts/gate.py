"""The gate: where other hosts knock. Admits who knows the cluster's token, and leads each caller where it wants to go.

Handshakes take as long as the caller likes, up to a bound, and there is a bound on their number, too
(`wire.Doorkeeper`), so strangers cost some threads for some seconds and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable

from phalanx import wire
from phalanx.hosts.talk import Hello

log = logging.getLogger("phalanx.hosts")

HANDSHAKE_S = 10.0
MAX_HANDSHAKES = 128
WARN_EVERY_S = 1.0


class Gate:
    """A listener and its threads."""

    def __init__(self, listener: socket.socket, token: bytes, admit: Callable[[Hello, socket.socket], None]) -> None:
        """admit: takes a caller that knows the token, with what it said, and owns the connection then; called in a
        thread of the caller's own, may wait for a moment, and may raise OSError, which turns the caller away."""
        self._admit = admit
        self.address = wire.address_of(listener)
        self._warned_at, self._unsaid = 0.0, 0
        self._keeper = wire.Doorkeeper(
            listener, token, Hello, HANDSHAKE_S, most=MAX_HANDSHAKES, admit=self._greet, refused=self._warn
        )

    def close(self) -> None:
        """Admit nobody any more. LOCAL."""
        self._keeper.close()

    def _greet(self, hello: Hello, connection: socket.socket) -> None:
        try:
            self._admit(hello, connection)
        except OSError as error:
            log.debug("a caller for %s was turned away: %s", hello, error)
            _turn_away(connection)

    def _warn(self, what: str) -> None:
        """Strangers must not be able to fill the log."""
        now = time.monotonic()
        if now - self._warned_at < WARN_EVERY_S:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} others before)" if self._unsaid else ""
        self._warned_at, self._unsaid = now, 0
        log.warning("refused at %s: %s%s", self.address, what, more)


def _turn_away(connection: socket.socket) -> None:
    """Hang up on a member of the cluster, after it has: to close on what it still says would break its connection, and
    that means more."""
    with contextlib.suppress(OSError), connection:
        connection.settimeout(HANDSHAKE_S)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
