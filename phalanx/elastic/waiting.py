"""A wait that lasts says what it waits for, so that a service that does not get on tells why."""

from __future__ import annotations

import logging

from phalanx.elastic.store import Clock

log = logging.getLogger("phalanx.elastic")

FIRST_S, AGAIN_S = 5.0, 30.0
"""After so long a wait is spoken of for the first time, and after so long again."""


class LongWait:
    """One wait, from now on. LOCAL throughout."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.now()
        self._due = self._began + FIRST_S

    @property
    def is_due(self) -> bool:
        """Whether it is to be spoken of: to be asked in each round of the wait."""
        return self._clock.now() >= self._due

    def say(self, what: str) -> None:
        """Say what is waited for; "" when somebody else says it."""
        now = self._clock.now()
        self._due = now + AGAIN_S
        if what:
            log.info("waiting for %s; %.0f s so far", what, now - self._began)
