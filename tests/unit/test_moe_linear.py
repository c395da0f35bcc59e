"""Products whose rows do not depend on each other, on this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from phalanx.moe.linear import Linear, Products, SwiGlu, choose, rows_agree

DTYPES = [torch.bfloat16, torch.float32]
ROWS = [*range(1, 36), 47, 48, 63, 64, 65, 100, 128, 129, 255, 256, 257, 511, 512, 513, 600]
SHAPES = [(96, 64), (8, 576), (576, 1536), (40, 72), (1000, 48), (64, 1100)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_number_of_rows(shape, dtype):
    outputs, inputs = shape
    linear = Linear(random(outputs, inputs, dtype=dtype), None, Products.usual(dtype))
    x = random(600, inputs, dtype=dtype, seed=1)
    whole = linear(x)
    for count in ROWS:
        for first in {0, 1, 600 - count} if count < 600 else {0}:
            assert torch.equal(linear(x[first : first + count]), whole[first : first + count]), (count, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_alone_has_the_bits_it_has_in_a_batch(dtype):
    """One row alone is where kernels differ most: in bfloat16 only in some elements, and only with many inputs."""
    linear = Linear(random(576, 1536, dtype=dtype), None, Products.usual(dtype))
    x = random(400, 1536, dtype=dtype, seed=1)
    assert torch.equal(torch.cat([linear(row.unsqueeze(0)) for row in x]), linear(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("products", ["usual", "fixed"])
def test_it_is_the_product(products, dtype):
    chosen = Products.usual(dtype) if products == "usual" else Products.fixed()
    w, bias = random(40, 64, dtype=dtype), random(40, dtype=dtype, seed=3)
    linear = Linear(w, bias, chosen)
    for count in (0, 1, 3, 16, 17, 40, 515):
        x = random(count, 64, dtype=dtype, seed=2)
        expected = F.linear(x.double(), w.double()) + bias.double()
        tolerance = 1e-4 if dtype is torch.float32 else 0.15
        assert linear(x).shape == (count, 40)
        assert torch.allclose(linear(x).double(), expected, atol=tolerance, rtol=1e-2)


def test_fixed_products_only_ever_see_one_shape():
    shapes = set()

    def product(x: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        return x * 2

    for count in (0, 1, 15, 16, 17, 100):
        x = random(count, 8, dtype=torch.float32)
        assert torch.equal(Products.fixed().apply(product, x), x * 2)
    assert shapes == {(16, 8)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_usual_products_pass_the_check_on_this_machine(dtype):
    assert choose(SHAPES, dtype) == Products.usual(dtype)


def test_the_check_finds_products_whose_bits_depend_on_the_rows():
    """float32 has other kernels below 4 rows: with no padding allowed for them, the check must say so."""
    careless = Products(fewest=1, most=512, packed=False)
    assert not rows_agree(careless, (576, 1536), torch.float32)
    assert rows_agree(Products.fixed(), (576, 1536), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_mlp_gives_the_bits_of_a_plain_one_and_is_swiglu(dtype):
    w13, w2 = random(2 * 1536, 64, dtype=dtype), random(64, 1536, dtype=dtype, seed=1)
    products = Products.usual(dtype)
    plain, packed = SwiGlu(w13, w2, products, packed=False), SwiGlu(w13, w2, products, packed=True)
    for count in (1, 2, 5, 33, 520):
        x = random(count, 64, dtype=dtype, seed=2) / 8
        assert torch.equal(plain(x), packed(x))
        gate, up = (x.double() @ w13.double().T).chunk(2, dim=-1)
        expected = (F.silu(gate) * up) @ w2.double().T
        error = (plain(x).double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype is torch.float32 else 0.02)
