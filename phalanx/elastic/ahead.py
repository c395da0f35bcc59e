"""The next World, agreed on beside the steps, so that those who serve feel only the switch to it.

    recovery.begin("join")           a newcomer asks to be let in, all is staged that evens the load out, a rank leaves
    engine.step(*ahead.to_say)       the header of every step carries it: who hears of it begins, too
    recovery.work()                  after each step: the next bit of the roll call, which waits for nobody
    recovery.run(Change("join"))     when all are ready all leave the same step boundary, with the World in hand

It is the roll call of `elastic.agree`: the World of the next epoch, planned by the lowest member, written once. Only
the members' answers stand under keys of their own. They say what slots hold, while all serve; an answer in a roll call
after a failure says that somebody lives, so it must be a new one.

A failure may come at any point. What was published by then is the next World, as ever; what was not is forgotten. So
from its answer on, until it adopts the next World, whichever that is, a member's slots must not change (`under_way`).

Keys, n = the epoch that is agreed on, m = rank.incarnation:

    ahead/{n}/{m}      what member m answers                              written by m
    standing/{n}/{m}   newcomer m has adopted World n: nobody need wait for it   written by m
"""

from __future__ import annotations

from collections.abc import Callable

from phalanx.elastic.agree import Agreed, Answer, Limits, Meeting, RollCall
from phalanx.elastic.store import Clock
from phalanx.errors import PeerLost
from phalanx.messages import Trigger
from phalanx.world import IntArray, Member, View

FORESEEN: tuple[Trigger, ...] = ("rebalance", "join", "scale")
"""The changes that are agreed on so; in a step's header they are counted from 1, and 0 is none."""

LOOK_S = 0.002
"""How often the store is asked for what others have to do first."""


class Ahead:
    """One rank's part. LOCAL in all it does: it never waits for a peer."""

    def __init__(
        self,
        calls: RollCall,
        limits: Limits,
        clock: Clock,
        *,
        answer: Callable[[], Answer],
        routes: Callable[[Agreed], IntArray],
        reach: Callable[[View], bool] = lambda view: True,
    ) -> None:
        """answer: what this rank would say in a roll call. routes: its routing table under a World, int32 [L, E, W].
        reach: has whom a view brings made reachable, beside the steps; whether that is done (`Communicator.expect`)."""
        self._calls, self._limits, self._clock = calls, limits, clock
        self._answer, self._routes, self._reach = answer, routes, reach
        self.forget()

    def forget(self) -> None:
        """Nothing is under way: another World is adopted. LOCAL."""
        self.trigger: Trigger | None = None
        """Why the members are to meet; None when nothing is under way."""
        self.ready = False
        """Whether this rank has all that it needs to switch."""
        self._base: Agreed | None = None
        self._meeting: Meeting | None = None
        self._answered = False
        self._agreed: Agreed | None = None
        self._routes_LEW: IntArray | None = None
        self._not_standing: list[Member] = []
        self._since = self._look_at = 0.0

    @property
    def under_way(self) -> bool:
        """Whether this rank's slots must stay as they are."""
        return self.trigger is not None

    @property
    def to_say(self) -> tuple[int, bool]:
        """(proposal, ready) for the next step's header. LOCAL."""
        return (0 if self.trigger is None else FORESEEN.index(self.trigger) + 1, self.ready)

    def begin(self, base: Agreed, trigger: Trigger) -> None:
        """Begin, or hear that others have begun, with the World after `base`, which is served. Does nothing when
        something is under way already. LOCAL."""
        if not self.under_way:
            self.trigger, self._base, self._since = trigger, base, self._clock.now()

    def take(self) -> tuple[Agreed, IntArray] | None:
        """The World and this rank's routing table, int32 [L, E, W], if it is ready. Ends what is under way. LOCAL."""
        agreed, routes_LEW = self._agreed, self._routes_LEW
        self.forget()
        return None if agreed is None or routes_LEW is None else (agreed, routes_LEW)

    def work(self) -> bool:
        """Do the next bit. False when all depends on others, or nothing is to be done. Raises PeerLost. LOCAL."""
        if self._base is None or self.ready:
            return False
        if not self._answered:
            self._say(self._base)
            return True
        now = self._clock.now()
        if now < self._look_at:
            return False
        found = self._look(self._base)
        self._look_at = now if found else now + LOOK_S
        return found

    # --- the bits

    def _say(self, base: Agreed) -> None:
        assert self.trigger is not None
        self._answered, mine = True, self._answer()
        self._calls.answer_ahead(base.epoch + 1, mine)
        if base.view.members[0] == self._calls.me:
            self._meeting = Meeting(self._calls, base, self.trigger, frozenset())
            self._meeting.answers[self._calls.me] = mine
            self._calls.open(base.epoch + 1)

    def _look(self, base: Agreed) -> bool:
        """One question to the store, mostly; whether it brought this rank on."""
        if self._agreed is None:
            if self._meeting is not None:
                return self._collect(self._meeting)
            self._agreed = self._calls.read(base.epoch + 1)
            return self._agreed is not None
        if self._routes_LEW is None:
            self._reach(self._agreed.view)  # that begins it
            self._routes_LEW = self._routes(self._agreed)
        if not self._reach(self._agreed.view) and not self._late:
            return False
        if self._not_standing and not self._late:
            if not self._calls.is_standing(self._agreed.epoch, self._not_standing[-1]):
                return False
            self._not_standing.pop()
            return True
        self.ready = True
        return True

    def _collect(self, meeting: Meeting) -> bool:
        """Take in one answer, or publish when all have answered that are waited for; whether it brought this rank on.

        Raises PeerLost when a member is known to be dead, or another has its place."""
        expected = meeting.expected()
        if gone := [member.rank for member in meeting.members if member not in expected]:
            raise PeerLost(gone)  # a failure is dealt with at once
        absent = [member for member in expected if member not in meeting.answers]
        members = [member for member in absent if member in meeting.members]
        for member in members[:1] or absent:
            answer = self._calls.answer_of(meeting.epoch, member, ahead=bool(members))
            if answer is not None:
                meeting.answers[member] = answer
                return True
        if members or (absent and not self._late):
            return False
        known = meeting.newcomers
        meeting.look_for_newcomers()
        if meeting.newcomers == known or self._late:
            self._calls.publish(meeting)
            agreed = self._agreed = self._calls.read(meeting.epoch)
            assert agreed is not None, "somebody has published it"
            self._not_standing = [newcomer for newcomer in meeting.newcomers if newcomer in agreed.view]
            self._since = self._clock.now()
        return True

    @property
    def _late(self) -> bool:
        """Whether newcomers were waited for long enough, for what they do next."""
        return self._clock.now() - self._since >= self._limits.join_s
