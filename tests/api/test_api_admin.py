"""Models, tokens, metrics, and the operator's and the chaos monkey's instructions, over a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from fake_cluster import Cluster

from phalanx import __version__
from phalanx import messages as m
from phalanx.testing.faults import DEVICE_KINDS


def test_the_model_is_listed(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["letters"]
    assert client.models.retrieve("letters").owned_by == "phalanx"
    assert cluster.http.get("/v1/models").json()["data"][0]["max_model_len"] == 512


def test_the_path_of_the_model_is_a_name_of_it(cluster: Cluster) -> None:
    body = {"model": cluster.config.model, "prompt": "say:[x]"}
    assert cluster.http.post("/v1/completions", json=body).json()["model"] == "letters"


def test_health_version_and_info(cluster: Cluster) -> None:
    assert cluster.http.get("/health").json() == {"status": "ok"}
    assert cluster.http.get("/ready").json() == {"status": "ready"}
    assert cluster.http.get("/version").json() == {"version": __version__}
    info = cluster.http.get("/server_info").json()
    assert (info["model"], info["max_model_len"], info["config"]["ep_size"]) == ("letters", 512, 2)


def test_before_the_ranks_have_met_the_service_lives_but_is_not_ready(model: Any, tmp_path: Any) -> None:
    cluster = Cluster(model, tmp_path, 1)
    cluster.start(serve=False)
    try:
        cluster.until_http("/health", lambda a: a.status_code == 200)
        for answer in (cluster.http.get("/ready"), cluster.http.post("/v1/completions", json={"prompt": "x"})):
            assert answer.status_code == 503
            assert "starting" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) > 0
        states = cluster.http.get("/fault_tolerance/status").json()
        assert states["last_recovery"] is None
        assert states["ranks"][0]["state"] == "recovering"
    finally:
        assert cluster.stop() == 0


def test_texts_and_conversations_are_tokenized_and_back(cluster: Cluster) -> None:
    answer = cluster.http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert answer["tokens"] == [*"hé".encode()]
    assert answer["count"] == 3
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][0] == "h"
    assert cluster.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        assert cluster.http.post("/tokenize", json=body).status_code == 400
    assert cluster.http.post("/detokenize", json={"tokens": [999]}).status_code == 400


def test_a_client_can_use_the_server_as_its_tokenizer(cluster: Cluster) -> None:
    info = cluster.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["model_max_length"]) == ("<|im_end|>", None, 512)
    assert "<|im_start|>" in info["chat_template"]


def test_metrics_count_what_clients_got(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2)
    for _ in range(3):
        cluster.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4})
    assert cluster.metric("phalanx_prompt_tokens_total", model_name="letters") == 15
    assert cluster.metric("phalanx_generation_tokens_total") == 12
    assert cluster.metric("phalanx_time_to_first_token_seconds_count") == 3
    assert cluster.metric("phalanx_inter_token_latency_seconds_count") == 9
    assert cluster.metric("phalanx_e2e_request_latency_seconds_count") == 3
    assert cluster.metric("phalanx_request_success_total", finished_reason="length") == 3
    assert cluster.metric("phalanx_ranks_alive") == 2


def test_an_operator_masks_a_rank(cluster: Cluster) -> None:
    body = {"instruction": "mask_rank", "params": {"rank": 1}}
    answer = cluster.http.post("/fault_tolerance/apply", json=body)
    assert (answer.status_code, answer.json()["ranks"]) == (202, [1])
    cluster.until(lambda: m.MaskRank(rank=1) in cluster.told, "the launcher is told")


def test_an_operator_brings_a_dead_rank_back(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2)
    body = {"instruction": "rejoin", "params": {"rank": 1}}
    refused = cluster.http.post("/fault_tolerance/apply", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "params.rank")
    cluster.kill(1)
    cluster.until_http("/fault_tolerance/status", lambda a: a.json()["ranks"][1]["state"] == "dead")
    answer = cluster.http.post("/fault_tolerance/apply", json=body)
    assert (answer.status_code, answer.json()["ranks"]) == (202, [1])
    cluster.until(lambda: m.StartRank(rank=1) in cluster.told, "the launcher is told")


def test_the_launcher_hears_of_every_view(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2)
    view = m.ViewChanged(epoch=1, members=[(0, 0), (1, 0)])
    cluster.until(lambda: cluster.told == [view], "the launcher is told, once")


def test_pause_and_retry_stop_and_start_the_ranks(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2)
    assert cluster.http.post("/fault_tolerance/apply", json={"instruction": "pause"}).status_code == 202
    cluster.until_http(
        "/fault_tolerance/status", lambda a: {r["state"] for r in a.json()["ranks"]} == {"paused"}
    )  # fmt: skip
    assert cluster.http.get("/ready").status_code == 503
    body = {"instruction": "retry", "params": {"rank": 1}}
    assert cluster.http.post("/fault_tolerance/apply", json=body).json()["ranks"] == [1]
    cluster.until_http("/ready", lambda a: a.status_code == 200)
    answer = cluster.http.post("/v1/completions", json={"prompt": "say:[back]", "max_tokens": 9})
    assert answer.json()["choices"][0]["text"] == "back"


BAD_INSTRUCTIONS = [
    ({"instruction": "explode"}, "instruction"),
    ({}, "instruction"),
    ({"instruction": "mask_rank"}, "params.rank"),
    ({"instruction": "mask_rank", "params": {"rank": 2}}, "params.rank"),
    ({"instruction": "mask_rank", "params": {"rank": -1}}, "params.rank"),
    ({"instruction": "mask_rank", "params": {"rank": "1"}}, "params.rank"),
    ({"instruction": "mask_rank", "params": {"rank": True}}, "params.rank"),
    ({"instruction": "pause", "params": {"rank": 9}}, "params.rank"),
    ({"instruction": "rejoin"}, "params.rank"),
    ({"instruction": "rejoin", "params": {"rank": 9}}, "params.rank"),
    ({"instruction": "pause", "params": []}, "params"),
    ({"instruction": "pause", "params": {"ranks": [0]}}, "params.ranks"),
    ({"instruction": "pause", "rank": 0}, "rank"),
]


@pytest.mark.parametrize(("body", "param"), BAD_INSTRUCTIONS, ids=[str(b) for b, _ in BAD_INSTRUCTIONS])
def test_a_bad_instruction_is_refused(cluster: Cluster, body: dict[str, Any], param: str) -> None:
    answer = cluster.http.post("/fault_tolerance/apply", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("field", "shown"),
    [(r"\ud800", r"\ud800"), ("z" * 100_000, "z" * 100)],
    ids=["half a surrogate pair", "endless"],
)
def test_a_field_whose_name_no_answer_can_hold_is_refused_as_others_are(
    cluster: Cluster, field: str, shown: str
) -> None:
    for body, param in (
        (f'{{"instruction": "pause", "{field}": 1}}', shown),
        (f'{{"instruction": "pause", "params": {{"{field}": 1}}}}', f"params.{shown}"),
    ):
        answer = cluster.http.post("/fault_tolerance/apply", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert len(answer.json()["error"]["message"]) < 300


def test_chaos_is_refused_unless_it_was_enabled(cluster: Cluster) -> None:
    answer = cluster.http.post("/chaos", json={"kind": "kill", "rank": 0})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


def test_chaos_signals_through_the_launcher_or_arms_the_rank(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=2, enable_chaos=True)
    for kind in ("kill", "stop", "cont"):
        assert cluster.http.post("/chaos", json={"kind": kind, "rank": 1}).status_code == 202
    names = ["SIGKILL", "SIGSTOP", "SIGCONT"]
    expected_signals = [m.Signal(rank=1, name=n) for n in names]
    cluster.until(lambda: [t for t in cluster.told if isinstance(t, m.Signal)] == expected_signals, "three signals")
    assert cluster.http.post("/chaos", json={"kind": "kill", "rank": 0, "at_step": 7}).status_code == 202
    assert cluster.http.post("/chaos", json={"kind": "raise", "rank": 0, "where": "dispatch"}).status_code == 202
    expected = [m.InjectFault(kind="kill", at_step=7), m.InjectFault(kind="raise", where="dispatch")]
    cluster.until(lambda: cluster.alive[0].heard[-2:] == expected, "two faults")
    bad: list[dict[str, Any]] = [
        {"kind": "melt", "rank": 0},
        {"kind": "kill", "rank": 2},
        {"kind": "kill"},
        {"kind": "cont", "rank": 0, "at_step": 1},
        {"kind": "raise", "rank": 0, "where": "nowhere"},
        {"kind": "kill", "rank": 0, "at_step": -1},
        {"kind": "kill", "rank": 0, "step": 9},
    ]
    for body in bad:
        assert cluster.http.post("/chaos", json=body).status_code == 400, body
    cluster.kill(1)
    cluster.until_http("/fault_tolerance/status", lambda a: a.json()["ranks"][1]["state"] == "dead")
    gone = cluster.http.post("/chaos", json={"kind": "kill", "rank": 1})
    assert (gone.status_code, "not alive" in gone.text) == (400, True)


def test_a_step_that_no_message_can_carry_is_refused(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(ranks=1, enable_chaos=True)
    answer = cluster.http.post("/chaos", json={"kind": "raise", "rank": 0, "at_step": 10**30})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "at_step")


def test_a_fault_within_a_devices_kernel_is_refused_instead_of_never_happening(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(ranks=1, enable_chaos=True, device="cuda")
    answer = cluster.http.post("/chaos", json={"kind": "raise", "rank": 0, "where": "combine"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "where")
    assert "--device cuda" in answer.text
    assert cluster.http.post("/chaos", json={"kind": "raise", "rank": 0, "where": "decode"}).status_code == 202
    for kind in DEVICE_KINDS:
        assert cluster.http.post("/chaos", json={"kind": kind, "rank": 0}).status_code == 202
    expected = [m.InjectFault(kind=kind) for kind in DEVICE_KINDS]  # type: ignore[arg-type]
    cluster.until(lambda: cluster.alive[0].heard[-4:] == expected, "four failures of a device")
    nowhere = cluster.http.post("/chaos", json={"kind": "hung-kernel", "rank": 0, "where": "start"})
    assert (nowhere.status_code, nowhere.json()["error"]["param"]) == (400, "where")


@pytest.mark.parametrize("where", ["start", "join", "vault_fill"])
def test_a_fault_that_no_running_rank_comes_to_is_refused_instead_of_never_happening(
    make_cluster: Callable[..., Cluster], where: str
) -> None:
    cluster = make_cluster(ranks=1, enable_chaos=True)
    answer = cluster.http.post("/chaos", json={"kind": "raise", "rank": 0, "where": where})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "where")
    assert f"a rank that runs never comes to {where}: name it in PHALANX_FAULTS" in answer.text


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_a_failure_of_a_device_is_refused_where_there_is_none(make_cluster: Callable[..., Cluster], kind: str) -> None:
    cluster = make_cluster(ranks=1, enable_chaos=True)
    answer = cluster.http.post("/chaos", json={"kind": kind, "rank": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kind")
    assert f"{kind} is a failure of a CUDA device, and this service computes with --device cpu" in answer.text
