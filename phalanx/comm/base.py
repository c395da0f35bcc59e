"""The communicator's contract: the only place where ranks meet inside a step.

Every implementation obeys these rules; `comm.cpu` is the reference.

* Membership mask (who is in) and observed mask (who seems silent) are two things. `adopt` sets the first and resets
  the second to it; a time-out, a notice of death or `update_mask` clears a rank in the second. 1 = alive.
* Nothing is sent to or awaited from a masked rank. Its tokens count as zero tokens, its rows as zeros.
* A message of another epoch or incarnation is never accepted.
* Collectives never raise because of a peer: they stop waiting, take zero tokens, and set the status. What they return
  is then meaningless for a step that must be exact; the caller reads `status()` once, where it reads the step's
  result, and does not commit when it is not clean. (With `elastic=False` they raise `CollectiveFailed`.)
* The status is about what the collectives returned: it is clean as long as all of them were whole, even when a peer
  died after it gave its part. Such a death is found in the next wait.
* Before the first `adopt` a rank is alone: collectives wait for nobody, so that it can warm up.
* An open roll call ends every wait: after `interrupt(epoch)` on any rank, or on seeing a peer's, all collectives of
  earlier epochs return at once until `adopt` of a view of that epoch or a later one.

COLLECTIVE calls must be made by every living rank in the same order. LOCAL ones touch no peer's progress.
The idea of a mask buffer beside time-outs is DeepEP's (low-latency mode); the two masks and the epoch are ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.errors import PhalanxError
from phalanx.world import View


class CollectiveFailed(PhalanxError):
    """A peer was lost in a collective, and elasticity is off: no rank is masked, the program must end or start anew."""

    def __init__(self, rank: int, operation: str, seconds: float, what: str) -> None:
        self.rank, self.operation, self.seconds = rank, operation, seconds
        super().__init__(f"{what} (--no-elastic: no rank is masked)")


class CollectiveTimeout(CollectiveFailed):
    """A peer stayed silent past its time-out."""

    def __init__(self, rank: int, operation: str, seconds: float) -> None:
        super().__init__(rank, operation, seconds, f"rank {rank} was silent for {seconds:.1f} s in {operation}")


class PeerDied(CollectiveFailed):
    """A peer's process is known to be dead."""

    def __init__(self, rank: int, operation: str, seconds: float) -> None:
        super().__init__(rank, operation, seconds, f"rank {rank} died, as seen in {operation}")


@dataclass(frozen=True)
class Status:
    """What went wrong since the last `adopt`.

    lost: ranks of the view that are masked by now, by whatever cause.
    interrupted: the highest epoch for which a peer (or this rank) opened a roll call; 0 when none is open.
    causes: for each lost rank why: "notice" (the launcher or the kernel reported its death), "timeout" (it was silent,
        or went on without this rank), "operator".
    detect_s: for each lost rank the seconds between the earliest sign of trouble and its masking: since the launcher
        saw the death, or since this rank began to wait.
    """

    lost: frozenset[int] = frozenset()
    interrupted: int = 0
    causes: tuple[tuple[int, str], ...] = ()
    detect_s: tuple[tuple[int, float], ...] = ()

    @property
    def clean(self) -> bool:
        return not self.lost and not self.interrupted


@dataclass(frozen=True)
class Dispatched:
    """What a rank received in one dispatch, ready for its experts.

    x_ND: the tokens received, [N, D]; a token that several local slots want stands here once.
    row_M: int64 [M], for each (token, local slot) pair the row of x_ND. M >= N.
    slot_M: int64 [M], for each pair the local slot in [0, S).
    handle: the implementation's own; `combine` needs it.
    The order of pairs is (source rank, token, k): deterministic for a given view and batch. `comm.cuda` sorts by slot
    first, for its experts; callers use the order that they are given.
    """

    x_ND: Tensor
    row_M: Tensor
    slot_M: Tensor
    handle: Any


