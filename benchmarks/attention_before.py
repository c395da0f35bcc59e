"""The attention of decodes that served before: 4 warps share 64 keys. See `phalanx.model.placed_kernels`."""
# mypy: disable-error-code="attr-defined,no-untyped-def,no-untyped-call,misc,untyped-decorator,no-any-return"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.comm.launch import power_of_two
from phalanx.model.cuda import DeviceBatch, DeviceModel, processors
from phalanx.model.kernels import _lowest, _walk


@triton.jit
def _turned(
    qkv, at, inside, cos, sin, q_norm, k_norm, is_key, eps, C: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Heads that begin at `at` [M] of `qkv`: normed, rounded, turned by the angles of one position. [M, C].

    cos, sin: where the [C / 2] of that position stand. Each element is computed with its partner, half a head away."""
    c = tl.arange(0, C)
    partner = (c + C // 2) % C
    kind: tl.constexpr = qkv.dtype.element_ty
    x = tl.load(qkv + at[:, None] + c[None, :], mask=inside[:, None], other=0.0)
    y = tl.load(qkv + at[:, None] + partner[None, :], mask=inside[:, None], other=0.0)
    if NORM:
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / C + eps)[:, None]
        x_weight = tl.where(is_key[:, None], tl.load(k_norm + c)[None, :], tl.load(q_norm + c)[None, :])
        y_weight = tl.where(is_key[:, None], tl.load(k_norm + partner)[None, :], tl.load(q_norm + partner)[None, :])
        x = ((wide * scale).to(kind).to(tl.float32) * x_weight.to(tl.float32)).to(kind)
        y = ((y.to(tl.float32) * scale).to(kind).to(tl.float32) * y_weight.to(tl.float32)).to(kind)
    side = tl.where(c < C // 2, -1.0, 1.0) * tl.load(sin + c % (C // 2))
    out = x.to(tl.float32) * tl.load(cos + c % (C // 2))[None, :] + y.to(tl.float32) * side[None, :]
    return out.to(kind)


@triton.jit
def placed_decode_kernel(
    qkv, positions, kv_rows, cos, sin, q_norm, k_norm, first_blocks, first_items, tail, num_items, kv, out, sums,
    peaks, eps, scale,
    H: tl.constexpr, HKV: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, PROGRAMS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """See `kernels.decode_kernel` and `place_kernel`; qkv: [T, (H + 2 Hkv) C]. C is a power of two, M greater
    than the query heads of a KV head. Grid: PROGRAMS.

    Rows that have no items, which pad a captured batch, place nothing."""
    G: tl.constexpr = H // HKV
    kind: tl.constexpr = out.dtype.element_ty
    g = tl.arange(0, M)
    c = tl.arange(0, C)
    for work in range(tl.program_id(0), tl.load(num_items) * HKV, PROGRAMS):
        item = work // HKV
        h = work % HKV
        row = tl.load(tail + 8 * item)
        split = tl.load(tail + 8 * item + 1)
        position = tl.load(positions + row)
        start = row.to(tl.int64) * ((H + 2 * HKV) * C)
        cos_at = cos + position.to(tl.int64) * (C // 2)
        sin_at = sin + position.to(tl.int64) * (C // 2)
        kv_row = tl.load(kv_rows + row).to(tl.int64)
        place = kv + (kv_row // BS) * (2 * HKV * BS * C) + h * (BS * C) + (kv_row % BS) * C
        ours = position // SPLIT == split
        value_at = start + (H + HKV + h) * C + c
        value_C = tl.load(qkv + value_at)
        # Queries, and as one row more the new key, which is then a query that nobody asks for.
        at = start + tl.where(g < G, h * G + g, H + h) * C
        q_MC = _turned(qkv, at, g <= G, cos_at, sin_at, q_norm, k_norm, g == G, eps, C, NORM)
        tl.store(place + c[None, :] + 0 * g[:, None], q_MC, mask=(ours & (g == G))[:, None])
        tl.store(place + HKV * BS * C + c, value_C, mask=ours & (c < C))
        tl.debug_barrier()  # the new key is read below, by other threads
        inside = (g < G)[:, None] & (c < C)[None, :]
        heads = (h * G + g)[:, None] * C + c[None, :]
        sum_MC, greatest_M, weight_M = _walk(
            q_MC, position + tl.zeros([M], tl.int32), tail, tl.load(first_blocks + row), kv, h,
            _lowest(position, split * SPLIT, BN, WINDOW), tl.minimum((split + 1) * SPLIT, position + 1), scale,
            HKV, C, CP, M, BS, BN, WINDOW,
        )  # fmt: skip
        if tl.load(first_items + row + 1) - tl.load(first_items + row) == 1:
            tl.store(out + row.to(tl.int64) * (H * C) + heads, (sum_MC / weight_M[:, None]).to(kind), mask=inside)
        else:
            tl.store(sums + tl.cast(item, tl.int64) * (H * C) + heads, sum_MC, mask=inside)
            peak = peaks + tl.cast(item, tl.int64) * (2 * H) + h * G + g
            tl.store(peak, greatest_M, mask=g < G)
            tl.store(peak + H, weight_M, mask=g < G)


class ModelBefore(DeviceModel):
    """A model whose decodes are attended by the kernel above; contexts in several splits by `merge_kernel` as well."""

    def attend(self, index: int, qkv_TX: Tensor, batch: DeviceBatch) -> Tensor:
        """See DeviceModel. LOCAL, launches only."""
        if batch.rows > self._options.placed or batch.prefills:
            return super().attend(index, qkv_TX, batch)
        config, sums = self.config, (self._sums, self._peaks)
        out = torch.empty(batch.rows, config.num_heads * config.head_dim, dtype=qkv_TX.dtype, device=qkv_TX.device)
        programs = 4 * processors(qkv_TX.device)
        placed_decode_kernel[(programs,)](
            qkv_TX, batch.positions, batch.kv_rows, self._cos, self._sin, *self._head_norms[index], batch.blocks_at,
            batch.items_at, batch.tail, batch.num_items, self._kv.data[index], out, *sums, config.norm_eps,
            config.head_dim**-0.5 * math.log2(math.e), **self._reads, BN=64, SPLIT=self._shape.split,
            PROGRAMS=programs, num_warps=4, num_stages=2, M=power_of_two(max(16, self._group + 1)),
            NORM=config.qk_norm,
        )  # fmt: skip
        if self._shape.max_splits > 1:
            self._code.merge_kernel[(min(batch.rows, 256), config.num_heads)](
                *batch.merges, batch.tail, out, *sums, **self._sizes, num_warps=1
            )
        return out
