"""A worker whose next step is launched while one runs, as on a device, without a device: a process for tests.

Everything is a CPU rank's (communicator, slots, recovery, restores, the worker's loop), but for the model: its batches
run later than they are launched, and it makes its tokens of what it finds in the KV blocks. The spec comes on stdin.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from engine_doubles import VOCAB, Device, NoRoutes, PagedModel, Weather

from phalanx import worker
from phalanx.backend import CpuBackend, Place
from phalanx.engine.scheduler import Limits
from phalanx.process import WorkerSpec


class LeadingRunner(Device):
    """Nothing of it is slow the first time."""

    def warm_up(self, limits: Limits) -> None: ...


class LeadingBackend(CpuBackend):
    """A rank's parts; nobody's tokens ask for an expert."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._load_counts_LE = np.zeros((place.model.num_moe_layers, place.model.num_experts), np.int64)

    def runner(self, *_: Any) -> LeadingRunner:
        runner = LeadingRunner(PagedModel(self.limits, weather := Weather()), None, NoRoutes(), VOCAB)
        runner.weather = weather
        return runner

    def load(self) -> npt.NDArray[np.int64]:
        return self._load_counts_LE


if __name__ == "__main__":
    sys.exit(worker.run(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WorkerSpec), LeadingBackend))
