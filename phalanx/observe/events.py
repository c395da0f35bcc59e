"""What happened to the service, one JSON line an event, and one summary line a recovery for the log.

A recovery is what all living ranks did together under one epoch. Each of them reports its own timeline; `Recovery`
is their sum: a phase took as long as it took on the slowest rank, bytes add up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import IO, Any, TypeVar

import msgspec

from phalanx.errors import BadConfig
from phalanx.messages import StepSeconds

log = logging.getLogger("phalanx.events")

Number = TypeVar("Number", int, float)

PHASES = ("detect", "agree", "mask", "replan", "restore", "replay", "total")
SOURCES = ("peer", "vault", "peer_remote", "vault_remote", "disk")
"""Where experts were restored from: memory of this host or, `_remote`, of another one; disk."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """One change of membership, over all ranks. `seconds` by PHASES, `bytes_restored` by SOURCES;
    `seconds_restored` is what they took, by SOURCES and added up over the ranks, which restore at the same time."""

    trigger: str
    lost: list[int]
    joined: list[int]
    left: list[int] = []
    epoch: int
    previous_epoch: int
    seconds: dict[str, float]
    bytes_restored: dict[str, int]
    seconds_restored: dict[str, float]
    requests_moved: int
    steps_replayed: int
    causes: dict[int, str]
    prepared: dict[str, float] = {}
    """Of ranks that joined: seconds by what they did alone before they asked to be let in, the slowest of them."""
    first_step: dict[int, StepSeconds] = {}
    """By rank: what the first step under the new view, most of `replay`, was spent on."""
    pace: float = 0.0
    """Seconds that a step took those who were there before, in the median of their last ones; 0: they took too few."""
    outcome: str
    """complete: every rank of the view reported. partial: some did not in time. superseded: a further change came
    first. cannot_serve: the living cannot serve."""

    def summary(self) -> str:
        """The line that an operator reads. LOCAL."""
        phases = ", ".join(f"{name} {self.seconds[name]:.3f}" for name in PHASES if name != "total")
        restored = ", ".join(
            f"{count} bytes from {_words(source)}{self._rate(source)}"
            for source, count in self.bytes_restored.items()
            if count
        )
        what = "scaled" if self.trigger == "scale" else "recovered"
        return (
            f"{what}: {self._who()}, epoch {self.previous_epoch} -> {self.epoch}, "
            f"total {self.seconds['total']:.3f} s{self._steps()} ({phases}), {self.requests_moved} requests moved, "
            f"{restored or 'no bytes'} restored" + ("" if self.outcome == "complete" else f" ({self.outcome})")
        )

    def _rate(self, source: str) -> str:
        seconds = self.seconds_restored.get(source, 0.0)
        return f" at {self.bytes_restored[source] / seconds / 1e9:.2f} GB/s a rank" if seconds else ""

    def _steps(self) -> str:
        """What was foreseen costs those who serve about a step: so it is given in steps, too."""
        return f" = {self.seconds['total'] / self.pace:.2f} steps" if self.pace and not self.lost else ""

    def _who(self) -> str:
        parts = [f"lost ranks {self.lost}"] if self.lost else []
        came = "came in" if self.trigger == "scale" else "rejoined"
        parts += [f"ranks {self.joined} {came}"] if self.joined else []
        parts += [f"ranks {self.left} left"] if self.left else []
        return ", ".join(parts) or f"trigger {self.trigger}"


def by_kind(by_source: Mapping[str, Number]) -> dict[str, Number]:
    """Sums over peer, vault and disk, whichever host they are on. LOCAL."""
    found: dict[str, Number] = {}
    for source, value in by_source.items():
        kind = source.removesuffix("_remote")
        found[kind] = found[kind] + value if kind in found else value
    return found


def _words(source: str) -> str:
    kind = source.removesuffix("_remote")
    return kind if kind == source else f"{kind} of another host"


class EventLog:
    """Appends events to a JSON-lines file; an empty path keeps none. A disk that fails never fails the service."""

    def __init__(self, path: str) -> None:
        """BadConfig when the file cannot be written."""
        try:
            self._file: IO[bytes] | None = open(path, "ab", buffering=0) if path else None  # noqa: SIM115 - lives as long
        except OSError as error:
            raise BadConfig(f"--events-file {path} cannot be written: {error.strerror}") from None

    def append(self, event: str, **fields: Any) -> None:
        """Write one event with the time of day (seconds since 1970). LOCAL."""
        if self._file is None:
            return
        try:
            self._file.write(msgspec.json.encode({"event": event, "time": time.time(), **fields}) + b"\n")
        except OSError as error:
            log.error("events are no longer written: %s", error)
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
