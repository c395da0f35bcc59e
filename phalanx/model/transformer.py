"""The decoder: embeddings, layers of attention and experts, head. One class for Qwen3-MoE and Mixtral.

Shape suffixes: T tokens, D model width, V vocabulary, E experts, L MoE layers, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.comm.base import Communicator
from phalanx.model.attention import Attention, AttentionPlan, ForwardBatch, KVStore, grouped_queries
from phalanx.model.config import ModelConfig
from phalanx.model.layers import DenseWeights, LayerWeights, RmsNorm, Rotary
from phalanx.moe.experts import SlotBank
from phalanx.moe.gate import Gate, RouteTable
from phalanx.moe.layer import LoadCounter, MoELayer
from phalanx.moe.linear import Checked, Linear, Products, SwiGlu, choose, do

_PACKED_A_STEP = 1
"""Experts that a step packs beside its work: about a millisecond, so that a recovery's own steps stay short."""


class Transformer:
    """A whole model on one rank: dense weights of its own, experts behind `routes` and `comm`.

    EXACT: a token's hidden state, KV and logits have the same bits whatever the batch, the chunking, prefill or decode,
    the rank and the replica (docs/assumptions says on what this rests)."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseWeights,
        bank: SlotBank,
        routes: RouteTable,
        comm: Communicator,
        dtype: torch.dtype,
        checked: Checked = do,
    ) -> None:
        """checked: see `moe.linear.choose`."""
        self.config = config
        self._comm, self._bank = comm, bank
        self._embed = weights.embed
        self._norm = RmsNorm(weights.norm, config.norm_eps)
        products = choose(_product_shapes(config), dtype, checked)
        bank.products = products
        self._head = Linear(weights.head, None, products)
        self._rotary = Rotary(config.head_dim, config.rope_theta, config.max_position)
        self._attention = Attention(config, dtype)
        self._counter = LoadCounter(config.num_moe_layers, config.num_experts)
        self.load_LE = self._counter.load_LE
        """Tokens that this rank's own batches sent to each expert in whole forward passes; it only grows."""
        self._layers: list[_Layer] = []
        for index, layer in enumerate(weights.layers):
            mlp: MoELayer | SwiGlu
            if layer.router is not None:
                moe = config.moe_layers.index(index)
                gate = Gate(Linear(layer.router, None, products), config.top_k, config.norm_topk)
                mlp = MoELayer(moe, gate, bank, routes, comm, self._counter)
            else:
                assert layer.w13 is not None
                assert layer.w2 is not None
                mlp = SwiGlu(layer.w13, layer.w2, products, packed=True)
            self._layers.append(_Layer(config, index, layer, products, self._attention, mlp))

    def forward(self, batch: ForwardBatch, kv: KVStore) -> Tensor:
        """[T, D], the normed last hidden states; writes the batch's KV. COLLECTIVE, also with T = 0.

        Stops early, with a result that means nothing, once the communicator has lost a peer: the step is not committed.
        """
        x_TD = self._embed.index_select(0, batch.token_ids_T)
        positions_T = batch.positions_T
        plan = self._attention.plan(batch, kv) if positions_T.shape[0] else None
        cos_sin = self._rotary.at(positions_T)
        for layer in self._layers:
            if self._comm.failed:
                break
            x_TD = layer.forward(x_TD, positions_T, cos_sin, plan, kv)
        if self._comm.failed:
            self._counter.drop()
        else:
            self._counter.count()
        self._bank.pack(_PACKED_A_STEP)
        return self._norm(x_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]. LOCAL."""
        return self._head(hidden_ND).float()


class _Layer:
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: LayerWeights,
        products: Products,
        attention: Attention,
        mlp: MoELayer | SwiGlu,
    ) -> None:
        self._index, self._attention, self._mlp = index, attention, mlp
        self._head_dim = config.head_dim
        self._turned = (config.num_heads + config.num_kv_heads) * config.head_dim
        width = config.num_heads * config.head_dim
        self._input_norm = RmsNorm(weights.input_norm, config.norm_eps)
        self._post_norm = RmsNorm(weights.post_norm, config.norm_eps)

        def reordered(qkv: Tensor) -> Tensor:
            return torch.cat([grouped_queries(config, qkv[:width]), qkv[width:]])

        bias = None if weights.qkv_bias is None else reordered(weights.qkv_bias)
        self._qkv = Linear(reordered(weights.qkv), bias, products)
        self._out = Linear(grouped_queries(config, weights.out.t()).t().contiguous(), weights.out_bias, products)
        self._qk_norm: _HeadNorm | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._qk_norm = _HeadNorm(weights.q_norm, weights.k_norm, config)

    def forward(
        self,
        x_TD: Tensor,
        positions_T: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        plan: AttentionPlan | None,
        kv: KVStore,
    ) -> Tensor:
        if plan is not None:
            qkv_TX = self._qkv(self._input_norm(x_TD))
            qk_THC = qkv_TX[:, : self._turned].view(x_TD.shape[0], -1, self._head_dim)
            if self._qk_norm is not None:
                self._qk_norm.apply_(qk_THC)
            Rotary.turn_(qk_THC, cos_sin)
            x_TD = x_TD + self._out(self._attention.forward(self._index, qkv_TX, plan, kv))
        normed_TD = self._post_norm(x_TD)
        if isinstance(self._mlp, MoELayer):
            return x_TD + self._mlp.forward(normed_TD, positions_T)
        return x_TD + self._mlp(normed_TD) if plan is not None else x_TD


class _HeadNorm:
    """RMS norm of each query head and each key head by their own weights, in one pass."""

    def __init__(self, q_norm: Tensor, k_norm: Tensor, config: ModelConfig) -> None:
        rows = [q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)]
        self._weight_HC = torch.cat(rows).contiguous()
        self._norm = RmsNorm(torch.ones_like(q_norm), config.norm_eps)

    def apply_(self, qk_THC: Tensor) -> None:
        qk_THC.copy_(self._norm(qk_THC).mul_(self._weight_HC))


def _product_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every product with weights in this model."""
    heads = config.num_heads * config.head_dim
    shapes = [
        (heads + 2 * config.num_kv_heads * config.head_dim, config.hidden),
        (config.hidden, heads),
        (config.num_experts, config.hidden),
        (2 * config.expert_width, config.hidden),
        (config.hidden, config.expert_width),
        (config.vocab_size, config.hidden),
    ]
    if config.num_moe_layers < config.num_layers:
        shapes += [(2 * config.dense_width, config.hidden), (config.hidden, config.dense_width)]
    return shapes
