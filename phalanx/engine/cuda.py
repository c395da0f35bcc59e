"""Runs batches on a device: tables in, tokens and status out, and one wait for each batch, which need not be at once.

A step of decodes alone replays the CUDA graph of the next size, and one with a prefill that of the next number of
tokens; what has no graph is launched eagerly, by the same code. Tokens are chosen on the device (within the graph where
every row has one to choose), and the communicator's status words travel to the host with them. Beside a peer that has
many more tokens a batch takes a larger graph than it needs, one whose experts' tiles suit what all ranks send them.

Two batches may be under way. What the second one needs of the first, its tokens, it reads where the first one's sampler
left them. Device memory at fixed addresses (tables, tokens, the gates' counts) is written and read in the order of the
one stream that both run in. Of what the host writes and reads there are two, and an event behind each batch says when
its part is done with. Requests whose tokens the device cannot choose cost one more wait, for their logits, and nothing
is launched behind their batch.

No graph is captured after the warm-up, and nothing that a view change does needs one: routes, slots, masks and peers'
addresses are words that kernels read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.comm.cuda import CudaCommunicator
from phalanx.engine import device_sampler, graphs
from phalanx.engine.batch import StepBatch
from phalanx.engine.graphs import Graphs
from phalanx.engine.runner import Flight, Ran, largest_chunks, scratch_batch
from phalanx.engine.sampler import FloatRow
from phalanx.engine.scheduler import Limits
from phalanx.model import device_tables
from phalanx.model.cuda import DeviceBatch, DeviceModel
from phalanx.model.device_tables import TableShape, Written
from phalanx.moe.cuda import DeviceBank, DeviceLoad, DeviceMemoryShort, Tiling
from phalanx.moe.gate import RouteTable

_WARM_PREFILL_TOKENS, _WARM_DECODES = 64, 8
_SAMPLE_BLOCK = 4096
_NAP_S = 20e-6


@dataclass(frozen=True)
class Replay:
    """A captured step. hidden: [size, D], where each replay leaves its hidden states. chooses: whether it goes on to
    the tokens. tile: rows of the experts' tiles."""

    graph: Any
    hidden: Tensor
    chooses: bool
    tile: int


@dataclass(frozen=True)
class _Page:
    """Host memory for one batch. words, told: int32, for `device_tables` and for `device_sampler`; tokens, status,
    load: what comes back. mark: puts a mark behind what was launched so far. passed: whether that has run."""

    words: Tensor
    told: Tensor
    tokens: Tensor
    status: Tensor
    load: Tensor
    mark: Callable[[], object]
    passed: Callable[[], bool]


class _DeviceFlight:
    """See `Flight`."""

    def __init__(self, runner: CudaRunner, batch: StepBatch, page: _Page, hidden_TD: Tensor) -> None:
        self._runner, self._batch, self._page, self._hidden_TD = runner, batch, page, hidden_TD

    def finish(self) -> Ran:
        """See `Flight`."""
        return self._runner.take(self._batch, self._page, self._hidden_TD)

    def discard(self) -> None:
        """See `Flight`. Its kernels end by themselves, by a mask or their time-out."""
        self._runner.wait(self._page)


