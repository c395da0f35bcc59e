#!/usr/bin/env python3
"""The attention of decodes alone, cut in many ways: the shape of Qwen3-30B-A3B, one device, about 40 s.

    benchmarks/attention_gpu.py                                    every variant at every shape
    benchmarks/attention_gpu.py --variants apart,4x4@2 --shapes 64x160

A graph has all layers' attention, each with keys of its own, and before each what comes before it in a step: 128 MB
are read, so that no cache holds keys, tables or code, and the product of q, k and v is written. Figures: microseconds a
layer, the median of such replays less that of a graph without attention, in turn with all variants. `apart`: what
--deterministic takes, placing and attention in kernels of their own, and one that merges splits where contexts may be
longer than 512. WxS@P: W warps a program, S stages, P programs a multiprocessor; then perhaps sN: splits of N keys. A
shape is ROWSxCONTEXT, and /LONGEST where tables have room for contexts that are not 512 long at most.

Checked first, each variant in a process of its own, which also compiles it: the same rows and the same placed keys as
`apart`, at every shape and with lengths of all kinds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))

import numpy as np
import torch
from engine_ladder import qwen3_30b_a3b
from torch import Tensor

from phalanx.model import device_tables
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.cuda import DeviceBatch, DeviceKV, DeviceModel, table_shape
from phalanx.model.decode_options import DecodeCut, DecodeOptions
from phalanx.model.layers import DenseWeights, LayerWeights
from phalanx.moe.cuda import Tiling

BLOCK = 16
FLUSH_BYTES = 128 << 20
BANDWIDTH = 4.08e12
SEQUENCES = 256
ROUNDS, REPLAYS = 3, 6


@dataclass(frozen=True)
class Shape:
    """rows sequences of `context` tokens each, or of all lengths up to it; longest: what tables have room for."""

    rows: int
    context: int
    longest: int = 512
    mixed: bool = False

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.rows}x{self.context}" + (f"/{self.longest}" if self.longest != 512 else "")

    def contexts(self) -> list[int]:
        """Positions of the rows' new tokens."""
        if not self.mixed:
            return [self.context] * self.rows
        return np.random.default_rng(self.rows).integers(0, self.context + 1, self.rows).tolist()


SHAPES = (
    "16x160", "64x160", "256x160", "128x160", "64x500", "256x500", "16x160/4096", "64x160/4096", "16x2048/4096",
    "64x2048/4096", "1x160",
)  # fmt: skip
CHECKED = (
    Shape(256, 160), Shape(16, 160), Shape(37, 500, mixed=True), Shape(64, 500),
    Shape(21, 3000, 4096, mixed=True), Shape(16, 2048, 4096),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """cut: None: apart. split: instead of the tables' own."""

    cut: DecodeCut | None
    split: int = 512


def _parsed(name: str) -> Variant:
    """See the module's docstring. Raises ArgumentTypeError."""
    if name == "apart":
        return Variant(None)
    cut = re.fullmatch(r"(1|2|4|8|16)x([1-9])@(\d+)(?:s(128|256|512))?", name)
    if not cut:
        raise argparse.ArgumentTypeError(f"{name!r} is no variant: such are {', '.join(VARIANTS)}")
    warps, stages, programs, split = cut.groups()
    return Variant(DecodeCut(int(warps), int(stages), int(programs)), int(split or 512))


def _shape(name: str) -> Shape:
    """See the module's docstring. Raises ArgumentTypeError."""
    sizes = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?", name)
    if not sizes:
        raise argparse.ArgumentTypeError(f"{name!r} is no shape: such are {', '.join(SHAPES)}")
    rows, context, longest = (int(n) for n in sizes.groups("512"))
    if not 0 < rows <= SEQUENCES or context >= longest:
        raise argparse.ArgumentTypeError(
            f"{name!r}: 1 to {SEQUENCES} rows, and contexts below {longest}, or below what is given as /LONGEST"
        )
    return Shape(rows, context, longest)


def _variants(given: str) -> list[str]:
    """Names of variants that can be."""
    for name in given.split(","):
        _parsed(name)
    return given.split(",")


def _shapes(given: str) -> list[Shape]:
    """Shapes by their names."""
    return [_shape(name) for name in given.split(",")]


VARIANTS = ("apart", "1x4@8", "1x3@12", "2x4@4", "4x4@2", "4x3@3", "8x3@1", "1x4@8s128", "4x4@2s128")


class Rig:
    """Keys of all layers, and attention over them."""

    def __init__(self, layers: int, blocks: int) -> None:
        self.device = torch.device("cuda", 0)
        self.config = qwen3_30b_a3b(layers)
        self.kv = DeviceKV(self.config, blocks, BLOCK, torch.bfloat16, self.device)
        for layer in self.kv.data:
            layer.normal_()
        nothing = torch.empty(0, dtype=torch.bfloat16, device=self.device)

        def norm() -> Tensor:
            return torch.rand(self.config.head_dim, device=self.device).add_(0.5).to(torch.bfloat16)

        self.weights = DenseWeights(
            nothing,
            tuple(
                LayerWeights(nothing, nothing, None, norm(), norm(), nothing, None, nothing, None, None, None)
                for _ in range(layers)
            ),
            nothing,
            nothing,
        )
        self.qkv_width = (self.config.num_heads + 2 * self.config.num_kv_heads) * self.config.head_dim
        self.flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)

    def model(self, shape: Shape, variant: Variant) -> tuple[DeviceModel, DeviceBatch]:
        """The model with this cut, and a batch of the shape."""
        made = table_shape(
            self.config, rows=512, sequences=SEQUENCES, max_model_len=shape.longest, block_size=BLOCK,
            num_blocks=self.kv.num_blocks, exact=False, device=self.device,
        )  # fmt: skip
        made = replace(made, split=variant.split)
        options = DecodeOptions(placed=SEQUENCES if variant.cut else 0, cut=variant.cut)
        decoder = DeviceModel(
            self.config, self.weights, cast(Any, None), self.kv, made, exact=False, options=options
        )  # fmt: skip
        slices, contexts, taken = [], shape.contexts(), 0
        order = np.random.default_rng(1).permutation(self.kv.num_blocks).astype(np.int32)
        for i, context in enumerate(contexts):
            count = context // BLOCK + 1
            slices.append(SequenceSlice(i, 1, context, order[taken : taken + count]))
            taken += count
        words = np.zeros(made.size, np.int32)
        forward = ForwardBatch(torch.zeros(len(contexts), dtype=torch.int64), torch.tensor(contexts), tuple(slices))
        padded = shape.rows + (3 if shape.mixed else 0)
        device_tables.write(words, made, forward, padded)
        batch = DeviceBatch.of(torch.from_numpy(words).to(self.device), made, padded, False, Tiling())
        return decoder, batch

    def qkv(self, rows: int) -> Tensor:
        """Random, the same for the same number of rows."""
        g = torch.Generator(self.device).manual_seed(rows)
        return torch.randn(rows, self.qkv_width, generator=g, device=self.device).to(torch.bfloat16)


