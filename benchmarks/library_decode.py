"""The decode step of a Qwen3-MoE made of torch's parts alone, for benchmarks/baseline_gpu.py to time beside ours.

What one writes with the library at hand: attention is data-parallel, experts are spread over the ranks; every rank
gathers all tokens (NCCL all_gather), computes what its experts have to say to them (two `grouped_mm`), and a
reduce_scatter brings the sums home. Attention is torch's flash attention on a KV cache of fixed places a sequence.
Chains of small operations are compiled (`torch.compile`); the whole step is a CUDA graph.

Shapes: B sequences of this rank, N = R B of all, S experts here, F expert width, D model width, K top-k, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from phalanx.model.config import ModelConfig
from phalanx.model.layers import DenseWeights


class Exchange:
    """Between the ranks of the default process group."""

    def gather(self, x_BD: Tensor) -> Tensor:
        """[N, D]. COLLECTIVE."""
        out = torch.empty(dist.get_world_size() * x_BD.shape[0], x_BD.shape[1], dtype=x_BD.dtype, device=x_BD.device)
        dist.all_gather_into_tensor(out, x_BD)
        return out

    def reduce(self, y_ND: Tensor) -> Tensor:
        """[B, D], this rank's part of the sum of all. COLLECTIVE."""
        rows = y_ND.shape[0] // dist.get_world_size()
        out = torch.empty(rows, y_ND.shape[1], dtype=y_ND.dtype, device=y_ND.device)
        dist.reduce_scatter_tensor(out, y_ND)
        return out


class Alone:
    """One rank."""

    def gather(self, x_BD: Tensor) -> Tensor:
        """As it is."""
        return x_BD

    def reduce(self, y_ND: Tensor) -> Tensor:
        """As it is."""
        return y_ND


# -- chains of small operations ----------------------------------------------------------------------------------------


