"""The typed errors of Phalanx: what the world can do to it, as a tree.

    PhalanxError
    ├── BadRequest          a client's input is wrong: names the field and what to do
    ├── BadCheckpoint       a model directory cannot be served: names the file or tensor
    ├── BadConfig           a flag cannot be honoured: names the flag and what to do
    └── MembershipError
        ├── PeerLost        ranks fell silent during a step: nothing of it was committed
        ├── Evicted         the others went on without this rank: it must exit
        ├── TooFewRanks     fewer ranks live than `--min-ranks` asks for
        ├── TooFewSlots     fewer live slots than experts
        ├── ExpertsLost     experts that no source could restore
        └── StoreLost       the store of agreements is gone: without it nobody may change who is in

Only a bug raises anything else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable


class PhalanxError(Exception):
    """Root of every error that Phalanx raises on purpose."""


class BadRequest(PhalanxError):
    """A client's input is wrong. `param` names the field, `message` says what to do about it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadCheckpoint(PhalanxError):
    """A model directory cannot be served; the message names the file or tensor and what is wrong."""


class BadConfig(PhalanxError):
    """A flag cannot be honoured; the message names it and says what to do."""


class MembershipError(PhalanxError):
    """Root of the errors about who is in and what the living hold."""


class PeerLost(MembershipError):
    """Ranks fell silent, or a roll call was opened by a peer, while a step ran. The step was not committed.

    ranks: the suspects (may be empty when a peer's open roll call ended the step).
    epoch: the highest epoch for which a roll call is known to be open; 0 when none is.
    found_s: when that was found, by time.monotonic(): what runs on a device must end before anybody can deal with it.
    """

    def __init__(self, ranks: Iterable[int], epoch: int = 0, found_s: float | None = None) -> None:
        self.ranks = tuple(sorted(ranks))
        self.epoch = epoch
        self.found_s = time.monotonic() if found_s is None else found_s
        super().__init__(f"lost ranks {list(self.ranks)}" + (f", roll call {epoch} is open" if epoch else ""))


class Evicted(MembershipError):
    """The others went on without this rank under `epoch`. It does not argue: it exits."""

    def __init__(self, rank: int, incarnation: int, epoch: int) -> None:
        self.rank, self.incarnation, self.epoch = rank, incarnation, epoch
        super().__init__(f"rank {rank}.{incarnation} is not in epoch {epoch}")


class Left(MembershipError):
    """This rank asked to leave, and the others go on without it under `epoch`: it ends when they need it no more."""

    def __init__(self, rank: int, incarnation: int, epoch: int) -> None:
        self.rank, self.incarnation, self.epoch = rank, incarnation, epoch
        super().__init__(f"rank {rank}.{incarnation} has left, epoch {epoch} is without it")


class TooFewRanks(MembershipError):
    """Fewer ranks live than are needed to serve."""

    def __init__(self, alive: int, needed: int) -> None:
        self.alive, self.needed = alive, needed
        super().__init__(f"{alive} ranks are alive, serving needs {needed} (--min-ranks)")


class TooFewSlots(MembershipError):
    """The living have fewer slots than there are experts."""

    def __init__(self, slots: int, experts: int) -> None:
        self.slots, self.experts = slots, experts
        super().__init__(f"{slots} live slots a layer cannot hold {experts} experts")


class ExpertsLost(MembershipError):
    """No source could restore these experts, as (layer, expert) pairs."""

    def __init__(self, experts: Iterable[tuple[int, int]], reason: str) -> None:
        self.experts = tuple(experts)
        shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in self.experts[:4])
        more = f" and {len(self.experts) - 4} more" if len(self.experts) > 4 else ""
        super().__init__(f"cannot restore {shown}{more}: {reason}")


class StoreLost(MembershipError):
    """The store through which ranks agree does not answer: the launcher that holds it is gone. A rank then ends."""
