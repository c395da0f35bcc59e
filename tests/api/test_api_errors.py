"""Every error has one form: {"error": {message, type, param, code}}, and no traceback ever leaves the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_cluster import Cluster


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return body["error"]


BAD_FIELDS = [
    ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("n", 0),
    ("n", 1000), ("max_tokens", -1), ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
    ("logprobs", 21), ("logit_bias", {"65": 101}), ("logit_bias", {"9999": 1}), ("logit_bias", {"x": 1}),
    ("stop", [""]), ("stop", ["a"] * 65), ("stop_token_ids", [9999]), ("min_tokens", 17), ("seed", 1.5),
    ("suffix", "end"), ("best_of", 2), ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", [9999]),
    ("prompt", [-1]), ("prompt", 5), ("prompt", ["a", [1]]), ("prompt", None), ("stream", "maybe"),
    ("response_format", {"type": "json_schema"}), ("structured_outputs", {"regex": "a"}), ("truncate_prompt_tokens", 0),
    ("top_k", 10**30), ("repetition_penalty", 1e-300), ("prompt", [True]), ("prompt", [[65.0]]),
    ("prompt", ["a"] * 2000), ("max_tokens", 10**30),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=[f"{f}={str(v)[:20]}" for f, v in BAD_FIELDS])
def test_a_bad_field_is_named(cluster: Cluster, field: str, value: object) -> None:
    answer = cluster.http.post("/v1/completions", json={"prompt": "x", field: value})
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"] == field
    assert field in error["message"] or field == "prompt"
    assert error["type"] == "invalid_request_error"


BAD_BODIES = [b"", b"{", b"[]", b"null", b'{"prompt": "\xff"}', b"\xff\xfe", b'{"prompt": "x", "temperature": NaN}',
              b'{"prompt": "\\ud800"}', b'{"prompt": "x", "logit_bias": {"65": Infinity}}']  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=[repr(b)[:40] for b in BAD_BODIES])
def test_a_body_that_cannot_be_read_is_a_400(cluster: Cluster, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = cluster.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert error_of(answer)["message"]


def test_a_body_without_its_content_type_says_what_is_missing(cluster: Cluster) -> None:
    answer = cluster.http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in error_of(answer)["message"]


def test_a_prompt_that_is_too_long_says_how_long_it_is_and_may_be(cluster: Cluster) -> None:
    answer = cluster.http.post("/v1/completions", json={"prompt": "x" * 600})
    error = error_of(answer)
    assert answer.status_code == 400
    assert "600 tokens" in error["message"]
    assert "512" in error["message"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_an_answer_that_does_not_fit_says_by_how_much(cluster: Cluster) -> None:
    answer = cluster.http.post("/v1/completions", json={"prompt": "x" * 500, "max_tokens": 13})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, "max_tokens", "context_length_exceeded")
    assert "500 tokens" in error["message"]
    assert cluster.http.post("/v1/completions", json={"prompt": "x" * 500, "max_tokens": 12}).status_code == 200


def test_a_request_that_no_rank_could_hold_is_a_400(cluster: Cluster) -> None:
    answer = cluster.http.post("/v1/completions", json={"prompt": "refuse me"})
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "too large for the KV cache"


def test_a_stream_that_a_rank_refuses_ends_with_an_error_the_client_raises(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="too large"):
        list(client.completions.create(model="letters", prompt="refuse me", stream=True))


def test_another_model_is_a_404(cluster: Cluster) -> None:
    for answer in (
        cluster.http.post("/v1/completions", json={"model": "gpt-4", "prompt": "x"}),
        cluster.http.post(
            "/v1/chat/completions", json={"model": "gpt-4", "messages": [{"role": "user", "content": "x"}]}
        ),
        cluster.http.get("/v1/models/gpt-4"),
    ):
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "model_not_found"


def test_unknown_paths_and_methods_have_the_same_form(cluster: Cluster) -> None:
    missing = cluster.http.get("/v2/nothing")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    wrong = cluster.http.get("/v1/completions")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_body_without_end_is_refused(cluster: Cluster, chunked: bool) -> None:
    body = b"x" * ((64 << 20) + 1)
    headers = {"content-type": "application/json"}
    answer = cluster.http.post("/v1/completions", content=iter([body]) if chunked else body, headers=headers)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_more_choices_than_are_ever_taken_at_once_are_a_400_that_says_how_many_are(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(ranks=1, max_num_seqs=2, max_queued_requests=2)
    many = cluster.http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "n": 2})
    assert (many.status_code, error_of(many)["param"], error_of(many)["code"]) == (400, "prompt", "too_many_choices")
    assert "6 answers" in error_of(many)["message"]
    assert "at most 4" in error_of(many)["message"]
    chat = {"messages": [{"role": "user", "content": "x"}], "n": 5}
    assert error_of(cluster.http.post("/v1/chat/completions", json=chat))["param"] == "n"
    assert cluster.http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2}).status_code == 200


def test_without_the_key_generation_and_operation_are_closed_and_observation_is_open(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(ranks=1, api_key="secret", enable_chaos=True)
    closed = [
        ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
        ("POST", "/detokenize"), ("POST", "/abort_requests"), ("POST", "/fault_tolerance/apply"), ("POST", "/chaos"),
    ]  # fmt: skip
    for method, path in closed:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = cluster.http.request(method, path, json={}, headers=headers)
            assert answer.status_code == 401, path
            assert error_of(answer)["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/metrics", "/version", "/fault_tolerance/status"):
        assert cluster.http.get(path).status_code == 200, path
    info = cluster.http.get("/server_info")
    assert "secret" not in info.text
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="secret")
    assert client.completions.create(model="letters", prompt="say:[in]", max_tokens=9).choices[0].text == "in"


def test_beyond_the_queue_the_answer_is_429_and_says_when_to_come_back(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1, max_num_seqs=1, max_queued_requests=2)
    with cluster.lock:
        cluster.alive[0].deaf = True
    streams = []
    for _ in range(3):
        stream = cluster.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True})
        assert stream.__enter__().status_code == 200
        streams.append(stream)
    answer = cluster.http.post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, error_of(answer)["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) > 0
    assert cluster.metric("phalanx_requests_refused_total", reason="queue_full") == 1
    assert cluster.metric("phalanx_request_success_total") == 0, "what was not taken did not end"
    for stream in streams:
        stream.__exit__(None, None, None)
    with cluster.lock:
        cluster.alive[0].deaf = False
    cluster.until_http("/server_info", lambda info: info.json()["requests_in_flight"] == 0)
    assert cluster.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
