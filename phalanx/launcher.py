"""The launcher of the first host: it spawns the server and a crew, decides who is started again, and tells everybody
who died.

A dead rank gets another process, the next incarnation, which prepares alone and asks the others to be let in. Nothing
here waits for anything but the next event. This launcher also owns the store in which the ranks agree, so it must live:
docs/failures.md says what that means. Other hosts have a launcher that only obeys (`agent`); to this one their ranks
are ranks like its own, a little further away.
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
from typing import TYPE_CHECKING

import msgspec
import zmq

from phalanx import __version__
from phalanx import messages as m
from phalanx.config import ServeConfig
from phalanx.crew import STOP_PATIENCE_S, STOPPED, UNBORN, Crew, wait_until
from phalanx.halts import Halts
from phalanx.hosts.muster import Events, Muster
from phalanx.hosts.places import Terms, next_incarnation
from phalanx.hosts.talk import Halted, NoticeCause, Report
from phalanx.incarnations import Incarnations, Worker
from phalanx.process import adopt_orphans, launcher_endpoint, server_endpoint, wake_on_signals
from phalanx.remains import stale_keys
from phalanx.restarts import Barren, Restarts
from phalanx.server_process import ServerProcess

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

log = logging.getLogger("phalanx.launcher")

FIRST_WORLD = "world/1"
"""The store's key for the outcome of the first meeting (`elastic.agree`)."""

COMING = "coming/{}"
"""The store's key for the incarnation of a rank that was started and will ask to be let in."""

MEETING_LOOK_S = 0.5
"""How often it is looked whether the ranks have met for the first time, when one is to be started again then."""

EVICTION_GRACE_S = 1.0
"""An evicted process that can still run finds out and ends by itself; one that has not by then is killed."""


