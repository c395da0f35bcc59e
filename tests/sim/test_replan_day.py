"""A day of drifting load with failures and rejoins: the guarantees hold at every step, and the load stays even."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.elastic.replan import LoadWindow, at_risk, balancedness, diff, replan, routes, worth_adopting
from phalanx.world import EMPTY, Member, Placement, View

LAYERS, EXPERTS, RANKS, HOSTS, WIDTH = 4, 64, 16, 4, 9
STEPS = 96
"""A quarter of an hour each."""


def member(rank: int, incarnation: int) -> Member:
    return Member(rank, incarnation, host=f"host{rank * HOSTS // RANKS}")


@pytest.mark.parametrize("seed", range(4))
def test_a_day_of_drift_failures_and_rejoins_keeps_every_guarantee(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log = rng.standard_normal((LAYERS, EXPERTS))
    window, counter = LoadWindow(LAYERS, EXPERTS, 4), np.zeros((LAYERS, EXPERTS), np.int64)
    view = View(1, RANKS, tuple(member(r, 0) for r in range(RANKS)))
    plan = replan(np.zeros((LAYERS, EXPERTS)), view, num_experts=EXPERTS, slots_per_rank=WIDTH)
    incarnation, evenness, deaths = 0, [], 0
    for _ in range(STEPS):
        log = 0.97 * log + 0.25 * rng.standard_normal(log.shape)
        counter = counter + rng.poisson(np.exp(log) * 200)
        window.observe(counter)
        load = window.load_LE
        held = plan.slots_LP
        alive = list(view.ranks)
        event = rng.random()
        if event < 0.25 and (len(alive) - 3) * WIDTH >= EXPERTS:
            lost = set(rng.choice(alive, size=int(rng.integers(1, 4)), replace=False).tolist())
            held = _without(held, lost)
            view = view.successor(view.epoch + 1, (m for m in view.members if m.rank not in lost))
            plan = replan(load, view, num_experts=EXPERTS, slots_per_rank=WIDTH, held_LP=held, min_moves=True)
            fresh = {(m.layer, m.expert) for r in view.ranks for m in diff(held, plan, r)}
            assert fresh == _missing(held)
            deaths += len(lost)
        elif event < 0.5 and len(alive) < RANKS:
            incarnation += 1
            back = min(set(range(RANKS)) - set(alive))
            view = view.successor(view.epoch + 1, (*view.members, member(back, incarnation)))
            plan = replan(load, view, num_experts=EXPERTS, slots_per_rank=WIDTH, held_LP=held)
        else:
            new = replan(load, view, num_experts=EXPERTS, slots_per_rank=WIDTH, held_LP=held)
            if worth_adopting(load, plan, new, view, 0.02):
                plan = new
            slots = len(view.ranks) * WIDTH
            if slots >= 2 * EXPERTS:
                assert at_risk(plan, view).sum() == 0
                evenness.append(balancedness(load, plan, view))
        assert plan.missing == ()
        assert all((plan.of_rank(r) == EMPTY).all() for r in range(RANKS) if r not in view.ranks)
        table = routes(plan, view, view.ranks[0], 8, load)
        assert set(np.unique(table // WIDTH).tolist()) <= set(view.ranks)
        chosen = np.take_along_axis(plan.slots_LP, table.reshape(LAYERS, -1), 1).reshape(table.shape)
        assert (chosen == np.arange(EXPERTS)[None, :, None]).all()
    assert deaths > 5
    assert np.mean(evenness) > 0.9


def _without(held: np.ndarray, lost: set[int]) -> np.ndarray:
    out = held.copy()
    for rank in lost:
        out[:, rank * WIDTH : (rank + 1) * WIDTH] = EMPTY
    return out


def _missing(held: np.ndarray) -> set[tuple[int, int]]:
    placement = Placement(held, EXPERTS, WIDTH)
    return set(placement.missing)
