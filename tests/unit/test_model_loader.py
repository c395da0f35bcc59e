"""Checkpoints on disk: what is read where, and one clear error for each way in which they can be broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import in_a_fork
from model_rig import solo
from safetensors.torch import load_file, save_file

from phalanx.errors import BadCheckpoint
from phalanx.model.loader import Checkpoint
from phalanx.testing.tiny import make_tiny

INDEX = "model.safetensors.index.json"
EXPERT_NAMES = {
    "qwen3-moe": "model.layers.{}.mlp.experts.{}.{}.weight",
    "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.{}.weight",
}
PARTS = {"qwen3-moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


@pytest.fixture(params=["qwen3-moe", "mixtral"])
def arch(request) -> str:
    return request.param


@pytest.fixture
def path(tmp_path, arch) -> Path:
    return make_tiny(tmp_path / "m", arch, layers=3, dense_layers=(0,) if arch == "qwen3-moe" else ())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(path: Path, changed: dict[str, torch.Tensor]) -> None:
    """The same model in one file, with these tensors."""
    for file in [*path.glob("*.safetensors"), path / INDEX]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path / "model.safetensors")


def shard_of(path: Path, name: str) -> Path:
    return path / json.loads((path / INDEX).read_text())["weight_map"][name]


def slot(checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype) -> np.ndarray:
    config = checkpoint.config
    out = np.zeros(3 * config.hidden * config.expert_width * dtype.itemsize, np.uint8)
    checkpoint.read_expert(layer, expert, out, dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_expert_is_read_in_the_layout_of_a_slot(path, arch, dtype):
    checkpoint = Checkpoint.open(path)
    decoder_layer = checkpoint.config.moe_layers[1]
    stored = tensors(path)
    parts = [stored[EXPERT_NAMES[arch].format(decoder_layer, 5, part)].to(dtype).flatten() for part in PARTS[arch]]
    assert np.array_equal(slot(checkpoint, 1, 5, dtype), torch.cat(parts).view(torch.uint8).numpy())


@pytest.mark.parametrize("stored_dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_stored_types_are_converted_at_load(path, stored_dtype):
    before = slot(Checkpoint.open(path), 0, 1, torch.bfloat16)
    rewrite(path, {name: tensor.to(stored_dtype) for name, tensor in tensors(path).items()})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.dense_weights(torch.float32).embed.dtype is torch.float32
    after = slot(checkpoint, 0, 1, torch.bfloat16)
    if stored_dtype is torch.float16:  # fewer exponent bits: the smallest values move
        before, after = (torch.from_numpy(data).view(torch.bfloat16).float() for data in (before, after))
        assert torch.allclose(before, after, atol=1e-3)
    else:
        assert np.array_equal(before, after)


def test_fused_experts_are_read_one_by_one_too(path, arch):
    config = Checkpoint.open(path).config
    before = [slot(Checkpoint.open(path), layer, 3, torch.bfloat16) for layer in range(config.num_moe_layers)]
    stored = tensors(path)
    for layer in config.moe_layers:
        each = [[stored.pop(EXPERT_NAMES[arch].format(layer, e, part)) for part in PARTS[arch]] for e in range(8)]
        stem = f"model.layers.{layer}.mlp."
        stored[stem + "experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        stored[stem + "experts.down_proj"] = torch.stack([down for _, _, down in each])
        if arch == "mixtral":
            stored[stem + "gate.weight"] = stored.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    rewrite(path, stored)
    checkpoint = Checkpoint.open(path)
    assert all(np.array_equal(slot(checkpoint, layer, 3, torch.bfloat16), data) for layer, data in enumerate(before))


def test_what_transformers_saves_is_read_back(path, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = (Checkpoint.open(p) for p in (path, tmp_path / "saved"))
    assert theirs.config.num_experts == 8
    for expert in range(8):
        assert np.array_equal(slot(ours, 0, expert, torch.float32), slot(theirs, 0, expert, torch.float32))
    text = [(list(range(9)), np.zeros(1, np.int32))]
    one, two = solo(path), solo(tmp_path / "saved")
    assert torch.equal(one.run(text, [(0, 0, 9)], one.kv(16)), two.run(text, [(0, 0, 9)], two.kv(16)))


def test_reading_one_expert_leaves_the_rest_of_the_file_untouched(tmp_path):
    path = make_tiny(tmp_path / "m", "mixtral", layers=2, hidden=512, expert_width=1024, shards=1, dtype="float32")
    expert = 3 * 512 * 1024 * 4

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))

    def grown() -> int:
        torch.set_num_threads(1)
        checkpoint, out = Checkpoint.open(path), np.zeros(expert, np.uint8)
        before = resident()
        checkpoint.read_expert(1, 3, out, torch.float32)
        return resident() - before

    assert in_a_fork(grown) < 3 * expert
    assert (path / "model.safetensors").stat().st_size > 15 * expert


def test_checking_a_checkpoint_imports_no_torch(path):
    program = f"""