class Launcher:
    """Runs one service from its start to its end."""

    def __init__(self, config: ServeConfig, listener: socket.socket, faults: str = "", *, model: str = "") -> None:
        """model: what other hosts' models must equal (`hosts.places.Terms`)."""
        self.config = config
        self._stopping = False
        self._exit_code = 0
        self._why = "it was asked to stop"
        self._run_dir = tempfile.mkdtemp(prefix="phalanx-")
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._workers = Incarnations()
        self._restarts = Restarts(config.max_restarts if config.elastic else 0, config.restart_window_s)
        self._due: dict[int, float] = {}
        """When a dead rank is to be started again. Until the ranks have met for the first time nobody is."""
        self._barren = {node: Barren() for node in range(config.nnodes)}
        """By host: ranks that cannot be started because no process can be forked there."""
        self._in_use = set(range(config.ep_size))
        """The places where the dead are started again: those that an operator wants."""
        self._added: set[int] = set()
        """Those of them that were vacant and whose process is not in yet."""
        self._epoch = 0
        self._met = False
        """Whether the ranks are known to have met; see `_have_met`."""
        self._members: set[tuple[int, int]] = set()
        self._halts = Halts(config.roll_call_timeout_s)
        adopt_orphans()
        self._wake = wake_on_signals()
        self._others = self._muster(model)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(launcher_endpoint(self._run_dir))
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.setsockopt(zmq.LINGER, 500)
        self._outbox.connect(server_endpoint(self._run_dir))
        self._server = ServerProcess(config, self._run_dir, listener)
        self._crew = Crew(
            config, self._run_dir, self._poller, self._hear_of_worker, site=self._others.site, faults=faults
        )  # fmt: skip
        self._store = self._start_store()

    def _muster(self, model: str) -> Muster:
        events = Events(self._host_joined, self._host_lost, self._hear_of_worker, self._deaths)
        try:
            return Muster(
                self.config, Terms.of(self.config, __version__, model), self._run_dir, self._poller, events
            )  # fmt: skip
        except BaseException:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            raise

    # --- life

    def run(self) -> int:
        """Serve until asked to stop; the exit code. LOCAL, blocks."""
        try:
            for source in (self._wake, self._server.pidfd, self._inbox):
                self._poller.register(source, zmq.POLLIN)
            self._crew.begin(self._store.port)
            self._others.open(self._store.port)
            self._tell_hosts()
            for rank in self._in_use.intersection(self._others.places.ranks_of(0)):
                self._start(rank)
            while not self._stopping:
                self._serve_events(dict(self._poller.poll(self._patience_ms())))
                self._do_what_is_due(time.monotonic())
            return self._exit_code
        finally:
            self._shut_down()

    def _serve_events(self, events: dict[object, int]) -> None:
        self._crew.serve(events)  # deaths before anything else
        self._others.serve(events)
        if self._wake in events:
            os.read(self._wake, 64)
            log.info("asked to stop: finishing streams for at most %.0f s", self.config.drain_timeout_s)
            self._stopping = True
        if self._server.pidfd in events:
            code = self._server.wait()
            self._stopping = True
            if code != 0:
                self._fail(f"the HTTP server ended with exit code {code}: stopping the service")
        if self._inbox in events:
            self._drain_inbox()

    def _drain_inbox(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                message = m.to_launcher_decoder.decode(self._inbox.recv(zmq.NOBLOCK))
                match message:
                    case m.Signal(rank=rank, name=name):
                        self._signal(rank, signal.Signals[name])
                    case m.MaskRank(rank=rank):
                        self._mask(rank)
                    case m.StartRank(rank=rank):
                        self._start_by_hand(rank)
                    case m.UseRanks(ranks=ranks):
                        self._use(set(ranks))
                    case m.ViewChanged(epoch=epoch, members=members, serving=serving):
                        self._hear_view(epoch, set(members), serving)
                    case m.ShutDown(reason=reason):
                        self._fail(f"the service cannot go on: {reason}")

    def _fail(self, why: str) -> None:
        log.error("%s", why)
        self._why, self._exit_code, self._stopping = why, 1, True

    # --- children

    def _start_store(self) -> TCPStore:
        """Importing torch for it costs nobody time: meanwhile the nursery imports the same, and more, and nobody can be
        born before that is done. In a process of its own it could die alone, and the service with it."""
        from datetime import timedelta

        from torch._C._distributed_c10d import TCPStore  # late: the others import by now

        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))

    def _start(self, rank: int) -> None:
        """Have the next process of a rank started on its host; `_hear_of_worker` is told when it is there."""
        last = self._workers.of(rank)
        incarnation = next_incarnation(last.incarnation if last else None, self._have_met())
        if incarnation:
            log.info("rank %d is started, as %d.%d", rank, rank, incarnation)
            self._store.set(COMING.format(rank), str(incarnation))
        self._workers.add(Worker(rank, incarnation))
        self._hands(rank).start(rank, incarnation, scaled=rank in self._added)

    def _hands(self, rank: int) -> Crew | Muster:
        """Whoever looks after a rank's process."""
        return self._crew if self._others.places.host_of(rank) == 0 else self._others

    def _have_met(self) -> bool:
        """Whether there is a first World, though all who made it may have died before they could say so."""
        self._met = self._met or self._store.check([FIRST_WORLD])
        return self._met

    # --- what is heard of workers and hosts

    def _hear_of_worker(self, report: Report) -> None:
        match report:
            case Halted():
                self._halted(report)
                return
            case m.Spawned(rank=rank, incarnation=incarnation):
                worker = self._workers.current(rank, incarnation)
                if worker is None:
                    return
                worker.pid, worker.born_s = report.pid, time.monotonic()
                self._barren[self._others.places.host_of(rank)].born()
                if incarnation:
                    worker.doomed_s = worker.born_s + self.config.warmup_timeout_s + self.config.roll_call_timeout_s
                if rank not in self._in_use:
                    self._retire(worker)
            case m.Died(cause=cause):
                if cause == UNBORN:
                    self._unborn(report)
                else:
                    self._died(report)
                return
        self._tell(report)

    def _died(self, report: m.Died) -> None:
        """A worker's process is gone. The board of its own host says so already."""
        if self._hands(report.rank) is self._others:
            self._crew.notice(report.rank, report.incarnation, "exit")
        self._others.notice(report.rank, report.incarnation, "exit")
        worker = self._workers.current(report.rank, report.incarnation)
        if worker is not None and worker.retired and report.detail == STOPPED:
            report = msgspec.structs.replace(report, cause="left")
        self._tell(report)
        self._halts.forget(report.rank, report.incarnation)
        if worker is None:
            return
        worker.alive = False
        if self._stopping:
            return
        if not self._workers.anybody and not self._have_met():
            self._fail("no rank lived to the first meeting: stopping the service")
        elif worker.rank not in self._in_use:
            log.info("rank %d is out of use", worker.rank)
        elif not self.config.elastic:
            self._fail("a rank is gone and --no-elastic is set: stopping the service")
        elif worker.called_back:
            self._start_by_hand(worker.rank)
        elif worker.masked:
            again = "scaling up again" if worker.rank in self._added else '{"instruction": "rejoin"}'
            self._give_up(worker, f"taken out by an operator: {again} brings it back")
        elif worker.retired:  # its place is wanted again already
            self._due[worker.rank] = time.monotonic()
        else:
            self._plan_restart(worker, report.detail)

    def _halted(self, report: Halted) -> None:
        """A worker is stopped, or was. The others need not wait for it any longer than a roll call would."""
        living = self._workers.unmasked(self._members)
        worker = self._workers.current(report.rank, report.incarnation)
        if worker is not None and worker.is_coming:
            living.add((report.rank, report.incarnation))
        seconds = self._halts.heard(report.rank, report.incarnation, report.seconds, living)
        if seconds is not None and self.config.elastic:
            log.warning(
                "rank %d.%d has been stopped for %.1f s: the others go on without it",
                report.rank, report.incarnation, seconds,
            )  # fmt: skip
            self._notice(report.rank, report.incarnation, "halted")
            if worker is not None and worker.is_coming:  # nobody evicts it
                worker.doomed_s = time.monotonic()

    def _unborn(self, report: m.Died) -> None:
        """A process that was asked for cannot be forked: nobody ever had this name, so the next one may."""
        worker = self._workers.current(report.rank, report.incarnation)
        if worker is None:
            return
        worker.alive = False
        if worker.incarnation:
            worker.incarnation -= 1
        else:  # the others must not wait for it
            self._notice(worker.rank, 0, "exit")
            self._tell(m.Died(rank=worker.rank, incarnation=0, cause="exit", detail="it never started"))
        self._wait_for_a_nursery(worker)

    def _wait_for_a_nursery(self, worker: Worker) -> None:
        barren = self._barren[self._others.places.host_of(worker.rank)]
        self._give_up(worker, barren.add([worker.rank], time.monotonic()))

    def _notice(self, rank: int, incarnation: int, cause: NoticeCause) -> None:
        """Everybody's waits are to know of a death."""
        self._crew.notice(rank, incarnation, cause)
        self._others.notice(rank, incarnation, cause)

    def _deaths(self) -> list[tuple[int, int, NoticeCause]]:
        """The last death of each rank, as a new notice board is to have it."""
        board = self._crew.board
        return [(rank, int(dead), board.cause(rank)) for rank, dead in enumerate(board.dead_words) if dead >= 0]

    def _host_joined(self, node_rank: int, host: str) -> None:
        ranks = self._others.places.ranks_of(node_rank)
        self._tell(m.HostState(node_rank=node_rank, host=host, state="alive", ranks=ranks))
        self._barren[node_rank] = Barren()
        for rank in self._in_use.intersection(ranks) if not self._stopping else ():
            self._restarts.forget(rank)
            if self._workers.of(rank) is None and not self._have_met():
                self._start(rank)
            else:
                self._due[rank] = time.monotonic()

    def _host_lost(self, node_rank: int, reason: str) -> None:
        """All its ranks are dead in one moment: first the boards, then the rest."""
        ranks = self._others.places.ranks_of(node_rank)
        gone = [worker for rank in ranks if (worker := self._workers.living(rank)) is not None]
        for worker in gone:
            worker.alive = False
            self._notice(worker.rank, worker.incarnation, "host")
        for rank in ranks:
            self._due.pop(rank, None)
        self._tell(
            m.HostState(
                node_rank=node_rank, state="lost", ranks=ranks, reason=reason,
                lost=[(worker.rank, worker.incarnation) for worker in gone],
            )
        )  # fmt: skip
        level = logging.INFO if self._stopping else logging.WARNING
        log.log(level, "lost host %d (ranks %s): %s", node_rank, ranks, reason)
        if self._stopping:
            return
        if not self._workers.anybody and not self._have_met():
            self._fail("no rank lived to the first meeting: stopping the service")
        elif not self.config.elastic:
            self._fail("a host is gone and --no-elastic is set: stopping the service")

    def _tell_hosts(self) -> None:
        """The server is to know all hosts from the start."""
        site, places = self._others.site, self._others.places
        for node in range(self.config.nnodes):
            state: m.HostPhase = "waiting" if node else "alive"
            host = "" if node else site.host if site else "localhost"
            self._tell(m.HostState(node_rank=node, host=host, state=state, ranks=places.ranks_of(node)))

    # --- the dead come back

    def _plan_restart(self, worker: Worker, last_words: str) -> None:
        now = time.monotonic()
        delay_s = self._restarts.delay_s(worker.rank, now - (worker.born_s or now), now)
        if delay_s is None:
            again = ("scaling up again",) if worker.rank in self._added else ()
            self._give_up(worker, self._restarts.why_not(last_words, *again))
        else:
            self._due[worker.rank] = now + delay_s

    def _give_up(self, worker: Worker, reason: str) -> None:
        self._tell(m.GivenUp(rank=worker.rank, incarnation=worker.incarnation, reason=reason))
        if self.config.max_restarts:
            log.error("rank %d is not started again: %s", worker.rank, reason)

    def _start_by_hand(self, rank: int) -> None:
        worker, node = self._workers.of(rank), self._others.places.host_of(rank)
        if worker is not None and worker.alive and (worker.masked or (worker.member and worker.doomed_s is not None)):
            log.warning("rank %d will be started again by an operator when its process has ended", rank)
            worker.called_back = True
            return
        if worker is None or worker.alive or rank not in self._in_use:
            log.warning("rank %d is not dead: nothing to do", rank)
            return
        if node and not self._others.is_in(node):
            log.warning("rank %d cannot be started: its host %d is not there", rank, node)
            return
        log.warning("rank %d is started again by an operator", rank)
        self._restarts.forget(rank)
        self._due |= dict.fromkeys({rank, *self._barren[node].take()}, time.monotonic())

    def _use(self, ranks: set[int]) -> None:
        """An operator wants these places in use, and no others. Members that are to go leave by a view change first:
        what is ended here has not come in yet."""
        gone, new = self._in_use - ranks, ranks - self._in_use
        self._in_use, self._added = ranks, (self._added | new) & ranks
        for rank in gone:
            self._due.pop(rank, None)
            worker = self._workers.living(rank)
            if worker is not None and worker.pid and not worker.member:
                self._retire(worker)
        for rank in new:
            if self._workers.living(rank) is None:
                self._restarts.forget(rank)
                self._due[rank] = time.monotonic()

    def _retire(self, worker: Worker) -> None:
        """Ask a process to end whose place is not in use, also one that was stopped."""
        worker.retired = True
        worker.doomed_s = time.monotonic() + STOP_PATIENCE_S
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._hands(worker.rank).signal(worker.rank, worker.incarnation, number)

    def _hear_view(self, epoch: int, members: set[tuple[int, int]], serving: bool) -> None:
        """Who is in, as the ranks agreed. A process that is evicted has no right to anything, and its place is needed.

        With --max-restarts 0 it is left alone: it ends by itself as soon as it runs."""
        if epoch <= self._epoch:
            return
        self._epoch, self._members, self._met = epoch, members, True
        for key in stale_keys(self._store.list_keys(), epoch, self._workers.names()):
            self._store.delete_key(key)
        for worker in self._workers:
            if not worker.alive:
                continue
            if (worker.rank, worker.incarnation) in members:
                worker.member, worker.doomed_s = True, None
                self._added.discard(worker.rank)
            elif worker.member and worker.rank not in self._in_use:
                if serving and not worker.retired:
                    self._retire(worker)
            elif worker.member and worker.doomed_s is None and self.config.max_restarts:
                worker.doomed_s = time.monotonic() + EVICTION_GRACE_S

    def _patience_ms(self) -> int | None:
        """Until when an event is waited for; None: for ever."""
        due = [*self._due.values()]
        if due and not self._met:
            due = [time.monotonic() + MEETING_LOOK_S]
        due += self._workers.due_s()
        wanted = [self._crew.due_s(), self._others.due_s(), *(barren.again_s for barren in self._barren.values())]
        due += [at for at in wanted if at is not None]
        return int(1000 * max(0.0, min(due) - time.monotonic())) + 1 if due else None

    def _do_what_is_due(self, now: float) -> None:
        self._others.tick(now)
        self._crew.tick({self._server.pid})
        if self._crew.failed and not self._workers.anybody and not self._stopping:
            self._fail("no worker is left, and none can be started: stopping the service")
        for barren in self._barren.values():
            if barren.again_s is not None and now >= barren.again_s and not self._stopping:
                self._due |= dict.fromkeys(barren.take(), now)
        for worker in self._workers.take_due(now):
            log.warning(
                "killing rank %d.%d (pid %d): it %s", worker.rank, worker.incarnation, worker.pid, worker.why_doomed
            )
            self._hands(worker.rank).signal(worker.rank, worker.incarnation, signal.SIGKILL)
        for rank in [rank for rank, at in self._due.items() if now >= at and self._have_met() and not self._stopping]:
            del self._due[rank]
            node = self._others.places.host_of(rank)
            if node and not self._others.is_in(node):
                log.warning("rank %d cannot be started: its host %d is not there", rank, node)
            elif self._barren[node].again_s is not None:
                self._wait_for_a_nursery(self._workers.of(rank) or self._workers.add(Worker(rank, 0, alive=False)))
            else:
                self._start(rank)

    # --- an operator's hand

    def _signal(self, rank: int, number: signal.Signals) -> None:
        worker = self._workers.living(rank)
        if worker is None or not worker.pid:
            log.warning("no live process in rank %d to send %s to", rank, number.name)
            return
        log.warning("sending %s to rank %d (pid %d), as asked", number.name, rank, worker.pid)
        self._hands(rank).signal(rank, worker.incarnation, number)

    def _mask(self, rank: int) -> None:
        """An operator takes a rank out: to its peers it is dead from this word on, and it exits when it reads it."""
        worker = self._workers.living(rank)
        if worker is None or not worker.pid:
            log.warning("no live process in rank %d to mask", rank)
            return
        log.warning("rank %d.%d is masked by an operator", rank, worker.incarnation)
        worker.masked = True
        if not worker.member:  # nobody would evict it, should it hang
            worker.doomed_s = time.monotonic() + EVICTION_GRACE_S
        self._notice(rank, worker.incarnation, "operator")

    def _tell(self, message: m.Spawned | m.Died | m.GivenUp | m.VaultState | m.HostState) -> None:
        with contextlib.suppress(zmq.Again):
            self._outbox.send(m.encode(message), zmq.NOBLOCK)

    # --- end

    def _shut_down(self) -> None:
        self._stopping = self._crew.stopping = True
        self._crew.close_nursery()
        self._server.end(self._turn, self.config.drain_timeout_s + STOP_PATIENCE_S)
        self._poller.unregister(self._server.pidfd)
        self._others.end(self._why, failed=self._exit_code != 0)
        self._crew.close(self._turn)
        wait_until(lambda: self._others.empty, self._turn, STOP_PATIENCE_S)
        self._others.close()
        self._context.destroy(linger=0)
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def _turn(self, seconds: float) -> bool:
        """Wait for an event on the way to the end, and go on telling who dies meanwhile: streams that are to finish are
        still moved. False when asked to stop once more."""
        due = self._others.due_s()
        patience = seconds if due is None else min(seconds, max(0.0, due - time.monotonic()))
        events = dict(self._poller.poll(int(patience * 1000) + 1))
        self._crew.bury(events)
        self._others.serve(events)
        self._others.tick(time.monotonic())
        if self._inbox in events:
            self._drain_inbox()
        if self._wake in events:
            os.read(self._wake, 64)
            log.warning("asked to stop once more: waiting no longer")
            return False
        return True
