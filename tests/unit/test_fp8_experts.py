"""Experts in e4m3 with a scale a block: made, read from checkpoints, held in slots, computed with; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phalanx.config import ServeConfig
from phalanx.elastic.vault.room import room_for
from phalanx.errors import BadCheckpoint, BadConfig
from phalanx.messages import SamplingParams, Submit
from phalanx.model.known import KnownCheckpoint, described, open_model
from phalanx.model.loader import Checkpoint
from phalanx.moe.blocks import E4M3, BlockWeights, NotFinite, dequantized, quantize
from phalanx.moe.experts import SlotBank, digest
from phalanx.moe.layout import BLOCK, ExpertLayout, blocks_in
from phalanx.testing.solo import SoloEngine
from phalanx.testing.tiny import Arch, Shape, make_tiny, write_random

SIZES = {"layers": 2, "experts": 4, "hidden": 160, "expert_width": 144}
"""Neither width is a multiple of 128."""

LAYOUT = ExpertLayout(SIZES["hidden"], SIZES["expert_width"], 2, "fp8")
PARTS = {"qwen3-moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
STEMS = {"qwen3-moe": "model.layers.{}.mlp.experts.{}.{}", "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.{}"}
Weights = dict[str, torch.Tensor]


@pytest.fixture(params=["qwen3-moe", "mixtral"])
def arch(request: pytest.FixtureRequest) -> Arch:
    found: Arch = request.param
    return found


def stored(path: Path) -> Weights:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(path: Path, tensors: Weights) -> None:
    """The same model in one file, with these tensors."""
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def say(path: Path, **changes: object) -> None:
    """Change config.json; None takes a key out."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def slot(checkpoint: Checkpoint | KnownCheckpoint, layer: int, expert: int) -> np.ndarray:
    out = np.full(checkpoint.config.expert_layout(2).total_bytes, 7, np.uint8)
    checkpoint.read_expert(layer, expert, out, torch.bfloat16)
    return out


