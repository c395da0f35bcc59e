"""Where a worker's time went: a newcomer's before it came in, and everybody's in a recovery."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median

from phalanx import messages as m
from phalanx.elastic.recover import Adoption
from phalanx.world import Member

_PACE_STEPS = 32
"""So many steps say how long one takes."""


class Stopwatch:
    """How long a newcomer took for what, from the moment the launcher asked for it. Counts its first laps only."""

    def __init__(self, began_s: float) -> None:
        now = time.monotonic()
        self._laps = {"birth": now - began_s if began_s else 0.0}
        self._last, self._taken = now, False

    def lap(self, name: str) -> None:
        """What was done since the last lap was `name`. LOCAL."""
        now = time.monotonic()
        self._laps.setdefault(name, now - self._last)
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by name, once; nothing from then on. LOCAL."""
        laps = {} if self._taken else self._laps
        self._taken = True
        return laps


class Timeline:
    """Where the time of a recovery went, from the first sign of trouble to the first step under the new World."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._running = True
        self._cut_off = False
        self._adoption: Adoption | None = None
        self._adopted_at = 0.0
        self._bytes: dict[str, int] = {}
        self._source_s: dict[str, float] = {}
        self._ends: deque[float] = deque(maxlen=_PACE_STEPS + 1)
        self._pace = 0.0

    def trouble(self, detect_s: float) -> None:
        """A PeerLost was raised, `detect_s` after the first sign. The first of several counts. LOCAL."""
        if not self._running:
            self._began, self._running, self._cut_off = time.monotonic() - detect_s, True, True

    def adopted(self, adoption: Adoption, staged: dict[str, int], staged_s: dict[str, float]) -> None:
        """A new World stands; the replay begins. staged: bytes by source that were restored beforehand; staged_s: the
        seconds they took. LOCAL."""
        self._adoption, self._adopted_at = adoption, time.monotonic()
        ends = list(self._ends)
        self._ends.clear()
        self._pace = median(later - sooner for sooner, later in pairwise(ends)) if len(ends) > _PACE_STEPS // 2 else 0.0
        self._bytes = {
            source: adoption.bytes_restored.get(source, 0) + staged.get(source, 0)
            for source in {*adoption.bytes_restored, *staged}
        }
        self._source_s = {
            source: adoption.seconds_restored.get(source, 0.0) + staged_s.get(source, 0.0) for source in self._bytes
        }

    def stepped(
        self, me: Member, prepared: Stopwatch, seconds: m.StepSeconds, *, idle: bool, boundary: bool
    ) -> m.Recovered | None:
        """A step ended, and its tokens are on their way; the report, when it was the first since `adopted`. seconds:
        what it spent its time on. idle: nobody had anything to run, so no step was replayed either. boundary: see
        `StepResult`. LOCAL."""
        adoption, now = self._adoption, time.monotonic()
        if idle:
            self._ends.clear()
        else:
            self._ends.append(now)
        if boundary and not self._running:
            self._began, self._running = now, True
        if adoption is None:
            return None
        replayed = int(self._cut_off and not idle)
        self._adoption, self._running, self._cut_off = None, False, False
        phases = adoption.seconds
        return m.Recovered(
            rank=me.rank,
            incarnation=me.incarnation,
            epoch=adoption.world.epoch,
            trigger=adoption.trigger,
            lost=list(adoption.lost),
            seconds=m.PhaseSeconds(
                detect=phases.detect,
                agree=phases.agree,
                mask=phases.mask,
                replan=phases.replan,
                restore=phases.restore,
                replay=now - self._adopted_at,
                total=now - self._began,
            ),
            bytes_restored=self._bytes,
            seconds_restored=self._source_s,
            steps_replayed=replayed,
            prepared=prepared.take(),
            first_step=seconds,
            pace=self._pace,
        )
