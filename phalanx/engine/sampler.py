"""The next token of one request from one row of logits.

Rows are worked on one by one, and nothing here looks beyond a row, its request's parameters and its tokens: so a
token cannot depend on who else is in the batch. The noise is a function of (seed, position), from a counter-based
generator, so that a replayed step and a moved request draw the same.

The order of operations and the meanings are vLLM's: minimum tokens, logit bias, penalties, temperature, min_p, top_k,
top_p. Ties go to the lowest token id. V is the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from phalanx.messages import Logprob, SamplingParams

FloatRow = npt.NDArray[np.float32]

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""

_LARGE = 1e-4
"""Weights are relative to the greatest one. Those above this nearly always hold the share that top_p asks for."""

_SUM_BLOCK = 256


def choose(logits_V: FloatRow, sampling: SamplingParams, tokens: Sequence[int], prompt_length: int,
           stop_ids: frozenset[int]) -> int:  # fmt: skip
    """The next token after `tokens`, of which the first `prompt_length` are the prompt. LOCAL, pure.

    logits_V: float32 [V], the model's own; it is not written to."""
    adjusted_V = _adjust(logits_V, sampling, tokens, prompt_length, stop_ids)
    greatest = int(adjusted_V.argmax())
    if sampling.temperature < GREEDY_BELOW or not np.isfinite(adjusted_V[greatest]):
        return greatest
    weights_V = np.exp((adjusted_V - adjusted_V[greatest]) / np.float32(sampling.temperature))
    if sampling.min_p > 0.0:
        _keep_from(weights_V, sampling.min_p)
    if 0 < sampling.top_k < weights_V.size:
        _keep_top_k(weights_V, sampling.top_k)
    if sampling.top_p < 1.0:
        _keep_top_p(weights_V, sampling.top_p)
    return _draw(weights_V, uniform(sampling.seed, len(tokens) - prompt_length))


