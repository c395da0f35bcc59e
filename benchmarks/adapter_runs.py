"""DeepEP's interface in the rank processes of `comm_gpu`: checked against inputs that all ranks draw, then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from ranks import RankProcess, Reply

from phalanx.comm.deep_ep import Buffer
from phalanx.comm.deep_ep_layout import GROUP

HOST_CALLS, HOST_LOOPS = 20, 7

Timed = Callable[[Callable[[], object], Callable[[], object]], float]


def drawn(ranks: RankProcess, rank: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx with some -1, topk_weights (no number where nothing is chosen) of a rank, on this one's device."""
    g = torch.Generator().manual_seed(97 * seed + rank)
    experts = ranks.comm.ep_size * ranks.slots_per_rank
    x = torch.randn(tokens, ranks.hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 4
    chosen = torch.rand(tokens, experts, generator=g).argsort(1)[:, : ranks.top_k]
    weights = torch.rand(tokens, ranks.top_k, generator=g)
    out = torch.rand(tokens, ranks.top_k, generator=g) < 0.1
    x, chosen, weights = x.to(torch.bfloat16), chosen.masked_fill(out, -1), weights.masked_fill(out, torch.nan)
    return x.to(ranks.device), chosen.to(ranks.device), weights.to(ranks.device)


def check(ranks: RankProcess, tokens: list[int], use_fp8: bool, room: int, seed: int) -> Reply:
    """Dispatch and combine of known tokens. room: num_max_dispatch_tokens_per_rank."""
    comm, S = ranks.comm, ranks.slots_per_rank
    buffer = Buffer(communicator=comm, low_latency_mode=True, enable_shrink=True)
    every = [drawn(ranks, r, n, seed) for r, n in enumerate(tokens)]
    x, chosen, weights = every[comm.rank]
    experts = comm.ep_size * S
    recv_x, count, handle, _, _ = buffer.low_latency_dispatch(x, chosen, room, experts, use_fp8=use_fp8)
    values = recv_x[0].float() if isinstance(recv_x, tuple) else recv_x.float()
    if isinstance(recv_x, tuple):
        values = (values.unflatten(2, (-1, GROUP)) * recv_x[1][..., None]).flatten(2)
    where = f"rank {comm.rank}, {tokens} tokens, fp8 {use_fp8}"
    y = torch.full_like(values, torch.nan, dtype=torch.bfloat16)
    for e in range(S):
        number, n = comm.rank * S + e, int(count[e])
        came = [
            (r, t) for r, (_, idx, _) in enumerate(every) for t in (idx == number).any(1).nonzero().flatten().tolist()
        ]
        assert n == len(came), f"{where}: expert {number} got {n} rows, not {len(came)}"
        assert handle[0][e, :n].tolist() == [t for _, t in came], f"{where}: src_info of expert {number}"
        of = [sum(r == source for source, _ in came) for r in range(comm.ep_size)]
        ranges = [sum(of[:r]) << 32 | of[r] for r in range(comm.ep_size)]
        assert handle[1][e].tolist() == ranges, f"{where}: layout_range of expert {number}"
        if n:
            want = torch.stack([every[r][0][t] for r, t in came]).float()
            off = float((values[e, :n] - want).norm() / want.norm())
            assert off < (0.08 if use_fp8 else 1e-9), f"{where}: rows of expert {number} are off by {off:.1e}"
            y[e, :n] = (want * (1 + number / 64)).to(torch.bfloat16)
    out = buffer.low_latency_combine(y, chosen, weights, handle)[0]
    rows = (x.float()[:, None] * (1 + chosen[..., None] / 64)).to(torch.bfloat16).float()
    sums = (rows * weights.masked_fill(chosen < 0, 0)[..., None]).masked_fill(chosen[..., None] < 0, 0).sum(1)
    off = float((out.float() - sums).norm() / sums.norm()) if len(x) else 0.0
    assert off < 4e-3, f"{where}: combined is off by {off:.1e}"
    assert comm.status().clean, comm.status()
    return {}


def host_us(run: Callable[[], object], align: Callable[[], object]) -> float:
    """Microseconds of this host's time that a call takes, launched eagerly, with the device far behind."""
    samples = []
    for _ in range(HOST_LOOPS):
        align()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(HOST_CALLS):
            run()
        samples.append((time.perf_counter() - began) * 1e6 / HOST_CALLS)
        torch.cuda.synchronize()
    return statistics.median(samples)


def measure(ranks: RankProcess, tokens: int, use_fp8: bool, room: int, timed: Timed) -> Reply:
    """us in a graph, of the adapter and of the communicator's own kernels; host us of an eager call."""
    comm, S = ranks.comm, ranks.slots_per_rank
    buffer = Buffer(communicator=comm, low_latency_mode=True, enable_shrink=True)
    experts = comm.ep_size * S
    x, chosen, weights = drawn(ranks, comm.rank, tokens, 1)
    slots, weights = chosen.int(), weights.nan_to_num()

    def dispatch() -> Any:
        return buffer.low_latency_dispatch(x, chosen, room, experts, use_fp8=use_fp8)

    handle = dispatch()[2]
    y = torch.empty(S, comm.ep_size * room, ranks.hidden, device=ranks.device, dtype=torch.bfloat16).normal_()
    sent = comm.dispatch(x, slots)
    y_MD = torch.randn(sent.row_M.shape[0], ranks.hidden, device=ranks.device).to(torch.bfloat16)

    def both() -> None:
        buffer.low_latency_combine(y, chosen, weights, dispatch()[2])

    def own_both() -> None:
        comm.combine_weighted(y_MD, comm.dispatch(x, slots), weights)

    runs: dict[str, Callable[[], object]] = {
        "dispatch": dispatch, "own dispatch": lambda: comm.dispatch(x, slots),
        "combine": lambda: buffer.low_latency_combine(y, chosen, weights, handle),
        "own combine": lambda: comm.combine_weighted(y_MD, sent, weights), "both": both, "own both": own_both,
    }  # fmt: skip
    figures = {}
    for name, run in runs.items():
        figures[name] = timed(run, comm.barrier)
        if not name.startswith("own"):
            figures[f"host {name}"] = host_us(run, comm.barrier)
    assert comm.status().clean, comm.status()
    return {"us": figures}
