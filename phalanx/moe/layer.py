"""One MoE layer: gate -> dispatch -> experts -> combine. The only place of a step where ranks meet.

Shape suffixes: T own tokens, N tokens received, M (token, slot) pairs received, K top-k, E experts, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.comm.base import Communicator, Dispatched
from phalanx.moe.experts import SlotBank
from phalanx.moe.gate import Gate, RouteTable


class LoadCounter:
    """This rank's tokens by layer and expert, for the planner. Layers only note what their gates chose; it is counted
    once a step, which costs a tenth of counting in every layer."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.load_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        """Only grows. Fixed address."""
        self._flat = self.load_LE.view(-1)
        self._first_L = (torch.arange(num_layers) * num_experts).view(-1, 1, 1)
        self._layers: list[int] = []
        self._chosen: list[Tensor] = []

    def note(self, layer: int, experts_TK: Tensor) -> None:
        """What the gate of a layer chose in the step in hand; T and K are the same in all layers. LOCAL."""
        self._layers.append(layer)
        self._chosen.append(experts_TK)

    def count(self) -> None:
        """The step is whole: count what was noted. LOCAL."""
        if self._chosen:
            keys = torch.stack(self._chosen) + self._first_L[self._layers]
            self._flat += torch.bincount(keys.view(-1), minlength=self._flat.shape[0])
        self.drop()

    def drop(self) -> None:
        """Forget what was noted. LOCAL."""
        self._layers.clear()
        self._chosen.clear()


class MoELayer:
    """MoE layer `layer` of one rank: its tokens go out to their experts' slots, everyone's come in to its own slots."""

    def __init__(
        self, layer: int, gate: Gate, bank: SlotBank, routes: RouteTable, comm: Communicator, counter: LoadCounter
    ) -> None:
        self._layer, self._gate, self._bank, self._routes, self._comm = layer, gate, bank, routes, comm
        self._counter = counter

    def forward(self, x_TD: Tensor, keys_T: Tensor) -> Tensor:
        """[T, D] -> [T, D]; T may be 0, the rank then only serves its peers. keys_T: positions. COLLECTIVE.

        The rows are weighed and added in float32 in the order of k, so that the sum does not depend on where experts
        stand."""
        weights_TK, experts_TK = self._gate(x_TD)
        self._counter.note(self._layer, experts_TK)
        dispatched = self._comm.dispatch(x_TD, self._routes.slots(self._layer, experts_TK, keys_T))
        y_TKD = self._comm.combine(self._run_experts(dispatched), dispatched)
        weighted_TKD = y_TKD * weights_TK.unsqueeze(2)
        sum_TD = weighted_TKD[:, 0]
        for k in range(1, weighted_TKD.shape[1]):
            sum_TD = sum_TD + weighted_TKD[:, k]
        return sum_TD.to(x_TD.dtype)

    def _run_experts(self, dispatched: Dispatched) -> Tensor:
        """[M, D]: each pair's row through its slot's expert, in the order of the pairs."""
        x_ND, slot_M = dispatched.x_ND, dispatched.slot_M
        if slot_M.shape[0] == 0:
            return x_ND.new_empty(0, x_ND.shape[1])
        order_M = torch.argsort(slot_M, stable=True)
        x_MD = x_ND.index_select(0, dispatched.row_M.index_select(0, order_M))
        parts, start = [], 0
        for slot, count in enumerate(torch.bincount(slot_M).tolist()):
            if count:
                parts.append(self._bank.expert(self._layer, slot)(x_MD[start : start + count]))
                start += count
        return torch.empty_like(x_MD).index_copy_(0, order_M, torch.cat(parts))
