"""The planner against DeepSeek's published algorithm: time, balancedness, exposure, moves. Writes results/plan.md.

Run: OMP_NUM_THREADS=1 python benchmarks/plan.py [--quick] [--out benchmarks/results/plan.md]
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from eplb_baseline import eplb

from phalanx.cli.plan_load import synthetic
from phalanx.elastic.replan import at_risk, balancedness, diff, replan, routes
from phalanx.world import EMPTY, Member, Placement, View

LAYERS, EXPERTS = 61, 256


def view(ranks: int, hosts: int, dead: tuple[int, ...] = ()) -> View:
    return View(1, ranks, tuple(Member(r, 0, host=f"h{r * hosts // ranks}") for r in range(ranks) if r not in dead))


def timed(work: Callable[[], object], times: int) -> str:
    """Least and median wall time, and median processor time, in ms."""
    wall, cpu = [], []
    for _ in range(times):
        start, used = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - used)
        wall.append(time.perf_counter() - start)
    return f"{min(wall) * 1e3:.2f} | {np.median(wall) * 1e3:.2f} | {np.median(cpu) * 1e3:.2f}"


def without(placement: Placement, dead: tuple[int, ...]) -> np.ndarray:
    held = placement.slots_LP.copy()
    for rank in dead:
        held[:, rank * placement.slots_per_rank : (rank + 1) * placement.slots_per_rank] = EMPTY
    return held


def times(repeat: int) -> list[str]:
    load = synthetic("lognormal", LAYERS, EXPERTS)[0]
    lines = ["| case | least ms | median ms | median CPU ms | bar |", "|---|---|---|---|---|"]
    for ranks, hosts, width, bar in ((32, 4, 9, "5"), (32, 4, 16, ""), (320, 40, 2, "20")):
        kw = dict(num_experts=EXPERTS, slots_per_rank=width)
        for priority in ("even", "safety", "balance") if width == 9 else ("even",):
            row = timed(lambda: replan(load, view(ranks, hosts), priority=priority, **kw), repeat)  # noqa: B023
            lines.append(f"| full, {ranks} ranks x {width} slots, {hosts} hosts, {priority} | {row} | {bar} |")
        first = replan(load, view(ranks, hosts), **kw)
        after, held = view(ranks, hosts, (5,)), without(first, (5,))
        row = timed(lambda: replan(load, after, held_LP=held, min_moves=True, **kw), repeat)  # noqa: B023
        lines.append(f"| min_moves after one death, {ranks} x {width} | {row} | {'2' if width == 9 else ''} |")
        row = timed(lambda: replan(load, after, held_LP=held, **kw), max(3, repeat // 20))  # noqa: B023
        lines.append(f"| full from what is held after one death, {ranks} x {width} | {row} | |")
        row = timed(lambda: routes(first, view(ranks, hosts), 0, 16, load), max(3, repeat // 20))  # noqa: B023
        lines.append(f"| routes of one rank, W = 16, {ranks} x {width} | {row} | |")
    row = timed(lambda: eplb(load, 288, 8, 4, 32), 3)
    lines.append(f"| baseline (plain EPLB, 288 slots, hierarchical) | {row} | |")
    return lines


def baselines(load: np.ndarray, width: int) -> dict[str, Placement]:
    return {
        "EPLB hierarchical": Placement(eplb(load, 32 * width, 8, 4, 32).astype(np.int32), EXPERTS, width),
        "EPLB global": Placement(eplb(load, 32 * width, 1, 1, 32).astype(np.int32), EXPERTS, width),
    }


def balance(windows: int) -> list[str]:
    lines = [
        "| load | slots | plan | as planned | next window | / best EPLB | router's shares "
        "| ranks exposed, a layer | lost by one death, a layer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    on = view(32, 4)
    for width in (9, 16):
        for kind in ("lognormal", "zipf", "drifting", "mild"):
            loads = synthetic("lognormal" if kind == "mild" else kind, LAYERS, EXPERTS, windows=windows + 1, seed=1)
            loads = np.sqrt(loads) if kind == "mild" else loads
            scores: dict[str, list[tuple[float, ...]]] = {}
            for now, later in itertools.pairwise(loads):
                plans = baselines(now, width)
                for priority in ("even", "safety", "balance") if width == 9 else ("even",):
                    plans[f"phalanx, {priority}"] = replan(
                        now, on, num_experts=EXPERTS, slots_per_rank=width, priority=priority
                    )
                for name, plan in plans.items():
                    risk = at_risk(plan, on)
                    exposed, lost = float((risk > 0).sum(axis=1).mean()), float(risk.mean())
                    own = name.startswith("phalanx")
                    routed = balancedness(later, plan, on, routed=True) if own else float("nan")
                    scores.setdefault(name, []).append(
                        (balancedness(now, plan, on), balancedness(later, plan, on), routed, exposed, lost)
                    )
            mean = {name: np.mean(rows, axis=0) for name, rows in scores.items()}
            best = max(m[1] for name, m in mean.items() if name.startswith("EPLB"))
            for name, (first, even, routed, exposed, lost) in mean.items():
                by_router = "" if np.isnan(routed) else f"{routed:.4f}"
                lines.append(
                    f"| {kind} | {32 * width} | {name} | {first:.4f} | {even:.4f} | {even / best:.3f} | {by_router} "
                    f"| {exposed:.2f} | {lost:.2f} |"
                )
    return lines


def bound_of_pairs(kind: str) -> float:
    """What no placement of 512 slots in which every expert has two replicas can exceed, as planned.

    512 slots for 256 experts with two at least are two each. Some rank has a half of the hottest expert, and 15 other
    experts' halves beside it, which are not lighter than those of the 15 lightest."""
    load = synthetic(kind, LAYERS, EXPERTS, seed=1)[0]
    load = np.sort(load / load.sum(axis=1, keepdims=True), axis=1)
    heaviest = np.maximum(1 / 32, (load[:, -1] + load[:, :15].sum(axis=1)) / 2)
    return float((1 / 32 / heaviest).mean())


