#!/usr/bin/env python3
"""Compares variants of the CUDA communicator's kernels in one run, and what masks and time-outs cost: two devices.

    benchmarks/comm_bars.py                       everything, in about a minute
    benchmarks/comm_bars.py --only 'NAME;...'      these variants (--list)
    benchmarks/comm_bars.py --parts guard,adapter  without the comparison

Every variant has two processes of its own, which are started and compile all at once. First each one's exchanges are
compared with a reference: a variant that fails is left out, and takes nobody with it. Then one after the other is
timed, as in `comm_gpu`; each result of the last replay is compared with the first one's bits. What is timed: "exact"
and "fast" of the bars (hidden 7168, fp8), and "engine", a decode step's exchanges (hidden 2048, bf16, fast).

guard: two communicators, with masks and time-outs compiled in and without, whose graphs are replayed in turns (on off,
off on, ...); the median of the ratios of neighbours, and the interval that holds the true median with 95 %, by order
statistics. adapter: the same through DeepEP's interface. Both in the first variant of PREFERRED that passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from comm_gpu import BARS, REPEATS, slower, timed
from ranks import Party, RankProcess, Reply, party, watchdog

from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.deep_ep import Buffer

SCRIPT = str(Path(__file__).resolve())
PAIRS, PAIR_REPEATS = 40, 40
LIMIT_S = 8.0
WHAT = ("dispatch", "combine", "both")

VARIANTS: dict[str, dict[str, Any]] = {
    "flags": {"tagged": False, "lines": False},
    "tagged lists, lines": {},
    "tagged lists, flags": {"lines": False},
    "tagged lists, lines, always ahead": {"line_ahead": 0},
    "tagged lists, lines 8x4": {"line_tile": 8, "line_warps": 4, "line_senders": 256, "line_receivers": 256},
    "tagged lists of 4 warps, flags of 48 groups": {
        "lines": False, "combine_groups": 48, "combine_rows": 8, "dispatch_warps": 4, "dispatch_tile": 4
    },
}  # fmt: skip
PREFERRED = ("tagged lists, lines", "tagged lists, flags", "flags")

_FP8 = {**BARS, "fp8": True, "peer_timeout_s": 2.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "exact": {**_FP8},
    "fast": {**_FP8, "mode": "fast"},
    "engine": {"max_tokens": 256, "hidden": 2048, "top_k": 8, "slots_per_rank": 64, "mode": "fast",
               "peer_timeout_s": 2.0},
}  # fmt: skip
TIMED = {"exact": (128, 64, 16, 1), "fast": (128, 64, 16, 1), "engine": (256, 128, 64, 16, 1)}
CHECKED = {
    "exact": ([128, 128], [16, 16], [1, 1], [128, 0], [3, 77], [0, 1]),
    "fast": ([128, 128], [16, 16], [1, 1], [0, 128]),
    "engine": ([256, 256], [64, 64], [16, 16], [1, 1], [1, 256], [0, 31]),
}


def shape_of(name: str, config: str) -> dict[str, Any]:
    """Fields of LaunchShape. What is counted in groups is meant for the wider rows of the bars."""
    fields = VARIANTS[name]
    return {f: v for f, v in fields.items() if config != "engine" or f in ("tagged", "lines") or f.startswith("line_")}


# -- in the rank processes ---------------------------------------------------------------------------------------------


def keep(ranks: RankProcess, name: str) -> Reply:
    """Put the communicator aside, beside others."""
    kept = (ranks.comm, ranks.hidden, ranks.top_k, ranks.slots_per_rank, ranks.options)
    ranks.kept = {**getattr(ranks, "kept", {}), name: kept}
    return {}


def use(ranks: RankProcess, name: str) -> Reply:
    """Go on with one that was put aside."""
    ranks.comm, ranks.hidden, ranks.top_k, ranks.slots_per_rank, ranks.options = ranks.kept[name]
    return {}


def close_kept(ranks: RankProcess) -> Reply:
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
    return float((got - want).norm() / want.norm()) if len(want) else 0.0


def runs_of(comm: CudaCommunicator, ranks: RankProcess, tokens: int) -> dict[str, Callable[[], torch.Tensor | None]]:
    """dispatch, combine, both."""
    g = torch.Generator().manual_seed(comm.rank)
    places = comm.ep_size * ranks.slots_per_rank
    x = torch.randn(tokens, ranks.hidden, generator=g).to(ranks.device, torch.bfloat16)
    slots = torch.rand(tokens, places, generator=g).argsort(1)[:, : ranks.top_k].int().to(ranks.device)
    weights = torch.rand(tokens, ranks.top_k, generator=g).to(ranks.device)
    sent = comm.dispatch(x, slots, weights)
    y = torch.randn(sent.row_M.shape[0], ranks.hidden, device=ranks.device, dtype=torch.bfloat16)
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


def pair(ranks: RankProcess, tokens: int) -> Reply:
    """Replays of graphs of the communicators `on` and `off` in turns: us of each, for dispatch, combine and both."""
    runs = {name: runs_of(kept[0], ranks, tokens) for name, kept in ranks.kept.items()}
    align = ranks.kept["on"][0].barrier
    samples: dict[str, dict[str, list[float]]] = {}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for what in WHAT:
            graphs = {}
            for name in runs:
                runs[name][what]()
                stream.synchronize()
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], stream=stream):
                    for _ in range(PAIR_REPEATS):
                        runs[name][what]()
            taken: dict[str, list[float]] = {"on": [], "off": []}
            for turn in range(PAIRS + 2):
                for name in ("on", "off") if turn % 2 else ("off", "on"):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    align()
                    start.record()
                    graphs[name].replay()
                    end.record()
                    end.synchronize()
                    taken[name].append(start.elapsed_time(end) * 1e3 / PAIR_REPEATS)
            samples[what] = {name: us[2:] for name, us in taken.items()}
    return {"us": samples}


def adapter(ranks: RankProcess, tokens: int, use_fp8: bool) -> Reply:
    """Figures in us of calls through DeepEP's interface, with and without a hook, in a graph of 8."""
    comm = ranks.comm
    most, experts = comm.layout.max_tokens, comm.ep_size * ranks.slots_per_rank
    buffer = Buffer(communicator=comm, low_latency_mode=True, enable_shrink=True)
    g = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(tokens, ranks.hidden, generator=g).to(ranks.device, torch.bfloat16)
    chosen = torch.rand(tokens, experts, generator=g).argsort(1)[:, : ranks.top_k].to(ranks.device)
    weights = torch.rand(tokens, ranks.top_k, generator=g).to(ranks.device)

    def dispatch(hook: bool) -> Any:
        got = buffer.low_latency_dispatch(x, chosen, most, experts, use_fp8=use_fp8, return_recv_hook=hook)
        if got[4] is not None:
            got[4]()
        return got

    handle = dispatch(False)[2]
    y = torch.randn(ranks.slots_per_rank, comm.ep_size * most, ranks.hidden, device=ranks.device).to(torch.bfloat16)

    def combine(hook: bool) -> None:
        finish = buffer.low_latency_combine(y, chosen, weights, handle, return_recv_hook=hook)[2]
        if finish is not None:
            finish()

    torch.cuda.synchronize()
    figures = {}
    for name, run in (("dispatch", dispatch), ("combine", combine)):
        for hook in (False, True):
            figures[f"{name}{' hook' if hook else ''}"] = timed(lambda run=run, hook=hook: run(hook), comm.barrier, 8)
    assert comm.status().clean
    return {"us": figures}


