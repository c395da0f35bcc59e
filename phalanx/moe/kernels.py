"""The gate of an MoE layer (Triton), and what the layer's kernels share.

Shape suffixes: T tokens, K top-k, E experts.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return,name-defined,valid-type"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, total):
    """total + a b, in float32. Triton's interpreter cannot multiply bfloat16 and gets the same numbers in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def whole(product, at, inside, stride, PARTS: tl.constexpr, kind: tl.constexpr):
    """What stands at `at` of a product (`moe.thin`): as it is, or the sum of PARTS parts, `stride` apart, in `kind`."""
    value = tl.load(product + at, mask=inside, other=0.0)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            value += tl.load(product + part * stride + at, mask=inside, other=0.0)
        value = value.to(kind)
    return value


@triton.jit
def gate_kernel(
    logits, positions, num_rows, routes, weights, slots, load,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, W: tl.constexpr, SCALED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Softmax over the experts, the K largest (of equals the lowest ids), and the slots where they stand.

    logits: a product [T, E]; routes: int32 [E, W], one layer's; weights: float32 [T, K], slots: int32 [T, K], -1 in
    rows from num_rows[0] on, which pad a captured batch; load: int32 [E], counted up. Grid: T.
    """
    t = tl.program_id(0)
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    x_E = whole(logits, t * E + e, e < E, tl.num_programs(0) * E, PARTS, tl.float32).to(tl.float32)
    x_E = tl.where(e < E, x_E, float("-inf"))
    p_E = tl.exp(x_E - tl.max(x_E))
    left_E = tl.where(e < E, p_E / tl.sum(p_E), -1.0)
    expert_K = tl.zeros([KP], tl.int32)
    weight_K = tl.zeros([KP], tl.float32)
    for i in tl.static_range(K):
        best = tl.max(left_E)
        # A row that a lost peer left without meaning may hold no number at all: its index must be valid all the same.
        at = tl.minimum(tl.min(tl.where(left_E == best, e, E - 1)), E - 1)
        expert_K = tl.where(k == i, at, expert_K)
        weight_K = tl.where(k == i, best, weight_K)
        left_E = tl.where(e == at, -2.0, left_E)
    if SCALED:
        weight_K = weight_K / tl.sum(weight_K)
    wanted = (k < K) & (t < tl.load(num_rows))
    column = tl.load(positions + t) % W
    slot_K = tl.load(routes + expert_K * W + column, mask=wanted, other=-1)
    tl.store(weights + t * K + k, weight_K, mask=k < K)
    tl.store(slots + t * K + k, slot_K, mask=k < K)
    tl.atomic_add(load + expert_K, tl.full([KP], 1, tl.int32), mask=wanted, sem="relaxed")