def bound_of_least_exposure(kind: str) -> float:
    """Likewise for 288 slots with 25 exposed ranks a layer.

    The 25 ranks have 225 slots, so 31 experts at least are not single; they have 63 replicas at most, two each and one
    to spare. So a third of the hottest expert or half of it stands on a rank, and half of the second one if that is a
    third."""
    load = synthetic(kind, LAYERS, EXPERTS, seed=1)[0]
    load = np.sort(load / load.sum(axis=1, keepdims=True), axis=1)
    hottest = np.minimum(load[:, -1] / 2, np.maximum(load[:, -1] / 3, load[:, -2] / 2))
    return float((1 / 32 / np.maximum(1 / 32, hottest)).mean())


def moves() -> list[str]:
    lines = ["| slots | load | experts without a live replica | moved in min_moves | ratio |", "|---|---|---|---|---|"]
    for width in (9, 16):
        for kind in ("lognormal", "zipf"):
            load = synthetic(kind, LAYERS, EXPERTS)[0]
            kw = dict(num_experts=EXPERTS, slots_per_rank=width)
            first = replan(load, view(32, 4), **kw)
            need = moved = 0
            for rank in range(32):
                held = without(first, (rank,))
                plan = replan(load, view(32, 4, (rank,)), held_LP=held, min_moves=True, **kw)
                need += int((~(held[:, :, None] == np.arange(EXPERTS)).any(axis=1)).sum())
                moved += sum(len(diff(held, plan, r)) for r in range(32) if r != rank)
            ratio = f"{moved / need:.3f}" if need else "-"
            lines.append(f"| {32 * width} | {kind} | {need / 32:.1f} a death | {moved / 32:.1f} a death | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan.md")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in about if x.startswith("model name")), platform.machine())
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    text = [
        "# The planner: time, balance, exposure, moves",
        "",
        f"{LAYERS} layers, {EXPERTS} experts. {cpu}, {os.cpu_count()} cores, load average {load} while measuring "
        f"(other work ran on the machine: the least of the repeated times is the nearest to a quiet one). Python "
        f"{platform.python_version()}, numpy {np.__version__}, one thread. Commit {commit}, "
        "`OMP_NUM_THREADS=1 python benchmarks/plan.py`.",
        "",
        "## Time of one plan",
        "",
        *times(8 if args.quick else 300),
        "",
        "## Balancedness and exposure",
        "",
        "Planned on window i, scored there (as planned) and on window i + 1 (next window; equal shares, or the "
        "router's); 32 "
        "ranks on 4 hosts. The baseline is a plain "
        "implementation of DeepSeek's published algorithm (`benchmarks/eplb_baseline.py`), with 8 groups on 4 nodes "
        "and globally; ratios are to the better one. Mild is log-normal of sigma 0.5, the others of sigma 1. A rank "
        "is exposed in a layer when its death loses an expert.",
        "",
        *balance(2 if args.quick else 4),
        "",
        "What cannot be had together, and why. With 256 + 256 slots and two replicas of every expert each has exactly "
        "two, so a rank carries half of the hottest expert and at least the halves of the 15 lightest: no such plan's "
        f"balancedness, as planned, can exceed {bound_of_pairs('lognormal'):.3f} on this log-normal load (sigma 1) and "
        f"{bound_of_pairs('zipf'):.3f} on Zipf, where the hottest expert takes 16 % of all. EPLB gets more because it "
        "leaves cold experts single. With 256 + 32 slots and as few exposed ranks as can be, 63 replicas at most are "
        "left for the 31 experts or more that are not single: two each, and one to spare, so no such plan can exceed "
        f"{bound_of_least_exposure('zipf'):.3f} on Zipf ({bound_of_least_exposure('lognormal'):.3f} on log-normal). "
        "`priority='balance'` gives the slots to the load instead.",
        "",
        "## Moves after one death of 32, each rank in turn",
        "",
        *moves(),
        "",
    ]
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
