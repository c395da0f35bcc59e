"""What the rank processes of scripts/gpu_check's checks of the communicator do, and what must come out of it.

What an exchange must return is computed from the seeds of all ranks, so each rank knows what its peers sent.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import RankProcess, Reply

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))

from deep_ep_reference import WAYS, Way, check_round

from phalanx.comm.base import Dispatched
from phalanx.comm.deep_ep import Buffer, Shape
from phalanx.comm.launch import power_of_two
from phalanx.comm.received import RowNorm
from phalanx.errors import PhalanxError
from phalanx.world import Member, View

LAYERS = 4


# -- what must come out ------------------------------------------------------------------------------------------------


def inputs(rank: int, ranks: RankProcess, seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D] bf16, slots [T, K] int32 (distinct, a tenth of them -1), weights [T, K]: the same wherever computed."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    places = ranks.comm.ep_size * ranks.slots_per_rank
    x = torch.randn(tokens, ranks.hidden, generator=g).to(torch.bfloat16)
    slots = torch.rand(tokens, places, generator=g).argsort(1)[:, : ranks.top_k].to(torch.int32)
    slots[torch.rand(tokens, ranks.top_k, generator=g) < 0.1] = -1
    return x, slots, torch.rand(tokens, ranks.top_k, generator=g)


def expert(x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """What the expert in a (global) slot makes of rows: cheap, and different for every slot."""
    return (x.float() * (1 + slot.float()[..., None] / 64)).to(torch.bfloat16)


def rows_expected(x: torch.Tensor, slots: torch.Tensor, alive: list[int], slots_per_rank: int) -> torch.Tensor:
    """[T, K, D]: the row of each (token, k), zeros where there is none or its rank is masked."""
    here = (slots >= 0) & torch.isin(slots // slots_per_rank, torch.tensor(alive, dtype=torch.int32))
    return expert(x[:, None].expand(-1, slots.shape[1], -1), slots) * here[..., None]


def weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Added in the order of k in float32."""
    total = torch.zeros(rows.shape[0], rows.shape[2])
    for k in range(rows.shape[1]):
        total += weights[:, k : k + 1] * rows[:, k].float()
    return total


