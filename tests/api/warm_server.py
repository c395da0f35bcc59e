"""Servers for tests that start at once: each is a fork of a process that has imported what a server imports.

A cold start is nearly all imports, and these tests start dozens. What is forked runs the server's own command, in a
process of its own with its own sockets, signals and exit code; that the command starts from nothing as well is seen by
the test of a server whose launcher is killed, and by every test with real ranks.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path


class WarmServer:
    """`python -m phalanx.server` with some arguments, as far as `subprocess.Popen` has it."""

    def __init__(self, arguments: Sequence[str], log: Path, listening_fd: int) -> None:
        """log: where its standard error goes. listening_fd: the socket that it is to listen on."""
        context = get_context("forkserver")
        context.set_forkserver_preload(["phalanx.server.__main__", __name__])
        listener = _Descriptor(listening_fd)
        self._process = context.Process(target=_serve, args=(list(arguments), str(log), listener), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, when it has ended."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """The exit code; subprocess.TimeoutExpired when it does not end."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("phalanx.server", timeout_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Descriptor:
    """A file descriptor on its way to another process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> object:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self._fd),)


def _received(duplicate: object) -> int:
    return duplicate.detach()  # type: ignore[attr-defined, no-any-return]


def _serve(arguments: list[str], log: str, listening_fd: int) -> None:
    from phalanx.server.__main__ import main

    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    main([*arguments, "--fd", str(listening_fd)], prog_name="phalanx.server")
