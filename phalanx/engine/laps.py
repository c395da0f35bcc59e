"""What one call of `Engine.step` spent its time on: read when a step was slow, such as the first after a recovery."""

from __future__ import annotations

import time
from typing import Literal

from phalanx.messages import StepSeconds

Lap = Literal["meet", "launch", "meet_next", "launch_next", "wait", "commit"]


class Laps:
    """Seconds by what was done, from the construction on; a reading of the clock each. LOCAL."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: Lap) -> None:
        """What was done since the last lap was `name`."""
        now = time.monotonic()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> StepSeconds:
        """All laps so far."""
        return StepSeconds(**self._seconds)
