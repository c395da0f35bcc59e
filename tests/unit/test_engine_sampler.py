"""The sampler: each parameter's meaning, its noise, and that nothing outside a row matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.engine import sampler
from phalanx.messages import SamplingParams

ROW = np.log(np.array([0.40, 0.30, 0.15, 0.10, 0.05], np.float32))


def choose(row: sampler.FloatRow, output: list[int] | None = None, prompt: list[int] | None = None,
           stop_ids: frozenset[int] = frozenset(), **params: Any) -> int:  # fmt: skip
    tokens = [*(prompt or [0]), *(output or [])]
    sampling = SamplingParams(max_tokens=100_000, **params)
    return sampler.choose(row, sampling, tokens, len(prompt or [0]), stop_ids)


def drawn(row: sampler.FloatRow, times: int = 2000, **params: Any) -> np.ndarray[Any, Any]:
    """How often each token is drawn over many seeds, as shares."""
    picks = [choose(row, seed=seed, **params) for seed in range(times)]
    return np.bincount(picks, minlength=row.size) / times


def test_greedy_takes_the_most_likely_token_and_the_lowest_id_of_several() -> None:
    assert choose(ROW, temperature=0.0) == 0
    assert choose(np.array([1, 5, 2, 5, 5], np.float32), temperature=0.0) == 1


def test_sampling_follows_the_probabilities() -> None:
    np.testing.assert_allclose(drawn(ROW), np.exp(ROW), atol=0.035)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        expected = np.exp(ROW / temperature)
        np.testing.assert_allclose(drawn(ROW, temperature=temperature), expected / expected.sum(), atol=0.035)


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert choose(ROW * 1e30, temperature=1e-9, seed=3) == 0


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.75}, {0, 1}),  # of the three that are left, 0.40 and 0.30 weigh 0.82
        ({"min_p": 0.3, "temperature": 0.5}, {0, 1}),  # after the temperature: 0.16, 0.09, 0.0225
    ],
)
def test_filters_keep_just_the_tokens_that_they_should(params: dict[str, Any], kept: set[int]) -> None:
    shares = drawn(ROW, times=400, **params)
    assert set(np.flatnonzero(shares)) == kept


def test_top_p_keeps_the_lowest_ids_of_those_that_tie_and_top_k_keeps_all() -> None:
    row = np.zeros(10, np.float32)
    assert set(np.flatnonzero(drawn(row, times=300, top_p=0.35))) == {0, 1, 2, 3}
    assert set(np.flatnonzero(drawn(row, times=300, top_k=3))) == set(range(10))


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    row = np.array([2.0, 1.5, 1.0], np.float32)
    assert choose(row, prompt=[0, 0, 0], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert choose(row, output=[0], temperature=0.0, presence_penalty=0.6) == 1
    assert choose(row, output=[0, 0], temperature=0.0, frequency_penalty=0.3) == 1
    assert choose(row, output=[0], temperature=0.0, frequency_penalty=0.3) == 0


def test_the_repetition_penalty_counts_the_prompt_too_and_pushes_both_signs_down() -> None:
    assert choose(np.array([2.0, 1.5], np.float32), prompt=[0], temperature=0.0, repetition_penalty=2.0) == 1
    assert choose(np.array([-1.0, -1.5], np.float32), prompt=[0], temperature=0.0, repetition_penalty=2.0) == 1
    assert choose(np.array([2.0, 1.5], np.float32), prompt=[1], temperature=0.0, repetition_penalty=2.0) == 0


def test_logit_bias_adds_to_a_token() -> None:
    assert choose(ROW, temperature=0.0, logit_bias={4: 100.0}) == 4
    assert choose(ROW, temperature=0.0, logit_bias={0: -100.0}) == 1


def test_stop_tokens_cannot_be_drawn_before_min_tokens() -> None:
    stop_ids = frozenset({0, 99})
    assert choose(ROW, temperature=0.0, min_tokens=1, stop_ids=stop_ids) == 1
    assert choose(ROW, output=[2], temperature=0.0, min_tokens=1, stop_ids=stop_ids) == 0


def test_logits_are_never_written_to() -> None:
    row = ROW.copy()
    row.flags.writeable = False
    choose(row, output=[1], presence_penalty=1.0, repetition_penalty=1.2, logit_bias={0: 1.0}, top_p=0.5, top_k=3)
    sampler.logprobs(row, 0, 3)


def test_noise_is_a_function_of_seed_and_position_alone() -> None:
    grid = {(seed, at): sampler.uniform(seed, at) for seed in (0, 1, 2**63, -1) for at in range(50)}
    assert all(sampler.uniform(seed, at) == noise for (seed, at), noise in reversed(grid.items()))
    assert len(set(grid.values())) == len(grid)
    assert all(0.0 <= noise < 1.0 for noise in grid.values())


def test_the_noise_has_been_the_same_since_the_first_release() -> None:
    # A stream that was begun by one release must go on the same under the next.
    assert [sampler.uniform(7, at) for at in range(3)] == NOISE_OF_SEED_7


NOISE_OF_SEED_7 = [0.8720734548204873, 0.0828426870273763, 0.014107696329258346]


def test_a_row_that_is_no_number_still_gives_a_token() -> None:
    assert 0 <= choose(np.full(5, np.nan, np.float32), top_p=0.5) < 5
    assert 0 <= choose(np.full(5, -np.inf, np.float32), top_k=2) < 5


def test_logprobs_are_those_of_the_raw_model_with_ranks() -> None:
    chosen, *top = sampler.logprobs(ROW, 3, 2)
    assert (chosen.token_id, chosen.rank) == (3, 4)
    assert chosen.logprob == pytest.approx(np.log(0.10), abs=1e-6)
    assert [(entry.token_id, entry.rank) for entry in top] == [(0, 1), (1, 2)]
    assert top[0].logprob == pytest.approx(np.log(0.40), abs=1e-6)


def test_equal_logprobs_share_a_rank_and_come_in_the_order_of_ids() -> None:
    row = np.array([0.0, 1.0, 1.0, 2.0, 1.0], np.float32)
    assert [(e.token_id, e.rank) for e in sampler.logprobs(row, 4, 3)] == [(4, 2), (3, 1), (1, 2), (2, 2)]
    assert [e.token_id for e in sampler.logprobs(row, 0, 99)] == [0, 3, 1, 2, 4, 0]
    assert len(sampler.logprobs(row, 0, 0)) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 70), st.floats(0.05, 3.0), st.floats(0.01, 1.0), st.integers(0, 40),
    st.floats(0.0, 0.5),
)  # fmt: skip
def test_a_token_does_not_depend_on_where_its_row_lies(
    seed: int, offset: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    random = np.random.default_rng(seed)
    row = (random.standard_normal(1003) * 3).astype(np.float32)
    batch = random.standard_normal((3, 1003 + offset)).astype(np.float32)
    batch[1, offset:] = row
    params = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    assert choose(batch[1, offset:], **params) == choose(row, **params)
    assert sampler.logprobs(batch[1, offset:], 5, 7) == sampler.logprobs(row, 5, 7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 0.999), st.integers(2, 300))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(seed: int, top_p: float, size: int) -> None:
    row = (np.random.default_rng(seed).standard_normal(size) * 2).astype(np.float32)
    shares = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
    order = np.argsort(-shares)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(shares[order]), top_p - 1e-6)) + 1])
    wider = set(order[: int(np.searchsorted(np.cumsum(shares[order]), top_p + 1e-6)) + 1])
    for draw in range(20):
        assert choose(row, top_p=top_p, seed=draw) in nucleus | wider


def test_the_position_of_the_noise_counts_output_tokens_only() -> None:
    row = np.zeros(1000, np.float32)
    for at in range(5):
        expected = int(sampler.uniform(11, at) * 1000)
        for prompt in ([0], [0] * 9):
            assert choose(row, prompt=prompt, output=[3] * at, seed=11) == expected
