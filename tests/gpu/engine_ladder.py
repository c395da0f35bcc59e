"""The decode step of a large model with random weights on real devices: its rank processes, and who drives them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import Party, RankProcess, Reply, party

from phalanx.backend import CudaBackend, Place
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.batch import build as build_batch
from phalanx.engine.step import Engine
from phalanx.messages import Abort, Pause, Resume, SamplingParams, Submit
from phalanx.model.config import ModelConfig
from phalanx.model.layers import DenseWeights, LayerWeights
from phalanx.moe.cuda import DeviceBank
from phalanx.world import Member, Placement, View, World

BATCHES = (1, 16, 64, 128, 256)
PROMPT = 128
CHUNK = 512
STEPS = 30


def qwen3_30b_a3b(layers: int) -> ModelConfig:
    """The shape of Qwen3-30B-A3B, with so many layers."""
    return ModelConfig(
        architecture="qwen3_moe", vocab_size=151936, hidden=2048, num_layers=layers, num_heads=32, num_kv_heads=4,
        head_dim=128, norm_eps=1e-6, rope_theta=1e6, max_position=4096, num_experts=128, top_k=8, expert_width=768,
        dense_width=6144, moe_layers=tuple(range(layers)), norm_topk=True, qk_norm=True, attention_bias=False,
        tied_embeddings=False, sliding_window=None, eos_ids=(), dtype="bfloat16",
    )  # fmt: skip


def random_weights(config: ModelConfig, device: torch.device) -> DenseWeights:
    """Dense weights, drawn on the device."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(0, shape[-1] ** -0.5)

    def ones(width: int) -> torch.Tensor:
        return torch.ones(width, dtype=torch.bfloat16, device=device)

    D, C = config.hidden, config.head_dim
    width = (config.num_heads + 2 * config.num_kv_heads) * C
    layers = tuple(
        LayerWeights(
            ones(D), draw(width, D), None, ones(C), ones(C), draw(D, config.num_heads * C), None, ones(D),
            draw(config.num_experts, D), None, None,
        )
        for _ in range(config.num_layers)
    )  # fmt: skip
    embed = torch.empty(config.vocab_size, D, dtype=torch.bfloat16, device=device).normal_()
    return DenseWeights(embed, layers, ones(D), draw(config.vocab_size, D))


@dataclass
class Served:
    """What a rank process keeps between commands."""

    engine: Engine
    runner: Any
    model: ModelConfig


def make(
    ranks: RankProcess, rank: int, ep_size: int, device: int, board: str, layers: int, deterministic: bool,
    quantization: str,
) -> Reply:  # fmt: skip
    """The parts of a rank, random weights, graphs of all sizes."""
    began = time.monotonic()
    torch.cuda.set_device(device)
    torch.set_grad_enabled(False)
    model = replace(qwen3_30b_a3b(layers), expert_format="fp8" if quantization == "fp8" else "plain")
    config = ServeConfig(
        model="random", device="cuda", ep_size=ep_size, max_num_batched_tokens=CHUNK, max_num_seqs=max(BATCHES),
        max_model_len=512, num_kv_blocks=max(BATCHES) * 20, enable_prefix_caching=False, deterministic=deterministic,
        slots_per_rank=model.num_experts // ep_size, peer_timeout_s=20.0,
    )  # fmt: skip
    place = Place(config, model, rank, 0, NoticeBoard.open(board), 1)
    made = CudaBackend(place, graph_sizes=BATCHES)
    for layer in range(layers):
        _fill(made.bank, layer)
    runner = made.runner(random_weights(model, made.bank.weights_LSX.device))
    loaded = time.monotonic()
    runner.warm_up(made.limits)
    ranks.comm = made.comm
    ranks.served = Served(Engine(made.limits, runner, made.comm, ()), runner, model)
    return {
        "address": made.comm.address, "load_s": loaded - began, "warm_s": time.monotonic() - loaded,
        "memory_gb": torch.cuda.memory_allocated() / 1e9,
    }  # fmt: skip


def _fill(bank: DeviceBank, layer: int) -> None:
    """Random weights in a layer's slots."""
    weights = bank.weights_LSX[layer]
    if bank.layout.format == "plain":
        weights.normal_(0, 0.03)
    else:
        weights.random_(0, 256)
        weights[:, bank.layout.scales_start :].view(torch.float32).uniform_(1e-4, 5e-4)


