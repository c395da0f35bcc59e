"""Random weights without a checkpoint: the same bytes wherever they are made, and a model that computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import in_a_fork

from phalanx.config import ServeConfig
from phalanx.errors import BadCheckpoint
from phalanx.messages import SamplingParams, Submit
from phalanx.model.dummy import POOL, draw
from phalanx.model.known import KnownCheckpoint, described
from phalanx.moe.experts import digest
from phalanx.testing.shapes import SHAPES
from phalanx.testing.solo import SoloEngine
from phalanx.testing.tiny import Arch, Shape, write_random

ARCHS: tuple[Arch, ...] = ("qwen3-moe", "mixtral")


def described_only(path: Path, arch: Arch = "qwen3-moe", **sizes: int) -> Path:
    """A model directory without weights."""
    return write_random(path, Shape(arch, layers=2, experts=4, **sizes), weights=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return described_only(tmp_path / "model")


def expert(path: Path, layer: int, number: int, dtype: torch.dtype = torch.bfloat16) -> np.ndarray:
    checkpoint = draw(path)
    config = checkpoint.config
    out = np.empty(3 * config.hidden * config.expert_width * dtype.itemsize, np.uint8)
    checkpoint.read_expert(layer, number, out, dtype)
    return out


def test_an_expert_has_the_same_bytes_whoever_makes_it_and_in_whatever_order(path: Path) -> None:
    checkpoint, known = draw(path), KnownCheckpoint(config := served(path), described(config))
    places = [(layer, number) for layer in range(2) for number in range(4)]
    made = {place: digest(expert(path, *place).data) for place in places}
    assert len(set(made.values())) == len(places), "two experts are alike"
    out = np.empty_like(expert(path, 0, 0))
    for source in (checkpoint, known):
        for place in reversed(places):
            source.read_expert(*place, out, torch.bfloat16)
            assert digest(out.data) == made[place], place
    assert in_a_fork(lambda: digest(expert(path, 1, 2).data)) == made[1, 2]


def served(path: Path) -> ServeConfig:
    return ServeConfig(model=str(path), load_format="dummy")


def test_values_are_the_same_in_every_type_and_keep_the_size_of_activations(tmp_path: Path) -> None:
    path = described_only(tmp_path / "model", hidden=256, expert_width=512)
    narrow = torch.from_numpy(expert(path, 1, 3)).view(torch.bfloat16)
    assert torch.equal(narrow.float(), torch.from_numpy(expert(path, 1, 3, torch.float32)).view(torch.float32))
    gate, up, down = narrow.float().split(256 * 512)
    for part, inputs in ((gate, 256), (up, 256), (down, 512)):
        assert float(part.std()) == pytest.approx(inputs**-0.5, rel=0.02)
        assert abs(float(part.mean())) < 0.02 * inputs**-0.5
    assert not torch.equal(gate, up)
    dense = dict(draw(path).dense_parts(torch.float32))
    assert dense["norm"].eq(1).all()
    assert float(dense["head"].std()) == pytest.approx(256**-0.5, rel=0.02)


def test_no_two_rows_of_a_tensor_larger_than_the_pool_are_alike(tmp_path: Path) -> None:
    path = described_only(tmp_path / "model", hidden=1024, vocab=3 * POOL // 1024)
    embed = dict(draw(path).dense_parts(torch.bfloat16))["embed"]
    assert embed.numel() > 2.9 * POOL
    assert len({digest(row.numpy().data) for row in embed.view(torch.uint8)}) == len(embed)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_directory_without_weights_can_be_served(tmp_path: Path, arch: Arch) -> None:
    path = described_only(tmp_path / "model", arch, vocab=400)
    assert not list(path.glob("*.safetensors*"))
    sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    texts = []
    for _ in range(2):
        engine = SoloEngine(ServeConfig(model=str(path), load_format="dummy", num_kv_blocks=8))
        texts.append(engine.generate(Submit("r", 0, [72, 105], sampling))["r"].token_ids)
        engine.close()
    assert len(texts[0]) == 20
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3, "the text collapsed to a few tokens"


def test_what_is_no_model_is_refused_as_without_it(path: Path) -> None:
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(BadCheckpoint, match="LlamaForCausalLM is not supported"):
        draw(path)
    with pytest.raises(BadCheckpoint, match="is not a directory"):
        draw(path / "nowhere")


def test_describing_it_imports_no_torch(path: Path) -> None:
    program = f"""
import sys
from phalanx.model.dummy import draw
assert sum(draw({str(path)!r}).dense_elements()) > 10_000
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_known_shapes_are_those_of_the_models_that_they_name(tmp_path: Path) -> None:
    billions = {"qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1, "mixtral-8x7b": 46.7, "mixtral-8x22b": 140.6}
    assert set(SHAPES) == set(billions)
    for name, shape in SHAPES.items():
        config = draw(write_random(tmp_path / name, shape, weights=False)).config
        elements = sum(draw(tmp_path / name).dense_elements())
        elements += config.num_moe_layers * config.num_experts * 3 * config.hidden * config.expert_width
        assert elements / 1e9 == pytest.approx(billions[name], abs=0.06), name
