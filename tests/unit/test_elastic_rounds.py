"""The way from one placement to another: what may be staged where, what may go when, and who plans it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.elastic.planning import PlanProcess
from phalanx.elastic.replan import at_risk, replan
from phalanx.elastic.rounds import Outcome, Problem, rounds, solve
from phalanx.world import EMPTY, Member, Placement, View

LAYERS = 3


def view_of(ranks: int) -> View:
    return View(1, ranks, tuple(Member(r, 0) for r in range(ranks)))


def skewed(seed: int, experts: int) -> np.ndarray:
    return (1000 * np.random.default_rng(seed).lognormal(0, 1.5, (LAYERS, experts))).astype(np.int64)


def placed(seed: int, ranks: int, experts: int, slots: int, replicas: int) -> Placement:
    """Where the planner puts experts under some load."""
    return replan(
        skewed(seed, experts), view_of(ranks), num_experts=experts, slots_per_rank=slots, num_replicas=replicas
    )


def by_rank(placement: Placement) -> np.ndarray:
    """[L, R, S]."""
    return placement.slots_LP.reshape(placement.num_layers, -1, placement.slots_per_rank)


def widened(placement: Placement) -> Placement:
    """The same with a slot a rank for every expert."""
    spare = placement.num_experts - placement.slots_per_rank
    slots = np.pad(by_rank(placement), ((0, 0), (0, 0), (0, spare)), constant_values=EMPTY)
    return Placement(slots.reshape(placement.num_layers, -1), placement.num_experts, placement.num_experts)


def homes(placement: Placement) -> set[tuple[int, int, int]]:
    """(layer, rank, expert) of all filled slots."""
    layer, rank, slot = np.nonzero(by_rank(placement) != EMPTY)
    experts = by_rank(placement)[layer, rank, slot]
    return set(zip(layer.tolist(), rank.tolist(), experts.tolist(), strict=True))


@st.composite
def ways(draw: st.DrawFn) -> tuple[Placement, Placement]:
    ranks, experts = draw(st.integers(2, 5)), draw(st.integers(2, 9))
    replicas = draw(st.integers(experts, 2 * experts))
    slots = min(experts, -(-replicas // ranks) + draw(st.integers(1, 3)))
    now = placed(draw(st.integers(0, 99)), ranks, experts, slots, draw(st.integers(experts, replicas)))
    return now, placed(draw(st.integers(0, 99)), ranks, experts, slots, replicas)


@settings(max_examples=60, deadline=None)
@given(ways())
def test_a_round_fills_only_empty_slots_and_leaves_no_expert_worse_off_than_both_placements(
    way: tuple[Placement, Placement],
) -> None:
    now, target = way
    least = np.minimum(now.count_LE, target.count_LE)
    for before, after in itertools.pairwise((now, *rounds(now, target))):
        changed = before.slots_LP != after.slots_LP
        assert changed.any(), "a round that changes nothing"
        assert ((before.slots_LP == EMPTY) | (after.slots_LP == EMPTY))[changed].all(), "a slot that serves is refilled"
        assert (after.count_LE >= least).all()


@settings(max_examples=60, deadline=None)
@given(ways())
def test_with_room_for_every_expert_the_last_round_is_the_target(way: tuple[Placement, Placement]) -> None:
    now, target = (widened(p) for p in way)
    assert homes((now, *rounds(now, target))[-1]) == homes(target)


def test_a_round_stages_a_part_of_what_a_rank_holds_or_one_layer() -> None:
    now, target = (widened(placed(seed, 4, 16, 16, 16)) for seed in (1, 2))
    for before, after in itertools.pairwise((now, *rounds(now, target, part=3))):
        staged = (by_rank(after) != by_rank(before)) & (by_rank(after) != EMPTY)
        layers = staged.any(axis=(1, 2)).sum()
        assert layers == 1 or staged.sum(axis=(0, 2)).max() <= 12 // 3


def test_where_no_slot_is_empty_the_way_ends_before_it_begins() -> None:
    now = Placement(np.array([[0, 1, 2, 3]]), 4, 2)
    assert rounds(now, Placement(np.array([[0, 2, 1, 3]]), 4, 2)) == ()


def test_one_empty_slot_is_enough_for_two_ranks_to_exchange_experts() -> None:
    now = Placement(np.array([[0, 1, EMPTY, 2, 3, 4]]), 5, 3)
    target = Placement(np.array([[0, 2, EMPTY, 1, 3, 4]]), 5, 3)
    assert homes(rounds(now, target)[-1]) == homes(target)


def problem(now: Placement, load: np.ndarray, *, replicas: int, min_gain: float = 0.05) -> Problem:
    return Problem(
        members=view_of(now.ep_size).members,
        ep_size=now.ep_size,
        num_experts=now.num_experts,
        slots_per_rank=now.slots_per_rank,
        num_replicas=replicas,
        slots=now.slots_LP.tobytes(),
        load=load.tobytes(),
        min_gain=min_gain,
    )


def test_a_skewed_load_is_worth_a_plan_and_every_round_says_how_even_it_is() -> None:
    now = replan(np.ones((LAYERS, 8)), view_of(4), num_experts=8, slots_per_rank=8, num_replicas=8)
    outcome = solve(problem(now, skewed(5, 8), replicas=8))
    assert outcome.gain > 0.05
    assert len(outcome.balancedness) == len(outcome.rounds) + 1
    assert outcome.balancedness[-1] > outcome.balancedness[0]


def test_a_gain_below_the_least_one_changes_nothing_but_is_measured() -> None:
    now = replan(np.ones((LAYERS, 8)), view_of(4), num_experts=8, slots_per_rank=8, num_replicas=8)
    outcome = solve(problem(now, skewed(5, 8), replicas=8, min_gain=0.9))
    assert outcome.rounds == ()
    assert len(outcome.balancedness) == 1


def test_missing_replicas_are_made_up_for_whatever_that_gains() -> None:
    even = np.full((LAYERS, 8), 100, np.int64)
    now = replan(even, view_of(4), num_experts=8, slots_per_rank=8, num_replicas=8)
    outcome = solve(problem(now, even, replicas=16, min_gain=0.9))
    last = Placement(np.frombuffer(outcome.rounds[-1], np.int32).reshape(LAYERS, -1), 8, 8)
    assert last.count_LE.sum() == LAYERS * 16
    assert not at_risk(last, view_of(4)).any()


def test_before_anything_is_served_experts_count_alike() -> None:
    lopsided = np.full((LAYERS, 4, 8), EMPTY, np.int32)
    for rank, experts in enumerate(([0, 1, 2, 3], [4, 5], [6], [7])):
        lopsided[:, rank, : len(experts)] = experts
    now = Placement(lopsided.reshape(LAYERS, -1), 8, 8)
    outcome = solve(problem(now, np.zeros((LAYERS, 8), np.int64), replicas=8))
    assert outcome.balancedness[0] == 0.5
    last = Placement(np.frombuffer(outcome.rounds[-1], np.int32).reshape(LAYERS, -1), 8, 8)
    assert ((by_rank(last) != EMPTY).sum(axis=2) == 2).all()


def outcome_of(planner: PlanProcess) -> Outcome:
    """Wait for the child as the tests may and the service may not."""
    while (outcome := planner.poll()) is None:
        planner.wait(0.1)
    return outcome


def test_a_process_plans_what_would_be_planned_here() -> None:
    now = replan(np.ones((LAYERS, 8)), view_of(4), num_experts=8, slots_per_rank=8, num_replicas=8)
    question = problem(now, skewed(5, 8), replicas=12)
    planner = PlanProcess()
    planner.start(question)
    assert outcome_of(planner) == solve(question)
    assert planner.poll() is None


def test_a_planner_that_fails_leaves_everything_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    now = placed(1, 4, 8, 8, 8)
    planner = PlanProcess()
    planner.start(problem(now, np.full((LAYERS, 8), -1, np.int64), replicas=8))  # no load is negative
    assert outcome_of(planner) == Outcome()
    assert "planning failed" in caplog.text


def test_a_problem_that_is_no_longer_of_interest_has_no_outcome() -> None:
    planner = PlanProcess()
    planner.start(problem(placed(1, 4, 8, 8, 8), skewed(1, 8), replicas=8))
    planner.cancel()
    assert planner.poll() is None
