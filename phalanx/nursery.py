"""The nursery: a warm process that has imported everything, and forks workers, and the vault's process, from itself.

A worker that starts cold spends seconds on imports; one that is forked here computes after some milliseconds. The
nursery runs no thread, no tensor operation and holds no device context, so a fork of it is clean.

A spare nursery stands by: it was forked by the nursery, too, so it shares its pages and costs little. When the
nursery dies, the spare one takes over at once and forks a spare of its own. Only when both are dead a new nursery has
to import everything.

Each worker is a grandchild: the process between ends at once, and the worker becomes the launcher's own child (the
launcher is a subreaper). So the launcher can wait for it, a worker dies with the launcher, and nothing is lost when
the nursery dies.

Protocol, over a SOCK_SEQPACKET pair: a packet holds one MessagePack `Spec` and brings the read end of a pipe; the
answer is one MessagePack integer, the pid. A packet with a `SpareSpec` brings the spare's own end of such a pair
instead. The newborn waits at the pipe until the launcher, who then knows it, lets it
go; when the launcher hangs up instead (the nursery died before it could answer), it ends without a trace. So no
identity is ever used by two processes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from phalanx.endings import DEATH_S, has_ended
from phalanx.process import EXIT_FAILED, SpareSpec, Spec, VaultSpec, WorkerSpec, die_with_parent

log = logging.getLogger("phalanx.launcher")

MAX_PACKET = 1 << 17

PATIENCE_S = 30.0
"""How long a birth may take, imports included, before the nursery counts as hung and is replaced."""

IMPORTS_S = 10.0
"""After so long a nursery is asked for a spare one though nobody was born yet; earlier, a birth might wait for that."""

MAX_BARREN = 3
"""Nurseries that may end in a row, without a single birth, before there is no other one until `revive`."""


@dataclass(frozen=True)
class Born:
    """A process that runs from now on. pidfd: to be closed by who takes it."""

    spec: Spec
    pid: int
    pidfd: int


class _Warm:
    """A process that forks others, as its parent sees it."""

    def __init__(self, pid: int, channel: socket.socket, started: subprocess.Popen[bytes] | None = None) -> None:
        """started: for one that was not forked by another one."""
        channel.setblocking(False)
        self.ready = started is None
        """Whether it has imported everything, as far as is known."""
        self.pid, self.socket, self._started = pid, channel, started
        self.since_s = time.monotonic()
        self._pidfd = os.pidfd_open(pid)  # nobody but us reaps it as long as its birth is awaited

    @property
    def alive(self) -> bool:
        return not has_ended(self._pidfd)

    def end(self) -> None:
        """End it, also when it is stopped or dead, or was ended before. LOCAL."""
        if self._pidfd < 0:
            return
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        has_ended(self._pidfd, DEATH_S)
        if self._started is not None:
            self._started.poll()
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)
        self._pidfd = -1


class Nursery:
    """The launcher's handle on its nursery process. No call waits for the nursery: births are asked for, and collected
    when `fd` is readable."""

    def __init__(self) -> None:
        self._wanted: deque[Spec] = deque()
        self._go: int | None = None
        """The write end of the pipe at which the process that is being born waits; its spec is the first wanted."""
        self._spare: _Warm | None = None
        self._spare_socket: socket.socket | None = None
        """Our end of the one that is being born."""
        self._asked_at = 0.0
        self._barren = 0
        self._current = self._start()

    def _start(self) -> _Warm:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "phalanx.nursery", str(theirs.fileno()), str(os.getpid())]
        # A session of its own: a Ctrl-C in the terminal is the launcher's to hear, not that of an import under way.
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ},  # a lost store is ours to tell, in one line
        )
        theirs.close()
        return _Warm(process.pid, mine, process)

    @property
    def fd(self) -> int:
        """Readable when `collect` has something to do; another one after each of its calls. LOCAL."""
        return self._current.socket.fileno()

    @property
    def pid(self) -> int:
        """The nursery's own process."""
        return self._current.pid

    @property
    def failed(self) -> bool:
        """Whether nobody is born any more, until `revive`: the nursery itself ends each time."""
        return self._barren >= MAX_BARREN

    @property
    def waiting(self) -> int:
        """Births asked for and not collected yet, that of a spare nursery included."""
        return len(self._wanted) + (self._spare_socket is not None)

    def ask(self, spec: Spec) -> None:
        """Ask for the process that `spec` describes. LOCAL."""
        self._wanted.append(spec)
        self._ask_next()

    def collect(self) -> list[Born]:
        """Who was born. Replaces a nursery that has died. LOCAL: takes milliseconds."""
        born: list[Born] = []
        if self.failed:
            return born
        try:
            while answer := self._current.socket.recv(64):
                pid = msgspec.msgpack.decode(answer, type=int)
                if self._spare_socket is not None:
                    self._spare, self._spare_socket = _Warm(pid, self._spare_socket), None
                else:
                    born.append(self._welcome(pid))
                self._ask_next()
            self._replace("ended")
        except BlockingIOError:
            if self._is_busy and time.monotonic() - self._asked_at > PATIENCE_S:
                self._replace("does not answer")
        except OSError:
            self._replace("ended")
        return born

    def keep_a_spare(self) -> None:
        """Have another spare nursery forked when the one that stood by has died, or when a new nursery, of which nobody
        has wanted anybody, has had time enough for its imports. LOCAL."""
        if self._spare is not None and not self._spare.alive:
            self._spare.end()
            self._spare = None
            self._ask_next()
        elif not self._current.ready and time.monotonic() - self._current.since_s > IMPORTS_S:
            self._current.ready = True
            self._ask_next()

    def forsake(self) -> list[WorkerSpec]:
        """The workers that are owed and will not come, for it has failed; they are owed no more. LOCAL."""
        workers = [spec for spec in self._wanted if isinstance(spec, WorkerSpec)]
        self._wanted = deque(spec for spec in self._wanted if not isinstance(spec, WorkerSpec))
        return workers

    def revive(self) -> None:
        """Try once more after it has failed: what was wrong may be over. LOCAL."""
        assert self.failed
        self._barren = MAX_BARREN - 1
        self._current = self._start()
        self._ask_next()

    def close(self) -> None:
        """End the nursery, also one that is stopped; workers live on, those still being born do not. LOCAL."""
        self._close_current()
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    # --- parts

    @property
    def _is_busy(self) -> bool:
        return self._go is not None or self._spare_socket is not None

    def _ask_next(self) -> None:
        """Ask for the next one that is wanted; when nobody is, for a spare nursery, if there is none. It does not hurry
        a nursery that still imports: births come first."""
        if self._is_busy or self.failed:
            return
        if self._wanted:
            theirs, self._go = os.pipe2(os.O_CLOEXEC)
            self._ask_for(self._wanted[0], theirs)
            os.close(theirs)
        elif self._spare is None and self._current.ready:
            self._spare_socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._ask_for(SpareSpec(launcher_pid=os.getpid()), end.fileno())
            end.close()

    def _ask_for(self, spec: Spec | SpareSpec, theirs: int) -> None:
        self._asked_at = time.monotonic()
        with contextlib.suppress(OSError):  # a nursery that died is replaced by `collect`
            socket.send_fds(self._current.socket, [msgspec.msgpack.encode(spec)], [theirs])

    def _welcome(self, pid: int) -> Born:
        assert self._go is not None, "nobody asked for anybody"
        pidfd = os.pidfd_open(pid)  # nobody but us reaps it, so the pid is still its own
        with contextlib.suppress(BrokenPipeError):  # dead already: the pidfd tells
            os.write(self._go, b"!")
        self._hang_up()
        self._barren, self._current.ready = 0, True
        return Born(self._wanted.popleft(), pid, pidfd)

    def _hang_up(self) -> None:
        if self._go is not None:
            os.close(self._go)
            self._go = None

    def _close_current(self) -> None:
        self._hang_up()
        if self._spare_socket is not None:
            self._spare_socket.close()
            self._spare_socket = None
        self._current.end()

    def _replace(self, what: str) -> None:
        self._close_current()
        self._barren += 1
        spare, self._spare = self._spare, None
        if spare is not None and (self.failed or not spare.alive):
            spare.end()
            spare = None
        if self.failed:
            then = "no more"
        elif spare is not None:
            then = f"the spare one (pid {spare.pid}) takes over"
            self._current = spare
        else:
            then = "starting another"
            self._current = self._start()
        log.warning("the process that forks workers %s: %s", what, then)
        self._ask_next()


