"""The decoder on a device: the same model as `model.transformer`, launched and never waited for.

`forward` reads its batch from tables at fixed addresses (`device_tables`), so the launches of a decode can be captured
in a CUDA graph and replayed for every batch of that size. With `exact`, a token's bits depend on its sequence alone:
products and attention then come from our own kernels in one shape for all batches, and every token of a prefill is
attended as a decode would.

Shape suffixes: T tokens, D model width, V vocabulary, H Hkv heads, C head size, L layers, N rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.comm.launch import power_of_two
from phalanx.comm.received import RowNorm
from phalanx.model.config import ModelConfig
from phalanx.model.decode_options import DecodeCut, DecodeOptions, can_place
from phalanx.model.device_tables import (
    MERGES_AT,
    NUM_ITEMS,
    NUM_MERGES,
    NUM_PIECES,
    NUM_ROWS,
    PARTS,
    PIECES_AT,
    TableShape,
)
from phalanx.model.layers import DenseWeights, LayerWeights
from phalanx.model.tiles import Cut
from phalanx.moe.cuda import DeviceExperts, Tiling
from phalanx.moe.thin import Product, ThinProducts

SPLIT = 512
"""KV positions an item of a decode looks at; more with very long contexts, so that a row has at most 32 items."""

_MAX_SPLITS = 32
_BLOCK_N = 64
_MERGERS = 256
_PIECES_A_PROCESSOR = 3


@dataclass(frozen=True)
class PrefillTiling:
    """How attention cuts prefills. rows: queries a tile, of all heads that share keys; block: keys at once."""

    rows: int = 128
    block: int = 128
    warps: int = 8
    stages: int = 2

    @classmethod
    def of(cls, head_dim: int) -> PrefillTiling:
        """The tiling for heads of this size. LOCAL, pure.

        Blocks of 128 keys are the fastest behind a long context, where attention is most of a step; without one, of
        64 take a twentieth less of what is then little."""
        return cls() if head_dim <= 128 else cls(rows=64, block=32, warps=4, stages=2)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; for kernels that an interpreter runs, two. LOCAL."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def table_shape(
    config: ModelConfig, *, rows: int, sequences: int, max_model_len: int, block_size: int, num_blocks: int,
    exact: bool, device: torch.device, prefill: PrefillTiling | None = None,
) -> TableShape:  # fmt: skip
    """The tables for this model and these limits. prefill: instead of what suits the model. LOCAL."""
    split = SPLIT
    while split * _MAX_SPLITS < max_model_len:
        split *= 2
    group = config.num_heads // config.num_kv_heads
    prefill = prefill or PrefillTiling.of(config.head_dim)
    cut = Cut(
        tokens=max(1, prefill.rows // group),
        block=prefill.block,
        part=min(split, SPLIT),
        shares=max(1, _PIECES_A_PROCESSOR * processors(device) // config.num_kv_heads),
        window=config.sliding_window or 0,
    )
    return TableShape(
        rows=rows,
        sequences=sequences,
        max_blocks=-(-max_model_len // block_size),
        block_size=block_size,
        split=split,
        cut=None if exact else cut,
        spare_block=num_blocks,
    )


class DeviceKV:
    """Keys and values of all layers: [L, blocks + 1, 2, Hkv, block_size, C]; the last block is for padding."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (config.num_layers, num_blocks + 1, 2, config.num_kv_heads, block_size, config.head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the device: `rows` rows, padding included; tensors are views of the tables' words.

    num_rows, num_items: int32 [1]. pieces, merges: int32 [1] each, how many there are and where they begin in the tail.
    prefills: whether there may be pieces. tiling: how the experts cut their work. chosen: int64, the tokens that the
    batch before chose: token -1 - i is its i-th."""

    rows: int
    tokens: Tensor
    positions: Tensor
    kv_rows: Tensor
    blocks_at: Tensor
    items_at: Tensor
    tail: Tensor
    num_rows: Tensor
    num_items: Tensor
    pieces: tuple[Tensor, Tensor]
    merges: tuple[Tensor, Tensor]
    prefills: bool
    tiling: Tiling
    chosen: Tensor | None = None

    @classmethod
    def of(
        cls, words: Tensor, shape: TableShape, rows: int, prefills: bool, tiling: Tiling, chosen: Tensor | None = None
    ) -> DeviceBatch:
        """Views of `words`, which `device_tables.write` filled, or will, before what is launched with them runs.
        prefills: whether there may be any. LOCAL."""
        at = shape.offsets
        parts = {name: words[at[name] : at[name] + rows + (name == "items_at")] for name in PARTS}

        def word(index: int) -> Tensor:
            return words[index : index + 1]

        return cls(
            rows=rows, **parts, tail=words[at["tail"] :], num_rows=word(NUM_ROWS), num_items=word(NUM_ITEMS),
            pieces=(word(NUM_PIECES), word(PIECES_AT)), merges=(word(NUM_MERGES), word(MERGES_AT)),
            prefills=prefills and shape.cut is not None, tiling=tiling, chosen=chosen,
        )  # fmt: skip


class Linear(Protocol):
    """A product with weights."""

    def __call__(self, x_ND: Tensor, w_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, O]. LOCAL, launches only."""


