"""Real processes, real HTTP, real kills: every stream ends with the text of a run in which nobody died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from asking import becomes, chaos, get, healthy, instruct, restored, states
from standing import Standing, incarnations
from streams import PROMPTS, SAMPLING, Streams

from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

RANKS = range(4)
TRIES = 8
"""How often a rank is killed until another one has come to a point that not every plan leads it to."""

Unfailed = dict[str, list[Any]]
Serve = Callable[..., Service]


def both_kinds(url: str) -> dict[str, Streams]:
    return {kind: Streams(url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}


def wait_for_chunks(streams: dict[str, Streams], count: int) -> None:
    for running in streams.values():
        running.wait_for_chunks(count)


def check(streams: dict[str, Streams], unfailed: Unfailed) -> None:
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_killed_while_decoding_changes_no_stream_and_with_a_full_vault_nothing_is_read_from_disk(
    standing: Standing, unfailed: Unfailed, rank: int
) -> None:
    with standing.losing(rank) as service:
        service.wait_for_line("the vault is full")
        before, seen = restored(service), service.lines
        streams = both_kinds(service.url)
        wait_for_chunks(streams, 5)
        service.signal(rank, signal.SIGKILL)
        check(streams, unfailed)
        service.wait_for_line(r"recovered: .* bytes from vault at \d+\.\d\d GB/s a rank", after=seen)
        service.wait_for_line(rf"recovered:.* ranks \[{rank}\] rejoined", after=seen)
        after = restored(service)
        assert after["disk"] == before["disk"]
        assert after["vault"] > before["vault"]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("where", ["prefill", "dispatch", "combine", "commit"])
def test_a_rank_that_dies_at_any_point_of_a_step_changes_no_stream(
    standing: Standing, unfailed: Unfailed, rank: int, where: str
) -> None:
    with standing.losing(rank) as service:
        chaos(service, "kill", rank, where=where)
        check(both_kinds(service.url), unfailed)


@pytest.mark.parametrize("first", RANKS)
@pytest.mark.parametrize("where", ["roll_call", "publish", "restore", "barrier"])
def test_a_second_death_in_the_recovery_of_the_first_changes_no_stream(
    standing: Standing, unfailed: Unfailed, first: int, where: str
) -> None:
    second = (first + 1) % 4
    if where == "publish":
        second = min(set(RANKS) - {first})  # the one that publishes
    again: list[int] = []
    with standing.losing(first, second, also=again) as service:
        lived = incarnations(service)
        chaos(service, "kill", second, where=where)
        for _ in range(TRIES):
            streams = both_kinds(service.url)
            wait_for_chunks(streams, 3)
            service.signal(first, signal.SIGKILL)
            check(streams, unfailed)
            becomes(lambda: incarnations(service)[first] > lived[first] + len(again), True)
            if incarnations(service)[second] > lived[second]:
                return
            again.append(first)  # the plan had nothing for the second one to restore: what it holds is different now
        pytest.fail(f"rank {second} never came to {where}")


@pytest.mark.parametrize("pair", [(0, 1), (2, 3), (0, 3)])
def test_two_ranks_killed_at_once_change_no_stream_and_come_back(
    standing: Standing, unfailed: Unfailed, pair: tuple[int, int]
) -> None:
    with standing.losing(*pair) as service:
        streams = both_kinds(service.url)
        wait_for_chunks(streams, 5)
        pids = [service.pid(rank) for rank in pair]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        check(streams, unfailed)


def test_without_a_rank_that_died_before_the_first_meeting_streams_go_on_until_one_rank_is_left(
    serve: Serve, unfailed: Unfailed
) -> None:
    deaths = "kill@decode:rank=3:n=3,kill@decode:rank=0:n=8,kill@decode:rank=2:n=15"
    service = serve(f"kill@start:rank=4,{deaths}", ep_size=5)
    becomes(lambda: healthy(service), {0, 1, 2, 3})
    service.wait_for_line("the vault is full")
    before = restored(service)
    check(both_kinds(service.url), unfailed)
    service.wait_for_line(r"recovered: lost ranks \[2\]")
    becomes(lambda: healthy(service), {1})
    recovery = service.status()["last_recovery"]
    assert (recovery["trigger"], recovery["lost"]) == ("failure", [2])
    assert recovery["seconds"]["total"] > 0
    assert recovery["requests_moved"] > 0
    assert recovery["seconds_restored"]["vault"] > 0
    assert restored(service)["disk"] == before["disk"]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_python_exception_in_a_rank_is_that_ranks_death_alone(
    standing: Standing, unfailed: Unfailed, rank: int
) -> None:
    with standing.losing(rank) as service:
        seen = service.lines
        streams = both_kinds(service.url)
        wait_for_chunks(streams, 3)
        chaos(service, "raise", rank)
        check(streams, unfailed)
        service.wait_for_line(rf"rank {rank}\.\d+ .* ended: .*InjectedFault", after=seen)


def test_a_rank_stopped_past_the_time_out_is_evicted_and_exits_when_it_wakes(serve: Serve, unfailed: Unfailed) -> None:
    service = serve(peer_timeout=1, roll_call_timeout=2)
    left = set(RANKS)
    for rank in (0, 3):
        streams = both_kinds(service.url)
        wait_for_chunks(streams, 5)
        pid = service.signal(rank, signal.SIGSTOP)
        check(streams, unfailed)
        left -= {rank}
        becomes(lambda: healthy(service), left)
        seen = service.lines
        os.kill(pid, signal.SIGCONT)
        service.wait_for_line(rf"rank {rank}\.0 .* ended: the others had gone on without it", after=seen)
    check(both_kinds(service.url), unfailed)


def test_a_pause_shorter_than_the_time_out_evicts_nobody(patient: Standing, unfailed: Unfailed) -> None:
    with patient.losing() as service:
        before = service.status()
        streams = both_kinds(service.url)
        wait_for_chunks(streams, 5)
        pid = service.signal(1, signal.SIGSTOP)
        # Nobody can pass a step boundary now; a request that arrives meanwhile is simply late.
        late = Streams(service.url, PROMPTS[:1], **SAMPLING["greedy"]).start()
        assert service.status()["epoch"] == before["epoch"]
        os.kill(pid, signal.SIGCONT)
        check(streams, unfailed)
        assert late.join() == unfailed["greedy"][:1]
        becomes(lambda: healthy(service), set(RANKS))
        assert service.status()["epoch"] == before["epoch"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_an_idle_rank_is_found_before_the_next_request(
    standing: Standing, unfailed: Unfailed, rank: int
) -> None:
    with standing.losing(rank) as service:
        seen = service.lines
        service.signal(rank, signal.SIGKILL)
        service.wait_for_line(rf"recovered: lost ranks \[{rank}\]", after=seen)
        check(both_kinds(service.url), unfailed)


def test_a_rank_that_hangs_while_idle_is_found_by_heartbeat(quick: Standing) -> None:
    with quick.losing(2) as service:
        seen = service.lines
        service.signal(2, signal.SIGSTOP)
        service.wait_for_line(r"recovered: lost ranks \[2\]", after=seen)


def test_pause_holds_requests_and_retry_lets_them_go(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing() as service:
        assert instruct(service, "pause").status_code == 202
        becomes(lambda: set(states(service).values()), {"paused"})
        streams = both_kinds(service.url)
        becomes(lambda: get(service, "/server_info").json()["requests_held"], 2 * len(PROMPTS))
        assert not any(stream.at for running in streams.values() for stream in running.seen)
        assert instruct(service, "retry").status_code == 202
        check(streams, unfailed)