def close(got: torch.Tensor, want: torch.Tensor, scale: float = 1.0) -> None:
    error = (got.float().cpu() - want).norm() / want.norm().clamp_min(1e-6)
    assert torch.isfinite(got).all(), "not finite"
    assert error < 4e-3 * scale, f"relative error {error:.2e}"


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of the fp8 dispatch: e4m3 values as floats, and a scale for each 128 channels."""
    groups = x.float().view(x.shape[0], -1, 128)
    largest = groups.abs().amax(2).clamp_min(1e-4)
    q = (groups * (448 / largest)[..., None]).to(torch.float8_e4m3fn)
    return q.float().view(x.shape), largest / 448


# -- commands of the rank processes ------------------------------------------------------------------------------------


def exchange(ranks: RankProcess, seed: int, tokens: list[int], alive: list[int]) -> Reply:
    """One dispatch and one combine of each kind, checked on both sides."""
    comm, S = ranks.comm, ranks.slots_per_rank
    fast, fp8 = ranks.options.get("mode") == "fast", bool(ranks.options.get("fp8"))
    all_inputs = {r: inputs(r, ranks, seed, tokens[r]) for r in range(comm.ep_size)}
    x, slots, weights = (t.to(ranks.device) for t in all_inputs[comm.rank])
    weights = weights.masked_fill(slots < 0, float("nan"))  # nobody's weight counts for nothing
    sent = comm.dispatch(x, slots, weights if fast else None)
    got = sent.trimmed()

    pairs = []  # (local slot, source, token, k) of everything that must have come
    for source in alive:
        t, k = np.nonzero(((s := all_inputs[source][1].numpy()) >= 0) & (s // S == comm.rank))
        pairs.append(np.stack([s[t, k] - comm.rank * S, np.full(t.shape, source), t, k], 1))
    want = np.concatenate(pairs)
    want = want[np.lexsort((want[:, 3], want[:, 2], want[:, 1], want[:, 0]))]
    assert got.slot_M.tolist() == want[:, 0].tolist(), f"slots {got.slot_M.tolist()[:8]} not {want[:8, 0]}"
    assert sent.first_S.tolist() == np.searchsorted(want[:, 0], np.arange(S + 1)).tolist(), "first_S"
    sources = torch.stack([all_inputs[s][0][t] for _, s, t, _ in want.tolist()]) if len(want) else x.cpu()[:0]
    rows = got.x_ND.view(torch.uint8).view(got.x_ND.shape[0], -1)[got.row_M].cpu() if len(want) else None
    if rows is not None and not fp8:
        assert torch.equal(rows.view(torch.bfloat16), sources), "a token arrived changed"
    elif rows is not None and sent.scale_ND is not None:
        q, scale = quantized(sources)
        torch.testing.assert_close(sent.scale_ND[got.row_M].cpu(), scale, rtol=1e-6, atol=0)
        off = (rows.view(torch.float8_e4m3fn).float() != q).float().mean()
        # The interpreter rounds otherwise on the way to e4m3.
        assert off < (0.05 if ranks.device.type == "cpu" else 1e-3), f"{off:.1%} of the fp8 values differ"

    y = expert(sources, torch.from_numpy(want[:, 0]) + comm.rank * S).to(ranks.device)
    expected = rows_expected(*all_inputs[comm.rank][:2], alive, S)
    back = comm.combine(y, sent).cpu()
    assert torch.equal(back, expected), f"rows differ at {(back != expected).any(2).nonzero().tolist()[:4]}"
    out = comm.combine_weighted(y, sent, weights)
    close(out, weighted(expected, all_inputs[comm.rank][2]), 2.0 if fast else 1.0)
    comm.results[: len(y)] = y
    out_in_place = comm.combine_weighted(comm.results, sent, weights)
    assert torch.equal(out_in_place, out), "results that peers read add up to something else"
    back = comm.combine(comm.results[: len(y)], sent).cpu()
    assert torch.equal(back, expected), f"rows read in place differ at {(back != expected).any(2).nonzero()[:4]}"
    assert out.shape == (tokens[comm.rank], ranks.hidden)
    if comm.norms and seed % 2:
        same_as_a_norm(ranks, seed, y, sent, weights, out)
    return {"pairs": len(want)}


def same_as_a_norm(
    ranks: RankProcess, seed: int, y: torch.Tensor, sent: Dispatched, weights: torch.Tensor, sums: torch.Tensor
) -> None:
    """A combine that adds to a residual and norms, against `sums` and the engine's norm. COLLECTIVE."""
    from phalanx.model.kernels import norm_kernel

    comm, (tokens, width) = ranks.comm, sums.shape
    assert tokens <= comm.norms, (tokens, comm.norms)
    g = torch.Generator().manual_seed(seed)
    residual, gain = (torch.randn(n, width, generator=g).to(ranks.device, sums.dtype) for n in (tokens, 1))
    want, rest = torch.empty_like(sums), residual.clone()
    if tokens:
        norm_kernel[(tokens,)](
            sums, rest, gain, want, 1e-6, D=width, BLOCK=power_of_two(width), ADD=True, PARTS=0, num_warps=4
        )
    got = comm.combine_weighted(y, sent, weights, RowNorm(residual, gain[0], 1e-6))
    assert torch.equal(residual, rest), "another residual"
    # Squares are added in another order, so here and there a value is rounded otherwise.
    assert (got != want).float().mean().nan_to_num() < 0.01, "another norm"
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=0)


