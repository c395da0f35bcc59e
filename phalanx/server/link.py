"""The sockets between the server and the other processes: carries out what the router wants done.

One PULL socket hears workers and launcher; one PUSH socket for each living worker and one for the launcher speak.
Sending never blocks: a queue that is full means a process that has not read for thousands of messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import msgspec
import zmq
import zmq.asyncio

from phalanx import messages as m
from phalanx.observe.events import EventLog
from phalanx.process import launcher_endpoint, server_endpoint, worker_endpoint
from phalanx.server.flight import Connect, Disconnect, Lost, NewView, Report, Request, ToLauncher, ToRank
from phalanx.server.roster import Identity
from phalanx.server.router import Router
from phalanx.server.scaling import Scale, Scaler

log = logging.getLogger("phalanx.server")

HIGH_WATER = 100_000
"""Messages that may wait for one process. A request needs a handful, so the router's bound comes first."""

_TICK_S = 0.1
_BREATHE_EVERY = 64
"""Messages heard in a row before other tasks get their turn."""


class Link:
    """Router and sockets together. Everything that changes the router goes through here, so that its effects are
    carried out at once. Use within one event loop."""

    def __init__(
        self, run_dir: str, router: Router, scaler: Scaler, events: EventLog, on_ready: Callable[[], None]
    ) -> None:
        self.router, self.scaler = router, scaler
        self._run_dir, self._events, self._on_ready = run_dir, events, on_ready
        self._was_ready = False
        self._context = zmq.asyncio.Context()
        self._plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context.underlying)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._inbox.bind(server_endpoint(run_dir))
        self._launcher = self._push(launcher_endpoint(run_dir))
        self._workers: dict[Identity, zmq.Socket[bytes]] = {}

    async def listen(self) -> None:
        """Hear the other processes until cancelled."""
        heard = 0
        while True:
            raw = await self._inbox.recv()
            try:
                message = m.to_server_decoder.decode(raw)
            except msgspec.DecodeError as error:
                log.error("a message of %d bytes cannot be read: %s", len(raw), error)
                continue
            self._log(message)
            self.router.handle(message)
            self._flush()
            heard += 1
            if heard % _BREATHE_EVERY == 0:
                await asyncio.sleep(0)

    async def tick(self) -> None:
        """Let the router's time-outs pass until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            self.router.expire()
            self._flush()

    # --- the router's public side, with its effects carried out

    def submit(self, requests: list[Request]) -> None:
        self.router.submit(requests)
        self._flush()

    def release(self, request_id: str) -> bool:
        found = self.router.release(request_id)
        self._flush()
        return found

    def abort(self, groups: Iterable[str] | None) -> list[str]:
        found = self.router.abort(groups)
        self._flush()
        return found

    def pause(self, rank: int | None, *, paused: bool) -> list[int]:
        told = self.router.pause(rank, paused=paused)
        self._flush()
        return told

    def scale(self, ranks: Iterable[int], drain_s: float) -> asyncio.Future[Scale]:
        """Have these places in use, and no others. The future is the Scale when it has ended; raises ScaleRefused."""
        ended: asyncio.Future[Scale] = asyncio.get_running_loop().create_future()

        def end(scale: Scale) -> None:
            level = logging.ERROR if scale.failure else logging.INFO
            log.log(level, "%s", scale)
            self._events.append(
                "scale", before=sorted(scale.before), ranks=sorted(scale.ranks), seconds=scale.seconds,
                outcome=scale.failure or "complete",
            )  # fmt: skip
            if not ended.done():
                ended.set_result(scale)

        scale = self.scaler.begin(frozenset(ranks), drain_s, end)
        log.info("scaling from ranks %s to %s", sorted(scale.before), sorted(scale.ranks))
        self._flush()
        return ended

    def fail_all(self, reason: str) -> None:
        self.router.fail_all(reason)
        self._flush()

    def tell_rank(self, identity: Identity, message: m.ToWorker) -> None:
        """Send a command to one rank."""
        self._send(identity, message)

    def tell_launcher(self, message: m.ToLauncher) -> None:
        """Send a command to the launcher."""
        try:
            self._launcher.send(m.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.error("the launcher takes no messages: %s is lost", type(message).__name__)

    def close(self) -> None:
        self._events.close()
        for socket in (self._launcher, *self._workers.values()):
            socket.close(linger=200)
        self._context.destroy(linger=200)

    # --- effects

    def _flush(self) -> None:
        self.scaler.advance()
        for effect in self.router.take():
            match effect:
                case ToRank(identity=identity, message=message):
                    self._send(identity, message)
                case Connect(identity=identity):
                    self._workers[identity] = self._push(worker_endpoint(self._run_dir, *identity))
                case Disconnect(identity=identity):
                    if socket := self._workers.pop(identity, None):
                        socket.close(linger=0)
                case Lost(identity=identity, cause=cause, detail=detail):
                    log.warning("lost rank %d.%d: %s", *identity, detail or cause)
                    self._events.append(
                        "lost", rank=identity.rank, incarnation=identity.incarnation, cause=cause, detail=detail
                    )
                case NewView(epoch=epoch, members=members, serving=serving):
                    names = [(i.rank, i.incarnation) for i in members]
                    self.tell_launcher(m.ViewChanged(epoch=epoch, members=names, serving=serving))
                case ToLauncher(message=message):
                    self.tell_launcher(message)
                case Report(recovery=recovery):
                    log.info("%s", recovery.summary())
                    self._events.append("recovery", **msgspec.structs.asdict(recovery))
        ready = not self.router.why_not_ready()
        if ready != self._was_ready:
            self._was_ready = ready
            self._events.append("ready" if ready else "not_ready", reason=self.router.why_not_ready())
            if ready:
                self._on_ready()
            else:
                log.warning("not ready: %s", self.router.why_not_ready())

    def _send(self, identity: Identity, message: m.ToWorker) -> None:
        socket = self._workers.get(identity)
        if socket is None:
            return  # it was lost a moment ago; what it had was moved then
        try:
            socket.send(m.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.error("rank %d.%d takes no messages", *identity)
            self.router.undeliverable(identity, message)

    def _push(self, endpoint: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._plain.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        return socket

    def _log(self, message: m.ToServer) -> None:
        match message:
            case m.CannotServe(rank=rank, incarnation=incarnation, reason=reason):
                log.error("rank %d.%d cannot serve: %s", rank, incarnation, reason)
            case m.Suspected(rank=rank, incarnation=incarnation, suspects=suspects):
                log.warning("rank %d.%d finds ranks %s silent", rank, incarnation, suspects)
            case m.Paused(rank=rank, incarnation=incarnation, paused=paused):
                log.info("rank %d.%d %s", rank, incarnation, "is paused" if paused else "goes on")
            case m.Recovered(rank=rank, incarnation=incarnation, prepared=prepared) if prepared and incarnation:
                phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in prepared.items())
                log.info("rank %d.%d came in %.3f s after it was started (%s)", rank, incarnation,
                         sum(prepared.values()), phases)  # fmt: skip
            case m.Adopted(rank=rank, incarnation=incarnation, epoch=epoch, trigger=trigger):
                log.debug("rank %d.%d adopted epoch %d (%s)", rank, incarnation, epoch, trigger)
            case _:
                pass
