"""The small checkpoints are real: transformers loads them, any text round-trips, and routing decides the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from phalanx.errors import BadConfig
from phalanx.testing.tiny import Arch, Shape, Spelling, make_tiny, model_bytes

ARCHS: tuple[Arch, ...] = ("qwen3-moe", "mixtral")
SPELLINGS: tuple[Spelling, ...] = ("hub", "transformers5")
TEXTS = ("Hello", "", "  two  spaces\n\ttab", "Zürich 你好 🎉 \x00\x7f", "don't — “quote”", "e\u0301 \u200d \ufeff")


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    problems = {kind: names for kind, names in info.items() if names}
    assert not problems
    return model


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=256
    )
    return [int(token) for token in output[0, len(ids) :]]


@pytest.mark.parametrize("arch", ARCHS)
def test_both_spellings_load_in_transformers_as_the_same_model(arch: Arch, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prompt = list(b"The capital of France is")
    texts = []
    for spelling in SPELLINGS:
        path = make_tiny(tmp_path / spelling, arch, layers=2, spelling=spelling, dtype="float32")
        model = load(path)
        assert model.config.num_local_experts == 8
        assert model.config.rope_parameters["rope_theta"] == 10000.0
        tokenizer = AutoTokenizer.from_pretrained(path)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Zürich"}], add_generation_prompt=True, tokenize=False
        )
        assert chat == "<|im_start|>user\nZürich<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokenizer(chat)["input_ids"]) == chat
        assert tokenizer("Zürich")["input_ids"] == list("Zürich".encode())
        assert tokenizer.eos_token_id == model.config.eos_token_id == 258
        texts.append(greedy(model, prompt, 16))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_text_wanders_and_a_wrong_expert_changes_it(arch: Arch, tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / "model", arch, dtype="float32"))
    prompt = list(b"<|im_start|>user\nWho are you?")
    right = greedy(model, prompt, 64)
    assert len(set(right)) >= 24, "the text collapsed to a few tokens"
    assert all(token == 10 or 32 <= token < 127 for token in right), "the text is not readable"

    weights = {name: value for name, value in model.named_parameters() if ".2." in name and "experts" in name}
    assert weights
    for value in weights.values():  # experts 0 and 1 of one layer change places, their routes do not
        value.data[[0, 1]] = value.data[[1, 0]]
    assert greedy(model, prompt, 64) != right


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips_through_the_byte_tokenizer(text: str, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "mixtral", layers=1)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_the_same_however_they_are_sharded(shards: int, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "qwen3-moe", layers=2, shards=shards)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if shards == 1:
        assert files == ["model.safetensors"]
        assert not index.exists()
    else:
        assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    found = {}
    for file in files:
        with safe_open(path / file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if shards > 1:
                where = json.loads(index.read_text())["weight_map"]
                assert {name: where[name] for name in opened.keys()} == dict.fromkeys(opened.keys(), file)  # noqa: SIM118
    other = make_tiny(tmp_path / "other", "qwen3-moe", layers=2, shards=2)
    for file in other.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert torch.equal(found.pop(name), opened.get_tensor(name))
    assert not found


@pytest.mark.parametrize("dtype", ["fp8", "float32"])
def test_a_model_is_as_large_as_was_foretold_and_in_no_more_files_than_asked_for(dtype: str, tmp_path: Path) -> None:
    sizes = {"layers": 1, "experts": 4, "hidden": 160, "expert_width": 144}
    path = make_tiny(tmp_path / "model", "qwen3-moe", dtype=dtype, shards=1, **sizes)
    with safe_open(path / "model.safetensors", "pt") as opened:
        tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 (not a dict)
    assert model_bytes(Shape("qwen3-moe", **sizes), dtype) == sum(tensor.nbytes for tensor in tensors)


def test_qwen3_layers_named_dense_hold_an_ordinary_mlp(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "qwen3-moe", layers=3, dense_layers=(1,), renormalise=False, dtype="float32")
    model = load(path)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [True, False, True]


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"top_k": 9}, ("--top-k 9", "--experts 8")),
        ({"heads": 3, "kv_heads": 2}, ("--heads 3", "--kv-heads 2")),
        ({"head_dim": 15}, ("--head-dim", "15")),
        ({"layers": 0}, ("--layers", "0")),
        ({"vocab": 100}, ("--vocab", "259")),
        ({"dtype": "int8"}, ("--dtype", "int8")),
        ({"shards": 0}, ("--shards", "0")),
        ({"dense_layers": (0,)}, ("Mixtral",)),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_name(
    sizes: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(BadConfig) as error:
        make_tiny(tmp_path / "model", "mixtral", **sizes)
    assert all(name in str(error.value) for name in names)
    assert not list(tmp_path.iterdir())


def test_a_model_is_replaced_only_when_forced_and_another_directory_never(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "mixtral", layers=1, seed=1)
    before = (path / "model.safetensors.index.json").read_bytes()
    with pytest.raises(BadConfig, match="--force"):
        make_tiny(path, "mixtral", layers=2)
    assert (path / "model.safetensors.index.json").read_bytes() == before
    make_tiny(path, "qwen3-moe", layers=1, force=True)
    assert json.loads((path / "config.json").read_text())["model_type"] == "qwen3_moe"

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(BadConfig, match="not a model"):
        make_tiny(precious, "mixtral", force=True)
    with pytest.raises(BadConfig, match="is not a directory"):
        make_tiny(tmp_path / "nowhere" / "model", "mixtral")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "precious"]
    assert (precious / "thesis.txt").read_text() == "years"


def test_an_interrupted_write_leaves_the_old_model_and_nothing_else(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "mixtral", layers=1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def stop_half_way(written_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tiny(path, "mixtral", layers=1, seed=5, force=True, progress=stop_half_way)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
