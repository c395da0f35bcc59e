"""TCP between the hosts of one cluster: who may connect, and how it is found out.

Every connection between hosts begins with a handshake in which both sides prove that they know the cluster's token:
each answers the other's fresh nonce with an HMAC over both nonces and the caller's hello, so neither a stranger nor a
recorded conversation gets in, and the token never travels. What follows is not encrypted: the network between the hosts
must be one that only they can read (docs/failures.md).

    caller                                  listener
                                            MAGIC, nonce_l
    nonce_c, hello, proof("caller")
                                            proof("listener")
    ... whatever the hello's purpose is ...

The idea is the mutual challenge of RFC 5802 without its passwords. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from phalanx.errors import BadConfig, PhalanxError

MAGIC = b"phalanx1"
NONCE_BYTES = 32
PROOF_BYTES = 32
HELLO_MAX_BYTES = 64 * 1024
"""A stranger can make us hold no more than this."""

ACCEPT_AGAIN_S = 0.1
"""After a failed accept: no file descriptors left, say. Others may end meanwhile."""

T = TypeVar("T")


class Refused(PhalanxError):
    """The other side is no member of this cluster, or takes us for none. Says which, and what to do."""


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process stands among the hosts of a cluster. node_rank: its host's number, of `nnodes`; host: the address
    under which the other hosts reach it; token: the cluster's secret."""

    node_rank: int
    host: str
    token: bytes
    nnodes: int = 1


