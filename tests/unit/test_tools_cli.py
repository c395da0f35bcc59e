"""The command line against a service over real HTTP: a small one that answers as Phalanx does, and can be hurt."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import uvicorn
from click.testing import CliRunner, Result
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from phalanx.cli import COMMANDS, main
from phalanx.cli.figures import percentiles, prompts
from phalanx.server.text import ModelText
from phalanx.testing.faults import DEVICE_KINDS
from phalanx.testing.streams import Stream, client, run_stream

TOKEN_S = 0.002
STALL_S = 0.1


@dataclass
class Standin:
    """A service whose tokens are a function of the prompt, with a rank that can be killed and comes back."""

    chaos: bool = True
    ready: bool = True
    ids: bool = True
    wrong_after_kill: bool = False
    broken: str = ""
    key: str = ""
    states: list[str] = field(default_factory=lambda: ["healthy"] * 3)
    epoch: int = 1
    last_recovery: dict[str, Any] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    stalled_until: float = 0.0
    url: str = ""

    def kill(self, rank: int) -> None:
        """Streams pause, the epoch grows, the rank is back when they go on."""
        self.stalled_until = asyncio.get_running_loop().time() + STALL_S
        self.epoch += 2
        seconds = {"detect": 0.001, "agree": 0.002, "mask": 0.003, "replan": 0.004, "restore": 0.05, "replay": 0.04}
        self.last_recovery = {
            "trigger": "failure",
            "lost": [rank],
            "epoch": self.epoch,
            "seconds": seconds | {"total": STALL_S},
            "bytes_restored": {"peer": 1024, "vault": 0, "disk": 2048},
            "requests_moved": 2,
        }

    async def tokens(self, body: dict[str, Any]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        start = sum(body["prompt"]) if isinstance(body["prompt"], list) else sum(map(ord, body["prompt"]))
        for number in range(body["max_tokens"]):
            await asyncio.sleep(max(TOKEN_S, self.stalled_until - loop.time()))
            token = (start + number) % 95 + 32
            if self.wrong_after_kill and self.last_recovery and number == body["max_tokens"] - 1:
                token = 31
            choice: dict[str, Any] = {"index": 0, "text": chr(token), "finish_reason": None}
            if self.ids and body.get("return_token_ids"):
                choice["token_ids"] = [token]
            if number == body["max_tokens"] - 1:
                choice["finish_reason"] = "length"
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    async def broken_stream(self) -> AsyncIterator[str]:
        yield 'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
        if self.broken == "error":
            yield 'data: {"error": {"message": "experts were lost", "code": 503}}\n\n'

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, go_on: Any) -> Any:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no valid key"}}, 401)
            return await go_on(request)

        @app.get("/fault_tolerance/status")
        async def status() -> Any:
            ranks = [
                {"rank": rank, "incarnation": 0, "state": state, "pid": 100 + rank, "host": "here", "device": "cpu"}
                for rank, state in enumerate(self.states)
            ]
            return {"epoch": self.epoch, "ep_size": len(ranks), "ranks": ranks, "last_recovery": self.last_recovery}

        @app.get("/server_info")
        async def info() -> Any:
            return {"config": {"model": "/models/standin", "served_model_name": "standin"}}

        @app.get("/ready")
        async def ready() -> Any:
            return JSONResponse({}, 200 if self.ready else 503)

        @app.get("/v1/models")
        async def models() -> Any:
            return {"data": [{"id": "standin"}]}

        @app.post("/chaos")
        async def chaos(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            if not self.chaos:
                return JSONResponse({"error": {"message": "chaos is off"}}, 403)
            if body["rank"] >= len(self.states):
                return JSONResponse({"error": {"message": f"there is no rank {body['rank']}"}}, 400)
            self.kill(body["rank"])
            return JSONResponse({}, 202)

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            if self.broken == "refused":
                return JSONResponse({"error": {"message": "the queue is full"}}, 429)
            return StreamingResponse(self.broken_stream() if self.broken else self.tokens(body))

        return app


@contextmanager
def running(standin: Standin) -> Iterator[Standin]:
    """Serve from a thread. The socket listens before the server runs, so there is nothing to wait for."""
    listener = socket.create_server(("127.0.0.1", 0))
    standin.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(standin.app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield standin
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def standin() -> Iterator[Standin]:
    with running(Standin()) as service:
        yield service


@pytest.fixture
def nobody() -> str:
    """A URL at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def phalanx(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


# --- the group


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom phalanx.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nprint('MODULES', *sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    page, _, modules = output.partition("MODULES")
    assert all(re.search(rf"^  {name} ", page, re.MULTILINE) for name in COMMANDS)
    assert not {"torch", "numpy", "transformers", "httpx", "rich", "msgspec"} & set(modules.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = phalanx(name, "--help")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage:")


def test_an_unknown_command_is_a_usage_error() -> None:
    result = phalanx("fly")
    assert result.exit_code == 2
    assert "fly" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["status", "--watch"], ["chaos", "kill", "--rank", "1"], ["bench", "serve"], ["bench", "recovery"]],
)
def test_an_absent_service_is_one_clear_line_and_exit_2(arguments: list[str], nobody: str) -> None:
    result = phalanx(*arguments, "--url", nobody)
    assert result.exit_code == 2
    assert nobody in result.stderr
    assert "is the service running?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- make-model


def test_make_model_writes_what_its_options_say(tmp_path: Path) -> None:
    out = tmp_path / "model"
    result = phalanx("make-model", str(out), "--arch", "qwen3-moe", "--layers", "2", "--experts", "6", "--top-k", "3")
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"]) == (2, 6, 3)
    again = phalanx("make-model", str(out), "--arch", "mixtral")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert phalanx("make-model", str(out), "--arch", "mixtral", "--force").exit_code == 0


def test_make_model_documents_the_defaults_that_make_tiny_has() -> None:
    import inspect

    from phalanx.testing.tiny import make_tiny

    defaults = {name: parameter.default for name, parameter in inspect.signature(make_tiny).parameters.items()}
    command = main.get_command(click.Context(main), "make-model")
    assert command is not None
    stated = 0
    for option in command.params:
        help_line = getattr(option, "help", None) or ""
        if (found := re.search(r"\[default: (.*)\]", help_line)) and option.name in defaults:
            assert found[1] == str(defaults[option.name]), option.name
            stated += 1
    assert stated == 12


def test_make_model_writes_a_well_known_shape_without_weights(tmp_path: Path) -> None:
    out = tmp_path / "big"
    done = phalanx("make-model", str(out), "--shape", "qwen3-30b-a3b", "--layers", "12", "--config-only")
    assert done.exit_code == 0, done.output
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_experts"], config["vocab_size"]) == (12, 128, 151936)
    assert {file.suffix for file in out.iterdir()} == {".json", ".jinja"}
    text = ModelText(str(out))
    assert text.decode([*text.encode("Zürich"), 151935]) == "Zürich 151935"
    unknown = phalanx("make-model", str(tmp_path / "x"), "--shape", "gpt-9")
    assert unknown.exit_code == 2
    assert "--shape gpt-9 is not known: choose one of qwen3-30b-a3b" in unknown.stderr


def test_make_model_refuses_what_the_disk_has_no_room_for_before_it_writes_anything(tmp_path: Path) -> None:
    sizes = ["--layers", "1", "--expert-width", "2000000000", "--hidden", "65536"]
    huge = phalanx("make-model", str(tmp_path / "huge"), "--shape", "qwen3-30b-a3b", *sizes)
    assert huge.exit_code == 2
    assert re.search(r"huge would take \d+\.\d GB, and \S+ has room for \d+\.\d GB: .*--config-only", huge.stderr)
    assert not list(tmp_path.iterdir())


def test_make_model_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    sizes = ["--layers", "1", "--experts", "128", "--expert-width", "2048", "--hidden", "1024"]  # many seconds of work
    command = [sys.executable, "-m", "phalanx", "make-model", str(tmp_path / "model"), "--arch", "qwen3-moe", *sizes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not any(tmp_path.iterdir()):
            assert process.poll() is None, process.communicate()
        process.terminate()
        output, _ = process.communicate()
    assert process.returncode == 1
    assert b"Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_make_model_wants_one_kind_of_model() -> None:
    for arguments in ([], ["--arch", "mixtral", "--upcycle"], ["--arch", "mixtral", "--shape", "mixtral-8x7b"]):
        result = phalanx("make-model", "out", *arguments)
        assert result.exit_code == 2
        assert "--arch" in result.stderr
        assert "--upcycle" in result.stderr


# --- status


def test_status_shows_ranks_and_the_last_recovery(standin: Standin) -> None:
    standin.states[1] = "dead"
    quiet = phalanx("status", "--url", standin.url)
    assert quiet.exit_code == 0
    assert "no recovery yet" in quiet.output
    assert "standin" in quiet.output
    assert re.search(r"1\D+0\D+dead\D+101", quiet.output)

    standin.ready = False
    standin.last_recovery = {
        "trigger": "failure", "lost": [1], "epoch": 3, "seconds": {"detect": 0.0015, "total": 0.25},
        "bytes_restored": {"peer": 4096, "vault": 0, "disk": 0}, "requests_moved": 5,
    }  # fmt: skip
    after = phalanx("status", "--url", standin.url)
    for said in ("not ready", "lost ranks [1]", "1.5 ms", "250.0 ms", "4,096 from peer", "requests moved: 5"):
        assert said in after.output


def test_status_json_is_what_the_service_said(standin: Standin) -> None:
    seen = json.loads(phalanx("status", "--url", standin.url, "--json").output)
    assert seen["ready"] is True
    assert [rank["pid"] for rank in seen["fault_tolerance"]["ranks"]] == [100, 101, 102]
    assert seen["server_info"]["config"]["served_model_name"] == "standin"


def test_a_key_is_sent_and_its_lack_is_told(standin: Standin) -> None:
    standin.key = "secret"
    refused = phalanx("status", "--url", standin.url)
    assert refused.exit_code == 2
    assert "401: no valid key" in refused.stderr
    assert phalanx("status", "--url", standin.url, "--api-key", "secret").exit_code == 0


# --- chaos


def test_chaos_asks_for_what_was_said(standin: Standin) -> None:
    result = phalanx("chaos", "--url", standin.url, "raise", "--rank", "2", "--at-step", "7", "--where", "combine")
    assert result.exit_code == 0, result.output
    assert phalanx("chaos", "kill", "--rank", "0", "--url", standin.url).exit_code == 0
    assert standin.asked == [
        {"kind": "raise", "rank": 2, "at_step": 7, "where": "combine"},
        {"kind": "kill", "rank": 0},
    ]


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_failures_of_a_device_can_be_asked_for_and_are_told_of_in_the_help(standin: Standin, kind: str) -> None:
    assert phalanx("chaos", "--url", standin.url, kind, "--rank", "1").exit_code == 0
    assert standin.asked == [{"kind": kind, "rank": 1}]
    assert f"{kind:14} {DEVICE_KINDS[kind]}"[:60] in phalanx("chaos", "--help").output


def test_a_service_without_chaos_names_the_flag_it_needs(standin: Standin) -> None:
    standin.chaos = False
    result = phalanx("chaos", "--url", standin.url, "kill", "--rank", "0")
    assert result.exit_code == 2
    assert "--enable-chaos" in result.stderr


def test_a_rank_that_is_not_there_is_told_in_the_services_words(standin: Standin) -> None:
    result = phalanx("chaos", "--url", standin.url, "kill", "--rank", "9")
    assert result.exit_code == 2
    assert "400: there is no rank 9" in result.stderr


def test_continuing_a_stopped_process_goes_without_a_step(standin: Standin) -> None:
    result = phalanx("chaos", "--url", standin.url, "cont", "--rank", "0", "--at-step", "3")
    assert result.exit_code == 2
    assert standin.asked == []


# --- bench serve


def test_bench_serve_counts_tokens_and_measures_times(standin: Standin) -> None:
    result = phalanx(
        "bench", "serve", "--url", standin.url, "--num-prompts", "6", "--concurrency", "3", "--input-len", "10",
        "--output-len", "8", "--warmup", "1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert (figures["completed"], figures["failed"]) == (6, 0)
    assert (figures["input_tokens"], figures["output_tokens"]) == (60, 48)
    assert figures["itl_s"]["n"] == 6 * 7
    assert figures["ttft_s"]["p50"] >= TOKEN_S
    assert figures["e2e_s"]["p50"] >= 8 * TOKEN_S
    assert figures["output_tokens_per_s"] == pytest.approx(48 / figures["seconds"])
    assert len(standin.asked) == 7
    assert standin.asked[1]["ignore_eos"] is True


def test_bench_serve_sends_text_to_services_that_take_no_ids(standin: Standin) -> None:
    result = phalanx("bench", "serve", "--url", standin.url, "--num-prompts", "1", "--text", "--respect-eos")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    assert isinstance(standin.asked[-1]["prompt"], str)
    assert "ignore_eos" not in standin.asked[-1]


@pytest.mark.parametrize(("broken", "said"), [("refused", "429"), ("error", "experts were lost"), ("cut", "finish")])
def test_bench_serve_tells_why_requests_fail(broken: str, said: str) -> None:
    with running(Standin(broken=broken)) as standin:
        result = phalanx("bench", "serve", "--url", standin.url, "--num-prompts", "2")
    assert result.exit_code == 2
    assert said in result.stderr


# --- bench recovery


def recovery(standin: Standin, *more: str) -> Result:
    return phalanx(
        "bench", "recovery", "--url", standin.url, "--rounds", "2", "--streams", "4", "--output-len", "40",
        "--ranks", "2,0", *more,
    )  # fmt: skip


def test_bench_recovery_measures_the_stall_that_clients_felt(standin: Standin, tmp_path: Path) -> None:
    picture = tmp_path / "streams.png"
    result = recovery(standin, "--json", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["failed"], figures["different"], figures["requests"]) == (0, 0, 8)
    assert figures["compared_by"] == "token ids"
    assert figures["kill_to_next_token_s"]["n"] == 8
    assert figures["kill_to_next_token_s"]["p50"] >= STALL_S / 2
    assert figures["longest_gap_unfailed_s"]["p50"] < figures["kill_to_next_token_s"]["p50"]
    assert figures["phases_s"]["control"]["max"] == pytest.approx(0.010)
    assert [one["victims"] for one in figures["each"]] == [[2], [0]]
    assert [body["rank"] for body in standin.asked if "kind" in body] == [2, 0]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ids", [True, False])
def test_bench_recovery_fails_when_a_token_differs(ids: bool) -> None:
    with running(Standin(wrong_after_kill=True, ids=ids)) as standin:
        result = recovery(standin, "--json")
    assert result.exit_code == 1
    figures = json.loads(result.stdout)
    assert figures["different"] == 8
    assert figures["compared_by"] == ("token ids" if ids else "text")


def test_bench_recovery_shows_a_table_for_people(standin: Standin) -> None:
    result = recovery(standin)
    assert result.exit_code == 0, result.output
    for said in ("as clients saw it", "detect + agree + mask + replan", "0 requests failed, 0 tokens different"):
        assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "MODEL"), (["model", "--url", "http://x"], "MODEL"), (["--url", "http://x", "--ranks", "one"], "one")],
)
def test_bench_recovery_refuses_what_it_cannot_run(arguments: list[str], said: str) -> None:
    result = phalanx("bench", "recovery", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_bench_recovery_names_a_rank_that_the_service_does_not_have(standin: Standin) -> None:
    result = recovery(standin, "--ranks", "7")
    assert result.exit_code == 2
    assert "[7]" in result.stderr


# --- streams and figures


def stream_of(*arrivals_s: float, sent_s: float = 0.0) -> Stream:
    return Stream("s", sent_s=sent_s, arrivals_s=list(arrivals_s), counts=[1] * len(arrivals_s))


def test_a_token_on_its_way_does_not_end_the_silence() -> None:
    # The failure is at 1.0; the token at 1.01 was sent before it, the stream goes on at 1.5.
    assert stream_of(0.9, 1.01, 1.5, 1.6).silence(1.0) == (1.01, pytest.approx(0.49))
    assert stream_of(0.9, 1.3, 1.4).silence(1.0) == (1.0, pytest.approx(0.3))
    assert stream_of(0.5, 0.9).silence(1.0) is None


def test_streams_differ_by_token_by_length_and_by_text() -> None:
    def stream(*ids: int, text: str = "x") -> Stream:
        return Stream("s", ids=list(ids), text=text, finish_reason="length")

    assert stream(1, 2, 3).same_as(stream(1, 2, 3))
    assert stream(1, 2, 3).different_tokens(stream(1, 9, 3)) == 1
    assert stream(1, 2, 3).different_tokens(stream(1)) == 2
    assert stream(1, 2).different_tokens(stream(1, 2, text="y")) == 1
    assert stream(text="a").different_tokens(stream(text="b")) == 1
    assert not Stream("s", error="gone").same_as(Stream("s"))


def test_a_stream_records_ids_times_and_usage(standin: Standin) -> None:
    async def run() -> Stream:
        body = {"prompt": [1, 2], "max_tokens": 3, "return_token_ids": True}
        async with client(standin.url) as http:
            return await run_stream(http, "/v1/completions", body, Stream("s"))

    stream = asyncio.run(run())
    assert stream.error == ""
    assert stream.ids == [35, 36, 37]
    assert stream.text == "#$%"
    assert (stream.finish_reason, stream.prompt_tokens, stream.completion_tokens) == ("length", 2, 3)
    assert stream.sent_s < stream.arrivals_s[0] < stream.arrivals_s[1] < stream.arrivals_s[2]
    assert stream.done


def test_percentiles_are_those_of_numpy() -> None:
    values = [float(value) for value in np.random.default_rng(0).lognormal(size=37)]
    figures = percentiles(values)
    assert figures["p50"] == pytest.approx(np.percentile(values, 50))
    assert figures["p99"] == pytest.approx(np.percentile(values, 99))
    assert (figures["max"], figures["n"]) == (max(values), 37)
    assert percentiles([]) == {"n": 0}


def test_prompts_are_the_same_for_the_same_seed_and_differ_among_themselves() -> None:
    assert prompts(3, 10, seed=1) == prompts(3, 10, seed=1) != prompts(3, 10, seed=2)
    assert len({tuple(prompt) for prompt in prompts(8, 10, seed=1)}) == 8
