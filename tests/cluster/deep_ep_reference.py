"""What an exchange through DeepEP's interface must give, computed token by token from the seeds of all ranks.

Used on CPUs here, and on devices by scripts/gpu_check.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.comm.deep_ep import Buffer, Shape

LOW = (1 << 32) - 1


@dataclass(frozen=True)
class Way:
    """One way to call dispatch and combine. end: "now", "event" or "hook"."""

    fp8: bool = False
    round_scale: bool = False
    end: str = "now"
    zero_copy: bool = False


WAYS = (
    Way(),
    Way(end="hook", zero_copy=True),
    Way(fp8=True, end="event"),
    Way(fp8=True, end="hook"),
    Way(fp8=True, round_scale=True, zero_copy=True),
)


@dataclass(frozen=True)
class Inputs:
    """One rank's, in one round."""

    x: Tensor
    topk_idx: Tensor
    weights: Tensor


def inputs(seed: int, rank: int, tokens: int, shape: Shape) -> Inputs:
    """A third of the tokens select no expert in some place, some select none at all. Some channels are all zero."""
    g = torch.Generator().manual_seed(seed * 997 + rank)
    x = torch.randn(tokens, shape.hidden, generator=g) * torch.rand(tokens, 1, generator=g) * 8
    x[:, :128] *= (torch.rand(tokens, 1, generator=g) < 0.9).float()
    topk_idx = torch.rand(tokens, shape.num_experts, generator=g).argsort(1)[:, : shape.top_k]
    topk_idx[torch.rand(tokens, shape.top_k, generator=g) < 0.15] = -1
    topk_idx[torch.rand(tokens, generator=g) < 0.1] = -1
    return Inputs(x.to(torch.bfloat16), topk_idx, torch.rand(tokens, shape.top_k, generator=g))


def restored(values: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., D] from e4m3 [..., D] and scales [..., D / 128]."""
    return values.float() * scales.repeat_interleave(128, -1)


def travelled(x: Tensor, way: Way, scales: Tensor | None) -> Tensor:
    """What a token is after its way, float32; checks its scales, which were given to it on the way."""
    if scales is None:
        return x.float()
    sent = []
    for group, scale in zip(x.float().view(-1, 128), scales.reshape(-1).tolist(), strict=True):
        largest = group.abs().max().clamp_min(1e-4)
        exact = float(largest) / 448
        if way.round_scale:
            assert torch.tensor(scale).frexp().mantissa == 0.5, f"{scale} is no power of two"
            assert exact <= scale < 2 * exact
            sent.append(group / scale)
        else:
            assert abs(scale / exact - 1) < 1e-6
            sent.append(group * (torch.full_like(largest, 448.0) / largest))
    return restored(torch.cat(sent).to(torch.float8_e4m3fn), scales)


def expert(number: int, x: Tensor) -> Tensor:
    """What an expert makes of float32 rows."""
    return (x * (1 + number / 16)).to(torch.bfloat16)


def check_round(
    buffer: Buffer,
    seed: int,
    tokens: Sequence[int],
    shape: Shape,
    way: Way,
    *,
    alive: Collection[int],
    off: float = 0.0,
    device: str = "cpu",
) -> None:
    """One dispatch and one combine among the ranks `alive`. off: the share of e4m3 values that may differ, where the
    sender's kernel rounds in its own way."""
    ranks, experts = buffer.group_size, shape.num_experts // buffer.group_size
    everybody = {rank: inputs(seed, rank, tokens[rank], shape) for rank in alive}
    mine = everybody[buffer.rank]
    x, topk_idx, weights = (t.to(device, copy=True) for t in (mine.x, mine.topk_idx, mine.weights))
    stats = torch.full((experts,), 7, dtype=torch.int32, device=device)
    recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
        x, topk_idx, shape.max_tokens, shape.num_experts, cumulative_local_expert_recv_stats=stats, use_fp8=way.fp8,
        round_scale=way.round_scale, async_finish=way.end == "event", return_recv_hook=way.end == "hook",
    )  # fmt: skip
    if hook is not None:
        x.fill_(torch.nan)  # a caller's next kernel may write there
        hook()
    event.current_stream_wait()
    assert (hook is not None) == (way.end == "hook")
    values, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    check_layout(values, scales, recv_count, handle, way, ranks, shape)
    assert torch.equal(stats, recv_count + 7)

    y = torch.full(values.shape, torch.nan, dtype=torch.bfloat16)  # whatever is not a token must not count
    different = values_seen = 0
    for i in range(experts):
        number = buffer.rank * experts + i
        rows = [(source, t) for source in sorted(alive) for t in named(everybody[source], number)]
        where = f"rank {buffer.rank}, seed {seed}, expert {number}"
        assert int(recv_count[i]) == len(rows), where
        sources_said = handle[0][i, : len(rows)].tolist()
        assert sources_said == [t for _, t in rows], (where, sources_said, rows)
        ranges = [((v := int(handle[1][i, r])) >> 32, v & LOW) for r in range(ranks)]
        counts = [sum(source == r for source, _ in rows) for r in range(ranks)]
        assert ranges == [(sum(counts[:r]), counts[r]) for r in range(ranks)], where
        for place, (source, t) in enumerate(rows):
            scale = None if scales is None else scales[i, place].cpu()
            got = values[i, place].cpu().float() if scale is None else restored(values[i, place].cpu(), scale)
            want = travelled(everybody[source].x[t], way, scale)
            different, values_seen = different + int((got != want).sum()), values_seen + got.numel()
            y[i, place] = expert(number, got)
    assert different <= off * values_seen, f"rank {buffer.rank}, seed {seed}: {different} of {values_seen} differ"
    give_back(buffer, y.to(device), topk_idx, weights, handle, way, everybody, off)


