"""A model without an engine: ranks that hold experts, greedy decoding, and batches of any shape."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phalanx.comm.base import Communicator
from phalanx.comm.cpu import CpuCommunicator
from phalanx.comm.local import LocalCommunicator
from phalanx.model.attention import ForwardBatch, KVStore, SequenceSlice
from phalanx.model.config import ModelConfig
from phalanx.model.layers import DenseWeights
from phalanx.model.loader import Checkpoint
from phalanx.model.transformer import Transformer
from phalanx.moe.experts import SlotBank, digest
from phalanx.moe.gate import RouteTable
from phalanx.world import Member, View

BLOCK = 16

Piece = tuple[int, int, int]
"""(sequence, first position, tokens)."""


class Rank:
    """One rank's model: slots_LS says what its slots hold, routes_LEW which global slot computes an expert."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        comm: Communicator,
        slots_LS: np.ndarray,
        routes_LEW: np.ndarray,
        weights: DenseWeights | None = None,
    ) -> None:
        checkpoint = Checkpoint.open(path)
        self.config: ModelConfig = checkpoint.config
        self.dtype = dtype
        config = self.config
        self.bank = SlotBank(len(slots_LS), slots_LS.shape[1], config.hidden, config.expert_width, dtype)
        for (layer, slot), expert in np.ndenumerate(slots_LS):
            if expert >= 0:
                out = self.bank.slot_bytes(layer, slot)
                checkpoint.read_expert(layer, int(expert), out, dtype)
                self.bank.mark(layer, slot, int(expert), digest(out))
        routes = RouteTable(config.num_moe_layers, config.num_experts, routes_LEW.shape[2])
        routes.adopt(routes_LEW)
        self.model = Transformer(config, weights or checkpoint.dense_weights(dtype), self.bank, routes, comm, dtype)

    def kv(self, tokens: int) -> KVStore:
        return KVStore(self.config, -(-tokens // BLOCK), BLOCK, self.dtype)

    def run(self, sequences: Sequence[tuple[list[int], np.ndarray]], pieces: Sequence[Piece], kv: KVStore) -> Tensor:
        """Hidden states of these pieces of (token ids, blocks) sequences, in one batch."""
        ids, positions, slices = list[int](), list[int](), []
        for sequence, first, count in pieces:
            tokens, blocks = sequences[sequence]
            slices.append(SequenceSlice(len(ids), count, first, blocks[: -(-(first + count) // BLOCK)]))
            ids += tokens[first : first + count]
            positions += range(first, first + count)
        with torch.inference_mode():
            batch = ForwardBatch(
                torch.tensor(ids, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64), tuple(slices)
            )
            return self.model.forward(batch, kv)

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.logits(hidden)


def solo(path: Path, dtype: torch.dtype = torch.float32, weights: DenseWeights | None = None) -> Rank:
    """One rank that holds every expert. weights: what to use in place of the checkpoint's dense ones."""
    config = ModelConfig.read(path)
    slots = np.tile(np.arange(config.num_experts, dtype=np.int32), (config.num_moe_layers, 1))
    return Rank(path, dtype, LocalCommunicator(), slots, slots[:, :, None], weights)


def prompts(count: int, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, size=int(rng.integers(3, 60))).tolist() for _ in range(count)]


def greedy(
    rank: Rank, texts: Sequence[list[int]], steps: int, prefills: int = 0
) -> tuple[list[list[int]], list[Tensor]]:
    """Continue each prompt by `steps` tokens: one prefill a forward, at least `prefills` of them (the rest are empty),
    then one decode of all a forward. Returns the tokens and the logits [steps, V] behind them."""
    room = 512
    kv = rank.kv(max(1, len(texts)) * room)
    sequences = [
        (list(text), np.arange(i * room, (i + 1) * room, BLOCK, dtype=np.int32) // BLOCK)
        for i, text in enumerate(texts)
    ]
    logits: list[list[Tensor]] = [[] for _ in texts]

    def take(sequence: int, row: Tensor) -> None:
        logits[sequence].append(row)
        sequences[sequence][0].append(int(row.argmax()))

    for i in range(max(prefills, len(texts))):
        hidden = rank.run(sequences, [(i, 0, len(texts[i]))] if i < len(texts) else [], kv)
        if i < len(texts):
            take(i, rank.logits(hidden[-1:])[0])
    for _ in range(steps - 1):
        hidden = rank.run(sequences, [(i, len(s[0]) - 1, 1) for i, s in enumerate(sequences)], kv)
        for i, row in enumerate(rank.logits(hidden)):
            take(i, row)
    return [s[0][-steps:] for s in sequences], [torch.stack(rows) for rows in logits]


def greedy_on_ranks(
    path: Path, ranks: int, texts: Sequence[list[int]], steps: int, dtype: torch.dtype
) -> tuple[list[list[int]], list[Tensor]]:
    """As `greedy`, with the prompts dealt out to ranks in threads of this process. Every rank holds its share of the
    experts and one replica of another rank's first expert."""
    config = ModelConfig.read(path)
    per_rank = config.num_experts // ranks + 1
    slots_RS = np.array([[*range(r, config.num_experts, ranks), (r + 1) % ranks] for r in range(ranks)], np.int32)
    homes = [np.flatnonzero(slots_RS.ravel() == e) for e in range(config.num_experts)]
    routes = np.array([[home[column % len(home)] for column in range(4)] for home in homes], np.int32)
    comms = [
        CpuCommunicator(
            r, ranks, incarnation=0, max_tokens=512, hidden=config.hidden, top_k=config.top_k, slots_per_rank=per_rank,
            dtype=dtype, peer_timeout_s=100.0,
        )
        for r in range(ranks)
    ]  # fmt: skip
    view = View(1, ranks, tuple(Member(r, 0, comm_address=comm.address) for r, comm in enumerate(comms)))
    results: dict[int, tuple[list[list[int]], list[Tensor]]] = {}

    def serve(r: int) -> None:
        torch.set_num_threads(1)
        comms[r].adopt(view)
        slots = np.tile(slots_RS[r], (config.num_moe_layers, 1))
        rank = Rank(path, dtype, comms[r], slots, np.tile(routes, (config.num_moe_layers, 1, 1)))
        results[r] = greedy(rank, texts[r::ranks], steps, prefills=-(-len(texts) // ranks))
        assert comms[r].status().clean

    threads = [threading.Thread(target=serve, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in comms:
        comm.close()
    of = [(results[i % ranks], i // ranks) for i in range(len(texts))]
    return [tokens[i] for (tokens, _), i in of], [logits[i] for (_, logits), i in of]
