"""The roster: what the server knows of the ranks, told by their messages. Pure: no sockets, no clock.

Identity is (rank, incarnation). Who is in is what the newest view says, as the first `Adopted` of its epoch reports
it; a death that the launcher reports counts at once. Ranks speak over different connections, so any order between two
ranks' messages is possible, and only messages of one rank are in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from phalanx import messages as m
from phalanx.observe.events import PHASES, SOURCES, Recovery, by_kind


class Identity(NamedTuple):
    """One process in one rank's place."""

    rank: int
    incarnation: int


@dataclass(slots=True)
class RankRecord:
    """The newest incarnation of one rank."""

    identity: Identity
    pid: int = 0
    host: str = "localhost"
    device: str = ""
    dead: bool = False
    cause: str = ""
    detail: str = ""
    counted: bool = False
    """Its loss is in the metrics; one that only a notice evicted waits for the launcher to say the cause."""
    given_up: bool = False
    """It is dead, and the launcher does not start it again by itself."""
    leaving: bool = False
    """The service is being scaled down by it: it gets requests only when nobody else can take them."""
    paused: bool = False
    """It schedules nothing, as it last said."""
    suspected_by: set[int] = field(default_factory=set)
    in_recovery: bool = False
    """It said that it suspects others, and has neither adopted a view nor committed a step since."""
    cannot_serve: str = ""
    adopted_epoch: int = 0
    kv_tokens: int = 0
    """What its KV cache holds; 0: not known."""


@dataclass
class Tally:
    """A recovery as its ranks report it, one after the other."""

    trigger: str
    epoch: int
    previous_epoch: int
    lost: set[int]
    joined: list[int]
    causes: dict[int, str]
    stayed: bool = True
    """Somebody was there before."""
    left: list[int] = field(default_factory=list)
    requests_moved: int = 0
    reports: dict[Identity, m.Recovered] = field(default_factory=dict)

    def add(self, report: m.Recovered) -> None:
        self.reports[Identity(report.rank, report.incarnation)] = report
        self.lost |= set(report.lost)

    def recovery(self, outcome: str) -> Recovery:
        """The sum so far: slowest rank by phase, bytes added up. LOCAL.

        Where ranks joined, the phases are those of the others, for they had to wait; what the newcomers did, they did
        alone, before they asked to be let in."""
        reports = self.reports.values()
        waited = [report for who, report in self.reports.items() if not self.stayed or who.rank not in self.joined]
        return Recovery(
            trigger=self.trigger,
            lost=sorted(self.lost),
            joined=self.joined,
            left=self.left,
            epoch=self.epoch,
            previous_epoch=self.previous_epoch,
            seconds={p: max((getattr(r.seconds, p) for r in waited), default=0.0) for p in PHASES},
            bytes_restored={s: sum(r.bytes_restored.get(s, 0) for r in reports) for s in SOURCES},
            seconds_restored={s: sum(r.seconds_restored.get(s, 0.0) for r in reports) for s in SOURCES},
            requests_moved=self.requests_moved,
            steps_replayed=max((r.steps_replayed for r in reports), default=0),
            causes=self.causes,
            outcome=outcome,
            first_step={who.rank: r.first_step for who, r in self.reports.items()},
            pace=max((report.pace for report in waited), default=0.0),
            prepared={p: max(r.prepared.get(p, 0.0) for r in reports) for p in _newcomers_phases(reports)},
        )


def _newcomers_phases(reports: Iterable[m.Recovered]) -> list[str]:
    return list(dict.fromkeys(phase for report in reports for phase in report.prepared))


@dataclass
class Balance:
    """How evenly the experts' load is spread, as the ranks tell. replicas: filled slots, all layers and ranks; 0: not
    told yet. balancedness: None while nobody has measured it. moves: experts staged in the background, since start."""

    replicas: int = 0
    balancedness: float | None = None
    moves: int = 0


