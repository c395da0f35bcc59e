"""Runs batches on a device: tables in, tokens and status out, and one wait, at the end.

A step of decodes alone replays the CUDA graph of the next size; anything with a prefill is launched eagerly, by the
same code. Tokens are chosen on the device, and the communicator's status words travel to the host with them. Before it
waits for both, the host lays out the batch that most likely follows. A step's other wait is its header's, before `run`;
requests whose tokens the device cannot choose cost one more, for their logits.

No graph is captured after the warm-up, and nothing that a view change does needs one: routes, slots, masks and peers'
addresses are words that kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.comm.cuda import CudaCommunicator
from phalanx.engine import device_sampler
from phalanx.engine.batch import StepBatch
from phalanx.engine.graphs import Graphs
from phalanx.engine.runner import Ran, largest_chunks, nothing, scratch_batch
from phalanx.engine.sampler import FloatRow
from phalanx.engine.scheduler import Limits
from phalanx.model import device_tables
from phalanx.model.cuda import DeviceBatch, DeviceModel
from phalanx.model.device_tables import TableShape, Written
from phalanx.moe.cuda import DeviceBank, DeviceLoad, DeviceMemoryShort, Tiling
from phalanx.moe.gate import RouteTable

_WARM_PREFILL_TOKENS, _WARM_DECODES = 64, 8
_SAMPLE_BLOCK = 4096


@dataclass(frozen=True)
class Replay:
    """A captured decode. hidden: [size, D], where each replay leaves its hidden states."""

    graph: Any
    hidden: Tensor


@dataclass(frozen=True)
class _Page:
    """Host memory for one batch's tables: int32 words for `device_tables` and for `device_sampler`."""

    words: Tensor
    told: Tensor


@dataclass(frozen=True)
class _Laid:
    """A batch whose tables stand in a page. replay: the graph for it, of `rows` rows; None: it is launched eagerly."""

    batch: StepBatch
    page: _Page
    rows: int
    written: Written
    replay: Replay | None


