"""Paged attention whose every product has a shape that depends on a token's position and on nothing else.

That is what makes it exact. Kernels pick their order of additions by the shapes of a product, so a prefill and a decode
of the same token, or two chunkings, or two batches, would differ in the last bits. Here a token at position p always
stands in tile p // c at row p % c, where c (`tile_tokens`) is a constant of the model, and its tile always looks at
`kv_length` KV positions, the tile's end rounded up by a fixed rule, of which the ones it must not see are masked.
Whatever else is in the batch only adds more tiles. A tile of a decode has one row that is wanted; the others are zeros.

The G query heads that share a KV head stand in one tile as G rows a token. To make that a view and no copy, queries are
laid out [T, G, Hkv, C] (`grouped_queries` reorders the weights for it at load).

Shape suffixes: T tokens, B tiles, c tokens a tile, G query heads a KV head, H Hkv KV heads, C head size,
N KV positions.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.errors import BadConfig
from phalanx.model.config import ModelConfig

_TILE_ROWS = 8
_SHORT_STEP, _SHORT_MAX, _LONG_STEP = 64, 256, 512
_MAX_MASK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class SequenceSlice:
    """Rows start..start+length of a flat batch: the tokens at positions context..context+length-1 of one sequence,
    whose KV lies in `blocks` (int32 block ids; block i holds positions i*block_size and on)."""

    start: int
    length: int
    context: int
    blocks: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one step on one rank: ids and positions int64 [T], and which rows belong to which sequence."""

    token_ids_T: Tensor
    positions_T: Tensor
    slices: tuple[SequenceSlice, ...]


class KVStore:
    """Keys and values of all layers in blocks of `block_size` tokens: data [L, blocks + 1, block_size, 2, Hkv, C].

    Storage only; who owns which block is the engine's business. The block after the last one stays zero and pads short
    sequences."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        """Raises BadConfig when there is not so much address space."""
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (config.num_layers, num_blocks + 1, block_size, 2, config.num_kv_heads, config.head_dim)
        # Zeros from the system, page by page as they are touched: neither start nor memory pays for unused blocks, and
        # a newcomer need not wait for them. Not from numpy, which asks for huge pages: a step that touches a new one in
        # each of 30 layers waits 0.2 s for them to be zeroed.
        size = math.prod(shape) * dtype.itemsize
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError):
            raise BadConfig(
                f"a KV cache of {num_blocks} blocks takes {size / 1e9:.1f} GB, which this host does not give: lower "
                "--num-kv-blocks or --kv-cache-memory-mb"
            ) from None
        self.data = torch.frombuffer(pages, dtype=dtype).view(shape)
        self._rows = self.data.view(config.num_layers, (num_blocks + 1) * block_size, -1)
        self._blocks = self.data.view(config.num_layers, num_blocks + 1, -1)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """What one block takes in all layers together. LOCAL."""
        return config.kv_bytes(block_size, dtype.itemsize)

    def write(self, layer: int, rows_T: Tensor, kv_TX: Tensor) -> None:
        """Put [T, 2 Hkv C] at these rows (block * block_size + offset). LOCAL."""
        self._rows[layer].index_copy_(0, rows_T, kv_TX)

    def read(self, layer: int, blocks: Tensor) -> Tensor:
        """A copy of these blocks: [len(blocks), block_size * 2 Hkv C]. LOCAL."""
        return self._blocks[layer].index_select(0, blocks)

    def wipe(self, blocks: Tensor) -> None:
        """Zero these blocks in all layers: masked positions are multiplied by 0, so they must be finite. LOCAL."""
        self.data.index_fill_(1, blocks, 0)


@dataclass(frozen=True)
class _Group:
    """Tiles first..last that look at the same number of KV positions, in one call of the kernel.

    blocks: int64, the KV blocks of each sequence in the group one after the other; `sequences` is 1 when all tiles are
    of one sequence (they then share one copy), else one a tile."""

    first: int
    last: int
    sequences: int
    blocks: Tensor
    kv_length: int
    mask: Tensor
    """[B, 1, c G, N] in the run's dtype: 0 for what a row sees, -inf for what it must not."""


