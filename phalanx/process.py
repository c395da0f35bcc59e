"""What a worker is told when it is born, and how a process ties its life to its parent's."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import msgspec

from phalanx.config import ServeConfig
from phalanx.wire import Site

EXIT_STOPPED, EXIT_FAILED, EXIT_EVICTED = 0, 1, 3
"""A worker's exit codes: asked to stop; an exception; the others went on without it."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    """One incarnation of one rank, and how it finds the others."""

    config: ServeConfig
    rank: int
    incarnation: int
    run_dir: str
    store_host: str
    store_port: int
    notices: str
    launcher_pid: int
    host: str = "localhost"
    site: Site | None = None
    """Where it stands among several hosts; None: there is only this one, and nothing listens to others."""
    model: bytes
    """What the checkpoint was found to be when the service started, from `model.known.described`."""
    vault: str = ""
    """Where this host's vault is; empty when there is none."""
    faults: str = ""
    scaled: bool = False
    """It is started because the service is scaled up, in a place that was vacant."""
    asked_s: float = 0.0
    """When the launcher asked for it, on the machine's monotonic clock."""


class VaultSpec(msgspec.Struct, frozen=True, kw_only=True, tag="vault"):
    """One incarnation of the vault's process, and what it needs to fill the vault."""

    config: ServeConfig
    incarnation: int = 0
    run_dir: str
    store_host: str
    store_port: int
    notices: str
    launcher_pid: int
    vault: str
    """"" when there is none: then the process only gives other hosts what this one's ranks hold."""
    model: bytes = b""
    """What the checkpoint was found to be when the service started; empty: what it is when it is read counts."""
    site: Site | None = None
    faults: str = ""

    def of(self, incarnation: int) -> VaultSpec:
        """The same for another incarnation. LOCAL."""
        return msgspec.structs.replace(self, incarnation=incarnation)


class SpareSpec(msgspec.Struct, frozen=True, kw_only=True, tag="spare"):
    """A spare for the process that forks all these."""

    launcher_pid: int


Spec = WorkerSpec | VaultSpec


def server_endpoint(run_dir: str) -> str:
    """Where the server hears from workers and launcher. LOCAL."""
    return f"ipc://{run_dir}/server.sock"


def launcher_endpoint(run_dir: str) -> str:
    """Where the launcher hears from the server. LOCAL."""
    return f"ipc://{run_dir}/launcher.sock"


def worker_endpoint(run_dir: str, rank: int, incarnation: int) -> str:
    """Where one incarnation of a rank hears from the server. LOCAL."""
    return f"ipc://{run_dir}/worker-{rank}-{incarnation}.sock"


def last_words(run_dir: str, rank: int, incarnation: int) -> str:
    """The file in which a worker that fails leaves the reason, in one line. LOCAL."""
    return f"{run_dir}/worker-{rank}-{incarnation}.error"


def die_with_parent(parent_pid: int, patience_s: float = 5.0) -> None:
    """Be killed when `parent_pid` dies. Waits until it is our parent: a grandchild is handed to it a moment after its
    birth. Exits when the parent is gone already. LOCAL, Linux."""
    deadline = time.monotonic() + patience_s
    while os.getppid() != parent_pid:
        if time.monotonic() > deadline or not _exists(parent_pid):
            os._exit(EXIT_FAILED)
        os.sched_yield()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(EXIT_FAILED)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends (a subreaper). LOCAL, Linux."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


PLANNER = "phalanx-plan"
"""What a planning child calls itself, for whoever inherits it."""


def call_myself(name: str) -> None:
    """Give this process a name, of at most 15 letters. LOCAL, Linux."""
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def wake_on_signals() -> int:
    """From now on SIGTERM and SIGINT do nothing but make the returned file descriptor readable. LOCAL."""
    wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return wake


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
