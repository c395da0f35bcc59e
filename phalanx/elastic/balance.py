"""Load balancing in the background: count, plan, stage beside what serves, and switch at a step boundary.

    balancer.work(step)            after each step: the next bits of what is to be done, for a part of a step's time
    recovery.begin("rebalance")    when every rank has staged, the lowest one begins the switch, as for every change
                                   that is agreed on beside the steps; nothing is left to restore
    balancer.adopted(...)          whatever was under way for the World before is forgotten

What is staged is an ordinary expert in a slot that the World leaves EMPTY: marked, with its digest, `held` tells of it.
So nothing has to be undone when a rank dies half-way: its roll call finds more replicas than were there before.

Keys of the store, n = epoch, i = plans so far under it, m = rank.incarnation, all gone with the epoch:

    balance/{n}/load/{m}      the answer that m would give in a roll call     written by m
    balance/{n}/plan/{i}      what to stage, or that all stays as it is       written by the lowest rank
    balance/{n}/staged/{i}/{m}  m has staged its part, or could not           written by m
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from phalanx.elastic.agree import Agreed, Answer, Digests, Loads, Shape
from phalanx.elastic.planning import Planner
from phalanx.elastic.recover import Adoption
from phalanx.elastic.replan import LoadWindow, diff
from phalanx.elastic.restore import Bank, Restore, Source
from phalanx.elastic.rounds import Outcome, Problem
from phalanx.elastic.store import Clock, Store
from phalanx.elastic.vault.remote import Remote
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import EMPTY, IntArray, Member, Placement, View, World

log = logging.getLogger("phalanx.balance")

SHARE = 0.05
"""Which part of a step's time the work between two steps may take; what one expert takes longer is made good later."""

LONGEST_S = 0.005
"""And how long it may take at most: the time since the last step may have been sleep."""

PARTS = 16
"""The window moves on in this many parts: it is as fine as that, and takes so many arrays of memory."""

LOPSIDED = 1.25
"""How many experts of a layer a rank may be left with, in even shares, before a plan is made without being asked for.
What is less comes of most returns, and is no worse than what the load does."""

LOOK_S = 0.01
"""How often the store is asked for what others have to do first."""

_NOTHING, _YES, _NO = b"-", b"yes", b"no"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When to balance. window, interval: in steps; interval 0: only after a change of membership, where there are
    replicas to be made up for, or a join or a scaling left experts far from evenly spread. min_gain: the part of the
    experts' time that a plan must save. num_redundant: replicas a layer beyond one an expert."""

    window: int
    interval: int
    min_gain: float
    num_redundant: int

    def turn(self, step: int) -> int:
        """How many plans are due by then: one an interval, and one more as soon as the first window is full, so that
        the placement of the start, which knew no load, is soon made good for, and its balancedness known."""
        return step // self.interval + (step >= min(self.window, self.interval))

    @property
    def active(self) -> bool:
        return self.interval > 0 or self.num_redundant > 0


@dataclass(frozen=True)
class Report:
    """What to tell the operator. moves: experts that this rank staged since the last report. The rest is said by the
    lowest rank alone: replicas in all layers, and balancedness (None: not known)."""

    moves: int = 0
    replicas: int = 0
    balancedness: float | None = None


class _Round(msgspec.Struct, frozen=True, array_like=True):
    """What to stage: int32 [L, P], and the digests of all experts, uint64 [L, E]. more: another round will follow."""

    slots: bytes
    digests: bytes
    more: bool


