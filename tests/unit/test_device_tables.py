"""The tables that a device's kernels read: read back as the kernels do, they give the batch again."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.device_tables import (
    ITEM_WORDS,
    MERGES_AT,
    NUM_ITEMS,
    NUM_MERGES,
    NUM_PIECES,
    NUM_ROWS,
    PIECES_AT,
    TableShape,
    Written,
    write,
)
from phalanx.model.tiles import Cut

CUT = Cut(tokens=8, block=16, part=32, shares=6)
SHAPE = TableShape(rows=96, sequences=12, max_blocks=20, block_size=16, split=64, cut=CUT, spare_block=240)


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
    return {**parts, "tail": words[at["tail"] :], "header": words[: MERGES_AT + 1]}, done


def lists(parts: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces [P, 5] and merges [N, 4], where the header says that they are."""
    header, tail = parts["header"], parts["tail"]
    pieces, merges = tail[header[PIECES_AT] :], tail[header[MERGES_AT] :]
    return pieces[: 5 * header[NUM_PIECES]].reshape(-1, 5), merges[: 4 * header[NUM_MERGES]].reshape(-1, 4)


class Attended:
    """What kernels that follow the tables make of each row: the KV positions of its partial sums, by entry."""

    def __init__(self, parts: dict[str, np.ndarray], shape: TableShape) -> None:
        self.whole: dict[int, range] = {}
        self.sums: dict[int, tuple[int, range]] = {}
        for item in range(parts["header"][NUM_ITEMS]):
            row, split, *about_row, unused = parts["tail"][ITEM_WORDS * item :][:ITEM_WORDS].tolist()
            begin, end = parts["items_at"][row : row + 2].tolist()
            assert begin <= item < end
            by_row = [int(parts[name][row]) for name in ("positions", "kv_rows", "blocks_at")]
            assert about_row == [*by_row, begin, end - begin], (about_row, unused)
            seen = range(split * shape.split, min((split + 1) * shape.split, int(parts["positions"][row]) + 1))
            self._keep(row, -1 if end - begin == 1 else item, seen)
        pieces, merges = lists(parts)
        for first, tokens, low, high, place in pieces.tolist():
            assert shape.cut is not None
            assert 1 <= tokens <= shape.cut.tokens
            assert low % shape.cut.block == 0
            positions = parts["positions"][first : first + tokens]
            assert (positions == positions[0] + np.arange(tokens)).all()
            for j in range(tokens):
                self._keep(first + j, place if place < 0 else place + j, range(low, high))
        for row, entry, step, count in merges.tolist():
            assert count > 1
            rows, ranges = zip(*(self.sums.pop(entry + i * step) for i in range(count)), strict=True)
            assert set(rows) == {row}, "somebody else's sums are merged"
            assert all(a.stop == b.start for a, b in pairwise(ranges)), "not in their order"
            self._keep(row, -1, range(ranges[0].start, ranges[-1].stop))
        assert not self.sums, "partial sums that nobody merges"

    def _keep(self, row: int, entry: int, seen: range) -> None:
        known = self.whole if entry < 0 else self.sums
        assert (row if entry < 0 else entry) not in known, "written twice"
        if entry < 0:
            self.whole[row] = seen
        else:
            self.sums[entry] = row, seen


