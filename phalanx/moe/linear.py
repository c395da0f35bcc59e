"""The one matrix product of the model: the same bits for a row whatever rows stand beside it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x_ND: Tensor, w_OD: Tensor) -> Tensor:
    """x_ND w_OD^T as [N, O]. LOCAL."""
    return F.linear(x_ND, w_OD)
