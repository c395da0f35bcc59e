"""When a rank that died is started again, and when it is given up: counting and back-off. Pure: time comes in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

SHORT_LIFE_S = 5.0
"""A process that lived less did not get far: the next one waits, twice as long each time."""

FIRST_DELAY_S = 0.25
LAST_DELAY_S = 8.0


FIRST_PATIENCE_S = 30.0
LAST_PATIENCE_S = 600.0
"""How long after no process could be started at all that is tried again: twice as long each time."""


@dataclass
class _History:
    started_s: deque[float] = field(default_factory=deque)
    short_lives: int = 0


class Restarts:
    """How often each rank was started again. `max_restarts` within any `window_s` seconds are allowed; 0: none."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max, self._window_s = max_restarts, window_s
        self._ranks: dict[int, _History] = {}

    def delay_s(self, rank: int, lived_s: float, now_s: float) -> float | None:
        """How long to wait before `rank`, whose process lived `lived_s`, is started again; None: it is given up.

        The first restart comes at once, and so does each after a life that was not short. LOCAL."""
        history = self._ranks.setdefault(rank, _History())
        while history.started_s and history.started_s[0] <= now_s - self._window_s:
            history.started_s.popleft()
        if len(history.started_s) >= self._max:
            return None
        history.short_lives = history.short_lives + 1 if lived_s < SHORT_LIFE_S else 0
        delay_s = 0.0
        if history.short_lives > 1:
            delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** (history.short_lives - 2))
        history.started_s.append(now_s + delay_s)
        return delay_s

    def forget(self, rank: int) -> None:
        """An operator starts the rank: what was before no longer counts. LOCAL."""
        self._ranks.pop(rank, None)

    def why_not(self, last_words: str, again: str = 'POST /fault_tolerance/apply {"instruction": "rejoin"}') -> str:
        """The reason for giving up a rank, for operators; `again` is what has it tried again. LOCAL."""
        if self._max == 0:
            return f"{last_words} (--max-restarts 0: it is not started again)"
        return (
            f"given up after {self._max} restarts within {self._window_s:.0f} s; the last one: {last_words} "
            f"({again} tries again)"
        )


class Barren:
    """Ranks that cannot be started because no process can be: they wait together for another try."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self.again_s: float | None = None
        """When it is tried again; None when nobody waits."""
        self._patience_s = FIRST_PATIENCE_S

    def add(self, ranks: Iterable[int], now_s: float) -> str:
        """Have these ranks wait; the reason, for operators. LOCAL."""
        self.ranks |= set(ranks)
        if self.again_s is None:
            self.again_s = now_s + self._patience_s
        return (
            "no process can be started: the one that forks workers ends each time (tried again in "
            f'{max(0.0, self.again_s - now_s):.0f} s, or by POST /fault_tolerance/apply {{"instruction": "rejoin"}})'
        )

    def take(self) -> set[int]:
        """It is tried again: who waited. The next wait would be twice as long. LOCAL."""
        ranks, self.ranks, self.again_s = self.ranks, set(), None
        self._patience_s = min(LAST_PATIENCE_S, 2 * self._patience_s)
        return ranks

    def born(self) -> None:
        """A process was started: what was before no longer counts. LOCAL."""
        self._patience_s = FIRST_PATIENCE_S