def serve_alike(ranks: RankProcess, epoch: int, members: list[dict[str, Any]]) -> Reply:
    """Adopt a view in which rank r holds an equal share of the experts, in their order."""
    model, comm = ranks.served.model, ranks.comm
    view = View(epoch, comm.ep_size, tuple(Member(**m) for m in members))
    comm.adopt(view)
    slots_LP = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    world = World(view, Placement(slots_LP, model.num_experts, model.num_experts // comm.ep_size))
    ranks.served.engine.adopt(world, np.ascontiguousarray(slots_LP[:, :, None]))
    return {}


def decode(ranks: RankProcess, batch: int, profile: bool) -> Reply:
    """Prefill `batch` prompts, then time steps in which all of them decode. COLLECTIVE."""
    served, rank = ranks.served, ranks.comm.rank
    g = np.random.default_rng(1000 * rank + batch)
    for i in range(batch):
        prompt = g.integers(0, served.model.vocab_size, PROMPT).tolist()
        served.engine.accept([Submit(f"{batch}-{i}", 0, prompt, SamplingParams(max_tokens=256, temperature=0.0))])
    prefill_s = []
    while len(served.engine.next_plan().chunks) < batch or any(c.length > 1 for c in served.engine.next_plan().chunks):
        prefill_s += _timed(served.engine.step, 1)
    step_s = _timed(served.engine.step, STEPS)
    served.engine.accept([Pause()])
    served.engine.step()  # the step that is under way by then
    served.engine.accept([Resume()])
    # The same decode again and again, without engine, header and commit: all that it writes it writes again.
    forward = build_batch(served.engine.next_plan())
    assert len(forward.samples) == batch, f"{len(forward.samples)} of {batch} requests decode"
    run_s = _timed(lambda: served.runner.run(forward), STEPS)
    top = _profiled(lambda: served.runner.run(forward)) if profile else []
    if not profile:
        _timed(lambda: served.runner.run(forward), 3)
    served.engine.accept([Abort(f"{batch}-{i}") for i in range(batch)])
    served.engine.step()
    status = ranks.comm.status()
    return {
        "step_ms": float(np.median(step_s)) * 1e3, "run_ms": float(np.median(run_s)) * 1e3,
        "worst_ms": max(step_s) * 1e3, "prefill_ms": float(np.median(prefill_s)) * 1e3, "top": top,
        "clean": status.clean,
    }  # fmt: skip


def _timed(do: Any, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        do()
        seconds.append(time.monotonic() - began)
    return seconds


def _profiled(do: Any) -> list[str]:
    """The kernels that three runs spent most of their time in."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            do()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
    return [f"{r.self_device_time_total / 3e3:7.3f} ms in {r.count // 3:4d} x {r.key[:60]}" for r in rows]


COMMANDS = {"make": make, "serve_alike": serve_alike, "decode": decode}


def ladder(
    devices: int, *, layers: int, deterministic: bool = False, batches: Any = BATCHES, quantization: str = "none"
) -> None:
    """Build, then one line a batch size, each as soon as it is known."""
    ep_size = 2 if devices > 1 else 1
    with party(str(Path(__file__).resolve()), ep_size, devices) as p:
        _open(p, layers, deterministic, quantization)
        for batch in batches:
            answers = p.all("decode", batch=batch, profile=False) if batch != 64 else _with_profile(p, batch)
            worst = {name: max(a[name] for a in answers.values()) for name in ("step_ms", "run_ms", "worst_ms")}
            assert all(a["clean"] for a in answers.values()), "a collective was not whole"
            print(
                f"    batch {batch:3d} a rank: step {worst['step_ms']:.2f} ms (of it tables, forward, sampling "
                f"{worst['run_ms']:.2f}; worst step {worst['worst_ms']:.1f}), "
                f"{batch * ep_size / worst['step_ms'] * 1e3:.0f} tokens/s; a prefill step of {CHUNK} tokens "
                f"{max(a['prefill_ms'] for a in answers.values()):.0f} ms",
                flush=True,
            )
            for line in answers[0]["top"]:
                print(f"        {line}", flush=True)


def _with_profile(p: Party, batch: int) -> dict[int, Reply]:
    """Rank 0 profiles its last runs; the others run them, too."""
    for rank, m in p.ranks.items():
        m.send("decode", batch=batch, profile=rank == 0)
    return {rank: m.reply() for rank, m in p.ranks.items()}


def _open(p: Party, layers: int, deterministic: bool, quantization: str) -> None:
    for m in p.ranks.values():
        m.send(
            "make", rank=m.rank, ep_size=p.ep_size, device=m.device, board=p.board.address, layers=layers,
            deterministic=deterministic, quantization=quantization,
        )  # fmt: skip
    for m in p.ranks.values():
        answer = m.reply()
        m.address = answer["address"]
        if m.rank == 0:
            print(
                f"    Qwen3-30B-A3B shape, {layers} layers, {p.ep_size} ranks: {answer['memory_gb']:.1f} GB a rank, "
                f"weights drawn in {answer['load_s']:.1f} s, warm-up and graphs {answer['warm_s']:.1f} s",
                flush=True,
            )
    p.epoch += 1
    members = [m.member() for m in p.ranks.values()]
    p.all("serve_alike", epoch=p.epoch, members=members)


if __name__ == "__main__":
    RankProcess(COMMANDS).run()
