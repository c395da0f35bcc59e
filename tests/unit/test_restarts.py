"""When a dead rank is started again, how long it waits, and when it is given up."""

from __future__ import annotations

from phalanx.restarts import FIRST_PATIENCE_S, LAST_DELAY_S, LAST_PATIENCE_S, Barren, Restarts


def test_a_rank_that_had_served_is_started_again_at_once_every_time() -> None:
    restarts = Restarts(100, window_s=60)
    assert [restarts.delay_s(0, lived_s=20, now_s=20 * n) for n in range(10)] == [0.0] * 10


def test_a_rank_that_dies_on_each_start_waits_longer_each_time_and_is_given_up() -> None:
    restarts = Restarts(4, window_s=60)
    assert [restarts.delay_s(0, lived_s=0.1, now_s=n) for n in range(5)] == [0.0, 0.25, 0.5, 1.0, None]


def test_the_delay_has_a_bound() -> None:
    restarts = Restarts(100, window_s=1e9)
    delays = [restarts.delay_s(0, lived_s=0.1, now_s=n) for n in range(30)]
    assert delays[-1] == LAST_DELAY_S


def test_restarts_that_are_long_past_do_not_count() -> None:
    restarts = Restarts(2, window_s=10)
    assert [restarts.delay_s(1, lived_s=9, now_s=n) for n in (0.0, 5.0, 9.0, 10.0)] == [0.0, 0.0, None, 0.0]


def test_each_rank_has_its_own_count_and_an_operator_clears_it() -> None:
    restarts = Restarts(1, window_s=60)
    assert restarts.delay_s(0, 9, 0) == 0.0
    assert restarts.delay_s(1, 9, 0) == 0.0
    assert restarts.delay_s(0, 9, 1) is None
    restarts.forget(0)
    assert restarts.delay_s(0, 9, 2) == 0.0


def test_no_restarts_at_all_can_be_asked_for_and_the_reason_says_so() -> None:
    restarts = Restarts(0, window_s=60)
    assert restarts.delay_s(0, 100, 0) is None
    assert "--max-restarts 0" in restarts.why_not("killed by SIGKILL")


def test_the_reason_for_giving_up_names_the_count_the_cause_and_the_way_back() -> None:
    reason = Restarts(3, window_s=60).why_not("ValueError: no")
    assert "3 restarts within 60 s" in reason
    assert "ValueError: no" in reason
    assert "rejoin" in reason


def test_ranks_that_no_process_can_be_started_for_wait_together_and_longer_each_time() -> None:
    barren = Barren()
    assert barren.again_s is None
    assert "30 s" in barren.add([2], now_s=100.0)
    assert "20 s" in barren.add([0], now_s=110.0)
    assert barren.again_s == 100.0 + FIRST_PATIENCE_S
    assert barren.take() == {0, 2}
    assert (barren.again_s, barren.take()) == (None, set())
    for _ in range(20):
        barren.add([1], now_s=0.0)
        assert barren.take() == {1}
    barren.add([1], now_s=0.0)
    assert barren.again_s == LAST_PATIENCE_S
    barren.take()
    barren.born()
    barren.add([1], now_s=5.0)
    assert barren.again_s == 5.0 + FIRST_PATIENCE_S
