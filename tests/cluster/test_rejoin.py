"""Real processes that are killed and come back by themselves, under streams whose text never changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from asking import becomes, eventually, get, instruct, metric, post, problem, states
from standing import Standing, incarnations
from streams import PROMPTS, SAMPLING, Streams
from traced import traced

from phalanx.testing.service import Service, ServiceEnded

pytestmark = pytest.mark.cluster

RANKS = range(4)
Unfailed = dict[str, list[Any]]
Serve = Callable[..., Service]


def back(service: Service, *ranks: int, after: int, timeout_s: float = 60) -> None:
    """Wait until ranks have come back, in one step or in several."""
    for rank in ranks:
        service.wait_for_line(rf"recovered:.* ranks \[[^]]*\b{rank}\b[^]]*\] rejoined", timeout_s, after=after)


def both_kinds(url: str) -> dict[str, Streams]:
    running = {kind: Streams(url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}
    for streams in running.values():
        streams.wait_for_chunks(4)
    return running


def check(running: dict[str, Streams], unfailed: Unfailed) -> None:
    for kind, streams in running.items():
        assert streams.join() == unfailed[kind]


def test_each_rank_in_turn_and_one_twice_is_killed_and_comes_back_and_no_stream_changes(
    standing: Standing, unfailed: Unfailed
) -> None:
    for rank in (*RANKS, RANKS[-1]):
        with standing.losing(rank) as service:
            seen = service.lines
            running = both_kinds(service.url)
            service.signal(rank, signal.SIGKILL)
            back(service, rank, after=seen)
            check(running, unfailed)
    with standing.losing() as service:
        join = service.status()["last_recovery"]
        assert (join["trigger"], join["lost"]) == ("join", [])
        assert join["bytes_restored"]["disk"] == 0, "a newcomer reads from its peers' memory"
        check(both_kinds(service.url), unfailed)  # the ranks that came back serve like the first ones


def test_a_rank_that_was_killed_or_stopped_comes_back_to_an_idle_service(serve: Serve, unfailed: Unfailed) -> None:
    service = serve(max_restarts=3, heartbeat_interval=3600, peer_timeout=1, roll_call_timeout=2)
    seen = service.lines
    service.signal(0, signal.SIGKILL)
    back(service, 0, after=seen, timeout_s=25)
    assert incarnations(service) == [1, 0, 0, 0]
    check(both_kinds(service.url), unfailed)

    seen = service.lines
    service.signal(1, signal.SIGSTOP)  # all sleep, so nobody waits for it: only the launcher can find it
    service.wait_for_line(r"rank 1\.0 has been stopped for .* s: the others go on without it", after=seen)
    back(service, 1, after=seen)
    assert incarnations(service) == [1, 1, 0, 0]
    eventually(lambda: metric(service, "phalanx_rank_failures_total", 'cause="halted"') == 1)


def test_all_ranks_killed_at_once_come_back_and_the_streams_go_on(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing(*RANKS) as service:
        running = both_kinds(service.url)
        for pid in [service.pid(rank) for rank in RANKS]:
            os.kill(pid, signal.SIGKILL)
        check(running, unfailed)


def test_newcomers_that_die_on_their_way_in_are_followed_by_the_next_ones_and_a_healthy_rank_that_dies_in_a_join_too(
    serve: Serve, unfailed: Unfailed
) -> None:
    ways = {1: "restore", 2: "join", 3: "barrier"}
    faults = [f"kill@{where}:rank={rank}:incarnation=1" for rank, where in ways.items()]
    # Roll call 1 is the first meeting, 2 for the death of rank 1, 3 for the return of its second successor.
    service = serve(",".join([*faults, "kill@roll_call:rank=0:incarnation=0:n=3"]), max_restarts=5)
    for rank in ways:
        running = both_kinds(service.url)
        seen = service.lines
        service.signal(rank, signal.SIGKILL)
        service.wait_for_line(rf"rank {rank}\.1 .* ended: killed by SIGKILL", after=seen)
        service.wait_for_line(rf"rank {rank}\.2 came in", after=seen)
        if rank == 1:
            service.wait_for_line(r"rank 0\.1 came in", after=seen)
        check(running, unfailed)
    assert incarnations(service) == [1, 2, 2, 2]


def test_a_rank_that_dies_on_each_start_is_given_up_with_the_reason_until_an_operator_tries_again(serve: Serve) -> None:
    """And one that is stopped while it starts is replaced, long before the time for a start is over."""
    faults = ",".join(f"raise@start:rank=1:incarnation={number}" for number in range(3))
    faults += ",stop@start:rank=1:incarnation=3"
    service = serve(ep_size=2, max_restarts=2, peer_timeout=1, roll_call_timeout=2, faults=faults)
    service.wait_for_line(r"rank 1 is not started again: given up after 2 restarts")
    eventually(lambda: "given up after 2 restarts" in problem(service, 1))
    assert "InjectedFault" in problem(service, 1)
    state = service.status()["ranks"][1]
    assert (state["state"], state["incarnation"]) == ("dead", 2)
    assert get(service, "/ready").status_code == 200
    seen = service.lines
    assert instruct(service, "rejoin", rank=1).status_code == 202
    service.wait_for_line(r"rank 1\.3 has been stopped for", after=seen)
    back(service, 1, after=seen)
    assert incarnations(service) == [0, 4]
    becomes(lambda: problem(service, 1), "")


def test_a_service_whose_only_rank_dies_in_its_first_load_has_it_started_again(serve: Serve) -> None:
    """The rank had agreed on a World with itself, and did not live to say so."""
    service = serve("kill@restore:rank=0:incarnation=0", ep_size=1, max_restarts=2)
    assert incarnations(service) == [1]


def test_ranks_that_all_die_before_they_agree_on_a_world_end_the_service(serve: Serve) -> None:
    with pytest.raises(ServiceEnded, match="no rank lived to the first meeting: stopping the service"):
        serve("kill@publish:rank=0,kill@publish:rank=1", ep_size=2, max_restarts=2)


def test_an_evicted_rank_that_stays_stopped_is_replaced(quick: Standing, unfailed: Unfailed) -> None:
    with quick.losing(1) as service:
        running = both_kinds(service.url)
        seen = service.lines
        service.signal(1, signal.SIGSTOP)
        service.wait_for_line(r"killing rank 1\.\d+ .* it was evicted and does not end", after=seen)
        back(service, 1, after=seen)
        check(running, unfailed)


def test_a_rank_that_is_killed_under_a_debugger_is_replaced(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing(1) as service:
        running = both_kinds(service.url)
        seen = service.lines
        with traced(service.pid(1)):
            service.signal(1, signal.SIGKILL)
            back(service, 1, after=seen)
        check(running, unfailed)


def test_a_masked_rank_stays_out_until_an_operator_wants_it_back(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing(1) as service:
        running = both_kinds(service.url)
        seen = service.lines
        assert instruct(service, "mask_rank", rank=1).status_code == 202
        service.wait_for_line(r"rank 1 is not started again: taken out by an operator", after=seen)
        eventually(lambda: "operator" in problem(service, 1))
        check(running, unfailed)
        assert states(service)[1] == "dead"
        assert instruct(service, "rejoin", rank=1).status_code == 202
        back(service, 1, after=seen)
        assert instruct(service, "rejoin", rank=1).status_code == 400


def test_a_masked_rank_may_be_called_back_before_its_process_has_ended(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing(1) as service:
        running = both_kinds(service.url)
        seen = service.lines
        service.signal(1, signal.SIGSTOP)  # so that it cannot end by itself
        assert instruct(service, "mask_rank", rank=1).status_code == 202
        becomes(lambda: states(service)[1], "dead")
        assert instruct(service, "rejoin", rank=1).status_code == 202
        back(service, 1, after=seen)
        check(running, unfailed)


def test_below_min_ranks_the_service_says_so_and_its_requests_go_on_when_a_rank_returns(
    serve: Serve, unfailed: Unfailed
) -> None:
    service = serve(ep_size=2, min_ranks=2)
    assert get(service, "/ready").status_code == 200
    running = both_kinds(service.url)
    service.signal(0, signal.SIGKILL)
    service.wait_for_line("cannot serve")
    becomes(lambda: states(service)[0], "dead")
    answer = post(service, "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert get(service, "/ready").status_code == 503
    assert get(service, "/health").status_code == 200
    assert instruct(service, "rejoin", rank=0).status_code == 202
    check(running, unfailed)
    service.wait_for_line(r"rank 0\.1 came in")
    assert incarnations(service) == [1, 0]


def test_the_process_that_forks_ranks_has_a_spare_and_without_both_an_operator_gets_a_rank_back(serve: Serve) -> None:
    service = serve(ep_size=2, max_restarts=3)
    pair = nurseries_of(service, 2)
    [first] = [pid for pid in pair if os.getsid(pid) == pid]  # it was started; the other one was forked
    [spare] = pair - {first}
    seen = service.lines
    os.kill(first, signal.SIGKILL)
    service.signal(1, signal.SIGKILL)
    service.wait_for_line(
        rf"the process that forks workers ended: the spare one \(pid {spare}\) takes over", after=seen
    )
    back(service, 1, after=seen)

    [newest] = nurseries_of(service, 2) - {spare}
    os.kill(newest, signal.SIGKILL)
    [newest] = nurseries_of(service, 2, other_than={newest}) - {spare}  # a spare that dies is replaced, too
    seen = service.lines
    os.kill(spare, signal.SIGSTOP)
    os.kill(newest, signal.SIGKILL)
    service.signal(1, signal.SIGKILL)
    service.wait_for_line(r"rank 1 is started, as 1\.2", after=seen)
    os.kill(spare, signal.SIGKILL)
    dead = {spare, newest}
    for _ in range(2):  # its successors die before they have imported anything
        service.wait_for_line("the process that forks workers ended: starting another", after=seen)
        seen = service.lines
        [nursery] = nurseries_of(service, 1, other_than=dead)
        dead.add(nursery)
        os.kill(nursery, signal.SIGKILL)
    service.wait_for_line("the process that forks workers ended: no more", after=seen)
    service.wait_for_line("rank 1 is not started again: no process can be started", after=seen)
    eventually(lambda: "no process can be started" in problem(service, 1))
    assert get(service, "/ready").status_code == 200
    assert instruct(service, "rejoin", rank=1).status_code == 202
    back(service, 1, after=seen)
    assert incarnations(service) == [0, 2]


def test_a_rank_that_returns_to_a_paused_service_is_paused(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing(1) as service:
        assert instruct(service, "pause").status_code == 202
        becomes(lambda: set(states(service).values()), {"paused"})
        streams = {kind: Streams(service.url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}
        seen = service.lines
        service.signal(1, signal.SIGKILL)
        back(service, 1, after=seen)
        becomes(lambda: set(states(service).values()), {"paused"})
        assert not any(stream.at for kind in streams.values() for stream in kind.seen)
        assert instruct(service, "retry").status_code == 202
        check(streams, unfailed)


def nurseries_of(service: Service, count: int, other_than: frozenset[int] | set[int] = frozenset()) -> set[int]:
    """The process that forks workers and its spare, when there are so many. Whom they forked has the same command
    line."""
    while True:
        assert service.process.poll() is None, service.log
        status = service.status()
        forked = {status["vault"]["pid"], *(rank["pid"] for rank in status["ranks"]), *other_than}
        pids = {pid for pid in children(service.process.pid) if "phalanx.nursery" in command(pid)} - forked
        if len(pids) == count:
            return pids


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def command(pid: int) -> str:
    """Empty when the process has just ended."""
    with suppress(ProcessLookupError, FileNotFoundError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode()
    return ""
