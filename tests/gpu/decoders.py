"""Engines with a large random model whose decode steps are timed: one rank's, several of them on one set of weights.

Every engine has a communicator, a KV cache and CUDA graphs of its own. `Variant` says in what they differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from engine_ladder import qwen3_30b_a3b, random_weights
from ranks import HostSharedMemory

from phalanx.backend import CudaBackend, Place
from phalanx.comm.base import Status
from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.launch import Mode
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.step import Engine
from phalanx.messages import Abort, SamplingParams, Submit
from phalanx.model.config import ModelConfig
from phalanx.model.layers import DenseWeights
from phalanx.moe.cuda import DeviceBank
from phalanx.world import Placement, View, World

PROMPT = 128
CHUNK, TINY_CHUNK = 512, 8
TINY = {
    "vocab_size": 97, "hidden": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_experts": 4, "top_k": 2,
    "expert_width": 32,
}  # fmt: skip
"""Sizes for Triton's interpreter."""


@dataclass(frozen=True)
class Variant:
    """guard: masks, time-outs and notices in the communicator's kernels. header: ranks tell each other at the start of
    a step what they bring. mode: how combine adds. deterministic: all that `--deterministic` changes."""

    guard: bool = True
    header: bool = True
    mode: Mode = "fast"
    deterministic: bool = False

    def communicator(self, *arguments: Any, **options: Any) -> CudaCommunicator:
        """In place of `CudaCommunicator`."""
        options["mode"] = "exact" if self.deterministic else self.mode
        if not self.guard:
            options |= {"guard": False, "elastic": False, "notices": None}
        return (CudaCommunicator if self.header else Headless)(*arguments, **options)


class Headless(CudaCommunicator):
    """A communicator whose ranks do not ask: each takes it that all the others bring what it brings itself."""

    def meet(self, row: Sequence[int]) -> tuple[npt.NDArray[np.int64], Status]:
        return np.tile(np.array(row, np.int64), (self.ep_size, 1)), Status()


def longest(batches: Sequence[int], prompt: int, steps: int, *, tiny: bool) -> int:
    """Tokens that a request may get to, when `steps` follow on the prefill of the largest batch. Pure.

    While later prompts are prefilled, those that are done decode already."""
    batch, chunk = max(batches), TINY_CHUNK if tiny else CHUNK
    left, filling = batch * prompt, 0
    while left > 0:
        left -= chunk - (batch - -(-left // prompt))
        filling += 1
    return -(-(prompt + filling + steps + 4) // 16) * 16


@dataclass(frozen=True)
class Setting:
    """What all engines of a rank have in common. longest: tokens of a request, prompt included. tiny: a tiny
    model on the CPU, in Triton's interpreter."""

    rank: int
    ep_size: int
    device: int
    board: str
    layers: int
    batches: tuple[int, ...]
    prompt: int
    longest: int
    tiny: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))  # from JSON

    @property
    def model(self) -> ModelConfig:
        """The shape of Qwen3-30B-A3B."""
        model = qwen3_30b_a3b(self.layers)
        return replace(model, **TINY) if self.tiny else model

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.tiny else torch.device("cuda", self.device)

    def config(self, deterministic: bool) -> ServeConfig:
        """Room for the largest batch."""
        most, model = max(self.batches), self.model
        return ServeConfig(
            model="random", device="cuda", ep_size=self.ep_size, max_num_seqs=most, max_model_len=self.longest,
            max_num_batched_tokens=TINY_CHUNK if self.tiny else CHUNK, num_kv_blocks=most * -(-self.longest // 16) + 64,
            enable_prefix_caching=False, deterministic=deterministic, slots_per_rank=model.num_experts // self.ep_size,
            peer_timeout_s=60.0,
        )  # fmt: skip


@dataclass
class Decoder:
    """One engine of a rank, and the requests that it decodes."""

    setting: Setting
    variant: Variant
    parts: CudaBackend
    weights: DenseWeights
    engine: Engine
    warm_up: Callable[[], None]
    names: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, setting: Setting, variant: Variant, beside: Decoder | None = None) -> Decoder:
        """beside: an engine whose weights this one uses; without, they are drawn. An unguarded engine still has to be
        warmed up, when all of its ranks have adopted a view."""
        place = Place(
            setting.config(variant.deterministic), setting.model, setting.rank, 0, NoticeBoard.open(setting.board), 1
        )
        special: dict[str, Any] = {}
        if setting.tiny:
            special = {"device": setting.torch_device, "memory": HostSharedMemory(1 << 26, True)}
        bank = beside.parts.bank if beside else None
        parts = CudaBackend(place, graph_sizes=setting.batches, bank=bank, make_comm=variant.communicator, **special)
        if beside is None:
            _draw(parts.bank)
        weights = beside.weights if beside else random_weights(setting.model, setting.torch_device)
        runner = parts.runner(weights)
        engine = Engine(parts.limits, runner, parts.comm, ())
        made = cls(setting, variant, parts, weights, engine, lambda: runner.warm_up(parts.limits))
        if variant.guard:
            made.warm_up()
        return made

    def adopt(self, view: View) -> None:
        """Serve under a view of all ranks, each with an equal share of the experts. COLLECTIVE if unguarded."""
        self.parts.comm.adopt(view)
        model = self.setting.model
        slots_LP = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
        world = World(view, Placement(slots_LP, model.num_experts, model.num_experts // view.ep_size))
        self.engine.adopt(world, np.ascontiguousarray(slots_LP[:, :, None]))
        if not self.variant.guard:
            self.warm_up()

    def fill(self, batch: int) -> float:
        """Prefill `batch` random prompts, until all of them decode; seconds. COLLECTIVE."""
        setting = self.setting
        g = np.random.default_rng(1000 * setting.rank + batch)
        sampling = SamplingParams(max_tokens=setting.longest - setting.prompt, temperature=0.0)
        self.names = [f"{batch}-{i}" for i in range(batch)]
        prompts = g.integers(0, setting.model.vocab_size, (batch, setting.prompt)).tolist()
        self.engine.accept(Submit(name, 0, prompt, sampling) for name, prompt in zip(self.names, prompts, strict=True))
        began, decoding = time.perf_counter(), set[str]()
        while len(decoding) < batch:
            decoding.update(token.request_id for token in self.engine.step().tokens)
        self.settle()
        return time.perf_counter() - began

    @property
    def context(self) -> float:
        """Tokens of a request by now, on average."""
        chunks = self.engine.next_plan().chunks
        return sum(chunk.start for chunk in chunks) / len(chunks)

    def steps(self, count: int) -> float:
        """Seconds a step of `count` steps, from an idle device to an idle device. COLLECTIVE."""
        self.settle()
        began = time.perf_counter()
        for _ in range(count):
            self.engine.step()
        self.settle()
        return (time.perf_counter() - began) / count

    def clear(self) -> None:
        """No request is left. COLLECTIVE. Raises when a collective was not whole, or a request ended before."""
        assert len(self.engine.next_plan().chunks) == len(self.names), "requests ended while they were timed"
        self.engine.accept([Abort(name) for name in self.names])
        while self.engine.has_work:
            self.engine.step()
        status = self.parts.comm.status()
        assert status.clean, status

    def settle(self) -> None:
        """Wait for the device. LOCAL."""
        if not self.setting.tiny:
            torch.cuda.synchronize()


def _draw(bank: DeviceBank) -> None:
    for layer in bank.weights_LSX:
        layer.normal_(0, 0.03)
