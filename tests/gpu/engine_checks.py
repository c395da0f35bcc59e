"""Checks of the engine's parts on a device, against references in plain torch: for scripts/gpu_check.

The same code runs in Triton's interpreter, on the CPU, with smaller sizes. Every check makes its own random inputs.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from ranks import HostSharedMemory

from phalanx.backend import Backend, CudaBackend, Place
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine import device_sampler, sampler
from phalanx.engine.batch import StepBatch
from phalanx.engine.request import Request
from phalanx.messages import SamplingParams, Submit
from phalanx.model import device_tables
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.config import ModelConfig
from phalanx.model.cuda import DeviceBatch, DeviceKV, DeviceModel, table_shape
from phalanx.model.decode_options import DecodeCut, DecodeOptions
from phalanx.model.layers import DenseWeights, LayerWeights
from phalanx.moe.cuda import DeviceBank, DeviceExperts, DeviceLoad, Tiling
from phalanx.moe.gate import RouteTable
from phalanx.testing import tiny
from phalanx.testing.solo import SoloEngine

BUFFER_BYTES = 1 << 26


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; infinite when something is not a number."""
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.float().cpu() - want.float().cpu()).norm() / want.float().norm().clamp_min(1e-9))


def model_config(**changes: Any) -> ModelConfig:
    """A model with these sizes; only its attention is used."""
    sizes: dict[str, Any] = {
        "architecture": "qwen3_moe", "vocab_size": 97, "hidden": 64, "num_layers": 1, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "norm_eps": 1e-6, "rope_theta": 10000.0, "max_position": 4096,
        "num_experts": 4, "top_k": 2, "expert_width": 32, "dense_width": 64, "moe_layers": (0,), "norm_topk": True,
        "qk_norm": True, "attention_bias": False, "tied_embeddings": False, "sliding_window": None, "eos_ids": (),
        "dtype": "bfloat16",
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of sequence `sequence` from position `context` on."""

    sequence: int
    context: int
    length: int


class AttentionRig:
    """A DeviceModel whose `attend` is run chunk by chunk over sequences in scattered blocks."""

    def __init__(
        self, config: ModelConfig, device: torch.device, *, exact: bool, longest: int, sequences: int, seed: int,
        options: DecodeOptions,
    ) -> None:  # fmt: skip
        self.config, self.device = config, device
        self.generator = torch.Generator().manual_seed(seed)
        a_sequence = -(-longest // 16)
        blocks = torch.randperm(sequences * a_sequence, generator=self.generator).to(torch.int32).numpy()
        self.blocks = blocks.reshape(sequences, a_sequence)
        kv = DeviceKV(config, blocks.size, 16, torch.bfloat16, device)
        kv.data.fill_(float("nan"))  # what nobody wrote must not be seen
        shape = table_shape(
            config, rows=512, sequences=64, max_model_len=longest, block_size=16, num_blocks=blocks.size, exact=exact,
            device=device,
        )  # fmt: skip
        # Splits and parts so short that there are several of them.
        split = min(shape.split, max(64, longest // 2 // 64 * 64))
        self.shape = replace(shape, split=split, cut=shape.cut and replace(shape.cut, part=64))
        norms = [self.random(config.head_dim) for _ in range(2)]
        nothing = torch.empty(0, dtype=torch.bfloat16, device=device)
        layer = LayerWeights(
            nothing, nothing, None, *(n.to(device) for n in norms), nothing, None, nothing, None, None, None
        )
        self.norms = norms
        weights = DenseWeights(nothing, (layer,), nothing, nothing)
        self.model = DeviceModel(config, weights, cast(Any, None), kv, self.shape, exact=exact, options=options)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = [self.random(longest, width) for _ in range(sequences)]
        self.words = np.zeros(self.shape.size, np.int32)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(torch.bfloat16)

    def run(self, chunks: list[Chunk], padding: int = 0) -> list[torch.Tensor]:
        """What each chunk's tokens attended to."""
        slices, rows, positions = [], [], list[int]()
        for chunk in chunks:
            end = chunk.context + chunk.length
            blocks = self.blocks[chunk.sequence][: -(-end // 16)]
            slices.append(SequenceSlice(len(positions), chunk.length, chunk.context, blocks))
            positions.extend(range(chunk.context, end))
            rows.append(self.qkv[chunk.sequence][chunk.context : end])
        count = len(positions)
        batch = ForwardBatch(torch.zeros(count, dtype=torch.int64), torch.tensor(positions), tuple(slices))
        written = device_tables.write(self.words, self.shape, batch, count + padding)
        words = torch.from_numpy(self.words.copy()).to(self.device)
        on_device = DeviceBatch.of(words, self.shape, count + padding, written.pieces > 0, Tiling())
        qkv = torch.cat([*rows, self.random(padding, rows[0].shape[1])]).to(self.device)
        out = self.model.attend(0, qkv, on_device)[:count].cpu()
        return list(out.split([chunk.length for chunk in chunks]))

    def reference(self, sequence: int, length: int) -> torch.Tensor:
        """Of all tokens of a sequence, in float32 from the rounded queries, keys and values."""
        c = self.config
        heads = self.qkv[sequence][:length].float().view(length, -1, c.head_dim).transpose(0, 1)
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads])
        angle = torch.outer(
            torch.arange(length).float(), c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        )
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def placed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if c.qk_norm:
                x = (F.rms_norm(x, (c.head_dim,), None, c.norm_eps).to(torch.bfloat16) * weight).float()
            low, high = x.chunk(2, dim=-1)
            return (x * cos + torch.cat([-high, low], -1) * sin).to(torch.bfloat16).float()

        q, k = placed(q, self.norms[0]), placed(k, self.norms[1])
        group = c.num_heads // c.num_kv_heads
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        at = torch.arange(length)
        seen = at[None, :] <= at[:, None]
        if c.sliding_window:
            seen &= at[None, :] > at[:, None] - c.sliding_window
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen)[0]
        return out.transpose(0, 1).reshape(length, -1)


