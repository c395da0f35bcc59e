"""A batch as the kernels read it: one array of int32 words, written on the host and copied in one piece.

    words      [64]      how many rows, items, pieces and merges there are, and where in the tail the last two begin
    tokens     [rows]    token ids, or -1 - i for the i-th that the batch before chose
    positions  [rows]    where they stand in their sequences
    kv_rows    [rows]    where their keys and values go: block * block_size + offset
    blocks_at  [rows]    where the blocks of their sequence begin in the tail
    items_at   [rows+1]  where their items begin; a row without items is not attended by `decode_kernel`
    tail                 a record of every item, the pieces of prefills and the rows to be merged (`model.tiles`),
                         then blocks by sequence

An item's record, of ITEM_WORDS words, has all that is known of it, so that a kernel reads it at once: row, split, and
of the row its position, kv_row, blocks_at, first item and number of items.

Every part but the tail stands at a fixed place, so that captured graphs find it, and what is in the tail is found by
words; only what is used is copied. Rows beyond the batch's own pad it to the size of a graph: they have no items, and
their keys go to a block of nobody's.
No tensor of a device here: numbers in, numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from phalanx.model import tiles
from phalanx.model.attention import ForwardBatch
from phalanx.model.tiles import MERGE_WORDS, PIECE_WORDS, Cut

Words = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

NUM_ROWS, NUM_ITEMS, NUM_PIECES, PIECES_AT, NUM_MERGES, MERGES_AT = range(6)
"""Words at the start."""

ITEM_WORDS = 8
"""Words an item, the last one of them unused: a sector of a device's memory."""

_HEADER = 64
_ALIGN = 64
PARTS = ("tokens", "positions", "kv_rows", "blocks_at", "items_at")


@dataclass(frozen=True)
class TableShape:
    """What the tables hold at most, and how attention is cut.

    rows: tokens a step. sequences: requests a step. max_blocks: KV blocks a sequence. split: KV positions an item.
    cut: how prefills are cut; None: every token is an item of its own, so that it has the same bits in a prefill and
    in a decode. spare_block: the KV block of nobody's.
    """

    rows: int
    sequences: int
    max_blocks: int
    block_size: int
    split: int
    cut: Cut | None
    spare_block: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First word of each part, and of the tail."""
        offsets, at = {}, _HEADER
        for name in PARTS:
            offsets[name] = at
            at += -(-(self.rows + 1) // _ALIGN) * _ALIGN
        offsets["tail"] = at
        return offsets

    @property
    def max_splits(self) -> int:
        """Items of one row."""
        return -(-self.max_blocks * self.block_size // self.split)

    @property
    def max_items(self) -> int:
        return (min(self.rows, self.sequences) if self.cut else self.rows) * self.max_splits

    @property
    def max_entries(self) -> int:
        """Partial sums of attention: of items, then of parts of tiles."""
        return self.max_items + (self.cut.max_entries if self.cut else 0)

    @property
    def size(self) -> int:
        """Words in all."""
        pieces = self.rows + self.cut.max_parts if self.cut else 0
        tail = (
            ITEM_WORDS * self.max_items
            + PIECE_WORDS * pieces
            + MERGE_WORDS * self.rows
            + self.sequences * self.max_blocks
        )
        return self.offsets["tail"] + tail


@dataclass(frozen=True)
class Written:
    """What a batch took: words to copy, and how many pieces its prefills have."""

    used: int
    pieces: int


def write(words: Words, shape: TableShape, batch: ForwardBatch, padded: int) -> Written:
    """Lay `batch` out in `words`, with rows up to `padded`, at least one. LOCAL, pure but for `words`."""
    count = batch.token_ids_T.shape[0]
    assert count <= padded <= shape.rows, (count, padded, shape.rows)
    slices = batch.slices
    lengths = np.array([piece.length for piece in slices], np.int64)
    assert [piece.start for piece in slices] == (np.cumsum(lengths) - lengths).tolist(), "slices follow one another"
    positions = batch.positions_T.numpy()
    blocks = np.concatenate([piece.blocks for piece in slices]) if slices else np.zeros(0, np.int32)
    begins = np.zeros(len(slices) + 1, np.int64)
    np.cumsum(np.array([len(piece.blocks) for piece in slices], np.int64), out=begins[1:])
    sequence_T = np.repeat(np.arange(len(slices)), lengths)
    alone_T = np.repeat(lengths == 1, lengths) | (shape.cut is None)
    splits_T = np.where(alone_T, positions // shape.split + 1, 0)
    items_at = np.zeros(padded + 1, np.int64)
    np.cumsum(splits_T, out=items_at[1 : count + 1])
    items = int(items_at[count])
    items_at[count + 1 :] = items
    at = shape.offsets
    tail = words[at["tail"] :]
    pieces, merges = _work(shape, lengths, positions, splits_T, items_at)
    pieces_at = ITEM_WORDS * items
    merges_at = pieces_at + pieces.size
    blocks_at = merges_at + merges.size
    tail[pieces_at:merges_at] = pieces.reshape(-1)
    tail[merges_at:blocks_at] = merges.reshape(-1)
    tail[blocks_at : blocks_at + len(blocks)] = blocks

    words[: MERGES_AT + 1] = count, items, len(pieces), pieces_at, len(merges), merges_at
    block_T = blocks[begins[sequence_T] + positions // shape.block_size].astype(np.int64)
    values: dict[str, tuple[npt.NDArray[np.int64], int]] = {
        "tokens": (batch.token_ids_T.numpy(), 0),
        "positions": (positions, 0),
        "kv_rows": (block_T * shape.block_size + positions % shape.block_size, shape.spare_block * shape.block_size),
        "blocks_at": (blocks_at + begins[sequence_T], 0),
    }
    row_I = np.repeat(np.arange(count), splits_T)
    about_row = positions, values["kv_rows"][0], values["blocks_at"][0], items_at[:count], splits_T
    records = tail[:pieces_at].reshape(items, ITEM_WORDS)
    records[:, 0], records[:, 1] = row_I, np.arange(items) - items_at[row_I]
    records[:, 2:7] = np.stack(about_row, axis=1)[row_I]
    for name, (column, padding) in values.items():
        words[at[name] : at[name] + count] = column
        words[at[name] + count : at[name] + padded] = padding
    words[at["items_at"] : at["items_at"] + padded + 1] = items_at
    return Written(at["tail"] + blocks_at + len(blocks), len(pieces))


def _work(shape: TableShape, lengths: Ints, positions: Ints, splits_T: Ints, items_at: Ints) -> tuple[Ints, Ints]:
    """The pieces of prefills, and the rows of several splits or parts: see `model.tiles`."""
    rows = np.flatnonzero(splits_T > 1)
    merges = np.stack([rows, items_at[rows], np.ones_like(rows), splits_T[rows]], axis=1)
    if shape.cut is None:
        return np.zeros((0, PIECE_WORDS), np.int64), merges
    starts = np.cumsum(lengths) - lengths
    long = lengths > 1
    found = tiles.pieces(shape.cut, starts[long], lengths[long], positions[starts[long]], int(items_at[-1]))
    return found.pieces, np.concatenate([merges, found.merges])
