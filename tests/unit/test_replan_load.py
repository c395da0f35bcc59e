"""Balancedness, gain, the load window and what deaths cost, on cases that can be reckoned by hand."""

from __future__ import annotations

import numpy as np
import pytest

from phalanx.elastic.replan import (
    LoadWindow,
    at_risk,
    at_risk_pairs,
    balancedness,
    endurance,
    gain,
    rank_loads,
    replan,
    restore_seconds,
    worth_adopting,
)
from phalanx.world import Member, Placement, View


def view(ranks: int, hosts: int = 1, dead: tuple[int, ...] = ()) -> View:
    return View(1, ranks, tuple(Member(r, 0, host=f"h{r * hosts // ranks}") for r in range(ranks) if r not in dead))


def place(*rows: list[int], experts: int, width: int) -> Placement:
    return Placement(np.array(rows, np.int32), experts, width)


def test_balancedness_is_mean_over_max_and_a_layer_without_load_counts_as_even() -> None:
    two = place([0, 1, 0, 2], [0, 1, 0, 2], experts=3, width=2)
    load = np.array([[4.0, 1.0, 3.0], [0, 0, 0]])
    assert rank_loads(load, two, view(2)).tolist() == [[3.0, 5.0], [0.0, 0.0]]
    assert balancedness(load, two, view(2)) == pytest.approx((4 / 5 + 1) / 2)


def test_dead_ranks_carry_nothing() -> None:
    two = place([0, 1, 0, 2], experts=3, width=2)
    assert rank_loads(np.array([[4.0, 1.0, 3.0]]), two, view(2, dead=(1,))).tolist() == [[5.0]]


def test_gain_is_the_time_saved_and_small_gains_are_not_worth_adopting() -> None:
    load = np.array([[3.0, 1.0, 1.0, 1.0]])
    uneven = place([0, 1, 2, 3], experts=4, width=2)
    even = place([0, 1, 2, 3], experts=4, width=2)
    better = place([0, 2, 1, 0, 3, 1], experts=4, width=3)
    assert gain(load, uneven, even, view(2)) == 0.0
    assert gain(load, uneven, better, view(2)) == pytest.approx(1 - 3 / 4)
    wide = place([0, 1, -1, 2, 3, -1], experts=4, width=3)
    assert worth_adopting(load, wide, better, view(2), 0.1)
    assert not worth_adopting(load, better, better, view(2), 0.0)


def test_a_plan_that_protects_more_is_worth_adopting_though_it_gains_nothing() -> None:
    load = np.ones((1, 2))
    bare = place([0, -1, 1, -1], experts=2, width=2)
    safe = place([0, 1, 1, 0], experts=2, width=2)
    assert gain(load, bare, safe, view(2)) == 0.0
    assert worth_adopting(load, bare, safe, view(2), 0.5)
    assert not worth_adopting(load, safe, bare, view(2), 0.5)


def test_the_window_slides_forgets_and_survives_a_restarted_counter() -> None:
    window = LoadWindow(1, 2, 2)
    for counter in ([[1, 1]], [[3, 1]], [[6, 2]]):
        window.observe(counter)
    assert window.full
    assert window.load_LE.tolist() == [[5, 1]]
    window.observe([[2, 0]])
    assert window.load_LE.tolist() == [[5, 1]]
    assert LoadWindow.merge([window.load_LE, [[1, 1]]]).tolist() == [[6, 2]]


def test_risk_counts_experts_that_one_or_two_deaths_lose() -> None:
    three = place([0, 1, 0, 2, 1, 3], [0, 1, 2, 3, 0, 1], experts=4, width=2)
    assert at_risk(three, view(3)).tolist() == [[0, 1, 1], [0, 2, 0]]
    assert at_risk_pairs(three, view(3)).tolist() == [[0, 4, 4], [4, 3, 4], [4, 4, 1]]
    lost = 0
    for layer in ([0, 1, 0, 2, 1, 3], [0, 1, 2, 3, 0, 1]):
        lost += len({0, 1, 2, 3} - set(layer[4:]))
    assert at_risk_pairs(three, view(3))[0, 1] == lost


def test_endurance_says_how_many_deaths_are_survived_with_and_without_restore() -> None:
    load = np.ones((2, 8))
    plan = replan(load, view(4, 2), num_experts=8, slots_per_rank=4)
    found = endurance(plan, view(4, 2))
    assert (found.at_once, found.with_restore, found.hosts_at_once) == (1, 2, 1)
    lone = replan(load, view(4, 2), num_experts=8, slots_per_rank=8, num_replicas=8)
    assert (endurance(lone, view(4, 2)).at_once, endurance(lone, view(4, 2)).with_restore) == (0, 3)


def test_restoring_takes_as_long_as_the_busiest_rank() -> None:
    assert restore_seconds([1, 4, 2], 10, 20.0) == 2.0
    assert restore_seconds([1, 4, 2], 10, 20.0, parallel=False) == 3.5
    assert restore_seconds([], 10, 20.0) == 0.0
