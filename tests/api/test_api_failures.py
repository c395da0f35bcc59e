"""Ranks that die, hang, come back and lie, seen by clients of a real server."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from fake_cluster import Cluster, alphabet

from phalanx import messages as m


class Reader(threading.Thread):
    """A streaming client in its own thread. `text` grows as it reads; `chunks` counts its chunks of text."""

    def __init__(self, url: str, prompt: str, max_tokens: int, **more: Any) -> None:
        super().__init__(daemon=True)
        self.prompt, self.max_tokens = prompt, max_tokens
        self.text, self.finish, self.error, self.finished = "", None, None, False
        self.chunks: list[dict[str, Any]] = []
        self.began = threading.Event()
        self._url, self._body = url, {"prompt": prompt, "max_tokens": max_tokens, "stream": True, **more}
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.finished = True
                elif line.startswith("data: "):
                    self._take(json.loads(line[6:]))

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]
            return
        self.chunks.append(chunk)
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish
        self.began.set()

    def end(self) -> Reader:
        self.join(60)
        assert not self.is_alive(), "the stream hangs"
        return self

    def check(self) -> None:
        """The stream came whole: every letter, once, in order."""
        self.end()
        assert self.error is None
        assert self.text == alphabet(self.prompt, self.max_tokens)
        assert self.finish == "length"
        assert self.finished


def begun(cluster: Cluster, count: int, max_tokens: int = 300, **more: Any) -> list[Reader]:
    """So many streams, all of which have given text, and none of which ends before `keep_open(False)`."""
    cluster.keep_open(True)
    readers = [Reader(cluster.url, "p" * (i + 1), max_tokens, **more) for i in range(count)]
    for reader in readers:
        assert reader.began.wait(60), cluster.log
    return readers


def until_ended(cluster: Cluster, reason: str, count: int) -> None:
    """A call that did not come to its end is counted when the server has left it, which its client cannot see."""
    name = "phalanx_request_success_total"
    cluster.until_http("/metrics", lambda _: cluster.metric(name, finished_reason=reason) == count)


def status(cluster: Cluster) -> dict[str, Any]:
    return cluster.http.get("/fault_tolerance/status").json()


def test_streams_go_on_when_their_rank_is_killed(make_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    cluster = make_cluster(ranks=3, step_s=0.002, events_file=str(events))
    readers = begun(cluster, 9)
    cluster.kill(1)
    cluster.keep_open(False)
    for reader in readers:
        reader.check()
    seen = status(cluster)
    assert [r["state"] for r in seen["ranks"]] == ["healthy", "dead", "healthy"]
    assert seen["epoch"] == 2
    last = seen["last_recovery"]
    assert (last["trigger"], last["lost"], last["epoch"], last["requests_moved"]) == ("failure", [1], 2, 3)
    assert last["seconds"]["detect"] == pytest.approx(0.003)
    assert cluster.http.get("/server_info").json()["rank_problems"] == {"1": "killed by SIGKILL"}
    assert last["bytes_restored"] == {"peer": 200, "vault": 0, "disk": 0}
    assert cluster.metric("phalanx_ranks_alive") == 2
    assert cluster.metric("phalanx_view_epoch") == 2
    assert cluster.metric("phalanx_rank_failures_total", cause="signal") == 1
    assert cluster.metric("phalanx_requests_moved_total") == 3
    assert cluster.metric("phalanx_recoveries_total", trigger="failure", outcome="complete") == 1
    assert cluster.metric("phalanx_stream_stall_seconds_count") >= 3
    assert cluster.metric("phalanx_request_success_total", finished_reason="length") == 9
    assert "recovered: lost ranks [1], epoch 1 -> 2, total 0.050 s (detect 0.003" in cluster.log
    recovery = [e for e in map(json.loads, events.read_text().splitlines()) if e["event"] == "recovery"]
    assert [(e["lost"], e["requests_moved"], e["outcome"]) for e in recovery] == [([1], 3, "complete")]


def test_streams_go_on_when_rank_after_rank_is_killed(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=4, step_s=0.002)
    readers = begun(cluster, 8)
    for rank in (0, 2, 1):
        cluster.kill(rank)
    cluster.keep_open(False)
    for reader in readers:
        reader.check()


def test_a_stream_with_echo_logprobs_and_several_choices_moves_too(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2, step_s=0.002)
    reader = begun(cluster, 1, 200, n=2, echo=True, logprobs=1)[0]
    cluster.kill(0)
    cluster.keep_open(False)
    reader.end()
    for index in (0, 1):
        mine = [c["choices"][0] for c in reader.chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == "p" + alphabet("p", 200)
        assert [o for c in mine for o in c["logprobs"]["text_offset"]] == list(range(201))


def test_streams_wait_while_nobody_lives_and_go_on_with_a_newcomer(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1, step_s=0.002)
    readers = begun(cluster, 3)
    cluster.kill(0)
    answer = cluster.until_http("/ready", lambda a: a.status_code == 503)
    assert int(answer.headers["retry-after"]) > 0
    assert cluster.http.get("/health").status_code == 200
    refused = cluster.http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) > 0
    cluster.spawn(0, 1)
    cluster.meet("join")
    cluster.keep_open(False)
    for reader in readers:
        reader.check()
    assert status(cluster)["ranks"][0]["incarnation"] == 1


def test_tokens_that_come_twice_or_late_are_shown_once(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2, step_s=0.002)
    history: list[m.Stepped] = []

    def stutter(stepped: m.Stepped) -> list[m.Stepped]:
        history.append(stepped)
        return [history[len(history) // 2], stepped, stepped, history[0]]

    with cluster.lock:
        for fake in cluster.alive.values():
            fake.behave = stutter
    readers = begun(cluster, 4, 100)
    cluster.keep_open(False)
    for reader in readers:
        reader.check()


def test_a_stopped_rank_that_was_left_behind_wakes_up_and_is_not_heard(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2, step_s=0.002)
    readers = begun(cluster, 4, 200)
    with cluster.lock:
        zombie = cluster.alive.pop(1)
    cluster.alive[0].say(m.Suspected(rank=0, incarnation=0, suspects=[1], epoch=1))
    cluster.meet("failure", (1,), {1: "timeout"})
    cluster.until_http("/fault_tolerance/status", lambda a: a.json()["ranks"][1]["state"] == "dead")
    zombie.behave = lambda s: [
        msgspec.structs.replace(
            s, tokens=[m.TokenOut(t.request_id, a, t.index, ord("?")) for t in s.tokens for a in range(3)]
        )
    ]
    for _ in range(50):
        zombie.advance()
    cluster.keep_open(False)
    for reader in readers:
        reader.check()
    assert cluster.metric("phalanx_rank_failures_total", cause="timeout") == 1


def test_a_rank_that_hangs_gives_its_requests_up_when_the_others_leave_it_behind(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(ranks=2)
    with cluster.lock:
        cluster.alive[0].deaf = cluster.alive[1].deaf = True
    readers = [Reader(cluster.url, "q" * (i + 1), 50) for i in range(4)]
    cluster.until_http("/server_info", lambda a: a.json()["requests_in_flight"] == 4)
    with cluster.lock:
        del cluster.alive[1]
        cluster.alive[0].deaf = False
    cluster.meet("failure", (1,), {1: "timeout"})
    for reader in readers:
        reader.check()


def test_requests_in_flight_end_with_an_error_when_the_living_cannot_serve_for_too_long(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(ranks=2, min_ranks=2, request_patience_s=0.5)
    with cluster.lock:
        cluster.alive[0].deaf = cluster.alive[1].deaf = True
    reader = Reader(cluster.url, "x", 50)
    whole = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    cluster.until_http("/server_info", lambda a: a.json()["requests_in_flight"] == 1)
    cluster.kill(1, meet=False)
    cluster.alive[0].say(m.CannotServe(rank=0, incarnation=0, epoch=2, reason="1 ranks are alive, serving needs 2"))
    cluster.until_http("/ready", lambda a: a.status_code == 503 and "serving needs 2" in a.text)
    with pytest.raises(openai.InternalServerError, match="serving needs 2"):
        whole.completions.create(model="letters", prompt="x")
    reader.end()
    assert reader.error["code"] == "unavailable"
    assert "serving needs 2" in reader.error["message"]
    assert reader.finished
    assert cluster.http.get("/health").status_code == 200
    until_ended(cluster, "error", 1)


@contextlib.contextmanager
def calling(cluster: Cluster, body: bytes) -> Iterator[None]:
    """A client that asks for completions, and goes away without a look at the answer."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    port = int(cluster.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_all_its_choices(make_cluster: Callable[..., Cluster], stream: bool) -> None:
    cluster = make_cluster(ranks=2, step_s=0.005)
    cluster.keep_open(True)
    body = json.dumps({"prompt": "x", "max_tokens": 500, "n": 3, "stream": stream}).encode()
    with calling(cluster, body):
        cluster.until(lambda: sum(index > 3 for f in cluster.alive.values() for _, index in f.running.values()) == 3,
                      "all three are at work")  # fmt: skip
    cluster.until(
        lambda: sum(isinstance(x, m.Abort) for f in cluster.alive.values() for x in f.heard) == 3, "three aborts"
    )
    assert cluster.http.get("/server_info").json()["requests_in_flight"] == 0
    until_ended(cluster, "abort", 3)


