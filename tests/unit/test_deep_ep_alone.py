"""DeepEP's interface on one rank: what is refused, and fp8."""

from __future__ import annotations

import pytest
import torch
from deep_ep_reference import WAYS, Way, check_round, inputs
from torch.distributed import HashStore

from phalanx.comm.deep_ep import Buffer, Shape
from phalanx.comm.deep_ep_layout import quantize
from phalanx.comm.local import LocalCommunicator
from phalanx.comm.peer_memory import BufferLayout
from phalanx.errors import BadConfig, BadRequest, PhalanxError

SHAPE = Shape(max_tokens=8, hidden=256, top_k=3, num_experts=5)


def alone(**options: object) -> Buffer:
    return Buffer(communicator=LocalCommunicator(), low_latency_mode=True, **options)


def test_one_rank_gets_its_own_tokens_packed_by_expert() -> None:
    buffer = alone()
    for seed, tokens in enumerate((8, 0, 1, 5)):
        for way in WAYS:
            check_round(buffer, seed, [tokens], SHAPE, way, alive=(0,))


def test_quantizing_keeps_zeros_and_the_largest_and_powers_of_two_add_no_error_of_their_own() -> None:
    x = torch.zeros(3, 256)
    x[0, 5], x[0, 200], x[1, :128] = -3.0, 2.0**-9, torch.linspace(-1, 1, 128)
    for round_scale in (False, True):
        values, scales = quantize(x.to(torch.bfloat16), round_scale)
        assert scales.shape == (3, 2)
        back = values.float() * scales.repeat_interleave(128, 1)
        assert not back[2].any()
        assert torch.allclose(back, x, rtol=2**-4 + 2**-8, atol=2**-9)
    assert back[0, 5] == -3, "3 is a value of e4m3, and stays one under a scale that is a power of two"
    exact, _ = quantize(torch.full((1, 128), 448.0), True)
    assert torch.equal(exact.float(), torch.full((1, 128), 448.0)), "its scale is 1, not 2"


def test_the_size_hint_covers_any_top_k_up_to_16_and_does_not_grow_with_the_experts() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288)
    assert hint == Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 8)
    for top_k in (1, 8, 16):
        assert hint >= BufferLayout(8, 128, 7168, top_k, 2, 2, 7, 7, False).nbytes
    for said, asked in {
        "num_experts: 288 do not divide among 7 ranks": (128, 7168, 7, 288),
        "num_max_dispatch_tokens_per_rank: a whole number": (-1, 7168, 8, 288),
        "hidden: a whole number": (128, 0, 8, 288),
        "hidden: 7100 is no multiple of 128": (128, 7100, 8, 288),
        "num_ranks: a whole number": (128, 7168, 0, 288),
    }.items():
        with pytest.raises(BadRequest, match=said):
            Buffer.get_low_latency_rdma_size_hint(*asked)


REFUSED = {
    "use_ue8m0": {"use_ue8m0": True, "round_scale": True},
    "dispatch_wait_recv_cost_stats": {"dispatch_wait_recv_cost_stats": torch.zeros(1, dtype=torch.int64)},
    "async_finish, return_recv_hook": {"async_finish": True, "return_recv_hook": True},
    "cumulative_local_expert_recv_stats": {"cumulative_local_expert_recv_stats": torch.zeros(5)},
    "x: 8 tokens are more": {"num_max_dispatch_tokens_per_rank": 7},
    "topk_idx: expert": {"num_experts": 2},
    "topk_idx: int64 or int32": {"topk_idx": torch.zeros(8, 3)},
    "x: bfloat16": {"x": torch.zeros(8, 256)},
    "no multiple of 128": {"x": torch.zeros(8, 200, dtype=torch.bfloat16)},
    "x: a tensor is wanted, not list": {"x": [[0.0]]},
    r"x: \[T, D\] is wanted": {"x": torch.zeros(8, 0, dtype=torch.bfloat16)},
    r"topk_idx: \[T, K\] is wanted": {"topk_idx": torch.zeros(8, 0, dtype=torch.int64)},
    "topk_idx: it is on meta, where cpu is wanted": {"topk_idx": torch.zeros(8, 3, dtype=torch.int64, device="meta")},
    "recv_stats: it is on meta": {
        "cumulative_local_expert_recv_stats": torch.zeros(5, dtype=torch.int32, device="meta")
    },
    "num_experts: a whole number": {"num_experts": 0, "topk_idx": torch.full((8, 3), -1)},
    "num_experts: a whole number .* not 5.0": {"num_experts": 5.0},
    "num_max_dispatch_tokens_per_rank: a whole number": {
        "num_max_dispatch_tokens_per_rank": 0,
        "x": torch.zeros(0, 256, dtype=torch.bfloat16),
        "topk_idx": torch.zeros(0, 3, dtype=torch.int64),
    },
}


