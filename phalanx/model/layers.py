"""The weights that every rank holds, and the small layers: norm and rotary embedding.

Shape suffixes: T tokens, D model width, V vocabulary, H heads, C head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer without its experts. `router` is set in an MoE layer, `w13` and `w2` in a dense one."""

    input_norm: Tensor
    qkv: Tensor
    """[(H + 2 Hkv) C, D]: the rows of q, then k, then v."""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    """[D, H C]"""
    out_bias: Tensor | None
    post_norm: Tensor
    router: Tensor | None
    w13: Tensor | None
    w2: Tensor | None


@dataclass(frozen=True)
class DenseWeights:
    """All of a model but its experts."""

    embed: Tensor
    """[V, D]"""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    """[V, D]"""

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> DenseWeights:
        """Put together what `Checkpoint.dense_parts` took apart. LOCAL."""
        by_layer: dict[int, dict[str, Any]] = {}
        for name, tensor in parts.items():
            if name.startswith("layers."):
                _, layer, field = name.split(".")
                by_layer.setdefault(int(layer), dict.fromkeys(f.name for f in fields(LayerWeights)))[field] = tensor
        return cls(
            embed=parts["embed"],
            layers=tuple(LayerWeights(**by_layer[i]) for i in range(len(by_layer))),
            norm=parts["norm"],
            head=parts.get("head", parts["embed"]),  # tied: the embedding is the head
        )


class RmsNorm:
    """x / rms(x) * weight over the last dimension, in float32 within."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._shape = tuple(weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]. LOCAL."""
        return F.rms_norm(x, self._shape, self._weight, self._eps)


class Rotary:
    """Rotary position embedding over halves: (a, b) -> (a cos - b sin, b cos + a sin), in float32."""

    def __init__(self, head_dim: int, theta: float, max_position: int) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        angles = torch.outer(torch.arange(max_position).float(), 1.0 / theta**exponent)
        self._cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
        self._sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)  # the sign of `rotate half` is in the table

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, 1, C] for these positions, to be used by every layer of a step. LOCAL."""
        return self._cos.index_select(0, positions_T).unsqueeze(1), self._sin.index_select(0, positions_T).unsqueeze(1)

    @staticmethod
    def turn_(x_THC: Tensor, cos_sin: tuple[Tensor, Tensor]) -> None:
        """Turn [T, H, C] in place. LOCAL."""
        cos, sin = cos_sin
        x_THC.copy_((x_THC * cos).add_(x_THC.roll(x_THC.shape[2] // 2, dims=-1) * sin))