def read_token(path: str) -> bytes:
    """The cluster's token from a file, without white space at its ends. BadConfig when there is none. LOCAL."""
    try:
        with open(path, "rb") as file:
            token = file.read(4097).strip()
    except OSError as error:
        raise BadConfig(f"--cluster-token-file {path} cannot be read: {error.strerror or error}") from None
    if not 16 <= len(token) <= 4096:
        raise BadConfig(
            f"--cluster-token-file {path} holds {len(token)} bytes: it must hold one secret of 16 to 4096 bytes, the "
            "same on each host (openssl rand -hex 32 makes one)"
        )
    return token


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPV6]:PORT. ValueError for anything else. LOCAL."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"{address!r} is no HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets. LOCAL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening TCP socket (port 0: any free one). Raises OSError. LOCAL."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """HOST:PORT that a socket is bound to. LOCAL."""
    host, port = listener.getsockname()[:2]
    return join_address(host, port)


def connect(address: str, token: bytes, hello: msgspec.Struct, timeout_s: float) -> socket.socket:
    """Connect to a member of the cluster and say `hello` (what this connection is for). Returns a blocking socket
    without delays and without a time-out. Raises OSError (nobody there, TimeoutError) or Refused. LOCAL."""
    deadline = time.monotonic() + timeout_s
    connection = socket.create_connection(split_address(address), timeout_s)
    try:
        try:
            said = _receive(connection, len(MAGIC) + NONCE_BYTES, deadline, address)
        except Refused:  # it knows nothing of us yet: it is ending, or has no room
            raise ConnectionResetError(errno.ECONNRESET, f"{address} hung up at once") from None
        if not said.startswith(MAGIC):
            raise Refused(f"what listens at {address} is no Phalanx: check the address")
        nonce_l, nonce_c = said[len(MAGIC) :], secrets.token_bytes(NONCE_BYTES)
        greeting = msgspec.msgpack.encode(hello)
        head = nonce_c + struct.pack("<I", len(greeting)) + greeting
        _send(connection, head + _proof(token, b"caller", nonce_l, head), deadline)
        proof = _receive(connection, PROOF_BYTES, deadline, address)
        if not hmac.compare_digest(proof, _proof(token, b"listener", nonce_l, head)):
            raise Refused(f"what listens at {address} has another cluster token: check --cluster-token-file")
        return _ready(connection)
    except BaseException:
        connection.close()
        raise


def welcome(connection: socket.socket, token: bytes, hello: type[T], timeout_s: float) -> T:
    """The other half of `connect`, on a connection that was just accepted: the hello of a caller who knows the token.
    Raises OSError or Refused, and closes the connection then. LOCAL."""
    deadline = time.monotonic() + timeout_s
    peer = "a caller"
    try:
        peer = join_address(*connection.getpeername()[:2])
        nonce_l = secrets.token_bytes(NONCE_BYTES)
        _send(connection, MAGIC + nonce_l, deadline)
        head = _receive(connection, NONCE_BYTES + 4, deadline, peer)
        (size,) = struct.unpack("<I", head[NONCE_BYTES:])
        if size > HELLO_MAX_BYTES:
            raise Refused(f"{peer} is no Phalanx: it was refused")
        head += _receive(connection, size, deadline, peer)
        proof = _receive(connection, PROOF_BYTES, deadline, peer)
        if not hmac.compare_digest(proof, _proof(token, b"caller", nonce_l, head)):
            raise Refused(f"{peer} has another cluster token, or none: it was refused (see --cluster-token-file)")
        try:
            said: T = msgspec.msgpack.decode(head[NONCE_BYTES + 4 :], type=hello)
        except msgspec.DecodeError as error:
            raise Refused(f"{peer} says what this version does not understand: {error}") from None
        _send(connection, _proof(token, b"listener", nonce_l, head), deadline)
        _ready(connection)
        return said
    except BaseException:
        connection.close()
        raise


class Doorkeeper(Generic[T]):
    """Takes in a listener's callers: each is welcomed in a thread of its own, and handed over when it knows the token.

    At most `most` are in a handshake at a time. One more ends the oldest handshake, and is let in itself: a member
    takes milliseconds, so whoever takes long is a stranger, and strangers who hold every place keep no member out."""

    def __init__(
        self,
        listener: socket.socket,
        token: bytes,
        hello: type[T],
        timeout_s: float,
        *,
        most: int,
        admit: Callable[[T, socket.socket], None],
        refused: Callable[[str], None],
    ) -> None:
        """Listens from now on, and owns the listener. admit: called in the caller's thread with what it said, and owns
        the connection; refused: called there with the reason."""
        self._listener, self._token, self._hello, self._timeout_s = listener, token, hello, timeout_s
        self._most, self._admit, self._refused = most, admit, refused
        self._callers: dict[socket.socket, None] = {}  # in a handshake, the oldest first
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._listen, name="doorkeeper", daemon=True).start()

    def close(self) -> None:
        """Take in nobody any more. LOCAL."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone does not
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it is closed; or the caller is gone again, or there is no file descriptor left just now
                if self._listener.fileno() < 0:
                    return
                time.sleep(ACCEPT_AGAIN_S)
                continue
            self._begin(connection)
            try:
                threading.Thread(target=self._greet, args=(connection,), name="caller", daemon=True).start()
            except RuntimeError:  # no further thread just now
                self._is_over(connection)
                connection.close()

    def _begin(self, connection: socket.socket) -> None:
        with self._lock:
            while len(self._callers) >= self._most:
                oldest = next(iter(self._callers))
                del self._callers[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread finds out
            self._callers[connection] = None

    def _is_over(self, connection: socket.socket) -> bool:
        """A handshake is over; False when it was ended to make room."""
        with self._lock:
            kept = connection in self._callers
            self._callers.pop(connection, None)
        return kept

    def _greet(self, connection: socket.socket) -> None:
        try:
            try:
                said = welcome(connection, self._token, self._hello, self._timeout_s)
            finally:
                kept = self._is_over(connection)
            if not kept:
                connection.close()
                raise Refused("a caller took too long in the handshake, while many others called")
        except (OSError, Refused) as error:
            self._refused(str(error))
            return
        self._admit(said, connection)


def _proof(token: bytes, side: bytes, nonce_l: bytes, head: bytes) -> bytes:
    return hmac.new(token, side + nonce_l + head, hashlib.sha256).digest()


def _ready(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    with contextlib.suppress(OSError):  # a Unix socket pair in a test has no Nagle to turn off
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    connection.settimeout(max(1e-3, deadline - time.monotonic()))
    connection.sendall(data)


def _receive(connection: socket.socket, size: int, deadline: float, peer: str) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{peer} does not answer the handshake")
        connection.settimeout(left)
        try:
            part = connection.recv(size - len(parts))
        except TimeoutError:
            continue
        if not part:
            raise Refused(f"{peer} hung up in the handshake: it may have another cluster token (--cluster-token-file)")
        parts += part
    return bytes(parts)