def check_layout(
    values: Tensor, scales: Tensor | None, count: Tensor, handle: tuple, way: Way, ranks: int, shape: Shape
) -> None:
    """Shapes, types and strides of what a dispatch returns."""
    experts, capacity = shape.num_experts // ranks, ranks * shape.max_tokens
    assert (values.shape, values.is_contiguous()) == ((experts, capacity, shape.hidden), True)
    assert values.dtype == (torch.float8_e4m3fn if way.fp8 else torch.bfloat16)
    assert (scales is not None) == way.fp8
    if scales is not None:
        assert (scales.shape, scales.dtype) == ((experts, capacity, shape.hidden // 128), torch.float32)
        assert scales.stride() == (capacity * (shape.hidden // 128), 1, capacity), "column by column"
    assert (count.shape, count.dtype) == ((experts,), torch.int32)
    src_info, layout_range, max_tokens, hidden, num_experts = handle
    assert (src_info.shape, src_info.dtype) == ((experts, capacity), torch.int32)
    assert (layout_range.shape, layout_range.dtype) == ((experts, ranks), torch.int64)
    assert (max_tokens, hidden, num_experts) == (shape.max_tokens, shape.hidden, shape.num_experts)


def named(theirs: Inputs, number: int) -> list[int]:
    """The tokens that select this expert, in order."""
    return [t for t, row in enumerate(theirs.topk_idx.tolist()) if number in row]


def give_back(
    buffer: Buffer, y: Tensor, topk_idx: Tensor, weights: Tensor, handle: tuple, way: Way,
    everybody: dict[int, Inputs], off: float,
) -> None:  # fmt: skip
    """The combine, in the same way, and what it must give: experts that are gone add nothing."""
    if way.zero_copy:
        buffer.get_next_low_latency_combine_buffer(handle)[:] = y
        y = torch.zeros_like(y)
    out = torch.empty(topk_idx.shape[0], y.shape[2], dtype=torch.bfloat16, device=y.device)
    weights[topk_idx < 0] = torch.nan
    combined, event, hook = buffer.low_latency_combine(
        y, topk_idx, weights, handle, zero_copy=way.zero_copy, out=out, async_finish=way.end == "event",
        return_recv_hook=way.end == "hook",
    )  # fmt: skip
    if hook is not None:
        hook()
    event.current_stream_wait()
    assert combined is out
    mine, experts = everybody[buffer.rank], handle[4] // buffer.group_size
    want = torch.zeros(mine.x.shape)
    for t, row in enumerate(mine.topk_idx.tolist()):
        for k, number in enumerate(row):
            if number >= 0 and number // experts in everybody:
                want[t] += mine.weights[t, k] * mine.x[t].float() * (1 + number / 16)
    error = (combined.cpu().float() - want).norm() / want.norm().clamp_min(1e-6)
    assert torch.isfinite(combined).all()
    # bf16 rounds twice, e4m3 has 3 bits: what a single wrong row would do is far more.
    assert float(error) < (0.04 + 2 * off if way.fp8 else 4e-3), f"rank {buffer.rank}: {error:.2e}"
