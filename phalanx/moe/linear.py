"""The matrix products of the model: the same bits for a row whatever rows stand beside it.

A library picks its kernel by the shape of the product, and another kernel may add in another order. So the number of
rows is kept where one order is used: one row alone has a kernel of its own in bfloat16, and so have one to three rows
in float32. Few rows are repeated until they are enough, many are computed in pieces. `choose` checks on the machine at
hand that this is so, and falls back to products of one shape only.

Shape suffixes: N rows, D inputs, O outputs, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]

EXACT, INEXACT = "exact", "inexact"
"""Outcomes of the check of the usual products."""

Checked = Callable[[Callable[[], str]], str]
"""Gives the outcome of a check, by doing it or otherwise."""

_CHECKED_ROWS = (2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 24, 31, 33, 48, 64, 100, 128, 257, 511)
_CHECKED_OUTPUTS = 2048
_CHECKED_WORK = 1 << 27
"""Multiplications that one product of the check may cost: above it, only smaller numbers of rows are tried."""


@dataclass(frozen=True)
class Products:
    """How this machine computes products exactly.

    fewest, most: rows that a product may have at once. With fewest == most every product has the same shape.
    packed: bfloat16 weights may be copied into oneDNN's own layout, which halves the time of few rows.
    """

    fewest: int
    most: int
    packed: bool

    @classmethod
    def usual(cls, dtype: torch.dtype) -> Products:
        """What was seen to be exact on Zen 4 and Zen 5 with torch 2.13 (oneDNN 3.12, MKL 2024.2). LOCAL."""
        return cls(2, 512, _can_pack()) if dtype is torch.bfloat16 else cls(4, 512, False)

    @classmethod
    def fixed(cls) -> Products:
        """16 rows in every product: exact wherever a product of one shape is deterministic, but slower. LOCAL."""
        return cls(16, 16, False)

    def apply(self, product: Product, x_ND: Tensor) -> Tensor:
        """`product` of [N, D], in pieces of an allowed size. LOCAL."""
        count = x_ND.shape[0]
        if self.fewest <= count <= self.most:
            return product(x_ND)
        if count == 0:
            return product(x_ND.new_zeros(self.fewest, x_ND.shape[1]))[:0]
        if count > self.most:
            return torch.cat([self.apply(product, x_ND[i : i + self.most]) for i in range(0, count, self.most)])
        return product(torch.cat([x_ND] * -(-self.fewest // count))[: self.fewest])[:count]


def do(check: Callable[[], str]) -> str:
    """Do a check, for those who share it with nobody. LOCAL."""
    return check()


def choose(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, checked: Checked = do) -> Products:
    """The usual products, unless a check of these (O, D) shapes on this machine finds bits that depend on the number
    of rows: then the fixed ones. The check takes 0.35 s of processor time for a small model.

    checked: does the check and gives its outcome, or knows it from another process of this machine. LOCAL."""
    usual = Products.usual(dtype)

    def check() -> str:
        return EXACT if all(rows_agree(usual, shape, dtype) for shape in set(shapes)) else INEXACT

    return usual if checked(check) == EXACT else Products.fixed()


def rows_agree(products: Products, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> bool:
    """Whether a row of a random product keeps its bits for many numbers of rows, first and last in its batch, plain
    and packed. LOCAL."""
    outputs, inputs = min(shape[0], _CHECKED_OUTPUTS), shape[1]
    generator = torch.Generator().manual_seed(seed)
    w_OD = torch.randn(outputs, inputs, generator=generator).to(dtype)
    rows = [n for n in _CHECKED_ROWS if n == _CHECKED_ROWS[0] or n * outputs * inputs <= _CHECKED_WORK]
    x_ND = torch.randn(rows[-1] + 1, inputs, generator=generator).to(dtype)
    whole_NO = products.apply(_plain(w_OD), x_ND)
    for product in (_plain(w_OD), *([_packed(w_OD)] if products.packed else [])):
        for n in (1, *rows):
            first, last = products.apply(product, x_ND[:n]), products.apply(product, x_ND[-n:])
            if not (torch.equal(first, whole_NO[:n]) and torch.equal(last, whole_NO[-n:])):
                return False
    return True


class Linear:
    """x w^T (+ bias), computed exactly; the weights are packed where that is allowed."""

    def __init__(self, w_OD: Tensor, bias_O: Tensor | None, products: Products) -> None:
        self._products, self._bias_O = products, bias_O
        self._product = _packed(w_OD) if products.packed else _plain(w_OD)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, O]. LOCAL."""
        y_NO = self._products.apply(self._product, x_ND)
        return y_NO if self._bias_O is None else y_NO + self._bias_O


class SwiGlu:
    """down(silu(gate x) * up x), the body of an expert and of a dense MLP. w13 [2F, D]: gate rows, then up rows."""

    def __init__(self, w13: Tensor, w2: Tensor, products: Products, *, packed: bool) -> None:
        self._products = products
        make = _packed if packed and products.packed else _plain
        self._w13, self._w2 = make(w13), make(w2)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]. LOCAL."""
        return self._products.apply(self._run, x_ND)

    def _run(self, x_ND: Tensor) -> Tensor:
        gate, up = self._w13(x_ND).chunk(2, dim=-1)
        return self._w2(F.silu(gate).mul_(up))


def _can_pack() -> bool:
    usable: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return usable and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _plain(w_OD: Tensor) -> Product:
    return lambda x_ND: F.linear(x_ND, w_OD)


def _packed(w_OD: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(w_OD.contiguous(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x_ND: cast(Tensor, multiply(x_ND, packed, None, "none", [], ""))
