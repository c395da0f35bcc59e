"""A step in which one rank decodes while its peers prefill, with and without knowing of them: for scripts/gpu_check.

Every rank's experts get their share of all ranks' tokens. A rank that knows how many those are replays a graph whose
tiles suit them; one that does not replays the graph that its own rows need, and all ranks wait for its experts.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoders import TINY
from engine_ladder import qwen3_30b_a3b, random_weights
from ranks import HostSharedMemory, Party, RankProcess, Reply, party

from phalanx.backend import CudaBackend, Place
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.batch import StepBatch
from phalanx.engine.request import Request
from phalanx.engine.runner import StepRunner
from phalanx.messages import SamplingParams, Submit
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.config import ModelConfig
from phalanx.world import Member, View

DECODES, CONTEXT = 64, 128
PREFILLS = (512, 2048)
KINDS = ("all decode", "unaware", "aware")
SLOWER = 1.05
"""What knowing of the peers may cost at most, which is for what a machine does between two steps."""


@dataclass
class Served:
    """What a rank process keeps between commands. context: tokens before each decode."""

    runner: StepRunner
    model: ModelConfig
    decodes: int
    context: int


def make(
    ranks: RankProcess, rank: int, ep_size: int, device: int, board: str, layers: int, decodes: int, most: int,
    tiny: bool,
) -> Reply:  # fmt: skip
    """The parts of a rank, random weights, graphs."""
    torch.set_grad_enabled(False)
    model = qwen3_30b_a3b(layers)
    special: dict[str, Any] = {}
    if tiny:
        model = replace(model, **TINY)
        special = {"device": torch.device("cpu"), "memory": HostSharedMemory(1 << 26, True)}
    else:
        torch.cuda.set_device(device)
    context = min(CONTEXT, most)
    longest = most + 16
    config = ServeConfig(
        model="random", device="cuda", ep_size=ep_size, max_num_batched_tokens=most, max_num_seqs=decodes,
        max_model_len=longest, num_kv_blocks=2 * -(-longest // 16), enable_prefix_caching=False,
        slots_per_rank=model.num_experts // ep_size, peer_timeout_s=60.0,
    )  # fmt: skip
    made = CudaBackend(Place(config, model, rank, 0, NoticeBoard.open(board), 1), graph_sizes=(decodes,), **special)
    for layer in made.bank.weights_LSX:
        layer.normal_(0, 0.03)
    runner = made.runner(random_weights(model, made.bank.weights_LSX.device))
    if not tiny:
        runner.warm_up(made.limits)
    ranks.comm = made.comm
    ranks.served = Served(runner, model, decodes, context)
    return {"address": made.comm.address}


def serve(ranks: RankProcess, epoch: int, members: list[dict[str, Any]]) -> Reply:
    """Adopt a view in which rank r holds an equal share of the experts, in their order."""
    model, ep_size = ranks.served.model, ranks.comm.ep_size
    ranks.comm.adopt(View(epoch, ep_size, tuple(Member(**m) for m in members)))
    slots_LE = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    ranks.served.runner.adopt(np.ascontiguousarray(slots_LE[:, :, None]))
    return {}


def race(ranks: RankProcess, tokens: int, rounds: int) -> Reply:
    """Milliseconds of each kind of step in each round, in turns: rank 0 decodes, the others prefill `tokens` tokens, or
    decode as well. COLLECTIVE."""
    served, rank, peers = ranks.served, ranks.comm.rank, ranks.comm.ep_size - 1
    served.runner.run(_batch(served.model, [(0, served.context)], rank))  # what the decodes look at
    one = _batch(served.model, [(served.context, 1)] * served.decodes, rank)
    mixed = _batch(served.model, [(0, tokens)], rank) if rank else one
    batches = {
        "all decode": replace(one, step_tokens=served.decodes * (peers + 1)),
        "unaware": mixed,
        "aware": replace(mixed, step_tokens=served.decodes + tokens * peers),
    }
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    clean = True
    for turn in range(rounds + 2):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            began = time.perf_counter()
            ran = served.runner.run(batches[kind])
            times[kind].append(1e3 * (time.perf_counter() - began))
            clean = clean and ran.status is not None and ran.status.clean
    return {"ms": {kind: values[2:] for kind, values in times.items()}, "clean": clean}


def _batch(model: ModelConfig, chunks: list[tuple[int, int]], seed: int) -> StepBatch:
    """Random tokens as (context, length) chunks of sequences that all lie in the first blocks, each with a greedy token
    to choose."""
    positions = [at for context, length in chunks for at in range(context, context + length)]
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, len(positions))
    slices, row = [], 0
    for context, length in chunks:
        slices.append(SequenceSlice(row, length, context, np.arange(-(-(context + length) // 16), dtype=np.int32)))
        row += length
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    samples = tuple(
        (Request.of(Submit(f"r{s.start}", 0, [1], sampling), frozenset(), 16), s.start + s.length - 1) for s in slices
    )
    return StepBatch(ForwardBatch(torch.from_numpy(tokens), torch.tensor(positions), tuple(slices)), samples, ())


COMMANDS = {"make": make, "serve": serve, "race": race}


def skew(devices: int, *, layers: int, rounds: int = 20, tiny: bool = False) -> None:
    """A line for each length of prefill. tiny: in Triton's interpreter, to check this code."""
    if devices < 2 and not tiny:
        print("    skew: one device, no peer")
        return
    prefills, decodes = ((8,), 2) if tiny else (PREFILLS, DECODES)
    with party(str(Path(__file__).resolve()), 2, devices) as p:
        _open(p, layers=layers, decodes=decodes, most=max(prefills), tiny=tiny)
        for tokens in prefills:
            answers = list(p.all("race", tokens=tokens, rounds=rounds).values())
            assert all(answer["clean"] for answer in answers), "a collective was not whole"
            ms = {
                kind: statistics.median(map(max, zip(*(answer["ms"][kind] for answer in answers), strict=True)))
                for kind in KINDS
            }
            print(
                f"    {decodes} decodes beside a prefill of {tokens} tokens, {layers} layers: {ms['aware']:.2f} ms a "
                f"step, {ms['unaware']:.2f} unaware of it; {ms['all decode']:.2f} when both ranks decode",
                flush=True,
            )
            assert tiny or ms["aware"] < SLOWER * ms["unaware"], "what the ranks know of each other makes them slower"


def _open(p: Party, **setting: Any) -> None:
    for m in p.ranks.values():
        m.send("make", rank=m.rank, ep_size=p.ep_size, device=m.device, board=p.board.address, **setting)
    for m in p.ranks.values():
        m.address = m.reply()["address"]
    p.epoch += 1
    p.all("serve", epoch=p.epoch, members=[m.member() for m in p.ranks.values()])


if __name__ == "__main__":
    RankProcess(COMMANDS).run()