def main() -> None:
    """The nursery's own life: import, then fork on request until the launcher hangs up."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    launcher_pid = int(sys.argv[2])
    die_with_parent(launcher_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from phalanx import worker
    from phalanx.elastic.vault import keeper

    gc.collect()
    gc.freeze()  # what is imported stays out of collections, so its pages stay shared

    def become(spec: Spec, gate: int) -> None:
        _become(worker.run if isinstance(spec, WorkerSpec) else keeper.run, spec, gate)

    mine: socket.socket | None = channel
    while mine is not None:
        mine = _fork_on_request(mine, become)


def _fork_on_request(channel: socket.socket, become: Callable[[Spec, int], None]) -> socket.socket | None:
    """Until the launcher hangs up. None then; in a spare nursery that was forked on the way, its own channel."""
    while True:
        try:
            packet, fds, _, _ = socket.recv_fds(channel, MAX_PACKET, 1)
        except ConnectionResetError:  # a hang-up, too, by a launcher that has not read all answers
            packet = b""
        if not packet:
            return None
        (gate,) = fds
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid != 0:
                os.write(writer, msgspec.msgpack.encode(pid))
                os._exit(0)
            channel.close()
            os.close(reader)
            os.close(writer)
            spec: Spec | SpareSpec = msgspec.msgpack.decode(packet, type=WorkerSpec | VaultSpec | SpareSpec)
            if isinstance(spec, SpareSpec):
                die_with_parent(spec.launcher_pid)
                return socket.socket(fileno=gate)
            become(spec, gate)
        os.close(writer)
        os.close(gate)
        answer = os.read(reader, 64)
        os.close(reader)
        os.waitpid(between, 0)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.send(answer)


def _become(run: object, spec: Spec, gate: int) -> None:
    assert callable(run)
    code = EXIT_FAILED
    try:
        die_with_parent(spec.launcher_pid)
        if os.read(gate, 1):
            os.close(gate)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = run(spec)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
