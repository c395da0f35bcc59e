"""Which experts a token wants, and in which slots they stand.

Shape suffixes: T tokens, K top-k, E experts, L MoE layers, W columns of the route table, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.moe.linear import Linear
from phalanx.world import IntArray


class RouteTable:
    """Expert -> global slot, for each layer: int32 [L, E, W] at a fixed address, written by `adopt` alone.

    Column w is a replica: the token at position p of its sequence uses column p % W. So which replica computes a token
    is a function of (token, layer, placement), and a replay asks the same one."""

    def __init__(self, num_layers: int, num_experts: int, width: int, device: torch.device | None = None) -> None:
        self.width = width
        self.table_LEW = torch.full((num_layers, num_experts, width), -1, dtype=torch.int32, device=device)
        self._flat_LX = self.table_LEW.view(num_layers, num_experts * width)

    def adopt(self, table_LEW: IntArray) -> None:
        """Route by `table_LEW` from now on. LOCAL."""
        self.table_LEW.copy_(torch.tensor(table_LEW))

    def slots(self, layer: int, experts_TK: Tensor, keys_T: Tensor) -> Tensor:
        """int32 [T, K]: the global slots of the chosen experts. keys_T: each token's position. LOCAL."""
        if self.width > 1:
            experts_TK = experts_TK * self.width + (keys_T % self.width).unsqueeze(1)
        return self._flat_LX[layer].take(experts_TK)


class Gate:
    """The router of one layer: softmax over all experts' logits, then the K largest."""

    def __init__(self, router: Linear, top_k: int, norm_topk: bool) -> None:
        self._router, self._top_k, self._norm_topk = router, top_k, norm_topk

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> (float32 weights [T, K], int64 experts [T, K]), the largest weight first. LOCAL."""
        probabilities_TE = torch.softmax(self._router(x_TD), dim=-1, dtype=torch.float32)
        weights_TK, experts_TK = torch.topk(probabilities_TE, self._top_k, dim=-1)
        if self._norm_topk:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, experts_TK
