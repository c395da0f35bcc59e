#!/usr/bin/env python3
"""The device's share of a decode step, with each way of saving time on and off: the shape of Qwen3-30B-A3B.

    benchmarks/decode_gpu.py                                 products, then steps, batches of 1 to 256 a rank; 60 s
    benchmarks/decode_gpu.py --batches 64 --variants plain,served
    benchmarks/decode_gpu.py --kernels 16                    the times of kernels for these batches

Two ranks on two devices; on one device one rank alone, with half of the experts. One process a rank holds one set of
weights, and captures the same decode (layers, last norm, logits; no sampling, no host) with each variant. Figures:
device time between two events around a replay, all variants in turn, the median, and of both ranks the slower.
Contexts of 160 positions, random weights, random tokens. Kernels' times are from the profiler.

Products: of one rank alone, all layers in turn, so that weights come from memory, by the library and by our kernel.

Checked before steps are timed: two layers of every variant give what those of the plain one give, but for rounding (a
router's near-ties may fall otherwise for a few rows).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import numpy as np
import torch
from engine_ladder import qwen3_30b_a3b, random_weights
from ranks import Party, Rank, RankProcess, Reply, party, watchdog

from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.launch import LaunchShape
from phalanx.comm.notices import NoticeBoard
from phalanx.model import device_tables
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.config import ModelConfig
from phalanx.model.cuda import DeviceBatch, DeviceKV, DeviceModel, table_shape
from phalanx.model.decode_options import DecodeOptions
from phalanx.model.layers import DenseWeights
from phalanx.moe.cuda import DeviceBank, DeviceExperts, DeviceLoad, Tiling
from phalanx.moe.gate import RouteTable
from phalanx.moe.thin import ThinProducts
from phalanx.world import Member, View

SCRIPT = str(Path(__file__).resolve())
BATCHES = (1, 16, 64, 128, 256)
CONTEXT, BLOCK = 160, 16
TOKENS = 512
REPLAYS = 10
ROUNDS = 2
LIMIT_S, LAST_START_S = 100.0, 70.0


VARIANTS = {
    "plain": DecodeOptions(),
    "router": DecodeOptions(router=256),
    "out": DecodeOptions(out=256),
    "placed": DecodeOptions(placed=256),
    "norm apart": replace(DecodeOptions.best(exact=False), summed=0),
    "served": DecodeOptions.best(exact=False),
}


@dataclass
class Parts:
    """What all variants of a rank share."""

    model: ModelConfig
    weights: DenseWeights
    bank: DeviceBank
    routes: RouteTable
    load: DeviceLoad
    kv: DeviceKV
    comm: CudaCommunicator
    shape: device_tables.TableShape

    def decoder(self, options: DecodeOptions, layers: int) -> DeviceModel:
        """The first layers of the model. LOCAL."""
        model = replace(self.model, num_layers=layers, moe_layers=tuple(range(layers)))
        weights = replace(self.weights, layers=self.weights.layers[:layers])
        experts = DeviceExperts(
            self.bank, self.routes, self.comm, self.load, top_k=model.top_k, num_experts=model.num_experts,
            norm_topk=True, pairs=self.comm.ep_size * TOKENS * model.top_k, weigh_early=True,
        )  # fmt: skip
        return DeviceModel(model, weights, experts, self.kv, self.shape, exact=False, options=options)

    def batch(self, rows: int) -> DeviceBatch:
        """`rows` decodes at position CONTEXT of sequences of their own. LOCAL."""
        g = np.random.default_rng(1000 * self.comm.rank + rows)
        a_sequence = CONTEXT // BLOCK + 1
        slices = tuple(
            SequenceSlice(i, 1, CONTEXT, np.arange(i * a_sequence, (i + 1) * a_sequence, dtype=np.int32))
            for i in range(rows)
        )
        tokens = torch.from_numpy(g.integers(0, self.model.vocab_size, rows))
        words = np.zeros(self.shape.size, np.int32)
        forward = ForwardBatch(tokens, torch.full((rows,), CONTEXT), slices)
        device_tables.write(words, self.shape, forward, rows)
        tiling = Tiling.of(rows * self.model.top_k, self.bank.slots_per_rank, exact=False)
        on_device = torch.from_numpy(words).to(self.bank.weights_LSX.device)
        return DeviceBatch.of(on_device, self.shape, rows, False, tiling)


def make(ranks: RankProcess, rank: int, ep_size: int, device: int, board: str, layers: int) -> Reply:
    """Weights and a communicator."""
    here = torch.device("cuda", device)
    torch.cuda.set_device(here)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)  # the same dense weights on all ranks
    model = qwen3_30b_a3b(layers)
    model = model if ep_size > 1 else replace(model, num_experts=model.num_experts // 2)
    weights = random_weights(model, here)
    torch.manual_seed(1 + rank)
    slots = model.num_experts // ep_size
    bank = DeviceBank(layers, slots, model.hidden, model.expert_width, torch.bfloat16, here)
    for layer in range(layers):
        bank.weights_LSX[layer].normal_(0, 0.03)
    routes = RouteTable(layers, model.num_experts, 1, here)
    routes.adopt(np.tile(np.arange(model.num_experts, dtype=np.int32)[None, :, None], (layers, 1, 1)))
    blocks = max(BATCHES) * (CONTEXT // BLOCK + 1)
    kv = DeviceKV(model, blocks, BLOCK, torch.bfloat16, here)
    kv.data.normal_()
    shape = table_shape(
        model, rows=TOKENS, sequences=max(BATCHES), max_model_len=512, block_size=BLOCK, num_blocks=blocks, exact=False,
        device=here,
    )  # fmt: skip
    comm = CudaCommunicator(
        rank, ep_size, incarnation=0, max_tokens=TOKENS, hidden=model.hidden, top_k=model.top_k,
        slots_per_rank=slots, peer_timeout_s=20.0, notices=NoticeBoard.open(board), mode="fast",
        shape=LaunchShape.of(model.hidden), device=here,
    )  # fmt: skip
    load = DeviceLoad(layers, model.num_experts, here)
    ranks.parts = Parts(model, weights, bank, routes, load, kv, comm, shape)
    torch.cuda.synchronize()
    return {"address": comm.address}


def meet(ranks: RankProcess, addresses: list[str]) -> Reply:
    """All ranks are in."""
    comm = ranks.parts.comm
    comm.adopt(View(1, comm.ep_size, tuple(Member(r, 0, comm_address=a) for r, a in enumerate(addresses))))
    comm.barrier()
    torch.cuda.synchronize()
    return {}


def products(ranks: RankProcess) -> Reply:
    """Microseconds of a product with a layer's weights, by which, rows and the library or our kernel. LOCAL."""
    parts: Parts = ranks.parts
    layers, told = parts.weights.layers, dict[str, Any]()
    chosen: dict[str, list[Any]] = {
        "qkv": [w.qkv for w in layers],
        "out": [w.out for w in layers],
        "router": [w.router for w in layers],
    }
    thin = ThinProducts()
    for name, weights in chosen.items():
        for rows in (1, 16, 64, 256):
            x_ND = torch.randn(rows, weights[0].shape[1], device=weights[0].device).to(torch.bfloat16)
            figures = []
            for product in (torch.nn.functional.linear, thin):

                def run(product: Any = product, x_ND: torch.Tensor = x_ND, weights: Any = weights) -> None:
                    for w_OD in weights:
                        product(x_ND, w_OD)

                figures.append(_alone(run) / len(weights) * 1e3)
            told[f"{name}, {rows} rows"] = figures
    return told


