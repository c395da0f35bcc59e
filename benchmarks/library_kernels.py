"""Our kernels beside torch's, one device: grouped products of experts, and attention of decodes over a KV cache.

Every figure: a graph of LAYERS layers with weights and KV of their own (more than a cache holds), replayed REPLAYS
times; microseconds a layer, median. Results of both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from graph_times import layer_us
from library_decode import Chains, best_attention, two_products
from torch import Tensor

from phalanx.model import device_tables
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.config import ModelConfig
from phalanx.model.cuda import DeviceBatch, DeviceKV, DeviceModel, table_shape
from phalanx.model.layers import DenseWeights
from phalanx.moe.cuda import DeviceBank, DeviceExperts, DeviceLoad, Tiling
from phalanx.moe.gate import RouteTable

LAYERS, REPLAYS = 8, 15
BLOCK = 16
TOKENS = (2, 32, 128, 256, 512)
CONTEXTS = ((1, 160), (16, 160), (64, 160), (256, 160), (16, 2048), (64, 2048))
MOST = 2e-2
"""Relative difference of both results."""


@dataclass(frozen=True)
class Row:
    """A comparison: microseconds a layer."""

    what: str
    ours: float
    theirs: float

    def __str__(self) -> str:
        ratio = f"{self.ours / self.theirs:.2f}" if self.theirs else "-"
        return f"{self.what:48s} ours {self.ours:7.1f} us, torch {self.theirs:7.1f} us, ratio {ratio}"


def _timed(run: Callable[[int], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Microseconds of `run(layer)`, and the first layer's result. Without a device everything runs once: for tests."""
    first = run(0).clone()
    for layer in range(1, LAYERS):
        run(layer)
    if device.type != "cuda":
        return 0.0, first
    return layer_us(run, LAYERS, REPLAYS), first


def compared(
    what: str, ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor], device: torch.device
) -> Row:  # fmt: skip
    """Both, timed and compared. Raises when they differ."""
    (our_us, got), (their_us, want) = (_timed(run, device) for run in (ours, theirs))
    error = float((got.float() - want.float()).norm() / want.float().norm())
    assert error < MOST, f"{what}: results differ by {error:.1e}"
    return Row(what, our_us, their_us)


