"""The launcher: one a host. It spawns server and workers, watches them, tells everybody who died, and starts the dead
again.

A worker's end is seen through its pidfd within a millisecond. The first thing that happens then is one word on the
notice board, which every survivor reads in its waits; only after that comes anything slow. A dead rank gets another
process, the next incarnation, which prepares alone and asks the others to be let in. Nothing here waits for anything
but the next event. The launcher also owns the store in which the ranks agree, so it must live: docs/failures.md says
what that means.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import zmq

from phalanx import messages as m
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.custodian import Custodian
from phalanx.errors import BadConfig
from phalanx.nursery import Born, Nursery
from phalanx.process import (
    EXIT_EVICTED,
    EXIT_STOPPED,
    VaultSpec,
    WorkerSpec,
    adopt_orphans,
    last_words,
    launcher_endpoint,
    server_endpoint,
)
from phalanx.remains import reap_strangers, remove_files, stale_keys
from phalanx.restarts import Barren, Restarts
from phalanx.world import Member

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

log = logging.getLogger("phalanx.launcher")

STOP_PATIENCE_S = 5.0
"""How long a process may take to end after it was asked to, before it is killed."""

FIRST_WORLD = "world/1"
"""The store's key for the outcome of the first meeting (`elastic.agree`)."""

COMING = "coming/{}"
"""The store's key for the incarnation of a rank that was started and will ask to be let in."""

EVICTION_GRACE_S = 1.0
"""An evicted process that can still run finds out and ends by itself; one that has not by then is killed."""

BIRTH_TICK_S = 1.0
"""How often it is looked whether a nursery that owes a worker still answers."""


@dataclass
class Worker:
    """One incarnation of a rank, as the launcher sees it."""

    rank: int
    incarnation: int
    pid: int
    pidfd: int
    born_s: float
    alive: bool = True
    masked: bool = False
    called_back: bool = False
    """It is out, its process has not ended yet, and an operator wants another one in its place."""
    member: bool = False
    """It was in a view."""
    retired: bool = False
    """Its place is no longer in use, and it was asked to end."""
    doomed_s: float | None = None
    """When it is to be killed, if it still lives: it was evicted, or has had all the time there is to come in."""


