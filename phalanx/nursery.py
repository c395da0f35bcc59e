"""The nursery: a warm process that has imported everything, and forks workers from itself.

A worker that starts cold spends seconds on imports; one that is forked here computes after some milliseconds. The
nursery runs no thread, no tensor operation and holds no device context, so a fork of it is clean.

Each worker is a grandchild: the process between ends at once, and the worker becomes the launcher's own child (the
launcher is a subreaper). So the launcher can wait for it, a worker dies with the launcher, and nothing is lost when
the nursery dies.

Protocol, over a SOCK_SEQPACKET pair: a packet holds one MessagePack `WorkerSpec`; the answer is one MessagePack
integer, the worker's pid.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys

import msgspec

from phalanx.process import WorkerSpec, die_with_parent

MAX_PACKET = 1 << 17


class Nursery:
    """The launcher's handle on its nursery process."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "phalanx.nursery", str(theirs.fileno()), str(os.getpid())]
        # A session of its own: a Ctrl-C in the terminal is the launcher's to hear, not that of an import under way.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._socket = mine

    def spawn(self, spec: WorkerSpec) -> int:
        """Fork a worker and return its pid; a nursery that has died is started again. LOCAL, waits for the imports."""
        for attempt in (1, 2):
            try:
                self._socket.send(msgspec.msgpack.encode(spec))
                answer = self._socket.recv(64)
                if answer:
                    return msgspec.msgpack.decode(answer, type=int)
            except OSError:
                pass
            self.close()
            if attempt == 1:
                self._start()
        raise RuntimeError(f"the process that forks workers ended twice with {self._process.returncode}")

    def close(self) -> None:
        """End the nursery, also one that is stopped; workers live on. LOCAL."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """The nursery's own life: import, then fork on request until the launcher hangs up."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    launcher_pid = int(sys.argv[2])
    die_with_parent(launcher_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    import phalanx.worker as worker

    gc.collect()
    gc.freeze()  # what is imported stays out of collections, so its pages stay shared
    while packet := channel.recv(MAX_PACKET):
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
            _become_worker(worker.run, msgspec.msgpack.decode(packet, type=WorkerSpec))
        os.close(writer)
        answer = os.read(reader, 64)
        os.close(reader)
        os.waitpid(between, 0)
        channel.send(answer)


def _become_worker(run: object, spec: WorkerSpec) -> None:
    assert callable(run)
    code = 1
    try:
        die_with_parent(spec.launcher_pid)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = run(spec)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
