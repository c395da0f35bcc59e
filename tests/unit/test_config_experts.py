"""How many expert slots a rank gets, and which choices contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.config import ServeConfig
from phalanx.errors import BadConfig

EXPERTS = 16


def slots(**choices: Any) -> int:
    config = ServeConfig(model="m", **{"ep_size": 4, "min_ranks": 4, **choices})
    config.check()
    return config.expert_slots(EXPERTS)


def test_without_balancing_a_rank_has_the_slots_that_are_filled() -> None:
    assert slots() == 4


@pytest.mark.parametrize(("choices", "filled"), [({"enable_eplb": True}, 4), ({"num_redundant_experts": 8}, 6)])
def test_where_experts_may_move_a_rank_has_one_slot_more_to_stage_into(choices: dict[str, Any], filled: int) -> None:
    assert slots(**choices) == filled + 1


def test_the_last_ranks_room_for_all_experts_is_room_enough_to_stage() -> None:
    assert slots(enable_eplb=True, min_ranks=1) == EXPERTS
    assert slots(num_redundant_experts=3 * EXPERTS) == EXPERTS


def test_slots_that_are_all_filled_leave_nothing_to_balance_with() -> None:
    with pytest.raises(BadConfig, match=r"--slots-per-rank 6 leaves none: raise it to 7"):
        slots(enable_eplb=True, num_redundant_experts=8, slots_per_rank=6)
    assert slots(enable_eplb=True, num_redundant_experts=8, slots_per_rank=7) == 7
    assert slots(num_redundant_experts=8, slots_per_rank=6) == 6


@pytest.mark.parametrize(
    ("choices", "flag"),
    [
        ({"eplb_window": 0}, "--eplb-window"),
        ({"eplb_interval": -1}, "--eplb-interval"),
        ({"eplb_min_gain": -0.1}, "--eplb-min-gain"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(choices: dict[str, Any], flag: str) -> None:
    with pytest.raises(BadConfig, match=flag):
        slots(**choices)


def test_a_service_that_may_shrink_has_slots_for_every_expert_at_its_smallest() -> None:
    assert slots(max_ep_size=8) == 4
    assert slots(max_ep_size=8, min_ranks=2) == 8
    assert slots(max_ep_size=8, min_ranks=3, slots_per_rank=6) == 6
    with pytest.raises(
        BadConfig, match=r"--min-ranks 2, whose 12 slots .* raise --min-ranks to 3 or --slots-per-rank to 8"
    ):
        slots(max_ep_size=8, min_ranks=2, slots_per_rank=6)
    assert slots(min_ranks=2, slots_per_rank=6) == 6, "without it fewer ranks wait for others, as ever"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"max_ep_size": 3}, "--max-ep-size 3 is less than the --ep-size 4"),
        ({"max_ep_size": -1}, "--max-ep-size must not be negative"),
        ({"max_ep_size": 8, "elastic": False}, "--no-elastic"),
        ({"max_ep_size": 1025}, "--max-ep-size 1025 is more than 1024"),
    ],
)
def test_a_largest_size_that_makes_no_sense_is_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        slots(**choices)


def test_there_are_as_many_places_as_ranks_at_most() -> None:
    assert ServeConfig(model="m", ep_size=4).places == 4
    assert ServeConfig(model="m", ep_size=4, max_ep_size=9).places == 9
