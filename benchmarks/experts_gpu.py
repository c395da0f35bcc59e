#!/usr/bin/env python3
"""Times the experts' grouped products by tiling, on one CUDA device: the shape of Qwen3-30B-A3B, half of its experts.

    benchmarks/experts_gpu.py                   every tiling for 2, 32, 128, 256 and 512 tokens of all ranks together
    benchmarks/experts_gpu.py --tokens 512,1024,2048,4096    prefills
    benchmarks/experts_gpu.py --tokens 256
    benchmarks/experts_gpu.py --fp8 --tokens 128,512    e4m3 with a scale a block, beside plain ones as served

Every figure: a graph of LAYERS layers with weights of their own (more than any cache holds), replayed REPLAYS times;
the device time of a layer, median; and the rate at which the weights of the experts that were asked for must have been
read. First that of a kernel that only reads. Random routing: each token's 8 experts of 128, of which 64 stand here.
Results of a tiling are compared with the first one's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from graph_times import layer_us

from phalanx.moe.cuda import DeviceBank, DeviceExperts, DeviceLoad, Tiling
from phalanx.moe.cuda_blocks import BlockTiling, kind_for
from phalanx.moe.gate import RouteTable
from phalanx.moe.layout import ExpertFormat

SLOTS, EXPERTS, TOP_K, HIDDEN, WIDTH = 64, 128, 8, 2048, 768
LAYERS, REPLAYS = 8, 15
TILINGS = (
    Tiling(),
    Tiling(down=64, down_stages=4),
    Tiling(up_stages=4, down_stages=4),
    Tiling(programs=3),
    Tiling(up=32, down=64, up_stages=4, down_stages=4),
    Tiling(rows=32),
    Tiling(rows=32, down=64, down_stages=4),
    Tiling(rows=32, depth=64, up_stages=5, down_stages=5),
    Tiling(rows=64, depth=64, up_stages=4, down_stages=4),
    Tiling(rows=64, depth=64, up_stages=5, down_stages=5),
    Tiling(rows=64, depth=64, up=128, down=256, warps=8),
    Tiling(rows=128, depth=64, up=128, down=256, warps=8, programs=1),
    Tiling(rows=128, depth=64, up=128, down=256, up_stages=4, down_stages=4, warps=8, programs=1),
)
BLOCK_TILINGS = (
    BlockTiling(),
    BlockTiling(down=64, down_stages=4),
    BlockTiling(up=32, down=64, up_stages=4, down_stages=4),
    BlockTiling(rows=32, up_stages=4, down_stages=4, programs=2),
    BlockTiling(rows=32, down=64, up_stages=4, down_stages=4, programs=3),
    BlockTiling(rows=64, programs=2),
)


def timed(experts: DeviceExperts, x: torch.Tensor, slot_M: torch.Tensor, tiling: Tiling) -> tuple[float, torch.Tensor]:
    """Microseconds of a layer, and its result."""
    first = torch.searchsorted(slot_M, torch.arange(SLOTS + 1, device=x.device)).to(torch.int32)
    rows = torch.arange(len(slot_M), device=x.device) % len(x)

    def one(layer: int) -> torch.Tensor:
        return experts.experts(layer, x, rows, first, tiling)

    for layer in range(LAYERS):
        one(layer)
    return layer_us(one, LAYERS, REPLAYS), one(0)[: len(slot_M)].clone()


def bare_read_us(bank: DeviceBank) -> float:
    """Microseconds for reading all of a layer's weights and nothing else: no kernel that needs them can take less."""
    from read_kernels import read_kernel

    words_LX = bank.weights_LSX.view(torch.int32).flatten(1)
    programs = 2 * torch.cuda.get_device_properties(words_LX.device).multi_processor_count
    out = torch.empty(programs, 8192, dtype=torch.int32, device=words_LX.device)

    def one(layer: int) -> None:
        read_kernel[(programs,)](words_LX[layer], out, words_LX.shape[1], BLOCK=8192, AT_ONCE=4, num_warps=16)

    one(0)
    return layer_us(one, LAYERS, REPLAYS)


def rig(expert_format: ExpertFormat, device: torch.device) -> tuple[DeviceBank, DeviceExperts]:
    """Slots full of random weights, and what computes with them."""
    bank = DeviceBank(LAYERS, SLOTS, HIDDEN, WIDTH, torch.bfloat16, device, expert_format)
    if expert_format == "plain":
        bank.weights_LSX.normal_(0, 0.03)
    else:
        bank.weights_LSX.random_(0, 256)
        bank.weights_LSX[:, :, bank.layout.scales_start :].view(torch.float32).uniform_(1e-4, 5e-4)
    experts = kind_for(bank)(
        bank, RouteTable(LAYERS, EXPERTS, 1, device), cast(Any, None), DeviceLoad(LAYERS, EXPERTS, device),
        top_k=TOP_K, num_experts=EXPERTS, norm_topk=True, pairs=1 << 15, weigh_early=False,
    )  # fmt: skip
    return bank, experts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--tokens", help="tokens of all ranks, separated by commas", default="2,32,128,256,512")
    parser.add_argument("--fp8", action="store_true", help="e4m3 with a scale a block, and plain ones as served")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("experts_gpu: this machine has no CUDA device")
        return 0
    device = torch.device("cuda", 0)
    kinds: list[tuple[DeviceBank, DeviceExperts, Sequence[Tiling]]] = [(*rig("plain", device), TILINGS)]
    if options.fp8:
        kinds.append((*rig("fp8", device), BLOCK_TILINGS))
    for bank, _, _ in kinds:
        us = bare_read_us(bank)
        size = SLOTS * bank.expert_bytes
        print(f"bare read of {SLOTS} experts, {size / 1e6:.0f} MB: {us:.1f} us, {size / us / 1e6:.2f} TB/s", flush=True)
    generator = torch.Generator(device).manual_seed(0)
    for tokens in map(int, options.tokens.split(",")):
        chosen = torch.rand(tokens, EXPERTS, device=device, generator=generator).argsort(1)[:, :TOP_K].flatten()
        slot_M = chosen[chosen < SLOTS].sort().values
        x = torch.randn(tokens, HIDDEN, device=device, generator=generator).to(torch.bfloat16)
        served = Tiling.of(len(slot_M), SLOTS, exact=False)
        fits = {16: (16, 32), 32: (16, 32, 64), 64: (32, 64), 128: (64,)}[served.rows]
        for bank, experts, tilings in kinds:
            reference: torch.Tensor | None = None
            if options.fp8:
                tilings = tuple(t for t in tilings if t.rows in fits) if tilings is BLOCK_TILINGS else (served,)
            for tiling in tilings:
                us, got = timed(experts, x, slot_M, tiling)
                reference = got if reference is None else reference
                error = float((got.float() - reference.float()).norm() / reference.float().norm())
                rate = len(slot_M.unique()) * bank.expert_bytes / us / 1e6
                print(
                    f"{tokens:4d} tokens, {len(slot_M):4d} pairs: {us:7.1f} us, {rate:5.2f} TB/s, "
                    f"error {error:.0e}, {tiling}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
