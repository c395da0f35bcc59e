"""A planning child whose rank died is nobody's zombie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LAUNCHER = """
import os, signal, subprocess, sys, time
from phalanx.process import PLANNER, adopt_orphans, bury_orphans
adopt_orphans()
other = subprocess.Popen([sys.executable, "-c", "pass"])
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child = int(rank.stdout.readline())
rank.kill()
rank.wait()
deadline = time.monotonic() + 60
while not (buried := bury_orphans(PLANNER)):
    assert time.monotonic() < deadline
    os.sched_yield()
assert buried == [child], (buried, child)
assert not os.path.exists(f"/proc/{child}")
assert bury_orphans(PLANNER) == []
assert other.wait() == 0, "a child that somebody waits for is left alone"
"""

RANK = """
import numpy as np, time
from phalanx.elastic.planning import PlanProcess
from phalanx.elastic.rounds import Problem
from phalanx.world import Member
planner = PlanProcess()
planner.start(Problem(
    members=tuple(Member(r, 0) for r in range(4)), ep_size=4, num_experts=256, slots_per_rank=65, num_replicas=256,
    slots=np.full((2000, 260), -1, np.int32).tobytes(), load=np.ones((2000, 256), np.int64).tobytes(), min_gain=0.0,
))
with open("/proc/thread-self/children") as file:
    child = int(file.read().split()[0])
name = ""
while name != "phalanx-plan":
    with open(f"/proc/{child}/comm") as file:
        name = file.read().strip()
print(child, flush=True)
time.sleep(60)
"""


def test_a_planning_child_whose_rank_was_killed_is_buried_by_the_launcher_and_no_other_child_is() -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK], env={**os.environ, "PYTHONPATH": str(root)}, check=True, timeout=120
    )
