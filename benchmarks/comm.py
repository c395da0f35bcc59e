"""What one exchange between ranks costs, against gloo's all_to_all of the same bytes, in one run.

    python benchmarks/comm.py --json

Measured on 4 ranks of one host: an exchange of `--pair-kb` a pair by `CpuCommunicator` (a dispatch in which every
token goes to one rank, and a combine) and by a gloo group, alternating in blocks; the same between ranks that take
each other for other hosts and so use TCP, over loopback, each rank alone (`tcp`) or two to a host (`mixed`); the same
with `--work-ms` of compute before each exchange, where the ideal is ranks * work / cores; the price of elasticity, as
the dispatch and combine with guards and a notice board against those without, alternating too; and the CPU time of one
dispatch and combine at `--tokens` tokens when nobody has to wait. gloo uses TCP over loopback, too. Absolute figures
depend on the machine and on its load; the ratios less.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import click
import torch
import torch.distributed as dist

from phalanx.comm.base import Dispatched
from phalanx.comm.cpu import CpuCommunicator
from phalanx.comm.notices import NoticeBoard
from phalanx.wire import Site
from phalanx.world import Member, View

HIDDEN = 512  # 1 KB a row in bfloat16

COMMUNICATORS = 6
"""Of each rank."""

HOSTS: dict[str, Callable[[int], str]] = {
    "shm": lambda rank: "all",
    "tcp": lambda rank: f"host {rank}",
    "mixed": lambda rank: f"host {rank // 2}",
}
"""Where ranks believe to be."""


@dataclass(frozen=True)
class Plan:
    ranks: int
    pair_kb: int
    work_ms: float
    tokens: int
    blocks: int
    rounds: int


class Bench:
    """One rank's side."""

    def __init__(self, rank: int, plan: Plan, board: str, store: str, parent: Connection) -> None:
        self.rank, self.plan, self.parent = rank, plan, parent
        R = plan.ranks
        shape = {"max_tokens": R * plan.pair_kb, "hidden": HIDDEN, "top_k": 1, "slots_per_rank": 1}
        wide = shape | {"max_tokens": plan.tokens, "top_k": 8, "slots_per_rank": 8}
        self.exchange = self._comm(shape, board)
        self.tcp, self.mixed = self._comm(shape, board, "tcp"), self._comm(shape, board, "mixed")
        self.guarded, self.bare = self._comm(wide, board), self._comm(wide, "")
        self.tcp_layer = self._comm(wide, board, "tcp")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=R)

    def _comm(self, shape: dict[str, int], board: str, links: str = "shm") -> CpuCommunicator:
        comm = CpuCommunicator(
            self.rank,
            self.plan.ranks,
            incarnation=0,
            dtype=torch.bfloat16,
            peer_timeout_s=60.0,
            notices=NoticeBoard.open(board) if board else None,
            elastic=bool(board),
            site=None if links == "shm" else Site(node_rank=0, host="127.0.0.1", token=b"of this benchmark"),
            **shape,
        )
        self.parent.send(comm.address)
        where = HOSTS[links]
        members = (Member(rank, 0, where(rank), comm_address=a) for rank, a in enumerate(self.parent.recv()))
        comm.adopt(View(1, self.plan.ranks, tuple(members)))
        return comm

    def run(self) -> dict[str, list[float]]:
        """Microseconds of each measured call."""
        plan, R = self.plan, self.plan.ranks
        rows = R * plan.pair_kb
        x_TD = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
        slots_TK = torch.arange(R, dtype=torch.int32).repeat_interleave(plan.pair_kb)[:, None].contiguous()
        out = torch.empty_like(x_TD)
        wide = torch.ones(plan.tokens, HIDDEN, dtype=torch.bfloat16)
        picks = torch.Generator().manual_seed(self.rank)
        wants = torch.stack([torch.randperm(8 * R, generator=picks)[:8] for _ in range(plan.tokens)]).to(torch.int32)

        def layer(comm: CpuCommunicator) -> None:
            got = comm.dispatch(wide, wants)
            comm.combine(got.x_ND.index_select(0, got.row_M), got)

        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "exchange": (0.0, lambda: self.exchange.dispatch(x_TD, slots_TK)),
            "exchange_tcp": (0.0, lambda: self.tcp.dispatch(x_TD, slots_TK)),
            "exchange_mixed": (0.0, lambda: self.mixed.dispatch(x_TD, slots_TK)),
            "gloo": (0.0, lambda: dist.all_to_all_single(out, x_TD)),
            "exchange_with_work": (plan.work_ms, lambda: self.exchange.dispatch(x_TD, slots_TK)),
            "exchange_tcp_with_work": (plan.work_ms, lambda: self.tcp.dispatch(x_TD, slots_TK)),
            "gloo_with_work": (plan.work_ms, lambda: dist.all_to_all_single(out, x_TD)),
            "layer_elastic": (0.0, lambda: layer(self.guarded)),
            "layer_bare": (0.0, lambda: layer(self.bare)),
            "layer_tcp": (0.0, lambda: layer(self.tcp_layer)),
        }
        took: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(plan.blocks):
            for name, (work_ms, call) in calls.items():
                self.exchange.barrier()
                for i in range(plan.rounds + 2):
                    began = time.perf_counter_ns()
                    compute(work_ms)
                    call()
                    if i >= 2:
                        took[name].append((time.perf_counter_ns() - began) / 1e3)
        self.exchange.barrier()
        dist.destroy_process_group()
        return took


def compute(work_ms: float) -> None:
    """Use that much CPU time."""
    enough = time.thread_time_ns() + int(work_ms * 1e6)
    while time.thread_time_ns() < enough:
        pass