COMMANDS = {
    "measure": measure, "check": check, "keep": keep, "use": use, "close_kept": close_kept, "pair": pair,
    "adapter": adapter,
}  # fmt: skip


# -- the parts ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limit(p: Party, seconds: float) -> Iterator[None]:
    """A party that hangs is killed: its answers end, which is an AssertionError here."""

    def end() -> None:
        for m in p.ranks.values():
            m.process.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_all(p: Party, name: str) -> None:
    """The variant's communicators, one a configuration, each adopted and put aside."""
    ranks = list(p.ranks.values())
    for config, fields in CONFIGS.items():
        p.open(ranks, **fields, shape=shape_of(name, config))
        p.adopt(ranks)
        p.all("keep", name=config)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:150]


class Field:
    """Parties of the variants and of the other parts, started together."""

    def __init__(self, names: list[str], parts: list[str], stack: contextlib.ExitStack) -> None:
        self.parties = {name: stack.enter_context(party(SCRIPT, 2, 2)) for name in [*names, *parts]}
        self.failed: dict[str, str] = {}
        self.passed: list[str] = []
        self.rows: dict[str, dict[str, dict[str, float]]] = {}

    def attempt(self, name: str, run: Callable[[], None], seconds: float = LIMIT_S) -> bool:
        """Whether a step of one party went well; if not, its processes end and it is said why."""
        try:
            with limit(self.parties[name], seconds):
                run()
        except (AssertionError, OSError, ValueError) as error:
            self.failed[name] = first_line(error)
            print(f"{name}: FAILED {self.failed[name]}", flush=True)
            self.end(name)
            return False
        return True

    def open(self, names: list[str]) -> None:
        """All at once: each compiles its kernels."""
        threads = [
            threading.Thread(target=self.attempt, args=(n, lambda n=n: open_all(self.parties[n], n), 45.0), daemon=True)
            for n in names
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.passed = [n for n in names if n not in self.failed]

    def checked(self) -> None:
        for name in list(self.passed):
            started, p = time.monotonic(), self.parties[name]

            def run(p: Party = p) -> None:
                for config, sizes in CHECKED.items():
                    p.all("use", name=config)
                    for i, tokens in enumerate(sizes):
                        p.all("check", tokens=tokens, seed=i)

            if self.attempt(name, run):
                print(f"{name}: right, checked in {time.monotonic() - started:.1f} s", flush=True)
            else:
                self.passed.remove(name)

    def timed(self) -> None:
        for name in list(self.passed):
            self.rows[name] = {}
            for config, sizes in TIMED.items():
                p, row = self.parties[name], {}

                def run(p: Party = p, config: str = config, row: dict[str, float] = row) -> None:
                    p.all("use", name=config)
                    for n in TIMED[config]:
                        for what, us in slower(p.all("measure", tokens=n)).items():
                            row[f"{what} {n}"] = us

                if not self.attempt(name, run):
                    self.passed.remove(name)
                    break
                self.rows[name][config] = row
                print(f"{name:44s} {config:7s} {short(row, sizes)}", flush=True)
            self.end(name)

    def end(self, name: str) -> None:
        for m in self.parties[name].ranks.values():
            m.end()


def short(row: dict[str, float], sizes: tuple[int, ...]) -> str:
    """dispatch, combine and both, of the sizes in their order."""
    return "  ".join(f"{what} " + " / ".join(f"{row[f'{what} {n}']:5.1f}" for n in sizes) for what in WHAT)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median and the interval that holds the true one with 95 %, whatever the distribution."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(n) / 2
    return (
        statistics.median(ordered),
        ordered[max(0, int(n / 2 - reach))],
        ordered[min(n - 1, math.ceil(n / 2 + reach))],
    )


def guard(p: Party, variant: str, rows: dict[str, Any]) -> None:
    """On against off, in turns."""
    ranks = list(p.ranks.values())
    for config, sizes in (("exact", (128, 16, 1)), ("engine", (64, 1))):
        for name, on in (("on", True), ("off", False)):
            p.open(ranks, **CONFIGS[config], guard=on, shape=shape_of(variant, config))
            p.adopt(ranks)
            p.all("keep", name=name)
        for n in sizes:
            answers = p.all("pair", tokens=n)
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


def adapters(p: Party, variant: str, rows: dict[str, Any]) -> None:
    """Through DeepEP's interface: fp8 on the wire, then bf16."""
    ranks = list(p.ranks.values())
    for fp8 in (True, False):
        p.open(ranks, **{**CONFIGS["exact"], "fp8": fp8}, shape=shape_of(variant, "exact"))
        p.adopt(ranks)
        for n in (128, 16, 1):
            row = slower(p.all("adapter", tokens=n, use_fp8=fp8))
            rows[f"{'fp8' if fp8 else 'bf16'} {n}"] = row
            figures = "  ".join(f"{what} {us:.1f}" for what, us in row.items())
            print(f"adapter, {'fp8' if fp8 else 'bf16':4s} {n:4d}  {figures}", flush=True)
        p.all("close")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares variants of the CUDA communicator's kernels.")
    parser.add_argument("--only", help="variants, separated by semicolons")
    parser.add_argument("--list", action="store_true", help="print the variants' names")
    parser.add_argument("--parts", default="variants,guard,adapter")
    parser.add_argument("--seconds", type=float, default=72.0, help="no part begins later than 12 s before")
    parser.add_argument("--json", help="write everything there")
    options = parser.parse_args()
    if options.list:
        print("\n".join(VARIANTS))
        return 0
    if torch.cuda.device_count() < 2:
        print("comm_bars: skipped, it needs two CUDA devices")
        return 0
    watchdog(options.seconds + 15)
    started = time.monotonic()
    names = options.only.split(";") if options.only else list(VARIANTS)
    parts = [part for part in ("guard", "adapter") if part in options.parts.split(",")]
    names = names if "variants" in options.parts.split(",") else []
    with contextlib.ExitStack() as stack:
        field = Field(names, parts, stack)
        field.open(names)
        print(f"compiled {len(names)} variants after {time.monotonic() - started:.0f} s", flush=True)
        field.checked()
        print("us, slower rank; of " + ", ".join(f"{c} {n}" for c, n in TIMED.items()), flush=True)
        field.timed()
        others: dict[str, dict[str, Any]] = {}
        variant = next((n for n in PREFERRED if n in field.passed or not names), "flags")
        for part in parts:
            if time.monotonic() - started > options.seconds - 12:
                print(f"{part}: left out, {options.seconds:.0f} s are over")
                continue
            rows = others.setdefault(part, {})
            run = guard if part == "guard" else adapters
            field.attempt(part, lambda run=run, part=part, rows=rows: run(field.parties[part], variant, rows), 25.0)
    print(f"\n{time.monotonic() - started:.0f} s; guard and adapter: {variant}. us of dispatch, combine, both again:")
    for name, configs in field.rows.items():
        for config, row in configs.items():
            print(f"{name:44s} {config:7s} {short(row, TIMED[config])}")
    for name, why in field.failed.items():
        print(f"{name:44s} FAILED {why}")
    if options.json:
        Path(options.json).write_text(json.dumps({"variants": field.rows, **others}, indent=1))
    return int(bool(field.failed))


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank-process"]:
        RankProcess(COMMANDS).run()
    else:
        sys.exit(main())