def _alone(run: Callable[[], None]) -> float:
    """Milliseconds of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return statistics.median(_replayed(graph, 5))


def check(ranks: RankProcess, names: list[str], batch: int) -> Reply:
    """Two layers of each variant, compared with the plain one: how far off rows are, whether too far. COLLECTIVE."""
    parts: Parts = ranks.parts
    told: dict[str, Any] = {}
    want_TD: torch.Tensor | None = None
    for name in ["plain", *(n for n in names if n != "plain")]:
        decoder = parts.decoder(VARIANTS[name], 2)
        on_device = parts.batch(batch)
        for _ in range(2):  # the second one finds what the first one left
            hidden_TD = decoder.forward(on_device)
        got_TD = torch.cat([hidden_TD, decoder.logits(hidden_TD)], dim=1).float()
        torch.cuda.synchronize()
        status = parts.comm.status()
        assert status.clean, f"{name}: {status}"
        want_TD = got_TD if want_TD is None else want_TD
        error_T = (got_TD - want_TD).norm(dim=1) / want_TD.norm(dim=1)
        told[name] = {"median": float(error_T.median()), "off": float((error_T > 0.1).float().mean())}
        right = told[name]["median"] < 3e-2 and told[name]["off"] <= 0.15
        told[name]["right"] = right and bool(torch.isfinite(got_TD).all())
    parts.load.step_LE.zero_()
    return told


def bench(ranks: RankProcess, names: list[str], batch: int, kernels: bool, profiled: bool) -> Reply:
    """Milliseconds of a replay of each variant; kernels: also of its kernels, on the rank that is `profiled`.
    COLLECTIVE."""
    parts: Parts = ranks.parts
    graphs = {name: _captured(parts, VARIANTS[name], batch) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, (graph, _) in graphs.items():
            samples[name] += _replayed(graph, REPLAYS)
    told: dict[str, Any] = {}
    for name, (graph, _) in graphs.items():
        told[name] = {"ms": statistics.median(samples[name]), "best": min(samples[name])}
        if kernels:
            told[name]["kernels"] = _profiled(graph.replay) if profiled else _thrice(graph.replay)
    assert parts.comm.status().clean, "a collective was not whole"
    parts.load.step_LE.zero_()
    return told


def _captured(parts: Parts, options: DecodeOptions, batch: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """The graph, and what must stay as long as it does."""
    decoder = parts.decoder(options, parts.model.num_layers)
    on_device = parts.batch(batch)

    def run() -> torch.Tensor:
        return decoder.logits(decoder.forward(on_device))

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    return graph, [decoder, on_device, logits]


def _replayed(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Milliseconds; the first two replays are not told."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * (times + 2))]
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [s.elapsed_time(e) for s, e in zip(events[::2], events[1::2], strict=True)][2:]


def _thrice(do: Callable[[], None]) -> dict[str, list[float]]:
    for _ in range(3):
        do()
    torch.cuda.synchronize()
    return {}


def _profiled(do: Callable[[], None]) -> dict[str, list[float]]:
    """Kernel -> milliseconds and launches of one replay."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        _thrice(do)
    told: dict[str, list[float]] = {}
    for row in seen.key_averages():
        name = row.key if row.key.endswith("_kernel") else "(library)"
        before = told.get(name, [0.0, 0.0])
        told[name] = [before[0] + row.self_device_time_total / 3e3, before[1] + row.count / 3]
    return told


