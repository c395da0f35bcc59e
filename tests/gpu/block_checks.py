"""Checks of experts in fp8 on a device, against plain torch: for scripts/gpu_check, and in Triton's interpreter."""

from __future__ import annotations

from typing import Any, cast

import torch
from engine_checks import check_engine, error_of, pairs_of, through_experts

from phalanx.moe.blocks import BlockWeights, dequantized, quantize
from phalanx.moe.cuda import DeviceBank, DeviceLoad, Tiling
from phalanx.moe.cuda_blocks import BlockExperts, BlockTiling
from phalanx.moe.gate import RouteTable


def check_blocks(device: torch.device, large: bool) -> None:
    """The kernels, then a whole model with them."""
    check_block_experts(device, large)
    check_engine(device, large, quantization="fp8")


def check_block_experts(device: torch.device, large: bool) -> None:
    """Experts in e4m3 with a scale a block: every value there is, sizes that cut blocks off, any scales."""
    cases = [(4, 160, 144, 30), (3, 136, 24, 50)]
    if large:
        cases = [(64, 2048, 768, 2048), (64, 2048, 768, 7), (3, 520, 136, 333)]
    worst = max(_block_case(device, *case, seed) for seed, case in enumerate(cases))
    print(f"    experts in fp8: relative error at most {worst:.1e}")


def _block_case(device: torch.device, slots: int, hidden: int, width: int, pairs: int, seed: int) -> float:
    """Every tiling that serving may choose, and swapped ones; those for `--deterministic` must give the same bits."""
    g = torch.Generator().manual_seed(seed)
    bank = DeviceBank(1, slots, hidden, width, torch.bfloat16, device, "fp8")
    experts = BlockExperts(
        bank, RouteTable(1, 1, 1, device), cast(Any, None), DeviceLoad(1, 1, device), top_k=1, num_experts=1,
        norm_topk=True, pairs=pairs, weigh_early=False,
    )  # fmt: skip
    weights = torch.empty(slots, 3 * width * hidden)
    for slot in range(slots):
        data = bank.slot_bytes(0, slot)
        blocks = BlockWeights.of(torch.from_numpy(data), bank.layout)
        flat = []
        for weight, scales in blocks.parts():
            quantize(torch.randn(*weight.shape, generator=g).mul_(weight.shape[1] ** -0.5), weight, scales)
            every = torch.arange(256, dtype=torch.uint8)  # ordinary values, tiny ones, and both zeros
            weight.view(torch.uint8).view(-1)[:256] = torch.where(every & 0x7F == 0x7F, 0, every)
            factors = torch.rand(scales.shape, generator=g) + 0.5
            factors[0, 0] *= 2.0**-10  # where the largest values are
            scales.mul_(factors)
            flat.append(dequantized(weight, scales, torch.float32).flatten())
        weights[slot] = torch.cat(flat)
        bank.mark(0, slot, slot, 1)
    bank.ready()
    x, row_M, first = pairs_of(slots, hidden, pairs, g)
    want = through_experts(x, row_M, first, weights, width)
    on_device = x.to(device), row_M.to(device), first.to(device)
    worst, exact_bits = 0.0, []
    tilings = dict.fromkeys(
        (BlockTiling.of(Tiling.of(many * slots, slots, exact=exact)), exact)
        for exact in (False, True)
        for many in (0, 2, 12, 40)
    )
    for tiling, exact in (*tilings, *((BlockTiling(rows, swapped=True), False) for rows in (16, 64))):
        got = experts.products(0, *on_device, tiling)[:pairs].cpu()
        error = error_of(got, want)
        assert error < 1e-2, f"{slots} slots, {hidden} x {width}, {pairs} pairs, {tiling}: relative error {error:.1e}"
        worst = max(worst, error)
        exact_bits += [got] if exact else []
    # The interpreter multiplies with a library, whose sums depend on the shape.
    same = device.type == "cpu" or all(torch.equal(bits, exact_bits[0]) for bits in exact_bits)
    bank.close()
    assert same, f"{slots} slots, {hidden} x {width}, {pairs} pairs: bits depend on the tiling"
    return worst
