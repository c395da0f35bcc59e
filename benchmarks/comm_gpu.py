#!/usr/bin/env python3
"""Times the CUDA communicator's kernels in CUDA graphs: two ranks on two devices, checked first.

    benchmarks/comm_gpu.py                      all parts but the sweep
    benchmarks/comm_gpu.py --parts bars,guard   some: bars, guard, adapter, adapter-kinds, nccl, sweep, exact
    benchmarks/comm_gpu.py --json FILE          also as JSON

bars: exchanges are compared with a reference, then timed: "exact" and "fast" of the bars (hidden 7168, fp8 dispatch),
"bf16" (the same, exact, bf16 dispatch) and "engine", a decode step's exchanges (hidden 2048, bf16, fast). Every figure:
a graph of REPEATS collectives, replayed REPLAYS times with both ranks at once; device time between two events around a
replay, divided by REPEATS; the median over replays, and of both ranks the slower one's. Within a graph each collective
waits for the peer's, so a figure is a round of both, not a launch. Each result of the last replay has the first one's
bits, or it is an error.

guard: two communicators, with masks and time-outs compiled in and without, whose graphs are replayed in turns (on off,
off on, ...); the median of the ratios of neighbours, and the interval that holds the true median with 95 %, by order
statistics. adapter: the same exchanges through DeepEP's interface, beside the communicator's own kernels in the same
run, and the host's time of an eager call. adapter-kinds: in bf16, and with more room than tokens. nccl: all_to_all of
the same bytes, in processes of its own. sweep: launch shapes. exact: results that peers read where they stand
(`comm.results`, as in all other parts but adapter), beside results that stand elsewhere and are sent, and launch
shapes, all in turns. Each part has processes of its own: one that fails takes no other with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import adapter_runs
import torch
from ranks import Party, RankProcess, Reply, party, watchdog

from phalanx.comm.cuda import CudaCommunicator

SCRIPT = str(Path(__file__).resolve())
REPEATS, REPLAYS = 40, 25
PAIRS, PAIR_REPEATS, TURNS = 40, 40, 30
WHAT = ("dispatch", "combine", "both")

BARS: dict[str, Any] = {
    "max_tokens": 128, "hidden": 7168, "top_k": 8, "slots_per_rank": 144, "peer_timeout_s": 20.0
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "exact": {**BARS, "fp8": True},
    "fast": {**BARS, "fp8": True, "mode": "fast"},
    "engine": {**BARS, "max_tokens": 256, "hidden": 2048, "slots_per_rank": 64, "mode": "fast"},
    "bf16": BARS,
}
TIMED = {"exact": (128, 64, 16, 1), "fast": (128, 64, 16, 1), "engine": (256, 128, 64, 16, 1), "bf16": (128, 16, 1)}
CHECKED = {
    "exact": ([128, 128], [16, 16], [1, 1], [128, 0], [3, 77], [0, 1]),
    "fast": ([128, 128], [16, 16], [1, 1], [0, 128]),
    "engine": ([256, 256], [64, 64], [16, 16], [1, 1], [1, 256], [0, 31]),
    "bf16": ([128, 128], [1, 1]),
}
SHAPES: dict[str, list[dict[str, int]]] = {
    "exact": [
        {}, {"combine_groups": 36, "combine_rows": 16}, {"combine_groups": 18, "combine_rows": 16},
        {"combine_groups": 27, "combine_rows": 32, "combine_warps": 8},
        {"chunk": 512, "dispatch_warps": 4, "combine_groups": 24}, {"dispatch_tile": 4, "dispatch_warps": 4},
    ],
    "fast": [{}, {"line_tile": 8, "line_warps": 4, "line_senders": 256, "line_receivers": 256}],
}  # fmt: skip
SENT = "sent"
IN_TURNS: dict[str, dict[str, dict[str, Any]]] = {
    "exact": {
        SENT: {},
        "as it is": {},
        "read 256 columns": {"pull_chunk": 256, "pull_warps": 1, "pull_programs": 1792},
        "dispatch tiles of 8, 8 warps": {"dispatch_tile": 8, "dispatch_warps": 8},
        "dispatch 512 columns": {"chunk": 512, "dispatch_groups": 9, "dispatch_tile": 8, "combine_groups": 24},
    },
    "engine": {
        "as it is": {},
        "dispatch 512 columns": {"chunk": 512, "dispatch_groups": 32},
    },
}  # fmt: skip
ADAPTED: dict[str, tuple[bool, bool, int, tuple[int, ...]]] = {
    "fp8": (True, True, 128, (128, 16, 1)), "quantized": (False, True, 128, (128, 1)),
    "bf16": (False, False, 128, (128, 1)), "room": (True, True, 1024, (128, 1)),
}  # fmt: skip
"""On the wire fp8, what is returned fp8, room for so many tokens a rank, tokens timed. quantized: on arrival."""
PARTS = ("bars", "guard", "adapter", "adapter-kinds", "nccl", "sweep", "exact")


# -- in the rank processes ---------------------------------------------------------------------------------------------


def timed(run: Callable[[], object], align: Callable[[], object], repeats: int = REPEATS) -> float:
    """Microseconds of one `run`, the median over replays of a graph of `repeats`."""
    stream = torch.cuda.Stream()
    # Not beside what was launched before: two collectives of a rank at once take each other's numbers, and never end.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                run()
        samples = []
        for _ in range(REPLAYS + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            align()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / repeats)
    return statistics.median(samples[3:])


def keep(ranks: RankProcess, name: str) -> Reply:
    """Put the communicator aside, beside others."""
    kept = (ranks.comm, ranks.hidden, ranks.top_k, ranks.slots_per_rank, ranks.options)
    ranks.kept = {**getattr(ranks, "kept", {}), name: kept}
    return {}


def close_kept(ranks: RankProcess) -> Reply:
    """Close all that was put aside."""
    for kept in ranks.kept.values():
        kept[0].close()
    ranks.kept = {}
    return {}


def check(ranks: RankProcess, tokens: list[int], seed: int) -> Reply:
    """An exchange whose result is known."""
    comm, S, D = ranks.comm, ranks.slots_per_rank, ranks.hidden
    drawn = [torch.Generator().manual_seed(1000 * seed + r) for r in range(comm.ep_size)]
    x = [torch.randn(n, D, generator=g).to(ranks.device, torch.bfloat16) for n, g in zip(tokens, drawn, strict=True)]
    slots = [
        torch.rand(n, comm.ep_size * S, generator=g).argsort(1)[:, : ranks.top_k].int()
        for n, g in zip(tokens, drawn, strict=True)
    ]
    weights = torch.rand(tokens[comm.rank], ranks.top_k, generator=drawn[comm.rank]).to(ranks.device)
    mine = slots[comm.rank].to(ranks.device)
    sent = comm.dispatch(x[comm.rank], mine, weights)
    assert comm.status().clean, f"dispatch of {tokens}: {comm.status()}"
    count = int(sent.first_S[-1])
    came = sorted(int(s) - comm.rank * S for each in slots for s in each.flatten() if s // S == comm.rank)
    assert sent.slot_M[:count].tolist() == came, f"dispatch of {tokens}: the slots of what came"
    source_M, token_M = (t[:count] for t in comm.origins(sent))
    every = torch.zeros(comm.ep_size, max(tokens), D, device=ranks.device, dtype=torch.bfloat16)
    for r, rows in enumerate(x):
        every[r, : len(rows)] = rows
    rows_MD = every[source_M, token_M].float()
    assert off(arrived(sent, count, D), rows_MD) < (0.08 if sent.scale_ND is not None else 1e-9), (
        f"dispatch of {tokens}: x as it came"
    )
    y = torch.zeros(sent.row_M.shape[0], D, device=ranks.device, dtype=torch.bfloat16)
    y[:count] = rows_MD * (1 + (sent.slot_M[:count, None] + comm.rank * S) / 64)
    out = comm.combine_weighted(y, sent, weights)
    comm.results.copy_(y)
    again = comm.combine_weighted(comm.results, sent, weights)
    assert torch.equal(out.view(torch.int16), again.view(torch.int16)), f"combine of {tokens}: read in place"
    want = torch.zeros(tokens[comm.rank], D, device=ranks.device)
    for k in range(ranks.top_k):
        want += weights[:, k, None] * (x[comm.rank].float() * (1 + mine[:, k, None] / 64)).to(torch.bfloat16).float()
    error = off(out.float(), want)
    assert comm.status().clean, f"combine of {tokens}: {comm.status()}"
    assert error < 8e-3, f"combine of {tokens}: relative error {error:.1e}"
    return {"relative": error}


def arrived(sent: Any, count: int, width: int) -> torch.Tensor:
    """The tokens that came, in the order of the pairs, as float32 [count, width]."""
    if sent.scale_ND is None:
        return sent.x_ND[sent.row_M[:count]].float()
    values = sent.x_ND.view(torch.uint8)[sent.row_M[:count]].view(torch.float8_e4m3fn).float()
    scale = sent.scale_ND[sent.row_M[:count]][..., None]
    return (values.view(count, width // 128, 128) * scale).view(count, width)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error."""
    return float((got - want).norm() / want.norm()) if len(want) else 0.0