import sys
from phalanx.model.loader import Checkpoint
assert Checkpoint.open({str(path)!r}).config.num_experts == 8
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- broken ones


def test_a_missing_tensor_is_named(path):
    stored = tensors(path)
    del stored["model.layers.2.self_attn.k_proj.weight"]
    rewrite(path, stored)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.2\.self_attn\.k_proj\.weight is missing"):
        Checkpoint.open(path)


def test_a_missing_expert_is_named(path, arch):
    stored = tensors(path)
    name = EXPERT_NAMES[arch].format(1, 7, PARTS[arch][2])
    del stored[name]
    rewrite(path, stored)
    with pytest.raises(BadCheckpoint, match=name.replace(".", r"\.") + " is missing"):
        Checkpoint.open(path)


def test_a_missing_head_is_an_error_unless_it_is_tied(path):
    stored = tensors(path)
    del stored["lm_head.weight"]
    rewrite(path, stored)
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight is missing"):
        Checkpoint.open(path)
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    weights = Checkpoint.open(path).dense_weights(torch.bfloat16)
    assert weights.head is weights.embed


def test_a_tensor_of_another_shape_is_named_with_both_shapes(path):
    stored = tensors(path)
    stored["model.norm.weight"] = torch.ones(63)
    rewrite(path, stored)
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight has shape \[63\], config\.json asks for \[64\]"):
        Checkpoint.open(path)


def test_a_tensor_of_an_unknown_type_is_named(path):
    stored = tensors(path)
    stored["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    rewrite(path, stored)
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight is stored as I8"):
        Checkpoint.open(path)


def test_a_shard_that_went_away_since_the_check_is_named(path):
    checkpoint = Checkpoint.open(path)
    shard = shard_of(path, "model.norm.weight")
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=f"{shard.name} is missing"):
        checkpoint.dense_weights(torch.bfloat16)


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.999])
def test_a_truncated_shard_is_named(path, kept):
    shard = shard_of(path, "model.norm.weight")
    os.truncate(shard, int(shard.stat().st_size * kept))
    with pytest.raises(BadCheckpoint, match=f"{shard.name} is truncated or corrupt"):
        Checkpoint.open(path)


def test_a_shard_with_a_corrupt_header_is_named(path):
    shard = shard_of(path, "model.norm.weight")
    with shard.open("r+b") as file:
        file.seek(8)
        file.write(b"\x00garbage")
    with pytest.raises(BadCheckpoint, match=f"{shard.name} is truncated or corrupt"):
        Checkpoint.open(path)


def test_a_missing_shard_is_named(path):
    shard = shard_of(path, "model.norm.weight")
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=f"{shard.name} is missing"):
        Checkpoint.open(path)


def test_a_directory_without_weights_is_refused(path):
    (path / INDEX).unlink()
    with pytest.raises(BadCheckpoint, match=r"neither model\.safetensors nor"):
        Checkpoint.open(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(path, text):
    (path / INDEX).write_text(text)
    with pytest.raises(BadCheckpoint, match=rf"{INDEX} is not a readable index"):
        Checkpoint.open(path)


def test_an_index_cannot_lead_out_of_the_directory(path):
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="outside the directory"):
        Checkpoint.open(path)


def test_an_index_that_names_the_wrong_shard_is_refused(path):
    index = json.loads((path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    wrong = next(shard for shard in shards if shard != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = wrong
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight is missing, though the index says"):
        Checkpoint.open(path)