def uniform(seed: int, position: int) -> float:
    """The noise of output token `position`: one number in [0, 1), 53 bits. LOCAL, pure.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = seed, counter = position."""
    bits = int(np.random.Philox(key=seed % (1 << 64), counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def logprobs(logits_V: FloatRow, token_id: int, count: int) -> list[Logprob]:
    """How likely the model itself found `token_id`, then its `count` most likely tokens. LOCAL, pure.

    Natural logarithms of the softmax of the raw logits, before any sampling parameter; the chosen token may come
    again among the most likely ones. A token's rank counts the tokens that are more likely than it, plus one."""
    greatest = logits_V.max()
    normalizer = float(greatest) + float(np.log(np.exp(logits_V - greatest).sum(dtype=np.float64)))

    def entry(token: int, rank: int) -> Logprob:
        return Logprob(token, float(logits_V[token]) - normalizer, rank)

    chosen = entry(token_id, 1 + int(np.count_nonzero(logits_V > logits_V[token_id])))
    top = _most_likely(logits_V, min(count, logits_V.size))
    ranks = 1 + np.searchsorted(-logits_V[top], -logits_V[top], side="left")
    return [chosen, *(entry(int(token), int(rank)) for token, rank in zip(top, ranks, strict=True))]


def adjusts(sampling: SamplingParams, output_length: int, stop_ids: frozenset[int]) -> bool:
    """Whether the request changes its logits before temperature and thresholds. LOCAL, pure."""
    too_short = output_length < sampling.min_tokens and bool(stop_ids)
    penalized = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    repeated = sampling.repetition_penalty != 1.0
    return too_short or bool(sampling.logit_bias) or repeated or (penalized and output_length > 0)


def _adjust(logits_V: FloatRow, sampling: SamplingParams, tokens: Sequence[int], prompt_length: int,
            stop_ids: frozenset[int]) -> FloatRow:  # fmt: skip
    """Minimum tokens, bias and penalties; the row itself when the request asks for none of them."""
    output_length = len(tokens) - prompt_length
    if not adjusts(sampling, output_length, stop_ids):
        return logits_V
    row_V = logits_V.copy()
    if output_length < sampling.min_tokens:
        row_V[[token for token in stop_ids if 0 <= token < row_V.size]] = -np.inf
    for token, bias in (sampling.logit_bias or {}).items():
        row_V[token] += np.float32(bias)
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(tokens, np.int64))
        factor = np.float32(sampling.repetition_penalty)
        row_V[seen] = np.where(row_V[seen] > 0, row_V[seen] / factor, row_V[seen] * factor)
    if output_length and (sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0):
        seen, times = np.unique(np.asarray(tokens[prompt_length:], np.int64), return_counts=True)
        row_V[seen] -= np.float32(sampling.frequency_penalty) * times.astype(np.float32)
        row_V[seen] -= np.float32(sampling.presence_penalty)
    return row_V


def _keep_from(weights_V: FloatRow, least: np.float32 | float) -> None:
    """Zero all that weighs less than `least`."""
    np.multiply(weights_V, weights_V >= least, out=weights_V)


def _keep_top_k(weights_V: FloatRow, k: int) -> None:
    """Zero all that weighs less than the k-th; those that tie with it stay, as in vLLM."""
    _keep_from(weights_V, np.partition(weights_V, weights_V.size - k)[weights_V.size - k])


def _keep_top_p(weights_V: FloatRow, top_p: float) -> None:
    """Zero all but the fewest tokens that reach `top_p` of the weight, at least one.

    Only values are sorted (no indices: that is five times as fast), and of those only the large ones if they suffice;
    of the tokens that tie with the last one kept, the lowest ids stay."""
    goal = top_p * _total(weights_V)
    large = weights_V[weights_V >= _LARGE]
    descending = np.sort(large if _total(large) > goal else weights_V)[::-1]
    last = _reach(descending, goal, "left")
    least = descending[last]
    ties = np.flatnonzero(weights_V == least)
    kept_ties = last + 1 - int(np.count_nonzero(descending > least))
    _keep_from(weights_V, least)
    weights_V[ties[kept_ties:]] = 0.0


def _draw(weights_V: FloatRow, noise: float) -> int:
    """The token at `noise` of the cumulated weight, tokens in the order of their ids."""
    return _reach(weights_V, noise * _total(weights_V), "right")


def _reach(weights_N: FloatRow, goal: float, side: Literal["left", "right"]) -> int:
    """The first index at which the sum so far is at least (left) or more than (right) `goal`, which is at most the
    whole sum. Never an index of no weight."""
    wide_N = weights_N.astype(np.float64)
    blocks = _block_sums(wide_N)
    at = min(int(blocks.searchsorted(goal, side)), int(blocks.searchsorted(blocks[-1])))
    block = wide_N[at * _SUM_BLOCK : (at + 1) * _SUM_BLOCK]
    within = int(block.cumsum().searchsorted(goal - (blocks[at - 1] if at else 0.0), side))
    return at * _SUM_BLOCK + min(within, int(np.flatnonzero(block)[-1]))


def _total(weights_N: FloatRow) -> float:
    return float(_block_sums(weights_N.astype(np.float64))[-1])


def _block_sums(wide_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sums up to the end of each block, always added in the same order. A running sum over each token of a
    vocabulary takes ten times as long."""
    return np.add.reduceat(wide_N, np.arange(0, wide_N.size, _SUM_BLOCK)).cumsum()


def _most_likely(logits_V: FloatRow, count: int) -> npt.NDArray[np.int64]:
    """The `count` greatest, in descending order; of equal ones the lowest ids, in ascending order."""
    if count <= 0:
        return np.zeros(0, np.int64)
    least = np.partition(logits_V, logits_V.size - count)[logits_V.size - count]
    above = np.flatnonzero(logits_V > least)
    ties = np.flatnonzero(logits_V == least)[: count - above.size]
    top = np.concatenate((above, ties))
    return top[np.argsort(-logits_V[top], kind="stable")]
