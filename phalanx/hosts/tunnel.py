"""Tunnels: connections that begin at a socket of this host and end at one of another host.

The store has no authentication and the sockets between server and workers are files, so neither can be reached from
another host. A door is a listening socket here; whoever connects to it is joined with a connection to the other host's
gate, which joins that with the socket meant. Both ends believe to talk to a neighbour.

One thread moves all bytes. A connection that its owner closes is closed at the other end, after what was said before
has arrived there. One that breaks between the hosts is reported: what was in it may be lost, which nobody may find out
by himself, so the whole host counts as lost then. Tunnels live in sessions, and all of a session end at once.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from phalanx.hosts.talk import News
from phalanx.wire import Refused

log = logging.getLogger("phalanx.hosts")

HELD_BYTES = 1 << 18
"""What may wait in one direction of a connection; then its sender has to wait."""

MAX_DIALS = 256
"""Connections to other hosts that may be under way."""

Dial = Callable[[], tuple[int, socket.socket]]
"""Connects to the other host: (session, connection). Raises OSError or wire.Refused. Called in a thread."""


@dataclass(frozen=True)
class Broken:
    """A connection to another host broke, in this session."""

    session: int
    reason: str


@dataclass(eq=False)
class _Way:
    """One direction."""

    source: socket.socket
    target: socket.socket
    held: bytearray = field(default_factory=bytearray)
    ended: bool = False
    """Its source says no more."""
    done: bool = False
    """Its target was told so."""

    def move(self) -> None:
        """Hand on what is held, and the end after it."""
        with contextlib.suppress(BlockingIOError):
            while self.held:
                del self.held[: self.target.send(self.held)]
        if self.ended and not self.held and not self.done:
            self.done = True
            with contextlib.suppress(OSError):
                self.target.shutdown(socket.SHUT_WR)

    def take(self) -> None:
        """Take in what the source says."""
        with contextlib.suppress(BlockingIOError):
            part = self.source.recv(HELD_BYTES)
            self.held += part
            self.ended = not part


@dataclass(eq=False)
class _Pair:
    """near: this host's end; far: the other host's."""

    session: int
    near: socket.socket
    far: socket.socket

    def __post_init__(self) -> None:
        self.out, self.back = _Way(self.near, self.far), _Way(self.far, self.near)
        self.near_gone = False

    def serve(self, end: socket.socket, events: int) -> None:
        """Do what `end` is ready for. Raises OSError when the far end breaks."""
        source, target = (self.out, self.back) if end is self.near else (self.back, self.out)
        try:
            if events & selectors.EVENT_WRITE:
                target.move()
            if events & selectors.EVENT_READ:
                source.take()
        except OSError:
            if end is self.far:
                raise
            self._lose_near()
        if self.near_gone:
            self.back.held.clear()
        try:
            self.back.move()
        except OSError:
            self._lose_near()
        if self.back.done and not self.near_gone:  # nobody is there any more to hear what our end still says
            self._lose_near()
        self.out.move()

    def _lose_near(self) -> None:
        """Who was here is gone: what it said still arrives, what it is told is thrown away. The far end is not closed
        before it has said its last, or what it says meanwhile would break the connection."""
        self.near_gone = True
        self.out.ended = True
        self.back.held.clear()

    @property
    def over(self) -> bool:
        return self.out.done and (self.back.done or (self.near_gone and self.back.ended))

    def wanted(self, end: socket.socket) -> int:
        """What to wait for at one end."""
        if end is self.near and self.near_gone:
            return 0
        source, target = (self.out, self.back) if end is self.near else (self.back, self.out)
        events = 0
        if not source.ended and len(source.held) < HELD_BYTES:
            events |= selectors.EVENT_READ
        if target.held:
            events |= selectors.EVENT_WRITE
        return events


@dataclass(frozen=True, eq=False)
class _Door:
    listener: socket.socket
    dial: Dial


class Tunnels:
    """All tunnels of a host, and the thread that serves them. Its methods may be called from any thread."""

    def __init__(self, news: News) -> None:
        """news: is told `Broken`."""
        self._news = news
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._orders: deque[Callable[[], None]] = deque()
        self._sessions: set[int] = set()
        self._pairs: set[_Pair] = set()
        self._dials = threading.BoundedSemaphore(MAX_DIALS)
        self._closing = False
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="tunnels", daemon=True)
        self._thread.start()

    def begin(self, session: int) -> None:
        """From now on tunnels of a session are carried. LOCAL."""
        self._order(lambda: self._sessions.add(session))

    def end(self, session: int) -> None:
        """Close all tunnels of a session, those under way included. LOCAL."""
        self._order(lambda: self._end(session))

    def open_door(self, listener: socket.socket, dial: Dial) -> None:
        """Carry whoever connects to `listener`, which is owned from now on, to where `dial` connects. LOCAL."""
        listener.setblocking(False)
        door = _Door(listener, dial)
        self._order(lambda: self._selector.register(listener, selectors.EVENT_READ, door) and None)

    def close_door(self, listener: socket.socket) -> None:
        """Take in nobody any more; who is in stays. LOCAL."""
        self._order(lambda: self._close_door(listener))

    def join(self, session: int, near: socket.socket, far: socket.socket) -> None:
        """Carry bytes between two connections, which are owned from now on. LOCAL."""
        near.setblocking(False)
        far.setblocking(False)
        self._order(lambda: self._join(_Pair(session, near, far)))

    def close(self) -> None:
        """End all. LOCAL."""
        self._closing = True
        self._order(lambda: None)
        self._thread.join(5)

    # --- in the thread

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select():
                    if key.fileobj is self._wake:
                        self._obey()
                    elif isinstance(key.data, _Door):
                        self._let_in(key.data)
                    elif key.data in self._pairs:
                        assert isinstance(key.fileobj, socket.socket)
                        self._serve(key.data, key.fileobj, events)
        finally:
            for pair in list(self._pairs):
                self._close(pair)
            for key in list((self._selector.get_map() or {}).values()):
                if isinstance(key.data, _Door):
                    self._close_door(key.data.listener)
            self._selector.close()
            self._wake.close()
            self._waker.close()

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)
        with contextlib.suppress(IndexError):
            while True:
                self._orders.popleft()()

    def _let_in(self, door: _Door) -> None:
        try:
            near, _ = door.listener.accept()
        except OSError:
            return
        if self._dials.acquire(blocking=False):
            threading.Thread(target=self._dial, args=(door, near), name="dial", daemon=True).start()
        else:
            near.close()

    def _dial(self, door: _Door, near: socket.socket) -> None:
        try:
            session, far = door.dial()
            self.join(session, near, far)
        except (OSError, Refused) as error:
            near.close()
            log.debug("a connection to another host failed: %s", error)
        finally:
            self._dials.release()

    def _join(self, pair: _Pair) -> None:
        if pair.session not in self._sessions:
            pair.near.close()
            pair.far.close()
            return
        self._pairs.add(pair)
        for end in (pair.near, pair.far):
            self._selector.register(end, selectors.EVENT_READ, pair)

    def _serve(self, pair: _Pair, end: socket.socket, events: int) -> None:
        try:
            pair.serve(end, events)
        except OSError as error:
            self._close(pair)
            self._news.post(Broken(pair.session, error.strerror or str(error)))
            return
        if pair.over:
            self._close(pair)
            return
        for each in (pair.near, pair.far):
            self._watch(pair, each)

    def _watch(self, pair: _Pair, end: socket.socket) -> None:
        wanted = pair.wanted(end)
        watched = end in self._selector.get_map()
        if wanted and watched:
            self._selector.modify(end, wanted, pair)
        elif wanted:
            self._selector.register(end, wanted, pair)
        elif watched:
            self._selector.unregister(end)

    def _close(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        for end in (pair.near, pair.far):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)
            end.close()

    def _end(self, session: int) -> None:
        self._sessions.discard(session)
        for pair in [pair for pair in self._pairs if pair.session == session]:
            self._close(pair)

    def _close_door(self, listener: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(listener)
        listener.close()


def listen_at(path: str) -> socket.socket:
    """A listening Unix socket. LOCAL."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def connect_to(path: str) -> socket.socket:
    """A connection to a Unix socket of this host. Raises OSError. LOCAL."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
