"""A host's stall: the process that gives other hosts what lies in this host's vault and in its ranks' expert slots.

It is a child of the keeper, at ordinary priority and with nothing else to do, so that filling the vault never makes
another host's recovery wait, nor the other way round. It only reads. It says in the store where it is.

After the handshake of `phalanx.wire` a caller sends requests, `transport.Request` behind its length (uint32), and gets
the bytes of the ranges, one after the other, with nothing between them. A request that makes no sense ends the
connection. The vault's bytes are sent from its mapping: by sendfile, page by page, it takes both ends more time than
the copy that it saves. A rank's slots, which nothing here has mapped, are sent by sendfile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgspec

from phalanx import wire
from phalanx.elastic.store import Store, TcpStore
from phalanx.elastic.vault.fabric import chosen, engine_devices
from phalanx.elastic.vault.memory import Follower, Vault, VaultGone
from phalanx.elastic.vault.transport import CONNECT_S, Greeting, Request, Stall, encoded_shape, stall_key
from phalanx.errors import PhalanxError
from phalanx.halts import HELPER_HALT_S, wait_for_child
from phalanx.moe.experts import PeerBank, StaleAddress
from phalanx.process import VaultSpec, die_with_parent

log = logging.getLogger("phalanx.vault")

MAX_CALLERS = 256
"""Members of the cluster that are served at a time; more are hung up on."""

MAX_HANDSHAKES = 64
"""Callers that have not shown yet that they are members (`wire.Doorkeeper`)."""

MAX_REQUEST_BYTES = 4 << 20

PATIENCE_S = 30.0
"""How long a caller may take none of the bytes that it asked for."""

RESTART_S = 0.5
"""From the end of the process to its next start."""

_LOOK_S = 0.5


class StallProcess(threading.Thread):
    """The keeper's hold on the process: starts it, and starts it again, also one that stays stopped. A thread, to
    be started before the keeper takes a low priority: what this thread forks has the thread's own, and dies with
    it."""

    def __init__(self, spec: VaultSpec) -> None:
        """Listens from now on. OSError when the host's address is not this host's."""
        super().__init__(name="stall-process", daemon=True)
        assert spec.site is not None, "nobody to serve"
        self._spec = spec
        self._listener = wire.listen(spec.site.host)

    def run(self) -> None:
        """For as long as the keeper lives."""
        keeper = os.getpid()
        while True:
            pid = os.fork()
            if pid == 0:
                self._become(keeper)
            status = wait_for_child(pid, HELPER_HALT_S)
            log.warning("the process that serves this host's memory to the others ended: starting it again")
            log.debug("its wait status was %d", status)
            time.sleep(RESTART_S)

    def _become(self, keeper: int) -> None:
        code = 1
        try:
            die_with_parent(keeper)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            serve(self._spec, self._listener)
            code = 0
        except Exception as error:
            log.error("serving this host's memory to the others fails: %s", error, exc_info=True)
        finally:
            os._exit(code)


def serve(spec: VaultSpec, listener: socket.socket) -> None:
    """The process's life: publish where it is, and serve whoever knows the cluster's token. Does not return."""
    site = spec.site
    assert site is not None
    vault: Vault | None = None
    with contextlib.suppress(VaultGone):
        vault = Vault.open_for_writing(spec.vault) if spec.vault else None  # RDMA cannot register read-only pages
    host, port = listener.getsockname()[:2]
    stall = Stall(
        node_rank=site.node_rank,
        host=site.host,
        life=f"{spec.incarnation}.{os.getpid()}",
        tcp=wire.join_address(host, port),
        memory=spec.vault.rsplit(":", 1)[1] if vault is not None else "",
        shape=encoded_shape(vault.shape) if vault is not None else (),
    )
    Callers(listener, site.token, stall.memory, vault).start()
    if vault is not None:
        Follower(vault).start()
    _publish(TcpStore(spec.store_host, spec.store_port), stall)
    log.info("serving this host's memory to the other hosts at %s", stall.tcp)
    if vault is not None and chosen(spec.config) == "mooncake":
        _offer_mooncake(spec, vault, stall)
    while True:
        signal.pause()


def _publish(store: Store, stall: Stall) -> None:
    store.set(stall_key(stall.node_rank), msgspec.msgpack.encode(stall))


def _offer_mooncake(spec: VaultSpec, vault: Vault, stall: Stall) -> None:
    """Once the vault is full, register it with the Transfer Engine, too (which takes all its pages at once)."""
    from phalanx.elastic.vault.mooncake import Segment  # late: the package is optional

    while not vault.is_full:
        time.sleep(_LOOK_S)
    assert spec.site is not None
    try:
        segment = Segment(spec.site.host, *engine_devices(spec.config), vault.everything)
    except PhalanxError as error:
        log.warning("other hosts read this vault by tcp: %s", error)
        return
    found = msgspec.structs.replace(stall, mooncake=segment.name, base=segment.base)
    _publish(TcpStore(spec.store_host, spec.store_port), found)
    log.info("serving the vault by the Transfer Engine, too, as %s", segment.name)
    while True:
        signal.pause()


class Callers:
    """Takes connections in, and gives each a thread: what one caller does holds no other up."""

    def __init__(self, listener: socket.socket, token: bytes, memory: str, vault: Vault | None) -> None:
        self._listener, self._token, self._memory, self._vault = listener, token, memory, vault
        self._places = threading.BoundedSemaphore(MAX_CALLERS)

    def start(self) -> None:
        """Listen from now on."""
        wire.Doorkeeper(
            self._listener, self._token, Greeting, CONNECT_S, most=MAX_HANDSHAKES, admit=self._serve, refused=_hung_up
        )

    def _serve(self, greeting: Greeting, connection: socket.socket) -> None:
        with connection:
            if not self._places.acquire(blocking=False):
                return
            try:
                if greeting.memory == self._memory:  # otherwise it means one that was here before
                    _harden(connection)
                    while request := _next_request(connection):
                        self._answer(connection, request)
            except (OSError, PhalanxError, msgspec.DecodeError, struct.error) as error:
                _hung_up(str(error))
            finally:
                self._places.release()

    def _answer(self, connection: socket.socket, request: Request) -> None:
        if request.slots:
            fd = PeerBank.file(request.slots)
            try:
                _send(connection, fd, request.ranges)
            finally:
                os.close(fd)
        elif self._vault is not None:
            everything = self._vault.everything
            for start, size in _checked(request.ranges, everything.nbytes):
                connection.sendall(everything[start : start + size].data)
        else:
            raise StaleAddress("there is no vault here")


def _hung_up(reason: str) -> None:
    log.debug("a caller is hung up on: %s", reason)


def _next_request(connection: socket.socket) -> Request | None:
    head = connection.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    if size > MAX_REQUEST_BYTES:
        raise StaleAddress(f"a request of {size} bytes")
    body = connection.recv(size, socket.MSG_WAITALL)
    return msgspec.msgpack.decode(body, type=Request)


def _send(connection: socket.socket, fd: int, ranges: list[tuple[int, int]]) -> None:
    for start, size in _checked(ranges, os.fstat(fd).st_size):
        while size:
            sent = os.sendfile(connection.fileno(), fd, start, size)
            if not sent:
                raise StaleAddress("the file is shorter than it was")
            start, size = start + sent, size - sent


def _checked(ranges: list[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """Those ranges, up to the first that is not within `end` bytes. Raises StaleAddress there."""
    for start, size in ranges:
        if not 0 <= start <= start + size <= end:
            raise StaleAddress(f"{size} bytes from {start} on are not in {end}")
        yield start, size


def _harden(connection: socket.socket) -> None:
    """A caller that is gone without a word, or takes nothing, does not keep its thread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(PATIENCE_S))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(PATIENCE_S), 0))