def bind(config: ServeConfig) -> socket.socket:
    """Bind, but do not yet listen on, the HTTP address. BadConfig when it is taken. LOCAL."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadConfig(
            f"cannot bind --host {config.host} --port {config.port}: {reason}; choose another (0: any free port)"
        ) from None
    return listener


class Launcher:
    """Runs one service on this host from its start to its end."""

    def __init__(self, config: ServeConfig, listener: socket.socket, faults: str = "") -> None:
        self.config = config
        self._faults = faults
        self._stopping = False
        self._exit_code = 0
        self._run_dir = tempfile.mkdtemp(prefix="phalanx-")
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._workers: dict[int, Worker] = {}
        self._by_pidfd: dict[int, Worker] = {}
        self._restarts = Restarts(config.max_restarts if config.elastic else 0, config.restart_window_s)
        self._due: dict[int, float] = {}
        """When a dead rank is to be started again. Until the ranks have met for the first time nobody is."""
        self._coming: set[int] = set()
        """Ranks whose next process is asked for and not there yet."""
        self._barren = Barren()
        self._in_use = set(range(config.ep_size))
        """The places where the dead are started again: those that an operator wants."""
        self._added: set[int] = set()
        """Those of them that were vacant and whose process is not in yet."""
        self._epoch = 0
        adopt_orphans()
        self._wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the wake-up pipe carries it into the loop
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(launcher_endpoint(self._run_dir))
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.setsockopt(zmq.LINGER, 500)
        self._outbox.connect(server_endpoint(self._run_dir))
        self._server, self._server_pidfd = self._start_server(listener)
        self._nursery = Nursery()
        self._notices = NoticeBoard.create(config.places)
        self._store = self._start_store()
        self._vault = Custodian(config, self._tell)

    # --- life

    def run(self) -> int:
        """Serve until asked to stop; the exit code. LOCAL, blocks."""
        try:
            for source in (self._wake, self._server_pidfd, self._nursery.fd, self._inbox):
                self._poller.register(source, zmq.POLLIN)
            for rank in range(self.config.ep_size):
                self._ask_for(rank, incarnation=0)
            self._fill_vault()
            while not self._stopping:
                self._serve_events(dict(self._poller.poll(self._patience_ms())))
                self._do_what_is_due(time.monotonic())
                if not self._nursery.waiting:  # otherwise a newborn may not be known yet
                    reap_strangers({self._server.pid, self._nursery.pid, self._vault.pid, *self._pids})
            return self._exit_code
        finally:
            self._shut_down()

    def _serve_events(self, events: dict[object, int]) -> None:
        self._bury(events)  # deaths before anything else
        if self._nursery.fd in events:
            self._collect()
        if self._vault.pidfd in events:
            self._poller.unregister(self._vault.pidfd)
            self._vault.buried()
        if self._wake in events:
            os.read(self._wake, 64)
            log.info("asked to stop: finishing streams for at most %.0f s", self.config.drain_timeout_s)
            self._stopping = True
        if self._server_pidfd in events:
            code = self._server.wait()
            self._stopping = True
            if code != 0:
                log.error("the HTTP server ended with exit code %s: stopping the service", code)
                self._exit_code = 1
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
                        log.error("the service cannot go on: %s", reason)
                        self._exit_code = 1
                        self._stopping = True

    # --- children

    def _start_server(self, listener: socket.socket) -> tuple[subprocess.Popen[bytes], int]:
        path = os.path.join(self._run_dir, "config.json")
        with open(path, "wb") as file:
            file.write(msgspec.json.encode(self.config))
        fd = listener.fileno()
        flags = ["--config", path, "--run-dir", self._run_dir, "--fd", str(fd)]
        flags += ["--launcher-pid", str(os.getpid())]  # by the time it could ask for its parent, we may be gone
        command = [sys.executable, "-m", "phalanx.server", *flags]
        process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, start_new_session=True)
        listener.close()
        return process, os.pidfd_open(process.pid)

    def _start_store(self) -> TCPStore:
        from datetime import timedelta

        from torch._C._distributed_c10d import TCPStore  # late: by now the others import it, too

        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))

    def _ask_for(self, rank: int, incarnation: int) -> None:
        """Have a worker forked; `_collect` takes it in when it is there."""
        spec = WorkerSpec(
            config=self.config,
            rank=rank,
            incarnation=incarnation,
            run_dir=self._run_dir,
            store_host="127.0.0.1",
            store_port=self._store.port,
            notices=self._notices.address,
            launcher_pid=os.getpid(),
            vault=self._vault.address,
            faults=self._faults,
            scaled=rank in self._added,
            asked_s=time.monotonic(),
        )
        self._coming.add(rank)
        if incarnation:
            self._store.set(COMING.format(rank), str(incarnation))
        self._nursery.ask(spec)

    def _collect(self) -> None:
        """Take in who was born. A nursery that died meanwhile was replaced."""
        before = self._nursery.fd
        for born in self._nursery.collect():
            self._take_in(born)
        if self._nursery.fd != before or self._nursery.failed:
            self._poller.unregister(before)
            if self._nursery.failed:
                self._nobody_is_born()
            else:
                self._poller.register(self._nursery.fd, zmq.POLLIN)

    def _nobody_is_born(self) -> None:
        self._vault.nobody_is_born()
        owed = {spec.rank: spec for spec in self._nursery.forsake()}
        self._coming -= owed.keys()
        for rank, spec in owed.items():
            if rank not in self._workers:  # the others must not wait for it
                self._workers[rank] = Worker(rank, spec.incarnation, 0, -1, time.monotonic(), alive=False)
                self._notices.declare_dead(rank, spec.incarnation, "exit")
                self._tell(m.Died(rank=rank, incarnation=spec.incarnation, cause="exit", detail="it never started"))
        self._wait_for_a_nursery(owed.keys())

    def _wait_for_a_nursery(self, ranks: Iterable[int]) -> None:
        for rank in list(ranks):
            self._due.pop(rank, None)
            reason = self._barren.add([rank], time.monotonic())
            self._give_up(self._workers[rank], reason)

    def _revive_nursery(self) -> None:
        log.info("trying again to start the process that forks workers")
        self._nursery.revive()
        self._poller.register(self._nursery.fd, zmq.POLLIN)
        self._due |= dict.fromkeys(self._barren.take(), time.monotonic())

    def _take_in(self, born: Born) -> None:
        if isinstance(born.spec, VaultSpec):
            self._vault.born(born.pid, born.pidfd)
            self._poller.register(born.pidfd, zmq.POLLIN)
            return
        rank, incarnation = born.spec.rank, born.spec.incarnation
        worker = Worker(rank, incarnation, born.pid, born.pidfd, time.monotonic())
        if incarnation:
            worker.doomed_s = worker.born_s + self.config.warmup_timeout_s + self.config.roll_call_timeout_s
        self._coming.discard(rank)
        self._barren.born()
        self._workers[rank] = self._by_pidfd[worker.pidfd] = worker
        self._poller.register(worker.pidfd, zmq.POLLIN)
        self._tell(m.Spawned(rank=rank, incarnation=incarnation, pid=born.pid))
        if rank not in self._in_use:
            self._retire(worker)

    def _bury(self, events: dict[object, int]) -> None:
        for fd in [fd for fd in events if fd in self._by_pidfd]:
            self._buried(self._by_pidfd[fd])

    def _fill_vault(self) -> None:
        spec = VaultSpec(
            config=self.config,
            run_dir=self._run_dir,
            store_host="127.0.0.1",
            store_port=self._store.port,
            notices=self._notices.address,
            launcher_pid=os.getpid(),
            vault=self._vault.address,
            faults=self._faults,
        )
        self._vault.start(spec, self._nursery.ask)

    def _buried(self, worker: Worker) -> None:
        """A worker's process is gone: tell the survivors first, then find out why, then tell the server."""
        worker.alive = False
        self._notices.declare_dead(worker.rank, worker.incarnation, "operator" if worker.masked else "exit")
        self._poller.unregister(worker.pidfd)
        del self._by_pidfd[worker.pidfd]
        os.close(worker.pidfd)
        cause, detail = self._autopsy(worker)
        remove_files(self._run_dir, worker.rank, worker.incarnation)
        cause = "left" if worker.retired and detail == "stopped" else cause
        log.log(
            logging.INFO if self._stopping or worker.retired else logging.WARNING,
            "rank %d.%d (pid %d) ended: %s", worker.rank, worker.incarnation, worker.pid, detail,
        )  # fmt: skip
        self._tell(m.Died(rank=worker.rank, incarnation=worker.incarnation, cause=cause, detail=detail))
        if self._stopping:
            return
        if not self._by_pidfd and not self._coming and not self._store.check([FIRST_WORLD]):
            log.error("no rank lived to the first meeting: stopping the service")
            self._exit_code, self._stopping = 1, True
        elif worker.rank not in self._in_use:
            log.info("rank %d is out of use", worker.rank)
        elif not self.config.elastic:
            log.error("a rank is gone and --no-elastic is set: stopping the service")
            self._exit_code, self._stopping = 1, True
        elif worker.called_back:
            self._start_by_hand(worker.rank)
        elif worker.masked:
            self._give_up(worker, 'taken out by an operator: {"instruction": "rejoin"} brings it back')
        elif worker.retired:  # its place is wanted again already
            self._due[worker.rank] = time.monotonic()
        else:
            self._plan_restart(worker, detail)

    # --- the dead come back

    def _plan_restart(self, worker: Worker, last_words: str) -> None:
        now = time.monotonic()
        delay_s = self._restarts.delay_s(worker.rank, now - worker.born_s, now)
        if delay_s is None:
            again = ("scaling up again",) if worker.rank in self._added else ()
            self._give_up(worker, self._restarts.why_not(last_words, *again))
        else:
            self._due[worker.rank] = now + delay_s

    def _give_up(self, worker: Worker, reason: str) -> None:
        if self.config.max_restarts:
            log.error("rank %d is not started again: %s", worker.rank, reason)
        self._tell(m.GivenUp(rank=worker.rank, incarnation=worker.incarnation, reason=reason))

    def _start_by_hand(self, rank: int) -> None:
        worker = self._workers.get(rank)
        if worker is not None and worker.alive and (worker.masked or (worker.member and worker.doomed_s is not None)):
            log.warning("rank %d will be started again by an operator when its process has ended", rank)
            worker.called_back = True
            return
        if worker is None or worker.alive or rank in self._coming or rank not in self._in_use:
            log.warning("rank %d is not dead: nothing to do", rank)
            return
        log.warning("rank %d is started again by an operator", rank)
        self._restarts.forget(rank)
        self._due[rank] = time.monotonic()
        if self._nursery.failed:
            self._revive_nursery()

    @property
    def _pids(self) -> list[int]:
        return [worker.pid for worker in self._by_pidfd.values()]

    # --- scaling

    def _use(self, ranks: set[int]) -> None:
        """An operator wants these places in use, and no others. Members that are to go leave by a view change first:
        what is ended here has not come in yet."""
        gone, new = self._in_use - ranks, ranks - self._in_use
        self._in_use, self._added = ranks, (self._added | new) & ranks
        for rank in gone:
            self._due.pop(rank, None)
            worker = self._workers.get(rank)
            if worker is not None and worker.alive and not worker.member:
                self._retire(worker)
        for rank in new:
            worker = self._workers.setdefault(rank, Worker(rank, 0, 0, -1, time.monotonic(), alive=False))
            if not worker.alive and rank not in self._coming:
                self._restarts.forget(rank)
                self._due[rank] = time.monotonic()

    def _retire(self, worker: Worker) -> None:
        """Ask a process to end whose place is not in use, also one that was stopped."""
        worker.retired = True
        worker.doomed_s = time.monotonic() + STOP_PATIENCE_S
        signal.pidfd_send_signal(worker.pidfd, signal.SIGTERM)
        signal.pidfd_send_signal(worker.pidfd, signal.SIGCONT)

    def _hear_view(self, epoch: int, members: set[tuple[int, int]], serving: bool) -> None:
        """Who is in, as the ranks agreed. A process that is evicted has no right to anything, and its place is needed.

        With --max-restarts 0 it is left alone: it ends by itself as soon as it runs."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        newest = {worker.rank: worker.incarnation for worker in self._workers.values()}
        for key in stale_keys(self._store.list_keys(), epoch, newest):
            self._store.delete_key(key)
        for worker in self._by_pidfd.values():
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
        now = time.monotonic()
        due = [*self._due.values()] if self._epoch else []
        due += [worker.doomed_s for worker in self._by_pidfd.values() if worker.doomed_s is not None]
        due += [now + BIRTH_TICK_S] if self._nursery.waiting and not self._nursery.failed else []
        due += [self._barren.again_s] if self._barren.again_s is not None else []
        return int(1000 * max(0.0, min(due) - now)) + 1 if due else None

    def _do_what_is_due(self, now: float) -> None:
        if self._nursery.failed and not self._by_pidfd and not self._stopping:
            log.error("no worker is left, and none can be started: stopping the service")
            self._exit_code, self._stopping = 1, True
        if self._barren.again_s is not None and now >= self._barren.again_s and not self._stopping:
            self._revive_nursery()
        if self._nursery.waiting and not self._nursery.failed:
            self._collect()  # also finds a nursery that hangs
        for worker in self._by_pidfd.values():
            if worker.doomed_s is not None and now >= worker.doomed_s:
                worker.doomed_s = None
                why = "was evicted and does not end" if worker.member else "did not come in in time"
                why = "was asked to end and does not" if worker.retired else why
                log.warning("killing rank %d.%d (pid %d): it %s", worker.rank, worker.incarnation, worker.pid, why)
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        ripe = [rank for rank, at in self._due.items() if now >= at and self._epoch and not self._stopping]
        if self._nursery.failed:
            self._wait_for_a_nursery(ripe)
            return
        for rank in ripe:
            del self._due[rank]
            incarnation = self._workers[rank].incarnation + 1
            log.info("rank %d is started, as %d.%d", rank, rank, incarnation)
            self._ask_for(rank, incarnation)

    def _autopsy(self, worker: Worker) -> tuple[str, str]:
        try:
            _, status = os.waitpid(worker.pid, 0)
        except ChildProcessError:
            return "exit", "its exit status is unknown"
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return "signal", f"killed by {_signal_name(-code)}"
        if code == EXIT_STOPPED:
            return "exit", "stopped"
        if code == EXIT_EVICTED:
            return "evicted", "the others had gone on without it"
        with contextlib.suppress(OSError):
            path = last_words(self._run_dir, worker.rank, worker.incarnation)
            with open(path, encoding="utf-8") as file:
                return "exception", file.read().strip()
        return "exception", f"exit code {code}"

    def _signal(self, rank: int, number: signal.Signals) -> None:
        worker = self._workers.get(rank)
        if worker is None or not worker.alive:
            log.warning("no live process in rank %d to send %s to", rank, number.name)
            return
        log.warning("sending %s to rank %d (pid %d), as asked", number.name, rank, worker.pid)
        signal.pidfd_send_signal(worker.pidfd, number)

    def _mask(self, rank: int) -> None:
        """An operator takes a rank out: to its peers it is dead from this word on, and it exits when it reads it."""
        worker = self._workers.get(rank)
        if worker is None or not worker.alive:
            log.warning("no live process in rank %d to mask", rank)
            return
        log.warning("rank %d.%d is masked by an operator", rank, worker.incarnation)
        worker.masked = True
        self._notices.declare_dead(rank, worker.incarnation, "operator")
        self._notices.poke([Member(w.rank, w.incarnation, pid=w.pid) for w in self._workers.values() if w.alive])

    def _tell(self, message: m.Spawned | m.Died | m.GivenUp | m.VaultState) -> None:
        with contextlib.suppress(zmq.Again):
            self._outbox.send(m.encode(message), zmq.NOBLOCK)

    # --- end

    def _shut_down(self) -> None:
        self._stopping = True
        if self._nursery.fd in self._poller:
            self._poller.unregister(self._nursery.fd)  # nobody is welcomed any more
        if self._vault.pidfd >= 0:
            self._poller.unregister(self._vault.pidfd)
        self._vault.close()  # those who mapped it keep it
        if self._server.poll() is None:
            self._server.terminate()
            if not self._await(lambda: self._server.poll() is not None, self.config.drain_timeout_s + STOP_PATIENCE_S):
                log.error("the HTTP server did not end in time: killing it")
                self._server.kill()
                self._server.wait()
        self._poller.unregister(self._server_pidfd)
        self._nursery.close()
        for worker in self._workers.values():
            if worker.alive:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGTERM)
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGCONT)  # a stopped one must be able to hear it
        self._await(lambda: not self._by_pidfd, STOP_PATIENCE_S)
        for worker in list(self._by_pidfd.values()):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
            self._buried(worker)
        self._context.destroy(linger=0)
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def _await(self, done: Callable[[], bool], patience_s: float) -> bool:
        """Wait for an end, and go on telling who dies meanwhile: streams that are to finish are still moved. False
        when it does not come in time, or when asked to stop once more."""
        deadline = time.monotonic() + patience_s
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            events = dict(self._poller.poll(int(left * 1000) + 1))
            self._bury(events)
            if self._inbox in events:
                self._drain_inbox()
            if self._wake in events:
                os.read(self._wake, 64)
                log.warning("asked to stop once more: waiting no longer")
                return False
        return True


def _signal_name(number: int) -> str:
    """Most real-time signals have no name of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