def test_a_client_that_goes_before_its_stream_began_ends_it_too(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1)
    with cluster.lock:
        cluster.alive[0].deaf = True
    # A text so long that the client is gone before it is tokenized, and the request handed over.
    body = json.dumps({"prompt": "x" * 500_000, "truncate_prompt_tokens": 9, "max_tokens": 9, "stream": True}).encode()
    with calling(cluster, body):
        pass
    until_ended(cluster, "abort", 1)
    assert cluster.metric("phalanx_request_params_n_count") == 1
    assert cluster.http.get("/server_info").json()["requests_in_flight"] == 0


def test_an_operator_ends_a_request_by_the_id_its_client_saw(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1, step_s=0.005)
    first, second = begun(cluster, 2, 480)
    call = first.chunks[0]["id"]
    assert cluster.http.post("/abort_requests", json={"request_ids": [call, "nobody"]}).json() == {"aborted": [call]}
    first.end()
    assert (first.finish, first.error) == ("abort", None)
    assert cluster.http.post("/abort_requests", json={"request_ids": "all"}).json() == {
        "aborted": [second.chunks[0]["id"]]
    }
    assert second.end().finish == "abort"
    assert cluster.http.post("/abort_requests", json={"request_ids": 5}).status_code == 400


def refuses(cluster: Cluster) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(cluster.url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_lets_streams_end_and_exits_0(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1, step_s=0.005, drain_timeout_s=60)
    readers = begun(cluster, 3, 40)
    cluster.server.send_signal(signal.SIGTERM)
    while not refuses(cluster):
        assert cluster.server.poll() is None, "it waits for its streams"
    cluster.keep_open(False)
    assert cluster.stop() == 0
    for reader in readers:
        reader.check()


def test_a_stream_that_does_not_end_in_time_is_told_so_at_shut_down(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1, step_s=0.005, drain_timeout_s=0.5)
    reader = begun(cluster, 1, 50)[0]
    assert cluster.stop() == 0
    reader.end()
    assert "shutting down" in reader.error["message"]
    assert reader.finished


def test_the_server_ends_when_its_launcher_does(model: Path, tmp_path: Path) -> None:
    import socket
    import subprocess
    import sys

    cluster = Cluster(model, tmp_path, 1)
    listener = socket.create_server(("127.0.0.1", 0))
    server = [sys.executable, "-m", "phalanx.server", "--config", str(tmp_path / "config.json"), "--run-dir",
              str(tmp_path), "--fd", str(listener.fileno())]  # fmt: skip
    script = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[2:], pass_fds=[int(sys.argv[1])]); "
        "print(p.pid, flush=True); sys.stdin.read()"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(listener.fileno()), *server], pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    cluster.url, cluster.server = f"http://127.0.0.1:{listener.getsockname()[1]}", launcher
    listener.close()
    cluster.http = httpx.Client(base_url=cluster.url, timeout=5)
    Path(cluster.dir, "server.log").touch()
    cluster.until_http("/health", lambda a: a.status_code == 200)
    launcher.kill()
    # The server held the write end of this pipe, too: it closes when both are gone.
    _, log = launcher.communicate(timeout=60)
    assert "the launcher is gone" in log
    with pytest.raises(httpx.ConnectError):
        cluster.http.get("/health")


def test_a_model_without_a_tokenizer_is_an_error_with_exit_code_2(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    cluster = Cluster(empty, tmp_path / "run", 1)
    cluster.start(serve=False)
    assert cluster.server.wait(60) == 2
    assert "tokenizer.json is missing" in cluster.log
    cluster.stop()