def runs_of(
    comm: CudaCommunicator, ranks: RankProcess, tokens: int, in_place: bool = True
) -> dict[str, Callable[[], torch.Tensor | None]]:
    """dispatch, combine, both. in_place: the experts' results stand where the communicator wants them."""
    g = torch.Generator().manual_seed(comm.rank)
    places = comm.ep_size * ranks.slots_per_rank
    x = torch.randn(tokens, ranks.hidden, generator=g).to(ranks.device, torch.bfloat16)
    slots = torch.rand(tokens, places, generator=g).argsort(1)[:, : ranks.top_k].int().to(ranks.device)
    weights = torch.rand(tokens, ranks.top_k, generator=g).to(ranks.device)
    sent = comm.dispatch(x, slots, weights)
    y = torch.randn(sent.row_M.shape[0], ranks.hidden, device=ranks.device, dtype=torch.bfloat16)
    if in_place:
        y = comm.results.copy_(y)
    torch.cuda.synchronize()

    def dispatch() -> None:
        comm.dispatch(x, slots, weights)

    def combine() -> torch.Tensor:
        return comm.combine_weighted(y, sent, weights)

    def both() -> torch.Tensor:
        return comm.combine_weighted(y, comm.dispatch(x, slots, weights), weights)

    return {"dispatch": dispatch, "combine": combine, "both": both}


