"""`phalanx serve` on what cannot be served: one line that names it, exit 2, and nothing was started."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from phalanx.cli import main
from phalanx.config import ServeConfig
from phalanx.elastic.vault.room import check_memory, room_for
from phalanx.errors import BadConfig
from phalanx.model.loader import Checkpoint
from phalanx.testing.tiny import make_tiny


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen3-moe", layers=1, experts=4)


def refusal(*arguments: str) -> str:
    """What `phalanx serve` says when it refuses."""
    done = CliRunner().invoke(main, ["serve", *arguments])
    assert done.exit_code == 2, done.output
    assert done.output.startswith("phalanx serve: ")
    assert len(done.output.splitlines()) == 1, done.output
    return done.output


def test_a_model_whose_rows_a_device_cannot_move_is_refused(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "odd"
    model.mkdir()
    shape = json.loads((served / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "hidden_size": 100}))
    monkeypatch.setattr("phalanx.cli.serve._check_device", lambda config: None)  # as if there were one
    said = refusal(str(model), "--load-format", "dummy", "--device", "cuda")
    assert "hidden size 100 is no multiple of 8: use --device cpu" in said


def without(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def holding(name: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(text)


def cut(model: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


BROKEN = [
    (without("tokenizer.json"), "tokenizer.json is missing"),
    (holding("tokenizer.json", "{"), "tokenizer.json cannot be read"),
    (holding("tokenizer_config.json", "["), "tokenizer_config.json cannot be read"),
    (holding("chat_template.jinja", "{% if %}"), "chat template cannot be compiled"),
    (holding("config.json", "{"), "config.json is not valid JSON"),
    (holding("config.json", json.dumps({"architectures": ["LlamaForCausalLM"]})), "LlamaForCausalLM is not supported"),
    (cut, "truncated or corrupt"),
    (without("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing"),
]


@pytest.mark.parametrize(("damage", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_broken_checkpoint_is_refused_before_anything_starts(
    served: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    model = Path(shutil.copytree(served, tmp_path / "broken"))
    damage(model)
    assert said in refusal(str(model))


def test_several_chat_templates_must_have_names(served: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(served, tmp_path / "broken"))
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    assert "must list names and templates" in refusal(str(model))


FLAGS = [
    (("--chat-template", "/nowhere.jinja"), "/nowhere.jinja cannot be read"),
    (("--events-file", "/nowhere/events.jsonl"), "--events-file /nowhere/events.jsonl cannot be written"),
    (("--max-model-len", "99999"), "--max-model-len 99999 is more than the 4096 positions"),
    (("--max-model-len", "1"), "--max-model-len 1 has no room"),
    (("--kv-cache-memory-mb", "1", "--block-size", "99999"), "--kv-cache-memory-mb 1 is less than one KV block"),
    (("--block-size", "99999999"), "--kv-cache-memory-mb 512 is less than one KV block"),
    (("--kv-cache-memory-mb", "-1"), "--kv-cache-memory-mb must not be negative"),
    (("--mem-fraction-static", "90"), "--mem-fraction-static must lie between 0 and 1, not 90"),
    (("--mem-fraction-static", "nan"), "--mem-fraction-static must be a finite number, not nan"),
    (("--peer-timeout", "nan"), "--peer-timeout must be more than 0 seconds, 10000000 at most, not nan"),
    (("--drain-timeout", "inf"), "--drain-timeout must be more than 0 seconds, 10000000 at most, not inf"),
    (("--eplb-min-gain", "nan"), "--eplb-min-gain must be a finite number, not nan"),
    (("--kv-cache-memory-mb", "9999999999999999999999"), "--kv-cache-memory-mb must be 9223372036854775807 at most"),
    (("--num-redundant-experts", "9"), "--num-redundant-experts 9"),
]


@pytest.mark.parametrize(("flags", "said"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_a_flag_that_does_not_fit_the_model_is_named(served: Path, flags: tuple[str, ...], said: str) -> None:
    assert said in refusal(str(served), *flags)


def test_a_place_that_cannot_be_written_is_named() -> None:
    done = CliRunner().invoke(main, ["make-model", "/proc/nothing", "--arch", "mixtral"])
    assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
    assert "/proc/nothing cannot be written" in done.output


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has a CUDA device")
def test_a_machine_without_a_cuda_device_is_told_so(served: Path) -> None:
    assert "--device cuda: torch" in refusal(str(served), "--device", "cuda")


@pytest.mark.parametrize("flag", ["--ib-device", "--mooncake-ib-device"])
def test_a_device_between_hosts_that_is_not_there_is_named_before_anything_starts(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    (tmp_path / "mooncake").mkdir()  # as if the Transfer Engine were installed
    (tmp_path / "mooncake" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    hosts = ("--nnodes", "2", "--ep-size", "2", "--dist-init-addr", "127.0.0.1:25555", "--vault-transport", "mooncake")
    said = refusal(str(served), *hosts, flag, "no_such_device")
    assert "--ib-device no_such_device: this host has no such RDMA device" in said


ON_CUDA = [
    (("--dtype", "float32"), "computes in bfloat16, not in --dtype float32"),
    (("--nnodes", "2", "--ep-size", "2", "--dist-init-addr", "h:1"), "serves one host in this version, not --nnodes 2"),
    (("--ep-size", "63"), "--ep-size 63 is more than the 62 ranks"),
    (("--ep-size", "2", "--max-ep-size", "64"), "--max-ep-size 64 is more than the 62 ranks"),
]


@pytest.mark.parametrize(("flags", "said"), ON_CUDA, ids=[" ".join(flags) for flags, _ in ON_CUDA])
def test_what_devices_cannot_do_is_refused_whether_or_not_there_is_one(
    served: Path, flags: tuple[str, ...], said: str
) -> None:
    assert said in refusal(str(served), "--device", "cuda", *flags)


@pytest.mark.parametrize(
    ("flags", "ways"),
    [
        (("--ep-size", "2"), ("--nnodes", "--quantization fp8", "--ep-size")),
        (("--dtype", "float32"), ("--nnodes", "--quantization fp8", "--dtype bfloat16 halves both")),
        (("--quantization", "fp8"), ("--nnodes",)),
        (("--quantization", "fp8", "--dtype", "float32"), ("--nnodes", "--dtype bfloat16 halves the others")),
    ],
    ids=["two ranks", "float32", "fp8", "fp8 in float32"],
)
def test_a_model_that_no_memory_of_this_host_can_hold_is_refused_with_what_would_change_it(
    served: Path, tmp_path: Path, flags: tuple[str, ...], ways: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(served, tmp_path / "huge"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 1 << 36}))
    said = refusal(str(model), "--load-format", "dummy", *flags)
    assert "does not fit into this host's memory: it needs at least" in said
    assert all(way in said for way in ways)
    assert re.findall(r"--[a-z-]+", said.partition("with swap: ")[2]) == [way.split()[0] for way in ways]


def test_what_a_host_must_hold_is_each_expert_once_and_the_other_weights_in_every_rank(served: Path) -> None:
    checkpoint = Checkpoint.open(served)
    shape = room_for(ServeConfig(model=str(served)), checkpoint).shape
    experts = shape.num_layers * shape.num_experts * shape.expert_bytes
    for ranks, nodes, needed in ((1, 1, experts + shape.dense_bytes), (3, 1, experts + 3 * shape.dense_bytes),
                                 (4, 2, experts // 2 + 2 * shape.dense_bytes)):  # fmt: skip
        config = ServeConfig(model=str(served), ep_size=ranks, nnodes=nodes)
        check_memory(config, checkpoint, needed)
        with pytest.raises(BadConfig, match="does not fit"):
            check_memory(config, checkpoint, needed - 1)
        check_memory(msgspec.structs.replace(config, device="cuda"), checkpoint, 0)