def in_float(tensors: Weights) -> Weights:
    """The tensors of an fp8 checkpoint as one without scales would have them, by the library's own conversion."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dtype == E4M3:
            scales = tensors[name + "_scale_inv"].float()
            rows, columns = (torch.arange(size) // BLOCK for size in tensor.shape)
            tensor = tensor.float() * scales[rows][:, columns]
        if not name.endswith("_scale_inv"):
            out[name] = tensor.float()
    return out


# --- blocks


def test_every_value_of_e4m3_is_read_back_as_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].view(E4M3)
    scales = torch.tensor([[0.37], [1e-30]])
    weight = codes.repeat(200)[: 200 * 100].view(200, 100)
    each = torch.cat([scales[0].expand(128), scales[1].expand(72)])[:, None]
    assert torch.equal(dequantized(weight, scales, torch.float32), weight.float() * each)
    assert torch.equal(dequantized(weight, scales, torch.bfloat16), (weight.float() * each).bfloat16())


@pytest.mark.parametrize("shape", [(128, 256), (130, 5), (300, 200)])
def test_blocks_get_the_smallest_power_of_two_that_fits_and_lose_no_more_than_e4m3_must(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    w = (
        torch.randn(*shape, generator=g)
        * torch.exp(4 * torch.randn(shape[0] // 64 + 1, 1, generator=g)).repeat(64, 1)[: shape[0]]
    )
    w[:BLOCK, :BLOCK] = 0.0
    weight, scales = torch.empty(shape, dtype=E4M3), torch.empty(blocks_in(shape[0]), blocks_in(shape[1]))
    quantize(w, weight, scales)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5)), "powers of two"
    back = dequantized(weight, scales, torch.float32)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            there = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            largest, scale = float(w[there].abs().max()), float(scales[row, column])
            assert largest <= 448 * scale
            assert largest > 448 * scale / 2 or (largest == 0 and scale == 1)
            assert (
                (back[there] - w[there]).abs() <= torch.maximum(w[there].abs() / 16, torch.tensor(scale / 512))
            ).all()
    assert torch.equal(dequantized(weight, scales, torch.bfloat16).float(), back), "bfloat16 has them exactly"


def test_weights_that_are_no_numbers_have_no_blocks() -> None:
    weight, scales = torch.empty(4, 200, dtype=E4M3), torch.empty(1, 2)
    for wrong in (float("inf"), float("nan")):
        w = torch.ones(4, 200)
        w[2, 150] = wrong
        with pytest.raises(NotFinite):
            quantize(w, weight, scales)


# --- slots


def test_a_slot_is_weights_then_scales_and_half_as_large() -> None:
    width, hidden = LAYOUT.width, LAYOUT.hidden
    assert LAYOUT.scales == 3 * 2 * 2
    assert LAYOUT.total_bytes % 16 == 0
    assert LAYOUT.total_bytes < 0.51 * ExpertLayout(hidden, width, 2).total_bytes
    odd = ExpertLayout(9, 7, 2, "fp8")
    assert (odd.weight_bytes, odd.scales_start, odd.total_bytes) == (189, 192, 208)
    data = torch.zeros(LAYOUT.total_bytes, dtype=torch.uint8)
    blocks = BlockWeights.of(data, LAYOUT)
    blocks.scales13.fill_(1.0)
    blocks.scales2.fill_(2.0)
    blocks.w2.view(torch.uint8).fill_(3)
    assert [tuple(part.shape) for pair in blocks.parts() for part in pair] == [
        (width, hidden), (2, 2), (width, hidden), (2, 2), (hidden, width), (2, 2),
    ]  # fmt: skip
    assert not data[: 2 * width * hidden].any()
    assert (data[2 * width * hidden : LAYOUT.weight_bytes] == 3).all()
    assert data[LAYOUT.scales_start :].view(torch.float32).tolist()[:12] == [1.0] * 8 + [2.0] * 4


def test_a_slot_computes_what_its_weights_say_alone_and_in_any_batch_copied_and_borrowed() -> None:
    g = torch.Generator().manual_seed(3)
    bank = SlotBank(1, 2, LAYOUT.hidden, LAYOUT.width, torch.bfloat16, "fp8")
    data = bank.slot_bytes(0, 0)
    blocks = BlockWeights.of(torch.from_numpy(data), LAYOUT)
    plain = []
    for weight, scales in blocks.parts():
        quantize(torch.randn(weight.shape, generator=g) * weight.shape[1] ** -0.5, weight, scales)
        scales.mul_(torch.rand(scales.shape, generator=g) + 0.5)  # each block its own
        plain.append(dequantized(weight, scales, torch.float32))
    bank.mark(0, 0, 1, digest(data.data))
    elsewhere = data.copy()
    bank.borrow(0, 1, 1, digest(data.data), elsewhere)
    x = torch.randn(40, LAYOUT.hidden, generator=g).to(torch.bfloat16)
    gate, up = x.float() @ plain[0].t(), x.float() @ plain[1].t()
    want = (torch.nn.functional.silu(gate) * up) @ plain[2].t()
    got = bank.expert(0, 0)(x)
    assert float((got.float() - want).norm() / want.norm()) < 1e-2
    assert torch.equal(bank.expert(0, 1)(x), got)
    for rows in (1, 2, 7, 33):
        assert torch.equal(bank.expert(0, 0)(x[:rows]), got[:rows]), rows
    assert bank.pack() == 0, "a packed copy would be three times the memory"
    bank.close()


# --- checkpoints


def test_a_checkpoint_in_fp8_and_a_wider_one_made_fp8_at_load_are_the_same_bytes(tmp_path: Path, arch: Arch) -> None:
    there = Checkpoint.open(make_tiny(tmp_path / "fp8", arch, dtype="fp8", **SIZES))
    wide = make_tiny(tmp_path / "wide", arch, dtype="float32", **SIZES)
    made = open_model(ServeConfig(model=str(wide), quantization="fp8"))
    assert there.config.expert_format == made.config.expert_format == "fp8"
    tensors = stored(there.path)
    for layer, expert in ((0, 0), (1, 3)):
        data = slot(there, layer, expert)
        assert np.array_equal(data, slot(made, layer, expert)), (layer, expert)
        blocks = BlockWeights.of(torch.from_numpy(data), LAYOUT)
        for part, (weight, scales) in zip(PARTS[arch], blocks.parts(), strict=True):
            name = STEMS[arch].format(layer, expert, part) + ".weight"
            assert torch.equal(weight.view(torch.uint8), tensors[name].view(torch.uint8))
            assert torch.equal(scales, tensors[name + "_scale_inv"].float())


def test_experts_that_are_stored_in_one_tensor_a_layer_are_made_fp8_too(tmp_path: Path, arch: Arch) -> None:
    path = make_tiny(tmp_path / "wide", arch, **SIZES)
    config = ServeConfig(model=str(path), quantization="fp8")
    before = slot(open_model(config), 1, 2)
    fuse(path, arch)
    assert np.array_equal(slot(open_model(config), 1, 2), before)


def fuse(path: Path, arch: Arch) -> None:
    """Put all experts of a layer into two tensors."""
    tensors = stored(path)
    for layer in range(SIZES["layers"]):
        each = [
            [tensors.pop(STEMS[arch].format(layer, e, part) + ".weight") for part in PARTS[arch]]
            for e in range(SIZES["experts"])
        ]
        stem = f"model.layers.{layer}.mlp."
        tensors[stem + "experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        tensors[stem + "experts.down_proj"] = torch.stack([down for _, _, down in each])
        if arch == "mixtral":
            tensors[stem + "gate.weight"] = tensors.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    rewrite(path, tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_in_fp8_says_what_the_same_weights_say_in_a_wider_type(tmp_path: Path, arch: Arch, dtype: str) -> None:
    path = make_tiny(tmp_path / "fp8", arch, dtype="fp8", **SIZES)
    wide = make_tiny(tmp_path / "wide", arch, dtype="float32", **SIZES)
    tensors = stored(path)
    g = torch.Generator().manual_seed(5)
    for name in tensors:
        if name.endswith("_scale_inv"):  # each block its own
            tensors[name] = tensors[name].float() * (0.7 + 0.6 * torch.rand(tensors[name].shape, generator=g))
    rewrite(path, tensors)
    rewrite(wide, in_float(tensors))
    texts = []
    for model in (path, wide):
        engine = SoloEngine(ServeConfig(model=str(model), dtype=dtype, num_kv_blocks=16), warm_up=True)  # type: ignore[arg-type]
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        texts.append(engine.generate(Submit("r", 0, [72, 105], sampling))["r"].token_ids)
        engine.close()
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 10, "the text collapsed to a few tokens"


def test_dense_weights_are_read_in_the_runs_type_whatever_they_are_stored_in(tmp_path: Path, arch: Arch) -> None:
    path = make_tiny(tmp_path / "fp8", arch, dtype="fp8", **SIZES)
    wide = in_float(stored(path))
    for dtype in (torch.float32, torch.bfloat16):
        dense = dict(Checkpoint.open(path).dense_parts(dtype))
        attention = "model.layers.1.self_attn.{}_proj.weight"
        assert torch.equal(dense["layers.1.qkv"], torch.cat([wide[attention.format(p)] for p in "qkv"]).to(dtype))
        assert torch.equal(dense["layers.1.out"], wide[attention.format("o")].to(dtype))


def test_random_weights_come_in_fp8_and_are_those_of_the_plain_ones(tmp_path: Path, arch: Arch) -> None:
    path = write_random(tmp_path / "model", Shape(arch, **SIZES), weights=False)
    config = ServeConfig(model=str(path), load_format="dummy", quantization="fp8")
    drawn, known = open_model(config), KnownCheckpoint(config, described(config))
    seen = set()
    for layer, expert in ((0, 0), (0, 1), (1, 0)):
        data = slot(drawn, layer, expert)
        assert np.array_equal(data, slot(known, layer, expert))
        seen.add(digest(data.data))
        plain = torch.from_numpy(slot(open_model(msgspec.structs.replace(config, quantization="none")), layer, expert))
        made = BlockWeights.of(torch.from_numpy(data), LAYOUT)
        flat = torch.cat([dequantized(*part, torch.float32).flatten() for part in made.parts()])
        wanted = plain.view(torch.bfloat16).float()
        assert float((flat - wanted).norm() / wanted.norm()) < 0.03
    assert len(seen) == 3
    say(path, quantization_config=QUANTIZED)
    assert np.array_equal(slot(open_model(ServeConfig(model=str(path), load_format="dummy")), 1, 0), data)


QUANTIZED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_the_vault_has_room_for_what_slots_hold(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "qwen3-moe", **SIZES)
    rooms = {}
    for quantization in ("none", "fp8"):
        config = ServeConfig(model=str(path), quantization=quantization)  # type: ignore[arg-type]
        checkpoint = open_model(config)
        rooms[quantization] = room_for(config, checkpoint, available=0)
    bank = SlotBank(1, 1, LAYOUT.hidden, LAYOUT.width, torch.bfloat16, "fp8")
    assert rooms["fp8"].shape.expert_bytes == bank.expert_bytes
    assert rooms["fp8"].shape.weight_bytes < rooms["none"].shape.weight_bytes
    experts = SIZES["layers"] * SIZES["experts"]
    spared = 2 * rooms["none"].shape.stride - rooms["fp8"].shape.stride
    assert rooms["none"].ranks - rooms["fp8"].ranks == experts * spared, "no packed copies"
    bank.close()


# --- what is refused

EXPERT = STEMS["qwen3-moe"].format(1, 2, "up_proj") + ".weight"
ATTENTION = "model.layers.0.self_attn.k_proj.weight"


def without(name: str) -> Callable[[Weights], object]:
    return lambda tensors: tensors.pop(name)


def holding(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


BROKEN = [
    (without(EXPERT + "_scale_inv"), f"{EXPERT}_scale_inv is missing, without which {EXPERT}"),
    (without(ATTENTION + "_scale_inv"), f"{ATTENTION}_scale_inv is missing"),
    (
        holding(EXPERT + "_scale_inv", lambda scales: scales[:1]),
        f"{EXPERT}_scale_inv is BF16 of shape [1, 2], the blocks",
    ),
    (holding(ATTENTION + "_scale_inv", lambda scales: scales.to(E4M3)), f"{ATTENTION}_scale_inv is F8_E4M3 of"),
    (holding(EXPERT, lambda weight: weight[:100]), f"{EXPERT} has shape [100, 160], config.json asks for [144, 160]"),
    (holding(EXPERT, lambda weight: weight.bfloat16()), f"{EXPERT} is stored as BF16, but config.json"),
    (holding("model.norm.weight", lambda weight: weight.to(E4M3)), "model.norm.weight is stored as F8_E4M3"),
]


@pytest.mark.parametrize(("damage", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_checkpoint_whose_blocks_are_not_whole_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Weights], object], said: str
) -> None:
    path = make_tiny(tmp_path / "fp8", "qwen3-moe", dtype="fp8", **SIZES)
    tensors = stored(path)
    damage(tensors)
    rewrite(path, tensors)
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint.open(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_fp8_that_config_json_does_not_speak_of_is_refused(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "fp8", "qwen3-moe", dtype="fp8", **SIZES)
    say(path, quantization_config=None)
    with pytest.raises(BadCheckpoint, match=r"stored as F8_E4M3, but config\.json has no quantization_config"):
        Checkpoint.open(path)


def test_experts_in_one_tensor_a_layer_cannot_be_stored_in_fp8(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "wide", "qwen3-moe", **SIZES)
    fuse(path, "qwen3-moe")
    say(path, quantization_config=QUANTIZED)
    with pytest.raises(BadCheckpoint, match="gate_up_proj has all experts of a layer"):
        Checkpoint.open(path)


def test_weights_that_are_no_numbers_are_refused_when_they_are_read(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "fp8", "qwen3-moe", dtype="fp8", **SIZES)
    tensors = stored(path)
    for name in (EXPERT, ATTENTION):
        tensors[name].view(torch.uint8)[3, 5] = 0xFF
    rewrite(path, tensors)
    with pytest.raises(BadCheckpoint, match=f"{EXPERT} is damaged"):
        slot(Checkpoint.open(path), 1, 2)
    with pytest.raises(BadCheckpoint, match=f"{ATTENTION} is damaged"):
        Checkpoint.open(path).dense_weights(torch.bfloat16)
    wide = make_tiny(tmp_path / "wide", "qwen3-moe", **SIZES)
    tensors = stored(wide)
    tensors[EXPERT][3, 5] = float("inf")
    rewrite(wide, tensors)
    with pytest.raises(BadCheckpoint, match=f"{EXPERT} cannot be made fp8"):
        slot(open_model(ServeConfig(model=str(wide), quantization="fp8")), 1, 2)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path, scale: float) -> None:
    path = make_tiny(tmp_path / "fp8", "qwen3-moe", dtype="fp8", **SIZES)
    tensors = stored(path)
    for name in (EXPERT, ATTENTION):
        tensors[name + "_scale_inv"][0, 0] = scale
    rewrite(path, tensors)
    with pytest.raises(BadCheckpoint, match=f"{EXPERT}_scale_inv is damaged"):
        slot(Checkpoint.open(path), 1, 2)
    with pytest.raises(BadCheckpoint, match=f"{ATTENTION}_scale_inv is damaged"):
        Checkpoint.open(path).dense_weights(torch.bfloat16)


def test_an_expert_in_a_stack_that_cannot_be_made_fp8_is_named(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "wide", "qwen3-moe", **SIZES)
    tensors = stored(path)
    tensors[EXPERT][3, 5] = float("nan")
    rewrite(path, tensors)
    fuse(path, "qwen3-moe")
    served = open_model(ServeConfig(model=str(path), quantization="fp8"))
    slot(served, 1, 1)
    with pytest.raises(BadCheckpoint, match=r"wide: expert 2 in tensor model\.layers\.1\.mlp\.\S+ cannot be made fp8"):
        slot(served, 1, 2)


def test_what_is_fp8_already_is_not_made_fp8_again(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "fp8", "mixtral", dtype="fp8", **SIZES)
    config = ServeConfig(model=str(path), quantization="fp8")
    for way in (open_model, described):
        with pytest.raises(BadConfig, match=r"--quantization fp8: the experts of .*fp8 are fp8 already \(config.json"):
            way(config)
