"""How the experts' work is cut: by the pairs a slot, and with one instruction and depth where bits must not change."""

from __future__ import annotations

import pytest

from phalanx.moe.cuda import Tiling
from phalanx.moe.cuda_blocks import BlockTiling


@pytest.mark.parametrize(("pairs", "rows"), [(8, 16), (525, 16), (1050, 32), (2109, 64), (4152, 128), (16000, 128)])
def test_more_pairs_a_slot_make_taller_tiles(pairs: int, rows: int) -> None:
    assert Tiling.of(pairs, 64, exact=False).rows == rows


def test_what_must_be_exact_has_one_depth_and_no_tile_of_64_rows() -> None:
    tilings = {Tiling.of(pairs, slots, exact=True) for pairs in range(0, 9000, 7) for slots in (1, 3, 64, 256)}
    assert {tiling.depth for tiling in tilings} == {128}
    assert {tiling.rows for tiling in tilings} == {16, 32}


def test_weights_in_blocks_are_cut_for_the_same_pairs_into_parts_of_blocks() -> None:
    for exact in (False, True):
        for pairs in range(0, 9000, 7):
            tiling = Tiling.of(pairs, 64, exact=exact)
            blocks = BlockTiling.like(tiling)
            assert blocks.rows == min(tiling.rows, 64)
            assert 128 % blocks.up == 128 % blocks.down == 0
