#!/usr/bin/env python3
"""Times steps with prefills on one CUDA device: launched eagerly, and as CUDA graphs by number of tokens.

    benchmarks/prefill_gpu.py                    steps of 64 to 2048 tokens, and their attention alone; below 100 s
    benchmarks/prefill_gpu.py --only steps       ... or attention
    benchmarks/prefill_gpu.py --deterministic    steps of up to 512 tokens with every token attended as a decode

One rank, alone, with the shape of Qwen3-30B-A3B, 12 of its 48 layers, random weights, bf16. A step: the tables' layout
and copy, the model, one token for each decode and for the prompt, and the wait; median of REPEATS. "device" is the time
that its kernels take in a graph, by the profiler. Each graph's tokens and logits must have the same bits as the eager
step's. Attention alone: time of its kernels, against torch's own attention for variable lengths over keys that lie in
one piece (ours are in blocks of 16).
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from engine_ladder import qwen3_30b_a3b, random_weights

from phalanx.backend import CudaBackend, Place
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.batch import StepBatch
from phalanx.engine.cuda import CudaRunner
from phalanx.engine.graphs import token_ladder
from phalanx.engine.request import Request
from phalanx.engine.scheduler import Limits
from phalanx.messages import SamplingParams, Submit
from phalanx.model import device_tables
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.cuda import DeviceBatch, DeviceKV, DeviceModel, PrefillTiling, table_shape
from phalanx.moe.cuda import DeviceExperts, DeviceLoad, Tiling
from phalanx.moe.gate import RouteTable
from phalanx.world import Member, View

LAYERS, BLOCK, REPEATS = 12, 16, 5
LONG = 8192
DECODES = 64
TILINGS = (
    PrefillTiling(rows=64, block=64, warps=4, stages=2),
    PrefillTiling(rows=64, block=64, warps=4, stages=3),
    PrefillTiling(rows=128, block=64, stages=2),
    PrefillTiling(rows=128, block=64, stages=3),
    PrefillTiling(rows=128, block=64, stages=4),
    PrefillTiling(rows=128, block=128, stages=2),
)
KINDS = {
    "attention": ("prefill_kernel",), "decodes": ("decode_kernel", "merge_kernel"),
    "experts": ("experts_kernel",), "exchange": ("dispatch_kernel", "combine_kernel"),
    "small": ("norm_kernel", "place_kernel", "gate_kernel"),
}  # fmt: skip
"""What a profile's kernels are counted as; all others are dense products, copies and the sampler."""


@dataclass(frozen=True)
class Case:
    """A step of `tokens` tokens, `decodes` of them decodes, each sequence with so many tokens before it. prompts: how
    many the others belong to."""

    tokens: int
    decodes: int
    context: int
    prompts: int = 1


