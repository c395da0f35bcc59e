#!/usr/bin/env python3
"""The device's share of a decode step, with each way of saving time on and off: the shape of Qwen3-30B-A3B.

    benchmarks/decode_gpu.py                                 steps of plain, norm apart, served; 30 s
    benchmarks/decode_gpu.py --batches 64 --variants plain,out,router
    benchmarks/decode_gpu.py --kernels 16                    the times of kernels for these batches
    benchmarks/decode_gpu.py --products                      products first

Two ranks on two devices; on one device one rank alone, with half of the experts. One process a rank holds one set of
weights, and captures the same decode (layers, last norm, logits; no sampling, no host) with each variant. Figures:
device time between two events around a replay, all variants in turn, the median, and of both ranks the slower.
Contexts of 160 positions, random weights, random tokens. Kernels' times are from the profiler.

Variants: plain, none of `DecodeOptions`; router, out, placed: that one alone; served: what serves; norm apart: the
same, with the norm behind the experts in a kernel of its own.

Kernels that need no peer are compiled by processes of their own, while ranks make weights and communicators.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import numpy as np
import torch
from engine_ladder import qwen3_30b_a3b, random_weights
from ranks import Party, Rank, RankProcess, Reply, party, watchdog
from torch import Tensor

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
from phalanx.moe.thin import Product, ThinProducts
from phalanx.world import Member, View

SCRIPT = str(Path(__file__).resolve())
BATCHES = (1, 16, 64, 128, 256)
CONTEXT, BLOCK = 160, 16
TOKENS = 512
REPLAYS = 10
ROUNDS = 2
LIMIT_S, LAST_START_S = 100.0, 70.0


SERVED = DecodeOptions.best(exact=False)
VARIANTS = {
    "plain": DecodeOptions(),
    "router": DecodeOptions(router=256),
    "out": DecodeOptions(out=256),
    "placed": DecodeOptions(placed=256),
    "norm apart": replace(SERVED, summed=0),
    "served": SERVED,
}
COMPILED = ("experts", "the rest")


@dataclass
class Parts:
    """What all variants of a rank share."""

    rank: int
    ep_size: int
    model: ModelConfig
    weights: DenseWeights
    bank: DeviceBank
    routes: RouteTable
    load: DeviceLoad
    kv: DeviceKV
    shape: device_tables.TableShape
    comm: CudaCommunicator = field(init=False)

    @classmethod
    def made(cls, rank: int, ep_size: int, device: int, layers: int) -> Parts:
        """All but the communicator, on a device that is from now on this process's. LOCAL."""
        here = torch.device("cuda", device)
        torch.cuda.set_device(here)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)  # the same dense weights on all ranks
        model = qwen3_30b_a3b(layers)
        model = model if ep_size > 1 else replace(model, num_experts=model.num_experts // 2)
        weights = random_weights(model, here)
        torch.manual_seed(1 + rank)
        bank = DeviceBank(
            layers, model.num_experts // ep_size, model.hidden, model.expert_width, torch.bfloat16, here
        )  # fmt: skip
        for layer in range(layers):
            bank.weights_LSX[layer].normal_(0, 0.03)
        routes = RouteTable(layers, model.num_experts, 1, here)
        routes.adopt(np.tile(np.arange(model.num_experts, dtype=np.int32)[None, :, None], (layers, 1, 1)))
        blocks = max(BATCHES) * (CONTEXT // BLOCK + 1)
        kv = DeviceKV(model, blocks, BLOCK, torch.bfloat16, here)
        kv.data.normal_()
        shape = table_shape(
            model, rows=TOKENS, sequences=max(BATCHES), max_model_len=512, block_size=BLOCK, num_blocks=blocks,
            exact=False, device=here,
        )  # fmt: skip
        load = DeviceLoad(layers, model.num_experts, here)
        return cls(rank, ep_size, model, weights, bank, routes, load, kv, shape)

    def experts(self, comm: CudaCommunicator | None) -> DeviceExperts:
        """None: nothing that needs peers is asked of them. LOCAL."""
        return DeviceExperts(
            self.bank, self.routes, cast(CudaCommunicator, comm), self.load, top_k=self.model.top_k,
            num_experts=self.model.num_experts, norm_topk=True, pairs=self.ep_size * TOKENS * self.model.top_k,
            weigh_early=True,
        )  # fmt: skip

    def decoder(self, name: str, layers: int, experts: DeviceExperts) -> DeviceModel:
        """The first layers of the model, as variant `name`. LOCAL."""
        model = replace(self.model, num_layers=layers, moe_layers=tuple(range(layers)))
        weights = replace(self.weights, layers=self.weights.layers[:layers])
        return DeviceModel(model, weights, experts, self.kv, self.shape, exact=False, options=VARIANTS[name])

    def batch(self, rows: int) -> DeviceBatch:
        """`rows` decodes at position CONTEXT of sequences of their own. LOCAL."""
        g = np.random.default_rng(1000 * self.rank + rows)
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
    """Weights and a communicator; how long each took."""
    began = time.monotonic()
    parts = Parts.made(rank, ep_size, device, layers)
    torch.cuda.synchronize()
    drawn = time.monotonic()
    model, slots = parts.model, parts.bank.slots_per_rank
    parts.comm = CudaCommunicator(
        rank, ep_size, incarnation=0, max_tokens=TOKENS, hidden=model.hidden, top_k=model.top_k,
        slots_per_rank=slots, peer_timeout_s=20.0, notices=NoticeBoard.open(board), mode="fast",
        shape=LaunchShape.of(model.hidden), device=parts.kv.data.device,
    )  # fmt: skip
    ranks.parts = parts
    torch.cuda.synchronize()
    return {"address": parts.comm.address, "drawn_s": drawn - began, "comm_s": time.monotonic() - drawn}


def compiled(ranks: RankProcess, what: str, ep_size: int, device: int, names: list[str], batches: list[int]) -> Reply:
    """Run a layer's kernels that need no peer, so that ranks find them compiled. LOCAL."""
    began = time.monotonic()
    parts = Parts.made(0, ep_size, device, 1)
    layer, model, where = parts.weights.layers[0], parts.model, parts.kv.data.device
    experts = parts.experts(None)
    first_S = torch.zeros(parts.bank.slots_per_rank + 1, dtype=torch.int32, device=where)  # no pairs at all
    row_M = torch.zeros(ep_size * TOKENS * model.top_k, dtype=torch.int64, device=where)
    for rows in batches:
        batch = parts.batch(rows)
        if what == "experts":
            x_ND = torch.zeros(ep_size * TOKENS, model.hidden, dtype=torch.bfloat16, device=where)
            experts.experts(0, x_ND, row_M, first_S, batch.tiling)
            continue
        for name in names:
            decoder, options = parts.decoder(name, 1, experts), VARIANTS[name]
            x_TD = decoder.embed(batch.tokens, batch.chosen)
            normed_TD = decoder.norm(x_TD, None, layer.input_norm, model.norm_eps)
            attended = decoder.attend(0, torch.nn.functional.linear(normed_TD, layer.qkv), batch)
            out = _product(attended, layer.out, rows <= options.out)
            normed_TD = decoder.norm(out, x_TD, layer.post_norm, model.norm_eps)
            logits = _product(normed_TD, layer.router, rows <= options.router)
            experts.gate(0, logits, batch.positions, batch.num_rows)
            decoder.norm(x_TD.clone(), x_TD, layer.input_norm, model.norm_eps)
    torch.cuda.synchronize()
    return {"seconds": time.monotonic() - began}


def _product(x_ND: Tensor, w_OD: Tensor, thin: bool) -> Tensor | Product:
    """By the kernel for few rows, or by the library."""
    return (thin and ThinProducts()(x_ND, w_OD)) or torch.nn.functional.linear(x_ND, w_OD)


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
        decoder = parts.decoder(name, 2, parts.experts(parts.comm))
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
    graphs = {name: _captured(parts, name, batch) for name in names}
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


def _captured(parts: Parts, name: str, batch: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """The graph, and what must stay as long as it does."""
    decoder = parts.decoder(name, parts.model.num_layers, parts.experts(parts.comm))
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


COMMANDS = {"make": make, "meet": meet, "compiled": compiled, "products": products, "check": check, "bench": bench}


def _open(p: Party, layers: int, names: list[str], batches: list[int]) -> None:
    """Ranks with weights that have met, and every kernel compiled; says how long that took."""
    compiling = {what: p.spawn(i) for i, what in enumerate(COMPILED)}
    try:
        for m in p.ranks.values():
            m.send("make", rank=m.rank, ep_size=p.ep_size, device=m.device, board=p.board.address, layers=layers)
        for what, m in compiling.items():
            m.send("compiled", what=what, ep_size=p.ep_size, device=m.device, names=names, batches=batches)
        answers = [m.reply() for m in p.ranks.values()]
        took = {f"rank {i}, weights": a["drawn_s"] for i, a in enumerate(answers)}
        took |= {f"rank {i}, communicator": a["comm_s"] for i, a in enumerate(answers)}
        took |= {what: m.reply()["seconds"] for what, m in compiling.items()}
    finally:
        for m in compiling.values():
            m.end()
    print("  " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items()), flush=True)
    p.all("meet", addresses=[a["address"] for a in answers])


def _named(given: str) -> list[str]:
    """Variants that exist."""
    names = given.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no variant {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    return names


def _sizes(given: str) -> list[int]:
    """Batches that there is room for."""
    named = [n for n in given.split(",") if n]
    batches = [int(n) for n in named if n.isdecimal()]
    if len(batches) < len(named) or any(not 0 < n <= max(BATCHES) for n in batches):
        raise argparse.ArgumentTypeError(f"{given!r}: batches have 1 to {max(BATCHES)} sequences")
    return batches


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
    parser.add_argument("--batches", type=_sizes, help="sequences a rank, by commas", default="64,256,16,128,1")
    parser.add_argument("--variants", type=_named, help=f"of: {', '.join(VARIANTS)}", default="plain,norm apart,served")
    parser.add_argument("--kernels", type=_sizes, help="batches whose kernels are timed", default="64,256")
    parser.add_argument("--products", action="store_true", help="time products of few rows first")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--ranks", type=int, help="1: one rank alone, with half of the experts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_gpu: this machine has no CUDA device")
        return 0
    watchdog(LIMIT_S)
    began = time.monotonic()
    names, batches = options.variants, options.batches
    ranks = options.ranks or min(2, torch.cuda.device_count())
    with party(SCRIPT, ranks, torch.cuda.device_count()) as p:
        _open(p, options.layers, sorted({"plain", *names}), sorted({64, *batches}))
        print(f"  [{time.monotonic() - began:.0f} s] {ranks} ranks, {options.layers} layers", flush=True)
        if options.products:
            _show_products(p.ranks[0])
        wrong = set[str]()
        for rank, told in p.all("check", names=names, batch=64).items():
            off = {name: f"{t['median']:.1e}, {t['off']:.0%} of rows off" for name, t in told.items()}
            print(f"  checked at 64, rank {rank}: {off}", flush=True)
            wrong |= {name for name, t in told.items() if not t["right"]}
        table = _measure(p, names, batches, options.kernels, began)
    print("\n".join(table), flush=True)
    if wrong:
        print(f"WRONG: {', '.join(sorted(wrong))} do not give what plain gives", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
