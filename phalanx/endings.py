"""How children end: known by their pidfds, and waited for without being at anybody's mercy.

A process that has ended under a debugger is the debugger's to wait for first. Until that does so, or goes, a plain wait
of the parent blocks, so nobody whom others need makes one.
"""

from __future__ import annotations

import os
import select

DEATH_S = 5.0
"""How long the end of a process that was killed is waited for, where somebody waits: it takes milliseconds, unless a
device does not let it go."""


def has_ended(pidfd: int, patience_s: float = 0.0) -> bool:
    """Whether a process has ended, or does so in time. LOCAL, blocks for so long."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(1000 * patience_s))


def wait_status(pid: int) -> int | None:
    """The wait status of a child that has ended: its pidfd is readable, and from now on its pid may be somebody else's.
    None when there is none to be had now: a debugger that is attached to it comes first, for as long as it likes. Who
    gets None leaves the rest to `remains.reap_strangers`. LOCAL."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return status if ended else None
