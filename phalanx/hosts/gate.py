"""The gate: where other hosts knock. Admits who knows the cluster's token, and leads each caller where it wants to go.

Handshakes take as long as the caller likes, up to a bound; each has a thread of its own, and there is a bound on those,
too, so strangers cost some threads for some seconds and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
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
        self._listener, self._token, self._admit = listener, token, admit
        self.address = wire.address_of(listener)
        self._places = threading.BoundedSemaphore(MAX_HANDSHAKES)
        self._warned_at, self._unsaid = 0.0, 0
        threading.Thread(target=self._listen, name="gate", daemon=True).start()

    def close(self) -> None:
        """Admit nobody any more. LOCAL."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone does not
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0 or error.errno == 22:  # EINVAL: shut down
                    return
                time.sleep(0.1)  # no file descriptors left, say: others may end meanwhile
                continue
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection,), name="caller", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            hello = wire.welcome(connection, self._token, Hello, HANDSHAKE_S)
            try:
                self._admit(hello, connection)
            except OSError as error:
                log.debug("a caller for %s was turned away: %s", hello, error)
                _turn_away(connection)
        except (OSError, wire.Refused) as error:
            self._warn(str(error))
        finally:
            self._places.release()

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
