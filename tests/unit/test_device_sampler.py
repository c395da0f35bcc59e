"""What the sampler's kernel is told: the host's noise to the last bit, and only what the kernel can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.engine import device_sampler, sampler
from phalanx.engine.request import Request
from phalanx.messages import SamplingParams, Submit

WORDS = st.integers(0, 2**64 - 1)


def request(output: int = 0, stop: tuple[int, ...] = (), **changes: Any) -> Request:
    sampling = SamplingParams(max_tokens=50, stop_token_ids=stop, **changes)
    return Request.of(Submit("r", 0, [1, 2, 3], sampling, list(range(output))), frozenset(), 16)


@given(st.lists(st.tuples(WORDS, st.integers(0, 1 << 40)), min_size=1, max_size=20))
def test_the_noise_of_a_batch_is_that_of_its_rows(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    want = [sampler.uniform(seed, position) for seed, position in pairs]
    assert device_sampler.uniforms(seeds, positions).tolist() == want


def test_each_row_gets_its_parameters_and_the_rest_is_greedy() -> None:
    samples = [
        (request(temperature=0.5, top_k=-1, top_p=0.9, min_p=0.25, seed=-3, output=4), 6),
        (request(temperature=1e-6, top_k=20), 2),
    ]
    at = device_sampler.offsets(10)
    words = np.full(at["end"], 99, np.int32)
    device_sampler.write(words, 10, samples)
    floats = words.view(np.float32)
    assert words[at["rows"] :][:3].tolist() == [6, 2, 0]
    assert words[at["top_ks"] :][:3].tolist() == [0, 20, 0]
    assert floats[at["temperatures"] :][:3].tolist() == [0.5, 0.0, 0.0]
    assert floats[at["top_ps"] :][:2].tolist() == [np.float32(0.9), 1.0]
    assert floats[at["min_ps"] :][:2].tolist() == [0.25, 0.0]
    noises = words.view(np.float64)[at["noises"] // 2 :][:3].tolist()
    assert noises == [sampler.uniform(-3, 4), 0.0, 0.0]


def test_an_empty_batch_tells_of_greedy_rows_alone() -> None:
    words = np.full(device_sampler.offsets(4)["end"], 5, np.int32)
    device_sampler.write(words, 4, [])
    assert not words.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2}, {"logit_bias": {3: 1.0}},
        {"min_tokens": 9, "stop": (7,)}, {"logprobs": 0},
    ],
)  # fmt: skip
def test_what_changes_logits_or_wants_them_is_left_to_the_host(changes: dict[str, Any]) -> None:
    assert not device_sampler.on_device(request(output=2, **changes))


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}])
def test_plain_sampling_is_done_on_the_device(changes: dict[str, Any]) -> None:
    assert device_sampler.on_device(request(output=2, **changes))


def test_a_penalty_on_an_output_that_has_not_begun_changes_nothing() -> None:
    assert device_sampler.on_device(request(presence_penalty=0.5))