@pytest.mark.parametrize(("said", "asked"), REFUSED.items(), ids=REFUSED.keys())
def test_a_dispatch_that_cannot_be_done_is_refused_by_name_and_the_next_one_works(said: str, asked: dict) -> None:
    buffer, mine = alone(), inputs(0, 0, 8, SHAPE)
    usual = {"x": mine.x, "topk_idx": mine.topk_idx, "num_max_dispatch_tokens_per_rank": 8, "num_experts": 5}
    with pytest.raises(PhalanxError, match=said):
        buffer.low_latency_dispatch(**{**usual, **asked})
    check_round(buffer, 1, [8], SHAPE, Way(), alive=(0,))


def test_a_combine_that_cannot_be_done_is_refused_by_name_and_the_next_one_works() -> None:
    buffer, mine = alone(), inputs(0, 0, 8, SHAPE)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.topk_idx, 8, 5, use_fp8=False)
    _, _, dispatched_by_another, _, _ = alone().low_latency_dispatch(mine.x, mine.topk_idx, 8, 5)
    usual = {"x": recv_x, "topk_idx": mine.topk_idx, "topk_weights": mine.weights, "handle": handle}
    for said, asked in {
        "use_logfmt": {"use_logfmt": True},
        "combine_wait_recv_cost_stats": {"combine_wait_recv_cost_stats": torch.zeros(1, dtype=torch.int64)},
        "zero_copy: fill": {"zero_copy": True},
        "x: bfloat16": {"x": recv_x.float()},
        "topk_weights: float32": {"topk_weights": mine.weights.double()},
        "topk_idx: int64": {"topk_idx": mine.topk_idx[:-1]},
        "out: bfloat16": {"out": torch.zeros(8, 256)},
        "x: a tensor is wanted": {"x": None, "zero_copy": True},
        "topk_weights: it is on meta": {"topk_weights": mine.weights.to("meta")},
        "out: it is on meta": {"out": torch.zeros(8, 256, dtype=torch.bfloat16, device="meta")},
        "handle: what a dispatch returned is wanted, not a tuple": {"handle": tuple(handle)},
        "handle: what a dispatch returned is wanted, not a NoneType": {"handle": None},
        "handle: another buffer's dispatch": {"handle": dispatched_by_another},
    }.items():
        with pytest.raises(PhalanxError, match=said):
            buffer.low_latency_combine(**{**usual, **asked})
    assert buffer.low_latency_combine(**usual)[0].any()


def test_a_constructor_that_cannot_be_honoured_says_what_to_do() -> None:
    one = LocalCommunicator()
    for said, asked in {
        "low_latency_mode": {"communicator": one},
        "comm: ": {"comm": object(), "low_latency_mode": True},
        "exactly one of": {"low_latency_mode": True},
        "fp8_wire": {"communicator": one, "low_latency_mode": True, "fp8_wire": True, "device": "cpu"},
        "no HOST:PORT": {"store": "nowhere", "low_latency_mode": True},
        "'here:65536' is no HOST:PORT": {"store": "here:65536", "low_latency_mode": True},
        "rank, size: 2 is no rank of 2": {"store": "here:1", "rank": 2, "size": 2, "low_latency_mode": True},
        "peer_timeout_s": {"communicator": one, "low_latency_mode": True, "peer_timeout_s": float("nan")},
        "top_k: a whole number": {
            "store": HashStore(),
            "device": "cpu",
            "shape": Shape(8, 256, 0, 5),
            "low_latency_mode": True,
        },
    }.items():
        with pytest.raises(BadConfig, match=said):
            Buffer(**asked)


def test_masks_of_one_rank_and_the_ranks_that_cannot_be_masked() -> None:
    buffer, mask = alone(enable_shrink=True), torch.ones(1, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(mask)
    assert mask.tolist() == [0]
    for rank in (-1, 0, 1, "1"):
        with pytest.raises(BadRequest, match="rank_to_mask"):
            buffer.low_latency_update_mask_buffer(rank, True)
    with pytest.raises(BadRequest, match="mask_status: int32"):
        buffer.low_latency_query_mask_buffer(torch.ones(1))
    buffer.low_latency_clean_mask_buffer()
    buffer.clean_low_latency_buffer(8, 256, 5)
