"""The nursery: a warm process that has imported everything, and forks workers, and the vault's process, from itself.

A worker that starts cold spends seconds on imports; one that is forked here computes after some milliseconds. The
nursery runs no thread, no tensor operation and holds no device context, so a fork of it is clean.

Each worker is a grandchild: the process between ends at once, and the worker becomes the launcher's own child (the
launcher is a subreaper). So the launcher can wait for it, a worker dies with the launcher, and nothing is lost when
the nursery dies.

Protocol, over a SOCK_SEQPACKET pair: a packet holds one MessagePack `Spec` and brings the read end of a pipe; the
answer is one MessagePack integer, the pid. The newborn waits at the pipe until the launcher, who then knows it, lets it
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
from dataclasses import dataclass

import msgspec

from phalanx.process import EXIT_FAILED, Spec, VaultSpec, WorkerSpec, die_with_parent

log = logging.getLogger("phalanx.launcher")

MAX_PACKET = 1 << 17

PATIENCE_S = 30.0
"""How long a birth may take, imports included, before the nursery counts as hung and is replaced."""

MAX_BARREN = 3
"""Nurseries that may end in a row, without a single birth, before there is no other one until `revive`."""


@dataclass(frozen=True)
class Born:
    """A process that runs from now on. pidfd: to be closed by who takes it."""

    spec: Spec
    pid: int
    pidfd: int


class Nursery:
    """The launcher's handle on its nursery process. No call waits for the nursery: births are asked for, and collected
    when `fd` is readable."""

    def __init__(self) -> None:
        self._wanted: deque[Spec] = deque()
        self._go: int | None = None
        """The write end of the pipe at which the process that is being born waits; its spec is the first wanted."""
        self._asked_at = 0.0
        self._barren = 0
        self._start()

    def _start(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "phalanx.nursery", str(theirs.fileno()), str(os.getpid())]
        # A session of its own: a Ctrl-C in the terminal is the launcher's to hear, not that of an import under way.
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ},  # a lost store is ours to tell, in one line
        )
        theirs.close()
        mine.setblocking(False)
        self._socket = mine

    @property
    def fd(self) -> int:
        """Readable when `collect` has something to do; another one after each of its calls. LOCAL."""
        return self._socket.fileno()

    @property
    def pid(self) -> int:
        """The nursery's own process."""
        return self._process.pid

    @property
    def failed(self) -> bool:
        """Whether nobody is born any more, until `revive`: the nursery itself ends each time."""
        return self._barren >= MAX_BARREN

    @property
    def waiting(self) -> int:
        """Births asked for and not collected yet."""
        return len(self._wanted)

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
            while answer := self._socket.recv(64):
                born.append(self._welcome(msgspec.msgpack.decode(answer, type=int)))
                self._ask_next()
            self._replace("ended")
        except BlockingIOError:
            if self._go is not None and time.monotonic() - self._asked_at > PATIENCE_S:
                self._replace("does not answer")
        except OSError:
            self._replace("ended")
        return born

    def forsake(self) -> list[WorkerSpec]:
        """The workers that are owed and will not come, for it has failed; they are owed no more. LOCAL."""
        workers = [spec for spec in self._wanted if isinstance(spec, WorkerSpec)]
        self._wanted = deque(spec for spec in self._wanted if not isinstance(spec, WorkerSpec))
        return workers

    def revive(self) -> None:
        """Try once more after it has failed: what was wrong may be over. LOCAL."""
        assert self.failed
        self._barren = MAX_BARREN - 1
        self._start()
        self._ask_next()

    def close(self) -> None:
        """End the nursery, also one that is stopped; workers live on, those still being born do not. LOCAL."""
        self._hang_up()
        self._socket.close()
        self._process.kill()
        self._process.wait()

    # --- parts

    def _ask_next(self) -> None:
        if self._go is not None or not self._wanted or self.failed:
            return
        reader, self._go = os.pipe2(os.O_CLOEXEC)
        self._asked_at = time.monotonic()
        with contextlib.suppress(OSError):  # a nursery that died is replaced by `collect`
            socket.send_fds(self._socket, [msgspec.msgpack.encode(self._wanted[0])], [reader])
        os.close(reader)

    def _welcome(self, pid: int) -> Born:
        assert self._go is not None, "nobody asked for anybody"
        pidfd = os.pidfd_open(pid)  # nobody but us reaps it, so the pid is still its own
        with contextlib.suppress(BrokenPipeError):  # dead already: the pidfd tells
            os.write(self._go, b"!")
        self._hang_up()
        self._barren = 0
        return Born(self._wanted.popleft(), pid, pidfd)

    def _hang_up(self) -> None:
        if self._go is not None:
            os.close(self._go)
            self._go = None

    def _replace(self, what: str) -> None:
        self.close()
        self._barren += 1
        log.warning("the process that forks workers %s: %s", what, "no more" if self.failed else "starting another")
        if not self.failed:
            self._start()
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
    while True:
        packet, fds, _, _ = socket.recv_fds(channel, MAX_PACKET, 1)
        if not packet:
            return
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
            spec: Spec = msgspec.msgpack.decode(packet, type=WorkerSpec | VaultSpec)
            _become(worker.run if isinstance(spec, WorkerSpec) else keeper.run, spec, gate)
        os.close(writer)
        os.close(gate)
        answer = os.read(reader, 64)
        os.close(reader)
        os.waitpid(between, 0)
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
