"""Work that one does for all, also when the one who took it on dies."""

from __future__ import annotations

import pytest
import torch

from phalanx.elastic.once import once
from phalanx.elastic.store import FakeClock, MemoryStore
from phalanx.moe.linear import EXACT, INEXACT, Products, choose


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore(clock)


def never() -> str:
    raise AssertionError("this was done already")


def test_the_first_does_the_work_and_all_later_ones_read_what_came_out(store: MemoryStore, clock: FakeClock) -> None:
    assert once(store, "k", lambda: "yes", me="0.0", patience_s=5) == "yes"
    assert once(store, "k", never, me="1.0", patience_s=5) == "yes"
    assert once(store, "k", never, me="0.1", patience_s=5) == "yes"
    assert clock.now() == 0.0, "nobody had to wait"


def test_who_comes_while_another_is_at_work_waits_for_it(store: MemoryStore, clock: FakeClock) -> None:
    def work() -> str:
        with pytest.raises(AssertionError, match="done already"):
            once(store, "k", never, me="1.0", patience_s=5)
        assert 5 <= clock.now() < 6, "it lost patience and went to work itself"
        return "first"

    assert once(store, "k", work, me="0.0", patience_s=5) == "first"


def test_the_work_of_a_rank_that_died_over_it_is_done_by_those_who_waited(store: MemoryStore, clock: FakeClock) -> None:
    def die() -> str:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        once(store, "k", die, me="0.0", patience_s=5)
    assert once(store, "k", lambda: "second", me="1.0", patience_s=5) == "second"
    assert 5 <= clock.now() < 6


def test_of_two_outcomes_the_first_that_is_written_counts_for_both(store: MemoryStore) -> None:
    def slow() -> str:
        assert once(store, "k", lambda: "fast", me="1.0", patience_s=5) == "fast"
        return "slow"

    assert once(store, "k", slow, me="0.0", patience_s=5) == "fast"


def test_products_follow_the_outcome_of_a_check_that_another_rank_did() -> None:
    shapes = [(64, 32)]
    assert choose(shapes, torch.float32, lambda check: EXACT) == Products.usual(torch.float32)
    assert choose(shapes, torch.float32, lambda check: INEXACT) == Products.fixed()