class Bench:
    """The parts of one rank, and batches for it."""

    def __init__(self, tokens: int, deterministic: bool) -> None:
        self.device = torch.device("cuda", 0)
        torch.set_grad_enabled(False)
        model = self.model = replace(qwen3_30b_a3b(LAYERS), max_position=LONG + 4096)
        self.longest = LONG + tokens + BLOCK
        a_sequence = self.longest // BLOCK + 1
        config = ServeConfig(
            model="random", device="cuda", ep_size=1, max_num_batched_tokens=tokens, max_num_seqs=DECODES + 16,
            max_model_len=self.longest, num_kv_blocks=(DECODES + 16) * a_sequence, deterministic=deterministic,
            slots_per_rank=model.num_experts, peer_timeout_s=20.0,
        )  # fmt: skip
        self.board = NoticeBoard.create(1)
        made = self.made = CudaBackend(Place(config, model, 0, 0, self.board, 1), graph_sizes=())
        for layer in range(LAYERS):
            made.bank.weights_LSX[layer].normal_(0, 0.03)
        self.limits: Limits = made.limits
        self.exact = deterministic
        self.weights = random_weights(model, self.device)
        self.load = DeviceLoad(LAYERS, model.num_experts, self.device)
        self.routes = RouteTable(LAYERS, model.num_experts, 1, self.device)
        self.experts = DeviceExperts(
            made.bank, self.routes, made.comm, self.load, top_k=model.top_k, num_experts=model.num_experts,
            norm_topk=True, pairs=tokens * model.top_k, weigh_early=not deterministic,
        )  # fmt: skip
        self.kv = DeviceKV(model, self.limits.num_blocks, BLOCK, torch.bfloat16, self.device)
        self.kv.data.normal_()
        made.comm.adopt(View(1, 1, (Member(0, 0, comm_address=made.comm.address),)))
        self.routes.adopt(np.tile(np.arange(model.num_experts, dtype=np.int32)[None, :, None], (LAYERS, 1, 1)))
        self.random = np.random.default_rng(0)
        self.blocks = self.random.permutation(self.limits.num_blocks).astype(np.int32).reshape(-1, a_sequence)

    def decoder(self, tiling: PrefillTiling | None = None) -> tuple[DeviceModel, device_tables.TableShape]:
        """The model with this tiling of prefills, and the tables that belong to it."""
        limits = self.limits
        shape = table_shape(
            self.model, rows=limits.max_num_batched_tokens, sequences=limits.max_num_seqs,
            max_model_len=limits.max_model_len, block_size=BLOCK, num_blocks=limits.num_blocks, exact=self.exact,
            device=self.device, prefill=tiling,
        )  # fmt: skip
        experts, exact = self.experts, self.exact
        return DeviceModel(self.model, self.weights, experts, self.kv, shape, exact=exact, prefill=tiling), shape

    def runner(self, model: DeviceModel, shape: device_tables.TableShape, sizes: tuple[int, ...] = ()) -> CudaRunner:
        """Graphs, once it is warm, for decodes, and for steps of these numbers of tokens."""
        return CudaRunner(
            model, shape, self.made.comm, self.routes, self.load, self.made.bank, graph_sizes=(1, 8, DECODES + 8),
            token_sizes=sizes, exact=self.exact, device=self.device,
        )  # fmt: skip

    def forward(self, case: Case) -> tuple[ForwardBatch, list[int]]:
        """The batch, and the last row of each sequence."""
        left, prompts = case.tokens - case.decodes, case.prompts if case.tokens > case.decodes else 0
        lengths = [1] * case.decodes + [left // prompts + (i < left % prompts) for i in range(prompts)]
        slices, positions = [], list[int]()
        for i, length in enumerate(lengths):
            context = max(case.context, 128) if length == 1 else case.context
            blocks = self.blocks[i][: -(-(context + length) // BLOCK)]
            slices.append(SequenceSlice(len(positions), length, context, blocks))
            positions.extend(range(context, context + length))
        tokens = torch.from_numpy(self.random.integers(0, self.model.vocab_size, case.tokens))
        forward = ForwardBatch(tokens, torch.tensor(positions), tuple(slices))
        return forward, [piece.start + piece.length - 1 for piece in slices]

    def batch(self, case: Case) -> StepBatch:
        """The same with a greedy request for each sequence."""
        forward, rows = self.forward(case)
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        samples = tuple(
            (Request.of(Submit(f"r{row}", 0, [1], sampling), frozenset(), BLOCK), row) for row in rows
        )  # fmt: skip
        return StepBatch(forward, samples, ())


# -- whole steps -------------------------------------------------------------------------------------------------------


def steps(bench: Bench, tokens: tuple[int, ...]) -> None:
    """A line a case: times, and what its kernels' time goes to."""
    model, shape = bench.decoder()
    sizes = token_ladder(max(tokens))
    before = _used(bench.device)
    graphs = bench.runner(model, shape, sizes)
    first_s = _warm_s(bench, graphs)
    memory = _used(bench.device) - before
    again_s, without_s = (_warm_s(bench, bench.runner(model, shape, some)) for some in (sizes, ()))
    _used(bench.device)
    notes = [
        f"warm-up with graphs of {', '.join(map(str, sizes))} tokens and three of decodes {first_s:.2f} s, again, all "
        f"compiled, {again_s:.2f} s, with those of decodes alone {without_s:.2f} s; the first took "
        f"{memory / 1e6:.0f} MB of the device",
        f"laying out the tables of {shape.rows} tokens behind {LONG}: {_tables_ms(bench, shape):.2f} ms",
    ]
    cases = list(_cases(tokens))
    batches = [bench.batch(case) for case in cases]
    eager = {size: bench.runner(model, replace(shape, rows=size)) for size in tokens}  # not warmed: without graphs
    lines = [_step(case, batch, eager, graphs) for case, batch in zip(cases, batches, strict=True)]
    # The profiler, once started, slows what the host does: it comes last.
    shares = [_shares(graphs, batch) for batch in batches]
    head = "tokens decodes context prompts   eager ms  graph ms  device ms"
    print("\n".join(["", *notes, "", head, *map(str.__add__, lines, shares)]), flush=True)


def _step(case: Case, batch: StepBatch, eager: dict[int, CudaRunner], graphs: CudaRunner) -> str:
    """Times of a step, eager and as a graph, which must agree."""
    size = next(size for size in eager if size >= case.tokens)
    slow, slow_ms = _timed(partial(eager[size].run, batch))
    rows = sorted({row for _, row in batch.samples[:: max(1, len(batch.samples) // 8)]} | {0, case.tokens // 2})
    want = slow.logits(rows)
    fast, fast_ms = _timed(partial(graphs.run, batch))
    got = fast.logits(rows)
    for ran in (slow, fast):
        assert ran.status is not None, case
        assert ran.status.clean, case
    assert np.isfinite(got).all(), f"{case}: logits are not numbers"
    if case.tokens == size:  # else the eager step's products are for fewer rows, in another order
        assert fast.tokens == slow.tokens, f"{case}: other tokens than eagerly"
        assert (got == want).all(), f"{case}: logits differ from the eager ones by up to {abs(got - want).max()}"
    else:
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 5e-2, f"{case}: logits differ from the eager ones by {error:.1e}"
    line = f"{case.tokens:6d} {case.decodes:7d} {case.context:7d} {case.prompts:7d} {slow_ms:10.2f} {fast_ms:9.2f} "
    print(line, flush=True)
    return line


def _shares(graphs: CudaRunner, batch: StepBatch) -> str:
    found = dict.fromkeys([*KINDS, "dense"], 0.0)
    for name, us in _profiled(partial(graphs.run, batch), 2):
        kind = next((kind for kind, names in KINDS.items() if any(part in name for part in names)), "dense")
        found[kind] += us / 1e3
    return f"{sum(found.values()):10.2f}   " + ", ".join(f"{kind} {ms:.2f}" for kind, ms in found.items())


def _warm_s(bench: Bench, runner: CudaRunner) -> float:
    began = time.monotonic()
    runner.warm_up(bench.limits)
    return time.monotonic() - began


def _cases(tokens: tuple[int, ...]) -> Iterator[Case]:
    for context in (0, LONG):
        for decodes in (0, DECODES):
            yield from (Case(size, decodes, context) for size in tokens if size > decodes)
    yield Case(max(tokens), 0, 0, prompts=16)
    yield Case(max(tokens) * 3 // 4 + 1, 0, 0)
    yield Case(16, 0, LONG)


def _profiled(run: Callable[[], object], times: int) -> list[tuple[str, float]]:
    """Microseconds a run of each kernel on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    return [(row.key, row.self_device_time_total / times) for row in seen.key_averages()]


def _tables_ms(bench: Bench, shape: device_tables.TableShape) -> float:
    forward, _ = bench.forward(Case(shape.rows, DECODES, LONG))
    words = np.zeros(shape.size, np.int32)
    return _timed(partial(device_tables.write, words, shape, forward, shape.rows))[1]


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The last result, and the median in ms."""
    run()
    took = []
    for _ in range(REPEATS):
        began = time.monotonic()
        done = run()
        took.append((time.monotonic() - began) * 1e3)
    return done, statistics.median(took)


def _used(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# -- attention alone ---------------------------------------------------------------------------------------------------


def attention(bench: Bench, tokens: tuple[int, ...]) -> None:
    """Every tiling, and torch's own, for short and long contexts: microseconds a layer."""
    cases = [Case(64, 0, LONG), *(Case(size, 0, context) for context in (0, LONG) for size in (512, max(tokens)))]
    made = {tiling: bench.decoder(tiling) for tiling in TILINGS}
    lines = [
        f"{'microseconds a layer (TFLOP/s)':54s}" + "".join(f"{c.tokens:6d} behind {c.context:4d}  " for c in cases)
    ]
    columns: dict[str, list[str]] = {}
    for case in cases:
        forward, _ = bench.forward(case)
        wanted: torch.Tensor | None = None
        for name, run in _library(bench, forward):
            got = _attempt(columns, name, case, run)
            wanted = got if wanted is None else wanted
        for tiling, (model, shape) in made.items():
            name, ours = str(tiling).removeprefix("Prefill"), _ours(bench, model, shape, forward)
            got = _attempt(columns, name, case, ours, ("prefill_kernel", "merge_kernel"))
            if wanted is not None and got is not None:
                error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
                assert error < 1e-2, f"{tiling}, {case}: differs from torch's by {error:.1e}"
    lines += [f"{name[:52]:54s}" + "".join(cells) for name, cells in columns.items()]
    print("\n".join(["", *lines]), flush=True)


def _attempt(
    columns: dict[str, list[str]],
    name: str,
    case: Case,
    run: Callable[[int], torch.Tensor],
    kernels: tuple[str, ...] = (),
) -> Any:
    """Microseconds a layer of these kernels, or of all; what cannot run says why. Returns layer 0's result."""
    flops = 4 * 32 * 128 * sum(case.context + i + 1 for i in range(case.tokens))

    def layers() -> None:
        for layer in range(LAYERS):
            run(layer)

    try:
        got = run(0).clone()
        layers()
        profile = _profiled(layers, 3)
    except Exception as error:  # an option of the comparison that this torch or device lacks
        if kernels:
            raise
        print(f"{name}, {case}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        columns.setdefault(name, []).append(f"{'-':>20s}")
        return None
    us = sum(us for key, us in profile if not kernels or any(part in key for part in kernels)) / LAYERS
    columns.setdefault(name, []).append(f"{us:11.1f} ({flops / us / 1e6:4.0f})  ")
    return got


def _ours(
    bench: Bench, model: DeviceModel, shape: device_tables.TableShape, forward: ForwardBatch
) -> Callable[[int], torch.Tensor]:
    """Norm, turn and place as in a step, then attention, over queries that `_queries` made."""
    rows = forward.token_ids_T.shape[0]
    words = np.zeros(shape.size, np.int32)
    device_tables.write(words, shape, forward, rows)
    batch = DeviceBatch.of(torch.from_numpy(words).to(bench.device), shape, rows, True, Tiling())
    fresh = _queries(bench, rows)
    return lambda layer: model.attend(layer, fresh.clone(), batch)


def _queries(bench: Bench, rows: int) -> torch.Tensor:
    model = bench.model
    generator = torch.Generator(bench.device).manual_seed(rows)
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return torch.randn(rows, width, device=bench.device, generator=generator).to(torch.bfloat16)


def _library(bench: Bench, forward: ForwardBatch) -> Iterator[tuple[str, Callable[[int], torch.Tensor]]]:
    """torch's attention over the same queries and keys, as our kernels placed them; keys in one piece."""
    c, rows = bench.model, forward.token_ids_T.shape[0]
    (piece,) = forward.slices
    model, shape = bench.decoder()
    qkv = _queries(bench, rows)
    words = np.zeros(shape.size, np.int32)
    device_tables.write(words, shape, forward, rows)
    model.attend(0, qkv, DeviceBatch.of(torch.from_numpy(words).to(bench.device), shape, rows, True, Tiling()))
    end = piece.context + rows
    blocks = torch.from_numpy(piece.blocks.astype(np.int64)).to(bench.device)
    kv = bench.kv.data[0][blocks].transpose(2, 3).transpose(0, 1).reshape(2, -1, c.num_kv_heads, c.head_dim)[:, :end]
    k, v = kv[0].contiguous(), kv[1].contiguous()
    q = qkv.view(rows, -1, c.head_dim)[:, : c.num_heads].contiguous()
    counts = [torch.tensor([0, n], dtype=torch.int32, device=bench.device) for n in (rows, end)]

    def varlen(_layer: int) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        out: torch.Tensor = varlen_attn(q, k, v, counts[0], counts[1], rows, end, **options)
        return out.reshape(rows, -1)

    def sdpa(_layer: int) -> torch.Tensor:
        from torch.nn.attention.bias import causal_lower_right
        from torch.nn.functional import scaled_dot_product_attention

        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask: Any = causal_lower_right(rows, end)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(rows, -1)

    yield "torch varlen_attn", varlen
    yield "torch scaled_dot_product_attention", sdpa


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", choices=("steps", "attention"))
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("prefill_gpu: this machine has no CUDA device")
        return 0
    began = time.monotonic()
    tokens = (64, 128, 256, 512) if options.deterministic else (64, 128, 256, 512, 1024, 2048)
    torch.cuda.set_device(0)
    bench = Bench(max(tokens), options.deterministic)
    print(f"{torch.cuda.get_device_name(0)}, {LAYERS} layers, made in {time.monotonic() - began:.1f} s", flush=True)
    if options.only != "steps" and not options.deterministic:
        attention(bench, tokens)
    if options.only != "attention":
        steps(bench, tokens)
    bench.board.close()
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