class Balancer:
    """One rank's part. LOCAL in all it does: it never waits for a peer."""

    def __init__(
        self,
        me: Member,
        shape: Shape,
        rules: Rules,
        *,
        store: Store,
        clock: Clock,
        bank: Bank,
        sources: Sequence[Source | Remote],
        counter: Callable[[], Loads],
        planner: Planner,
        faults: Faults = NO_FAULTS,
    ) -> None:
        """counter: this rank's tokens by expert, int64 [L, E]; it only grows. It also counts steps that were not
        committed: one step in a window for each change of membership, with the experts that its replay asks again."""
        self._me, self._shape, self._rules = me, shape, rules
        self._store, self._clock, self._bank, self._sources = store, clock, bank, tuple(sources)
        self._counter, self._planner, self._faults = counter, planner, faults
        self._window = LoadWindow(shape.num_layers, shape.num_experts, PARTS)
        self._stride = -(-rules.window // PARTS)
        self._zero: Loads | None = None
        self._observed_at = self._turn = 0
        self._observed = np.zeros((shape.num_layers, shape.num_experts), np.int64)
        self._world: World | None = None
        self._last, self._credit, self._look_at = clock.now(), 0.0, 0.0
        self._keys: list[str] = []
        self._moves, self._report = 0, Report()
        self.bytes_by_source: dict[str, int] = {}
        """What was staged since `take_staged`."""
        self.seconds_by_source: dict[str, float] = {}
        """What that took."""
        self._rounds: list[tuple[bytes, float]] = []
        self._before = 0.0
        self._digest_LE: Digests = np.zeros((shape.num_layers, shape.num_experts), np.uint64)
        self._forget()

    def _forget(self) -> None:
        """Nothing is under way."""
        self._leftover: list[tuple[int, int]] = []
        self._plans = 0
        self._to_post = self._awaits = self._planning = self._publishes = self._told = False
        self._absent: list[Member] = []
        self._unstaged: list[Member] = []
        self._answers: list[Answer] = []
        self._job: Restore | None = None
        self._target: Placement | None = None
        self._more = False
        self.staged = False
        """Whether all have staged, and this rank is to begin the switch; until another World is served."""

    # --- what the worker's loop calls

    def load(self) -> Loads:
        """This rank's tokens by expert over the window, int64 [L, E]. LOCAL."""
        return self._window.load_LE + self._counted() - self._observed

    def prepared(self, view: View, held_LP: IntArray) -> Placement | None:
        """The placement that every member of `view` has staged, going by what they hold; None when there is none."""
        target, world = self._target, self._world
        if target is None or world is None or view.members != world.view.members:
            return None
        return target if ((held_LP == target.slots_LP) | (target.slots_LP == EMPTY)).all() else None

    def adopted(self, adoption: Adoption) -> None:
        """Another World is served. LOCAL."""
        if self._zero is None:
            self._zero = self._counter().copy()  # what the warm-up counted
        world, more = adoption.world, self._more
        as_staged = adoption.trigger == "rebalance" and self._target == world.placement
        self._planner.cancel()
        self._forget()
        self._world = world
        self._let_go()
        replicas = int((world.placement.slots_LP != EMPTY).sum()) if self._leads else 0
        if as_staged:
            self._awaits = more and not self._leads
            even = self._rounds.pop(0)[1] if self._leads and self._rounds else None
            self._publishes = self._leads and more
            if even is not None and not more:
                log.info("rebalanced: balancedness %.3f -> %.3f", self._before, even)
            self._report = Report(replicas=replicas, balancedness=even)
        else:
            self._rounds.clear()
            self._report = Report(replicas=replicas)
            if adoption.trigger not in ("start", "rebalance") and (self._rules.active or self._came_at_odds(adoption)):
                self._begin()

    def work(self, step: int) -> None:
        """Do the next bits of what is to be done, for a part of the time since the last call. `step`: the number of the
        last step, the same on all ranks. LOCAL."""
        now = self._clock.now()
        self._credit = min(0.0, self._credit) + min(LONGEST_S, SHARE * (now - self._last))
        if step - self._observed_at >= self._stride:
            self._observe(step)
        if self._rules.interval and (turn := self._rules.turn(step)) > self._turn:
            self._turn = turn
            self._begin()
        while self._credit > 0 and self._piece():
            now, before = self._clock.now(), now
            self._credit -= now - before
        self._last = self._clock.now()

    def idle_work(self) -> float:
        """Do one bit while there is nothing else to do. How many seconds to sleep at most before the next one; infinite
        when nothing is under way. LOCAL."""
        if self._piece():
            return 0.0
        stages = self._job is not None and self._job.remaining
        waits = self._awaits or self._absent or self._planning or self._unstaged or stages
        return LOOK_S if waits else math.inf

    def take_report(self) -> Report | None:
        """What is new since the last call. LOCAL."""
        report = Report(self._moves, self._report.replicas, self._report.balancedness)
        self._moves, self._report = 0, Report()
        return report if report != Report() else None

    def take_staged(self) -> tuple[dict[str, int], dict[str, float]]:
        """Bytes staged since the last call, and the seconds they took, by source. LOCAL."""
        taken = self.bytes_by_source, self.seconds_by_source
        self.bytes_by_source, self.seconds_by_source = {}, {}
        return taken

    # --- the counts

    def _counted(self) -> Loads:
        return self._observed if self._zero is None else self._counter() - self._zero

    def _observe(self, step: int) -> None:
        self._observed_at, self._observed = step, self._counted()
        self._window.observe(self._observed)

    # --- the bits

    @property
    def _leads(self) -> bool:
        return self._world is not None and self._world.view.members[0] == self._me

    def _came_at_odds(self, adoption: Adoption) -> bool:
        """Whether a join or a scaling left a rank with far more experts of a layer than an even share. Newcomers that
        prepared for different Worlds and came in together bring what each of them had hoped for (`elastic.rejoin`).

        Goes by what all members adopt alike: all or none of them begin."""
        if adoption.trigger not in ("join", "scale"):
            return False
        shape, view = self._shape, adoption.world.view
        by_rank = adoption.world.placement.slots_LP.reshape(shape.num_layers, -1, shape.slots_per_rank)
        filled_LN = (by_rank[:, view.ranks] != EMPTY).sum(axis=2)
        share, most = filled_LN.mean(axis=1), filled_LN.max(axis=1)
        return bool(((most > LOPSIDED * share) & (most > np.ceil(share))).any())

    def _begin(self) -> None:
        """Leave the counts for the lowest rank, unless something is under way; that rank then plans."""
        assert self._world is not None
        if self._job is not None or self._planning or self._publishes or self._absent:
            return
        if len(self._world.view.members) == 1:
            return
        self._to_post = True
        if self._leads:
            self._answers = []
            self._absent = [m for m in self._world.view.members if m != self._me]

    def _piece(self) -> bool:
        """The next bit; False when all depends on others, or nothing is to be done."""
        if self._leftover:
            self._bank.clear(*self._leftover.pop())
        elif self._to_post:
            self._post()
        elif self._publishes:
            self._publish()
        elif self._job is not None and self._job.remaining:
            return self._stage()
        elif self._job is not None and not self._told:
            self._tell()
        else:
            now = self._clock.now()
            if now < self._look_at:
                return False
            found = self._look()
            if not found:
                self._look_at = now + LOOK_S
            return found
        return True

    def _post(self) -> None:
        self._to_post, self._awaits = False, not self._leads
        answer = Answer(
            self._me, 0, self._bank.held_LS.astype(np.int32).tobytes(), self._bank.digest_LS.tobytes(),
            self.load().astype(np.int64).tobytes(),
        )  # fmt: skip
        if self._leads:
            self._answers.append(answer)
            self._planning = not self._absent and self._plan()
        else:
            self._set(f"load/{self._me}", msgspec.msgpack.encode(answer))

    def _look(self) -> bool:
        """Ask for one thing that others do first; whether it is done."""
        if self._absent and not self._to_post:
            return self._collect()
        if self._planning and (outcome := self._planner.poll()) is not None:
            self._planned(outcome)
            return True
        if self._unstaged and self._told:
            return self._count_staged()
        if self._awaits and (value := self._get(f"plan/{self._plans}")) is not None:
            self._awaits = False
            self._take(value)
            return True
        return False

    def _stage(self) -> bool:
        """One expert; false when all that is left is still on its way from other hosts."""
        assert self._job is not None
        left = self._job.remaining
        once = iter((True, False))
        self._faults.point("stage")
        before, before_s = dict(self._job.bytes_by_source), dict(self._job.seconds_by_source)
        self._job.advance(lambda: next(once), wait_s=0)
        for source, count in self._job.bytes_by_source.items():
            if count > before.get(source, 0):
                self._moves += 1
                self.bytes_by_source[source] = self.bytes_by_source.get(source, 0) + count - before.get(source, 0)
                seconds = self._job.seconds_by_source[source] - before_s.get(source, 0.0)
                self.seconds_by_source[source] = self.seconds_by_source.get(source, 0.0) + seconds
        return self._job.remaining < left

    def _tell(self) -> None:
        """Say that this rank's part is staged, or cannot be."""
        assert self._job is not None
        self._told, done = True, not self._job.lost
        if not self._leads:
            self._set(f"staged/{self._plans}/{self._me}", _YES if done else _NO)
            self._plans += 1
            self._awaits = True  # the switch comes first, unless another rank could not stage
        elif not done:
            self._give_up()
        elif not self._unstaged:
            self.staged = True

    def _take(self, value: bytes) -> None:
        """The lowest rank's word: stage, or nothing."""
        if value == _NOTHING:
            self._plans += 1
            self._job = self._target = None
            self._let_go()
        else:
            self._stage_for(msgspec.msgpack.decode(value, type=_Round))

    def _stage_for(self, plan: _Round) -> None:
        world, shape = self._world, self._shape
        assert world is not None
        slots_LP = np.frombuffer(plan.slots, np.int32).reshape(shape.num_layers, -1)
        digest_LE = np.frombuffer(plan.digests, np.uint64).reshape(shape.num_layers, -1)
        self._target = Placement(slots_LP, shape.num_experts, shape.slots_per_rank)
        self._more, self._told = plan.more, False
        served = world.placement
        nothing = np.zeros(digest_LE.shape, np.int64)
        held = Agreed(world.view, served, served.slots_LP, digest_LE, nothing, "rebalance", 0, 0.0)
        moves = diff(served.slots_LP, self._target, self._me.rank)
        self._job = Restore(moves, held, self._bank, self._sources, clock=self._clock)

    def _let_go(self) -> None:
        """Experts in slots that the World leaves EMPTY are to give their memory back."""
        assert self._world is not None
        unused = (self._bank.held_LS != EMPTY) & (self._world.placement.of_rank(self._me.rank) == EMPTY)
        self._leftover = [(layer, slot) for layer, slot in np.argwhere(unused).tolist()]

    # --- the lowest rank's bits

    def _collect(self) -> bool:
        value = self._get(f"load/{self._absent[-1]}")
        if value is None:
            return False
        self._absent.pop()
        self._answers.append(msgspec.msgpack.decode(value, type=Answer))
        self._planning = not self._absent and self._plan()
        return True

    def _plan(self) -> bool:
        world, shape = self._world, self._shape
        assert world is not None
        size = (shape.num_layers, shape.num_experts)
        load_LE = LoadWindow.merge(np.frombuffer(a.load, np.int64).reshape(size) for a in self._answers)
        self._digest_LE = np.zeros(size, np.uint64)
        for answer in self._answers:
            mine = world.placement.of_rank(answer.member.rank)
            digest_LS = np.frombuffer(answer.digests, np.uint64).reshape(mine.shape)
            layer, slot = np.nonzero(
                (mine != EMPTY) & (np.frombuffer(answer.held, np.int32).reshape(mine.shape) == mine)
            )
            self._digest_LE[layer, mine[layer, slot]] = digest_LS[layer, slot]
        self._answers = []
        self._planner.start(
            Problem(
                members=world.view.members,
                ep_size=shape.ep_size,
                num_experts=shape.num_experts,
                slots_per_rank=shape.slots_per_rank,
                num_replicas=shape.num_experts + shape.num_redundant,
                slots=world.placement.slots_LP.tobytes(),
                load=load_LE.tobytes(),
                min_gain=self._rules.min_gain,
            )
        )
        return True

    def _planned(self, outcome: Outcome) -> None:
        self._planning = False
        if outcome.balancedness:
            self._before = outcome.balancedness[0]
            replicas = int((self._world.placement.slots_LP != EMPTY).sum()) if self._world else 0
            self._report = Report(replicas=replicas, balancedness=outcome.balancedness[0])
        self._rounds = list(zip(outcome.rounds, outcome.balancedness[1:], strict=True))
        log.debug(
            "planned: %d rounds, gain %.3f, balancedness %s", len(self._rounds), outcome.gain, outcome.balancedness
        )
        self._publishes = True

    def _publish(self) -> None:
        """Tell the others what to stage, or that all stays as it is, and begin with this rank's own part."""
        assert self._world is not None
        self._publishes = False
        key = f"plan/{self._plans}"
        if not self._rounds:
            self._set(key, _NOTHING)
            self._plans += 1
            return
        plan = _Round(self._rounds[0][0], self._digest_LE.tobytes(), len(self._rounds) > 1)
        self._set(key, msgspec.msgpack.encode(plan))
        self._unstaged = [m for m in self._world.view.members if m != self._me]
        self._stage_for(plan)

    def _count_staged(self) -> bool:
        value = self._get(f"staged/{self._plans}/{self._unstaged[-1]}")
        if value is None:
            return False
        if value == _NO:
            self._give_up()
            return True
        self._unstaged.pop()
        if not self._unstaged:
            self.staged = True
        return True

    def _give_up(self) -> None:
        """Somebody could not stage: tell all that it stays as it is, until the next interval."""
        log.warning("an expert could not be staged: the placement stays as it is")
        self._rounds.clear()
        self._unstaged, self._job, self._target = [], None, None
        self._plans += 1
        self._publishes = True
        self._let_go()

    # --- the store

    def _get(self, key: str) -> bytes | None:
        assert self._world is not None
        return self._store.get(f"balance/{self._world.epoch}/{key}")

    def _set(self, key: str, value: bytes) -> None:
        """Write a key of this epoch; those that this rank wrote under earlier ones are of no use to anybody now."""
        assert self._world is not None
        here = f"balance/{self._world.epoch}/"
        for old in [k for k in self._keys if not k.startswith(here)]:
            self._store.delete(old)
            self._keys.remove(old)
        if here + key not in self._keys:
            self._keys.append(here + key)
        self._store.set(here + key, value)
