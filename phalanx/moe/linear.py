"""The one matrix product of the model: the same bits for a row whatever rows stand beside it.

A library picks its kernel by the shape of the product, and another kernel may add in another order. So the number of
rows is kept where one order is used: float32 has its own kernels below 4 rows (rows of zeros are added), and no product
has more than 512 rows (more are computed in pieces). `rows_agree` checks this on the machine at hand.

Shape suffixes: N rows, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 512
_FEWEST_ROWS = {torch.float32: 4}

Product = Callable[[Tensor], Tensor]


def linear(x_ND: Tensor, w_OD: Tensor) -> Tensor:
    """x_ND w_OD^T as [N, O], for weights that must stay plain bytes. LOCAL."""
    if x_ND.dtype is torch.bfloat16 and x_ND.shape[0] <= MAX_ROWS:
        return F.linear(x_ND, w_OD)
    return _in_safe_rows(x_ND, lambda rows: F.linear(rows, w_OD))


class Linear:
    """x w^T (+ bias) for weights that stay: bfloat16 ones are packed once into oneDNN's own layout, which halves the
    time of few rows and gives the bits of `linear`."""

    def __init__(self, w_OD: Tensor, bias_O: Tensor | None = None) -> None:
        self.out_features, self.in_features = w_OD.shape
        self.dtype = w_OD.dtype
        self._bias_O = bias_O
        self._product = _packed(w_OD) if w_OD.dtype is torch.bfloat16 and can_pack() else _plain(w_OD)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, O]. LOCAL."""
        if self.dtype is torch.bfloat16 and 0 < x_ND.shape[0] <= MAX_ROWS:
            y_NO = self._product(x_ND)
        else:
            y_NO = _in_safe_rows(x_ND, self._product)
        return y_NO if self._bias_O is None else y_NO.add_(self._bias_O)


def can_pack() -> bool:
    """Whether this machine multiplies packed bfloat16 weights natively. LOCAL."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def rows_agree(product: Product, in_features: int, dtype: torch.dtype, rows: tuple[int, ...], seed: int = 0) -> bool:
    """Whether a row's bits stay the same for each of these numbers of rows and at each end of the batch. LOCAL."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(max(rows), in_features, generator=generator).to(dtype)
    whole = product(x_ND)
    return all(torch.equal(product(x_ND[:n]), whole[:n]) and torch.equal(product(x_ND[-n:]), whole[-n:]) for n in rows)


def _plain(w_OD: Tensor) -> Product:
    return lambda x_ND: F.linear(x_ND, w_OD)


def _packed(w_OD: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(w_OD.contiguous(), 1)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x_ND: cast(Tensor, multiply(x_ND, packed, None, "none", [], ""))


def _in_safe_rows(x_ND: Tensor, product: Product) -> Tensor:
    count = x_ND.shape[0]
    if count == 0:
        return product(x_ND.new_zeros(_FEWEST_ROWS.get(x_ND.dtype, 1), x_ND.shape[1]))[:0]
    if count > MAX_ROWS:
        return torch.cat([_in_safe_rows(piece, product) for piece in x_ND.split(MAX_ROWS)])  # type: ignore[no-untyped-call]
    short = _FEWEST_ROWS.get(x_ND.dtype, 1) - count
    return product(x_ND) if short <= 0 else product(F.pad(x_ND, (0, 0, 0, short)))[:count]
