"""The ledger: which identity has which requests, and who gets the next one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.server.flight import Flight
from phalanx.server.roster import Identity, RankRecord


class Ledger:
    """Every request that somebody has, by who has it."""

    def __init__(self) -> None:
        self._on: dict[Identity, dict[str, Flight]] = {}
        self._turn: dict[int, int] = {}
        self._turns = 0

    def of(self, identity: Identity) -> list[Flight]:
        """What one identity has. LOCAL."""
        return list(self._on.get(identity, {}).values())

    def give(self, identity: Identity, flight: Flight) -> None:
        """An identity gets a request: it was its turn. LOCAL."""
        flight.at = identity
        self._on.setdefault(identity, {})[flight.request.request_id] = flight
        self._turns += 1
        self._turn[identity.rank] = self._turns

    def take(self, flight: Flight) -> None:
        """Whoever has a request has it no more. LOCAL."""
        if flight.at is not None:
            self._on.get(flight.at, {}).pop(flight.request.request_id, None)

    def take_all(self, identity: Identity) -> list[Flight]:
        """An identity has nothing more; what it had. LOCAL."""
        return list(self._on.pop(identity, {}).values())

    def choose(self, able: Sequence[RankRecord]) -> Identity | None:
        """Of those that take requests (`Roster.taking`) the one with the fewest, then with the fewest tokens, then the
        one that waited longest for its turn; None when nobody can take one.

        A member in recovery is as good as any: it queues the request and runs it when it is through. A suspect is
        taken only when nobody else is there, and so is one that is to leave. LOCAL."""
        able = [r for r in able if not r.leaving] or able
        able = [r for r in able if not r.suspected_by] or able
        return min((r.identity for r in able), key=self._burden, default=None)

    def _burden(self, identity: Identity) -> tuple[int, int, int]:
        flights = self.of(identity)
        return len(flights), sum(f.tokens for f in flights), self._turn.get(identity.rank, 0)