class Communicator(ABC):
    """Dispatch, combine, all-gather and barrier between the ranks of a view, with masks and time-outs."""

    rank: int
    ep_size: int

    @property
    @abstractmethod
    def address(self) -> str:
        """How peers reach this communicator: goes into `Member.comm_address`. LOCAL."""

    @property
    def failed(self) -> bool:
        """Whether `status()` is not clean: cheap, so that a forward pass can stop early between layers. LOCAL."""
        return not self.status().clean

    @abstractmethod
    def adopt(self, view: View) -> None:
        """Serve under `view` from now on: map new members, unmap gone ones, restart sequence numbers, clear the
        status and every interrupt up to `view.epoch`. LOCAL: peers may adopt earlier or later; what a faster peer
        already sent under the new epoch is kept. A member that died meanwhile is masked. Raises Evicted when this
        (rank, incarnation) is not in the view."""

    def expect(self, view: View) -> bool:
        """`view` may be adopted next: whatever `adopt` would have to map for it is mapped beside the steps, from now
        on. True when that is done, or is not worth it; a member that died meanwhile is `adopt`'s to find. Never waits,
        and may be asked again and again. What is expected and not adopted is let go by the next `adopt`. LOCAL."""
        return True

    @abstractmethod
    def dispatch(self, x_TD: Tensor, slots_TK: Tensor) -> Dispatched:
        """Send each token once to every rank that holds one of its slots. COLLECTIVE.

        x_TD: [T, D] in the communicator's dtype, 0 <= T <= max_tokens. slots_TK: int32 [T, K] global slots, -1 = none.
        Pairs whose slot is on a masked rank are dropped."""

    @abstractmethod
    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return each pair's row to the token's owner. COLLECTIVE.

        y_MD: [M, D], the experts' outputs in the order of `dispatched`'s pairs. Returns [T, K, D] in the same dtype:
        row (t, k) is what slots_TK[t, k] made of token t, zeros where there was none. The owner weighs and adds them in
        the order of k, so that the sum does not depend on where experts live."""

    def dispatch_later(self, x_TD: Tensor, slots_TK: Tensor) -> Callable[[], Dispatched]:
        """Begin a dispatch: send, and leave the waiting to the call of what is returned. COLLECTIVE; so is that call.

        x_TD and slots_TK stay as they are, and no other collective begins, until it is called. After an `adopt` in
        between it returns what an interrupted dispatch does. Where a dispatch makes no host wait (`comm.cuda`), it is
        begun and finished here, on the stream, and the call returns it."""
        dispatched = self.dispatch(x_TD, slots_TK)
        return lambda: dispatched

    def combine_later(self, y_MD: Tensor, dispatched: Dispatched) -> Callable[[], Tensor]:
        """The same for `combine`: y_MD stays as it is until the call."""
        rows_TKD = self.combine(y_MD, dispatched)
        return lambda: rows_TKD

    def origins(self, dispatched: Dispatched) -> tuple[Tensor, Tensor]:
        """Where each pair comes from: (source_M, token_M), int64 [M], the source's rank and the token's place in what
        it dispatched. Worked out when asked for, while `dispatched` is valid. LOCAL. No step needs it, adapters do."""
        raise NotImplementedError(f"{type(self).__name__} does not keep where its pairs come from")

    @abstractmethod
    def all_gather(self, row: Tensor) -> Tensor:
        """Everyone's int64 [n] row as int64 [R, n], zeros for masked ranks; n <= 64. COLLECTIVE."""

    def meet(self, row: Sequence[int]) -> tuple[npt.NDArray[np.int64], Status]:
        """`all_gather` of a row, read by the host: (int64 [R, len(row)], the status after it). The rows mean something
        only when the status is clean. Where collectives are launched and not waited for (`comm.cuda`) it is for the
        hosts alone: it waits for none that is under way, and tells of none. COLLECTIVE, waits."""
        rows: npt.NDArray[np.int64] = self.all_gather(torch.tensor(row, dtype=torch.int64)).cpu().numpy()
        return rows, self.status()

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every unmasked rank is here. COLLECTIVE."""

    @abstractmethod
    def query_mask(self) -> Tensor:
        """uint8 [R], the observed mask, 1 = alive. A copy. LOCAL."""

    @abstractmethod
    def update_mask(self, rank: int, alive: bool) -> None:
        """Mask a rank from outside, or clear it back to alive when it is a member of the view. LOCAL."""

    @abstractmethod
    def status(self) -> Status:
        """What went wrong since the last `adopt`. LOCAL."""

    @abstractmethod
    def interrupt(self, epoch: int) -> None:
        """A roll call for `epoch` is open: end this rank's and every peer's waits of earlier epochs. LOCAL."""

    @abstractmethod
    def ring(self) -> None:
        """Wake every peer that sleeps in `sleep`. LOCAL."""

    @abstractmethod
    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        """Sleep until a peer rings, a notice or interrupt arrives, one of `wake_fds` is readable, or the time is over.
        True when a peer, a notice or an interrupt woke us. A ring that came before the call counts. LOCAL."""

    @contextmanager
    @abstractmethod
    def patience(self, timeout_s: float) -> Iterator[None]:
        """Use another peer time-out within the block (warm-up, restore). LOCAL."""
        yield

    @abstractmethod
    def close(self) -> None:
        """Unmap everything. LOCAL."""


def empty_view(ep_size: int) -> View:
    """The view before the first meeting: nobody is in."""
    return View(0, ep_size, ())
