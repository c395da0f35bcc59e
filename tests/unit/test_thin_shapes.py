"""How a product of few rows is cut: into parts of whole rounds, and programs enough for all that memory gives."""

from __future__ import annotations

import pytest
import torch

from phalanx.model.decode_options import DecodeOptions
from phalanx.moe.thin import Product, ThinShape


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 65, 256])
@pytest.mark.parametrize(
    ("outputs", "inner"), [(5120, 2048), (2048, 4096), (128, 2048), (60, 96), (7, 16), (192, 1536)]
)
def test_a_product_is_cut_into_equal_parts_of_whole_rounds(rows: int, outputs: int, inner: int) -> None:
    shape = ThinShape.of(rows, outputs, inner)
    assert shape is not None
    assert inner % (shape.parts * shape.depth) == 0
    assert shape.rows >= min(rows, 64)
    assert shape.rows & (shape.rows - 1) == 0


def test_an_inner_dimension_that_has_no_whole_rounds_is_not_cut() -> None:
    assert ThinShape.of(4, 128, 2048 + 8) is None


def _programs(rows: int, outputs: int, inner: int) -> tuple[int, int]:
    """Parts, and programs in all."""
    shape = ThinShape.of(rows, outputs, inner)
    assert shape is not None
    return shape.parts, shape.parts * -(-outputs // 64) * -(-rows // shape.rows)


def test_a_product_of_many_outputs_is_not_cut_into_parts() -> None:
    assert _programs(64, 151936, 2048) == (1, 2374)


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
def test_products_of_the_fewest_rows_have_a_program_and_more_for_each_multiprocessor(rows: int) -> None:
    parts, programs = _programs(rows, 2048, 4096)
    assert parts > 1
    assert programs >= 240


def test_taller_tiles_have_half_as_many_parts_and_more_rounds_under_way() -> None:
    short, tall = ThinShape.of(32, 2048, 4096), ThinShape.of(64, 2048, 4096)
    assert short is not None
    assert tall is not None
    assert tall.parts == short.parts // 2
    assert tall.stages > short.stages


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 256])
def test_a_product_of_few_outputs_is_cut_as_far_as_it_goes(rows: int) -> None:
    parts, _ = _programs(rows, 128, 2048)
    assert parts == 16


@pytest.mark.parametrize(("rows", "outputs", "inner"), [(16, 128, 2048), (64, 128, 2048), (64, 2048, 4096), (7, 7, 16)])
def test_no_more_rounds_are_under_way_than_a_part_has(rows: int, outputs: int, inner: int) -> None:
    shape = ThinShape.of(rows, outputs, inner)
    assert shape is not None
    assert shape.stages - 1 <= inner // (shape.parts * shape.depth)


def test_a_tensor_is_a_product_without_parts() -> None:
    x = torch.ones(2, 3)
    assert Product.of(x) == Product(x)
    assert Product.of(Product(x, 4)).parts == 4


def test_sums_keep_their_order_where_bits_must() -> None:
    assert DecodeOptions.best(exact=True) == DecodeOptions()
    assert DecodeOptions.best(exact=False) != DecodeOptions()
