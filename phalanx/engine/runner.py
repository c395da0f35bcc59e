"""Runs batches on the model, and sizes and warms what that needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.comm.base import Status
from phalanx.config import ServeConfig
from phalanx.engine import sampler
from phalanx.engine.batch import StepBatch
from phalanx.engine.sampler import FloatRow
from phalanx.engine.scheduler import Limits
from phalanx.messages import SamplingParams
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.config import ModelConfig

_WARM_PREFILL_TOKENS = 32
_WARM_DECODES = 8


class Model(Protocol):
    """What the engine needs of `model.transformer.Transformer`."""

    def forward(self, batch: ForwardBatch, kv: Any) -> Tensor:
        """Hidden states [T, D]; writes the batch's KV. COLLECTIVE, also with T = 0."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]. LOCAL."""


class Routes(Protocol):
    """What the engine needs of `moe.gate.RouteTable`."""

    def adopt(self, table_LEW: Any) -> None:
        """Write the table in place. LOCAL."""


@dataclass(frozen=True)
class Ran:
    """What a forward pass left, until the next launch.

    logits: float32 [len(rows), V] of these rows of the batch. tokens: rows whose next token was chosen on the device
    already. status: what the collectives of the pass ended with, where it came along with its results; None: ask the
    communicator."""

    logits: Callable[[Sequence[int]], FloatRow]
    tokens: Mapping[int, int] = field(default_factory=dict)
    status: Status | None = None


class Flight(Protocol):
    """A batch that was launched."""

    def finish(self) -> Ran:
        """Wait until it has run. Once; flights end in the order of their launches. LOCAL."""

    def discard(self) -> None:
        """Wait until nothing of it runs, or will; what it brought does not count, also if it is finished. LOCAL."""


class StepRunner(Protocol):
    """What the engine needs of a rank's model: `Runner`, or `engine.cuda.CudaRunner`."""

    vocab_size: int

    def launch(self, batch: StepBatch) -> Flight:
        """Begin the forward pass of a step. COLLECTIVE: every rank calls it in every step, with T = 0 when it has
        nothing. At most two batches are under way at a time."""

    def may_lead(self, batch: StepBatch) -> bool:
        """Whether another batch may be launched before this one, the only one under way, is finished: it then chooses
        all its tokens itself, the batch behind it may refer to them (`batch.chosen`), and `Ran.logits` is not asked
        for. LOCAL, pure."""

    def run(self, batch: StepBatch) -> Ran:
        """Launch and finish. COLLECTIVE."""

    def adopt(self, routes_LEW: npt.NDArray[np.int32]) -> None:
        """Send tokens by these routes from now on. Nothing is under way. LOCAL."""

    def warm_up(self, limits: Limits) -> None:
        """Run everything that serving runs once, alone. LOCAL in effect."""

    def close(self) -> None:
        """Wait until nothing runs any more, and let go of what refers to the communicator's memory and the slots'. For
        who closes those next, and lives on; a worker just ends. LOCAL."""


@dataclass(frozen=True)
class Landed:
    """The flight of a batch that had run when its launch returned."""

    ran: Ran

    def finish(self) -> Ran:
        """See `Flight`."""
        return self.ran

    def discard(self) -> None:
        """See `Flight`."""


class Runner:
    """The model, its KV storage and its routes, as one rank's engine uses them."""

    def __init__(self, model: Model, kv: Any, routes: Routes, vocab_size: int) -> None:
        self._model = model
        self._kv = kv
        self._routes = routes
        self.vocab_size = vocab_size

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, D]. COLLECTIVE: every rank calls it in every step, with T = 0 when it has nothing."""
        with torch.inference_mode():
            return self._model.forward(batch, self._kv)

    def launch(self, batch: StepBatch) -> Flight:
        """See `StepRunner`. COLLECTIVE. The host computes, so the batch has run when this returns."""
        hidden_TD = self.forward(batch.forward)
        return Landed(Ran(lambda rows: self.logits(hidden_TD, rows)))

    def may_lead(self, batch: StepBatch) -> bool:
        """See `StepRunner`: nothing is gained where the host itself computes."""
        return False

    def run(self, batch: StepBatch) -> Ran:
        """See `StepRunner`. COLLECTIVE."""
        return self.launch(batch).finish()

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> FloatRow:
        """The model's raw logits of some rows of a batch: float32 [len(rows), V]. LOCAL."""
        if not rows:
            return np.zeros((0, self.vocab_size), np.float32)
        with torch.inference_mode():
            logits_NV: FloatRow = self._model.logits(hidden_TD[list(rows)]).numpy()
        return logits_NV

    def adopt(self, routes_LEW: npt.NDArray[np.int32]) -> None:
        """Send tokens by these routes from now on. LOCAL."""
        self._routes.adopt(routes_LEW)

    def close(self) -> None:
        """See `StepRunner`: nothing outlasts a step here. LOCAL."""

    def warm_up(self, limits: Limits) -> None:
        """Run everything that serving runs once, so that no first time falls into it. LOCAL in effect: the caller
        serves nobody yet, and its communicator has no peers to wait for (before the first meeting, or when a newcomer
        has masked them all). Uses the first KV blocks as scratch; what it leaves there is never read."""
        room = limits.num_blocks * limits.block_size
        length = min(_WARM_PREFILL_TOKENS, limits.max_num_batched_tokens, limits.max_model_len, room)
        half = (length + 1) // 2
        batches = [[(0, length)], [(half, length - half)] if length > half else [], [(length - 1, 1)]]
        decodes = min(_WARM_DECODES, limits.max_num_seqs, limits.max_num_batched_tokens)
        for chunks in (*batches, [(length - 1, 1)] * decodes, []):
            hidden_TD = self.forward(scratch_batch(chunks, limits.block_size))
            logits_NV = self.logits(hidden_TD, range(hidden_TD.shape[0])[-decodes:])
            for logits_V in logits_NV[:1]:
                for temperature in (0.0, 1.0):
                    sampling = SamplingParams(max_tokens=1, temperature=temperature, top_p=0.9, top_k=50, min_p=0.01)
                    sampler.choose(logits_V, sampling, [0], 1, frozenset())
                sampler.logprobs(logits_V, 0, 1)


def limits_for(config: ServeConfig, model: ModelConfig, kv_bytes_per_block: int) -> Limits:
    """A rank's limits from the operator's choices and the model's own. LOCAL.

    kv_bytes_per_block: what `block_size` tokens take in all layers. Raises BadConfig."""
    return Limits(
        max_model_len=config.context_length(model.max_position),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=config.kv_blocks(kv_bytes_per_block),
        prefix_caching=config.enable_prefix_caching,
    )


def largest_chunks(limits: Limits) -> list[tuple[int, int]]:
    """Prefills, as `scratch_batch` takes them, of as many tokens as one step may have. LOCAL, pure."""
    longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    left = min(limits.max_num_batched_tokens, limits.max_num_seqs * longest)
    return [(0, min(longest, left - begun)) for begun in range(0, left, longest)]


def scratch_batch(chunks: Sequence[tuple[int, int]], block_size: int) -> ForwardBatch:
    """Token 0 over and over, as (start, length) chunks of sequences that all lie in the first blocks."""
    slices, positions = [], list[int]()
    for start, length in chunks:
        blocks = np.arange(-(-(start + length) // block_size), dtype=np.int32)
        slices.append(SequenceSlice(len(positions), length, start, blocks))
        positions.extend(range(start, start + length))
    positions_T = torch.tensor(positions, dtype=torch.int64)
    return ForwardBatch(torch.zeros_like(positions_T), positions_T, tuple(slices))