def check_attention(device: torch.device, large: bool) -> None:
    """Prefill in chunks, then decodes in mixed batches, over several splits; heads, windows and sizes of all kinds."""
    shapes: list[dict[str, Any]] = [
        {},
        {"num_heads": 3, "num_kv_heads": 1, "head_dim": 24, "qk_norm": False, "sliding_window": 70},
    ]
    if large:
        shapes.append({"num_heads": 32, "num_kv_heads": 4, "head_dim": 128})
        shapes.append({"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "sliding_window": 700})
    worst = 0.0
    placed = DecodeOptions(placed=64)
    for seed, changes in enumerate(shapes):
        for exact, options in ((False, DecodeOptions()), (False, placed), (True, DecodeOptions())):
            worst = max(worst, _attention_case(model_config(**changes), device, exact, large, seed, options))
    windowed = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 32, "qk_norm": False, "sliding_window": 70}
    alone = replace(placed, cut=DecodeCut(warps=1, stages=4, programs=1))  # in the interpreter: several rounds
    worst = max(worst, _attention_case(model_config(**windowed), device, False, large, len(shapes), alone))
    print(f"    attention: relative error at most {worst:.1e}")


def _attention_case(
    config: ModelConfig, device: torch.device, exact: bool, large: bool, seed: int, options: DecodeOptions
) -> float:
    long = 1400 if large else 134  # over the end of a split
    lengths = [long, 37, 5, 16]
    # The interpreter cuts bfloat16 where a device rounds.
    most = 5e-2 if device.type == "cpu" else 1e-2
    rig = AttentionRig(
        config, device, exact=exact, longest=long + 8, sequences=len(lengths), seed=seed, options=options
    )
    want = [rig.reference(s, n) for s, n in enumerate(lengths)]
    worst = 0.0

    def check(chunks: list[Chunk], padding: int = 0) -> list[torch.Tensor]:
        nonlocal worst
        got = rig.run(chunks, padding)
        for chunk, out in zip(chunks, got, strict=True):
            error = error_of(out, want[chunk.sequence][chunk.context : chunk.context + chunk.length])
            assert error < most, f"{chunk} of {config}, exact={exact}: relative error {error:.1e}"
            worst = max(worst, error)
        return got

    step = 480 if large else 100
    for start in range(0, long - 3, step):
        check([Chunk(0, start, min(step, long - 3 - start))])
    check([Chunk(1, 0, 20), Chunk(2, 0, 4), Chunk(3, 0, 15)])
    mixed = check([Chunk(0, long - 3, 1), Chunk(1, 20, 16), Chunk(2, 4, 1), Chunk(3, 15, 1)], padding=3)
    check([Chunk(0, long - 2, 1), Chunk(1, 36, 1)], padding=2)
    alone = check([Chunk(0, long - 3, 1)])
    if exact:
        assert torch.equal(mixed[0], alone[0]), "a decode's bits depend on its batch"
        again = check([Chunk(0, long - 10, 8)])
        assert torch.equal(again[0][7], alone[0][0]), "a prefill's bits differ from a decode's"
    return worst


# -- experts and gate --------------------------------------------------------------------------------------------------


def check_experts(device: torch.device, large: bool) -> None:
    """Grouped experts with none, few and many rows a slot; the gate with ties, padding and replicas."""
    cases = [(5, 48, 32, 40), (3, 40, 24, 70)]
    if large:
        cases = [(64, 2048, 768, 2048), (64, 2048, 768, 7), (3, 520, 136, 333)]
    worst = 0.0
    for seed, (slots, hidden, width, pairs) in enumerate(cases):
        worst = max(worst, _experts_case(device, slots, hidden, width, pairs, seed))
    _broken_lists_case(device)
    for experts, top_k, tokens in ((4, 2, 9), (6, 3, 5), *(((128, 8, 256),) if large else ())):
        _gate_case(device, experts, top_k, tokens)
    print(f"    experts: relative error at most {worst:.1e}")


def _rig(
    device: torch.device, slots: int, hidden: int, width: int, pairs: int, experts: int = 1, top_k: int = 1,
    replicas: int = 1,
) -> tuple[DeviceBank, RouteTable, DeviceLoad, DeviceExperts]:  # fmt: skip
    bank = DeviceBank(1, slots, hidden, width, torch.bfloat16, device)
    routes, load = RouteTable(1, experts, replicas, device), DeviceLoad(1, experts, device)
    made = DeviceExperts(
        bank, routes, cast(Any, None), load, top_k=top_k, num_experts=experts, norm_topk=True, pairs=pairs,
        weigh_early=False,
    )  # fmt: skip
    return bank, routes, load, made


def _experts_case(device: torch.device, slots: int, hidden: int, width: int, pairs: int, seed: int) -> float:
    """Every tiling that serving may choose; those for `--deterministic` must give the same bits."""
    g = torch.Generator().manual_seed(seed)
    bank, _, _, experts = _rig(device, slots, hidden, width, pairs)
    drawn = torch.Generator(device).manual_seed(seed)
    weights = torch.empty(slots, 3 * width * hidden, dtype=torch.bfloat16, device=device)
    weights.normal_(0, hidden**-0.5, generator=drawn)
    for slot in range(slots):
        bank.slot_bytes(0, slot)[:] = weights[slot].view(torch.uint8).cpu().numpy()
        bank.mark(0, slot, slot, 1)
    bank.ready()
    x, row_M, first = pairs_of(slots, hidden, pairs, g)
    on_device = x.to(device), row_M.to(device), first.to(device)
    want = through_experts(on_device[0], on_device[1], first, weights, width)
    worst, exact_bits = 0.0, []
    for exact in (False, True):
        for tiling in dict.fromkeys(Tiling.of(many * slots, slots, exact=exact) for many in (0, 2, 12, 40, 100)):
            got = experts.experts(0, *on_device, tiling)[:pairs].cpu()
            error = error_of(got, want)
            assert error < 1e-2, (
                f"{slots} slots, {hidden} x {width}, {pairs} pairs, {tiling}: relative error {error:.1e}"
            )
            worst = max(worst, error)
            exact_bits += [got] if exact else []
    # The interpreter multiplies with a library, whose sums depend on the shape.
    same = device.type == "cpu" or all(torch.equal(bits, exact_bits[0]) for bits in exact_bits)
    bank.close()
    assert same, f"{slots} slots, {hidden} x {width}, {pairs} pairs: bits depend on the tiling"
    return worst


def _broken_lists_case(device: torch.device) -> None:
    """Lists that no whole dispatch leaves: every other slot claims all pairs, which are more tiles than there are
    counters. Nothing beyond those may be written, and all must be zeros again."""
    from phalanx.moe import expert_kernels

    slots, hidden, width, pairs, t = 8, 32, 32, 160, Tiling()
    most = -(-pairs // t.rows) + slots
    first = torch.tensor([0, pairs] * (slots // 2) + [0], dtype=torch.int32, device=device)
    assert slots // 2 * -(-pairs // t.rows) > most, "these lists fit"
    x, weights, h, y = (
        torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
        for rows, columns in ((pairs, hidden), (slots, 3 * hidden * width), (pairs, width), (pairs, hidden))
    )
    words = torch.full((int(expert_kernels.READY) + most + 64,), 7, dtype=torch.int32, device=device)
    turns = words[:-64].zero_()
    expert_kernels.experts_kernel[(1,)](
        x, torch.arange(pairs, device=device), first, weights, h, y, turns, S=slots, SP=slots, F=width, D=hidden,
        X=3 * hidden * width, AT=0, BM=t.rows, UP=t.up, DOWN=t.down, BK=t.depth, UP_STAGES=t.up_stages,
        DOWN_STAGES=t.down_stages, MOST=most, num_warps=t.warps,
    )  # fmt: skip
    assert not turns.any(), "counters are left"
    assert (words[-64:] == 7).all(), "what follows the counters was written over"


def pairs_of(
    slots: int, hidden: int, pairs: int, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, the row of each pair, and where each slot's pairs begin: some slots have none, some many."""
    counts = torch.rand(slots, generator=g).mul(torch.rand(slots, generator=g) > 0.3)
    slot_M = torch.multinomial(counts + 1e-9, pairs, replacement=True, generator=g).sort().values
    first = torch.searchsorted(slot_M, torch.arange(slots + 1)).to(torch.int32)
    x = torch.randn(pairs + 3, hidden, generator=g).to(torch.bfloat16)
    return x, torch.randint(0, pairs + 3, (pairs,), generator=g), first


def through_experts(
    x: torch.Tensor, row_M: torch.Tensor, first: torch.Tensor, weights: torch.Tensor, width: int
) -> torch.Tensor:
    """What experts with these weights [S, 3 F D] make of the pairs in float32, the middle rounded to bfloat16: on the
    device on which x, row_M and weights are; `first` is on the CPU."""
    hidden = x.shape[1]
    want = torch.empty(len(row_M), hidden, device=x.device)
    for slot, flat in enumerate(weights):
        rows = x[row_M[first[slot] : first[slot + 1]]].float()
        w13, w2 = flat.float().split([2 * width * hidden, width * hidden])
        gate, up = (rows @ w13.view(2 * width, hidden).t()).chunk(2, dim=1)
        inner = (F.silu(gate) * up).to(torch.bfloat16).float()
        want[first[slot] : first[slot + 1]] = inner @ w2.view(hidden, width).t()
    return want


def _gate_case(device: torch.device, num_experts: int, top_k: int, tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    bank, routes, load, experts = _rig(device, 1, 16, 16, 1, num_experts, top_k, replicas=3)
    table = torch.randint(0, 1000, (1, num_experts, 3), generator=g).to(torch.int32)
    routes.adopt(table.numpy())
    logits = torch.randn(tokens, num_experts, generator=g).to(torch.bfloat16)
    logits[0] = 1.0  # all alike: the lowest ids
    positions = torch.randint(0, 5000, (tokens,), generator=g).to(torch.int32)
    real = tokens - 2
    weights, slots = experts.gate(
        0, logits.to(device), positions.to(device), torch.tensor([real], dtype=torch.int32, device=device)
    )
    chances = torch.softmax(logits.float(), 1)
    order = torch.sort(chances, dim=1, descending=True, stable=True)
    chosen, kept = order.indices[:, :top_k], order.values[:, :top_k]
    torch.testing.assert_close(weights.cpu(), kept / kept.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    want = table[0][chosen, (positions.long() % 3)[:, None]]
    want[real:] = -1
    assert torch.equal(slots.cpu(), want), (slots.cpu()[:3], want[:3])
    load.count(load.step_LE.cpu())
    assert load.read()[0].tolist() == torch.bincount(chosen[:real].flatten(), minlength=num_experts).tolist()
    bank.close()


# -- sampler -----------------------------------------------------------------------------------------------------------


def check_sampler(device: torch.device, large: bool) -> None:
    """The kernel's tokens are those of the host's sampler, for random parameters, with many ties."""
    from phalanx.engine import kernels

    vocab, rows, block = (151936, 96, 4096) if large else (300, 10, 128)
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, vocab, generator=g).mul_(3).to(torch.bfloat16)  # few values, so that many tie
    samples = [(_request(i, g), i) for i in range(rows)]
    told = np.zeros(device_sampler.offsets(rows)["end"], np.int32)
    device_sampler.write(told, rows, samples)
    words, at = torch.from_numpy(told).to(device), device_sampler.offsets(rows)
    floats = words.view(torch.float32)
    tokens = torch.full((rows,), -1, dtype=torch.int64, device=device)
    kernels.sample_kernel[(rows,)](
        logits.to(device), floats[at["temperatures"] :], words[at["top_ks"] :], floats[at["top_ps"] :],
        floats[at["min_ps"] :], words.view(torch.float64)[at["noises"] // 2 :], tokens, V=vocab, BLOCK=block,
        num_warps=8,
    )  # fmt: skip
    want = [
        sampler.choose(row, r.sampling, r.tokens, r.prompt_length, r.stop_ids)
        for row, (r, _) in zip(logits.float().numpy(), samples, strict=True)
    ]
    off = [i for i, (a, b) in enumerate(zip(tokens.tolist(), want, strict=True)) if a != b]
    # An exponential that rounds otherwise moves a threshold now and then.
    assert len(off) <= rows // 32, [(samples[i][0].sampling, int(tokens[i]), want[i]) for i in off[:3]]
    print(f"    sampler: {rows - len(off)} of {rows} tokens equal the host's")


def _request(i: int, g: torch.Generator) -> Request:
    draw = torch.rand(4, generator=g).tolist()
    sampling = SamplingParams(
        max_tokens=50, temperature=0.0 if i % 5 == 0 else 0.3 + draw[0], top_k=(0, 7, 40)[i % 3],
        top_p=1.0 if i % 2 else 0.5 + draw[1] / 2, min_p=0.0 if i % 4 else draw[2] / 10, seed=1000 + i,
    )  # fmt: skip
    output = list(range(i % 11))
    return Request.of(Submit(f"r{i}", 0, [1, 2, 3], sampling, output), frozenset(), 16)


# -- the whole engine, one rank ----------------------------------------------------------------------------------------


@contextmanager
def checkpoint(**sizes: Any) -> Iterator[str]:
    """A tiny random Qwen3-MoE on disk."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        tiny.make_tiny(path, "qwen3-moe", **sizes)
        yield str(path)


def on_device(device: torch.device, board: NoticeBoard, options: DecodeOptions | None = None) -> Any:
    """What SoloEngine makes a device's parts with."""

    def parts(config: ServeConfig, model: ModelConfig) -> Backend:
        place = Place(config, model, 0, 0, board, 1)
        if device.type == "cuda":
            return CudaBackend(place, options=options)
        memory = HostSharedMemory(BUFFER_BYTES, maps_host=False)
        return CudaBackend(place, device=device, memory=memory, options=options)

    return parts


@contextmanager
def served(large: bool, **flags: Any) -> Iterator[ServeConfig]:
    """A small model, and how one rank is to serve it; tiny for an interpreter."""
    sizes: dict[str, Any] = {
        "layers": 2, "hidden": 64, "head_dim": 16, "heads": 2, "kv_heads": 1, "expert_width": 32, "experts": 4,
    }  # fmt: skip
    if large:
        sizes = {
            "layers": 4, "hidden": 512, "head_dim": 64, "heads": 8, "kv_heads": 2, "expert_width": 128,
            "experts": 32, "top_k": 4,
        }  # fmt: skip
    with checkpoint(**sizes) as path:
        yield ServeConfig(
            model=path, num_kv_blocks=256, max_model_len=700, max_num_batched_tokens=64, max_num_seqs=16,
            cuda_graph_max_bs=16 if large else 0, **flags,
        )  # fmt: skip


def check_engine(device: torch.device, large: bool, **flags: Any) -> None:
    """Logits against the CPU's; and under `deterministic` the same tokens whatever the batch, the chunking, graphs."""
    board = NoticeBoard.create(1)
    with served(large, **flags) as base:
        # The interpreter cuts bfloat16 where a device rounds; float16 it rounds as well.
        typed = base if large else replace_config(base, dtype="float16")
        for options in (DecodeOptions(), None):
            _compare_logits(typed, device, board, 8e-2 if large else 5e-3, options)
        exact = replace_config(base, deterministic=True)
        _same_tokens(exact, device, board, *((6, 24) if large else (2, 3)))
        if large:
            _same_beside_prefills(exact, device, board)
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert not left, f"the engines were closed, and threads go on: {left}"
    board.close()


def replace_config(config: ServeConfig, **changes: Any) -> ServeConfig:
    """The same config, but."""
    import msgspec

    return msgspec.structs.replace(config, **changes)


def _compare_logits(
    config: ServeConfig, device: torch.device, board: NoticeBoard, most: float, options: DecodeOptions | None
) -> None:
    """Every row of a prefill in two chunks and of a decode. options: None for what serving takes."""
    reference, device_engine = SoloEngine(config), SoloEngine(config, parts=on_device(device, board, options))
    tokens = torch.randint(0, 200, (25,), generator=torch.Generator().manual_seed(2))
    worst = 0.0
    for start, end in ((0, 18), (18, 24), (24, 25)):
        blocks = np.arange(-(-end // 16), dtype=np.int32)
        forward = ForwardBatch(
            tokens[start:end], torch.arange(start, end), (SequenceSlice(0, end - start, start, blocks),)
        )
        rows = list(range(end - start))
        want, got = (
            torch.from_numpy(np.array(e.runner.run(StepBatch(forward, (), ())).logits(rows)))
            for e in (reference, device_engine)
        )
        worst = max(worst, error_of(got, want))
    how = f"{config.dtype} both, {options or 'as served'}"
    print(f"    logits: relative difference at most {worst:.1e} from the CPU's ({how})")
    assert worst < most, f"logits differ by {worst:.1e} from the CPU's"
    reference.close()
    device_engine.close()


def _same_beside_prefills(config: ServeConfig, device: torch.device, board: NoticeBoard) -> None:
    """A decode whose peers have many tokens takes another graph, and is the same in it."""
    solo = SoloEngine(config, parts=on_device(device, board), warm_up=True)
    prompt, blocks, ends = torch.arange(7, 47), np.arange(3, dtype=np.int32), [20, 25, 39]
    prefill = ForwardBatch(prompt, torch.arange(40), (SequenceSlice(0, 40, 0, blocks),))
    solo.runner.run(StepBatch(prefill, (), ()))
    slices = tuple(SequenceSlice(row, 1, end, blocks) for row, end in enumerate(ends))
    forward = ForwardBatch(prompt[ends], torch.tensor(ends), slices)
    sampling = SamplingParams(max_tokens=2, temperature=0.9, seed=4, ignore_eos=True)
    samples = tuple((Request.of(Submit(f"r{row}", 0, [1], sampling), frozenset(), 16), row) for row in range(3))
    ran = []
    for step_tokens in (3, 1 << 20):
        left = solo.runner.run(StepBatch(forward, samples, (), step_tokens=step_tokens))
        ran.append((left.tokens, left.logits(range(3)).tolist()))
    solo.close()
    assert ran[0] == ran[1], f"a decode beside many tokens is another: {ran[0][0]} and {ran[1][0]}"
    assert np.isfinite(ran[0][1]).all()
    print("    deterministic: decodes alike in a graph with the tiles of a prefill")


def _same_tokens(config: ServeConfig, device: torch.device, board: NoticeBoard, count: int, length: int) -> None:
    """Alone, in a batch, moved half-way, without graphs, with small chunks: always the same tokens."""
    prompts = [[5 + (7 * i + j * j) % 190 for j in range(3 + 5 * i)] for i in range(count)]

    def submit(i: int, output: list[int] | None = None) -> Submit:
        sampling = SamplingParams(
            max_tokens=length, temperature=0.0 if i % 2 else 0.9, top_p=0.9, seed=50 + i, ignore_eos=True
        )
        return Submit(f"r{i}", 0, prompts[i], sampling, output or [])

    def generated(engine: SoloEngine, *submits: Submit) -> dict[str, list[int]]:
        return {name: done.token_ids for name, done in engine.generate(*submits).items()}

    engine = SoloEngine(config, parts=on_device(device, board), warm_up=True)
    alone = {}
    for i in range(len(prompts)):
        alone.update(generated(engine, submit(i)))
    together = generated(engine, *(submit(i) for i in range(len(prompts))))
    assert together == alone, "tokens depend on the batch"
    half = max(1, length // 2)
    moved = generated(engine, *(submit(i, alone[f"r{i}"][:half]) for i in range(len(prompts))))
    assert all(alone[name][half:] == tail for name, tail in moved.items()), "tokens change when a request moves"
    engine.close()
    small = replace_config(config, max_num_batched_tokens=24 if count > 2 else 5, cuda_graph_max_bs=0, max_num_seqs=4)
    other = SoloEngine(small, parts=on_device(device, board))
    cut = generated(other, *(submit(i) for i in range(len(prompts))))
    assert cut == alone, "tokens depend on chunks or graphs"
    other.close()
    print(f"    deterministic: {len(prompts)} requests of {length} tokens alike alone, together, moved, and in chunks")
