"""The same numbers and the same text as transformers, on one rank and on several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_rig import greedy, greedy_on_ranks, prompts, solo

from phalanx.testing.tiny import make_tiny

STEPS = 64
MODELS = {
    "qwen3-moe": dict(arch="qwen3-moe", dense_layers=(1,)),
    "qwen3-moe, tied, not renormalised": dict(arch="qwen3-moe", tied=True, renormalise=False, spelling="transformers5"),
    "mixtral": dict(arch="mixtral"),
    "mixtral of transformers 5": dict(arch="mixtral", kv_heads=1, spelling="transformers5"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["qwen3-moe", "mixtral"])
def checkpoint(request, tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", dtype="float32", **MODELS[request.param])


def reference(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_greedy(model, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    ids, cache, tokens, logits = torch.tensor([prompt]), None, [], []
    for _ in range(steps):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, row = out.past_key_values, out.logits[0, -1].float()
        logits.append(row)
        tokens.append(int(row.argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logits)


@pytest.fixture(scope="module")
def expected(checkpoint):
    model = reference(checkpoint)
    return [reference_greedy(model, prompt, STEPS) for prompt in prompts(8, 259)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_prompt_are_those_of_transformers(name, tmp_path):
    path = make_tiny(tmp_path / "m", dtype="float32", **MODELS[name])
    rank = solo(path)
    ids = torch.randint(0, 259, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    hidden = rank.run([(ids, kv_blocks(300))], [(0, 0, 300)], rank.kv(320))
    with torch.inference_mode():
        theirs = reference(path)(torch.tensor([ids])).logits[0]
    # Tied embeddings make logits of 48, for which transformers itself is 3e-4 away from a float64 computation.
    scale = max(1.0, float(theirs.abs().max()) / 20)
    assert (rank.logits(hidden) - theirs).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_64_greedy_tokens_on_8_prompts_are_those_of_transformers(checkpoint, expected, ranks):
    texts = prompts(8, 259)
    if ranks == 1:
        tokens, logits = greedy(solo(checkpoint), texts, STEPS)
    else:
        tokens, logits = greedy_on_ranks(checkpoint, ranks, texts, STEPS, torch.float32)
    assert tokens == [tokens for tokens, _ in expected]
    worst = max(float((ours - theirs).abs().max()) for ours, (_, theirs) in zip(logits, expected, strict=True))
    assert worst < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_bits_of_one(checkpoint, ranks, dtype):
    texts = prompts(6, 259, seed=3)
    alone_tokens, alone = greedy(solo(checkpoint, dtype), texts, 12)
    tokens, logits = greedy_on_ranks(checkpoint, ranks, texts, 12, dtype)
    assert tokens == alone_tokens
    assert all(torch.equal(a, b) for a, b in zip(logits, alone, strict=True))


@pytest.mark.parametrize("arch", ["mixtral", "qwen3-moe"])
def test_a_sliding_window_hides_what_transformers_hides(arch, tmp_path):
    path = make_tiny(tmp_path / "m", arch, dtype="float32", layers=2)
    config = json.loads((path / "config.json").read_text()) | {"sliding_window": 24, "use_sliding_window": True}
    (path / "config.json").write_text(json.dumps(config))
    rank = solo(path)
    ids = torch.randint(0, 259, (600,), generator=torch.Generator().manual_seed(2)).tolist()
    hidden = rank.run([(ids, kv_blocks(600))], [(0, 0, 600)], rank.kv(608))
    with torch.inference_mode():
        theirs = reference(path)(torch.tensor([ids])).logits[0]
    assert (rank.logits(hidden) - theirs).abs().max() < 1e-4


def kv_blocks(tokens: int) -> np.ndarray:
    return np.arange(-(-tokens // 16), dtype=np.int32)[::-1].copy()