class Roster:
    """Every rank's state, from the messages of the ranks and the launcher."""

    def __init__(self, ep_size: int, places: int = 0) -> None:
        """ep_size: the ranks that start, in the first of `places` (0: as many as that)."""
        self.places = places or ep_size
        self.in_use = tuple(range(ep_size))
        """The places that an operator wants in use, ascending. A scaling changes it when it is done."""
        self.scaling = False
        self.epoch = 0
        self.members: frozenset[Identity] = frozenset()
        self.records: dict[int, RankRecord] = {}
        self.tally: Tally | None = None
        """The recovery in hand."""
        self.last_recovery: Recovery | None = None
        """See `remember`."""
        self.balance = Balance()
        self.hosts: dict[int, m.HostState] = {}
        self.vaults: dict[int, m.VaultState] = {}
        self._all_paused = False
        self._unlike_all: set[int] = set()
        """Ranks of which an operator said last something else than of all ranks."""
        self.ranks_needed = 1
        """How many ranks' slots hold every expert, as the ranks say."""
        self._needed_epoch = 0
        """A member that has not adopted this epoch yet is in recovery."""

    # --- who is who

    @property
    def ep_size(self) -> int:
        """How many ranks an operator wants."""
        return len(self.in_use)

    def current(self, rank: int, incarnation: int) -> RankRecord | None:
        """The record of a living, known identity; None for anyone else: what such a one says is not heard."""
        record = self.records.get(rank)
        return record if record is not None and record.identity.incarnation == incarnation and not record.dead else None

    @property
    def alive(self) -> int:
        """How many members live."""
        return sum(r.identity in self.members and not r.dead for r in self.records.values())

    @property
    def kv_tokens(self) -> int:
        """The longest request, in tokens, that every serving rank has room for; 0: not known."""
        return min((r.kv_tokens for r in self.serving() if r.kv_tokens), default=0)

    def serving(self) -> list[RankRecord]:
        """Members that live and can serve, paused ones included."""
        return [
            r for r in self.records.values() if r.identity in self.members and not r.dead and not r.cannot_serve
        ]  # fmt: skip

    def taking(self) -> list[RankRecord]:
        """Who of `serving` gets requests: all that no operator wants paused, whatever they have said of it so far."""
        return [r for r in self.serving() if not self.is_to_pause(r.identity.rank)]

    def all_reported(self) -> bool:
        """Whether a recovery is being counted of which every living member has told its times."""
        living = {identity for identity in self.members if self.current(*identity) is not None}
        return self.tally is not None and bool(living) and living <= self.tally.reports.keys()

    def state(self, rank: int) -> m.RankState:
        """What `GET /fault_tolerance/status` says of a rank."""
        record = self.records.get(rank)
        if record is None:
            return "recovering"
        if record.dead:
            return "dead"
        if record.identity not in self.members:
            return "rejoining" if self.members else "recovering"
        if record.suspected_by:
            return "suspected"
        if record.cannot_serve or record.in_recovery or record.adopted_epoch < self._needed_epoch:
            return "recovering"
        if record.leaving:
            return "leaving"
        return "paused" if record.paused else "healthy"

    def states(self) -> list[m.RankState]:
        return [self.state(rank) for rank in self.shown()]

    def shown(self) -> list[int]:
        """The ranks that there are to show: the places in use, and others where a process still lives."""
        return sorted({*self.in_use, *(rank for rank, record in self.records.items() if not record.dead)})

    def why_unreachable(self, rank: int) -> str:
        """Why nobody can be started in a rank's place now: its host is not there; empty when it is. LOCAL."""
        for node, host in self.hosts.items():
            if rank in host.ranks and host.state != "alive":
                return f"its host {node} is lost" if host.state == "lost" else f"its host {node} has not come yet"
        return ""

    def why_not_serving(self) -> str:
        """Why no rank can take a request; empty when one can."""
        if self.serving():
            return ""
        reasons = [r.cannot_serve for r in self.records.values() if not r.dead and r.cannot_serve]
        if reasons:
            return reasons[0]
        if not self.members:
            return "the ranks are starting"
        return "no rank is alive"

    def status(self) -> dict[str, Any]:
        """The body of `GET /fault_tolerance/status`."""
        last = self.last_recovery
        return {
            "epoch": self.epoch,
            "ep_size": self.ep_size,
            "max_ep_size": self.places,
            "scaling": self.scaling,
            "vault": self._vault_status(0),
            "hosts": [
                {
                    "node_rank": node, "host": host.host, "state": host.state, "ranks": host.ranks,
                    "reason": host.reason, "vault": self._vault_status(node),
                }
                for node, host in sorted(self.hosts.items())
            ],
            "ranks": [self._rank_status(rank) for rank in self.shown()],
            "last_recovery": None if last is None else {
                "trigger": last.trigger, "lost": last.lost, "joined": last.joined, "left": last.left,
                "epoch": last.epoch, "seconds": last.seconds,
                "bytes_restored": by_kind(last.bytes_restored), "seconds_restored": by_kind(last.seconds_restored),
                "requests_moved": last.requests_moved,
                "first_step": {str(rank): msgspec.structs.asdict(took) for rank, took in last.first_step.items()},
                "pace": last.pace,
            },
        }  # fmt: skip

    def vaults_within_reach(self) -> dict[int, m.VaultState]:
        """By host, as its keeper said last: one that was cut off keeps its vault, and says nothing when it is back."""
        return {
            node: vault
            for node, vault in self.vaults.items()
            if node not in self.hosts or self.hosts[node].state == "alive"
        }

    def _vault_status(self, node_rank: int) -> dict[str, Any]:
        vault = self.vaults_within_reach().get(node_rank, m.VaultState(state="off"))
        return {
            "state": vault.state, "pid": vault.pid, "restarts": vault.restarts, "filled_bytes": vault.filled_bytes,
            "total_bytes": vault.total_bytes, "reason": vault.reason,
        }  # fmt: skip

    def reasons(self) -> dict[str, str]:
        """By rank, why it does not serve, where that is known. LOCAL."""
        shown = self.shown()
        known = {
            str(rank): r.detail or r.cause or r.cannot_serve
            for rank, r in sorted(self.records.items()) if rank in shown
        }  # fmt: skip
        return {rank: reason for rank, reason in known.items() if reason}

    def _rank_status(self, rank: int) -> dict[str, Any]:
        record = self.records.get(rank) or RankRecord(Identity(rank, 0))
        return {
            "rank": rank,
            "incarnation": record.identity.incarnation,
            "state": self.state(rank),
            "pid": record.pid,
            "host": record.host,
            "device": record.device,
        }

    # --- what they say; each returns the identities that are lost by it

    def meet(self, identity: Identity) -> tuple[RankRecord | None, list[Identity]]:
        """The living record of an identity, made when it is the first or a newer one; None for an old or dead one."""
        known = self.records.get(identity.rank)
        if known is not None and identity.incarnation < known.identity.incarnation:
            return None, []
        if known is not None and identity == known.identity:
            return (None if known.dead else known), []
        if not 0 <= identity.rank < self.places:
            return None, []
        lost = [] if known is None or known.dead else [known.identity]
        self.records[identity.rank] = RankRecord(identity, paused=self.is_to_pause(identity.rank))
        return self.records[identity.rank], lost

    def died(self, message: m.Died) -> list[Identity]:
        identity = Identity(message.rank, message.incarnation)
        known = self.records.get(identity.rank)
        if known is not None and known.identity == identity and known.dead:
            known.cause, known.detail = message.cause, message.detail
            return []
        record, lost = self.meet(identity)
        if record is None:
            return []
        record.dead, record.cause, record.detail = True, message.cause, message.detail
        if identity in self.members:
            self._needed_epoch = max(self._needed_epoch, self.epoch + 1)
        return [*lost, identity]

    def host_state(self, message: m.HostState) -> list[Identity]:
        """A host came, or went with all its ranks at once."""
        before = self.hosts.get(message.node_rank)
        if before is not None and not message.host:
            message = msgspec.structs.replace(message, host=before.host)
        self.hosts[message.node_rank] = message
        detail = f"host {message.node_rank} is lost: {message.reason}"
        deaths = (m.Died(rank=r, incarnation=i, cause="host", detail=detail) for r, i in message.lost)
        return [identity for death in deaths for identity in self.died(death)]

    def given_up(self, message: m.GivenUp) -> None:
        who = Identity(message.rank, message.incarnation)
        record = self.records.setdefault(who.rank, RankRecord(who, dead=True))  # a new one, that nobody could start
        if record.identity == who:
            record.detail, record.given_up = message.reason, True

    def suspected(self, message: m.Suspected) -> None:
        by = self.current(message.rank, message.incarnation)
        if by is None or message.epoch < self.epoch:
            return
        by.in_recovery = True
        for rank in message.suspects:
            if rank in self.records:
                self.records[rank].suspected_by.add(message.rank)

    def adopted(self, message: m.Adopted) -> list[Identity]:
        """A rank serves under a view; the first to say so of an epoch tells who is in it."""
        lost = self._adopt_view(message) if message.epoch > self.epoch else []
        record = self.current(message.rank, message.incarnation)
        if record is not None:
            record.adopted_epoch = max(record.adopted_epoch, message.epoch)
            record.kv_tokens = message.kv_tokens
            self.ranks_needed = message.ranks_needed
            record.in_recovery, record.cannot_serve = False, ""
            for other in self.records.values():
                other.suspected_by.discard(message.rank)
        return lost

    def _adopt_view(self, message: m.Adopted) -> list[Identity]:
        before, previous_epoch = self.members, self.epoch
        self.epoch, self._needed_epoch = message.epoch, message.epoch
        self.members = frozenset(Identity(i.rank, i.incarnation) for i in message.members)
        lost: list[Identity] = []
        for info in message.members:
            record, replaced = self.meet(Identity(info.rank, info.incarnation))
            lost += replaced
            if record is not None:
                record.pid, record.host, record.device = info.pid, info.host, info.device
                record.suspected_by.clear()
        for identity in sorted(before - self.members):
            record = self.current(*identity)
            if record is not None:
                left = identity.rank in message.left
                record.dead, record.cause = True, "left" if left else message.causes.get(identity.rank, "timeout")
                record.counted = left  # nothing was lost with it
                lost.append(identity)
        if message.trigger != "start" and before:
            gone = {i.rank for i in before - self.members} - set(message.left) | set(message.lost)
            joined = sorted(i.rank for i in self.members - before)
            stayed = bool(self.members & before)
            self.tally = Tally(
                message.trigger,
                message.epoch,
                previous_epoch,
                gone,
                joined,
                dict(message.causes),
                stayed,
                sorted(message.left),
            )
        return lost

    def recovered(self, message: m.Recovered) -> bool:
        """Add a rank's timeline to the recovery in hand; True when every living member has reported."""
        if self.tally is None or message.epoch != self.tally.epoch:
            return False
        self.tally.add(message)
        living = {i for i in self.members if self.current(*i) is not None}
        done = living <= self.tally.reports.keys()
        self.remember(self.tally.recovery("complete" if done else "partial"))
        return done

    def remember(self, recovery: Recovery) -> None:
        """What the status shows as the last recovery: experts that moved while nobody came or went are none."""
        if recovery.trigger != "rebalance":
            self.last_recovery = recovery

    def cannot_serve(self, message: m.CannotServe) -> None:
        """A rank's view cannot serve. Who of the last view is not in that one can no more than its members: the ranks
        may know of a death before the launcher tells."""
        record = self.current(message.rank, message.incarnation)
        if record is None:
            return
        record.cannot_serve = message.reason or "the rank cannot serve"
        there = {Identity(info.rank, info.incarnation) for info in message.members}
        if message.epoch > self.epoch and there:
            for other in self.records.values():
                if other.identity in self.members - there and not other.dead:
                    other.cannot_serve = record.cannot_serve

    def balanced(self, message: m.Balance) -> Balance:
        """A rank says what it staged; the lowest one how even it is now. Returns all that is known."""
        self.balance.moves += message.moves
        if message.epoch >= self.epoch:
            self.balance.replicas = message.replicas or self.balance.replicas
            if message.balancedness is not None:
                self.balance.balancedness = message.balancedness
        return self.balance

    def order(self, rank: int | None, *, paused: bool) -> None:
        """An operator wants a rank (None: all) paused, or going on, whichever process runs it. LOCAL."""
        if rank is None:
            self._all_paused = paused
            self._unlike_all.clear()
        elif paused != self._all_paused:
            self._unlike_all.add(rank)
        else:
            self._unlike_all.discard(rank)

    def is_to_pause(self, rank: int) -> bool:
        """Whether an operator paused the rank: then its next process starts paused. LOCAL."""
        return self._all_paused != (rank in self._unlike_all)

    def paused(self, message: m.Paused) -> None:
        record = self.current(message.rank, message.incarnation)
        if record is not None:
            record.paused = message.paused

    def living(self) -> list[RankRecord]:
        """Every living rank, members or not, in rank order."""
        return [r for _, r in sorted(self.records.items()) if not r.dead]