def half_exchange(
    ranks: RankProcess, seed: int, tokens: int, alive: list[int], combines: bool, normed: bool, in_place: bool
) -> Reply:
    """A dispatch of all ranks, of which only those in `alive` combine: what the others' experts made is missing.

    normed: combine adds to a residual, and norms. in_place: it reads results where they stand."""
    comm, S = ranks.comm, ranks.slots_per_rank
    x, slots, weights = (t.to(ranks.device) for t in inputs(comm.rank, ranks, seed, tokens))
    sent = comm.dispatch(x, slots, weights)
    got = sent.trimmed()
    y = expert(got.x_ND[got.row_M], got.slot_M + comm.rank * S)
    comm.results[: len(y)] = y
    assert comm.status().clean, comm.status()
    if combines:
        fast = ranks.options.get("mode") == "fast"
        out = torch.zeros_like(x)
        if normed:
            gain = torch.ones_like(x[0])
            norm = comm.combine_weighted(y, sent, weights, RowNorm(out, gain, 1e-6))
            wide = out.float()  # all zeros where the lost rank held every expert of a token
            close(norm, (wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()).cpu(), 2.0)
        else:
            out = comm.combine_weighted(comm.results if in_place else y, sent, weights)
        close(out, weighted(rows_expected(x.cpu(), slots.cpu(), alive, S), weights.cpu()), 2.0 if fast else 1.0)
    status = comm.status()
    return {"lost": sorted(status.lost), "causes": dict(status.causes)}


def same_bits(ranks: RankProcess, seed: int, tokens: int, trials: int) -> Reply:
    """Mode exact: move the experts to other slots, and the sum keeps its bits."""
    comm, S = ranks.comm, ranks.slots_per_rank
    x, experts, weights = (t.to(ranks.device) for t in inputs(comm.rank, ranks, seed, tokens))
    first: torch.Tensor | None = None
    for trial in range(trials):
        places = torch.randperm(comm.ep_size * S, generator=torch.Generator().manual_seed(trial)).to(ranks.device)
        back = torch.empty_like(places)
        back[places] = torch.arange(places.numel(), device=ranks.device)
        slots = torch.where(experts >= 0, places[experts.clamp_min(0).long()].int(), -1)
        sent = comm.dispatch(x, slots)
        got = sent.trimmed()
        y = expert(got.x_ND[got.row_M], back[got.slot_M + comm.rank * S])
        comm.results[: len(y)] = y
        out = comm.combine_weighted(comm.results, sent, weights)
        first = out if first is None else first
        assert torch.equal(out.view(torch.int16), first.view(torch.int16)), f"placement {trial} changed bits"
    return {}


def capture(ranks: RankProcess, seed: int, tokens: int) -> Reply:
    """A graph of LAYERS exchanges, made alone: all peers are masked or silent until the next adopt."""
    comm, S = ranks.comm, ranks.slots_per_rank
    ranks.x, ranks.slots, ranks.weights = (t.to(ranks.device) for t in inputs(comm.rank, ranks, seed, tokens))
    ranks.expected = {}

    def step() -> list[torch.Tensor]:
        outs = []
        for _ in range(LAYERS):
            sent = comm.dispatch(ranks.x, ranks.slots)
            rows = sent.x_ND[sent.row_M.clamp(0, sent.x_ND.shape[0] - 1)]
            comm.results.copy_(expert(rows, sent.slot_M + comm.rank * S))
            outs.append(comm.combine_weighted(comm.results, sent, ranks.weights))
        return outs

    ranks.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(ranks.graph):
        ranks.outs = step()
        ranks.copied = torch.empty(comm.status_words.shape, dtype=torch.int64, pin_memory=True)
        ranks.copied.copy_(comm.status_words, non_blocking=True)
    return {}


def serve(ranks: RankProcess, steps: int, alive: list[int], announce: int = 0) -> Reply:
    """Replay the captured graph until the status is not clean, checking every step's result. One step a replay."""
    key = tuple(alive)
    if key not in ranks.expected:
        rows = rows_expected(ranks.x.cpu(), ranks.slots.cpu(), alive, ranks.slots_per_rank)
        ranks.expected[key] = weighted(rows, ranks.weights.cpu()).to(ranks.device)
    want, times, wrong = ranks.expected[key], [], 0
    for step in range(1, steps + 1):
        started = time.monotonic_ns()
        ranks.graph.replay()
        torch.cuda.current_stream().synchronize()
        times.append(time.monotonic_ns() - started)
        status = ranks.comm.decode_status(ranks.copied)
        if not status.clean:
            break
        wrong += sum(int(((o.float() - want).norm() / want.norm()) > 4e-3) for o in ranks.outs)
        if step == announce:
            print('{"running": true}', flush=True)
    return {
        "steps": step, "wrong": wrong, "ended_ns": time.monotonic_ns(), "lost": sorted(status.lost),
        "interrupted": status.interrupted, "causes": dict(status.causes), "detect_s": dict(status.detect_s),
        "step_us": float(np.median(times[:-1] or times)) / 1e3,
    }  # fmt: skip


