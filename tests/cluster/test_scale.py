"""Real processes that are added and taken away while clients stream: no request fails, and no text changes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asking import becomes, chaos, eventually, get, instruct, metric, post, state_of, states
from streams import PROMPTS, SAMPLING, Streams

from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

Unfailed = dict[str, list[Any]]
Serve = Callable[..., Service]


def scale(service: Service, size: int, **more: float) -> httpx.Response:
    return post(service, "/scale_elastic_ep", {"new_ep_size": size, **more}, timeout_s=180)


def streaming(service: Service, kind: str) -> Streams:
    running = Streams(service.url, PROMPTS, **SAMPLING[kind]).start()
    running.wait_for_chunks(3)
    return running


def test_from_2_ranks_to_4_and_back_to_others_no_stream_changes(serve: Serve, unfailed: Unfailed) -> None:
    service = serve(ep_size=2, max_ep_size=4, max_restarts=3, peer_timeout=60, roll_call_timeout=90)
    assert (service.status()["ep_size"], service.status()["max_ep_size"]) == (2, 4)

    running = streaming(service, "seeded")
    answer = scale(service, 4)
    assert (answer.status_code, answer.json()["ranks"]) == (200, [0, 1, 2, 3])
    becomes(lambda: states(service), dict.fromkeys(range(4), "healthy"))
    assert running.join() == unfailed["seeded"]

    seen, stopped = service.lines, service.pid(0)
    chaos(service, "stop", 0, where="decode")  # no stream can end before those who leave are told to
    running = Streams(service.url, PROMPTS, **SAMPLING["greedy"]).start()
    eventually(lambda: state_of(stopped) == "T")
    becomes(lambda: get(service, "/server_info").json()["requests_in_flight"], len(PROMPTS))
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(scale, service, 2, drain_timeout=0)
        service.wait_for_line(r"scaling from ranks \[0, 1, 2, 3\] to \[0, 1\]", after=seen)
        os.kill(stopped, signal.SIGCONT)
        assert answered.result().status_code == 200
    becomes(lambda: states(service), {0: "healthy", 1: "healthy"})
    assert running.join() == unfailed["greedy"]
    for rank in (2, 3):
        service.wait_for_line(rf"rank {rank}\.1 \(pid \d+\) ended: stopped", after=seen)
    assert metric(service, "phalanx_requests_moved_total") > 0

    seen, running = service.lines, streaming(service, "seeded")
    assert scale(service, 3).status_code == 200  # the place that was left is taken again
    assert instruct(service, "scale_down", ranks=[0]).json()["ranks"] == [0]  # its streams may finish
    service.wait_for_line(r"scaled from 3 to 2 ranks", after=seen)
    becomes(lambda: states(service), {1: "healthy", 2: "healthy"})
    assert running.join() == unfailed["seeded"]
    eventually(lambda: metric(service, "phalanx_recoveries_total", 'trigger="scale"') >= 4)
    assert metric(service, "phalanx_rank_failures_total") == 0
    assert not re.search(r"WARNING|ERROR", service.log), service.log


def test_deaths_while_the_service_is_scaled_change_neither_the_end_nor_a_stream(
    serve: Serve, unfailed: Unfailed
) -> None:
    service = serve("kill@join:rank=2:incarnation=1", ep_size=2, max_ep_size=4, max_restarts=100)
    running = streaming(service, "seeded")
    assert scale(service, 4).status_code == 200  # one of the two new ranks dies on its way in
    becomes(lambda: states(service), dict.fromkeys(range(4), "healthy"))
    assert running.join() == unfailed["seeded"]

    running = streaming(service, "greedy")
    chaos(service, "kill", 1, where="roll_call")
    chaos(service, "kill", 3, where="replan")
    answer = scale(service, 2, drain_timeout=0)  # one that stays and one that leaves die
    assert answer.status_code == 200, answer.text
    assert running.join() == unfailed["greedy"]
    becomes(lambda: states(service).keys(), {0, 1})

    seen, running = service.lines, streaming(service, "seeded")
    service.signal(1, signal.SIGKILL)  # a scaling up while a dead rank is on its way back
    assert scale(service, 3).status_code == 200
    assert running.join() == unfailed["seeded"]
    service.wait_for_line(r"rank 2\.\d+ came in", after=seen)
    assert service.status()["ep_size"] == 3


def test_a_rank_that_left_before_the_others_served_comes_back_when_they_cannot(
    serve: Serve, unfailed: Unfailed
) -> None:
    service = serve("raise@start:rank=0:incarnation=1", ep_size=2, max_restarts=1, expert_backup="disk")
    running = streaming(service, "seeded")
    chaos(service, "kill", 0, where="replan")  # rank 1 is out of the view by then
    answer = scale(service, 1, drain_timeout=0)
    assert (answer.status_code, "0 are alive, and 1 are needed" in answer.text) == (500, True), answer.text
    service.wait_for_line(r"rank 1\.1 came in")
    assert running.join() == unfailed["seeded"]
    becomes(lambda: states(service), {0: "dead", 1: "healthy"})


def test_a_rank_that_does_not_start_ends_the_scaling_and_one_that_leaves_gives_its_experts_away(
    serve: Serve, unfailed: Unfailed
) -> None:
    service = serve("raise@start:rank=3", ep_size=2, max_ep_size=4, max_restarts=1, expert_backup="none")
    answer = scale(service, 4)
    assert answer.status_code == 500
    assert "rank 3 does not start" in answer.json()["error"]["message"]
    assert "InjectedFault" in answer.json()["error"]["message"]
    becomes(lambda: states(service), dict.fromkeys(range(3), "healthy"))
    assert "InjectedFault" in scale(service, 4).json()["error"]["message"]
    service.wait_for_line(r"rank 3 is started, as 3\.3")  # it was tried anew
    running = streaming(service, "seeded")
    seen = service.lines
    assert instruct(service, "scale_down", ranks=[0, 2], drain_timeout=0).status_code == 202
    service.wait_for_line(r"scaled from 3 to 1 ranks", after=seen)
    becomes(lambda: states(service), {1: "healthy"})
    assert running.join() == unfailed["seeded"]
    becomes(lambda: service.status()["last_recovery"]["left"], [0, 2])
    restored = service.status()["last_recovery"]["bytes_restored"]
    assert (restored["vault"], restored["disk"], restored["peer"] > 0) == (0, 0, True), "nobody else has them"

    assert scale(service, 2).json()["added"] == [0], "from live replicas alone"
    service.signal(0, signal.SIGKILL)
    service.wait_for_line(r"rank 1\.\d+ cannot serve: .*no source has an intact copy")
    for size in (3, 1):
        answer = scale(service, size)
        message = answer.json()["error"]["message"]
        assert (answer.status_code, "cannot serve: cannot restore" in message) == (500, True), answer.text
        assert "the ranks are [0, 1]" in message
