"""The custodian: the launcher's hand on the vault. It makes the memory, starts the keeper, and starts it again.

The memory belongs to the launcher, so that neither a worker nor the keeper takes anything along when it dies.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

from phalanx import messages as m
from phalanx.config import ServeConfig
from phalanx.elastic.vault.memory import VaultMemory
from phalanx.elastic.vault.room import room_for
from phalanx.elastic.vault.shares import EVERYTHING, Share
from phalanx.endings import DEATH_S, has_ended, wait_status
from phalanx.halts import HELPER_HALT_S, Halt
from phalanx.model.known import open_model
from phalanx.process import VaultSpec
from phalanx.wire import Site

log = logging.getLogger("phalanx.launcher")

MAX_FAILURES = 5
"""Keepers in a row that end without having filled anything: then the vault stays as it is."""


class Custodian:
    """Owns the vault of this host, if there is one."""

    def __init__(self, config: ServeConfig, tell: Callable[[m.VaultState], None], site: Site | None = None) -> None:
        """tell: hands a message to the server. site: where this host stands among several; None: it is alone."""
        self._tell = tell
        share = Share(site.node_rank, site.nnodes, config.vault_copies) if site is not None else EVERYTHING
        self._memory = _make(config, share)
        self._spec: VaultSpec | None = None
        self._pid, self._awaited = 0, False
        self._failures, self._incarnation = 0, 0
        self._progress = (0, 0)
        self.pidfd = -1
        """Readable when the keeper has ended; -1 when none runs."""

    @property
    def pid(self) -> int:
        """The keeper's process; that of the last one when none runs."""
        return self._pid

    @property
    def address(self) -> str:
        """Where workers find the vault; "" when there is none. LOCAL."""
        return self._memory.address if self._memory else ""

    def start(self, spec: VaultSpec, ask: Callable[[VaultSpec], None]) -> None:
        """Start the keeper, if there is a vault. `ask` has it forked; `born` is to be called then. LOCAL."""
        self._spec, self._ask = spec, ask
        if self._memory is None:
            self._tell(m.VaultState(state="off", reason="there is no vault: see --expert-backup"))
        if self._memory is not None or spec.site is not None:  # other hosts may ask for what the ranks here hold
            self._start()

    def _start(self) -> None:
        assert self._spec is not None
        self._awaited = True
        self._ask(self._spec.of(self._incarnation))

    def born(self, pid: int, pidfd: int) -> None:
        """The keeper that was asked for is there. LOCAL."""
        self._awaited, self._pid, self.pidfd = False, pid, pidfd
        self._halt = Halt(pid)

    def look(self, now_s: float) -> None:
        """Look whether the keeper is stopped; when it has been for too long another one takes its place. LOCAL."""
        if self.pidfd < 0:
            return
        self._halt.look(now_s)
        if self._halt.total_s > HELPER_HALT_S:
            log.warning(
                "killing the vault's process (pid %d): it has been stopped for %.0f s", self._pid, self._halt.total_s
            )
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self._halt = Halt(self._pid)

    def nobody_is_born(self) -> None:
        """No process can be forked, so a keeper that was asked for will not come until one can be. LOCAL."""
        if self._awaited:
            self._give_up("the vault's process cannot be started: it stays as it is")

    def _give_up(self, reason: str) -> None:
        memory = self._memory
        self._tell(
            m.VaultState(
                state="given_up",
                restarts=self._incarnation,
                filled_bytes=memory.filled_bytes if memory is not None else 0,
                total_bytes=memory.shape.weight_bytes if memory is not None else 0,
                reason=reason,
            )
        )
        log.error("%s", reason)

    def buried(self) -> None:
        """The keeper has ended: start another one, unless several ended one after the other to no effect. LOCAL."""
        os.close(self.pidfd)
        self.pidfd = -1
        status = wait_status(self._pid)
        code = os.waitstatus_to_exitcode(status) if status is not None else 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        how = "its exit status is unknown" if status is None else how
        progress = self._memory.progress if self._memory is not None else (0, 0)
        self._failures = 1 if progress != self._progress else self._failures + 1
        self._progress = progress
        if self._failures >= MAX_FAILURES:
            self._give_up(f"{MAX_FAILURES} processes of the vault ended in a row ({how}): it stays as it is")
            return
        log.warning("the vault's process (pid %d) ended: %s; what it holds stays, starting it again", self._pid, how)
        self._incarnation += 1
        self._start()

    def close(self) -> None:
        """End the keeper and let go of the memory. LOCAL."""
        if self.pidfd >= 0:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)  # there is nothing that it would have to put in order
            has_ended(self.pidfd, DEATH_S)
            wait_status(self._pid)
            os.close(self.pidfd)
            self.pidfd = -1
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def _make(config: ServeConfig, share: Share) -> VaultMemory | None:
    if config.expert_backup != "dram":
        return None
    room = room_for(config, open_model(config), share=share)
    if not room.fits:
        log.warning("--expert-backup dram does not fit: %s; going on with disk", room)
        return None
    log.info("--expert-backup dram: %s", room)
    return VaultMemory(room.shape)