def wait_for_peers(ranks: RankProcess, act: str, rank: int, epoch: int) -> Reply:
    """Launch a gather that the peers do not join, and end its wait from this rank's own host."""
    torch.cuda.synchronize()
    ranks.comm.all_gather(torch.tensor([1], dtype=torch.int64, device=ranks.device))
    started = time.monotonic_ns()
    if act == "mask":
        ranks.comm.update_mask(rank, False)
    elif act == "interrupt":
        ranks.comm.interrupt(epoch)
    answer = ranks.status()
    return {**answer, "seconds": (time.monotonic_ns() - started) / 1e9, "ended_ns": time.monotonic_ns()}


def expect_members(ranks: RankProcess, epoch: int, members: list[dict[str, Any]], steps: int = 0) -> Reply:
    """Have a view's members mapped beside replays of the captured graph: how long that took, and the longest step."""
    view = View(epoch, ranks.comm.ep_size, tuple(Member(**m) for m in members))
    times, began, mapped_s = [], time.monotonic(), -1.0
    while mapped_s < 0 or len(times) < steps:  # as many steps on every rank, whenever it is ready
        if ranks.comm.expect(view) and mapped_s < 0:
            mapped_s = time.monotonic() - began
        if len(times) < steps:
            started = time.monotonic()
            ranks.graph.replay()
            torch.cuda.current_stream().synchronize()
            times.append(time.monotonic() - started)
    return {"seconds": mapped_s, "worst_step_s": max(times, default=0.0)}


def interrupt(ranks: RankProcess, epoch: int) -> Reply:
    said = time.monotonic_ns()
    ranks.comm.interrupt(epoch)
    return {"said_ns": said}


def meet(ranks: RankProcess, rows: list[list[int]], early: bool) -> Reply:
    """The hosts' meetings; behind the last one an all_gather on the device, or before it, so that it still waits."""
    comm = ranks.comm
    own = torch.tensor(rows[-1], device=ranks.device)
    began = time.monotonic()
    met = [comm.meet(row) for row in rows[:-1]]
    gathered = comm.all_gather(own) if early else None
    met.append(comm.meet(rows[-1]))
    seconds = time.monotonic() - began
    if gathered is None:
        gathered = comm.all_gather(own)
    last, status = met[-1]
    answer = ranks.status()
    return {
        **answer, "rows": [rows.tolist() for rows, _ in met], "gathered": gathered.tolist(), "seconds": seconds,
        "lost_by_host": sorted(status.lost), "causes_by_host": dict(status.causes), "last": last.tolist(),
    }  # fmt: skip


def watch(ranks: RankProcess) -> Reply:
    """Wait for a kernel that waits for a peer, as the engine's runner does: watching whether peers end."""
    began = time.monotonic()
    ranks.comm.all_gather(torch.tensor([1], dtype=torch.int64, device=ranks.device))
    over = torch.cuda.Event()
    over.record()
    while not over.query():
        ranks.comm.watch()
    return {**ranks.status(), "seconds": time.monotonic() - began}


def sleep(ranks: RankProcess, seconds: float) -> Reply:
    print('{"asleep": true}', flush=True)
    return {"woken": ranks.comm.sleep(seconds)}


def ring(ranks: RankProcess) -> Reply:
    ranks.comm.ring()
    return {}


