"""The muster: the first host's hand on all others. It lets them in, hears them, and says when one is lost.

A host is lost when its launcher hangs up or stays silent. Its workers die with their launcher, and one that only cannot
be reached stops serving by itself when it finds out; so all its ranks count as dead from that moment, and nothing that
they still say is heard: their tunnels are closed first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from phalanx import messages as m
from phalanx import wire
from phalanx.config import ServeConfig
from phalanx.errors import BadConfig
from phalanx.hosts.gate import Gate
from phalanx.hosts.places import BEAT_S, Places, Refusal, Terms
from phalanx.hosts.talk import (
    Beat,
    Channel,
    End,
    Halted,
    Hello,
    HungUp,
    Leaving,
    News,
    Notice,
    NoticeCause,
    Refuse,
    Register,
    Report,
    SignalWorker,
    StartWorker,
    ToFirst,
    ToOther,
    Welcome,
)
from phalanx.hosts.tunnel import Broken, Tunnels, connect_to, listen_at
from phalanx.process import server_endpoint, worker_endpoint

log = logging.getLogger("phalanx.launcher")

DIAL_S = 5.0
REGISTER_S = 10.0
"""How long a launcher that is past the handshake may take to say who it is."""

TOKENLESS = b"phalanx: no --cluster-token-file was given"
"""What hosts without a token know in common: everybody can know it."""


def token_of(config: ServeConfig) -> bytes:
    """The cluster's secret. Says so loudly when there is none. BadConfig when it cannot be read. LOCAL."""
    if config.cluster_token_file:
        return wire.read_token(config.cluster_token_file)
    log.warning(
        "NO --cluster-token-file: whoever reaches --dist-init-addr can join this cluster and read and change all that "
        "it serves. Give the same secret on each host (openssl rand -hex 32 makes one)"
    )
    return TOKENLESS


def path_of(endpoint: str) -> str:
    """The file of an ipc endpoint. LOCAL."""
    return endpoint.removeprefix("ipc://")


@dataclass
class _Caller:
    """A launcher past the handshake."""

    channel: Channel
    until_s: float
    """When it is turned away, if it has not said who it is."""


@dataclass
class _Host:
    """A host that is in."""

    node_rank: int
    session: int
    host: str
    gate: str
    channel: Channel
    doors: dict[tuple[int, int], socket.socket]


@dataclass(frozen=True)
class Events:
    """Whom a muster tells what. joined: a host is in: (node_rank, host). lost: it no longer is: (node_rank, reason).
    said: what a worker's launcher reports of it."""

    joined: Callable[[int, str], None]
    lost: Callable[[int, str], None]
    said: Callable[[Report], None]
    dead: Callable[[], list[tuple[int, int, NoticeCause]]]
    """What a newcomer's notice board is to say."""


