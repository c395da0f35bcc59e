"""Results that peers read where they stand: a step whose status is clean has read what was made for it, whoever dies,
stops, doubts or calls the roll meanwhile; and each part of the protocol is needed for it."""

from __future__ import annotations

import pytest
from sim_reads import Rules, World, faults


def wrong_steps(seed: int, rules: Rules) -> list[str]:
    world = World(seed, ranks=2 + seed % 3, steps=4, rules=rules)
    world.run(faults(world))
    assert world.clean_steps > 0
    return world.wrong


@pytest.mark.parametrize("first", range(0, 80, 40))
def test_a_step_with_a_clean_status_has_read_what_was_made_for_it(first: int) -> None:
    for seed in range(first, first + 40):
        assert wrong_steps(seed, Rules()) == []


@pytest.mark.parametrize("rules", [Rules(look=False), Rules(relay=False)], ids=["look", "relay"])
def test_without_one_rule_of_the_protocol_a_clean_status_lies(rules: Rules) -> None:
    assert any(wrong_steps(seed, rules) for seed in range(60, 400))
