"""Small cases against the optimum found by trying everything, and the same plan in every process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from phalanx.elastic.replan import at_risk, balancedness, replan
from phalanx.world import Member, Placement, View


def view(ranks: int) -> View:
    return View(1, ranks, tuple(Member(r, 0) for r in range(ranks)))


def every_placement(experts: int, ranks: int, width: int) -> list[tuple[tuple[int, ...], ...]]:
    """All ways to put different experts on each rank such that none is missing; ranks are interchangeable."""
    sets = list(itertools.combinations(range(experts), width))
    every = set(range(experts))
    return [p for p in itertools.combinations_with_replacement(sets, ranks) if set().union(*map(set, p)) == every]


def score(load: np.ndarray, ranks: tuple[tuple[int, ...], ...]) -> tuple[int, float, float]:
    """Ranks whose death loses an expert; load of the experts that are protected; load of the heaviest rank."""
    count = np.bincount([e for r in ranks for e in r], minlength=load.size)
    part = load / count
    exposed = sum(any(count[e] == 1 for e in r) for r in ranks)
    return exposed, float(load[count > 1].sum()), max(float(part[list(r)].sum()) for r in ranks)


SHAPES = [(4, 3, 2), (5, 3, 2), (5, 4, 2), (4, 4, 2), (6, 3, 3), (5, 3, 3), (4, 2, 3), (6, 4, 2), (3, 4, 2)]


@pytest.mark.parametrize(("experts", "ranks", "width"), SHAPES)
def test_small_plans_expose_as_few_ranks_as_the_optimum(experts: int, ranks: int, width: int) -> None:
    rng = np.random.default_rng(experts * 100 + ranks * 10 + width)
    every = every_placement(experts, ranks, width)
    for _ in range(6):
        load = rng.lognormal(0, 0.8, experts)
        scores = [score(load, p) for p in every]
        for priority in ("safety", "even"):
            plan = replan(load[None], view(ranks), num_experts=experts, slots_per_rank=width, priority=priority)
            assert int((at_risk(plan, view(ranks)) > 0).sum()) == min(s[0] for s in scores)


@pytest.mark.parametrize(("experts", "ranks", "width"), SHAPES)
def test_small_plans_come_within_five_percent_of_the_best_that_exposes_as_few_ranks(
    experts: int, ranks: int, width: int
) -> None:
    rng = np.random.default_rng(experts * 100 + ranks * 10 + width)
    every = every_placement(experts, ranks, width)
    for _ in range(6):
        load = rng.lognormal(0, 0.8, experts)
        scores = [score(load, p) for p in every]
        plan = replan(load[None], view(ranks), num_experts=experts, slots_per_rank=width)
        reached = load.sum() / ranks / balancedness(load[None], plan, view(ranks))
        assert reached <= 1.05 * min(s[2] for s in scores if s[0] == min(s[0] for s in scores))


@pytest.mark.parametrize(("experts", "ranks", "width"), SHAPES)
def test_small_plans_by_balance_come_within_five_percent_of_the_optimum(experts: int, ranks: int, width: int) -> None:
    rng = np.random.default_rng(experts * 100 + ranks * 10 + width)
    every = every_placement(experts, ranks, width)
    if ranks * width >= 2 * experts:
        every = [p for p in every if min(np.bincount([e for r in p for e in r])) >= 2]
    for _ in range(6):
        load = rng.lognormal(0, 0.8, experts)
        best = min(score(load, p)[2] for p in every)
        plan = replan(load[None], view(ranks), num_experts=experts, slots_per_rank=width, priority="balance")
        reached = load.sum() / ranks / balancedness(load[None], plan, view(ranks))
        assert reached <= best * 1.05


@pytest.mark.parametrize(("experts", "ranks", "width"), SHAPES)
def test_small_plans_by_safety_are_balanced_within_five_percent_of_equally_safe_ones(
    experts: int, ranks: int, width: int
) -> None:
    rng = np.random.default_rng(experts * 100 + ranks * 10 + width)
    every = every_placement(experts, ranks, width)
    for _ in range(6):
        load = rng.lognormal(0, 0.8, experts)
        plan = replan(load[None], view(ranks), num_experts=experts, slots_per_rank=width, priority="safety")
        mine = score(load, tuple(tuple(plan.of_rank(r)[0].tolist()) for r in range(ranks)))
        best = min(s[2] for s in (score(load, p) for p in every) if s[0] == mine[0] and s[1] >= mine[1] - 1e-9)
        assert mine[2] <= best * 1.05


PROGRAM = """
import hashlib, numpy as np
from phalanx.elastic.replan import replan, routes
from phalanx.world import Member, View
load = np.random.default_rng(5).lognormal(0, 1, (7, 64))
load[0] = 1.0
view = View(1, 16, tuple(Member(r, 0, host=f"h{r // 4}") for r in range(16) if r != 3))
out = hashlib.sha256()
held = None
for least in (False, False, True):
    plan = replan(load, view, num_experts=64, slots_per_rank=6, held_LP=held, min_moves=least)
    held = np.roll(plan.slots_LP, 6, axis=1)
    out.update(plan.slots_LP.tobytes())
    out.update(routes(plan, view, 5, 16, load).tobytes())
print(out.hexdigest())
"""


def test_plans_and_routes_are_the_same_in_every_process_however_many_threads_it_has() -> None:
    seen = set()
    for seed, threads in (("0", "1"), ("random", "4")):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        seen.add(run.stdout)
    assert len(seen) == 1


def test_a_plan_does_not_change_its_arguments() -> None:
    load = np.random.default_rng(0).lognormal(0, 1, (3, 16))
    first = replan(load, view(4), num_experts=16, slots_per_rank=8)
    held, copies = first.slots_LP.copy(), (load.copy(), first.slots_LP.copy())
    held[:, :8] = -1
    keep = held.copy()
    survivors = View(2, 4, tuple(Member(r, 0) for r in (1, 2, 3)))
    for least in (False, True):
        plan = replan(load, survivors, num_experts=16, slots_per_rank=8, held_LP=held, min_moves=least)
        assert isinstance(plan, Placement)
    assert np.array_equal(load, copies[0])
    assert np.array_equal(held, keep)
