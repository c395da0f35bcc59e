"""From what a communicator and the notice board say to one `Change`: who seems lost, why, and since when. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phalanx.elastic.agree import Change, Notices
from phalanx.errors import PeerLost
from phalanx.world import Member, View

if TYPE_CHECKING:
    from phalanx.comm.base import Status


def change_after(lost: PeerLost, status: Status, view: View, notices: Notices) -> Change:
    """The failure that ended a step or a recovery under `view`. LOCAL, pure.

    lost: what was raised; it may know no rank, when a peer's open roll call ended the step. status: the communicator's
    word on it, which must be that of `view`. A notice of death tells the cause better than the communicator can."""
    ranks = sorted({*lost.ranks, *status.lost, *dead_ranks(view, notices)})
    observed = dict(status.causes)
    causes = {rank: _cause(rank, view.member(rank), notices, observed) for rank in ranks}
    seconds = max((s for _, s in status.detect_s), default=0.0)
    return Change("failure", tuple(ranks), causes, seconds, max(lost.epoch, status.interrupted))


def dead_ranks(view: View, notices: Notices) -> tuple[int, ...]:
    """Ranks of `view` whose death was announced. An idle rank looks here between steps. LOCAL, pure."""
    return tuple(m.rank for m in view.members if notices.is_dead(m))


def certainly_dead(status: Status, view: View, notices: Notices) -> frozenset[Member]:
    """Members of `view` that need not be waited for: announced, or known to the communicator as ended processes; a
    mere time-out does not suffice. LOCAL, pure."""
    known = {rank for rank, cause in status.causes if cause == "notice"} | set(dead_ranks(view, notices))
    return frozenset(m for m in view.members if m.rank in known)


def merged(first: Change | None, then: Change) -> Change:
    """One change out of two, when trouble came upon trouble before the first was dealt with. LOCAL, pure.

    The time of detection is the first one's: what came after did not find a serving system."""
    if first is None:
        return then
    return Change(
        then.trigger if first.trigger != "start" else "start",
        tuple(sorted({*first.lost, *then.lost})),
        {**then.causes, **first.causes},
        first.detect_s,
        max(first.epoch, then.epoch),
    )


def _cause(rank: int, member: Member | None, notices: Notices, observed: dict[int, str]) -> str:
    if member is not None and notices.is_dead(member):
        return notices.cause(rank)
    return observed.get(rank, "timeout")
