"""One rank alone, in this process: an engine on a real checkpoint, every expert in its own slots.

For tests that need the real model without processes, for benchmarks, and for programs that want to call the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from phalanx.backend import Backend
from phalanx.comm.base import Communicator
from phalanx.comm.local import LocalCommunicator
from phalanx.config import ServeConfig
from phalanx.engine.rehearsal import rehearse
from phalanx.engine.runner import Runner, StepRunner, limits_for
from phalanx.engine.step import Engine
from phalanx.messages import ToWorker
from phalanx.model.attention import KVStore
from phalanx.model.config import ModelConfig
from phalanx.model.known import open_model
from phalanx.model.transformer import Transformer
from phalanx.moe.experts import SlotBank, digest
from phalanx.moe.gate import RouteTable
from phalanx.world import Member, Placement, View, World


@dataclass(frozen=True)
class Generated:
    """What one request got. reason: stop, length or abort, and for one that was refused why."""

    token_ids: list[int]
    reason: str


class SoloEngine:
    """The engine of rank 0 of 1. `config` says model, dtype and limits, as for `phalanx serve`."""

    def __init__(
        self,
        config: ServeConfig,
        comm: Communicator | None = None,
        *,
        warm_up: bool = False,
        parts: Callable[[ServeConfig, ModelConfig], Backend] | None = None,
    ) -> None:
        """parts: makes the rank's parts, from which communicator, slots and model are then taken, e.g. on a device."""
        checkpoint = open_model(config)
        dtype: torch.dtype = getattr(torch, config.dtype)
        model = checkpoint.config
        weights = checkpoint.dense_weights(dtype)
        self._comm_is_own = comm is None
        if parts is not None:
            made = parts(config, model)
            self.runner: StepRunner = made.runner(weights)
            self._bank, self.comm, self.limits = made.bank, made.comm, made.limits
        else:
            self.limits = limits_for(config, model, KVStore.block_bytes(model, config.block_size, dtype))
            self.comm = comm or LocalCommunicator()
            self._bank = SlotBank(
                model.num_moe_layers, model.num_experts, model.hidden, model.expert_width, dtype, model.expert_format
            )
            routes = RouteTable(model.num_moe_layers, model.num_experts, 1)
            transformer = Transformer(model, weights, self._bank, routes, self.comm, dtype)
            kv = KVStore(model, self.limits.num_blocks, self.limits.block_size, dtype)
            self.runner = Runner(transformer, kv, routes, model.vocab_size)
        self.engine = Engine(self.limits, self.runner, self.comm, model.eos_ids)
        if warm_up:
            self.runner.warm_up(self.limits)
            rehearse(self.limits, self.runner, self.comm)
        for layer in range(model.num_moe_layers):
            for expert in range(model.num_experts):
                out = self._bank.slot_bytes(layer, expert)
                checkpoint.read_expert(layer, expert, out, dtype)
                self._bank.mark(layer, expert, expert, digest(out.data))
        checkpoint.close()
        if warm_up:
            self._bank.pack()
        slots_LP = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
        member = Member(0, 0, pid=os.getpid(), comm_address=self.comm.address, weights_address=self._bank.address)
        self.world = World(View(1, 1, (member,)), Placement(slots_LP, model.num_experts, model.num_experts))
        self.comm.adopt(self.world.view)
        self.engine.adopt(self.world, slots_LP[:, :, None])

    def generate(self, *messages: ToWorker) -> dict[str, Generated]:
        """Take messages in and step until all is done; what every request got by then. LOCAL."""
        self.engine.accept(messages)
        token_ids: dict[str, list[int]] = {}
        reasons: dict[str, str] = {}
        while self.engine.has_work:
            result = self.engine.step()
            for token in result.tokens:
                ids = token_ids.setdefault(token.request_id, [])
                if token.token_id >= 0:
                    ids.append(token.token_id)
                if token.finish_reason is not None:
                    reasons[token.request_id] = token.finish_reason
            reasons.update((refusal.request_id, refusal.reason) for refusal in result.rejected)
        return {name: Generated(token_ids.get(name, []), reason) for name, reason in reasons.items()}

    def close(self) -> None:
        """Give everything back, in the order in which nothing is used by what is left: graphs, the communicator with
        its thread and its registrations, unless it came from the caller, and the experts' memory. LOCAL."""
        self.runner.close()
        if self._comm_is_own:
            self.comm.close()
        self._bank.close()