def rank_main(rank: int, plan: Plan, board: str, store: str, parent: Connection) -> None:
    torch.set_num_threads(1)
    parent.send(Bench(rank, plan, board, store, parent).run())


def own_cpu_us(plan: Plan) -> dict[str, float]:
    """CPU of a rank's dispatch and combine when nobody has to wait: the mean over the ranks, the median over rounds.

    All ranks are in this process. Each starts the next one's collective at the fault point between what it sends and
    what it waits for, so that on the way back everybody finds everything ready."""
    R = plan.ranks
    x_TD = torch.ones(plan.tokens, HIDDEN, dtype=torch.bfloat16)
    wants = [torch.stack([torch.randperm(8 * R)[:8] for _ in range(plan.tokens)]).to(torch.int32) for _ in range(R)]
    got: dict[int, Dispatched] = {}
    y_MD: dict[int, torch.Tensor] = {}

    def start(rank: int, name: str) -> None:
        if rank < R and name == "dispatch":
            got[rank] = comms[rank].dispatch(x_TD, wants[rank])
        elif rank < R and name == "combine":
            comms[rank].combine(y_MD[rank], got[rank])

    comms = [
        CpuCommunicator(
            rank, R, incarnation=0, max_tokens=plan.tokens, hidden=HIDDEN, top_k=8, slots_per_rank=8,
            dtype=torch.bfloat16, peer_timeout_s=60.0, fault_point=lambda name, rank=rank: start(rank + 1, name),
        )
        for rank in range(R)
    ]  # fmt: skip
    view = View(1, R, tuple(Member(rank, 0, comm_address=comm.address) for rank, comm in enumerate(comms)))
    for comm in comms:
        comm.adopt(view)
    took: dict[str, list[float]] = {"dispatch": [], "combine": []}
    for _ in range(plan.rounds):
        for name, values in took.items():
            began = time.thread_time_ns()
            start(0, name)
            values.append((time.thread_time_ns() - began) / 1e3 / R)
            if name == "dispatch":
                y_MD.update({rank: each.x_ND.index_select(0, each.row_M) for rank, each in got.items()})
    for comm in comms:
        comm.close()
    return {name: round(statistics.median(values), 1) for name, values in took.items()}


def measure(plan: Plan) -> dict[str, list[float]]:
    """Every rank's figures together."""
    context = mp.get_context("fork")
    board = NoticeBoard.create(plan.ranks)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(plan.ranks)]
        processes = [
            context.Process(target=rank_main, args=(rank, plan, board.address, f"{folder}/store", theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _ in range(COMMUNICATORS):
            addresses = [ours.recv() for ours, _ in pipes]
            for ours, _ in pipes:
                ours.send(addresses)
        took: dict[str, list[float]] = {}
        for ours, _ in pipes:
            for name, values in ours.recv().items():
                took.setdefault(name, []).extend(values)
        for process in processes:
            process.join()
    return took


def summary(plan: Plan, took: dict[str, list[float]]) -> dict[str, Any]:
    def percentiles(values: list[float]) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=100)
        return {"p50": round(cuts[49], 1), "p90": round(cuts[89], 1), "p99": round(cuts[98], 1)}

    us = {name: percentiles(values) for name, values in took.items()}
    cores = len(os.sched_getaffinity(0))
    ideal = plan.work_ms * 1e3 * max(1.0, plan.ranks / cores)
    return {
        "machine": {"cores": cores, "processor": platform.machine(), "torch": torch.__version__},
        "plan": {"ranks": plan.ranks, "pair_kb": plan.pair_kb, "work_ms": plan.work_ms, "tokens": plan.tokens},
        "us": us,
        "own_cpu_us": own_cpu_us(plan),
        "gloo_over_exchange_p50": round(us["gloo"]["p50"] / us["exchange"]["p50"], 2),
        "gloo_over_exchange_tcp_p50": round(us["gloo"]["p50"] / us["exchange_tcp"]["p50"], 2),
        "exchange_tcp_over_shm_p50": round(us["exchange_tcp"]["p50"] / us["exchange"]["p50"], 2),
        "layer_tcp_over_shm_p50": round(us["layer_tcp"]["p50"] / us["layer_elastic"]["p50"], 2),
        "gloo_over_exchange_with_work_p50": round(us["gloo_with_work"]["p50"] / us["exchange_with_work"]["p50"], 2),
        "exchange_with_work_over_ideal_p50": round(us["exchange_with_work"]["p50"] / ideal, 3),
        "elastic_over_bare_p50": round(us["layer_elastic"]["p50"] / us["layer_bare"]["p50"], 3),
    }


@click.command(help=__doc__)
@click.option("--ranks", default=4, show_default=True)
@click.option("--pair-kb", default=16, show_default=True, help="KB that each rank sends to each.")
@click.option("--work-ms", default=0.5, show_default=True, help="CPU time of a rank before an exchange with work.")
@click.option("--tokens", default=16, show_default=True, help="Tokens a rank in the dispatch and combine of a layer.")
@click.option("--blocks", default=6, show_default=True)
@click.option("--rounds", default=100, show_default=True, help="Calls in a block.")
@click.option("--json", "as_json", is_flag=True)
def main(as_json: bool, **options: Any) -> None:
    plan = Plan(**options)
    torch.set_num_threads(1)
    result = summary(plan, measure(plan))
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, values in result["us"].items():
        click.echo(f"{name:22} p50 {values['p50']:8.1f}  p90 {values['p90']:8.1f}  p99 {values['p99']:8.1f} us")
    for name, value in result["own_cpu_us"].items():
        click.echo(f"{'own CPU of a ' + name:36} {value} us")
    for name, value in result.items():
        if name.endswith("_p50"):
            click.echo(f"{name:36} {value}")


if __name__ == "__main__":
    main()