def experts(
    config: ModelConfig, ranks: int, chains: Chains, device: torch.device, tokens: tuple[int, ...] = TOKENS
) -> Iterator[Row]:  # fmt: skip
    """w13, silu, w2 of the experts of one of `ranks` ranks, for the tokens of all of them, routed at random."""
    slots, K, D, width = config.num_experts // ranks, config.top_k, config.hidden, config.expert_width
    dtype = torch.bfloat16
    bank = DeviceBank(LAYERS, slots, D, width, dtype, device)
    bank.weights_LSX.normal_(0, 0.03)
    made = DeviceExperts(
        bank, RouteTable(LAYERS, config.num_experts, 1, device), cast(Any, None),
        DeviceLoad(LAYERS, config.num_experts, device), top_k=K, num_experts=config.num_experts, norm_topk=True,
        pairs=max(tokens) * K, weigh_early=False,
    )  # fmt: skip
    middle = 2 * width * D
    w13 = bank.weights_LSX[..., :middle].unflatten(2, (2 * width, D))
    w2 = bank.weights_LSX[..., middle:].unflatten(2, (D, width))
    g = torch.Generator(device).manual_seed(0)
    for count in tokens:
        chosen = torch.rand(count, config.num_experts, device=device, generator=g).argsort(1)[:, :K].flatten()
        slot_M, order = chosen[chosen < slots].sort()
        row_M = (torch.arange(count * K, device=device) // K)[chosen < slots][order]
        x = torch.randn(count, D, device=device, generator=g).to(dtype)
        first = torch.searchsorted(slot_M, torch.arange(slots + 1, device=device)).to(torch.int32)
        tiling = Tiling.of(max(1, count // ranks) * K, slots, exact=False)
        pairs = len(slot_M)
        if not pairs:
            continue
        yield compared(
            f"experts, {count} tokens, {pairs} pairs for {slots} of {config.num_experts}",
            lambda layer: made.experts(layer, x, row_M, first, tiling)[:pairs],  # noqa: B023
            lambda layer: two_products(x[row_M], w13[layer], w2[layer], first[1:], chains),  # noqa: B023
            device,
        )
    bank.close()


def attention(
    config: ModelConfig, chains: Chains, device: torch.device, contexts: tuple[tuple[int, int], ...] = CONTEXTS
) -> Iterator[Row]:  # fmt: skip
    """Norms and rotary embedding of queries and keys, their way into the cache, attention: from qkv to before the
    output projection. contexts: sequences, and the tokens of each, the new one included."""
    attend, dtype, C = best_attention(device), torch.bfloat16, config.head_dim
    weights = [torch.ones(C, dtype=dtype, device=device) for _ in range(2)]
    for rows, length in contexts:
        each = -(-length // BLOCK)
        kv = DeviceKV(config, rows * each, BLOCK, dtype, device)
        kv.data.normal_()
        # The same keys and values for both: a sequence's blocks lie one after the other.
        cache = kv.data[:, :-1].permute(0, 2, 1, 4, 3, 5).reshape(LAYERS, 2, rows, each * BLOCK, -1, C).clone()
        model, batch = _our_model(config, kv, rows, length, device, weights)
        heads = config.num_heads + 2 * config.num_kv_heads
        qkv = torch.randn(rows, heads * C, device=device).to(dtype)
        mine = qkv.repeat(LAYERS, 1, 1)  # ours turns the queries in place
        positions = torch.full((rows,), length - 1, device=device)
        lengths = (positions + 1).to(torch.int32)
        exponent = torch.arange(0, C, 2, device=device).float() / C
        angles = torch.outer(torch.arange(length, device=device).float(), config.rope_theta**-exponent)
        cos, sin = angles.cos(), angles.sin()

        def theirs(layer: int) -> Tensor:
            keys, values = cache[layer, 0], cache[layer, 1]  # noqa: B023
            q = chains.place(qkv, *weights, cos, sin, positions, config.norm_eps, keys, values)  # noqa: B023
            return attend(q, keys, values, lengths).flatten(1)  # noqa: B023

        yield compared(
            f"attention, {rows} sequences of {length} ({attend.__name__})",
            lambda layer: model.attend(layer, mine[layer], batch),  # noqa: B023
            theirs, device,
        )  # fmt: skip


def _our_model(
    config: ModelConfig, kv: DeviceKV, rows: int, length: int, device: torch.device, norms: list[Tensor]
) -> tuple[DeviceModel, DeviceBatch]:  # fmt: skip
    """A model of which only the attention is used, and a batch in which every sequence decodes."""
    from phalanx.model.layers import LayerWeights

    each = -(-length // BLOCK)
    shape = table_shape(
        config, rows=rows, sequences=rows, max_model_len=length, block_size=BLOCK, num_blocks=rows * each, exact=False,
        device=device,
    )  # fmt: skip
    nothing = torch.empty(0, dtype=torch.bfloat16, device=device)
    layer = LayerWeights(nothing, nothing, None, *norms, nothing, None, nothing, None, None, None)
    dense = DenseWeights(nothing, (layer,) * LAYERS, nothing, nothing)
    model = DeviceModel(config, dense, cast(Any, None), kv, shape, exact=False)
    slices = tuple(
        SequenceSlice(row, 1, length - 1, np.arange(row * each, (row + 1) * each, dtype=np.int32))
        for row in range(rows)
    )
    forward = ForwardBatch(torch.zeros(rows, dtype=torch.int64), torch.full((rows,), length - 1), slices)
    words = np.zeros(shape.size, np.int32)
    device_tables.write(words, shape, forward, rows)
    return model, DeviceBatch.of(torch.from_numpy(words).to(device), shape, rows, False, Tiling())
