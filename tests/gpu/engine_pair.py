"""Two ranks of the engine in their own processes, without a service: the same streams with steps launched ahead and
without, and across the death of one in the middle of a flight, which nobody announces. For scripts/gpu_check."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_checks import BUFFER_BYTES, checkpoint
from engine_flights import Watched
from ranks import HostSharedMemory, Party, RankProcess, Reply, party

from phalanx.backend import CudaBackend, Place
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.step import Engine
from phalanx.errors import PeerLost
from phalanx.messages import SamplingParams, Submit
from phalanx.model.config import ModelConfig
from phalanx.model.loader import Checkpoint
from phalanx.moe.experts import digest
from phalanx.world import Member, Placement, View, World

RANKS = 2


@dataclass
class Served:
    """What a rank process keeps between commands."""

    engine: Engine
    runner: Watched
    model: ModelConfig


def make(ranks: RankProcess, rank: int, device: int, board: str, path: str, interpret: bool, grounded: bool) -> Reply:
    """The parts of a rank that holds every expert. grounded: nothing is launched ahead."""
    torch.set_grad_enabled(False)
    config = ServeConfig(
        model=path, dtype="float16" if interpret else "bfloat16", device="cpu" if interpret else "cuda", ep_size=RANKS,
        num_kv_blocks=256, max_model_len=512, max_num_batched_tokens=32, max_num_seqs=8, deterministic=True,
        cuda_graph_max_bs=0 if interpret else 8, peer_timeout_s=30.0,
        slots_per_rank=Checkpoint.open(Path(path)).config.num_experts,
    )  # fmt: skip
    weights = Checkpoint.open(Path(path))
    dtype: torch.dtype = getattr(torch, config.dtype)
    place = Place(config, weights.config, rank, 0, NoticeBoard.open(board), 1)
    if interpret:
        made = CudaBackend(place, device=torch.device("cpu"), memory=HostSharedMemory(BUFFER_BYTES, True))
    else:
        torch.cuda.set_device(device)
        made = CudaBackend(place)
    runner = Watched(made.runner(weights.dense_weights(dtype)), grounded=grounded)
    if not interpret:
        runner.warm_up(made.limits)
    for layer in range(weights.config.num_moe_layers):
        for expert in range(weights.config.num_experts):
            out = made.bank.slot_bytes(layer, expert)
            weights.read_expert(layer, expert, out, dtype)
            made.bank.mark(layer, expert, expert, digest(out.data))
    ranks.comm = made.comm
    ranks.served = Served(Engine(made.limits, runner, made.comm, ()), runner, weights.config)
    return {"address": made.comm.address}


def serve_all(ranks: RankProcess, epoch: int, members: list[dict[str, Any]]) -> Reply:
    """Adopt a view whose members take turns in computing the experts: each of them holds all."""
    model, comm = ranks.served.model, ranks.comm
    view = View(epoch, RANKS, tuple(Member(**member) for member in members))
    comm.adopt(view)
    experts, alive = np.arange(model.num_experts, dtype=np.int32), [member.rank for member in view.members]
    slots_LP = np.full((model.num_moe_layers, RANKS * model.num_experts), -1, np.int32)
    for rank in alive:
        slots_LP[:, rank * model.num_experts : (rank + 1) * model.num_experts] = experts
    of_expert = np.array([alive[expert % len(alive)] for expert in experts], np.int32) * model.num_experts + experts
    routes_LEW = np.tile(of_expert[None, :, None], (model.num_moe_layers, 1, 1)).astype(np.int32)
    ranks.served.engine.adopt(World(view, Placement(slots_LP, model.num_experts, model.num_experts)), routes_LEW)
    return {}


def decode_all(ranks: RankProcess, streams: int, length: int, dies_after: int, members: list[dict[str, Any]]) -> Reply:
    """Serve this rank's streams to their end, alone if the other one dies. dies_after: by SIGKILL, once its first
    stream has so many tokens; 0: never. COLLECTIVE."""
    engine, runner, rank = ranks.served.engine, ranks.served.runner, ranks.comm.rank
    told: dict[str, list[int]] = {}
    for i in range(streams):
        name, prompt = f"r{i}", [5 + (7 * i + 3 * rank + j * j) % 90 for j in range(4 + 3 * i)]
        told[name] = []
        sampling = SamplingParams(max_tokens=length, temperature=0.8 if i % 2 else 0.0, seed=i, ignore_eos=True)
        engine.accept([Submit(name, 0, prompt, sampling)])
    losses, gap_s, idle = [], 0.0, False
    last = time.monotonic()
    while engine.has_work or not idle:
        try:
            result = engine.step()
        except PeerLost as lost:
            status = ranks.comm.status()
            losses.append({"ranks": list(lost.ranks), "causes": dict(status.causes)})
            serve_all(ranks, 1 + len(losses), [m for m in members if m["rank"] == rank])
            continue
        idle = result.idle
        for token in result.tokens:
            assert token.index == len(told[token.request_id]), "a token is lost or told twice"
            told[token.request_id].append(token.token_id)
        if result.tokens:
            now = time.monotonic()
            gap_s, last = max(gap_s, now - last), now
        if dies_after and len(told["r0"]) >= dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"told": told, "losses": losses, "behind": runner.behind, "gap_s": gap_s}


COMMANDS = {"make": make, "serve_all": serve_all, "decode_all": decode_all}


def check_pair(devices: int, *, interpret: bool) -> None:
    """See the module."""
    sizes: dict[str, Any] = {
        "layers": 2, "hidden": 64, "head_dim": 16, "heads": 2, "kv_heads": 1, "expert_width": 32, "experts": 4,
    }  # fmt: skip
    if not interpret:
        sizes = {
            "layers": 4, "hidden": 512, "head_dim": 64, "heads": 8, "kv_heads": 2, "expert_width": 128,
            "experts": 32, "top_k": 4,
        }  # fmt: skip
    streams, length = (2, 6) if interpret else (6, 200)
    with checkpoint(**sizes) as path:

        def run(grounded: bool, dies_after: int) -> dict[int, Reply]:
            with party(str(Path(__file__).resolve()), RANKS, devices) as p:
                _open(p, path, interpret, grounded)
                members = [m.member() for m in p.ranks.values()]
                for m in p.ranks.values():
                    dying = dies_after if m.rank == 1 else 0
                    m.send("decode_all", streams=streams, length=length, dies_after=dying, members=members)
                return {rank: m.reply() for rank, m in p.ranks.items() if rank == 0 or not dies_after}

        want = run(True, 0)
        got = run(False, 0)
        failed = run(False, length // 2)[0]
    assert not any(answer["behind"] for answer in want.values()), "launched ahead, though kept from it"
    for rank, answer in got.items():
        assert answer["behind"] > length // 2, f"rank {rank} launched {answer['behind']} batches ahead"
        assert answer["losses"] == [], answer["losses"]
        assert answer["told"] == want[rank]["told"], f"rank {rank}: tokens depend on what is launched ahead"
    assert [(loss["ranks"], loss["causes"]) for loss in failed["losses"]] == [([1], {"1": "notice"})], failed["losses"]
    assert failed["told"] == want[0]["told"], "tokens changed with the death of a peer"
    print(
        f"    {RANKS * streams} streams of {length} tokens: alike with {got[0]['behind']} batches launched ahead, and "
        f"across a death that nobody announced (longest gap {failed['gap_s'] * 1e3:.0f} ms, otherwise "
        f"{got[0]['gap_s'] * 1e3:.0f})"
    )


def _open(p: Party, path: str, interpret: bool, grounded: bool) -> None:
    for m in p.ranks.values():
        m.send(
            "make", rank=m.rank, device=m.device, board=p.board.address, path=path, interpret=interpret,
            grounded=grounded,
        )  # fmt: skip
    for m in p.ranks.values():
        m.address = m.reply()["address"]
    p.all("serve_all", epoch=1, members=[m.member() for m in p.ranks.values()])


if __name__ == "__main__":
    RankProcess(COMMANDS).run()