class Muster:
    """All hosts but the first; with --nnodes 1 nobody, and nothing listens."""

    def __init__(self, config: ServeConfig, terms: Terms, run_dir: str, poller: zmq.Poller, events: Events) -> None:
        """BadConfig when --dist-init-addr cannot be listened at."""
        self._config, self._run_dir, self._poller, self._events = config, run_dir, poller, events
        # What other hosts still have under way for a first host before this one must not pass for a session of ours.
        self.places = Places(config.ep_size, config.nnodes, terms, config.places, secrets.randbelow(1 << 48))
        self.site: wire.Site | None = None
        """Where this host stands; None when there is no other."""
        self._cluster = secrets.token_hex(8)
        self._store_port = 0
        self._callers: dict[int, _Caller] = {}
        self._hosts: dict[int, _Host] = {}
        self._beat_at = 0.0
        self._ending = False
        self._gate: Gate | None = None
        if config.nnodes == 1:
            return
        self._token = token_of(config)
        listener = _bind(config)
        host = config.node_host or str(listener.getsockname()[0])
        if host in ("0.0.0.0", "::"):
            listener.close()
            raise BadConfig(f"--dist-init-addr {config.dist_init_addr} names no address that other hosts could reach")
        self.site = wire.Site(node_rank=0, nnodes=config.nnodes, host=host, token=self._token)
        self._news = News()
        self._tunnels = Tunnels(self._news)
        self._gate = Gate(listener, self._token, self._admit)
        poller.register(self._news.fd, zmq.POLLIN)
        log.info("hosts meet at %s: waiting for %d more", self._gate.address, config.nnodes - 1)

    def open(self, store_port: int) -> None:
        """The store is there. LOCAL."""
        self._store_port = store_port

    def is_in(self, node_rank: int) -> bool:
        return node_rank in self._hosts

    @property
    def empty(self) -> bool:
        """Whether no other host is in."""
        return not self._hosts

    # --- the loop's side

    def serve(self, events: dict[object, int]) -> None:
        """Hear whoever said something. LOCAL."""
        if self._gate is None:
            return
        if self._news.fd in events:
            self._hear_news()
        for fd in [fd for fd in events if fd in self._callers]:
            assert isinstance(fd, int)
            self._hear_caller(fd)
        for host in [host for host in self._hosts.values() if host.channel.fd in events]:
            self._hear_host(host, events[host.channel.fd])

    def tick(self, now: float) -> None:
        """Do what is due by the clock: to be called at `due_s` at the latest, after `serve`. LOCAL."""
        for fd, caller in list(self._callers.items()):
            if now >= caller.until_s:
                self._turn_away(fd)
        for node in self.places.silent(now):
            self._lose(self._hosts[node], f"silent for more than {self._config.peer_timeout_s:g} s (--peer-timeout)")
        if now >= self._beat_at:
            self._beat_at = now + BEAT_S
            for host in list(self._hosts.values()):
                self._send(host, Beat())

    def due_s(self) -> float | None:
        """When `tick` is to be called, on the monotonic clock; None: there is nobody to care for."""
        return self._beat_at if self._hosts or self._callers else None

    # --- orders

    def start(self, rank: int, incarnation: int, *, scaled: bool = False) -> None:
        """Have a rank's host start its next process. scaled: see `WorkerSpec`. LOCAL."""
        self._tell(rank, StartWorker(rank=rank, incarnation=incarnation, scaled=scaled))

    def signal(self, rank: int, incarnation: int, number: signal.Signals) -> None:
        """Have a signal sent to a rank's process. LOCAL."""
        self._tell(rank, SignalWorker(rank=rank, incarnation=incarnation, name=number.name))

    def notice(self, rank: int, incarnation: int, cause: NoticeCause) -> None:
        """Have a death written on every other host's notice board. LOCAL."""
        for host in list(self._hosts.values()):
            self._send(host, Notice(rank=rank, incarnation=incarnation, cause=cause))

    def end(self, reason: str, failed: bool) -> None:
        """Tell all hosts that the service ends; they hang up when they have ended, and no other is let in. LOCAL."""
        self._ending = True
        for host in list(self._hosts.values()):
            self._send(host, End(reason=reason, failed=failed))

    def close(self) -> None:
        """Hang up on all. LOCAL."""
        if self._gate is not None:
            self._gate.close()
            self._tunnels.close()
            for channel in [c.channel for c in self._callers.values()] + [h.channel for h in self._hosts.values()]:
                channel.close()

    # --- letting in

    def _admit(self, hello: Hello, connection: socket.socket) -> None:
        """In a thread: somebody who knows the token is at the gate."""
        if hello.purpose == "launcher":
            self._news.post(Channel(connection, ToFirst))
            return
        if hello.session == 0 or hello.session != self.places.session(hello.node_rank):
            raise OSError(f"host {hello.node_rank} is not in")
        if hello.purpose == "store":
            near = socket.create_connection(("127.0.0.1", self._store_port), DIAL_S)
        elif hello.purpose == "server":
            near = connect_to(path_of(server_endpoint(self._run_dir)))
        else:
            raise OSError(f"the first host has no {hello.purpose} for others")
        self._tunnels.join(hello.session, near, connection)

    def _hear_news(self) -> None:
        for item in self._news.take():
            match item:
                case Channel():
                    self._callers[item.fd] = _Caller(item, time.monotonic() + REGISTER_S)
                    self._poller.register(item.fd, zmq.POLLIN)
                case Broken(session=session, reason=reason):
                    for host in [host for host in self._hosts.values() if host.session == session]:
                        self._lose(host, f"a connection to it broke ({reason})")

    def _hear_caller(self, fd: int) -> None:
        channel = self._callers[fd].channel
        try:
            said = channel.receive()
            if not said:
                return
            if not isinstance(said[0], Register):
                raise HungUp("it does not say who it is")
            self._register(fd, channel, said[0])
        except HungUp as error:
            log.warning("a host that asked to be let in is gone: %s", error)
            self._turn_away(fd)

    def _register(self, fd: int, channel: Channel, asked: Register) -> None:
        node, now = asked.node_rank, time.monotonic()
        if self._ending:
            raise HungUp("this service is ending")
        session = self.places.register(node, asked.terms, self._config.peer_timeout_s, now)
        if isinstance(session, Refusal):
            log.warning("refused host %d at %s: %s", node, asked.host, session.reason)
            channel.send(Refuse(reason=session.reason, final=session.final))
            self._turn_away(fd)
            return
        del self._callers[fd]
        host = self._hosts[node] = _Host(node, session, asked.host, asked.gate, channel, {})
        self._tunnels.begin(session)
        log.info("host %d at %s is in, with ranks %s", node, asked.host, self.places.ranks_of(node))
        self._send(host, Welcome(cluster=self._cluster, session=session, dead=self._events.dead()))
        if node in self._hosts:
            self._events.joined(node, asked.host)

    def _turn_away(self, fd: int) -> None:
        self._poller.unregister(fd)
        self._callers.pop(fd).channel.close()

    # --- those who are in

    def _hear_host(self, host: _Host, events: int) -> None:
        try:
            if events & zmq.POLLOUT:
                host.channel.flush()
            if events & ~zmq.POLLOUT:
                said = host.channel.receive()
                if said:
                    self.places.heard(host.node_rank, time.monotonic())
                for message in said:
                    self._heard(host, message)
            self._watch(host)
        except HungUp as error:
            self._lose(host, str(error))

    def _heard(self, host: _Host, message: ToFirst) -> None:
        match message:
            case m.Spawned(rank=rank) | m.Died(rank=rank) | Halted(rank=rank):
                if rank not in self.places.ranks_of(host.node_rank):
                    raise HungUp(f"it speaks of rank {rank}, which is none of its own")
                if isinstance(message, m.Spawned):
                    self._open_door(host, rank, message.incarnation)
                elif isinstance(message, m.Died):
                    self._close_door(host, (rank, message.incarnation))
                self._events.said(message)
            case m.VaultState():
                self._events.said(message)
            case Leaving():
                raise HungUp("it was asked to stop")
            case Register():
                raise HungUp("it is in, and asks to be let in")
            case Beat():
                pass

    def _open_door(self, host: _Host, rank: int, incarnation: int) -> None:
        """The server will look for this worker among the sockets of this host."""
        gate, hello = host.gate, Hello(
            purpose="worker", node_rank=0, session=host.session, rank=rank, incarnation=incarnation
        )  # fmt: skip
        listener = listen_at(path_of(worker_endpoint(self._run_dir, rank, incarnation)))
        host.doors[rank, incarnation] = listener
        self._tunnels.open_door(
            listener, lambda: (hello.session, wire.connect(gate, self._token, hello, DIAL_S))
        )  # fmt: skip

    def _close_door(self, host: _Host, name: tuple[int, int]) -> None:
        if (listener := host.doors.pop(name, None)) is not None:
            self._tunnels.close_door(listener)
            with contextlib.suppress(OSError):
                os.unlink(path_of(worker_endpoint(self._run_dir, *name)))

    def _lose(self, host: _Host, reason: str) -> None:
        if self._hosts.get(host.node_rank) is not host:
            return
        del self._hosts[host.node_rank]
        self._tunnels.end(host.session)
        self._poller.unregister(host.channel.fd)
        host.channel.close()
        self.places.left(host.node_rank)
        for name in list(host.doors):
            self._close_door(host, name)
        self._events.lost(host.node_rank, reason)

    def _tell(self, rank: int, message: ToOther) -> None:
        if (host := self._hosts.get(self.places.host_of(rank))) is not None:
            self._send(host, message)

    def _send(self, host: _Host, message: ToOther) -> None:
        try:
            host.channel.send(message)
            self._watch(host)
        except HungUp as error:
            self._lose(host, str(error))

    def _watch(self, host: _Host) -> None:
        if self._hosts.get(host.node_rank) is host:
            self._poller.modify(host.channel.fd, zmq.POLLIN | zmq.POLLOUT * host.channel.wants_to_write)


def _bind(config: ServeConfig) -> socket.socket:
    try:
        return wire.listen(*wire.split_address(config.dist_init_addr))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadConfig(
            f"cannot listen at --dist-init-addr {config.dist_init_addr}: {reason}; on the first host it is an address "
            "of its own"
        ) from None
