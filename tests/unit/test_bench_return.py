"""What a benchmark reads of a return from a service's log and its streams."""

from __future__ import annotations

import re

import pytest

from phalanx.cli.bench_return import Return, figures
from phalanx.testing.streams import Stream

STEP_S = 0.1
HURT_S, BACK_S = 2.0, 4.5


class Log:
    """A service's log: lines, and when they came."""

    def __init__(self, *lines: tuple[float, str]) -> None:
        self._lines = lines

    def line_at(self, pattern: str, timeout_s: float = 0, *, after: int = 0) -> tuple[re.Match[str], float]:
        return next((found, at) for at, line in self._lines[after:] if (found := re.search(pattern, line)))


def let_in(ranks: str, pause_s: float) -> str:
    return f"recovered: ranks [{ranks}] rejoined, epoch 2 -> 3, total {pause_s:.3f} s = 1.25 steps (detect 0.000)"


def came_in(rank: int, birth_s: float) -> str:
    return f"rank {rank}.1 came in {birth_s + 1:.3f} s after it was started (birth {birth_s:.3f}, load 1.000)"


def stream() -> Stream:
    """A token in each step, and one that is late by two steps at second 4."""
    times = [STEP_S * n for n in range(1, 81) if n not in (39, 40)]
    return Stream("0", arrivals_s=times, counts=[1] * len(times))


OLD_LINES = (1.0, let_in("2, 3", 9.0)), (1.0, came_in(2, 9.0)), (1.0, came_in(3, 9.0))


def seen(*lines: tuple[float, str]) -> list[Return]:
    log = Log(*OLD_LINES, *lines)
    return Return.seen(log, [stream()], [(2, 1), (3, 1)], (HURT_S, BACK_S), len(OLD_LINES))  # type: ignore[arg-type]


def test_ranks_that_are_let_in_together_are_one_return_and_the_slowest_tells_what_took_time() -> None:
    (back,) = seen((4.0, let_in("2, 3", 0.2)), (4.1, came_in(2, 0.5)), (4.1, came_in(3, 0.75)))
    assert back.prepared_s == {"birth": 0.75, "load": 1.0}
    assert (back.pause_s, back.pause_steps) == (0.2, 1.25)
    assert back.step_s == pytest.approx(STEP_S)
    assert back.stalls_s == [pytest.approx(3 * STEP_S)]
    assert back.after_per_s / back.before_per_s == pytest.approx(1, rel=0.1)


def test_a_step_is_what_a_token_takes_also_where_a_client_that_lags_reads_several_at_once() -> None:
    bursts = Stream(
        "0", arrivals_s=[0.1, 0.5, 0.50001, 0.50002, 1.0, 1.00001, 4.0, 5.0], counts=[1, 2, 1, 1, 3, 2, 1, 1]
    )
    log = Log(*OLD_LINES, (4.0, let_in("2, 3", 0.2)), (4.1, came_in(2, 0.5)), (4.1, came_in(3, 0.5)))
    (back,) = Return.seen(log, [bursts], [(2, 1), (3, 1)], (HURT_S, BACK_S), len(OLD_LINES))  # type: ignore[arg-type]
    assert back.step_s == pytest.approx(0.1, rel=0.01)


def test_ranks_that_are_let_in_one_after_the_other_are_two_returns_to_one_full_strength() -> None:
    first, last = seen(
        (3.0, let_in("3", 0.1)), (3.0, came_in(3, 0.25)), (4.0, let_in("2", 0.2)), (4.1, came_in(2, 0.5)),
    )  # fmt: skip
    assert (first.prepared_s["birth"], last.prepared_s["birth"]) == (0.25, 0.5)
    assert first.stalls_s == [pytest.approx(STEP_S)]
    assert last.stalls_s == [pytest.approx(3 * STEP_S)]
    assert first.after_per_s == 0, "it is not at full strength yet"
    assert last.after_per_s > 0
    found = figures([[first, last]])
    assert found is not None
    assert (found["kill_to_full_strength_s"]["n"], found["kill_to_full_strength_s"]["max"]) == (1, BACK_S - HURT_S)
    assert found["gap_around_the_return_s"]["n"] == found["pause_of_healthy_ranks_s"]["n"] == 2
    assert found["pause_of_healthy_ranks_steps"]["max"] == 1.25
    assert found["rate_after_over_before"]["n"] == 1
    assert figures([[], []]) is None
