"""How a decode's attention is cut: warps together while multiprocessors are too many, alone beyond."""

from __future__ import annotations

import pytest

from phalanx.model.decode_options import DecodeCut, can_place

PROCESSORS = 132


@pytest.mark.parametrize("heads", [1, 4, 64, 131, 132])
def test_warps_share_an_item_while_a_multiprocessor_has_one_at_most(heads: int) -> None:
    assert DecodeCut.of(heads, 128, PROCESSORS) == DecodeCut(warps=4, stages=4, programs=2)


@pytest.mark.parametrize("heads", [133, 256, 512, 1024, 8192])
def test_each_warp_is_a_program_of_its_own_when_there_are_items_for_more(heads: int) -> None:
    assert DecodeCut.of(heads, 128, PROCESSORS) == DecodeCut(warps=1, stages=4, programs=8)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("heads", [1, 1000])
def test_wide_heads_have_fewer_blocks_before_them_and_one_at_least(heads: int, head_dim: int) -> None:
    cut = DecodeCut.of(heads, head_dim, PROCESSORS)
    assert 2 <= cut.stages <= 5
    assert cut.stages <= DecodeCut.of(heads, head_dim // 2, PROCESSORS).stages
    assert cut.warps * cut.programs == 8


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (8, 128), (12, 128), (16, 128), (8, 256), (32, 128)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_attention_places_keys_whatever_heads_share_them(group: int, head_dim: int, block_size: int) -> None:
    assert can_place(group, head_dim, block_size, 512)


@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "split"),
    [(8, 96, 16, 512), (8, 8, 16, 512), (8, 128, 8, 512), (8, 128, 48, 512), (8, 128, 1024, 512), (33, 128, 16, 512)],
)
def test_heads_and_blocks_that_its_kernel_cannot_take_are_left_to_the_other_kernels(
    group: int, head_dim: int, block_size: int, split: int
) -> None:
    assert not can_place(group, head_dim, block_size, split)
