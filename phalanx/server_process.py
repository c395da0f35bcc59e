"""The HTTP server as a child of the first host's launcher: its address, its start, its end."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from phalanx.config import ServeConfig
from phalanx.crew import wait_until
from phalanx.endings import DEATH_S, has_ended
from phalanx.errors import BadConfig

log = logging.getLogger("phalanx.launcher")


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


class ServerProcess:
    """`python -m phalanx.server`, started at once."""

    def __init__(self, config: ServeConfig, run_dir: str, listener: socket.socket) -> None:
        """listener: bound; the child inherits it, and it is closed here."""
        path = os.path.join(run_dir, "config.json")
        with open(path, "wb") as file:
            file.write(msgspec.json.encode(config))
        fd = listener.fileno()
        flags = ["--config", path, "--run-dir", run_dir, "--fd", str(fd)]
        flags += ["--launcher-pid", str(os.getpid())]  # by the time it could ask for its parent, we may be gone
        command = [sys.executable, "-m", "phalanx.server", *flags]
        self._process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL, start_new_session=True)
        listener.close()
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        """Readable when it has ended."""

    def wait(self) -> int:
        """Its exit code, once it has ended; -1 when a debugger has it. LOCAL."""
        code = self._process.poll()
        return -1 if code is None else code

    def end(self, turn: Callable[[float], bool], patience_s: float) -> None:
        """Ask it to finish its streams and end, if it still runs, and kill it when it does not. turn: see
        `crew.wait_until`. LOCAL, blocks."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        if not wait_until(lambda: self._process.poll() is not None, turn, patience_s):
            log.error("the HTTP server did not end in time: killing it")
            self._process.kill()
            has_ended(self.pidfd, DEATH_S)
            self._process.poll()
