"""The MoE layer: gate, routes, slots and the weighted sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phalanx.comm.local import LocalCommunicator
from phalanx.moe.experts import SlotBank, digest
from phalanx.moe.gate import Gate, RouteTable
from phalanx.moe.layer import LoadCounter, MoELayer
from phalanx.moe.linear import Linear, Products

EXPERTS, HIDDEN, WIDTH = 6, 16, 24


def gate(top_k: int, norm_topk: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Gate, torch.Tensor]:
    w = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    return Gate(Linear(w, None, Products.usual(dtype)), top_k, norm_topk), w


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_the_gate_takes_the_most_likely_experts_in_order():
    chosen, w = gate(3, norm_topk=False)
    x = tokens(10)
    weights, experts = chosen(x)
    expected, order = torch.softmax(x @ w.T, dim=-1).sort(dim=-1, descending=True)
    assert torch.equal(experts, order[:, :3])
    assert torch.allclose(weights, expected[:, :3], atol=1e-6)
    assert weights.dtype is torch.float32


def test_renormalised_weights_sum_to_one_and_keep_their_ratios():
    x = tokens(10)
    raw, _ = gate(3, norm_topk=False)[0](x)
    scaled, _ = gate(3, norm_topk=True)[0](x)
    assert torch.allclose(scaled.sum(dim=-1), torch.ones(10))
    assert torch.allclose(scaled, raw / raw.sum(dim=-1, keepdim=True))


def test_ties_are_broken_the_same_way_in_any_batch():
    rows = torch.randint(0, 2, (200, HIDDEN), generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.ones(EXPERTS, HIDDEN, dtype=torch.bfloat16)
    w[3:] = 0.5
    tied = Gate(Linear(w, None, Products.usual(torch.bfloat16)), 4, True)
    weights, experts = tied(rows)
    for i in range(200):
        alone_weights, alone_experts = tied(rows[i : i + 1])
        assert torch.equal(alone_experts[0], experts[i])
        assert torch.equal(alone_weights[0], weights[i])


def test_routes_pick_the_column_of_the_tokens_position():
    routes = RouteTable(2, EXPERTS, 3)
    table = np.arange(2 * EXPERTS * 3, dtype=np.int32).reshape(2, EXPERTS, 3)
    routes.adopt(table)
    experts = torch.tensor([[0, 5], [5, 2], [1, 1]])
    keys = torch.tensor([0, 4, 8])
    slots = routes.slots(1, experts, keys)
    assert slots.dtype is torch.int32
    assert slots.tolist() == [[table[1, 0, 0], table[1, 5, 0]], [table[1, 5, 1], table[1, 2, 1]], [table[1, 1, 2]] * 2]


def test_adopting_routes_writes_the_table_in_place():
    routes = RouteTable(1, EXPERTS, 1)
    address = routes.table_LEW.data_ptr()
    assert (routes.table_LEW == -1).all()
    routes.adopt(np.full((1, EXPERTS, 1), 7, np.int32))
    assert routes.table_LEW.data_ptr() == address
    assert (routes.table_LEW == 7).all()


class Rig:
    """One MoE layer (of two) on one rank, its experts in shuffled slots, some twice."""

    def __init__(self, top_k: int = 3, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(9)
        self.w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator).to(dtype)
        self.w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator).to(dtype)
        self.held = [4, 0, 2, 5, 1, 3, 0, 4]
        self.bank = SlotBank(2, len(self.held), HIDDEN, WIDTH, dtype)
        for slot, expert in enumerate(self.held):
            w13, w2 = self.bank.weights(1, slot)
            w13.copy_(self.w13[expert])
            w2.copy_(self.w2[expert])
            self.bank.mark(1, slot, expert, digest(self.bank.slot_bytes(1, slot)))
        self.routes = RouteTable(2, EXPERTS, 2)
        homes = [[s for s, held in enumerate(self.held) if held == e] for e in range(EXPERTS)]
        table = np.array([[home[0], home[-1]] for home in homes], np.int32)
        self.routes.adopt(np.stack([np.full_like(table, -1), table]))
        self.gate, _ = gate(top_k, dtype=dtype)
        self.counter = LoadCounter(2, EXPERTS)
        self.layer = MoELayer(1, self.gate, self.bank, self.routes, LocalCommunicator(), self.counter)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = self.gate(x)
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t in range(x.shape[0]):
            for weight, e in zip(weights[t].double(), experts[t].tolist(), strict=True):
                gate, up = (self.w13[e].double() @ x[t].double()).chunk(2)
                out[t] += weight * (self.w2[e].double() @ (F.silu(gate) * up))
        return out


def test_a_token_gets_the_weighted_sum_of_its_experts():
    rig = Rig()
    x = tokens(50)
    out = rig.layer.forward(x, torch.arange(50))
    assert torch.allclose(out.double(), rig.expected(x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_alone_has_the_bits_it_has_in_a_batch_on_either_replica(dtype):
    rig = Rig(dtype=dtype)
    x = tokens(40).to(dtype)
    out = rig.layer.forward(x, torch.zeros(40, dtype=torch.int64))
    for t in range(40):
        for key in (0, 1):
            assert torch.equal(rig.layer.forward(x[t : t + 1], torch.tensor([key]))[0], out[t])


def test_the_load_grows_by_the_tokens_of_every_step_that_is_whole():
    rig = Rig()
    x = tokens(30)
    _, experts = rig.gate(x)
    counts = torch.bincount(experts.flatten(), minlength=EXPERTS)
    for _ in range(2):
        rig.layer.forward(x, torch.arange(30))
        rig.counter.count()
    rig.layer.forward(x, torch.arange(30))
    rig.counter.drop()
    rig.counter.count()
    assert torch.equal(rig.counter.load_LE[1], 2 * counts)
    assert not rig.counter.load_LE[0].any()


def test_no_tokens_make_no_rows():
    rig = Rig()
    assert rig.layer.forward(tokens(0), torch.zeros(0, dtype=torch.int64)).shape == (0, HIDDEN)


def test_a_refilled_slot_computes_its_new_expert_also_when_the_old_one_was_packed():
    rig = Rig(dtype=torch.bfloat16)
    x = tokens(5).bfloat16()
    before = rig.layer.forward(x, torch.zeros(5, dtype=torch.int64))
    rig.bank.pack()
    assert torch.equal(rig.layer.forward(x, torch.zeros(5, dtype=torch.int64)), before)
    rig.w13[:] = rig.w13.flip(0)
    rig.w2[:] = rig.w2.flip(0)
    for slot, expert in enumerate(rig.held):
        new = torch.cat([rig.w13[expert].flatten(), rig.w2[expert].flatten()]).view(torch.uint8).numpy()
        rig.bank.slot_bytes(1, slot)[:] = new
        rig.bank.mark(1, slot, expert, digest(new))
    after = rig.layer.forward(x, torch.zeros(5, dtype=torch.int64))
    assert not torch.equal(after, before)
    assert torch.allclose(after.double(), rig.expected(x), atol=2.0, rtol=0.05)
    rig.bank.pack()
    assert torch.equal(rig.layer.forward(x, torch.zeros(5, dtype=torch.int64)), after)


def test_packing_goes_in_portions_and_takes_each_expert_once():
    rig = Rig(dtype=torch.bfloat16)
    if not rig.bank.products.packed:
        pytest.skip("this machine gains nothing from packing")
    assert [rig.bank.pack(3) for _ in range(4)] == [3, 3, 2, 0]
    rig.bank.clear(1, 0)
    assert rig.bank.pack() == 0
    rig.bank.mark(1, 0, 4, 1)
    assert rig.bank.pack() == 1
