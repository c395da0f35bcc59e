"""The crew: the processes of one host that its launcher looks after. Workers, the nursery, the vault's keeper.

A worker's end is seen through its pidfd within a millisecond. The first thing that happens then is one word on the
notice board, which every survivor of this host reads in its waits; only after that comes anything slow. Who is started,
and as which incarnation, is decided elsewhere (`launcher`, on the first host); this only does it, and tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec
import zmq

from phalanx import messages as m
from phalanx.comm.notices import Cause, NoticeBoard
from phalanx.config import ServeConfig
from phalanx.custodian import Custodian
from phalanx.endings import wait_status
from phalanx.halts import LOOK_S, Halt
from phalanx.hosts.talk import Halted, Report
from phalanx.model.known import described
from phalanx.nursery import Born, Nursery
from phalanx.process import EXIT_EVICTED, EXIT_STOPPED, VaultSpec, WorkerSpec, last_words
from phalanx.remains import reap_strangers, remove_files
from phalanx.wire import Site
from phalanx.world import Member

log = logging.getLogger("phalanx.launcher")

STOP_PATIENCE_S = 5.0
"""How long a process may take to end after it was asked to, before it is killed."""

UNBORN = "unborn"
"""The cause of a death that was none: the process that was asked for cannot be forked. It may be asked for again."""

STOPPED = "stopped"
"""What is said of a worker that ended because it was asked to."""

BIRTH_TICK_S = 1.0
"""How often it is looked whether a nursery that owes a worker still answers."""


@dataclass(frozen=True)
class Process:
    """One incarnation of a rank that runs on this host."""

    rank: int
    incarnation: int
    pid: int
    pidfd: int
    halt: Halt

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


class Crew:
    """All processes of a host but launcher and server."""

    def __init__(
        self,
        config: ServeConfig,
        run_dir: str,
        poller: zmq.Poller,
        report: Callable[[Report], None],
        *,
        site: Site | None = None,
        faults: str = "",
        nursery: Nursery | None = None,
    ) -> None:
        """report: is told what happens, in the launcher's loop. site: None when there is only this host. nursery: one
        that was started early, which this crew then closes; None: one is started here."""
        self._config, self._run_dir, self._poller, self._report = config, run_dir, poller, report
        self._site, self._faults = site, faults
        self._model = described(config)
        self._store_port = 0
        self._processes: dict[int, Process] = {}
        """By pidfd, those that run."""
        self._coming: dict[int, int] = {}
        """Incarnations by rank that are asked for and not there yet."""
        self._halted: set[int] = set()
        """By pidfd, those that were stopped at the last look."""
        self._look_s = 0.0
        self._keeper_waits = False
        self._away = False
        self.stopping = False
        self.board = NoticeBoard.create(config.places)
        self._nursery = nursery or Nursery()
        self._poller.register(self._nursery.fd, zmq.POLLIN)
        self._vault = Custodian(config, self._tell_of_vault, site)

    def begin(self, store_port: int) -> None:
        """The store can be reached, at this port of this host: workers may be started, and the vault is. LOCAL."""
        self._store_port = store_port
        spec = VaultSpec(
            config=self._config,
            run_dir=self._run_dir,
            store_host="127.0.0.1",
            store_port=store_port,
            notices=self.board.address,
            launcher_pid=os.getpid(),
            vault=self._vault.address,
            model=self._model,
            faults=self._faults,
            site=self._site,
        )
        self._vault.start(spec, self._nursery.ask)

    # --- what there is

    @property
    def empty(self) -> bool:
        """Whether no worker runs."""
        return not self._processes

    @property
    def failed(self) -> bool:
        """Whether nobody can be started any more."""
        return self._nursery.failed

    def due_s(self) -> float | None:
        """When `tick` is to be called, on the monotonic clock; None: whenever."""
        waiting = self._nursery.waiting and not self._nursery.failed
        due = [time.monotonic() + BIRTH_TICK_S] if waiting else []
        if self._processes or self._vault.pidfd >= 0:
            due.append(self._look_s)
        return min(due, default=None)

    # --- orders

    def start(self, rank: int, incarnation: int, *, scaled: bool = False) -> None:
        """Have a worker forked; it is reported when it is there, or dead of `UNBORN` when it cannot be. LOCAL."""
        if self._nursery.failed:
            log.info("trying again to start the process that forks workers")
            self._nursery.revive()
            self._poller.register(self._nursery.fd, zmq.POLLIN)
        self._coming[rank] = incarnation
        self._nursery.ask(
            WorkerSpec(
                config=self._config,
                rank=rank,
                incarnation=incarnation,
                run_dir=self._run_dir,
                store_host="127.0.0.1",
                store_port=self._store_port,
                notices=self.board.address,
                launcher_pid=os.getpid(),
                host=self._host,
                site=self._site,
                vault=self._vault.address,
                model=self._model,
                faults=self._faults,
                scaled=scaled,
                asked_s=time.monotonic(),
            )
        )

    def signal(self, rank: int, incarnation: int, number: signal.Signals) -> None:
        """Send a signal to an incarnation of a rank, if it runs. LOCAL."""
        for process in self._processes.values():
            if (process.rank, process.incarnation) == (rank, incarnation):
                process.signal(number)

    def notice(self, rank: int, incarnation: int, cause: Cause) -> None:
        """Every incarnation of a rank up to this one is dead, though its process may still run, or ran on another host:
        tell the workers of this host, those that sleep, too. LOCAL."""
        self.board.declare_dead(rank, incarnation, cause)
        self.board.poke([Member(p.rank, p.incarnation, pid=p.pid) for p in self._processes.values()])

    def disown(self) -> None:
        """The first host is out of reach: kill every worker, those that are being born included. The vault stays, but
        its keeper is not started again before `resume`. LOCAL."""
        self._away = True
        self._coming.clear()
        for process in self._processes.values():
            process.signal(signal.SIGKILL)

    def resume(self) -> None:
        """The first host is there again. LOCAL."""
        self._away = False
        if self._keeper_waits:
            self._keeper_waits = False
            self._vault.buried()

    # --- events

    def serve(self, events: dict[object, int]) -> None:
        """Take in who was born, bury who died. LOCAL."""
        self.bury(events)  # deaths before anything else
        if self._nursery.fd in events:
            self._collect()
        if self._vault.pidfd in events:
            self._poller.unregister(self._vault.pidfd)
            if self._away:
                self._keeper_waits = True
            else:
                self._vault.buried()

    def tick(self, known: Collection[int] = ()) -> None:
        """Find a nursery that hangs and processes that are stopped, and wait for children that nobody knows. known:
        those that the launcher itself started. LOCAL."""
        if (now := time.monotonic()) >= self._look_s:
            self._look_s = now + LOOK_S
            self._look(now)
        if self._nursery.waiting and not self._nursery.failed:
            self._collect()
        self._nursery.keep_a_spare()
        if not self._nursery.waiting:  # otherwise a newborn may not be known yet
            pids = (process.pid for process in self._processes.values())
            reap_strangers({self._nursery.pid, self._vault.pid, *known, *pids})

    def _look(self, now: float) -> None:
        """Tell who is stopped, and who no longer is."""
        for pidfd, process in list(self._processes.items()):
            seconds = process.halt.look(now)
            if seconds is not None or pidfd in self._halted:
                self._report(Halted(rank=process.rank, incarnation=process.incarnation, seconds=seconds))
            (self._halted.discard if seconds is None else self._halted.add)(pidfd)
        self._vault.look(now)

    def bury(self, events: dict[object, int]) -> None:
        """Only the first half of `serve`. LOCAL."""
        for process in [process for pidfd, process in self._processes.items() if pidfd in events]:
            self._buried(process)

    def _buried(self, process: Process) -> None:
        """A worker's process is gone: tell the survivors first, then find out why, then tell the others."""
        self.board.declare_dead(process.rank, process.incarnation, "exit")
        self._poller.unregister(process.pidfd)
        del self._processes[process.pidfd]
        self._halted.discard(process.pidfd)
        os.close(process.pidfd)
        cause, detail = self._autopsy(process)
        remove_files(self._run_dir, process.rank, process.incarnation)
        log.log(
            logging.INFO if self.stopping or detail == STOPPED else logging.WARNING,
            "rank %d.%d (pid %d) ended: %s", process.rank, process.incarnation, process.pid, detail,
        )  # fmt: skip
        self._report(m.Died(rank=process.rank, incarnation=process.incarnation, cause=cause, detail=detail))

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
        for spec in self._nursery.forsake():
            if self._coming.get(spec.rank) == spec.incarnation:
                del self._coming[spec.rank]
                why = "no process can be started: the one that forks workers ends each time"
                self._report(m.Died(rank=spec.rank, incarnation=spec.incarnation, cause=UNBORN, detail=why))

    def _take_in(self, born: Born) -> None:
        if isinstance(born.spec, VaultSpec):
            self._vault.born(born.pid, born.pidfd)
            self._poller.register(born.pidfd, zmq.POLLIN)
            return
        process = Process(born.spec.rank, born.spec.incarnation, born.pid, born.pidfd, Halt(born.pid))
        self._processes[process.pidfd] = process
        self._poller.register(process.pidfd, zmq.POLLIN)
        if self._coming.get(process.rank) != process.incarnation:
            process.signal(signal.SIGKILL)  # asked for by a first host that was lost meanwhile
            return
        del self._coming[process.rank]
        self._report(
            m.Spawned(rank=process.rank, incarnation=process.incarnation, pid=process.pid, host=self._host)
        )  # fmt: skip

    def _autopsy(self, process: Process) -> tuple[str, str]:
        status = wait_status(process.pid)
        if status is None:
            return "exit", "its exit status is unknown: a debugger may have it"
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return "signal", f"killed by {_signal_name(-code)}"
        if code == EXIT_STOPPED:
            return "exit", STOPPED
        if code == EXIT_EVICTED:
            return "evicted", "the others had gone on without it"
        with contextlib.suppress(OSError):
            path = last_words(self._run_dir, process.rank, process.incarnation)
            with open(path, encoding="utf-8") as file:
                return "exception", file.read().strip()
        return "exception", f"exit code {code}"

    def _tell_of_vault(self, state: m.VaultState) -> None:
        node_rank = self._site.node_rank if self._site else 0
        self._report(msgspec.structs.replace(state, node_rank=node_rank))

    @property
    def _host(self) -> str:
        return self._site.host if self._site else "localhost"

    # --- end

    def close_nursery(self) -> None:
        """Nobody is born any more, and the vault goes; those who mapped it keep it. LOCAL."""
        if self._nursery.fd in self._poller:
            self._poller.unregister(self._nursery.fd)
        if self._vault.pidfd >= 0 and self._vault.pidfd in self._poller:
            self._poller.unregister(self._vault.pidfd)
        self._vault.close()

    def close(self, turn: Callable[[float], bool]) -> None:
        """Ask all workers to end, and kill those that do not in time. turn: waits for events for up to so many seconds
        and has them served; False: wait no longer. LOCAL, blocks."""
        self.stopping = True
        self._nursery.close()
        for process in self._processes.values():
            process.signal(signal.SIGTERM)
            process.signal(signal.SIGCONT)  # a stopped one must be able to hear it
        wait_until(lambda: self.empty, turn, STOP_PATIENCE_S)
        for process in list(self._processes.values()):
            process.signal(signal.SIGKILL)
            self._buried(process)


def wait_until(done: Callable[[], bool], turn: Callable[[float], bool], patience_s: float) -> bool:
    """Call `turn` with the seconds left until it says False, the time is over, or `done`; whether it is. LOCAL."""
    deadline = time.monotonic() + patience_s
    while not done():
        left = deadline - time.monotonic()
        if left <= 0 or not turn(left):
            return False
    return True


def _signal_name(number: int) -> str:
    """Most real-time signals have no name of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
