"""Scaling over HTTP: a real server, and ranks that come and go."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_cluster import Cluster, alphabet

from phalanx import messages as m

Make = Callable[..., Cluster]


class Call:
    """A POST that takes its time."""

    def __init__(self, cluster: Cluster, path: str, body: dict[str, Any]) -> None:
        self._cluster, self._path, self._body = cluster, path, body
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.answer = httpx.post(self._cluster.url + self._path, json=self._body, timeout=60)

    def result(self) -> httpx.Response:
        self._thread.join(60)
        assert self.answer is not None, "no answer came"
        return self.answer


def told(cluster: Cluster) -> list[list[int]]:
    return [message.ranks for message in cluster.told if isinstance(message, m.UseRanks)]


def scaling(cluster: Cluster) -> bool:
    answers = [cluster.http.request(method, "/is_scaling_elastic_ep").json() for method in ("GET", "POST")]
    assert answers[0] == answers[1]
    return bool(answers[0]["is_scaling_elastic_ep"])


@pytest.mark.parametrize("name", ["new_ep_size", "new_data_parallel_size"])
def test_the_answer_comes_when_the_new_ranks_serve(make_cluster: Make, name: str) -> None:
    cluster = make_cluster(ranks=2, max_ep_size=4)
    assert not scaling(cluster)
    call = Call(cluster, "/scale_elastic_ep", {name: 3})
    cluster.until(lambda: told(cluster) == [[0, 1, 2]], "the launcher is told")
    assert scaling(cluster)
    assert call.answer is None
    cluster.spawn(2, 1)
    cluster.meet("scale")
    answer = call.result()
    said = answer.json()
    assert said.pop("seconds") >= 0
    assert (answer.status_code, said) == (
        200,
        {"message": "Scaled to 3 ranks", "ep_size": 3, "ranks": [0, 1, 2], "added": [2], "removed": []},
    )
    assert not scaling(cluster)
    info, state = (cluster.http.get(path).json() for path in ("/server_info", "/fault_tolerance/status"))
    assert (info["ep_size"], info["max_ep_size"]) == (state["ep_size"], state["max_ep_size"]) == (3, 4)
    assert [rank["rank"] for rank in state["ranks"]] == [0, 1, 2]


def test_a_stream_on_a_rank_that_leaves_goes_on_elsewhere_with_the_same_text(make_cluster: Make) -> None:
    cluster = make_cluster(ranks=2, step_s=0.005)
    cluster.keep_open(True)
    prompts = ["one", "two"]
    streams = [
        Call(cluster, "/v1/completions", {"prompt": prompt, "max_tokens": 200, "ignore_eos": True})
        for prompt in prompts
    ]
    cluster.until(lambda: all(f.step > 3 for f in cluster.alive.values()), "both ranks are at work")
    call = Call(cluster, "/scale_elastic_ep", {"new_ep_size": 1, "drain_timeout": 0})
    leave = m.Leave(members=[(1, 0)])
    cluster.until(lambda: leave in cluster.alive[1].heard, "rank 1 is told to leave")
    [gone] = cluster.leave(1)
    said = call.result().json()
    assert (said["ep_size"], said["ranks"], said["added"], said["removed"]) == (1, [0], [], [1])
    cluster.keep_open(False)
    assert isinstance(gone.heard[-2], m.Abort), "what it had was taken from it before"
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.result().json()["choices"][0]["text"] == alphabet(prompt, 200)
    assert cluster.metric("phalanx_requests_moved_total") == 1
    assert cluster.metric("phalanx_rank_failures_total") == 0


def test_an_operator_names_the_ranks_that_leave(make_cluster: Make) -> None:
    cluster = make_cluster(ranks=3)
    body = {"instruction": "scale_down", "params": {"ranks": [0, 2], "drain_timeout": 1.5}}
    answer = cluster.http.post("/fault_tolerance/apply", json=body)
    assert (answer.status_code, answer.json()["ranks"]) == (202, [0, 2])
    cluster.until(lambda: told(cluster) == [[1]], "the launcher is told")
    again = cluster.http.post("/scale_elastic_ep", json={"new_ep_size": 2})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "cannot_scale_now")
    leave = m.Leave(members=[(0, 0), (2, 0)])
    cluster.until(lambda: all(leave in cluster.alive[rank].heard for rank in (0, 2)), "both are told to leave")
    cluster.tell(m.Died(rank=2, incarnation=0, cause="signal"))
    cluster.until_http("/fault_tolerance/status", lambda a: a.json()["ranks"][2]["state"] == "dead")
    back = cluster.http.post("/fault_tolerance/apply", json={"instruction": "rejoin", "params": {"rank": 2}})
    assert (back.status_code, "is to leave" in back.text) == (409, True)
    cluster.leave(0, 2)
    cluster.until_http("/is_scaling_elastic_ep", lambda a: not a.json()["is_scaling_elastic_ep"])
    state = cluster.http.get("/fault_tolerance/status").json()
    assert [rank["rank"] for rank in state["ranks"]] == [1]
    assert state["last_recovery"] is None or state["last_recovery"]["left"] == [0, 2]
    gone = cluster.http.post("/fault_tolerance/apply", json={"instruction": "rejoin", "params": {"rank": 2}})
    assert (gone.status_code, "there are 1" in gone.text) == (400, True)


def test_what_does_not_come_about_is_answered_with_the_reason(make_cluster: Make) -> None:
    cluster = make_cluster(ranks=1, max_ep_size=2)
    call = Call(cluster, "/scale_elastic_ep", {"new_ep_size": 2})
    cluster.until(lambda: told(cluster) == [[0, 1]], "the launcher is told")
    cluster.tell(m.Died(rank=1, incarnation=1, cause="exception", detail="no memory"))
    cluster.tell(m.GivenUp(rank=1, incarnation=1, reason="no memory"))
    answer = call.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "scaling_failed")
    assert "rank 1 does not start: no memory" in answer.json()["error"]["message"]
    cluster.until(lambda: told(cluster)[-1] == [0], "the launcher is told")


BAD_SIZES: list[tuple[dict[str, Any], str]] = [
    ({}, "new_ep_size"),
    ({"new_ep_size": 1, "new_data_parallel_size": 1}, "new_ep_size"),
    ({"new_ep_size": 0}, "new_ep_size"),
    ({"new_data_parallel_size": 5}, "new_data_parallel_size"),
    ({"new_ep_size": "2"}, "new_ep_size"),
    ({"new_ep_size": True}, "new_ep_size"),
    ({"new_ep_size": 2, "drain_timeout": -1}, "drain_timeout"),
    ({"new_ep_size": 2, "drain_timeout": "soon"}, "drain_timeout"),
    ({"new_ep_size": 2, "drain_timeout": True}, "drain_timeout"),
    ({"new_ep_size": 2, "drain_timeout": float("nan")}, "drain_timeout"),
    ({"new_ep_size": 2, "drain_timout": 0}, "drain_timout"),
    ({"size": 2}, "size"),
]
BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({}, "params"),
    ({"ranks": [1], "new_ep_size": 1}, "params"),
    ({"ranks": []}, "params.ranks"),
    ({"ranks": [7]}, "params.ranks"),
    ({"ranks": 1}, "params.ranks"),
    ({"ranks": [True]}, "params.ranks"),
    ({"ranks": [0, 1]}, "params.ranks"),
    ({"new_ep_size": 3}, "params.new_ep_size"),
    ({"new_ep_size": "1"}, "params.new_ep_size"),
    ({"ranks": [1], "drain_timeout": None}, "params.drain_timeout"),
    ({"new_ep_size": 1, "drain_timeout": float("nan")}, "params.drain_timeout"),
    ({"rank": 1}, "params.rank"),
]


def test_bad_orders_are_refused_by_name(make_cluster: Make) -> None:
    cluster = make_cluster(ranks=2, max_ep_size=4)
    orders = [("/scale_elastic_ep", body, param) for body, param in BAD_SIZES]
    orders += [
        ("/fault_tolerance/apply", {"instruction": "scale_down", "params": body}, param) for body, param in BAD_PARAMS
    ]
    for path, body, param in orders:
        raw = json.dumps(body)  # with NaN, unlike httpx
        answer = cluster.http.post(path, content=raw, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (body, answer.text)
    assert not told(cluster)


def test_a_service_that_does_not_change_its_size_says_so(make_cluster: Make) -> None:
    cluster = make_cluster(ranks=2, elastic=False)
    answer = cluster.http.post("/scale_elastic_ep", json={"new_ep_size": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_elastic")


def test_a_scaling_that_the_end_of_the_service_cuts_short_is_answered(make_cluster: Make) -> None:
    cluster = make_cluster(ranks=1, max_ep_size=2)
    call = Call(cluster, "/scale_elastic_ep", {"new_ep_size": 2})
    cluster.until(lambda: told(cluster) == [[0, 1]], "the launcher is told")
    cluster.server.send_signal(signal.SIGTERM)
    answer = call.result()
    assert (answer.status_code, "shutting down; the ranks are [0]" in answer.text) == (500, True)


def test_the_documentation_of_the_api_tells_the_answers(make_cluster: Make) -> None:
    paths = make_cluster(ranks=1).http.get("/openapi.json").json()["paths"]
    assert {"200", "400", "409", "500"} <= paths["/scale_elastic_ep"]["post"]["responses"].keys()
    assert all(paths["/is_scaling_elastic_ep"][method]["description"] for method in ("get", "post"))
