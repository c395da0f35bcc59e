"""Experts move in the background of a real service: no stream changes, whoever dies while they move."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import becomes, chaos, eventually, get, healthy, metric, restored
from standing import Standing
from streams import SAMPLING, Streams

from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

SKEWED = ["aaaaaaaaaaaaaaaa " * 4, "aaaaaaaa", "aaaaaaaaaaaa " * 2, "aaaaaaaa b", "aaaaa", "aaaaaaaaaaaaaaaaaaaaaaaa"]
"""The same few tokens over and over: they ask the same few experts."""

LENGTH = 100
EPLB = {"enable_eplb": True, "eplb_window": 16, "eplb_interval": 16, "eplb_min_gain": 0.0}

Serve = Callable[..., Service]
Unfailed = dict[str, list[Any]]


def both_kinds(url: str) -> dict[str, Streams]:
    seeds = {"seed": list(range(len(SKEWED)))}
    return {
        kind: Streams(url, SKEWED, LENGTH, **{**options, **(seeds if "seed" in options else {})}).start()
        for kind, options in SAMPLING.items()
    }


@pytest.fixture(scope="module")
def unmoved(alone: Service) -> Unfailed:
    """What one rank, whose experts never move, streams for the same prompts."""
    return {kind: running.join() for kind, running in both_kinds(alone.url).items()}


@pytest.fixture(scope="module")
def moving(tiny: Path) -> Iterator[Standing]:
    """A service that moves experts about all the time."""
    service = Standing(tiny, **EPLB, num_redundant_experts=4)
    yield service
    service.end()


def stream_until_dead(service: Service, rank: int, where: str, unmoved: Unfailed) -> None:
    """Tell a rank to die, and stream until it has: on a slow machine experts may first move in a later round."""
    incarnation = service.status()["ranks"][rank]["incarnation"]  # it may die, and be back, at once
    chaos(service, "kill", rank, where=where)
    dead = False
    while not dead:
        for kind, running in both_kinds(service.url).items():
            assert running.join() == unmoved[kind]
        now = service.status()["ranks"][rank]
        dead = now["incarnation"] > incarnation or now["state"] in ("dead", "rejoining")


def test_streams_go_on_unchanged_while_experts_move_to_where_the_load_is(moving: Standing, unmoved: Unfailed) -> None:
    with moving.losing() as service:
        for kind, running in both_kinds(service.url).items():
            assert running.join() == unmoved[kind]
        # on a slow machine the streams may end first: an idle service goes on with what it has begun
        service.wait_for_line("rebalanced: ")
        rebalances = 'phalanx_recoveries_total{outcome="complete",trigger="rebalance"}'
        eventually(lambda: metric(service, rebalances) > 0)
        becomes(lambda: metric(service, "phalanx_expert_replicas"), 3 * (16 + 4))
        becomes(lambda: get(service, "/server_info").json()["expert_balance"]["replicas"], 3 * (16 + 4))
        balance = get(service, "/server_info").json()["expert_balance"]
        assert balance["enabled"]
        assert 0 < balance["moves"] <= metric(service, "phalanx_expert_moves_total")  # more may have moved in between
        assert 0 < balance["balancedness"] <= 1
        assert 0 < metric(service, "phalanx_expert_balancedness") <= 1
        restored = "phalanx_expert_bytes_restored_total"
        staged = {name: metric(service, f'{restored}{{source="{name}"}}') for name in ("peer", "vault")}
        assert sum(staged.values()) > 0
        assert metric(service, f'{restored}{{source="disk"}}') == 0


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_while_experts_are_staged_changes_no_stream(
    moving: Standing, unmoved: Unfailed, rank: int
) -> None:
    with moving.losing(rank) as service:
        stream_until_dead(service, rank, "stage", unmoved)


@pytest.mark.parametrize(
    ("rank", "where"), [(0, "publish"), (1, "roll_call"), (3, "replan"), (0, "barrier"), (2, "adopt")]
)
def test_a_rank_that_dies_at_the_switch_changes_no_stream(
    moving: Standing, unmoved: Unfailed, rank: int, where: str
) -> None:
    with moving.losing(rank) as service:
        stream_until_dead(service, rank, where, unmoved)


def test_after_a_death_redundant_experts_come_back_by_themselves_in_an_idle_service_without_vault_or_disk(
    serve: Serve, unmoved: Unfailed
) -> None:
    service = serve(num_redundant_experts=16, expert_backup="none")
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(4)
    service.signal(1, signal.SIGKILL)
    for kind, running in streams.items():
        assert running.join() == unmoved[kind]
    service.wait_for_line(r"recovered: lost ranks \[1\].* no bytes restored")
    service.wait_for_line("rebalanced: ")
    seen = service.lines
    chaos(service, "kill", 2, where="all_gather")  # every expert stands twice again
    service.wait_for_line(r"recovered: lost ranks \[2\].* no bytes restored", after=seen)
    for kind, running in both_kinds(service.url).items():
        assert running.join() == unmoved[kind]
    becomes(lambda: healthy(service), {0, 3})
    found = restored(service)
    assert (found["vault"], found["disk"], found["peer"] > 0) == (0, 0, True)
