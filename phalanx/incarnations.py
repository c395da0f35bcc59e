"""The newest process of each rank, as the first host's launcher knows them. Pure: it asks and starts nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass
class Worker:
    """One incarnation of a rank, from the moment it is asked for."""

    rank: int
    incarnation: int
    pid: int = 0
    born_s: float = 0.0
    alive: bool = True
    masked: bool = False
    called_back: bool = False
    """It is out, its process has not ended yet, and an operator wants another one in its place."""
    member: bool = False
    """It was in a view."""
    retired: bool = False
    """Its place is no longer in use, and it was asked to end."""
    doomed_s: float | None = None
    """When it is to be killed, if it still lives: it was evicted, or has had all the time there is to come in."""

    @property
    def is_coming(self) -> bool:
        """Whether nobody waits for it but a scaling, say, and whoever wants its place filled."""
        return self.alive and not self.member and not self.masked

    @property
    def why_doomed(self) -> str:
        """Why it is killed when its time is over, for operators."""
        if self.retired:
            return "was asked to end and does not"
        return "was evicted and does not end" if self.member else "did not come in in time"


class Incarnations:
    """The newest worker of each rank; who came before counts as dead. LOCAL throughout."""

    def __init__(self) -> None:
        self._newest: dict[int, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._newest.values())

    def add(self, worker: Worker) -> Worker:
        """It takes its rank's place."""
        self._newest[worker.rank] = worker
        return worker

    def of(self, rank: int) -> Worker | None:
        """The newest one, alive or dead; None when the rank was never asked for."""
        return self._newest.get(rank)

    def living(self, rank: int) -> Worker | None:
        """The newest one, if it lives."""
        worker = self._newest.get(rank)
        return worker if worker is not None and worker.alive else None

    def current(self, rank: int, incarnation: int) -> Worker | None:
        """A living worker, when it is the newest of its rank; None for those that count as dead already."""
        worker = self.living(rank)
        return worker if worker is not None and worker.incarnation == incarnation else None

    @property
    def anybody(self) -> bool:
        """Whether a worker lives, or is coming."""
        return any(worker.alive for worker in self)

    def names(self) -> dict[int, int]:
        """Rank -> its newest incarnation."""
        return {worker.rank: worker.incarnation for worker in self}

    def unmasked(self, members: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of `members` that live, and that no operator took out."""
        return {name for name in members if (worker := self.current(*name)) is not None and not worker.masked}

    def due_s(self) -> list[float]:
        """When those that live are to be killed, if they are."""
        return [worker.doomed_s for worker in self if worker.alive and worker.doomed_s is not None]

    def take_due(self, now_s: float) -> list[Worker]:
        """Those that live and whose time is over; once."""
        due = [worker for worker in self if worker.alive and worker.doomed_s is not None and now_s >= worker.doomed_s]
        for worker in due:
            worker.doomed_s = None
        return due