def add_norm(x_BD: Tensor, y_BD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its RMS norm."""
    total = x_BD + y_BD
    return total, F.rms_norm(total, weight.shape, weight, eps)


def place(
    qkv_BX: Tensor, q_norm: Tensor, k_norm: Tensor, cos_PC: Tensor, sin_PC: Tensor, positions_B: Tensor, eps: float,
    keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Norms and rotary embedding; keys and values go to their places in [B, P, Hkv, C]. The queries, [B, H, C]."""
    rows, size = qkv_BX.shape[0], q_norm.shape[0]
    kv_heads = keys.shape[2]
    heads = qkv_BX.shape[1] // size - 2 * kv_heads
    q, k, v = qkv_BX.view(rows, -1, size).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos_PC[positions_B][:, None], sin_PC[positions_B][:, None]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        low, high = F.rms_norm(x, weight.shape, weight, eps).float().chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    row = torch.arange(rows, device=qkv_BX.device)
    keys[row, positions_B] = turned(k, k_norm)
    values[row, positions_B] = v
    return turned(q, q_norm)


def route(
    logits_NE: Tensor, x_ND: Tensor, top_k: int, first: int, experts: int, scaled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the experts first..first+experts: the tokens' rows sorted by expert [N K, D], where each expert's rows end
    (int32 [S]), where each (token, k) stands among the rows, and its weight (0: not here)."""
    weights, chosen = torch.topk(torch.softmax(logits_NE.float(), 1), top_k, dim=1)
    if scaled:
        weights = weights / weights.sum(1, keepdim=True)
    local = chosen - first
    here = (local >= 0) & (local < experts)
    key = torch.where(here, local, experts).flatten()
    ordered, order = key.sort()
    ends = torch.searchsorted(ordered, torch.arange(experts, device=key.device), right=True).to(torch.int32)
    at = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=key.device))
    return x_ND[order // top_k], ends, at, torch.where(here, weights, 0.0)


def swiglu(up_MX: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = up_MX.chunk(2, dim=1)
    return F.silu(gate) * up


def gathered_sum(y_MD: Tensor, at: Tensor, weights_NK: Tensor) -> Tensor:
    """[N, D]: each token's rows times their weights; rows of experts elsewhere hold anything."""
    tokens, top_k = weights_NK.shape
    rows = y_MD[at].view(tokens, top_k, -1)
    w = weights_NK[..., None]
    return torch.where(w > 0, rows * w, 0.0).sum(1).to(y_MD.dtype)


@dataclass(frozen=True)
class Chains:
    """The chains above, compiled or as they are."""

    add_norm: Callable[..., Any]
    place: Callable[..., Any]
    route: Callable[..., Any]
    swiglu: Callable[..., Any]
    gathered_sum: Callable[..., Any]

    @classmethod
    def of(cls, transform: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Chains:
        """Each chain transformed."""
        return cls(*(transform(chain) for chain in (add_norm, place, route, swiglu, gathered_sum)))

    @classmethod
    def compiled(cls) -> Chains:
        """By torch's compiler: for the first size, for one, and for all others."""
        torch._dynamo.config.recompile_limit = 64
        return cls.of(torch.compile)

    @classmethod
    def plain(cls) -> Chains:
        """Operation by operation."""
        return cls.of(lambda chain: chain)


# -- attention ---------------------------------------------------------------------------------------------------------


def flash(q_BHC: Tensor, keys: Tensor, values: Tensor, lengths_B: Tensor) -> Tensor:
    """Torch's flash attention of one query a sequence over the first `lengths_B` places of [B, P, Hkv, C]; any lengths
    in one graph. CUDA only."""
    rows, places = keys.shape[:2]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q_BHC.device)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q_BHC, keys.flatten(0, 1), values.flatten(0, 1), starts, starts * places, 1, places, 0.0, False, False,
        seqused_k=lengths_B,
    )[0]  # fmt: skip
    return out


def masked(q_BHC: Tensor, keys: Tensor, values: Tensor, lengths_B: Tensor) -> Tensor:
    """The same by scaled_dot_product_attention: the heads of a group stand as queries of their KV head."""
    rows, heads, size = q_BHC.shape
    kv_heads = keys.shape[2]
    seen = torch.arange(keys.shape[1], device=keys.device)[None] < lengths_B[:, None]
    out = F.scaled_dot_product_attention(
        q_BHC.view(rows, kv_heads, heads // kv_heads, size), keys.transpose(1, 2), values.transpose(1, 2),
        attn_mask=seen[:, None, None],
    )  # fmt: skip
    return out.reshape(rows, heads, size)


def best_attention(device: torch.device) -> Callable[..., Tensor]:
    """`flash` where this torch has it in the form that is needed and it is right, else `masked`."""
    if device.type != "cuda":
        return masked
    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=g).to(torch.bfloat16)

    tried = draw(3, 8, 64), draw(3, 40, 2, 64), draw(3, 40, 2, 64), torch.tensor([1, 17, 40], device=device).int()
    try:
        got, want = flash(*tried), masked(*tried)
    except (RuntimeError, TypeError) as error:
        print(f"    flash attention over part of a cache: {str(error).splitlines()[0]}", flush=True)
        return masked
    return flash if float((got - want).float().norm() / want.float().norm()) < 1e-2 else masked


# -- the model ---------------------------------------------------------------------------------------------------------


class LibraryModel:
    """One rank's decode step."""

    def __init__(
        self, config: ModelConfig, weights: DenseWeights, w13_LSXD: Tensor, w2_LSDF: Tensor, *, rank: int, rows: int,
        places: int, exchange: Exchange | Alone, chains: Chains,
    ) -> None:  # fmt: skip
        """w13_LSXD, w2_LSDF: the experts rank * S.. of every layer. rows, places: sequences, and tokens of each, that
        the KV cache has room for."""
        self.config, self.weights = config, weights
        self._w13, self._w2 = w13_LSXD, w2_LSDF
        self._first = rank * w13_LSXD.shape[1]
        self._exchange, self._chains = exchange, chains
        device, dtype = weights.embed.device, weights.embed.dtype
        self.attention = best_attention(device)
        shape = (config.num_layers, rows, places, config.num_kv_heads, config.head_dim)
        self.keys = torch.randn(shape, dtype=dtype, device=device)
        self.values = torch.randn(shape, dtype=dtype, device=device)
        exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        angles = torch.outer(torch.arange(places, device=device).float(), config.rope_theta**-exponent)
        self._cos, self._sin = angles.cos(), angles.sin()

    def logits(self, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
        """[B, V] of one more token of every sequence. COLLECTIVE, launches only."""
        config, weights, do = self.config, self.weights, self._chains
        rows, eps = tokens_B.shape[0], config.norm_eps
        lengths_B = (positions_B + 1).to(torch.int32)
        x = weights.embed[tokens_B]
        normed = F.rms_norm(x, (config.hidden,), weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            keys, values = self.keys[index, :rows], self.values[index, :rows]
            qkv = F.linear(normed, layer.qkv)
            q = do.place(qkv, layer.q_norm, layer.k_norm, self._cos, self._sin, positions_B, eps, keys, values)
            attended = self.attention(q, keys, values, lengths_B).flatten(1)
            x, normed = do.add_norm(x, F.linear(attended, layer.out), layer.post_norm, eps)
            assert layer.router is not None
            following = weights.layers[index + 1].input_norm if index + 1 < config.num_layers else weights.norm
            x, normed = do.add_norm(x, self._experts(index, normed, layer.router), following, eps)
        return F.linear(normed, weights.head)

    def _experts(self, index: int, x_BD: Tensor, router: Tensor) -> Tensor:
        x_ND = self._exchange.gather(x_BD)
        y_ND = grouped_experts(
            x_ND, F.linear(x_ND, router), self._w13[index], self._w2[index], self._chains, top_k=self.config.top_k,
            first=self._first, scaled=self.config.norm_topk,
        )  # fmt: skip
        return self._exchange.reduce(y_ND)


def grouped_experts(
    x_ND: Tensor, logits_NE: Tensor, w13_SXD: Tensor, w2_SDF: Tensor, do: Chains, *, top_k: int, first: int,
    scaled: bool,
) -> Tensor:  # fmt: skip
    """[N, D]: what the experts first..first+S add to each token. LOCAL, launches only."""
    rows_MD, ends_S, at, weights_NK = do.route(logits_NE, x_ND, top_k, first, w13_SXD.shape[0], scaled)
    y_MD = two_products(rows_MD, w13_SXD, w2_SDF, ends_S, do)
    out: Tensor = do.gathered_sum(y_MD, at, weights_NK)
    return out


def two_products(rows_MD: Tensor, w13_SXD: Tensor, w2_SDF: Tensor, ends_S: Tensor, do: Chains) -> Tensor:
    """[M, D]: rows sorted by expert through their experts. LOCAL, launches only."""
    up_MX = F.grouped_mm(rows_MD, w13_SXD.transpose(1, 2), offs=ends_S)
    return F.grouped_mm(do.swiglu(up_MX), w2_SDF.transpose(1, 2), offs=ends_S)