def measure(ranks: RankProcess, tokens: int) -> Reply:
    """us of dispatch, combine and both; every result in the graph keeps the bits of the first."""
    comm, figures = ranks.comm, {}
    for name, run in runs_of(comm, ranks, tokens).items():
        first, outs = run(), []
        figures[name] = timed(lambda run=run, outs=outs: outs.append(run()), comm.barrier)
        for i, out in enumerate(outs[-REPEATS:]):
            assert out is None or torch.equal(out.view(torch.int16), first.view(torch.int16)), f"{name} {tokens}: {i}"
    status = comm.status()
    assert status.clean, status
    return {"us": figures}


def turns(ranks: RankProcess, tokens: int, rounds: int) -> Reply:
    """Replays of graphs of all communicators that were put aside, in turns, the first one of a turn being the next one
    each time: us of each turn, for dispatch, combine and both. Every result has the bits of the first.

    One by one, also a kernel that is the same scatters by 1 us, and is the faster the later it is measured."""
    names = list(ranks.kept)
    runs = {name: runs_of(kept[0], ranks, tokens, in_place=name != SENT) for name, kept in ranks.kept.items()}
    align = ranks.kept[names[0]][0].barrier
    samples: dict[str, dict[str, list[float]]] = {}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for what in WHAT:
            graphs, firsts, outs = {}, {}, {}
            for name in names:
                firsts[name] = runs[name][what]()
                stream.synchronize()
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], stream=stream):
                    outs[name] = [runs[name][what]() for _ in range(PAIR_REPEATS)]
            taken: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(rounds + 2):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    align()
                    start.record()
                    graphs[name].replay()
                    end.record()
                    end.synchronize()
                    taken[name].append(start.elapsed_time(end) * 1e3 / PAIR_REPEATS)
            for name, out in firsts.items():
                same = all(out is None or torch.equal(o.view(torch.int16), out.view(torch.int16)) for o in outs[name])
                assert same, f"{name}, {what} of {tokens}: other bits than at first"
            samples[what] = {name: us[2:] for name, us in taken.items()}
    for name, kept in ranks.kept.items():
        assert kept[0].status().clean, f"{name}: {kept[0].status()}"
    return {"us": samples}


COMMANDS = {
    "measure": measure, "check": check, "keep": keep, "close_kept": close_kept, "turns": turns,
    "adapter_check": adapter_runs.check, "adapter": partial(adapter_runs.measure, timed=timed),
}  # fmt: skip


