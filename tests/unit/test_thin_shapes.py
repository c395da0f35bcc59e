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


def test_small_products_are_cut_further_than_large_ones() -> None:
    def programs(outputs: int, inner: int) -> tuple[int, int]:
        shape = ThinShape.of(64, outputs, inner)
        assert shape is not None
        return shape.parts, shape.parts * -(-outputs // 64)

    parts, many = programs(151936, 2048)
    assert parts == 1
    assert many > 240
    parts, many = programs(2048, 4096)
    assert parts > 1
    assert many >= 240


def test_a_tensor_is_a_product_without_parts() -> None:
    x = torch.ones(2, 3)
    assert Product.of(x) == Product(x)
    assert Product.of(Product(x, 4)).parts == 4


def test_sums_keep_their_order_where_bits_must() -> None:
    assert DecodeOptions.best(exact=True) == DecodeOptions()
    assert DecodeOptions.best(exact=False) != DecodeOptions()
