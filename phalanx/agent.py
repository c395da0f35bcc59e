"""The launcher of every host but the first: it finds the first host, and then does what that one says.

It is in one of three states: looking for the first host, asking to be let in, or in. When the first host is gone or
cannot be reached, the workers here are killed at once, for nobody may go on without the store; the vault's memory
stays, and the looking begins again. So after a cut the host comes back by itself, with the weights it had.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time

import msgspec
import zmq

from phalanx import __version__, wire
from phalanx.config import ServeConfig
from phalanx.crew import Crew
from phalanx.errors import BadConfig
from phalanx.hosts.gate import Gate
from phalanx.hosts.muster import DIAL_S, path_of, token_of
from phalanx.hosts.places import BEAT_S, Silence, Terms, ranks_of
from phalanx.hosts.talk import (
    Beat,
    Channel,
    End,
    Hello,
    HungUp,
    Leaving,
    News,
    Notice,
    Refuse,
    Register,
    Report,
    SignalWorker,
    StartWorker,
    ToOther,
    Welcome,
)
from phalanx.hosts.tunnel import Broken, Tunnels, connect_to, listen_at
from phalanx.nursery import Nursery
from phalanx.process import adopt_orphans, server_endpoint, wake_on_signals, worker_endpoint

log = logging.getLogger("phalanx.launcher")

FIRST_PAUSE_S = 0.25
LAST_PAUSE_S = 4.0
"""Between two attempts to find the first host."""

PROGRESS_EVERY_S = 10.0

BIRTH_S, BIRTH_LOOK_S = 10.0, 0.02
"""How long a caller waits for a worker that does not listen yet, and how often it is looked."""


class Agent:
    """Runs one host's part of a service."""

    def __init__(self, config: ServeConfig, faults: str = "", *, model: str) -> None:
        """model: what the first host's model must equal (`hosts.places.Terms`). BadConfig for an unreadable token."""
        self.config = config
        self._node = config.node_rank
        self._faults = faults
        self._terms = Terms.of(config, __version__, model)
        self._token = token_of(config)
        self._ranks = ranks_of(self._node, config.nnodes, config.ep_size, config.places)
        self._stopping = self._told_to_end = False
        self._exit_code = 0
        self._run_dir = tempfile.mkdtemp(prefix="phalanx-")
        self._poller = zmq.Poller()
        adopt_orphans()
        self._wake = wake_on_signals()
        self._news = News()
        self._tunnels = Tunnels(self._news)
        self._gate: Gate | None = None
        self._store_port = self._open_doors()
        self._crew: Crew | None = None
        self._nursery: Nursery | None = Nursery()
        """It imports while this host asks to be let in; then it is the crew's."""
        self._cluster = ""
        """That of the last Welcome; "" before the first."""
        self._channel: Channel | None = None
        self._session = 0
        """Not 0: this host is in."""
        self._silence = Silence(0.0, 0.0)
        self._beat_at = 0.0
        self._looking_since = self._next_try = self._said_at = time.monotonic()
        self._pause_s = FIRST_PAUSE_S

    def run(self) -> int:
        """Serve until told to stop; the exit code. BadConfig when this host is not let in. LOCAL, blocks."""
        try:
            for fd in (self._wake, self._news.fd):
                self._poller.register(fd, zmq.POLLIN)
            while not self._stopping:
                self._turn(self._patience_s())
            return self._exit_code
        finally:
            self._shut_down()

    # --- the loop

    def _patience_s(self) -> float:
        now = time.monotonic()
        if self._channel is not None:
            due = self._beat_at
        elif self._crew is not None and not self._crew.empty:
            due = now + BEAT_S  # an end of a worker is an event
        else:
            due = self._next_try
        if self._crew is not None and (birth := self._crew.due_s()) is not None:
            due = min(due, birth)
        return max(0.0, due - now)

    def _turn(self, seconds: float) -> bool:
        """Wait for an event and serve it, and do what is due by the clock. False when asked to stop."""
        events = dict(self._poller.poll(int(seconds * 1000) + 1))
        if self._crew is not None:
            self._crew.serve(events)
        if self._news.fd in events:
            self._hear_news()
        if self._channel is not None and self._channel.fd in events:
            self._hear(events[self._channel.fd])
        if self._wake in events:
            os.read(self._wake, 64)
            log.info("asked to stop")
            self._stopping = True
            return False
        self._do_what_is_due(time.monotonic())
        return True

    def _do_what_is_due(self, now: float) -> None:
        if self._crew is not None:
            self._crew.tick()
        if self._stopping:
            return
        if self._channel is None:
            if now >= self._next_try and (self._crew is None or self._crew.empty):
                self._look(now)
            return
        if self._silence.is_over(now):
            self._lose(f"silent for more than {self._silence.limit_s:g} s")
        elif now >= self._beat_at:
            self._beat_at = now + BEAT_S
            if self._session:
                self._send(Beat())
            else:
                waited = now - self._looking_since
                self._say(now, f"the first host does not say yet whether this one is in; {waited:.0f} s so far")

    # --- looking

    def _look(self, now: float) -> None:
        """Try once to reach the first host, and ask it to be let in."""
        address = self.config.dist_init_addr
        try:
            connection = wire.connect(address, self._token, Hello(purpose="launcher", node_rank=self._node), DIAL_S)
        except wire.Refused as error:
            self._stay_out(str(error))
            return
        except OSError as error:
            self._not_there(now, error.strerror or str(error))
            return
        self._channel = channel = Channel(connection, ToOther)
        self._poller.register(channel.fd, zmq.POLLIN)
        self._silence = Silence(self.config.warmup_timeout_s, time.monotonic())  # it may still be starting itself
        self._beat_at = time.monotonic() + BEAT_S
        host = self.config.node_host or channel.local_host
        if self._gate is None:
            self._gate = self._open_gate(host)
        self._host = host
        self._send(Register(node_rank=self._node, host=host, gate=self._gate.address, terms=self._terms))

    def _not_there(self, now: float, why: str) -> None:
        waited = now - self._looking_since
        address = self.config.dist_init_addr
        if not self._cluster and self.config.elastic_ep_rejoin:
            raise BadConfig(
                f"--elastic-ep-rejoin: no cluster answers at --dist-init-addr {address} ({why}): start the first host, "
                "or leave the flag out to wait for it"
            )
        if not self._cluster and waited > self.config.warmup_timeout_s:
            raise BadConfig(
                f"no cluster answered at --dist-init-addr {address} for {waited:.0f} s (--warmup-timeout): {why}"
            )
        self._say(now, f"waiting for the first host at {address} ({why}); {waited:.0f} s so far")
        self._try_later()

    def _stay_out(self, why: str, final: bool = True) -> None:
        """The first host is there, and does not let this one in."""
        if not self._cluster and final:
            raise BadConfig(why)
        log.warning("not let in: %s; trying again", why)
        self._try_later()

    def _try_later(self) -> None:
        self._next_try = time.monotonic() + self._pause_s
        self._pause_s = min(LAST_PAUSE_S, 2 * self._pause_s)

    def _say(self, now: float, what: str) -> None:
        if now >= self._said_at:
            self._said_at = now + PROGRESS_EVERY_S
            log.info("%s", what)

    # --- talking with the first host

    def _hear(self, events: int) -> None:
        channel = self._channel
        assert channel is not None
        try:
            if events & zmq.POLLOUT:
                channel.flush()
            if events & ~zmq.POLLOUT:
                said = channel.receive()
                if said:
                    self._silence.heard(time.monotonic())
                for message in said:
                    if self._channel is channel:
                        self._heard(message)
            self._watch()
        except HungUp as error:
            if self._channel is channel:
                self._lose(str(error))

    def _heard(self, message: ToOther) -> None:
        match message:
            case Welcome():
                self._come_in(message)
            case Refuse(reason=reason, final=final):
                self._hang_up()
                self._stay_out(reason, final)
            case StartWorker(rank=rank, incarnation=incarnation, scaled=scaled):
                self._my_crew.start(rank, incarnation, scaled=scaled)
            case SignalWorker(rank=rank, incarnation=incarnation, name=name):
                self._my_crew.signal(rank, incarnation, signal.Signals[name])
            case Notice(rank=rank, incarnation=incarnation, cause=cause):
                self._my_crew.notice(rank, incarnation, cause)
            case End(reason=reason, failed=failed):
                log.log(logging.ERROR if failed else logging.INFO, "the service ends: %s", reason)
                self._exit_code, self._stopping, self._told_to_end = int(failed), True, True
            case Beat():
                pass

    @property
    def _my_crew(self) -> Crew:
        if self._crew is None:
            raise HungUp("it gives orders to a host that it has not let in")
        return self._crew

    def _come_in(self, welcome: Welcome) -> None:
        now = time.monotonic()
        again = bool(self._cluster)
        self._session, self._pause_s = welcome.session, FIRST_PAUSE_S
        self._silence = Silence(self.config.peer_timeout_s, now)
        self._tunnels.begin(welcome.session)
        if self._crew is not None and welcome.cluster != self._cluster:
            log.warning("the first host was started anew: so are the vault and the notices here")
            self._end_crew(self._crew)
            self._crew = None
        self._cluster = welcome.cluster
        if self._crew is None:
            site = wire.Site(node_rank=self._node, nnodes=self.config.nnodes, host=self._host, token=self._token)
            self._crew = Crew(
                self.config, self._run_dir, self._poller, self._report, site=site, faults=self._faults,
                nursery=self._nursery,
            )  # fmt: skip
            self._nursery = None
            self._crew.begin(self._store_port)
        else:
            self._crew.resume()
        for rank, incarnation, cause in welcome.dead:
            self._crew.notice(rank, incarnation, cause)
        log.info("host %d (%s) is in%s, with ranks %s", self._node, self._host, " again" if again else "", self._ranks)

    def _report(self, report: Report) -> None:
        if self._session and self._channel is not None:
            self._send(report)

    def _send(self, message: Register | Beat | Leaving | Report) -> None:
        assert self._channel is not None
        try:
            self._channel.send(message)
            self._watch()
        except HungUp as error:
            self._hear_the_end(self._channel)
            self._lose(str(error))

    def _hear_the_end(self, channel: Channel) -> None:
        """The first host may have said that the service ends before its connection broke, and nobody has read it."""
        with contextlib.suppress(HungUp):
            while said := channel.receive():
                for message in said:
                    if isinstance(message, End):
                        self._heard(message)

    def _watch(self) -> None:
        if self._channel is not None and self._channel.fd in self._poller:
            self._poller.modify(self._channel.fd, zmq.POLLIN | zmq.POLLOUT * self._channel.wants_to_write)

    def _lose(self, reason: str) -> None:
        """The first host is gone, or cannot be reached: nobody here may serve any longer."""
        was_in = bool(self._session)
        self._hang_up()
        self._looking_since = time.monotonic()
        self._try_later()
        if was_in and not self._stopping:
            log.error("lost the first host: %s; the ranks %s of this host stop serving", reason, self._ranks)
        elif not self._stopping:
            log.warning("the first host hung up before it let this one in: %s", reason)
        if self._crew is not None:
            self._crew.disown()

    def _hang_up(self) -> None:
        if self._channel is not None:
            if self._channel.fd in self._poller:  # no longer, on the way to the end
                self._poller.unregister(self._channel.fd)
            self._channel.close()
            self._channel = None
        if self._session:
            self._tunnels.end(self._session)
            self._session = 0

    # --- what connects this host's processes with the first host's

    def _open_doors(self) -> int:
        """Doors to the store and to the server; the port of the first."""
        store = wire.listen("127.0.0.1")
        port = int(store.getsockname()[1])
        self._tunnels.open_door(store, lambda: self._dial("store"))
        server = listen_at(path_of(server_endpoint(self._run_dir)))
        self._tunnels.open_door(server, lambda: self._dial("server"))
        return port

    def _dial(self, purpose: str) -> tuple[int, socket.socket]:
        """In a thread: a connection to the first host, for one of this host's processes."""
        session = self._session
        if not session:
            raise ConnectionError("the first host is out of reach")
        hello = msgspec.convert({"purpose": purpose, "node_rank": self._node, "session": session}, Hello)
        return session, wire.connect(self.config.dist_init_addr, self._token, hello, DIAL_S)

    def _open_gate(self, host: str) -> Gate:
        try:
            listener = wire.listen(host)
        except OSError as error:
            raise BadConfig(
                f"--node-host {host} is no address of this host ({error.strerror or error}): give one under which the "
                "others reach it"
            ) from None
        return Gate(listener, self._token, self._admit)

    def _admit(self, hello: Hello, connection: socket.socket) -> None:
        """In a thread: the first host's server wants to speak to a worker of this host."""
        path = path_of(worker_endpoint(self._run_dir, hello.rank, hello.incarnation))
        deadline = time.monotonic() + BIRTH_S
        while hello.purpose == "worker" and self._session and hello.session == self._session:
            try:
                near = connect_to(path)
            except OSError:  # it has just been born
                if time.monotonic() > deadline:
                    raise
                time.sleep(BIRTH_LOOK_S)
            else:
                self._tunnels.join(hello.session, near, connection)
                return
        raise ConnectionError("no worker of this session")

    def _hear_news(self) -> None:
        for item in self._news.take():
            if isinstance(item, Broken) and item.session == self._session:
                self._lose(f"a connection to it broke ({item.reason})")

    # --- end

    def _end_crew(self, crew: Crew) -> None:
        crew.close_nursery()
        crew.close(lambda seconds: self._bury(crew, seconds))
        crew.board.close()

    def _bury(self, crew: Crew, seconds: float) -> bool:
        events = dict(self._poller.poll(int(seconds * 1000) + 1))
        crew.bury(events)
        if self._wake in events:
            os.read(self._wake, 64)
            log.warning("asked to stop once more: waiting no longer")
            return False
        return True

    def _shut_down(self) -> None:
        self._stopping = True
        if self._session and not self._told_to_end:
            self._send(Leaving())  # from now on the others go on without this host's ranks
        if self._crew is not None:
            if self._channel is not None:
                self._poller.unregister(self._channel.fd)
            self._poller.unregister(self._news.fd)
            self._end_crew(self._crew)
        if self._nursery is not None:
            self._nursery.close()
        if self._gate is not None:
            self._gate.close()
        self._tunnels.close()
        if self._channel is not None:
            self._channel.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)