def nccl_rank(rank: int, init: str) -> None:
    """all_to_all of the same bytes, without packing: in its own processes, never beside a communicator that serves."""
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=init, rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    D, out = 7168, {}
    for tokens in (128, 16, 1):
        copies = {"per expert": tokens * 8 // 2, "per rank": tokens}
        for name, rows in copies.items():
            for kind, width in (("fp8", D + D // 32), ("bf16", 2 * D)):
                source = torch.empty(2 * max(1, rows), width, dtype=torch.uint8, device="cuda").random_()
                target = torch.empty_like(source)

                def run(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
                    dist.all_to_all_single(target, source)

                out[f"{kind} {name} {tokens}"] = timed(run, lambda: None)
    if rank == 0:
        print(json.dumps(out), flush=True)
    dist.destroy_process_group()


# -- the parts ---------------------------------------------------------------------------------------------------------


def slower(answers: dict[int, Reply]) -> dict[str, float]:
    """Of all ranks the slowest, for each figure."""
    names = next(iter(answers.values()))["us"]
    return {n: max(a["us"][n] for a in answers.values()) for n in names}


@contextlib.contextmanager
def opened(p: Party, **config: Any) -> Iterator[None]:
    """One communicator in each process, for as long as this lasts."""
    ranks = list(p.ranks.values())
    p.open(ranks, **config)
    p.adopt(ranks)
    yield
    p.all("close")


def figures(p: Party, name: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """'dispatch 128' and so on -> us, of the communicators that are open; also printed."""
    row = {}
    for n in sizes:
        for what, us in slower(p.all("measure", tokens=n)).items():
            row[f"{what} {n}"] = us
    said = "  ".join(f"{what} " + " / ".join(f"{row[f'{what} {n}']:5.1f}" for n in sizes) for what in WHAT)
    print(f"{name:44s} {said}", flush=True)
    return row


def bars(p: Party, rows: dict[str, Any]) -> None:
    """Every configuration: right first, then its figures."""
    print("us, slower rank; tokens: " + ", ".join(f"{c} {n}" for c, n in TIMED.items()))
    for config, sizes in TIMED.items():
        with opened(p, **CONFIGS[config]):
            for i, tokens in enumerate(CHECKED[config]):
                p.all("check", tokens=tokens, seed=i)
            rows[config] = figures(p, config, sizes)


def sweep(p: Party, rows: dict[str, Any]) -> None:
    """Launch shapes, each checked before it is timed."""
    for config, shapes in SHAPES.items():
        for shape in shapes:
            name = f"{config} " + (", ".join(f"{k} {v}" for k, v in shape.items()) or "as it is")
            with opened(p, **CONFIGS[config], shape=shape):
                p.all("check", tokens=[128, 128], seed=1)
                rows[name] = figures(p, name, (128, 16, 1))


def exact(p: Party, rows: dict[str, Any]) -> None:
    """Results elsewhere, which are sent, and in place, which are read; launch shapes, each checked first, in turns."""
    ranks = list(p.ranks.values())
    for config, shapes in IN_TURNS.items():
        for name, shape in shapes.items():
            p.open(ranks, **CONFIGS[config], shape=shape)
            p.adopt(ranks)
            for i, tokens in enumerate(CHECKED[config]):
                p.all("check", tokens=tokens, seed=i)
            p.all("keep", name=name)
        row: dict[str, dict[str, float]] = {name: {} for name in shapes}
        for n in TIMED[config]:
            answers = p.all("turns", tokens=n, rounds=TURNS)
            for what in WHAT:
                for name in shapes:
                    both = zip(*(a["us"][what][name] for a in answers.values()), strict=True)
                    row[name][f"{what} {n}"] = statistics.median(max(us) for us in both)
        for name in shapes:
            said = row[name]
            line = "  ".join(f"{w} " + " / ".join(f"{said[f'{w} {n}']:5.2f}" for n in TIMED[config]) for w in WHAT)
            print(f"{config + ', ' + name:56s} {line}", flush=True)
            rows[f"{config} {name}"] = said
        p.all("close_kept")


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median and the interval that holds the true one with 95 %, whatever the distribution."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(n) / 2
    return (
        statistics.median(ordered),
        ordered[max(0, int(n / 2 - reach))],
        ordered[min(n - 1, math.ceil(n / 2 + reach))],
    )


def guard(p: Party, rows: dict[str, Any]) -> None:
    """On against off, in turns."""
    ranks = list(p.ranks.values())
    for config, sizes in (("exact", (128, 16, 1)), ("engine", (64, 1))):
        for name, on in (("on", True), ("off", False)):
            p.open(ranks, **CONFIGS[config], guard=on)
            p.adopt(ranks)
            p.all("keep", name=name)
        for n in sizes:
            answers = p.all("turns", tokens=n, rounds=PAIRS)
            for what in WHAT:
                us = {
                    name: [max(pairs) for pairs in zip(*(a["us"][what][name] for a in answers.values()), strict=True)]
                    for name in ("on", "off")
                }
                middle, low, high = interval([on / off for on, off in zip(us["on"], us["off"], strict=True)])
                on, none = statistics.median(us["on"]), statistics.median(us["off"])
                rows[f"{config} {what} {n}"] = {"on": on, "off": none, "ratio": middle, "low": low, "high": high}
                print(
                    f"guard, {config:6s} {what:9s} {n:4d}  on {on:6.2f}  off {none:6.2f}  on costs "
                    f"{(middle - 1) * 100:+5.2f} % ({(low - 1) * 100:+.2f} to {(high - 1) * 100:+.2f})",
                    flush=True,
                )
        p.all("close_kept")


def adapters(p: Party, rows: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Through DeepEP's interface, right first."""
    for kind in kinds:
        wire, use_fp8, room, sizes = ADAPTED[kind]
        with opened(p, **{**BARS, "fp8": wire, "max_tokens": room}):
            how = {"use_fp8": use_fp8, "room": room}
            for i, tokens in enumerate(([128, 128], [1, 1], [0, 77])):
                p.all("adapter_check", tokens=tokens, seed=i, **how)
            for n in sizes:
                rows[f"{kind} {n}"] = row = slower(p.all("adapter", tokens=n, **how))
                said = "  ".join(
                    f"{what} {row[what]:.1f} (kernels {row[f'own {what}']:.1f}, x{row[what] / row[f'own {what}']:.2f}; "
                    f"host {row[f'host {what}']:.0f})"
                    for what in WHAT
                )
                print(f"adapter, {kind:9s} {n:4d}  {said}", flush=True)


def nccl(rows: dict[str, Any]) -> None:
    """Figures of NCCL's all-to-all, from two processes."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, SCRIPT, "--nccl-rank", str(r), f"file://{folder}/store"], stdout=subprocess.PIPE,
                text=True, env={**os.environ, "NCCL_NVLS_ENABLE": "0"},
            )
            for r in (0, 1)
        ]  # fmt: skip
        said = ranks[0].communicate(timeout=120)[0]
        ranks[1].communicate(timeout=30)
    rows.update(json.loads(said.strip().splitlines()[-1]))
    print("nccl  " + "  ".join(f"{name} {us:.1f}" for name, us in rows.items()), flush=True)


def attempt(name: str, rows: dict[str, Any], seconds: float) -> str:
    """Run one part in processes of its own, which are killed should it hang. Returns why it failed, if it did."""
    with_party = {
        "bars": bars, "guard": guard, "adapter": partial(adapters, kinds=("fp8", "quantized")),
        "adapter-kinds": partial(adapters, kinds=("bf16", "room")), "sweep": sweep,
        "exact": exact,
    }  # fmt: skip
    try:
        if name == "nccl":
            nccl(rows)
            return ""
        with party(SCRIPT, 2, 2) as p:

            def end() -> None:
                for m in p.ranks.values():
                    m.process.kill()

            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
            try:
                with_party[name](p, rows)
            finally:
                timer.cancel()
    except (AssertionError, OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        why = (str(error).splitlines() or [repr(error)])[0][:200]
        print(f"{name}: FAILED {why}", flush=True)
        return why
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of the CUDA communicator's kernels.")
    parser.add_argument("--parts", default="bars,guard,adapter,adapter-kinds,nccl", help="of " + ", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=90.0, help="what a part may take")
    parser.add_argument("--json", help="write everything there")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if torch.cuda.device_count() < 2:
        print("comm_gpu: skipped, it needs two CUDA devices")
        return 0
    watchdog(len(parts) * (options.seconds + 15))
    device = torch.cuda.get_device_properties(0)
    print(f"2 x {device.name}, torch {torch.__version__}, CUDA {torch.version.cuda}; us, slower rank, median of "
          f"{REPLAYS} graphs of {REPEATS}")  # fmt: skip
    everything: dict[str, dict[str, Any]] = {}
    failed = False
    for name in parts:
        began = time.monotonic()
        rows = everything.setdefault(name, {})
        failed = bool(attempt(name, rows, options.seconds)) or failed
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank-process"]:
        RankProcess(COMMANDS).run()
    elif sys.argv[1:2] == ["--nccl-rank"]:
        nccl_rank(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