class ExactLinear:
    """Products whose rows have the same bits in every batch: one shape of tile for all."""

    ROWS, OUTPUTS, DEPTH = 64, 64, 64

    def __init__(self) -> None:
        from phalanx.model import kernels

        self._code = kernels

    def __call__(self, x_ND: Tensor, w_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, O]. LOCAL, launches only."""
        rows, outputs = x_ND.shape[0], w_OD.shape[0]
        out = torch.empty(rows, outputs, dtype=x_ND.dtype, device=x_ND.device)
        self._code.linear_kernel[(-(-rows // self.ROWS), -(-outputs // self.OUTPUTS))](
            x_ND, w_OD, w_OD if bias_O is None else bias_O, out, rows, OUT=outputs, D=x_ND.shape[1], BM=self.ROWS,
            BN=self.OUTPUTS, BK=self.DEPTH, BIAS=bias_O is not None, num_warps=4, num_stages=4,
        )  # fmt: skip
        return out


class DeviceModel:
    """A whole model on one rank and one device. The weights must be on the device already (`to_device`)."""

    def __init__(
        self, config: ModelConfig, weights: DenseWeights, experts: DeviceExperts, kv: DeviceKV, shape: TableShape, *,
        exact: bool, prefill: PrefillTiling | None = None, options: DecodeOptions | None = None,
    ) -> None:  # fmt: skip
        """prefill: the one that `shape` was made with. options: instead of what is best."""
        from phalanx.model import kernels, placed_kernels, prefill_kernels

        self._options = options or DecodeOptions.best(exact=exact)
        assert not exact or self._options == DecodeOptions(), f"{self._options}: sums are taken in other orders"
        self._group = config.num_heads // config.num_kv_heads
        placeable = can_place(self._group, config.head_dim, shape.block_size, shape.split)
        self._placed = self._options.placed if placeable else 0
        self._placed_code, self._thin = placed_kernels, ThinProducts()
        self.config, self._weights, self._experts, self._kv, self._shape = config, weights, experts, kv, shape
        self._code, self._prefill_code = kernels, prefill_kernels
        self._linear: Linear = ExactLinear() if exact else _linear
        device, dtype = weights.embed.device, weights.embed.dtype
        self._device = device
        self._cos, self._sin = _angles(config, device)
        self._tile_m = power_of_two(max(16, self._group))
        self._prefill = prefill or PrefillTiling.of(config.head_dim)
        self._prefill_m = power_of_two(max(16, (shape.cut.tokens if shape.cut else 1) * self._group))
        self._sizes = {"H": config.num_heads, "C": config.head_dim, "CP": power_of_two(max(16, config.head_dim))}
        self._reads = {
            **self._sizes, "HKV": config.num_kv_heads, "BS": shape.block_size, "WINDOW": config.sliding_window or 0,
        }  # fmt: skip
        entries = shape.max_entries if shape.max_splits > 1 else 1
        self._sums = torch.empty(entries, config.num_heads, config.head_dim, dtype=torch.float32, device=device)
        self._peaks = torch.empty(entries, 2, config.num_heads, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max(self._placed, 1), config.num_kv_heads, dtype=torch.int32, device=device)
        self._processors = processors(device)
        self._programs = 4 * self._processors
        ones = torch.ones(config.head_dim, dtype=dtype, device=device)
        self._head_norms = [(w.q_norm, w.k_norm) if w.q_norm is not None else (ones, ones) for w in weights.layers]

    def forward(self, batch: DeviceBatch) -> Tensor:
        """[rows, D], the normed last hidden states; writes the batch's KV. COLLECTIVE, launches only."""
        weights, eps = self._weights, self.config.norm_eps
        x_TD = self.embed(batch.tokens, batch.chosen)
        normed_TD = self.norm(x_TD, None, weights.layers[0].input_norm, eps)
        norms = (*(layer.input_norm for layer in weights.layers[1:]), weights.norm)
        summed = batch.rows <= min(self._options.summed, self._experts.norms)
        moe = 0
        for index, layer in enumerate(weights.layers):
            attended = self._attention(index, layer, normed_TD, batch)
            normed_TD = self.norm(attended, x_TD, layer.post_norm, eps)
            if layer.router is None:
                normed_TD = self.norm(self._dense_mlp(layer, normed_TD), x_TD, norms[index], eps)
                continue
            logits = self._product(normed_TD, layer.router, None, self._options.router)
            out_TD = self._experts.forward(
                moe, normed_TD, logits, batch.positions, batch.num_rows, batch.tiling,
                RowNorm(x_TD, norms[index], eps) if summed else None,
            )  # fmt: skip
            normed_TD = out_TD if summed else self.norm(out_TD, x_TD, norms[index], eps)
            moe += 1
        return normed_TD

    def embed(self, tokens_T: Tensor, chosen: Tensor | None) -> Tensor:
        """[T, D]; tokens_T: int32, and -1 - i for the i-th that is `chosen`, int64. LOCAL, launches only."""
        embed, rows, width = self._weights.embed, tokens_T.shape[0], self.config.hidden
        x_TD = torch.empty(rows, width, dtype=embed.dtype, device=embed.device)
        self._code.embed_kernel[(rows,)](
            tokens_T, tokens_T if chosen is None else chosen, embed, x_TD, D=width, BLOCK=power_of_two(width),
            num_warps=4,
        )  # fmt: skip
        return x_TD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] in the run's type. LOCAL, launches only."""
        return self._linear(hidden_ND, self._weights.head)

    def norm(self, x: Tensor | Product, residual_TD: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of x [T, D], or of residual + x, which is then stored in the residual. LOCAL, launches only."""
        product = Product.of(x)
        rows, width = product.data.shape[-2:]
        out_TD = torch.empty(rows, width, dtype=weight.dtype, device=weight.device)
        residual = product.data if residual_TD is None else residual_TD
        self._code.norm_kernel[(rows,)](
            product.data, residual, weight, out_TD, eps, D=width, BLOCK=power_of_two(width),
            ADD=residual_TD is not None, PARTS=product.parts, num_warps=8 if width > 2048 or product.parts else 4,
        )  # fmt: skip
        return out_TD

    def _dense_mlp(self, layer: LayerWeights, x_TD: Tensor) -> Tensor:
        assert layer.w13 is not None
        assert layer.w2 is not None
        gate, up = self._linear(x_TD, layer.w13).chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, layer.w2)

    def _product(self, x_ND: Tensor, w_OD: Tensor, bias_O: Tensor | None, most: int) -> Product:
        """[N, D] -> [N, O], of up to `most` rows perhaps in parts, for a reader that can add them."""
        thin = self._thin(x_ND, w_OD) if bias_O is None and x_ND.shape[0] <= most else None
        return thin or Product(self._linear(x_ND, w_OD, bias_O))

    def _attention(self, index: int, layer: LayerWeights, normed_TD: Tensor, batch: DeviceBatch) -> Product:
        qkv_TX = self._linear(normed_TD, layer.qkv, layer.qkv_bias)
        return self._product(self.attend(index, qkv_TX, batch), layer.out, layer.out_bias, self._options.out)

    def attend(self, index: int, qkv_TX: Tensor, batch: DeviceBatch) -> Tensor:
        """[T, (H + 2 Hkv) C] -> [T, H C]; writes layer `index` of the KV. LOCAL, launches only."""
        config, kv, heads = self.config, self._kv.data[index], self.config.num_heads
        out = torch.empty(batch.rows, heads * config.head_dim, dtype=qkv_TX.dtype, device=qkv_TX.device)
        scale = config.head_dim**-0.5 * math.log2(math.e)
        if batch.rows <= self._placed and not batch.prefills:
            self._placed_decodes(index, qkv_TX, batch, out, scale)
            return out
        self._decodes(index, qkv_TX, batch, out, scale)
        if batch.prefills:
            how = self._prefill
            self._prefill_code.prefill_kernel[(self._programs,)](
                qkv_TX, batch.positions, batch.blocks_at, *batch.pieces, batch.tail, kv, out, self._sums, self._peaks,
                scale, **self._reads, BN=how.block, M=self._prefill_m, PROGRAMS=self._programs, num_warps=how.warps,
                num_stages=how.stages,
            )  # fmt: skip
        if self._shape.max_splits > 1:
            self._code.merge_kernel[(min(batch.rows, _MERGERS), heads)](
                *batch.merges, batch.tail, out, self._sums, self._peaks, **self._sizes, num_warps=1
            )
        return out

    def _placed_decodes(self, index: int, qkv_TX: Tensor, batch: DeviceBatch, out: Tensor, scale: float) -> None:
        """Place the keys and attend, all in one kernel: every row is a decode."""
        config, kv, shape = self.config, self._kv.data[index], self._shape
        heads = batch.rows * config.num_kv_heads
        cut = self._options.cut or DecodeCut.of(heads, config.head_dim, self._processors)
        programs = cut.programs * self._processors
        self._placed_code.placed_decode_kernel[(programs,)](
            qkv_TX, self._cos, self._sin, *self._head_norms[index], batch.tail, batch.num_items, kv, out, self._sums,
            self._peaks, self._arrived, config.norm_eps, scale,
            H=config.num_heads, HKV=config.num_kv_heads, G=power_of_two(max(8, self._group)), C=config.head_dim,
            BS=shape.block_size, SPLIT=shape.split, BLOCKS=power_of_two(max(8, shape.split // shape.block_size)),
            ITEMS=shape.max_items, SPLITS=shape.max_splits, W=cut.warps, WINDOW=config.sliding_window or 0,
            PROGRAMS=programs, NORM=config.qk_norm, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def _decodes(self, index: int, qkv_TX: Tensor, batch: DeviceBatch, out: Tensor, scale: float) -> None:
        """Place all keys, norm and turn the queries in `qkv_TX`, and attend what decodes."""
        config, kv = self.config, self._kv.data[index]
        self._code.place_kernel[(batch.rows, config.num_kv_heads)](
            qkv_TX, batch.positions, batch.kv_rows, self._cos, self._sin, *self._head_norms[index], kv,
            config.norm_eps, H=config.num_heads, HKV=config.num_kv_heads, GP=power_of_two(self._group),
            C=config.head_dim, HALF_P=power_of_two(config.head_dim // 2), BS=self._shape.block_size,
            NORM=config.qk_norm, num_warps=2,
        )  # fmt: skip
        self._code.decode_kernel[(self._programs,)](
            qkv_TX, batch.positions, batch.blocks_at, batch.items_at, batch.tail, batch.num_items, kv, out, self._sums,
            self._peaks, scale, **self._reads, M=self._tile_m, SPLIT=self._shape.split, BN=_BLOCK_N,
            PROGRAMS=self._programs, num_warps=4, num_stages=2,
        )  # fmt: skip


def _linear(x_ND: Tensor, w_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The library's product: the fastest, in an order of additions that depends on the number of rows."""
    return F.linear(x_ND, w_OD, bias_O)


def to_device(weights: DenseWeights, device: torch.device) -> DenseWeights:
    """The same weights on a device; what they were loaded from is not kept. LOCAL."""

    def moved(layer: LayerWeights) -> LayerWeights:
        tensors = {f.name: getattr(layer, f.name) for f in fields(layer)}
        return replace(layer, **{n: t.to(device).contiguous() for n, t in tensors.items() if t is not None})

    embed = weights.embed.to(device)
    return DenseWeights(
        embed=embed,
        layers=tuple(moved(layer) for layer in weights.layers),
        norm=weights.norm.to(device),
        head=embed if weights.head is weights.embed else weights.head.to(device),
    )


def _angles(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [positions, C / 2] cosines and sines, computed where the CPU model computes them."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    angles = torch.outer(torch.arange(config.max_position).float(), 1.0 / config.rope_theta**exponent)
    return angles.cos().contiguous().to(device), angles.sin().contiguous().to(device)
