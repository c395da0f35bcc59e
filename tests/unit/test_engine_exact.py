"""The engine on the real model: the same tokens in a batch or alone, in chunks, after a preemption, after a move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_doubles import token_ids

from phalanx.comm.cpu import CpuCommunicator
from phalanx.config import ServeConfig
from phalanx.engine.runner import limits_for
from phalanx.errors import BadConfig, PeerLost
from phalanx.messages import SamplingParams, Submit, TokenOut
from phalanx.model.config import ModelConfig
from phalanx.testing.solo import SoloEngine
from phalanx.testing.tiny import make_tiny
from phalanx.world import Member, Placement, View, World

NEW_TOKENS = 20
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "frequency_penalty": 0.2}


@pytest.fixture(scope="module", params=["mixtral-bfloat16", "qwen3-moe-bfloat16", "qwen3-moe-float32"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    arch, _, dtype = request.param.rpartition("-")
    torch.set_num_threads(1)
    path = make_tiny(tmp_path_factory.mktemp("model") / "m", arch, layers=2, experts=4, dtype=dtype)
    return ServeConfig(model=str(path), dtype=dtype, num_kv_blocks=64, max_num_batched_tokens=64, max_model_len=256)


@pytest.fixture(scope="module")
def requests() -> list[Submit]:
    return [submit(f"{kind}{i}", i) for i in range(5) for kind in ("greedy", "seeded")]


@pytest.fixture(scope="module")
def expected(served: ServeConfig, requests: list[Submit]) -> Iterator[dict[str, list[int]]]:
    """Each request alone, its prompt in one piece."""
    alone = SoloEngine(served)
    yield {each.request_id: alone.generate(each)[each.request_id].token_ids for each in requests}
    alone.close()


def submit(name: str, i: int, **changes: Any) -> Submit:
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, seed=i, ignore_eos=True, **(GREEDY if name.startswith("greedy") else SEEDED)
    )
    prompt = [(i * 37 + j * j) % 250 for j in range(5 + 9 * i)]
    return Submit(**{"request_id": name, "attempt": 0, "prompt_ids": prompt, "sampling": sampling, **changes})


def changed(config: ServeConfig, **changes: Any) -> ServeConfig:
    return ServeConfig(**{field: getattr(config, field) for field in config.__struct_fields__} | changes)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 512, "block_size": 8},
        {"max_num_seqs": 3, "enable_prefix_caching": False},
        {"num_kv_blocks": 5},
    ],
    ids=["together", "in chunks of 7", "in one piece", "three at a time", "preempted"],
)
def test_company_chunks_and_preemption_change_no_token(
    served: ServeConfig, requests: list[Submit], expected: dict[str, list[int]], limits: dict[str, Any]
) -> None:
    solo = SoloEngine(changed(served, **limits))
    got = {name: generated.token_ids for name, generated in solo.generate(*requests).items()}
    assert got == expected
    assert (solo.engine.load().preemptions > 0) == ("num_kv_blocks" in limits)
    assert all(len(set(tokens)) > 3 for tokens in got.values())  # the texts wander, so that a difference would show
    solo.close()


def test_a_moved_request_goes_on_with_the_same_tokens(
    served: ServeConfig, requests: list[Submit], expected: dict[str, list[int]]
) -> None:
    moved = [
        submit(each.request_id, i // 2, attempt=1, output_ids=expected[each.request_id][: 1 + i])
        for i, each in enumerate(requests)
    ]
    solo = SoloEngine(served)
    got = solo.generate(*moved)
    assert {each.request_id: each.output_ids + got[each.request_id].token_ids for each in moved} == expected
    solo.close()


def test_a_prefix_hit_changes_no_token(
    served: ServeConfig, requests: list[Submit], expected: dict[str, list[int]]
) -> None:
    solo = SoloEngine(changed(served, num_kv_blocks=256))
    solo.generate(*requests)
    assert {name: generated.token_ids for name, generated in solo.generate(*requests).items()} == expected
    assert solo.engine.load().prefix_hits > 0
    solo.close()


def test_steps_that_an_open_roll_call_interrupts_are_replayed_exactly(
    served: ServeConfig, requests: list[Submit], expected: dict[str, list[int]]
) -> None:
    solo = SoloEngine(served)
    solo.engine.accept(requests)
    outputs: dict[str, list[TokenOut]] = {}
    epoch = 1
    while solo.engine.has_work:
        epoch += 1
        solo.comm.interrupt(epoch)
        with pytest.raises(PeerLost) as lost:
            solo.engine.step()
        assert lost.value.epoch == epoch
        solo.comm.adopt(View(epoch, 1, (Member(0, 0),)))
        slots_LP = solo.world.placement.slots_LP
        world = World(View(epoch, 1, (Member(0, 0),)), Placement(slots_LP, slots_LP.shape[1], slots_LP.shape[1]))
        solo.engine.adopt(world, slots_LP[:, :, None])
        for token in solo.engine.step().tokens:
            outputs.setdefault(token.request_id, []).append(token)
    assert {name: token_ids(tokens) for name, tokens in outputs.items()} == expected
    solo.close()


def test_logprobs_do_not_depend_on_chunks_or_company(served: ServeConfig) -> None:
    def reported(config: ServeConfig, company: bool) -> tuple[Any, Any]:
        solo = SoloEngine(config)
        sampling = SamplingParams(max_tokens=6, temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True)
        messages = [Submit(request_id="x", attempt=0, prompt_ids=list(range(40, 71)), sampling=sampling)]
        solo.engine.accept([*(submit(f"seeded{i}", i) for i in range(3) if company), *messages])
        tokens, prompts = [], []
        while solo.engine.has_work:
            result = solo.engine.step()
            tokens += [token.logprobs for token in result.tokens if token.request_id == "x"]
            prompts += [told.entries for told in result.prompt_logprobs]
        solo.close()
        return tokens, prompts

    alone = reported(served, company=False)
    assert reported(changed(served, max_num_batched_tokens=5), company=True) == alone
    assert len(alone[0]) == 6
    assert [len(entries) for entries in alone[1]] == [30]


def test_the_warm_up_needs_no_peers_and_leaves_no_trace(
    served: ServeConfig, requests: list[Submit], expected: dict[str, list[int]]
) -> None:
    model = ModelConfig.read(served.model)
    dtype = getattr(torch, served.dtype)
    comm = CpuCommunicator(
        0, 1, incarnation=0, max_tokens=64, hidden=model.hidden, top_k=model.top_k, slots_per_rank=4, dtype=dtype,
        peer_timeout_s=2.0,
    )  # fmt: skip
    solo = SoloEngine(served, comm, warm_up=True)
    assert {name: generated.token_ids for name, generated in solo.generate(*requests).items()} == expected
    solo.close()
    comm.close()


def test_limits_that_the_model_cannot_keep_are_refused_by_the_flags_name(served: ServeConfig) -> None:
    model = ModelConfig.read(served.model)
    with pytest.raises(BadConfig, match="--max-model-len 5000 is more than the 4096"):
        limits_for(changed(served, max_model_len=5000), model, 1024)
    with pytest.raises(BadConfig, match="--kv-cache-memory-mb"):
        limits_for(changed(served, num_kv_blocks=0, kv_cache_memory_mb=1), model, 1 << 21)
    assert limits_for(changed(served, num_kv_blocks=0, kv_cache_memory_mb=1), model, 1 << 10).num_blocks == 1024
    assert limits_for(changed(served, max_model_len=0), model, 1024).max_model_len == 4096
