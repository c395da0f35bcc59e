#!/usr/bin/env python3
"""Times the CUDA communicator's kernels in CUDA graphs: two ranks on two devices, medians.

    benchmarks/comm_gpu.py                      the bars' shapes, mask and time-outs on and off, NCCL beside
    benchmarks/comm_gpu.py --sweep              launch shapes
    benchmarks/comm_gpu.py --json FILE          also as JSON

Every figure: a graph of REPEATS collectives, replayed REPLAYS times with both ranks at once; device time between two
events around a replay, divided by REPEATS; the median over replays, and of both ranks the slower one's. Within a graph
each collective waits for the peer's, so a figure is a round of both, not a launch. NCCL runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import torch
from ranks import Party, RankProcess, Reply, party, watchdog

SCRIPT = str(Path(__file__).resolve())
REPEATS, REPLAYS = 40, 25
BARS = {"max_tokens": 128, "hidden": 7168, "top_k": 8, "slots_per_rank": 144, "peer_timeout_s": 20.0}


def timed(run: Callable[[], None], align: Callable[[], None]) -> float:
    """Microseconds of one `run`, the median over replays of a graph of REPEATS."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(REPEATS):
                run()
        samples = []
        for _ in range(REPLAYS + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            align()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / REPEATS)
    return statistics.median(samples[3:])


def measure(ranks: RankProcess, tokens: int, what: list[str]) -> Reply:
    """Figures in us for each of `what`: dispatch, combine, both."""
    comm = ranks.comm
    g = torch.Generator().manual_seed(comm.rank)
    places = comm.ep_size * ranks.slots_per_rank
    x = torch.randn(tokens, ranks.hidden, generator=g).to(ranks.device, torch.bfloat16)
    slots = torch.rand(tokens, places, generator=g).argsort(1)[:, : ranks.top_k].int().to(ranks.device)
    weights = torch.rand(tokens, ranks.top_k, generator=g).to(ranks.device)
    sent_weights = weights if ranks.options.get("mode") == "fast" else None
    sent = comm.dispatch(x, slots, sent_weights)
    y = torch.randn(sent.row_M.shape[0], ranks.hidden, device=ranks.device, dtype=torch.bfloat16)

    torch.cuda.synchronize()  # what follows runs on another stream

    def dispatch() -> None:
        comm.dispatch(x, slots, sent_weights)

    def combine() -> None:
        comm.combine_weighted(y, sent, weights)

    def both() -> None:
        comm.combine_weighted(y, comm.dispatch(x, slots, sent_weights), weights)

    runs = {"dispatch": dispatch, "combine": combine, "both": both, "barrier": comm.barrier}
    figures = {name: timed(runs[name], comm.barrier) for name in what}
    status = comm.status()
    assert status.clean, status
    return {"us": figures, "pairs": int(sent.first_S[-1])}


def slower(answers: dict[int, Reply]) -> dict[str, float]:
    """Of all ranks the slowest, for each figure."""
    names = next(iter(answers.values()))["us"]
    return {n: max(a["us"][n] for a in answers.values()) for n in names}


def figures(p: Party, tokens: list[int], what: list[str], **config: object) -> dict[str, float]:
    """One communicator in each process; 'dispatch 128' and so on -> us."""
    p.open(list(p.ranks.values()), **{**BARS, **config})
    p.adopt(list(p.ranks.values()))
    out = {}
    for n in tokens:
        for name, us in slower(p.all("measure", tokens=n, what=what)).items():
            out[f"{name} {n}"] = us
    p.all("close")
    return out


def table(p: Party) -> dict[str, dict[str, float]]:
    """The bars' figures."""
    sizes = [128, 16, 1]
    rows = {}
    for mode in ("exact", "fast"):
        for guard in (True, False):
            name = f"{mode}, mask and time-outs {'on' if guard else 'off'}"
            what = ["dispatch", "combine", "both"]
            rows[name] = figures(p, sizes, what, fp8=True, mode=mode, guard=guard)
            show(name, rows[name])
    # More programs move 128 tokens faster, and small batches slower: each of them waits for its own stores.
    wide = {"combine_groups": 48, "combine_rows": 8}
    rows["exact, 48 groups"] = figures(p, sizes, ["combine", "both"], fp8=True, shape=wide)
    show("exact, 48 groups", rows["exact, 48 groups"])
    rows["bf16, exact"] = figures(p, sizes, ["dispatch", "combine", "both", "barrier"], mode="exact")
    show("bf16, exact", rows["bf16, exact"])
    return rows


def sweep(p: Party) -> dict[str, dict[str, float]]:
    """Launch shapes, fp8 dispatch and both modes of combine."""
    names = (
        "chunk", "dispatch_groups", "dispatch_tile", "dispatch_warps", "combine_groups", "combine_rows",
        "combine_warps",
    )  # fmt: skip
    rows = {}
    for values in SHAPES:
        shape = dict(zip(names, values, strict=True))
        name = "chunk {} dispatch {}/{}/{} combine {}/{}/{}".format(*values)
        rows[name] = figures(p, [128, 16, 1], ["dispatch", "combine", "both"], fp8=True, shape=shape)
        show(name, rows[name])
        rows[name + ", fast"] = figures(p, [128, 16, 1], ["combine"], fp8=True, mode="fast", shape=shape)
        show("", rows[name + ", fast"])
    return rows


SHAPES = [
    (1024, 18, 8, 8, 18, 16, 4), (1024, 18, 8, 8, 36, 16, 4), (1024, 18, 8, 8, 48, 8, 4), (1024, 18, 4, 8, 27, 32, 8),
    (512, 18, 8, 4, 36, 16, 4),
]  # fmt: skip


def show(name: str, row: dict[str, float]) -> None:
    print(f"{name:44s} " + "  ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)


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


def nccl() -> dict[str, float]:
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
    return json.loads(said.strip().splitlines()[-1]) if said.strip() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of the CUDA communicator's kernels.")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--no-nccl", action="store_true")
    parser.add_argument("--json", help="write everything there")
    options = parser.parse_args()
    if torch.cuda.device_count() < 2:
        print("comm_gpu: skipped, it needs two CUDA devices")
        return 0
    watchdog(420)
    device = torch.cuda.get_device_properties(0)
    print(f"2 x {device.name}, torch {torch.__version__}, CUDA {torch.version.cuda}; us, slower rank, median of "
          f"{REPLAYS} graphs of {REPEATS}")  # fmt: skip
    with party(SCRIPT, 2, 2) as p:
        rows = sweep(p) if options.sweep else table(p)
    if not options.no_nccl and not options.sweep:
        rows["nccl all_to_all"] = nccl()
        show("nccl all_to_all", rows["nccl all_to_all"])
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank-process"]:
        RankProcess({"measure": measure}).run()
    elif sys.argv[1:2] == ["--nccl-rank"]:
        nccl_rank(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
