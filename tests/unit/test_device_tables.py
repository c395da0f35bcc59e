"""The tables that a device's kernels read: read back as the kernels do, they give the batch again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.device_tables import NUM_ITEMS, NUM_ROWS, TableShape, Written, write

SHAPE = TableShape(
    rows=96, sequences=12, max_blocks=20, block_size=16, split=64, tile=8, alike=False, spare_block=240
)  # fmt: skip


def batch_of(chunks: list[tuple[int, int]], seed: int) -> ForwardBatch:
    """(context, length) of each sequence, in blocks of its own."""
    g = np.random.default_rng(seed)
    free = g.permutation(240).astype(np.int32)
    slices, positions, taken = [], list[int](), 0
    for context, length in chunks:
        count = -(-(context + length) // 16)
        slices.append(SequenceSlice(len(positions), length, context, free[taken : taken + count]))
        positions.extend(range(context, context + length))
        taken += count
    tokens = torch.from_numpy(g.integers(0, 1000, len(positions)))
    return ForwardBatch(tokens, torch.tensor(positions, dtype=torch.int64), tuple(slices))


def written(batch: ForwardBatch, shape: TableShape, padded: int) -> tuple[dict[str, np.ndarray], Written]:
    """The parts, from words that held something else before; what was not said to be used is lost on the way."""
    words = np.full(shape.size, -7, np.int32)
    done = write(words, shape, batch, padded)
    words[done.used :] = -9
    at = shape.offsets
    parts = {name: words[at[name] :][: padded + (name == "items_at")] for name in at if name != "tail"}
    return {**parts, "tail": words[at["tail"] :], "header": words[:2]}, done


CHUNKS = st.lists(st.tuples(st.integers(0, 250), st.integers(1, 30)), min_size=0, max_size=10).filter(
    lambda chunks: sum(n for _, n in chunks) <= 80
)


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, padding=st.integers(0, 16), alike=st.booleans())
def test_kernels_find_every_token_its_blocks_and_its_work(
    chunks: list[tuple[int, int]], padding: int, alike: bool
) -> None:
    shape = dataclasses.replace(SHAPE, alike=alike)
    batch = batch_of(chunks, len(chunks))
    count = batch.token_ids_T.shape[0]
    padded = max(1, count + padding)
    parts, done = written(batch, shape, padded)
    assert parts["header"][NUM_ROWS] == count
    assert parts["tokens"][:count].tolist() == batch.token_ids_T.tolist()
    assert parts["positions"][:count].tolist() == batch.positions_T.tolist()
    assert (parts["kv_rows"][count:] // 16 == shape.spare_block).all()
    splits: dict[int, list[int]] = {}
    for item in range(parts["header"][NUM_ITEMS]):
        row, split = parts["tail"][2 * item : 2 * item + 2].tolist()
        assert parts["items_at"][row] <= item < parts["items_at"][row + 1]
        splits.setdefault(row, []).append(split)
    tiled: list[int] = []
    for tile in range(done.tiles):
        first, tokens = parts["tail"][done.tiles_at + 2 * tile :][:2].tolist()
        assert 1 <= tokens <= shape.tile
        positions = parts["positions"][first : first + tokens]
        assert (positions == positions[0] + np.arange(tokens)).all()
        tiled.extend(range(first, first + tokens))
    assert sorted([*splits, *tiled]) == list(range(count))
    for piece in batch.slices:
        for row in range(piece.start, piece.start + piece.length):
            position = int(batch.positions_T[row])
            begin = parts["blocks_at"][row]
            assert parts["tail"][begin : begin + len(piece.blocks)].tolist() == piece.blocks.tolist()
            assert parts["kv_rows"][row] == piece.blocks[position // 16] * 16 + position % 16
            assert (row in splits) == (alike or piece.length == 1)
            if row in splits:
                assert splits[row] == list(range(position // shape.split + 1))


def test_padding_rows_have_no_work() -> None:
    parts, _ = written(batch_of([(70, 1)], 1), SHAPE, 8)
    assert parts["items_at"].tolist() == [0, 2, 2, 2, 2, 2, 2, 2, 2]


def test_the_fullest_batch_fits_the_words() -> None:
    full = dataclasses.replace(SHAPE, alike=True, rows=12)
    batch = batch_of([(319, 1)] * 12, 2)
    words = np.zeros(full.size, np.int32)
    assert write(words, full, batch, 12).used <= full.size


def test_more_rows_than_the_tables_hold_are_refused() -> None:
    with pytest.raises(AssertionError, match="97"):
        write(np.zeros(SHAPE.size, np.int32), SHAPE, batch_of([(0, 1)], 3), 97)
