"""What the dead leave behind, and the launcher clears away: orphans, files, keys in the store. LOCAL throughout."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from phalanx.process import last_words, worker_endpoint

KEPT_EPOCHS = 3
"""What was written under an epoch is of use to somebody until so many epochs later: `elastic.agree` has a rank that
follows later than that evicted."""

_OF_AN_EPOCH = ("entry", "ahead", "standing", "plan", "open", "balance")
_OF_AN_IDENTITY = ("wish", "digests")


def reap_strangers(known: Collection[int]) -> None:
    """Wait for children that have ended and that nobody knows: newborns whose nursery died before it could say who they
    are. They are children of the launcher, for it adopts orphans. Those in `known` are left to who waits for them."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in known:
                return  # it hides those behind it until it was waited for, which is soon
            os.waitpid(ended.si_pid, 0)


def remove_files(run_dir: str, rank: int, incarnation: int) -> None:
    """Remove the files of a dead worker."""
    for path in (worker_endpoint(run_dir, rank, incarnation).removeprefix("ipc://"),
                 last_words(run_dir, rank, incarnation)):  # fmt: skip
        with suppress(OSError):
            os.unlink(path)


def stale_keys(keys: Iterable[str], epoch: int, newest: Mapping[int, int]) -> list[str]:
    """The keys of the store that are of no use any more.

    epoch: that of the last World; newest: the newest incarnation of each rank. The chain of Worlds itself stays: it is
    what tells a rank that slept for however long that the others went on. The digests that a dead rank left stay until
    its successor is dead, too."""
    return [key for key in keys if _is_stale(key.split("/"), epoch, newest)]


def _is_stale(parts: list[str], epoch: int, newest: Mapping[int, int]) -> bool:
    if parts[0] in _OF_AN_EPOCH and len(parts) > 1 and parts[1].isdecimal():
        return int(parts[1]) <= epoch - KEPT_EPOCHS
    if parts[0] in _OF_AN_IDENTITY and len(parts) > 1:
        rank, _, incarnation = parts[1].partition(".")
        if rank.isdecimal() and incarnation.isdecimal():
            return int(incarnation) < newest.get(int(rank), 0) - (parts[0] == "digests")
    return False