COMMANDS = {"make": make, "meet": meet, "products": products, "check": check, "bench": bench}


def _open(p: Party, layers: int) -> None:
    for m in p.ranks.values():
        m.send("make", rank=m.rank, ep_size=p.ep_size, device=m.device, board=p.board.address, layers=layers)
    addresses = [m.reply()["address"] for m in p.ranks.values()]
    p.all("meet", addresses=addresses)


def _show_products(rank: Rank) -> None:
    rank.send("products")
    print("products, us a layer: library, ours", flush=True)
    for key, figures in rank.reply().items():
        print("  " + "".join(f"{us:9.2f}" for us in figures) + f"   {key}", flush=True)


def _show_kernels(batch: int, told: dict[str, Any]) -> list[str]:
    """A table of kernels by variant."""
    header = " " * 20 + "".join(f"{name:>18s}" for name in told)
    names = sorted({k for t in told.values() for k in t["kernels"]})
    names.sort(key=lambda k: -max(t["kernels"].get(k, [0.0])[0] for t in told.values()))
    lines = ["", f"kernels of one replay at {batch} a rank, ms (launches):", header]
    for name in names:
        cells = (t["kernels"].get(name, [0.0, 0.0]) for t in told.values())
        lines.append(f"  {name:18s}" + "".join(f"{ms:11.3f} ({count:4.0f})" for ms, count in cells))
    sums = (sum(ms for ms, _ in t["kernels"].values()) for t in told.values())
    lines.append(f"  {'sum':18s}" + "".join(f"{ms:11.3f}       " for ms in sums))
    lines.append(f"  {'replay':18s}" + "".join(f"{t['ms']:11.3f}       " for t in told.values()))
    return lines


def _measure(p: Party, names: list[str], batches: list[int], kernels: list[int], began: float) -> list[str]:
    """The tables, as far as the time goes."""
    rows, details = [], list[str]()
    for batch in batches:
        if time.monotonic() - began > LAST_START_S:
            rows.append(f"  {batch:4d}  not measured: the time was over")
            continue
        for m in p.ranks.values():
            m.send("bench", names=names, batch=batch, kernels=batch in kernels, profiled=m.rank == 0)
        answers = [m.reply() for m in p.ranks.values()]
        worst = [max(a[name]["ms"] for a in answers) for name in names]
        cells = (f"{ms:16.3f}{'*' if ms == min(worst) else ' '}" for ms in worst)
        rows.append(f"  {batch:4d}" + "".join(cells))
        print(f"  [{time.monotonic() - began:.0f} s] {rows[-1]}", flush=True)
        if batch in kernels:
            details += _show_kernels(batch, answers[0])
    return [*details, "", "graph replay, ms (*: the shortest)", "      " + "".join(f"{n:>17s}" for n in names), *rows]


def main() -> int:
    if "--rank-process" in sys.argv:
        RankProcess(COMMANDS).run()
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--batches", help="sequences a rank, separated by commas", default="64,256,16,128,1")
    parser.add_argument("--variants", help=f"of: {', '.join(VARIANTS)}", default=",".join(VARIANTS))
    parser.add_argument("--kernels", help="batches whose kernels are timed", default="64,256")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--ranks", type=int, help="1: one rank alone, with half of the experts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_gpu: this machine has no CUDA device")
        return 0
    watchdog(LIMIT_S)
    began = time.monotonic()
    names = options.variants.split(",")
    batches, kernels = ([int(n) for n in given.split(",") if n] for given in (options.batches, options.kernels))
    ranks = options.ranks or min(2, torch.cuda.device_count())
    with party(SCRIPT, ranks, torch.cuda.device_count()) as p:
        _open(p, options.layers)
        print(f"  [{time.monotonic() - began:.0f} s] {ranks} ranks, {options.layers} layers", flush=True)
        _show_products(p.ranks[0])
        wrong = set[str]()
        for rank, told in p.all("check", names=names, batch=64).items():
            off = {name: f"{t['median']:.1e}, {t['off']:.0%} of rows off" for name, t in told.items()}
            print(f"  checked at 64, rank {rank}: {off}", flush=True)
            wrong |= {name for name, t in told.items() if not t["right"]}
        table = _measure(p, names, batches, kernels, began)
    print("\n".join(table), flush=True)
    if wrong:
        print(f"WRONG: {', '.join(sorted(wrong))} do not give what plain gives", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
