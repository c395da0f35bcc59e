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
    """Every tiling that serving may choose; those for `--deterministic` must give the same bits."""
    g = torch.Generator(device).manual_seed(seed)
    bank = DeviceBank(1, slots, hidden, width, torch.bfloat16, device, "fp8")
    experts = BlockExperts(
        bank, RouteTable(1, 1, 1, device), cast(Any, None), DeviceLoad(1, 1, device), top_k=1, num_experts=1,
        norm_topk=True, pairs=pairs, weigh_early=False,
    )  # fmt: skip
    # All on the device: the CPUs would take seconds for weights of this size, beside other checks many.
    weights = torch.empty(slots, 3 * width * hidden, device=device)
    data = torch.empty(bank.expert_bytes, dtype=torch.uint8, device=device)
    every = torch.arange(256, dtype=torch.uint8, device=device)  # ordinary values, tiny ones, and both zeros
    every = torch.where(every & 0x7F == 0x7F, 0, every)
    for slot in range(slots):
        flat = []
        for weight, scales in BlockWeights.of(data, bank.layout).parts():
            drawn = torch.randn(*weight.shape, generator=g, device=device)
            quantize(drawn.mul_(weight.shape[1] ** -0.5), weight, scales)
            weight.view(torch.uint8).view(-1)[:256] = every
            factors = torch.rand(scales.shape, generator=g, device=device) + 0.5
            factors[0, 0] *= 2.0**-10  # where the largest values are
            scales.mul_(factors)
            flat.append(dequantized(weight, scales, torch.float32).flatten())
        weights[slot] = torch.cat(flat)
        bank.slot_bytes(0, slot)[:] = data.cpu().numpy()
        bank.mark(0, slot, slot, 1)
    bank.ready()
    x, row_M, first = pairs_of(slots, hidden, pairs, torch.Generator().manual_seed(seed))
    on_device = x.to(device), row_M.to(device), first.to(device)
    want = through_experts(on_device[0], on_device[1], first, weights, width)
    worst, exact_bits = 0.0, []
    tilings = dict.fromkeys(
        (BlockTiling.like(Tiling.of(many * slots, slots, exact=exact)), exact)
        for exact in (False, True)
        for many in (0, 2, 12, 40)
    )
    for tiling, exact in tilings:
        got = experts.experts(0, *on_device, tiling)[:pairs].cpu()
        error = error_of(got, want)
        assert error < 1e-2, f"{slots} slots, {hidden} x {width}, {pairs} pairs, {tiling}: relative error {error:.1e}"
        worst = max(worst, error)
        exact_bits += [got] if exact else []
    # The interpreter multiplies with a library, whose sums depend on the shape.
    same = device.type == "cpu" or all(torch.equal(bits, exact_bits[0]) for bits in exact_bits)
    bank.close()
    assert same, f"{slots} slots, {hidden} x {width}, {pairs} pairs: bits depend on the tiling"
    return worst
