"""The one operation behind start-up, failure, join, rebalance and scaling: agree, mask, replan, restore, meet.

    adoption = recovery.run(change)      # worker.py: engine.adopt(adoption.world, adoption.routes_LEW)
    recovery.begin("join")               # what can be foreseen is agreed on beside the steps (`elastic.ahead`), and
    recovery.work()                      # `run` only switches

A failure is a re-placement with fewer ranks, a join one with more, start-up the first. Whatever goes wrong on the way
raises, and running again goes on from what is agreed and held by then: there is no state half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np

from phalanx.comm.base import Communicator, empty_view
from phalanx.elastic.agree import Agreed, Answer, Change, Limits, Loads, Notices, RollCall, Shape
from phalanx.elastic.ahead import FORESEEN, Ahead
from phalanx.elastic.detect import certainly_dead, change_after, merged
from phalanx.elastic.leave import within
from phalanx.elastic.rejoin import held_by_all, hoped_for, settled, to_read_from
from phalanx.elastic.replan import Move, diff, replan, routes
from phalanx.elastic.restore import Bank, Restore, Source
from phalanx.elastic.store import Clock, Store
from phalanx.elastic.vault.remote import Remote
from phalanx.errors import Evicted, ExpertsLost, PeerLost, TooFewRanks, TooFewSlots
from phalanx.messages import PhaseSeconds, Trigger
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import EMPTY, IntArray, Member, Placement, View, World

_PREPARATIONS = 3
"""How often a newcomer looks again whether the World that it prepared for has changed meanwhile."""

_REPORTED = 30
"""How many lost experts a rank can name to the others: a row of an all_gather has room for 64 numbers."""


@dataclass(frozen=True, eq=False)
class Adoption:
    """What a rank serves from now on, and what it took to get there.

    routes_LEW: int32 [L, E, W]. lost, joined: ranks, against the last World that this rank served; left: those that
    left it because an operator wanted it, none of the lost. seconds: without `replay` and `total`, which the worker
    measures. bytes_restored: by source, on this rank; seconds_restored: what
    they took. step: the last step that any member had committed.
    """

    world: World
    routes_LEW: IntArray
    trigger: Trigger
    lost: tuple[int, ...]
    joined: tuple[int, ...]
    causes: Mapping[int, str]
    seconds: PhaseSeconds
    bytes_restored: Mapping[str, int]
    seconds_restored: Mapping[str, float]
    step: int
    left: tuple[int, ...] = ()


class Recovery:
    """One rank's part in every membership change."""

    def __init__(
        self,
        me: Member,
        shape: Shape,
        limits: Limits,
        *,
        store: Store,
        clock: Clock,
        comm: Communicator,
        bank: Bank,
        sources: Sequence[Source | Remote],
        notices: Notices,
        route_width: int,
        load: Callable[[], Loads] | None = None,
        prepared: Callable[[View, IntArray], Placement | None] = lambda view, held_LP: None,
        step: Callable[[], int] | None = None,
        knock: Callable[[View], None] = lambda view: None,
        scaled: bool = False,
        faults: Faults = NO_FAULTS,
        progress: Callable[[int, int], None] | None = None,
        threads: int = 1,
    ) -> None:
        """sources: the fastest first. load: this rank's tokens by expert, int64 [L, E], for the planner; None: all
        alike. prepared: the placement, if any, that the members of this view hold already besides the one they serve
        (`elastic.balance`): a rebalance goes there. step: the last step it committed. knock: see `RollCall`.
        scaled: this rank is a newcomer because the service is scaled up.
        progress: told (done, total) experts in each restore. threads: see `Restore`."""
        self.me = me
        self._shape, self._limits = shape, limits
        self._clock, self._comm, self._bank, self._sources = clock, comm, bank, tuple(sources)
        self._notices, self._width, self._faults, self._progress = notices, route_width, faults, progress
        self._prepared, self._threads = prepared, threads
        self._load = load or (lambda: np.zeros((shape.num_layers, shape.num_experts), np.int64))
        self._step = step or (lambda: 0)
        self._scaled, self._leaving = scaled, tuple[tuple[int, int], ...]()
        self._calls = RollCall(
            me, shape, limits, store=store, clock=clock, notices=notices, plan=self._plan, knock=knock, faults=faults
        )
        self.ahead = Ahead(
            self._calls, limits, clock, answer=self._answer, routes=self._routes, reach=self._comm.expect
        )
        """The change that is agreed on beside the steps; `begin` and `work` move it."""
        self._agreed: Agreed | None = None
        self._served: View | None = None
        self._unfinished: Change | None = None
        self._said_what_it_holds = self._let_in = False
        self._seconds = PhaseSeconds()
        self._bytes: dict[str, int] = {}
        self._source_s: dict[str, float] = {}

    @property
    def view(self) -> View:
        """The last view agreed, whether or not it could be served."""
        return self._agreed.view if self._agreed else empty_view(self._shape.ep_size)

    def joiners(self) -> tuple[tuple[int, int], ...]:
        """(rank, incarnation) of newcomers that ask to be let in: `begin`, or run(Change("join")) where nothing is
        served. LOCAL."""
        known = {m.rank: m.incarnation for m in self.view.members}
        return tuple((rank, inc) for rank, inc in self._calls.joiners() if inc > known.get(rank, -1))

    def begin(self, trigger: Trigger) -> None:
        """Begin, or hear that others have begun, with a change that can be agreed on while all serve. Does nothing when
        one is under way already. LOCAL."""
        assert self._agreed is not None
        self.ahead.begin(self._agreed, trigger)

    def work(self) -> bool:
        """Do the next bit of what is done beside the steps, a question to the store or an answer. False when there is
        none. Raises PeerLost. LOCAL."""
        return self.ahead.work() if self.ahead.under_way else self._calls.tidy()

    def leave(self, members: Sequence[tuple[int, int]]) -> None:
        """Ask that these, this rank among them, be left out of the next view, in every roll call from now on; none: no
        longer. `run` raises Left once the others go on without this rank, also when only another one of them had
        asked; its slots must stay readable until they serve. LOCAL."""
        self._leaving = tuple(members)

    def change_after(self, lost: PeerLost) -> Change:
        """The change that a PeerLost of a step, or of `run` itself, calls for. LOCAL."""
        return change_after(lost, self._comm.status(), self.view, self._notices)

    def prepare(self) -> None:
        """A newcomer's work before `run(Change("join"))`: fill the slots that it will be given (`elastic.rejoin`).

        Does nothing before the first World. LOCAL: reads peers' memory, and nobody waits for it."""
        prepared = 0
        for _ in range(_PREPARATIONS):
            last = self._calls.follow(None)
            if last is None or last.epoch == prepared:
                return
            prepared = last.epoch
            members = [m for m in (*self._calls.coming(), *last.view.members) if not self._notices.is_dead(m)]
            wish = hoped_for(last, members, self.me, self._bank.held_LS, self._shape)
            if wish is None:
                return
            source = to_read_from(last, self._calls.all_digests(last))
            moves = diff(held_by_all(last, self.me, self._bank.held_LS), wish, self.me.rank)
            job = self._job(moves, source)
            job.advance(lambda: not self._notices.is_dead(self.me))
            job.settle()
            self._count(job)
            self._calls.remember(self._answer())
            self._calls.wish(wish)

    def own_routes(self) -> IntArray:
        """int32 [L, E, W]: to what this rank holds itself, -1 for the rest: for a newcomer to warm up alone. LOCAL."""
        shape = self._shape
        routes_LEW = np.full((shape.num_layers, shape.num_experts, self._width), EMPTY, np.int32)
        held_LS = self._bank.held_LS
        layer, slot = np.nonzero(held_LS >= 0)
        routes_LEW[layer, held_LS[layer, slot]] = (self.me.rank * shape.slots_per_rank + slot)[:, None]
        return routes_LEW

    def run(self, change: Change) -> Adoption:
        """Agree on the next World and get ready to serve it. COLLECTIVE; safe to call again after anything it raises.

        Raises Evicted (exit), PeerLost (a further loss: run again with `change_after`), and, once the view is agreed
        and adopted and the same on every member: TooFewRanks, TooFewSlots, ExpertsLost (wait, then run again).
        StoreLost: the launcher is gone. Left: see `leave`."""
        change = self._unfinished = merged(self._unfinished, change)
        ahead = self.ahead.take()
        routes_LEW = None
        if ahead is not None and change.trigger in FORESEEN:
            self._agreed, routes_LEW = ahead
            if self.me not in self._agreed.view:
                raise self._calls.outside(self._agreed)
        else:
            self._agree(change)
        agreed = self._agreed
        assert agreed is not None
        began = self._clock.now()
        self._comm.adopt(agreed.view)
        self._add(mask=self._clock.now() - began)
        self._check_capacity(agreed)
        if not self._let_in and not set(agreed.view.members) <= set(self._served.members if self._served else ()):
            self._comm.ring()  # newcomers sleep until then; a ring that no meeting follows would let nobody sleep
        routes_LEW = self._restore(agreed, routes_LEW)
        adoption = self._adoption(change, agreed, routes_LEW)
        self._unfinished, self._served = None, agreed.view
        self._seconds, self._bytes, self._source_s = PhaseSeconds(), {}, {}
        return adoption

    # --- the phases

    def _agree(self, change: Change) -> None:
        began = self._clock.now()
        self._let_in = False  # by an earlier World: its newcomers are members now, and nobody else would ring
        base = self._calls.follow(self._agreed)
        if change.trigger == "join" and self._agreed is None:
            agreed, self._let_in = self._calls.join(self._answer())
        elif base is not None and self.me not in base.view:
            raise Evicted(self.me.rank, self.me.incarnation, base.epoch)
        elif base is not None and base.epoch > self.view.epoch and base.epoch >= change.epoch:
            agreed = base  # the others counted this rank while it was away
        else:
            dead = certainly_dead(self._comm.status(), self.view, self._notices) if base is self._agreed else ()
            self._comm.interrupt((base.epoch if base else 0) + 1)
            agreed = self._calls.hold(base, change.trigger, self._answer(), dead)
        self._agreed = agreed
        self._add(agree=self._clock.now() - began - agreed.replan_s, replan=agreed.replan_s)

    def _check_capacity(self, agreed: Agreed) -> None:
        alive = len(agreed.view.members)
        if alive < self._limits.min_ranks:
            raise TooFewRanks(alive, self._limits.min_ranks)
        if agreed.placement.missing:
            raise TooFewSlots(alive * self._shape.slots_per_rank, self._shape.num_experts)

    def _restore(self, agreed: Agreed, routes_LEW: IntArray | None) -> IntArray:
        """Fill this rank's slots, and leave when every rank has filled its own. Returns the routing table.

        Ranks restore in slices and meet after each: a rank that stops is noticed after roll_call_s, though the whole
        may take much longer. The last meeting, at which nobody has anything left to do, is the barrier."""
        began = self._clock.now()
        self._faults.point("replan")
        moves = diff(agreed.held_LP, agreed.placement, self.me.rank)
        if routes_LEW is None:
            routes_LEW = self._routes(agreed)
        planned = self._clock.now()
        self._add(replan=planned - began)
        job = self._job(moves, agreed)
        limits = self._limits
        lost: tuple[tuple[int, int], ...] = ()
        try:
            with self._comm.patience(limits.restore_s if self._served is None else limits.roll_call_s):
                remaining = 1
                while remaining:
                    end = self._clock.now() + limits.slice_s
                    job.advance(lambda end=end: self._clock.now() < end and not self._comm.failed)  # type: ignore[misc]
                    job.settle()
                    if not job.remaining and (job.learned or not self._said_what_it_holds):
                        self._calls.remember(self._answer())
                        job.learned, self._said_what_it_holds = 0, True
                        if self._let_in:
                            self._stand_by(agreed)
                    self._let_in = False  # all come to the first meeting, and nobody rings for a later one
                    remaining, lost = self._meet(job)
        finally:
            self._add(restore=self._clock.now() - planned)
            self._count(job)
        if lost:
            raise ExpertsLost(lost, "no source has an intact copy")
        self._faults.point("adopt")
        return routes_LEW

    def _stand_by(self, agreed: Agreed) -> None:
        """A newcomer's sleep until one who lets it in has come to the World that both have in hand. LOCAL."""
        self._calls.stand(agreed.epoch)
        self._comm.sleep(self._limits.restore_s)

    def _meet(self, job: Restore) -> tuple[int, tuple[tuple[int, int], ...]]:
        """How many experts are still to be restored anywhere, and which are lost. COLLECTIVE."""
        self._faults.point("barrier")
        named = sorted(job.lost)[:_REPORTED]
        row = [job.remaining, len(named), *chain.from_iterable(named)]
        found, status = self._comm.meet(row + [0] * (2 + 2 * _REPORTED - len(row)))
        if not status.clean:
            raise PeerLost(status.lost, max(status.interrupted, self.view.epoch + 1))
        rows: list[list[int]] = found.tolist()
        pairs = {(r[2 + 2 * i], r[3 + 2 * i]) for r in rows for i in range(r[1])}
        return sum(r[0] for r in rows), tuple(sorted(pairs))

    # --- parts

    def _job(self, moves: Sequence[Move], agreed: Agreed) -> Restore:
        """The work of making these moves, none of it done yet."""
        return Restore(
            moves,
            agreed,
            self._bank,
            self._sources,
            clock=self._clock,
            progress=self._progress,
            faults=self._faults,
            threads=self._threads,
        )

    def _count(self, job: Restore) -> None:
        for name, count in job.bytes_by_source.items():
            self._bytes[name] = self._bytes.get(name, 0) + count
            self._source_s[name] = self._source_s.get(name, 0.0) + job.seconds_by_source[name]

    def _routes(self, agreed: Agreed) -> IntArray:
        return routes(agreed.placement, agreed.view, self.me.rank, self._width, agreed.load_LE)

    def _answer(self) -> Answer:
        return Answer(
            self.me,
            self._step(),
            self._bank.held_LS.astype(np.int32).tobytes(),
            self._bank.digest_LS.astype(np.uint64).tobytes(),
            self._load().astype(np.int64).tobytes(),
            self._leaving,
            self._scaled,
        )

    def _plan(self, trigger: Trigger, view: View, held_LP: IntArray, load_LE: Loads) -> Placement:
        """Where each expert goes; when the living cannot hold all, what they hold already. LOCAL."""
        shape = self._shape
        held_LP = within(held_LP, view, shape.slots_per_rank)
        if trigger == "rebalance" and (prepared := self._prepared(view, held_LP)) is not None:
            return prepared
        if trigger in ("join", "scale"):
            held_LP = self._without_surplus(view, held_LP)
        if len(view.members) >= self._limits.min_ranks:
            try:
                return replan(
                    load_LE,
                    view,
                    num_experts=shape.num_experts,
                    slots_per_rank=shape.slots_per_rank,
                    num_replicas=shape.num_experts + shape.num_redundant,
                    held_LP=held_LP,
                    min_moves=trigger != "start",
                )
            except TooFewSlots:
                pass
        return Placement(held_LP, shape.num_experts, shape.slots_per_rank)

    def _without_surplus(self, view: View, held_LP: IntArray) -> IntArray:
        """What is to stay of what all hold, by the wish of a newcomer that has prepared; all of it, when none has."""
        newcomers = [m for m in view.members if m not in self.view]
        wish = next((wish for m in newcomers if (wish := self._calls.wish_of(m)) is not None), None)
        return held_LP if wish is None else settled(held_LP, wish, view, [m.rank for m in newcomers])

    def _adoption(self, change: Change, agreed: Agreed, routes_LEW: IntArray) -> Adoption:
        before = self._served.members if self._served else ()
        left = tuple(m.rank for m in before if m not in agreed.view and m in agreed.leaving)
        lost = tuple(m.rank for m in before if m not in agreed.view and m not in agreed.leaving)
        joined = tuple(m.rank for m in agreed.view.members if m not in before)
        causes = {rank: change.causes.get(rank, "timeout") for rank in lost}
        for member in before:
            if member.rank in causes and self._notices.is_dead(member):
                causes[member.rank] = self._notices.cause(member.rank)
        return Adoption(
            agreed.world,
            routes_LEW,
            agreed.trigger,
            lost,
            joined,
            causes,
            msgspec.structs.replace(self._seconds, detect=change.detect_s),
            dict(self._bytes),
            dict(self._source_s),
            agreed.step,
            left,
        )

    def _add(self, **phases: float) -> None:
        """Phases add up over the runs that one change took."""
        sums = {name: getattr(self._seconds, name) + seconds for name, seconds in phases.items()}
        self._seconds = msgspec.structs.replace(self._seconds, **sums)
