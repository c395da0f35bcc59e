"""Scaling: from one set of places in use to another, while all requests go on. Pure: no sockets, no tasks.

Up: the launcher starts the ranks that are missing, and they join by themselves, as ranks do that come back. Down: a
leaving rank gets no new requests; when its last one has ended, or `drain_s` is over and the others have taken over what
is left, it is told to leave. It then asks to be left out of the next view (`elastic.leave`), and the launcher ends it
when the others serve without it.

Whoever dies meanwhile dies as ever; here it is only looked at, after each message and each tick, whether what is wanted
has come about, or can no longer. In the second case all goes back to what was, but for new ranks that serve already.
It has not come about before somebody serves in the new size: ranks that are all there may lack experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from phalanx import messages as m
from phalanx.errors import PhalanxError
from phalanx.server.roster import Identity, RankRecord
from phalanx.server.router import Router


class ScaleRefused(PhalanxError):
    """The scaling is not begun. `busy`: because of another one, or of what the service does now: a later one may be."""

    def __init__(self, message: str, *, busy: bool = False) -> None:
        self.message, self.busy = message, busy
        super().__init__(message)


@dataclass(eq=False)
class Scale:
    """One order of an operator. before, ranks: the places in use before and afterwards. failure: why it did not come
    about; the places that are in use then are `ranks` again."""

    before: frozenset[int]
    ranks: frozenset[int]
    began_s: float
    drain_until_s: float
    give_up_s: float
    end: Callable[[Scale], None]
    told: set[Identity] = field(default_factory=set)
    """Ranks that were told to leave."""
    seconds: float = 0.0
    failure: str = ""

    @property
    def added(self) -> list[int]:
        """The places that are in use and were not before."""
        return sorted(self.ranks - self.before)

    @property
    def removed(self) -> list[int]:
        """The places that were in use before and are no longer."""
        return sorted(self.before - self.ranks)

    def __str__(self) -> str:
        return (
            f"scaling failed after {self.seconds:.3f} s: {self.failure}; the ranks are {sorted(self.ranks)}"
            if self.failure
            else f"scaled from {len(self.before)} to {len(self.ranks)} ranks in {self.seconds:.3f} s"
        )


class Scaler:
    """Carries out one scaling at a time. Not for several threads."""

    def __init__(self, router: Router, *, min_ranks: int, patience_s: float, clock: Callable[[], float]) -> None:
        """patience_s: how long ranks may take to come in or to leave, beyond the time for draining."""
        self._router, self._roster = router, router.roster
        self._min_ranks, self._patience_s, self._clock = min_ranks, patience_s, clock
        self._running: Scale | None = None
        self._closed = ""

    @property
    def running(self) -> bool:
        return self._running is not None

    # --- what an operator may ask for

    def resized(self, size: int) -> frozenset[int]:
        """The places in use when there are to be `size`: the lowest vacant ones are added, those of hosts that are
        there before others; the dead leave first, then the highest. Raises ScaleRefused. LOCAL."""
        roster = self._roster
        if not 1 <= size <= roster.places:
            raise ScaleRefused(f"{size} is no size: between 1 and {roster.places} ranks there can be (--max-ep-size)")
        vacant = [rank for rank in range(roster.places) if rank not in roster.in_use]
        vacant.sort(key=lambda rank: (bool(roster.why_unreachable(rank)), rank))
        keep = sorted(roster.in_use, key=lambda rank: (roster.state(rank) == "dead", rank))
        return frozenset([*keep, *vacant][:size])

    def without(self, ranks: frozenset[int]) -> frozenset[int]:
        """The places in use when `ranks` leave. Raises ScaleRefused. LOCAL."""
        if not ranks:
            raise ScaleRefused("no rank is named that is to leave")
        if unknown := sorted(ranks - set(self._roster.in_use)):
            in_use = ", ".join(map(str, self._roster.in_use))
            raise ScaleRefused(f"rank {unknown[0]} is not in use: there are {in_use}")
        return frozenset(self._roster.in_use) - ranks

    def begin(self, ranks: frozenset[int], drain_s: float, end: Callable[[Scale], None]) -> Scale:
        """Go to these places; `end` is called once, when that is done or has failed. Raises ScaleRefused. LOCAL."""
        if self._closed:
            raise ScaleRefused(self._closed, busy=True)
        if self._running is not None:
            raise ScaleRefused(
                f"the service is being scaled to {len(self._running.ranks)} ranks: try again when that is done",
                busy=True,
            )
        if not self._roster.members:
            raise ScaleRefused("the ranks are starting: try again when they serve", busy=True)
        before, now = frozenset(self._roster.in_use), self._clock()
        if before - ranks:
            self._check_enough(ranks)
        for rank in sorted(ranks - before):
            if why := self._roster.why_unreachable(rank):
                raise ScaleRefused(f"rank {rank} cannot be started: {why}", busy=True)
            if (last := self._roster.records.get(rank)) is not None:
                last.given_up = False  # what became of its place's last process does not count
        scale = Scale(before, ranks, now, now + drain_s, now + drain_s + self._patience_s, end)
        self._running, self._roster.scaling = scale, True
        for rank in before - ranks:
            if rank in self._roster.records:
                self._roster.records[rank].leaving = True
        self._router.tell(m.UseRanks(ranks=sorted(ranks)))
        return scale

    def _check_enough(self, ranks: frozenset[int]) -> None:
        needed, experts = self._needed, self._roster.ranks_needed
        if len(ranks) < needed:
            why = f"--min-ranks is {self._min_ranks}"
            if experts > self._min_ranks:
                why = f"the slots of fewer than {experts} ranks do not hold every expert"
            raise ScaleRefused(f"{len(ranks)} ranks would be left, and {needed} are needed: {why}")
        if len(alive := self._may_serve(ranks)) < needed:
            raise ScaleRefused(
                f"of the {len(ranks)} ranks that would be left {len(alive)} are alive, and {needed} are needed: bring "
                "the others back first (rejoin)", busy=True,
            )  # fmt: skip

    # --- how it goes on

    def advance(self) -> None:
        """Do what can be done now, and end what is done. To be called whenever something was heard, and a few times a
        second. LOCAL."""
        scale = self._running
        if scale is None:
            return
        going = [
            r for rank in sorted(scale.before - scale.ranks) if (r := self._roster.records.get(rank)) and not r.dead
        ]
        missing = [rank for rank in scale.added if not self._serves(rank)]
        if not going and not missing and any(map(self._serves, scale.ranks)):
            self._finish(scale, scale.ranks, "")
        elif why := self._hopeless(scale, going, missing):
            self._give_up(scale, going, why)
        else:
            self._send_off(scale, going)

    def _send_off(self, scale: Scale, going: list[RankRecord]) -> None:
        """Tell the members that are to leave to do so, all at once, when none has a request any more or the time for
        that is over."""
        members = [r.identity for r in going if r.identity in self._roster.members]
        untold = [identity for identity in members if identity not in scale.told]
        if not untold or not any(r.identity.rank in scale.ranks for r in self._roster.serving()):
            return  # when nobody who stays serves now, they had better go on
        if self._clock() < scale.drain_until_s and any(self._router.requests_on(i) for i in untold):
            return
        for identity in untold:
            self._router.hand_over(identity)
            self._router.tell(m.Leave(members=[(i.rank, i.incarnation) for i in untold]), to=identity)
            scale.told.add(identity)

    def _hopeless(self, scale: Scale, going: list[RankRecord], missing: list[int]) -> str:
        """Why it will not come about; empty while it still may."""
        lacking = {rank: why for rank in missing if (why := self._why_it_will_not_come(rank))}
        if lacking and len(lacking) == len(missing):  # the others are in by now
            return f"rank {missing[0]} does not start: {lacking[missing[0]]}"
        if len(alive := self._may_serve(scale.ranks)) < self._needed:
            which = "were to stay" if going else "are wanted"
            return f"of the ranks that {which} {len(alive)} are alive, and {self._needed} are needed"
        if why := self._why_all_cannot(alive):
            return f"ranks {alive} are there, and cannot serve: {why}"
        if self._clock() >= scale.give_up_s:
            ranks = sorted([*missing, *(r.identity.rank for r in going)])
            done = "come in" if missing else "left" if going else "served"
            ranks = ranks or sorted(scale.ranks)
            return f"ranks {ranks} have not {done} within {scale.give_up_s - scale.began_s:.0f} s"
        return ""

    def _give_up(self, scale: Scale, going: list[RankRecord], why: str) -> None:
        """Back to what was; new ranks that are in stay."""
        for record in going:
            record.leaving = False
            if record.identity in scale.told:
                self._router.tell(m.Stay(), to=record.identity)
        members = {identity.rank for identity in self._roster.members if self._roster.current(*identity) is not None}
        ranks = scale.before | (scale.ranks & members)
        self._router.tell(m.UseRanks(ranks=sorted(ranks)))
        self._finish(scale, ranks, why)

    def close(self, reason: str) -> None:
        """The service ends: so does what is going on, and nothing more is begun. LOCAL."""
        self._closed = reason
        if (scale := self._running) is not None:
            self._finish(scale, scale.before, reason)

    def _finish(self, scale: Scale, ranks: frozenset[int], failure: str) -> None:
        scale.ranks, scale.failure = ranks, failure
        scale.seconds = self._clock() - scale.began_s
        self._roster.in_use, self._roster.scaling = tuple(sorted(ranks)), False
        self._running = None
        scale.end(scale)

    # --- what is

    @property
    def _needed(self) -> int:
        return max(self._min_ranks, self._roster.ranks_needed)

    def _may_serve(self, ranks: frozenset[int]) -> list[int]:
        """Those that live, or that the launcher will start again."""
        return sorted(rank for rank in ranks if not self._why_it_will_not_come(rank))

    def _why_all_cannot(self, ranks: list[int]) -> str:
        """Why these ranks cannot serve, when each of them says so: a newcomer says it after it was let in, so they have
        met, and nobody is awaited whose coming could help. Empty when one of them has not said it."""
        records = [self._roster.records.get(rank) for rank in ranks]
        reasons = [record.cannot_serve for record in records if record is not None and not record.dead]
        return reasons[0] if len(reasons) == len(ranks) > 0 and all(reasons) else ""

    def _why_it_will_not_come(self, rank: int) -> str:
        """Why a rank that does not live is not started either; empty when it lives, or will be."""
        record = self._roster.records.get(rank)
        if record is not None and record.given_up:
            return record.detail
        return self._roster.why_unreachable(rank) if record is None or record.dead else ""

    def _serves(self, rank: int) -> bool:
        return self._roster.state(rank) in ("healthy", "paused") and rank in self._roster.records
