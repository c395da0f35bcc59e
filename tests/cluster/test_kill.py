"""Real processes, real HTTP, real kills: every stream ends with the text of a run in which nobody died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from streams import PROMPTS, SAMPLING, Streams

from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

RANKS = range(4)
Unfailed = dict[str, list[Any]]
Serve = Callable[..., Service]


def alive(service: Service) -> set[int]:
    return {rank["rank"] for rank in service.status()["ranks"] if rank["state"] == "healthy"}


def both_kinds(url: str) -> dict[str, Streams]:
    return {kind: Streams(url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}


def chaos(service: Service, kind: str, rank: int, **where: Any) -> None:
    httpx.post(f"{service.url}/chaos", json={"kind": kind, "rank": rank, **where}).raise_for_status()


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_killed_while_decoding_changes_no_stream(serve: Serve, unfailed: Unfailed, rank: int) -> None:
    service = serve()
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(5)
    service.signal(rank, signal.SIGKILL)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - {rank}
    recovery = service.status()["last_recovery"]
    assert (recovery["trigger"], recovery["lost"]) == ("failure", [rank])
    assert recovery["seconds"]["total"] > 0
    assert recovery["requests_moved"] > 0


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("where", ["prefill", "dispatch", "combine", "commit"])
def test_a_rank_that_dies_at_any_point_of_a_step_changes_no_stream(
    serve: Serve, unfailed: Unfailed, rank: int, where: str
) -> None:
    service = serve()
    chaos(service, "kill", rank, where=where)
    streams = both_kinds(service.url)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - {rank}


@pytest.mark.parametrize("first", RANKS)
@pytest.mark.parametrize("where", ["roll_call", "publish", "restore", "barrier"])
def test_a_second_death_in_the_recovery_of_the_first_changes_no_stream(
    serve: Serve, unfailed: Unfailed, first: int, where: str
) -> None:
    second = (first + 1) % 4
    if where == "publish":
        second = min(set(RANKS) - {first})  # the one that publishes
    service = serve()
    chaos(service, "kill", second, where=where)
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(3)
    service.signal(first, signal.SIGKILL)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - {first, second}


@pytest.mark.parametrize("pair", [(0, 1), (2, 3), (0, 3)])
def test_two_ranks_killed_at_once_change_no_stream(serve: Serve, unfailed: Unfailed, pair: tuple[int, int]) -> None:
    service = serve()
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(5)
    pids = [service.pid(rank) for rank in pair]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - set(pair)


@pytest.mark.parametrize("order", [(0, 1, 2), (3, 2, 1)])
def test_streams_go_on_until_one_rank_is_left(serve: Serve, unfailed: Unfailed, order: tuple[int, ...]) -> None:
    service = serve()
    streams = both_kinds(service.url)
    for so_far, rank in enumerate(order):
        for running in streams.values():
            running.wait_for_chunks(4 * (so_far + 1))
        service.signal(rank, signal.SIGKILL)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - set(order)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_python_exception_in_a_rank_is_that_ranks_death_alone(serve: Serve, unfailed: Unfailed, rank: int) -> None:
    service = serve()
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(3)
    chaos(service, "raise", rank)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - {rank}
    service.wait_for_line(rf"rank {rank}\.0 .* ended: .*InjectedFault")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_stopped_past_the_time_out_is_evicted_and_exits_when_it_wakes(
    serve: Serve, unfailed: Unfailed, rank: int
) -> None:
    service = serve(peer_timeout=1, roll_call_timeout=2)
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(5)
    pid = service.signal(rank, signal.SIGSTOP)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == set(RANKS) - {rank}
    seen = service.lines
    os.kill(pid, signal.SIGCONT)
    service.wait_for_line(rf"rank {rank}\.0 .* ended: the others had gone on without it", after=seen)
    again = both_kinds(service.url)
    for kind, running in again.items():
        assert running.join() == unfailed[kind]


def test_a_pause_shorter_than_the_time_out_evicts_nobody(serve: Serve, unfailed: Unfailed) -> None:
    service = serve(peer_timeout=30, roll_call_timeout=60)
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(5)
    pid = service.signal(1, signal.SIGSTOP)
    # Nobody can pass a step boundary now; a request that arrives meanwhile is simply late.
    late = Streams(service.url, PROMPTS[:1], **SAMPLING["greedy"]).start()
    assert service.status()["epoch"] == 1
    os.kill(pid, signal.SIGCONT)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert late.join() == unfailed["greedy"][:1]
    assert alive(service) == set(RANKS)
    assert service.status()["last_recovery"] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_an_idle_rank_is_found_before_the_next_request(
    serve: Serve, unfailed: Unfailed, rank: int
) -> None:
    service = serve()
    service.signal(rank, signal.SIGKILL)
    service.wait_for_line(rf"recovered: lost ranks \[{rank}\]")
    assert alive(service) == set(RANKS) - {rank}
    for kind, running in both_kinds(service.url).items():
        assert running.join() == unfailed[kind]


def test_a_rank_that_hangs_while_idle_is_found_by_heartbeat(serve: Serve) -> None:
    service = serve(peer_timeout=1, roll_call_timeout=2, heartbeat_interval=0.5)
    service.signal(2, signal.SIGSTOP)
    service.wait_for_line(r"recovered: lost ranks \[2\]")
    assert alive(service) == {0, 1, 3}


def test_a_rank_that_dies_before_the_first_meeting_is_not_waited_for(serve: Serve, unfailed: Unfailed) -> None:
    service = serve(faults="kill@start:rank=2")
    assert alive(service) == {0, 1, 3}
    for kind, running in both_kinds(service.url).items():
        assert running.join() == unfailed[kind]


def test_below_min_ranks_the_service_says_so_and_stays(serve: Serve) -> None:
    service = serve(ep_size=2, min_ranks=2)
    assert httpx.get(f"{service.url}/ready").status_code == 200
    service.signal(1, signal.SIGKILL)
    service.wait_for_line("cannot serve")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    answer = httpx.post(f"{service.url}/v1/completions", json=body)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{service.url}/ready").status_code == 503
    assert httpx.get(f"{service.url}/health").status_code == 200


def test_experts_that_no_slot_can_hold_stop_serving_but_not_the_service(serve: Serve) -> None:
    service = serve(ep_size=2, slots_per_rank=8)
    service.signal(0, signal.SIGKILL)
    service.wait_for_line("cannot serve.*8 live slots a layer cannot hold 16 experts")
    assert httpx.get(f"{service.url}/ready").status_code == 503
    assert httpx.get(f"{service.url}/health").status_code == 200


def test_an_operator_takes_a_rank_out_by_hand(serve: Serve, unfailed: Unfailed) -> None:
    service = serve()
    streams = both_kinds(service.url)
    for running in streams.values():
        running.wait_for_chunks(5)
    answer = httpx.post(
        f"{service.url}/fault_tolerance/apply", json={"instruction": "mask_rank", "params": {"rank": 1}}
    )
    assert answer.status_code == 202
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    assert alive(service) == {0, 2, 3}


def test_pause_holds_requests_and_retry_lets_them_go(serve: Serve, unfailed: Unfailed) -> None:
    service = serve()
    assert instruct(service, "pause") == 202
    service.wait_for_line("paused")
    streams = both_kinds(service.url)
    assert {rank["state"] for rank in service.status()["ranks"]} == {"paused"}
    assert instruct(service, "retry") == 202
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]


def instruct(service: Service, instruction: str) -> int:
    body = {"instruction": instruction, "params": {}}
    return httpx.post(f"{service.url}/fault_tolerance/apply", json=body).status_code
