"""Commands that are written down for SGLang and vLLM are understood by `phalanx serve`, or refused with the reason."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

import pytest

from phalanx.cli import aliases
from phalanx.cli.serve import serve, understood
from phalanx.config import Device, ServeConfig
from phalanx.errors import BadConfig

ONE_SERVICE = """--model-path M --trust-remote-code --tp 4 --elastic-ep-backend mooncake
    --mooncake-ib-device mlx5_0,mlx5_1 --moe-a2a-backend mooncake --deepep-mode low_latency --moe-dense-tp-size 1
    --enable-dp-lm-head --enable-two-batch-overlap --disable-custom-all-reduce --enable-eplb
    --ep-num-redundant-experts 72
    --chunked-prefill-size 512 --cuda-graph-max-bs 128 --max-running-requests 512 --mem-fraction-static 0.5"""
DOCUMENTED = {
    "one service": ONE_SERVICE,
    "one service, attention data-parallel": f"{ONE_SERVICE} --enable-dp-attention --dp 4",
    "two hosts": """--model-path M --trust-remote-code --tp 16 --dp 16 --enable-dp-attention --enable-dp-lm-head
        --moe-dense-tp-size 1 --elastic-ep-backend mooncake --mooncake-ib-device mlx5_0 --moe-a2a-backend mooncake
        --deepep-mode low_latency --enable-two-batch-overlap --disable-custom-all-reduce --enable-eplb
        --ep-num-redundant-experts 24 --enable-elastic-expert-backup --chunked-prefill-size 512 --cuda-graph-max-bs 16
        --max-running-requests 512 --mem-fraction-static 0.5 --device cpu --host 0.0.0.0 --port 21000 --nnodes 2
        --node-rank 0 --dist-init-addr 10.0.0.1:25555""",
    "a host that comes back": """--model-path M --host 127.0.0.1 --port 22000 --trust-remote-code --tp 8 --dp 8
        --nnodes 2 --node-rank 1 --dist-init-addr 127.0.0.1:25555 --random-seed 42 --enable-dp-attention
        --enable-dp-lm-head --elastic-ep-backend mooncake --mooncake-ib-device mlx5_0 --moe-a2a-backend mooncake
        --deepep-mode low_latency --moe-dense-tp-size 1 --disable-custom-all-reduce --enable-eplb
        --ep-num-redundant-experts 72 --chunked-prefill-size 512
        --cuda-graph-max-bs-decode 16 --mem-fraction-static 0.5 --elastic-ep-rejoin""",
    "a service that will grow": """--model-path M --trust-remote-code --tp 4 --dp 4 --enable-dp-attention
        --enable-dp-lm-head --elastic-ep-backend mooncake --mooncake-ib-device mlx5_0 --moe-a2a-backend nixl
        --deepep-mode low_latency --enable-eplb --ep-num-redundant-experts 24 --elastic-ep-initial-size 4
        --load-balance-method round_robin --max-ep-size 8 --cuda-graph-backend-decode disabled
        --cuda-graph-backend-prefill disabled --nnodes 1 --node-rank 0 --dist-init-addr 10.0.0.1:25555 --host 10.0.0.1
        --port 21000""",
    "vLLM": """M --data-parallel-size 4 --data-parallel-size-local 4 --data-parallel-backend ray --enforce-eager
        --enable-expert-parallel --enable-eplb --all2all-backend allgather_reducescatter --num-redundant-experts 2
        --trust-remote-code --host 0.0.0.0 --port 8006""",
    "vLLM, elastic": """M --tensor-parallel-size 1 --data-parallel-size 2 --enable-expert-parallel --enable-elastic-ep
        --gpu-memory-utilization 0.9 --max-model-len 2048 --max-num-seqs 32 --served-model-name m""",
}
RANKS = {"two hosts": 16, "a host that comes back": 8, "vLLM, elastic": 2}


def read(line: str) -> tuple[ServeConfig, list[str]]:
    context = serve.make_context("serve", shlex.split(line))
    return understood(context, dict(context.params))


def refusal(line: str) -> str:
    with pytest.raises(BadConfig) as caught:
        read(line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_command_is_understood_and_each_foreign_flag_gets_a_line_of_log(name: str) -> None:
    line = DOCUMENTED[name]
    config, notes = read(line)
    assert (config.model, config.ep_size) == ("M", RANKS.get(name, 4))
    assert config.elastic
    config.check()
    foreign = {spelling for entry in aliases.FOREIGN for spelling in entry.names}
    expected = [word for word in shlex.split(line) if word in foreign]
    assert sorted(note.split()[0].rstrip(":") for note in notes) == sorted(expected)


def test_an_alias_sets_what_our_own_flag_sets() -> None:
    config, _ = read(DOCUMENTED["two hosts"])
    assert config.num_redundant_experts == 24
    assert config.enable_eplb
    assert config.expert_backup == "dram"
    assert (config.host, config.port) == ("0.0.0.0", 21000)
    assert (config.nnodes, config.node_rank, config.dist_init_addr) == (2, 0, "10.0.0.1:25555")
    assert config.ib_device == "mlx5_0"
    config, _ = read(DOCUMENTED["a host that comes back"])
    assert (config.node_rank, config.elastic_ep_rejoin) == (1, True)
    assert read(DOCUMENTED["a service that will grow"])[0].max_ep_size == 8
    assert read("M --nnodes 2 --node-rank 1 --tp 2 --elastic-ep-join-mode recover")[0].elastic_ep_rejoin
    config, _ = read("M --disable-radix-cache --page-size 32 --context-length 99 --random-seed 7")
    assert (config.enable_prefix_caching, config.block_size, config.max_model_len, config.seed) == (False, 32, 99, 7)
    config, _ = read("M --eplb-rebalance-num-iterations 50")
    assert config.eplb_interval == 50


@pytest.mark.parametrize(
    ("ranks", "tokens", "requests"), [("--tp 16 --dp 16", 32, 32), ("--ep-size 3", 171, 171), ("", 512, 512)]
)
def test_what_sglang_counts_over_all_ranks_is_shared_among_them(ranks: str, tokens: int, requests: int) -> None:
    config, _ = read(f"M {ranks} --chunked-prefill-size 512 --max-running-requests 512")
    assert (config.max_num_batched_tokens, config.max_num_seqs) == (tokens, requests)


@pytest.mark.parametrize(
    ("line", "ranks"),
    [("--tp 4", 4), ("--dp 4", 4), ("--tp 1 --dp 4", 4), ("--tp 4 --dp 1", 4), ("--tp 4 --ep-size 4", 4),
     ("--tensor-parallel-size 1", 1), ("--ep 4 --tp-size 4 --dp-size 4", 4), ("", 1)],
)  # fmt: skip
def test_sizes_that_agree_are_the_number_of_ranks(line: str, ranks: int) -> None:
    assert read(f"M {line}")[0].ep_size == ranks


CONTRADICTIONS = [
    ("--tp 16 --dp 8", ("--tp 16", "--dp 8")),
    ("--tp 4 --ep-size 2", ("--tp 4", "--ep-size 2")),
    ("--tp 4 --ep-size 1", ("--tp 4", "--ep-size 1")),
    ("--tp 4 --tp-size 8", ("--tp 4", "--tp-size 8")),
    ("--tp 4 --elastic-ep-initial-size 2", ("--tp 4", "--elastic-ep-initial-size 2")),
    ("--tp 0", ("--tp", "at least 1")),
    ("--tensor-parallel-size 2 --data-parallel-size 2 --enable-expert-parallel", ("--data-parallel-size 4",)),
    ("--no-elastic --elastic-ep-backend mooncake", ("--no-elastic", "--elastic-ep-backend mooncake")),
    ("--expert-backup disk --enable-elastic-expert-backup", ("--expert-backup disk", "--enable-elastic-expert-backup")),
    ("--ep-num-redundant-experts 2 --num-redundant-experts 3", ("redundant-experts 2", "--num-redundant-experts 3")),
    ("--model-path N", ("MODEL M", "--model-path N")),
    ("--tp 4 --chunked-prefill-size 512 --max-num-batched-tokens 512", ("--max-num-batched-tokens 128",)),
    ("--chunked-prefill-size -1", ("--chunked-prefill-size", "at least 1")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "named"), CONTRADICTIONS, ids=[line for line, _ in CONTRADICTIONS])
def test_a_contradiction_is_one_error_that_names_both(line: str, named: tuple[str, ...]) -> None:
    said = refusal(f"M {line}")
    for words in named:
        assert words in said


def test_the_same_said_twice_is_no_contradiction() -> None:
    config, _ = read("M --ep-num-redundant-experts 2 --num-redundant-experts 2 --enable-elastic-ep --elastic --tp 2")
    assert config.num_redundant_experts == 2
    assert read("M --model-path M")[0].model == "M"


REFUSED = [
    ("--device cuda", "ranks of this version compute on cpu only"),
    ("--disaggregation-mode prefill", "not separated"),
    ("--moe-dense-tp-size 2", "not split"),
    ("--pp-size 2", "not split"),
    ("--deepep-mode normal", "no other dispatch"),
    ("--moe-a2a-backend none", "tokens always travel"),
    ("--elastic-ep-backend none", "--no-elastic"),
    ("--elastic-ep-join-mode scale", "POST /scale_elastic_ep"),
    ("--elastic-ep-join-rank-offset 4", "POST /scale_elastic_ep"),
    ("--ep-dispatch-algorithm fake", "leave the text as it is"),
    ("--eplb-config '{}'", "--eplb-interval"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_cannot_be_had_is_refused_with_the_reason(line: str, reason: str) -> None:
    if line == "--device cuda" and "cuda" in get_args(Device):
        pytest.skip("this version has it")
    said = refusal(f"M {line}")
    assert reason in said
    assert shlex.split(line)[0] in said


def test_no_flag_has_two_meanings() -> None:
    names = [name for entry in aliases.FOREIGN for name in entry.names]
    known = [name for parameter in serve.params for name in (*parameter.opts, *parameter.secondary_opts)]
    assert len(names) == len(set(names))
    assert len(known) == len(set(known)), "a foreign flag has the name of one of ours"
    fields = {parameter.name for parameter in serve.params}
    assert not [entry for entry in aliases.FOREIGN if entry.kind == "alias" and entry.field not in fields]


def test_the_table_in_the_documentation_is_the_table_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert aliases.table() in text, "print it with `python -m phalanx.cli.aliases`"
