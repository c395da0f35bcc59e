#!/usr/bin/env python3
"""Times the experts' grouped products by tiling, on one CUDA device: the shape of Qwen3-30B-A3B, half of its experts.

    benchmarks/experts_gpu.py                   every tiling for 2, 32, 128, 256 and 512 tokens of all ranks together
    benchmarks/experts_gpu.py --tokens 256

Every figure: a graph of LAYERS layers with weights of their own (more than any cache holds), replayed REPLAYS times;
the device time of a layer, median; and the rate at which the weights of the experts that were asked for must have been
read. Random routing: each token's 8 experts of 128, of which 64 stand here. Results of a tiling are compared with the
first one's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from phalanx.moe.cuda import DeviceBank, DeviceExperts, DeviceLoad, Tiling
from phalanx.moe.gate import RouteTable

SLOTS, EXPERTS, TOP_K, HIDDEN, WIDTH = 64, 128, 8, 2048, 768
LAYERS, REPLAYS = 8, 15
TILINGS = (
    Tiling(),
    Tiling(up=32, up_stages=4),
    Tiling(up=32, down=32, up_stages=4),
    Tiling(up=128, down=128, depth=64),
    Tiling(depth=64, up_stages=4, down_stages=5),
    Tiling(up=64, down=128, depth=64, up_stages=5, down_stages=5),
    Tiling(rows=32),
    Tiling.of(64 * SLOTS, SLOTS, exact=False),
)


def layer_us(
    experts: DeviceExperts, x: torch.Tensor, slot_M: torch.Tensor, tiling: Tiling
) -> tuple[float, torch.Tensor]:
    """Microseconds of a layer, and its result."""
    first = torch.searchsorted(slot_M, torch.arange(SLOTS + 1, device=x.device)).to(torch.int32)
    rows = torch.arange(len(slot_M), device=x.device) % len(x)

    def run() -> None:
        for layer in range(LAYERS):
            experts.experts(layer, x, rows, first, tiling)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    samples = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / LAYERS)
    return statistics.median(samples[2:]), experts.experts(0, x, rows, first, tiling)[: len(slot_M)].clone()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--tokens", help="tokens of all ranks, separated by commas", default="2,32,128,256,512")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("experts_gpu: this machine has no CUDA device")
        return 0
    device = torch.device("cuda", 0)
    bank = DeviceBank(LAYERS, SLOTS, HIDDEN, WIDTH, torch.bfloat16, device)
    bank.weights_LSX.normal_(0, 0.03)
    experts = DeviceExperts(
        bank, RouteTable(LAYERS, EXPERTS, 1, device), cast(Any, None), DeviceLoad(LAYERS, EXPERTS, device),
        top_k=TOP_K, num_experts=EXPERTS, norm_topk=True, pairs=8192, weigh_early=False,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    for tokens in map(int, options.tokens.split(",")):
        chosen = torch.rand(tokens, EXPERTS, device=device, generator=generator).argsort(1)[:, :TOP_K].flatten()
        slot_M = chosen[chosen < SLOTS].sort().values
        x = torch.randn(tokens, HIDDEN, device=device, generator=generator).to(torch.bfloat16)
        read = len(slot_M.unique()) * bank.expert_bytes
        reference: torch.Tensor | None = None
        for tiling in TILINGS:
            us, got = layer_us(experts, x, slot_M, tiling)
            reference = got if reference is None else reference
            error = float((got.float() - reference.float()).norm() / reference.float().norm())
            rate = read / us / 1e6
            print(
                f"{tokens:4d} tokens, {len(slot_M):4d} pairs: {us:7.1f} us, {rate:5.2f} TB/s, "
                f"error {error:.0e}, {tiling}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