class CudaRunner:
    """One rank's model on its device, as the engine uses it."""

    def __init__(
        self, model: DeviceModel, shape: TableShape, comm: CudaCommunicator, routes: RouteTable, load: DeviceLoad,
        bank: DeviceBank, *, graph_sizes: tuple[int, ...], token_sizes: tuple[int, ...] = (), exact: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        """graph_sizes: batches of decodes to capture graphs for; none where the device has no graphs. token_sizes: the
        same for steps with prefills, in tokens. exact: a row's bits must not depend on its batch."""
        from phalanx.engine import kernels

        self._code = kernels
        self._model, self._shape, self._comm = model, shape, comm
        self._routes, self._load, self._bank = routes, load, bank
        self.vocab_size = model.config.vocab_size
        self._exact, self._device = exact, device
        self._graphs: Graphs[Replay] = Graphs(tuple(size for size in graph_sizes if size <= shape.rows))
        self._token_graphs: Graphs[Replay] = Graphs(tuple(size for size in token_sizes if size <= shape.rows))
        self._pool: Any = None
        self._places = device_sampler.offsets(shape.rows)
        self._words = torch.zeros(shape.size, dtype=torch.int32, device=device)
        self._told = torch.zeros(self._places["end"], dtype=torch.int32, device=device)
        self._tokens = torch.zeros(shape.rows, dtype=torch.int64, device=device)
        self._pages = (self._page(), self._page())
        self._turn = 0

    def launch(self, batch: StepBatch) -> Flight:
        """See `StepRunner`. COLLECTIVE; does not wait. A batch is laid out for the graph that fits it."""
        rows, replay = self._fitting(batch)
        self._turn ^= 1
        page, samples = self._pages[self._turn], len(batch.samples)
        written = self._lay_out(batch, page, rows)
        with torch.inference_mode():
            self._send(page, written)
            if replay:
                replay.graph.replay()
                hidden_TD = replay.hidden
            else:
                # One tiling, for the most rows: the warm-up compiled it.
                hidden_TD = self._model.forward(self._batch(rows, written.pieces > 0, self._tiling(self._shape.rows)))
            if not replay or not replay.chooses:
                self._choose(hidden_TD, samples)
            page.tokens[:samples].copy_(self._tokens[:samples], non_blocking=True)
            page.status.copy_(self._comm.status_words, non_blocking=True)
            self._load.end(page.load)
        page.mark()
        return _DeviceFlight(self, batch, page, hidden_TD)

    def may_lead(self, batch: StepBatch) -> bool:
        """See `StepRunner`."""
        return not batch.prompts and all(device_sampler.on_device(request) for request, _ in batch.samples)

    def run(self, batch: StepBatch) -> Ran:
        """See `StepRunner`. COLLECTIVE, waits."""
        return self.launch(batch).finish()

    def take(self, batch: StepBatch, page: _Page, hidden_TD: Tensor) -> Ran:
        """What a launched batch brought, once it has run: for its flight. LOCAL, waits."""
        self.wait(page)
        status = self._comm.decode_status(page.status)
        if status.clean:
            self._load.count(page.load)
        tokens = page.tokens[: len(batch.samples)].tolist()
        chosen = {
            row: token
            for (request, row), token in zip(batch.samples, tokens, strict=True)
            if device_sampler.on_device(request)
        }
        return Ran(lambda wanted: self.logits(hidden_TD, wanted), chosen, status)

    def wait(self, page: _Page) -> None:
        """Until a launched batch has run: for its flight. A batch that waits for a peer that died is told so. LOCAL."""
        while not page.passed():
            self._comm.watch()
            time.sleep(_NAP_S)

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> FloatRow:
        """float32 [len(rows), V] on the host. LOCAL, waits."""
        if not rows:
            return np.zeros((0, self.vocab_size), np.float32)
        with torch.inference_mode():
            logits_NV: FloatRow = self._model.logits(hidden_TD[list(rows)]).float().cpu().numpy()
        return logits_NV

    def adopt(self, routes_LEW: npt.NDArray[np.int32]) -> None:
        """Send tokens by these routes from now on; the slots that they lead to have arrived by then. LOCAL."""
        self._bank.ready()
        self._routes.adopt(routes_LEW)

    def warm_up(self, limits: Limits) -> None:
        """Compile every kernel in every form that serving launches, and capture every graph, alone. LOCAL in effect.
        Uses the first KV blocks as scratch. Begins with the largest step that there may be, so that memory which is
        short is short now. Raises DeviceMemoryShort."""
        try:
            self.run(StepBatch(scratch_batch(largest_chunks(limits), limits.block_size), (), ()))
            self._warm_up(limits)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryShort(
                f"{self._device} has no room beside weights and KV cache for a step of {limits.max_num_batched_tokens} "
                "tokens and the graphs: lower --mem-fraction-static (or --num-kv-blocks, where it is given), "
                "--max-num-batched-tokens, --cuda-graph-max-bs or --cuda-graph-max-tokens"
            ) from error

    def _warm_up(self, limits: Limits) -> None:
        room = limits.num_blocks * limits.block_size
        length = min(_WARM_PREFILL_TOKENS, limits.max_num_batched_tokens, limits.max_model_len, room)
        one = (length - 1, 1)
        decodes = [one] * min(_WARM_DECODES, limits.max_num_seqs, limits.max_num_batched_tokens)
        for chunks in ([(0, length)], [one], decodes, [(0, length - 1), one] if length > 2 else [], []):
            ran = self.run(StepBatch(scratch_batch(chunks, limits.block_size), (), ()))
            ran.logits([0])
        with torch.inference_mode():
            self._sample(self._model.logits(torch.zeros_like(self._hidden_row())), 1)

        def capture(size: int) -> Replay:
            return self._capture(size, [one] * size, limits.block_size, chooses=True)

        def capture_tokens(size: int) -> Replay:
            # What a graph computes stands in tables: one short prefill serves to capture any.
            return self._capture(size, [(0, min(length, size))], limits.block_size, chooses=False)

        self._token_graphs.capture(capture_tokens)
        self._graphs.capture(capture)
        self._load.step_LE.zero_()

    def close(self) -> None:
        """See `StepRunner`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._token_graphs.clear()

    # --- parts

    def _page(self) -> _Page:
        """Host memory for a batch, which the device copies from and to by itself."""
        on_device = self._device.type == "cuda"

        def words(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, pin_memory=on_device)

        event = torch.cuda.Event() if on_device else None  # type: ignore[no-untyped-call]
        return _Page(
            words(self._words.numel(), torch.int32), words(self._told.numel(), torch.int32),
            words(self._tokens.numel(), torch.int64), words(self._comm.status_words.numel(), torch.int64),
            self._load.landing(), event.record if event else lambda: None, event.query if event else lambda: True,
        )  # fmt: skip

    def _lay_out(self, batch: StepBatch, page: _Page, rows: int) -> Written:
        """Write the tables of a batch on the host, padded to so many rows."""
        written = device_tables.write(page.words.numpy(), self._shape, batch.forward, rows)
        device_sampler.write(page.told.numpy(), self._shape.rows, batch.samples, later=batch.later)
        return written

    def _send(self, page: _Page, written: Written) -> None:
        """Copy what is laid out to the device."""
        self._words[: written.used].copy_(page.words[: written.used], non_blocking=True)
        self._told.copy_(page.told, non_blocking=True)

    def _fitting(self, batch: StepBatch) -> tuple[int, Replay | None]:
        """The rows to pad the batch to, and the graph for it; None: it is launched eagerly."""
        count = batch.forward.token_ids_T.shape[0]
        mean = -(-batch.step_tokens // self._comm.ep_size) or count
        decodes = count == len(batch.forward.slices)
        ladders = (self._graphs, self._token_graphs) if decodes else (self._token_graphs,)
        return graphs.find(ladders, count, self._tiling(mean).rows) or (max(1, count), None)

    def _tiling(self, rows: int) -> Tiling:
        """How the experts cut their work when every rank has so many rows on average."""
        config = self._model.config
        slots = -(-config.num_experts // self._comm.ep_size)  # with replicas, too, that many are asked for at least
        return Tiling.of(rows * config.top_k, slots, exact=self._exact)

    def _batch(self, rows: int, prefills: bool, tiling: Tiling) -> DeviceBatch:
        return DeviceBatch.of(self._words, self._shape, rows, prefills, tiling, self._tokens)

    def _choose(self, hidden_TD: Tensor, samples: int) -> None:
        """Launch what follows the model: tokens of the first `samples` rows told of.

        Padded to a size that a graph has: its product, chosen and loaded by size, was run in the warm-up."""
        if samples:
            samples = self._graphs.size_for(samples) or samples
            at = self._places["rows"]
            rows = self._told[at : at + samples]
            self._sample(self._model.logits(hidden_TD.index_select(0, rows)), samples)

    def _sample(self, logits_NV: Tensor, samples: int) -> None:
        floats, at = self._told.view(torch.float32), self._places
        block = min(_SAMPLE_BLOCK, 1 << (self.vocab_size - 1).bit_length())
        self._code.sample_kernel[(samples,)](
            logits_NV, floats[at["temperatures"] :], self._told[at["top_ks"] :], floats[at["top_ps"] :],
            floats[at["min_ps"] :], self._told.view(torch.float64)[at["noises"] // 2 :], self._tokens,
            V=self.vocab_size, BLOCK=block, num_warps=8,
        )  # fmt: skip

    def _hidden_row(self) -> Tensor:
        return torch.empty(1, self._model.config.hidden, dtype=self._bank.dtype, device=self._device)

    def _capture(self, size: int, chunks: list[tuple[int, int]], block_size: int, *, chooses: bool) -> Replay:
        """A graph of `size` rows. chooses: they are decodes, each with a token to choose; else the step has prefills,
        and `_choose` follows. Its first, eager, run compiles what is missing."""
        batch = StepBatch(scratch_batch(chunks, block_size), (), ())
        tiling = self._tiling(size)
        on_device = self._batch(size, not chooses, tiling)

        def compute() -> Tensor:
            hidden_TD = self._model.forward(on_device)
            if chooses:
                self._choose(hidden_TD, size)
            return hidden_TD

        with torch.inference_mode():
            page = self._pages[0]
            self._send(page, self._lay_out(batch, page, size))
            compute()
            page.mark()
            self.wait(page)
            graph = torch.cuda.CUDAGraph()
            # Another thread may register the vault's memory meanwhile, which is none of the capture's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden_TD = compute()
            self._pool = graph.pool()
            graph.replay()  # its first replay uploads it, which is nothing for a step that others wait for
            page.mark()
            self.wait(page)
        return Replay(graph, hidden_TD, chooses, tiling.rows)
