"""`rebalance_experts` keeps the promises that callers of DeepSeek's and SGLang's functions rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from phalanx.elastic.replan import rebalance_experts
from phalanx.errors import TooFewSlots

ACTIVE = [None, [1] * 8, [0] + [1] * 7, [1] * 7 + [0], [1, 0, 0, 1, 1, 1, 0, 1]]


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize(("replicas", "experts"), [(48, 32), (64, 32), (80, 32), (64, 24)])
def test_the_three_tables_agree_with_each_other(
    active: list[int] | None, hierarchical: bool, replicas: int, experts: int
) -> None:
    weight = torch.rand(3, experts, generator=torch.Generator().manual_seed(1)) * 100
    mask = None if active is None else torch.tensor(active, dtype=torch.int32)
    alive = torch.ones(8, dtype=torch.bool) if mask is None else mask.bool()
    living = alive.repeat_interleave(replicas // 8)
    if int(living.sum()) < experts:
        with pytest.raises(TooFewSlots):
            rebalance_experts(weight, replicas, 4, 2, 8, mask, hierarchical)
        return
    phy2log, log2phy, logcnt = rebalance_experts(weight, replicas, 4, 2, 8, mask, hierarchical)
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    assert phy2log.shape == (3, replicas)
    assert logcnt.shape == (3, experts)
    assert log2phy.shape == (3, experts, int(logcnt.max()))
    assert int(logcnt.min()) >= 1
    assert (logcnt.sum(dim=1) == living.sum()).all()
    assert phy2log.min() >= 0
    assert phy2log.max() < experts
    for layer in range(3):
        referenced = set()
        for expert in range(experts):
            count = int(logcnt[layer, expert])
            slots = log2phy[layer, expert, :count].tolist()
            assert (log2phy[layer, expert, count:] == -1).all()
            assert all(int(phy2log[layer, s]) == expert and bool(living[s]) for s in slots)
            referenced |= set(slots)
        assert referenced == set(torch.nonzero(living).flatten().tolist())


def test_with_two_slots_for_each_expert_no_gpu_and_no_node_is_the_only_one_to_have_one() -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(2)) ** 4
    for groups, hierarchical in ((8, True), (1, False)):
        phy2log, _, _ = rebalance_experts(weight, 128, groups, 4, 16, None, hierarchical)
        for layer in phy2log:
            for per in (8, 32):
                holders = [{slot // per for slot in torch.nonzero(layer == e).flatten().tolist()} for e in range(64)]
                assert min(len(h) for h in holders) >= 2


def test_slots_that_only_a_second_copy_could_fill_are_labelled_and_referenced() -> None:
    phy2log, log2phy, logcnt = rebalance_experts(torch.ones(1, 4), 8, 1, 1, 1)
    assert sorted(phy2log[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert logcnt.tolist() == [[2, 2, 2, 2]]
    assert (log2phy >= 0).all()


def test_contradicting_sizes_are_refused() -> None:
    weight = torch.ones(1, 4)
    with pytest.raises(ValueError, match="multiple of num_gpus"):
        rebalance_experts(weight, 7, 1, 1, 2)
    with pytest.raises(ValueError, match="multiple of num_nodes"):
        rebalance_experts(weight, 6, 1, 2, 3)
    for active in (torch.ones(3, dtype=torch.int32), torch.ones(2, 1), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="active_ranks"):
            rebalance_experts(weight, 8, 1, 1, 2, active)
    with pytest.raises(ValueError, match="num_groups"):
        rebalance_experts(weight, 8, 0, 1, 2)
    for odd in (weight[0], weight[None], weight.to(torch.complex64)):
        with pytest.raises(ValueError, match="weight must be"):
            rebalance_experts(odd, 8, 1, 1, 2)
    for odd in (-weight, weight / 0):
        with pytest.raises(ValueError, match="not negative"):
            rebalance_experts(odd, 8, 1, 1, 2)


ODDITIES = [
    ("weight", None),
    ("weight", "abc"),
    ("weight", [[1.0, 2.0], [3.0]]),
    ("weight", torch.zeros(2, 0)),
    ("weight", torch.ones(2, 4).to_sparse()),
    ("weight", torch.full((2, 4), torch.nan)),
    ("weight", torch.full((2, 4), 1e308, dtype=torch.float64)),
    ("num_replicas", 8.0),
    ("num_replicas", "8"),
    ("num_replicas", -8),
    ("num_groups", None),
    ("num_nodes", 1.5),
    ("num_nodes", 0),
    ("num_gpus", "4"),
    ("num_gpus", -4),
    ("active_ranks", "1111"),
    ("active_ranks", {0, 1}),
    ("active_ranks", torch.ones(4, dtype=torch.complex64)),
    ("active_ranks", torch.tensor([1.0, torch.nan, 1.0, 1.0])),
]


@pytest.mark.parametrize(("name", "value"), ODDITIES)
def test_what_is_no_number_or_tensor_is_refused_by_its_name(name: str, value: object) -> None:
    good = {"weight": torch.ones(2, 4), "num_replicas": 8, "num_groups": 1, "num_nodes": 1, "num_gpus": 4}
    with pytest.raises(ValueError, match=name):
        rebalance_experts(**{**good, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8])
def test_weights_of_any_kind_give_the_plan_of_their_values(dtype: torch.dtype) -> None:
    weight = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = rebalance_experts(weight.float(), 24, 1, 1, 4)
    for given in (weight.to(dtype), weight.t().contiguous().t().to(dtype)):
        assert all(torch.equal(a, b) for a, b in zip(rebalance_experts(given, 24, 1, 1, 4), expected, strict=True))
    learned = weight.float().requires_grad_()
    assert torch.equal(rebalance_experts(learned, 24, 1, 1, 4)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float32, torch.bfloat16])
def test_the_mask_may_have_any_kind_of_numbers_and_all_but_one_may_be_dead(dtype: torch.dtype) -> None:
    mask = torch.tensor([0, 0, 1, 0]).to(dtype)
    phy2log, log2phy, logcnt = rebalance_experts(torch.rand(2, 8), 32, 2, 2, 4, mask)
    assert (log2phy[:, :, 0] // 8 == 2).all()
    assert (logcnt == 1).all()
    assert phy2log.shape == (2, 32)


def test_the_planner_itself_imports_no_torch() -> None:
    program = "import sys, phalanx.elastic.replan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