@dataclass(frozen=True)
class AttentionPlan:
    """Where the tokens of a batch stand, computed once a step and used by every layer."""

    kv_rows_T: Tensor
    tile_rows_T: Tensor
    num_tiles: int
    groups: tuple[_Group, ...]


@dataclass(frozen=True)
class _Tile:
    """Tile `index` of a sequence, and the wanted rows in it: those of batch rows start..start+length."""

    slice: SequenceSlice
    index: int
    start: int
    length: int
    offset: int


class Attention:
    """Causal attention of one model over paged KV; the same object serves all layers."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._kv_heads, self._head_dim = config.num_kv_heads, config.head_dim
        self._group = config.num_heads // config.num_kv_heads
        self._window = config.sliding_window
        self._dtype = dtype
        self.tile_tokens = tile_tokens(config)
        self._scale = config.head_dim**-0.5
        self._kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def plan(self, batch: ForwardBatch, kv: KVStore) -> AttentionPlan:
        """Lay out a batch, and wipe the KV blocks that it begins and does not fill: what stood there must not be wanted
        any more. A replay of the same step wipes and writes the same. LOCAL."""
        block_size, c = kv.block_size, self.tile_tokens
        kv_rows = np.empty(batch.token_ids_T.shape[0], np.int64)
        by_length: dict[int, list[list[_Tile]]] = {}
        begun: list[int] = []
        for piece in batch.slices:
            end = piece.context + piece.length
            positions = np.arange(piece.context, end)
            kv_rows[piece.start : piece.start + piece.length] = (
                piece.blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size
            )
            last_block = (end - 1) // block_size
            if end % block_size and last_block * block_size >= piece.context:
                begun.append(int(piece.blocks[last_block]))
            for length, tiles in _by_kv_length(piece, c).items():
                by_length.setdefault(length, []).append(tiles)
        if begun:
            kv.wipe(torch.tensor(begun))
        tile_rows = np.empty_like(kv_rows)
        groups: list[_Group] = []
        num_tiles = 0
        for length, families in sorted(by_length.items()):
            for tiles, shared in self._calls(length, families):
                groups.append(self._make_group(num_tiles, tiles, shared, length, kv))
                for tile in tiles:
                    row = num_tiles * c + tile.offset
                    tile_rows[tile.start : tile.start + tile.length] = np.arange(row, row + tile.length)
                    num_tiles += 1
        return AttentionPlan(torch.from_numpy(kv_rows), torch.from_numpy(tile_rows), num_tiles, tuple(groups))

    def forward(self, layer: int, qkv_TX: Tensor, plan: AttentionPlan, kv: KVStore) -> Tensor:
        """Write this batch's keys and values, and attend. LOCAL.

        qkv_TX: [T, (G Hkv + 2 Hkv) C], turned. Returns [T, G Hkv C], heads in the order of the queries."""
        width = self._group * self._kv_heads * self._head_dim
        kv.write(layer, plan.kv_rows_T, qkv_TX[:, width:])
        c = self.tile_tokens
        queries = qkv_TX.new_zeros(plan.num_tiles * c, width)
        queries.index_copy_(0, plan.tile_rows_T, qkv_TX[:, :width])
        queries = queries.view(plan.num_tiles, c * self._group, self._kv_heads, self._head_dim)
        outs = [self._attend(layer, queries[group.first : group.last], group, kv) for group in plan.groups]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.reshape(plan.num_tiles * c, width).index_select(0, plan.tile_rows_T)

    def _attend(self, layer: int, q_BRHC: Tensor, group: _Group, kv: KVStore) -> Tensor:
        pages = kv.read(layer, group.blocks).view(group.sequences, -1, 2, self._kv_heads, self._head_dim)
        pages = pages[:, : group.kv_length].expand(q_BRHC.shape[0], -1, -1, -1, -1)
        keys, values = pages.select(2, 0).transpose(1, 2), pages.select(2, 1).transpose(1, 2)
        out_BHRC: Tensor = self._kernel(
            q_BRHC.transpose(1, 2), keys, values, 0.0, False, attn_mask=group.mask, scale=self._scale
        )[0]
        return out_BHRC.transpose(1, 2)

    def _calls(self, kv_length: int, families: list[list[_Tile]]) -> Iterator[tuple[list[_Tile], bool]]:
        """Tiles to attend in one call each: lone tiles of many sequences together, many tiles of a sequence alone."""
        most = max(1, _MAX_MASK_ELEMENTS // (kv_length * self.tile_tokens * self._group))
        lone = [tiles[0] for tiles in families if len(tiles) == 1]
        for start in range(0, len(lone), most):
            yield lone[start : start + most], False
        for tiles in families:
            if len(tiles) > 1:
                for start in range(0, len(tiles), most):
                    yield tiles[start : start + most], True

    def _make_group(self, first: int, tiles: list[_Tile], shared: bool, kv_length: int, kv: KVStore) -> _Group:
        owners = tiles[:1] if shared else tiles
        count = -(-kv_length // kv.block_size)
        blocks = np.full((len(owners), count), kv.num_blocks, np.int64)
        for row, tile in zip(blocks, owners, strict=True):
            used = tile.slice.blocks[: min(count, -(-(tile.slice.context + tile.slice.length) // kv.block_size))]
            row[: len(used)] = used
        return _Group(
            first, first + len(tiles), len(owners), torch.from_numpy(blocks.ravel()), kv_length,
            self._mask([tile.index for tile in tiles], kv_length),
        )  # fmt: skip

    def _mask(self, tiles: list[int], kv_length: int) -> Tensor:
        rows = torch.tensor(tiles)[:, None] * self.tile_tokens + torch.arange(self.tile_tokens)
        positions = rows.repeat_interleave(self._group, dim=1)[:, None, :, None]
        seen_from = torch.arange(kv_length)
        hidden = seen_from > positions
        if self._window is not None:
            hidden |= seen_from <= positions - self._window
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)


def tile_tokens(config: ModelConfig) -> int:
    """c: tokens a tile, so that a tile has about 8 rows: few enough for a decode, enough for a prefill. LOCAL."""
    return max(1, -(-_TILE_ROWS // (config.num_heads // config.num_kv_heads)))


def kv_length(end: int) -> int:
    """KV positions that a tile ending before position `end` looks at: a function of its place alone. LOCAL."""
    step = _SHORT_STEP if end <= _SHORT_MAX else _LONG_STEP
    return -(-end // step) * step


def grouped_queries(config: ModelConfig, w_XD: Tensor) -> Tensor:
    """Reorder rows of query heads from [Hkv, G, C] to [G, Hkv, C]. Likewise the output's columns. LOCAL."""
    group = config.num_heads // config.num_kv_heads
    shaped = w_XD.view(config.num_kv_heads, group, config.head_dim, *w_XD.shape[1:])
    return shaped.transpose(0, 1).reshape(w_XD.shape)


def _by_kv_length(piece: SequenceSlice, c: int) -> dict[int, list[_Tile]]:
    """The tiles that a slice touches, by how many KV positions they look at."""
    tiles: dict[int, list[_Tile]] = {}
    position, end = piece.context, piece.context + piece.length
    while position < end:
        index = position // c
        stop = min(end, (index + 1) * c)
        tile = _Tile(piece, index, piece.start + position - piece.context, stop - position, position % c)
        tiles.setdefault(kv_length((index + 1) * c), []).append(tile)
        position = stop
    return tiles
