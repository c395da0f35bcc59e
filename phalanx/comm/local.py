"""A communicator for one rank alone: nothing travels, nobody can be lost.

For programs and tests that run the model without peers; a service of one rank uses it too if it wishes.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from phalanx.comm.base import Communicator, Dispatched, Status
from phalanx.world import View


class LocalCommunicator(Communicator):
    """Rank 0 of 1. Dispatch hands a rank its own tokens, combine its own rows."""

    rank = 0
    ep_size = 1

    def __init__(self) -> None:
        self._interrupted = 0

    @property
    def address(self) -> str:
        return f"local:{os.getpid()}"

    @property
    def failed(self) -> bool:
        return self._interrupted > 0

    def adopt(self, view: View) -> None:
        assert view.ep_size == 1, f"a local communicator serves one rank, not {view.ep_size}"
        if view.epoch >= self._interrupted:
            self._interrupted = 0

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor) -> Dispatched:
        pairs = slots_TK.reshape(-1)
        row_M = torch.arange(x_TD.shape[0]).repeat_interleave(slots_TK.shape[1])
        if pairs.numel() and int(pairs.min()) < 0:  # -1: this token asks for fewer than K experts
            kept = (pairs >= 0).nonzero().squeeze(1)
            return Dispatched(x_TD, row_M[kept], pairs[kept].long(), (slots_TK.shape, kept))
        return Dispatched(x_TD, row_M, pairs.long(), (slots_TK.shape, None))

    def combine(self, y_MD: Tensor, dispatched: Dispatched) -> Tensor:
        (num_tokens, top_k), kept = dispatched.handle
        if kept is None:
            return y_MD.view(num_tokens, top_k, y_MD.shape[1])
        rows = y_MD.new_zeros(num_tokens * top_k, y_MD.shape[1])
        return rows.index_copy_(0, kept, y_MD).view(num_tokens, top_k, y_MD.shape[1])

    def origins(self, dispatched: Dispatched) -> tuple[Tensor, Tensor]:
        (num_tokens, top_k), kept = dispatched.handle
        token_M = torch.arange(num_tokens).repeat_interleave(top_k) if kept is None else kept // top_k
        return torch.zeros_like(token_M), token_M

    def all_gather(self, row: Tensor) -> Tensor:
        return row.clone().unsqueeze(0)

    def barrier(self) -> None:
        return

    def query_mask(self) -> Tensor:
        return torch.ones(1, dtype=torch.uint8)

    def update_mask(self, rank: int, alive: bool) -> None:
        assert rank == 0, rank
        assert alive, "a rank does not mask itself"

    def status(self) -> Status:
        return Status(interrupted=self._interrupted)

    def interrupt(self, epoch: int) -> None:
        self._interrupted = max(self._interrupted, epoch)

    def ring(self) -> None:
        return

    def sleep(self, timeout_s: float, wake_fds: tuple[int, ...] = ()) -> bool:
        if not self._interrupted:
            select.select(wake_fds, (), (), timeout_s)
        return self._interrupted > 0

    @contextmanager
    def patience(self, timeout_s: float) -> Iterator[None]:
        yield

    def close(self) -> None:
        return