def check(name: str) -> float:
    """How far a variant's rows, and the keys that it places, are from those of placing and attending apart."""
    variant, rig, worst = _parsed(name), Rig(1, 3200), 0.0
    for shape in CHECKED:
        decoder, batch = rig.model(shape, variant)
        plain, plain_batch = rig.model(shape, Variant(None))
        qkv_TX, clean = rig.qkv(batch.rows), rig.kv.data.clone()
        want = plain.attend(0, qkv_TX.clone(), plain_batch)[: shape.rows]
        placed = rig.kv.data[:, :-1].clone()
        for _ in range(2):  # the second time finds what the first one left
            rig.kv.data.copy_(clean)
            poison = torch.full_like(want, float("nan"))
            del poison
            got = decoder.attend(0, qkv_TX.clone(), batch)[: shape.rows]
            torch.cuda.synchronize()
            error = float((got.float() - want.float()).norm() / want.float().norm())
            off = float((rig.kv.data[:, :-1].float() - placed.float()).abs().max())
            assert error < 1e-2, f"{name} at {shape}: relative error {error:.1e}"
            assert off < 0.1, f"{name} at {shape}: placed keys are off by {off:.1e}"
            worst = max(worst, error)
        rig.kv.data.copy_(clean)
    return worst


def _captured(do: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of it; run once before, so that nothing is compiled meanwhile."""
    do()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        do()
    return graph


def measure(rig: Rig, shape: Shape, variants: list[str]) -> dict[str, float]:
    """Microseconds a layer."""
    layers = rig.config.num_layers
    source, qkv_TX = rig.qkv(shape.rows), rig.qkv(shape.rows)
    parts = {name: rig.model(shape, _parsed(name)) for name in variants}

    def run(name: str) -> None:
        for layer in range(layers):
            rig.flush.sum()
            qkv_TX.copy_(source)
            if name:
                decoder, batch = parts[name]
                decoder.attend(layer, qkv_TX, batch)

    graphs = {name: _captured(partial(run, name)) for name in ["", *variants]}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
            for event in events:
                event.record()
                graph.replay()
            torch.cuda.synchronize()
            samples[name] += [a.elapsed_time(b) for a, b in pairwise(events[1:])]
    alone = statistics.median(samples.pop(""))
    return {name: (statistics.median(times) - alone) / layers * 1e3 for name, times in samples.items()}


def _checked(names: list[str]) -> list[str]:
    """Those that are right; says what the others are. All compile at the same time."""
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--check"]
    running = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in names
    }
    right = []
    for name, process in running.items():
        said, _ = process.communicate(timeout=120)
        lines = said.strip().splitlines() or ["nothing was said"]
        print(f"  [{time.monotonic() - began:.0f} s] {name}: {lines[-1]}", flush=True)
        if process.returncode == 0:
            right.append(name)
        else:
            print("\n".join(lines[-12:]), flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--variants", type=_variants, default=",".join(VARIANTS))
    parser.add_argument("--shapes", type=_shapes, default=",".join(SHAPES))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--check", type=_variants, help="check this variant only, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_gpu: this machine has no CUDA device")
        return 0
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if options.check:
        print(f"relative error at most {check(options.check[0]):.1e}")
        return 0
    began = time.monotonic()
    names, shapes = options.variants, options.shapes
    right = _checked(names)
    blocks = max(s.rows * (s.context // BLOCK + 1) for s in shapes)
    rig = Rig(options.layers, blocks)
    print(f"  [{time.monotonic() - began:.0f} s] us a layer (*: the shortest)", flush=True)
    print(" " * 14 + "   bytes" + "".join(f"{name:>11s}" for name in right), flush=True)
    for shape in shapes:
        told = measure(rig, shape, right)
        bytes_us = shape.rows * (shape.context + 1) * 2 * rig.config.num_kv_heads * rig.config.head_dim * 2 / BANDWIDTH
        best = min(told.values())
        cells = "".join(f"{us:10.2f}{'*' if us == best else ' '}" for us in told.values())
        print(f"  {shape.name:12s}{bytes_us * 1e6:8.2f}{cells}   [{time.monotonic() - began:.0f} s]", flush=True)
    if len(right) < len(names):
        print(f"WRONG: {', '.join(n for n in names if n not in right)}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
