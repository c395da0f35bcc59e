"""Who is alive, what each slot holds, and where each expert goes: agreed by a roll call over a store.

Worlds form a chain. World n + 1 is made by a roll call of the members of World n, and the key `world/{n + 1}` is
written at most once, by compare_set. From that alone follows that equal epoch means equal World, that two sides of a
split cannot both go on, and that a rank that slept through epochs can find out by following the chain: the first World
without it is the end of it (`Evicted`).

Keys, n = epoch, m = rank.incarnation:

    entry/{n}/{m}   what m answers to the roll call for n         written by m
    open/{n}        somebody opened the roll call for n           a hint for newcomers
    ahead/{n}/{m}, standing/{n}/{m}                               `elastic.ahead`
    plan/{n}/{m}    the World for n as m would have it            written by m
    world/{n}       the m whose plan became the World for n       compare_set, once
    latest          a published epoch to start following from     a hint for newcomers
    joiners         newcomers that ask to be let in               compare_set
    digests/{m}     digests of what m holds, for when m is dead   written by m
    coming/{rank}   the incarnation that was started for a rank   written by the launcher, a hint for newcomers
    wish/{m}        the placement that newcomer m prepared for    written by m, `elastic.rejoin`

No I/O but through store and clock, so the whole of it runs in a simulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
import numpy as np

from phalanx.elastic.agreed import (
    Agreed,
    Answer,
    Change,
    Digests,
    Limits,
    Loads,
    Notices,
    Plan,
    Shape,
    decoded,
    learn,
)
from phalanx.elastic.leave import granted, still_readable
from phalanx.elastic.store import Clock, FakeClock, MemoryStore, MonotonicClock, Store, TcpStore
from phalanx.elastic.waiting import LongWait
from phalanx.errors import Evicted, Left
from phalanx.messages import Trigger
from phalanx.testing.faults import NO_FAULTS, Faults
from phalanx.world import EMPTY, IntArray, Member, Placement, View

__all__ = [
    "Agreed", "Answer", "Change", "Clock", "Digests", "FakeClock", "Limits", "Loads", "MemoryStore", "MonotonicClock",
    "Notices", "RollCall", "Shape", "Store", "TcpStore",
]  # fmt: skip

_LOOK_S = 0.004
"""How long a wait may last before notices are looked at again."""


_KNOCK_EVERY_S = 0.5
"""How often a newcomer that is not let in knocks again: whom it knocked at may have died."""


Planner = Callable[[Trigger, View, IntArray, Loads], Placement]
"""(trigger, view, held_LP, load_LE) -> placement. Never raises: a placement with `missing` experts says it cannot."""


class RollCall:
    """One rank's part in every agreement. What is agreed stands in the store alone."""

    def __init__(
        self,
        me: Member,
        shape: Shape,
        limits: Limits,
        *,
        store: Store,
        clock: Clock,
        notices: Notices,
        plan: Planner,
        knock: Callable[[View], None] = lambda view: None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        """knock: tells the members of a view, as well as it can, that a newcomer asks to be let in."""
        self.me = me
        self._shape, self._limits = shape, limits
        self._store, self._clock, self._notices = store, clock, notices
        self._plan, self._knock, self._faults = plan, knock, faults
        self._chores = deque[Callable[[], object]]()

    def follow(self, base: Agreed | None) -> Agreed | None:
        """The last World of the chain, from `base` on; None before the first. Raises Evicted at one without this rank,
        if this rank was in before. LOCAL."""
        if base is None:
            base = self.read(int(self._store.get("latest") or 0))
        member = base is not None and self.me in base.view
        while (agreed := self.read((base.epoch if base else 0) + 1)) is not None:
            base = agreed
            if self.me in base.view:
                member = True
            elif member:
                raise self.outside(base)
        return base

    def hold(self, base: Agreed | None, trigger: Trigger, mine: Answer, known_dead: Iterable[Member] = ()) -> Agreed:
        """Answer the roll call that follows `base` (None: the first meeting), and return its outcome. COLLECTIVE.

        known_dead: members that are dead for certain, besides those on the notice board. Ends by itself, at the latest
        some time after roll_call_s, whoever dies meanwhile. Raises Evicted when the others went on without it."""
        meeting = Meeting(self, base, trigger, frozenset(known_dead))
        self._faults.point("roll_call")
        self.post(f"entry/{meeting.epoch}/{self.me}", mine)
        self.open(meeting.epoch)
        meeting.answers[self.me] = mine
        opened, wait = self._clock.now(), LongWait(self._clock)
        while (agreed := self.read(meeting.epoch)) is None:
            if self.is_dead(self.me):
                raise self._evicted(meeting.epoch)
            if meeting.is_closed(self._clock.now() - opened):
                self.publish(meeting)
            else:
                if wait.is_due:
                    wait.say(meeting.whom_it_waits_for())
                self._store.wait(meeting.awaited(), _LOOK_S)
        if self.me not in agreed.view:
            raise self.outside(agreed)
        return agreed

    def join(self, mine: Answer) -> tuple[Agreed, bool]:
        """Ask to be let in. Returns the World that has this rank, and whether others made it. Waits until the members
        meet; they wait for a newcomer at most join_s. Raises Evicted when they do not meet for longer than start_s.
        LOCAL."""
        patience_s = self._limits.start_s + self._limits.roll_call_s  # the first meeting may be open already
        deadline = self._clock.now() + patience_s
        last = self.follow(None)
        asked = answered = 0
        knock_at, wait = 0.0, LongWait(self._clock)
        while self._clock.now() < deadline and not self.is_dead(self.me):
            epoch = (last.epoch if last else 0) + 1
            if wait.is_due:
                wait.say(f"the others to let rank {self.me} in with World {epoch}")
            if asked < epoch:
                self._faults.point("join")
                self._ask_in()
                asked, knock_at = epoch, self._clock.now()
            if last is not None and answered < epoch and self._clock.now() >= knock_at:
                self._ask_in()  # whoever died while it made another World may have struck this rank off
                self._knock(last.view)
                knock_at = self._clock.now() + _KNOCK_EVERY_S
            if last is not None and all(self.is_dead(m) for m in last.view.members):
                try:  # nobody is left to let it in
                    return self.hold(last, "join", mine), False
                except Evicted:  # another newcomer was faster: it is a member now, and can be asked
                    last = self.follow(last)
                    continue
            # An answer must be fresh, or a newcomer that died while it waited would be let in.
            if answered < epoch and self._store.wait(f"open/{epoch}", _LOOK_S) is not None:
                self.post(f"entry/{epoch}/{self.me}", mine)
                answered = epoch
            if answered == epoch:
                self._store.wait(f"world/{epoch}", _LOOK_S)
            if (agreed := self.read(epoch)) is not None:
                last = self.follow(agreed)
                if last is not None and self.me in last.view:
                    return last, True
                deadline = self._clock.now() + patience_s
        raise self._evicted(last.epoch if last else 0)

    def joiners(self) -> tuple[tuple[int, int], ...]:
        """(rank, incarnation) of newcomers that ask to be let in. LOCAL."""
        return _parse_joiners((self._store.get("joiners") or b"").decode())

    def remember(self, mine: Answer) -> None:
        """Leave behind the digests of what this rank holds, for when it can no longer answer. LOCAL."""
        self.post(f"digests/{self.me}", mine)

    def coming(self) -> tuple[Member, ...]:
        """Newcomers that the launcher has started, as far as their identity goes. LOCAL."""
        found = ((rank, self._store.get(f"coming/{rank}")) for rank in range(self._shape.ep_size))
        return tuple(Member(rank, int(value)) for rank, value in found if value)

    def all_digests(self, agreed: Agreed) -> Digests:
        """uint64 [L, E]: the digests of the last World, and those that its members have found since. LOCAL."""
        digest_LE = agreed.digest_LE.copy()
        for member in agreed.view.members if (digest_LE == 0).any() else ():
            if (found := self.digests_of(member)) is not None:
                learn(digest_LE, found, self._shape.slots_per_rank)
        return digest_LE

    def wish(self, placement: Placement) -> None:
        """Leave behind what this newcomer has prepared for. LOCAL."""
        self._store.set(f"wish/{self.me}", placement.slots_LP.tobytes())

    def wish_of(self, member: Member) -> Placement | None:
        """What a newcomer has prepared for; None when it has nothing prepared. LOCAL."""
        value = self._store.get(f"wish/{member}")
        if value is None:
            return None
        slots_LP = np.frombuffer(value, np.int32).reshape(self._shape.num_layers, -1)
        return Placement(slots_LP, self._shape.num_experts, self._shape.slots_per_rank)

    def stand(self, epoch: int) -> None:
        """Say that this newcomer has adopted World `epoch`, and needs nothing more than the others' switch. LOCAL."""
        self._store.set(f"standing/{epoch}/{self.me}", b"1")

    def is_standing(self, epoch: int, member: Member) -> bool:
        return self._store.get(f"standing/{epoch}/{member}") is not None

    def tidy(self) -> bool:
        """Do one thing that only saves room and time, as deleting what was needed for past Worlds; it may be cut off at
        any point by this rank's death. False when nothing is to be done. LOCAL."""
        if not self._chores:
            return False
        self._chores.popleft()()
        return True

    # --- for meetings

    def answer_ahead(self, epoch: int, mine: Answer) -> None:
        """Answer the roll call for `epoch` that goes on beside the steps."""
        self._faults.point("roll_call")
        self.post(f"ahead/{epoch}/{self.me}", mine)

    def open(self, epoch: int) -> None:
        """Tell newcomers that the roll call for `epoch` is open."""
        self._store.set(f"open/{epoch}", b"1")

    def post(self, key: str, mine: Answer) -> None:
        self._store.set(key, msgspec.msgpack.encode(mine))

    def answer_of(self, epoch: int, member: Member, *, ahead: bool = False) -> Answer | None:
        value = self._store.get(f"{'ahead' if ahead else 'entry'}/{epoch}/{member}")
        return msgspec.msgpack.decode(value, type=Answer) if value else None

    def digests_of(self, member: Member) -> Answer | None:
        value = self._store.get(f"digests/{member}")
        return msgspec.msgpack.decode(value, type=Answer) if value else None

    # --- parts

    def is_dead(self, member: Member) -> bool:
        return self._notices.is_dead(member)

    def outside(self, agreed: Agreed) -> Evicted | Left:
        out = Left if self.me in agreed.leaving else Evicted
        return out(self.me.rank, self.me.incarnation, agreed.epoch)

    def _evicted(self, epoch: int) -> Evicted:
        return Evicted(self.me.rank, self.me.incarnation, epoch)

    def read(self, epoch: int) -> Agreed | None:
        """The World of an epoch, or None when there is none yet."""
        if epoch == 0 or not (winner := self._store.get(f"world/{epoch}")):
            return None
        value = self._store.get(f"plan/{epoch}/{winner.decode()}")
        if value is None:  # two epochs old and more: whoever did not follow in time was not waited for
            raise self._evicted(epoch)
        return decoded(value, self._shape)

    def publish(self, meeting: Meeting) -> None:
        """Plan, and write the plan down as the World unless another one was faster."""
        self._faults.point("publish")
        view, leaving, held_LP, digest_LE, load_LE, step = meeting.outcome()
        trigger = meeting.trigger_of(view, leaving)
        planning = self._clock.now()
        placement = self._plan(trigger, view, held_LP, load_LE)
        plan = Plan(
            view.epoch, trigger, view.members, step, self._clock.now() - planning, placement.slots_LP.tobytes(),
            held_LP.tobytes(), digest_LE.tobytes(), load_LE.tobytes(), leaving,
        )  # fmt: skip
        self._store.set(f"plan/{view.epoch}/{self.me}", msgspec.msgpack.encode(plan))
        if meeting.newcomers:  # now, because those whom this World leaves out ask again as soon as they see it
            self._forget_joiners(meeting.newcomers)
        if self._store.compare_set(f"world/{view.epoch}", "", str(self.me)) == str(self.me):
            self._move_latest(meeting.epoch)
            self._leave_chores(meeting, view)

    def _leave_chores(self, meeting: Meeting, view: View) -> None:
        """What `tidy` is to do. The launcher does it instead when this rank dies before."""
        epoch = meeting.epoch
        members = (*meeting.members, *meeting.newcomers, *meeting.left)
        names = [f"{key}/{epoch - 1}/{m}" for m in members for key in ("entry", "ahead", "standing")]
        names += [f"plan/{epoch - 3}/{m}" for m in members]
        names += [f"wish/{m}" for m in meeting.newcomers if m in view]  # who did not answer in time may come next
        self._chores.extend(partial(self._store.delete, name) for name in names)
        self._chores.append(lambda: self._delete_plan(epoch - 3))

    def _move_latest(self, epoch: int) -> None:
        """A newcomer that starts from there must find its plan: so this is no chore that may wait while one change
        follows the other, and never goes back, should others have made later Worlds meanwhile."""
        while not (before := (self._store.get("latest") or b"").decode()) or int(before) < epoch:
            self._store.compare_set("latest", before, str(epoch))

    def _delete_plan(self, epoch: int) -> None:
        """Whose plan it was may have left long since."""
        if winner := self._store.get(f"world/{epoch}"):
            self._store.delete(f"plan/{epoch}/{winner.decode()}")

    def _ask_in(self) -> None:
        me = (self.me.rank, self.me.incarnation)
        while me not in (asking := self.joiners()):
            self._swap_joiners(asking, (*asking, me))

    def _forget_joiners(self, gone: Iterable[Member]) -> None:
        names = {(m.rank, m.incarnation) for m in gone}
        while names & set(asking := self.joiners()):
            self._swap_joiners(asking, tuple(name for name in asking if name not in names))

    def _swap_joiners(self, old: tuple[tuple[int, int], ...], new: tuple[tuple[int, int], ...]) -> None:
        before, after = (",".join(f"{rank}.{incarnation}" for rank, incarnation in names) for names in (old, new))
        self._store.compare_set("joiners", before, after)


class Meeting:
    """One roll call as one rank sees it: who is expected, who answered, and whether this rank is to end it."""

    def __init__(self, calls: RollCall, base: Agreed | None, trigger: Trigger, known_dead: frozenset[Member]) -> None:
        self._calls, self._base, self._trigger, self._known_dead = calls, base, trigger, known_dead
        self._shape, self._limits = calls._shape, calls._limits
        self.epoch = (base.epoch if base else 0) + 1
        self.answers: dict[Member, Answer] = {}
        first = range(self._shape.starting or self._shape.ep_size)
        self.members = base.view.members if base else tuple(Member(r, 0) for r in first)
        self.left = base.leaving if base else ()
        self.newcomers: tuple[Member, ...] = ()
        self.look_for_newcomers()

    def look_for_newcomers(self) -> None:
        self.newcomers = tuple(
            Member(rank, incarnation)
            for rank, incarnation in self._calls.joiners()
            if 0 <= rank < self._shape.ep_size
            and not any(m.rank == rank and m.incarnation >= incarnation for m in self.members)
        )

    def expected(self) -> tuple[Member, ...]:
        """Everyone who may be in the next view and is not known to be dead: members first, by rank, then newcomers. A
        newcomer in a member's place says that this member is dead: the launcher starts it only then."""
        newest: dict[int, int] = {}
        for m in (*self.members, *self.newcomers):
            newest[m.rank] = max(newest.get(m.rank, 0), m.incarnation)
        return tuple(
            m
            for m in (*self.members, *self.newcomers)
            if m.incarnation == newest[m.rank] and m not in self._known_dead and not self._calls.is_dead(m)
        )

    def is_closed(self, open_s: float) -> bool:
        """Whether this rank is to publish now, `open_s` seconds after it answered.

        The lowest member does when all have answered, or the time is over. When it does not, the next in line does a
        little later, and so on: only one of them can succeed, so a wrong guess here costs time but harms nothing."""
        expected = self.expected()
        limit = self._limits.start_s if self._base is None else self._limits.roll_call_s
        late = open_s >= limit
        if not late and (not expected or expected[0] != self._calls.me):
            return False
        self.look_for_newcomers()
        expected = self.expected()
        for member in expected:
            if member not in self.answers and (answer := self._calls.answer_of(self.epoch, member)) is not None:
                self.answers[member] = answer
        present = [m for m in expected if m in self.answers]
        if self._calls.me not in present:
            return False
        if late:
            return open_s >= limit + self._limits.succession_s * present.index(self._calls.me)
        waited = self.members if open_s >= min(self._limits.join_s, limit) else expected
        return all(m in self.answers for m in expected if m in waited)

    def awaited(self) -> str:
        """The key whose appearance most likely lets this rank go on."""
        expected = self.expected()
        if expected and expected[0] == self._calls.me:
            absent = next((m for m in expected if m not in self.answers), None)
            if absent is not None:
                return f"entry/{self.epoch}/{absent}"
        return f"world/{self.epoch}"

    def whom_it_waits_for(self) -> str:
        """Who has not answered yet, for the log; "" when a rank before this one has answered, and says it."""
        answered = {m: m in self.answers or self._calls.answer_of(self.epoch, m) is not None for m in self.expected()}
        first = next((m for m, here in answered.items() if here), None)
        absent = ", ".join(str(m) for m, here in answered.items() if not here)
        return f"ranks {absent} to meet for World {self.epoch}" if absent and first == self._calls.me else ""

    def trigger_of(self, view: View, leaving: Iterable[Member]) -> Trigger:
        """What kind of change it became: whoever opened it for another reason, a lost member makes it a failure."""
        if self._base is None:
            return "start"
        gone = {m for m in self._base.view.members if m not in view}
        if gone - set(leaving):
            return "failure" if self._trigger != "operator" else self._trigger
        new = [self.answers[m] for m in view.members if m not in self._base.view]
        if gone or any(answer.scaled for answer in new):
            return "scale"
        return "join" if new else self._trigger

    def outcome(self) -> tuple[View, tuple[Member, ...], IntArray, Digests, Loads, int]:
        """The next view, who leaves, held_LP, digest_LE, load_LE and the last step, from the answers of those who are
        alive."""
        shape, calls = self._shape, self._calls
        present = [self.answers[m] for m in self.expected() if m in self.answers]
        asked = {name for answer in present for name in answer.leaving}
        asking = [answer.member for answer in present if (answer.member.rank, answer.member.incarnation) in asked]
        slots_needed = -(-shape.num_experts // shape.slots_per_rank)
        leaving = granted(asking, len(present), max(self._limits.min_ranks, slots_needed))
        staying = [answer.member for answer in present if answer.member not in leaving]
        view = View(self.epoch, shape.ep_size, tuple(sorted(staying)))
        layers, slots = shape.num_layers, shape.slots_per_rank
        held_LP = np.full((layers, shape.ep_size * slots), EMPTY, np.int32)
        digest_LE = np.zeros((layers, shape.num_experts), np.uint64)
        load_LE = np.zeros((layers, shape.num_experts), np.int64)
        if self._base is not None:
            digest_LE = self._base.digest_LE.copy()
            for member in self._base.view.members:
                if member not in view and (left := calls.digests_of(member)) is not None:
                    learn(digest_LE, left, slots)
        for answer in sorted(present, key=lambda a: a.member):
            here = slice(answer.member.rank * slots, (answer.member.rank + 1) * slots)
            held_LP[:, here] = learn(digest_LE, answer, slots)
            load_LE += np.frombuffer(answer.load, np.int64).reshape(load_LE.shape)
        if self._base is not None:
            ranks = {answer.member.rank for answer in present}
            earlier = [m for m in self.left if m.rank not in ranks and not calls.is_dead(m)]
            leaving += still_readable(earlier, self._base.held_LP, held_LP, slots)
        return view, leaving, held_LP, digest_LE, load_LE, max((a.step for a in present), default=0)


def _parse_joiners(text: str) -> tuple[tuple[int, int], ...]:
    names = (name.split(".") for name in text.split(",") if name)
    return tuple((int(rank), int(incarnation)) for rank, incarnation in names)
