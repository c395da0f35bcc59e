"""What the sampler's kernel is told of each row, and which rows it can do.

The kernel (`engine.kernels`) does greedy choice, temperature, min_p, top_k and top_p. Requests that change their logits
first (penalties, biases, minimum tokens) or want log-probabilities are left to `engine.sampler` on the host, from a
copy of their logits. The noise is the same function of (seed, position) on both.

One array of int32 words, as in `model.device_tables`; N rows of it are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from phalanx.engine import sampler
from phalanx.engine.request import Request

Words = npt.NDArray[np.int32]
UInts = npt.NDArray[np.uint64]

_ALIGN = 64
PARTS = ("noises", "rows", "temperatures", "top_ks", "top_ps", "min_ps")
"""In this order; `noises` takes two words a row."""

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def offsets(rows: int) -> dict[str, int]:
    """First word of each part, and `end`. LOCAL."""
    room = -(-rows // _ALIGN) * _ALIGN
    places, at = {}, 0
    for name in PARTS:
        places[name] = at
        at += room * (2 if name == "noises" else 1)
    places["end"] = at
    return places


def on_device(request: Request) -> bool:
    """Whether the kernel can choose this request's next token. LOCAL, pure."""
    sampling = request.sampling
    return sampling.logprobs is None and not sampler.adjusts(sampling, request.output_length, request.stop_ids)


def write(words: Words, capacity: int, samples: Sequence[tuple[Request, int]], later: int = 0) -> None:
    """Tell of these (request, row of the batch), in their order; what follows them is greedy, of row 0. LOCAL.

    later: by how many tokens each request will have grown when its token is chosen."""
    count = len(samples)
    assert count <= capacity, (count, capacity)
    at = offsets(capacity)
    words[:] = 0
    if not count:
        return
    params = [request.sampling for request, _ in samples]
    temperatures = np.array([p.temperature for p in params], np.float32)
    temperatures[temperatures < sampler.GREEDY_BELOW] = 0.0
    words[at["rows"] : at["rows"] + count] = [row for _, row in samples]
    words[at["top_ks"] : at["top_ks"] + count] = [max(0, p.top_k) for p in params]
    floats = words.view(np.float32)
    floats[at["temperatures"] : at["temperatures"] + count] = temperatures
    floats[at["top_ps"] : at["top_ps"] + count] = [p.top_p for p in params]
    floats[at["min_ps"] : at["min_ps"] + count] = [p.min_p for p in params]
    drawn = np.flatnonzero(temperatures)
    if drawn.size:
        seeds = np.array([p.seed % (1 << 64) for p in params], np.uint64)[drawn]
        positions = np.array([request.output_length + later for request, _ in samples], np.uint64)[drawn]
        words.view(np.float64)[at["noises"] // 2 + drawn] = uniforms(seeds, positions)


def uniforms(seeds: UInts, positions: UInts) -> npt.NDArray[np.float64]:
    """`sampler.uniform` of many (seed, position) at once, to the last bit. LOCAL, pure.

    Philox4x64-10 (Salmon et al., SC 2011) as numpy's generator runs it: it counts up before its first number."""
    zero = np.zeros_like(seeds)
    c0, c1, c2, c3 = positions + np.uint64(1), zero, zero, zero
    k0, k1 = seeds, zero
    with np.errstate(over="ignore"):
        for _ in range(_ROUNDS):
            high0, low0 = _multiply(_MULTIPLIERS[0], c0)
            high1, low1 = _multiply(_MULTIPLIERS[1], c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + np.uint64(_WEYL[0]), k1 + np.uint64(_WEYL[1])
    return (c0 >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _multiply(a: int, b: UInts) -> tuple[UInts, UInts]:
    """The high and the low 64 bits of a product."""
    a_low, a_high = np.uint64(a & 0xFFFFFFFF), np.uint64(a >> 32)
    b_low, b_high = b & _LOW, b >> _HALF
    cross = a_high * b_low + ((a_low * b_low) >> _HALF)
    other = a_low * b_high + (cross & _LOW)
    return a_high * b_high + (cross >> _HALF) + (other >> _HALF), np.uint64(a) * b
