"""The sampler as a Triton kernel: one program a row, the meanings of `engine.sampler`.

Thresholds (top-k, top-p) are found by bisection over the bits of the weights, which order as the weights do: exact, and
without sorting a vocabulary. Sums are float64, block by block in the order of token ids, so a row's token depends on
its own logits, parameters and noise alone. V is the size of the vocabulary, N the rows.
"""
# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import triton
import triton.language as tl

ONE_BITS: tl.constexpr = tl.constexpr(0x3F800000)
"""The bits of 1.0, the greatest weight there is."""


@triton.jit
def _bits(row, greatest, temperature, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of tokens: ids, and the bits of their weights relative to the greatest (-1: no token)."""
    v = start + tl.arange(0, BLOCK)
    x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    weight = tl.exp((x - greatest) / temperature)
    return v, tl.where(v < V, weight.to(tl.int32, bitcast=True), -1)


@triton.jit
def _measure(row, greatest, temperature, least, V: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens weigh at least what the bits `least` say, and how much together (float64)."""
    count = 0
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, V, BLOCK):
        _, bits = _bits(row, greatest, temperature, start, V, BLOCK)
        kept = bits >= least
        count += tl.sum(kept.to(tl.int32))
        total += tl.sum(tl.where(kept, bits.to(tl.float32, bitcast=True), 0.0).to(tl.float64))
    return count, total


@triton.jit
def _draw(row, greatest, temperature, least, ties, goal, V: tl.constexpr, BLOCK: tl.constexpr):
    """The first token at which the weight kept so far exceeds `goal`. Of those that weigh exactly `least`, the first
    `ties` are kept."""
    found = V
    last = 0
    before = tl.full((), 0.0, tl.float64)
    ties_before = 0
    for start in range(0, V, BLOCK):
        v, bits = _bits(row, greatest, temperature, start, V, BLOCK)
        tie = bits == least
        rank = ties_before + tl.cumsum(tie.to(tl.int32), 0)
        kept = ((bits > least) | (tie & (rank <= ties))) & (bits > 0)
        weight = tl.where(kept, bits.to(tl.float32, bitcast=True), 0.0).to(tl.float64)
        reached = before + tl.cumsum(weight, 0)
        found = tl.minimum(found, tl.min(tl.where(kept & (reached > goal), v, V)))
        last = tl.maximum(last, tl.max(tl.where(kept, v, 0)))
        before += tl.sum(weight)
        ties_before += tl.sum(tie.to(tl.int32))
    return tl.where(found < V, found, last)


@triton.jit
def sample_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, noises, tokens,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The next token of each row. logits: [N, V]; temperatures (0: greedy), top_ps, min_ps: float32 [N]; top_ks: int32
    [N] (0: off); noises: float64 [N] in [0, 1); tokens: int64 [N]. Grid: N."""
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * V
    greatest = tl.full((), float("-inf"), tl.float32)
    token = 0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        top = tl.max(x)
        token = tl.where(top > greatest, tl.min(tl.where(x == top, v, V)), token)
        greatest = tl.maximum(greatest, top)
    temperature = tl.load(temperatures + n)
    if (temperature > 0.0) & (tl.abs(greatest) < float("inf")):
        least = tl.load(min_ps + n).to(tl.int32, bitcast=True)
        count, total = _measure(row, greatest, temperature, least, V, BLOCK)
        top_k = tl.load(top_ks + n)
        if (top_k > 0) & (top_k < count):
            above = ONE_BITS + 1
            while above - least > 1:
                middle = least + (above - least) // 2
                count, _ = _measure(row, greatest, temperature, middle, V, BLOCK)
                enough = count >= top_k
                least = tl.where(enough, middle, least)
                above = tl.where(enough, above, middle)
            count, total = _measure(row, greatest, temperature, least, V, BLOCK)
        ties = V
        top_p = tl.load(top_ps + n)
        if top_p < 1.0:
            goal = total * top_p
            above = ONE_BITS + 1
            while above - least > 1:
                middle = least + (above - least) // 2
                _, reached = _measure(row, greatest, temperature, middle, V, BLOCK)
                enough = reached >= goal
                least = tl.where(enough, middle, least)
                above = tl.where(enough, above, middle)
            _, larger = _measure(row, greatest, temperature, least + 1, V, BLOCK)
            each = least.to(tl.float32, bitcast=True).to(tl.float64)
            ties = tl.maximum(tl.ceil((goal - larger) / tl.maximum(each, 1e-300)), 1.0).to(tl.int32)
            count, total = _measure(row, greatest, temperature, least, V, BLOCK)
            equal, _ = _measure(row, greatest, temperature, least + 1, V, BLOCK)
            ties = tl.minimum(ties, count - equal)
            total = larger + each * ties
        token = _draw(row, greatest, temperature, least, ties, total * tl.load(noises + n), V, BLOCK)
    tl.store(tokens + n, token.to(tl.int64))