CHUNKS = st.lists(st.tuples(st.integers(0, 250), st.integers(1, 30)), min_size=0, max_size=10).filter(
    lambda chunks: sum(n for _, n in chunks) <= 80
)


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, padding=st.integers(0, 16), alike=st.booleans())
def test_kernels_find_every_token_its_blocks_and_its_work(
    chunks: list[tuple[int, int]], padding: int, alike: bool
) -> None:
    shape = dataclasses.replace(SHAPE, cut=None if alike else CUT)
    batch = batch_of(chunks, len(chunks))
    count = batch.token_ids_T.shape[0]
    padded = max(1, count + padding)
    parts, done = written(batch, shape, padded)
    assert parts["header"][NUM_ROWS] == count
    assert parts["tokens"][:count].tolist() == batch.token_ids_T.tolist()
    assert parts["positions"][:count].tolist() == batch.positions_T.tolist()
    assert (parts["kv_rows"][count:] // 16 == shape.spare_block).all()
    attended = Attended(parts, shape)
    assert sorted(attended.whole) == list(range(count))
    assert done.pieces == parts["header"][NUM_PIECES]
    assert not (alike and done.pieces)
    for piece in batch.slices:
        for row in range(piece.start, piece.start + piece.length):
            position = int(batch.positions_T[row])
            begin = parts["blocks_at"][row]
            assert parts["tail"][begin : begin + len(piece.blocks)].tolist() == piece.blocks.tolist()
            assert parts["kv_rows"][row] == piece.blocks[position // 16] * 16 + position % 16
            items = parts["items_at"][row + 1] - parts["items_at"][row]
            assert items == (position // shape.split + 1 if alike or piece.length == 1 else 0)
            assert attended.whole[row].start == 0
            assert attended.whole[row].stop > position


def test_padding_rows_have_no_work() -> None:
    parts, _ = written(batch_of([(70, 1)], 1), SHAPE, 8)
    assert parts["items_at"].tolist() == [0, 2, 2, 2, 2, 2, 2, 2, 2]


def test_the_fullest_batch_fits_the_words() -> None:
    full = dataclasses.replace(SHAPE, cut=None, rows=12)
    batch = batch_of([(319, 1)] * 12, 2)
    words = np.zeros(full.size, np.int32)
    assert write(words, full, batch, 12).used <= full.size


@pytest.mark.parametrize("shares", [1, 2, 7, 40])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_parts_of_tiles_fit_the_sums_and_the_words_and_the_longest_come_first(shares: int, tokens: int) -> None:
    shape = dataclasses.replace(SHAPE, cut=Cut(tokens, block=16, part=16, shares=shares))
    for chunks in ([(310, 8)] * 12, [(0, 96)], [(0, 2)] * 12, [(300, 19), (5, 1), (0, 60), (200, 10)]):
        parts, done = written(batch_of(chunks, 4), shape, 96)
        assert done.used <= shape.size
        pieces, merges = lists(parts)
        spans = pieces[:, 3] - pieces[:, 2]
        assert (np.diff(spans) <= 0).all()
        assert ((merges[:, 1] + (merges[:, 3] - 1) * merges[:, 2]) < shape.max_entries).all()
        Attended(parts, shape)


def test_a_short_prompt_behind_a_long_prefix_is_shared_by_many_programs_and_a_long_one_is_not_cut() -> None:
    shape = dataclasses.replace(SHAPE, cut=Cut(8, block=16, part=32, shares=8))
    parts, _ = written(batch_of([(300, 8)], 5), shape, 8)
    pieces, _ = lists(parts)
    assert len(pieces) == 7  # 308 positions, 48 each: no more than an eighth, in whole blocks
    many = dataclasses.replace(shape, cut=Cut(8, block=16, part=32, shares=2))
    parts, done = written(batch_of([(200, 80)], 5), many, 80)
    pieces, merges = lists(parts)
    assert done.pieces == 10
    assert (pieces[:, 4] == -1).all()
    assert len(merges) == 0


def test_a_window_leaves_out_what_no_token_of_a_tile_sees() -> None:
    shape = dataclasses.replace(SHAPE, cut=Cut(8, block=16, part=32, shares=1, window=40))
    parts, _ = written(batch_of([(100, 16)], 6), shape, 16)
    pieces, _ = lists(parts)
    assert sorted(pieces[:, 2:4].tolist()) == [[48, 108], [64, 116]]


def test_more_rows_than_the_tables_hold_are_refused() -> None:
    with pytest.raises(AssertionError, match="97"):
        write(np.zeros(SHAPE.size, np.int32), SHAPE, batch_of([(0, 1)], 3), 97)