def deep_ep(
    ranks: RankProcess, seed: int, tokens: list[int], alive: list[int], ways: list[int], mask: int = -1,
    room: int | None = None,
) -> Reply:  # fmt: skip
    """Exchanges through DeepEP's interface, checked row by row. mask: a rank to mask first, through it too. room:
    num_max_dispatch_tokens_per_rank, when it is not all that the communicator has room for."""
    comm, buffer, shape = ranks.comm, *through_deep_ep(ranks)
    shape = replace(shape, max_tokens=room or shape.max_tokens)
    if mask >= 0:
        buffer.low_latency_update_mask_buffer(mask, True)
    interpreted, fp8 = ranks.device.type == "cpu", bool(ranks.options.get("fp8"))
    for way in [Way(fp8=True, end="hook")] if fp8 else [WAYS[i] for i in ways]:
        # The interpreter rounds otherwise on the way to e4m3.
        off = 0.1 * way.fp8 if interpreted else 1e-3
        check_round(buffer, seed, tokens, shape, way, alive=alive, off=off, device=str(ranks.device))
    masked = torch.zeros(comm.ep_size, dtype=torch.int32, device=ranks.device)
    buffer.low_latency_query_mask_buffer(masked)
    return {"masked": masked.nonzero().flatten().tolist()}


def through_deep_ep(ranks: RankProcess) -> tuple[Buffer, Shape]:
    most = ranks.comm.layout.max_tokens
    shape = Shape(most, ranks.hidden, ranks.top_k, ranks.comm.ep_size * ranks.slots_per_rank)
    return Buffer(communicator=ranks.comm, low_latency_mode=True, enable_shrink=True), shape


def deep_ep_capture(ranks: RankProcess, seed: int, tokens: int) -> Reply:
    """Two dispatches, with a hook, and their combines as a CUDA graph; nothing of it runs yet."""
    buffer, shape = through_deep_ep(ranks)
    fp8 = bool(ranks.options.get("fp8"))
    # Kept with the graph, which reads them where they lie.
    ranks.x, ranks.slots, ranks.weights = (t.to(ranks.device) for t in inputs(ranks.comm.rank, ranks, seed, tokens))
    x, experts, weights, ranks.buffer = ranks.x, ranks.slots.long(), ranks.weights, buffer
    ranks.experts = experts
    ranks.expected = weights.masked_fill(experts < 0, 0).sum(1, keepdim=True).cpu() * x.float().cpu()
    ranks.graph, ranks.outs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(ranks.graph):
        for _ in range(2):
            recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
                x, experts, shape.max_tokens, shape.num_experts, use_fp8=fp8, return_recv_hook=True
            )
            hook()
            if fp8:
                recv_x = (recv_x[0].float().unflatten(2, (-1, 128)) * recv_x[1][..., None]).flatten(2).bfloat16()
            ranks.outs.append(buffer.low_latency_combine(recv_x, experts, weights, handle)[0])
    return {}


def deep_ep_replay(ranks: RankProcess, steps: int) -> Reply:
    for _ in range(steps):
        for out in ranks.outs:
            out.zero_()
        ranks.graph.replay()
        for out in ranks.outs:
            close(out, ranks.expected, 10.0 if ranks.options.get("fp8") else 1.0)
    return {"lost": sorted(ranks.comm.status().lost)}


def raises(ranks: RankProcess, what: str, **arguments: Any) -> Reply:
    """The name of the error that another command ends with."""
    try:
        ranks.commands[what](**arguments)
    except PhalanxError as error:
        return {"raised": type(error).__name__}
    return {"raised": ""}


COMMANDS = {
    "exchange": exchange, "half_exchange": half_exchange, "same_bits": same_bits, "capture": capture, "serve": serve,
    "wait_for_peers": wait_for_peers, "interrupt": interrupt, "meet": meet, "watch": watch, "sleep": sleep,
    "ring": ring, "raises": raises, "expect": expect_members,
    "deep_ep": deep_ep, "deep_ep_capture": deep_ep_capture, "deep_ep_replay": deep_ep_replay,
}  # fmt: skip


if __name__ == "__main__":
    RankProcess(COMMANDS).run()