class CudaRunner:
    """One rank's model on its device, as the engine uses it."""

    def __init__(
        self, model: DeviceModel, shape: TableShape, comm: CudaCommunicator, routes: RouteTable, load: DeviceLoad,
        bank: DeviceBank, *, graph_sizes: tuple[int, ...], exact: bool, device: torch.device,
    ) -> None:  # fmt: skip
        """graph_sizes: batches of decodes to capture graphs for; none where the device has no graphs. exact: a row's
        bits must not depend on its batch."""
        from phalanx.engine import kernels

        self._code = kernels
        self._model, self._shape, self._comm = model, shape, comm
        self._routes, self._load, self._bank = routes, load, bank
        self.vocab_size = model.config.vocab_size
        self._exact, self._device = exact, device
        self._graphs: Graphs[Replay] = Graphs(tuple(size for size in graph_sizes if size <= shape.rows))
        self._pool: Any = None
        on_device = device.type == "cuda"
        self._wait: Callable[[], object] = torch.cuda.current_stream(device).synchronize if on_device else lambda: None

        def both(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            """The same words on the host and on the device."""
            host = torch.zeros(count, dtype=dtype, pin_memory=on_device)
            return host, torch.zeros(count, dtype=dtype, device=device)

        places = self._places = device_sampler.offsets(shape.rows)
        words_host, self._words = both(shape.size, torch.int32)
        told_host, self._told = both(places["end"], torch.int32)
        # Two, so that the next batch can be laid out while this one's copy may be under way.
        other_words, other_told = (
            torch.zeros(host.numel(), dtype=torch.int32, pin_memory=on_device) for host in (words_host, told_host)
        )
        self._pages = (_Page(words_host, told_host), _Page(other_words, other_told))
        self._laid: _Laid | None = None
        self._tokens_host, self._tokens = both(shape.rows, torch.int64)
        self._status_host = torch.zeros(comm.status_words.shape, dtype=torch.int64, pin_memory=on_device)

    def run(self, batch: StepBatch, ahead: Callable[[], StepBatch | None] = nothing) -> Ran:
        """See `StepRunner`. COLLECTIVE; waits for the device at its end. The tables of the batch that `ahead` makes are
        laid out before that; if it is the next one, only its tokens are missing then."""
        laid, self._laid = self._laid, None
        if laid is None or laid.batch is not batch:
            laid = self._lay_out(batch, self._pages[0])
        else:
            device_tables.write_tokens(laid.page.words.numpy(), self._shape, batch.forward)
        with torch.inference_mode():
            self._send(laid)
            if laid.replay:
                laid.replay.graph.replay()
                hidden_TD = laid.replay.hidden
            else:
                on_device = self._batch(laid.rows, laid.written, self._shape.rows)
                hidden_TD = self._compute(on_device, len(batch.samples))
        # The device works now.
        known = [device_sampler.on_device(request) for request, _ in batch.samples]
        following = ahead()
        if following is not None:
            other = next(page for page in self._pages if page is not laid.page)
            self._laid = self._lay_out(following, other, later=1)
        with torch.inference_mode():
            self._wait()
            status = self._comm.decode_status(self._status_host)
            if status.clean:
                self._load.count()
            else:
                self._load.drop()
        tokens = self._tokens_host[: len(batch.samples)].tolist()
        chosen = {row: token for (_, row), token, here in zip(batch.samples, tokens, known, strict=True) if here}
        return Ran(lambda wanted: self.logits(hidden_TD, wanted), chosen, status)

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
                "--max-num-batched-tokens or --cuda-graph-max-bs"
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
            self._wait()

        def capture(size: int) -> Replay:
            return self._capture(size, [(length - 1, 1)] * size, limits.block_size)

        self._graphs.capture(capture)
        self._load.drop()

    def close(self) -> None:
        """See `StepRunner`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._laid = None
        self._graphs.clear()

    # --- parts

    def _lay_out(self, batch: StepBatch, page: _Page, later: int = 0) -> _Laid:
        """Write the tables of a batch on the host, for the graph that fits it if it has decodes alone. later: see
        `device_sampler.write`."""
        forward = batch.forward
        count = forward.token_ids_T.shape[0]
        found = self._graphs.find(count) if count == len(forward.slices) else None
        rows, replay = found or (max(1, count), None)
        return self._lay_out_for(batch, page, rows, replay, later)

    def _lay_out_for(
        self, batch: StepBatch, page: _Page, rows: int, replay: Replay | None = None, later: int = 0
    ) -> _Laid:
        written = device_tables.write(page.words.numpy(), self._shape, batch.forward, rows)
        device_sampler.write(page.told.numpy(), self._shape.rows, batch.samples, later=later)
        return _Laid(batch, page, rows, written, replay)

    def _send(self, laid: _Laid) -> None:
        """Copy what is laid out to the device."""
        used = laid.written.used
        self._words[:used].copy_(laid.page.words[:used], non_blocking=True)
        self._told.copy_(laid.page.told, non_blocking=True)

    def _batch(self, rows: int, written: Written, most: int) -> DeviceBatch:
        """most: rows that this rank or a peer may have, which the experts' tiling is chosen for."""
        config = self._model.config
        slots = -(-config.num_experts // self._comm.ep_size)  # with replicas, too, that many are asked for at least
        tiling = Tiling.of(most * config.top_k, slots, exact=self._exact)
        return DeviceBatch.of(self._words, self._shape, rows, written, tiling)

    def _compute(self, batch: DeviceBatch, samples: int) -> Tensor:
        """Launch a step: hidden states, tokens of the first `samples` rows told of, and what the host reads."""
        hidden_TD = self._model.forward(batch)
        if samples:
            at = self._places["rows"]
            rows = self._told[at : at + samples]
            self._sample(self._model.logits(hidden_TD.index_select(0, rows)), samples)
            self._tokens_host[:samples].copy_(self._tokens[:samples], non_blocking=True)
        self._status_host.copy_(self._comm.status_words, non_blocking=True)
        return hidden_TD

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

    def _capture(self, size: int, chunks: list[tuple[int, int]], block_size: int) -> Replay:
        """A graph of `size` decodes, each with a token to choose. Its first, eager, run compiles what is missing."""
        batch = StepBatch(scratch_batch(chunks, block_size), (), ())
        with torch.inference_mode():
            laid = self._lay_out_for(batch, self._pages[0], size)
            self._send(laid)
            on_device = self._batch(size, laid.written, size)
            self._compute(on_device, size)
            self._wait()
            graph = torch.cuda.CUDAGraph()
            # Another thread may register the vault's memory meanwhile, which is none of the capture's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden_TD = self._compute(on_device, size)
            self._pool = graph.pool()
        return Replay(graph, hidden_TD)
