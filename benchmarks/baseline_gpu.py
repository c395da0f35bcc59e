#!/usr/bin/env python3
"""Our decode step beside one made of torch's parts (library_decode.py): the same shape, machine, minute; two devices.

    benchmarks/baseline_gpu.py                  Qwen3-30B-A3B's shape, 48 layers, 1 to 256 sequences a rank; kernels
    benchmarks/baseline_gpu.py --layers 24 --batches 16,64 --no-kernels
    benchmarks/baseline_gpu.py --no-compile     torch's small operations one by one
    benchmarks/baseline_gpu.py --interpret      tiny, on the CPU in Triton's interpreter: whether it runs, no figures

Two ranks of each, in processes of their own, on the same two devices; they take turns of STEPS steps, and while one
works the other has nothing on the devices. Ours is `Engine.step` (header, scheduling, tables, graph, commit); torch's
is a CUDA graph with its tokens copied to the host, without scheduler, header or anybody's requests. Both choose tokens
greedily, at contexts of 128 to 300. A turn of both gives one ratio; its median counts, with an interval that holds
the true one with 95 %. NCCL's processes hold no communicator of ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from decoders import PROMPT, Decoder, Setting, Variant, longest
from engine_ladder import random_weights
from library_decode import Chains, Exchange, LibraryModel
from library_kernels import CONTEXTS, LAYERS, TOKENS, attention, experts
from ranks import Party, RankProcess, Reply, party, watchdog
from ratios import ratio

from phalanx.world import Member, View

SCRIPT = str(Path(__file__).resolve())
BATCHES = (1, 16, 64, 128, 256)
ROUNDS, STEPS = 8, 8
LIMIT_S = 150.0
TINY_TOKENS, TINY_CONTEXTS = (4,), ((2, 20),)

# -- ours --------------------------------------------------------------------------------------------------------------


def make(ranks: RankProcess, **setting: Any) -> Reply:
    """Our engine."""
    torch.set_grad_enabled(False)
    if not setting["tiny"]:
        torch.cuda.set_device(setting["device"])
    ranks.decoder = Decoder.make(Setting(**setting), Variant())  # type: ignore[attr-defined]
    return {"address": ranks.decoder.parts.comm.address}  # type: ignore[attr-defined]


def serve(ranks: RankProcess, epoch: int, members: list[dict[str, Any]]) -> Reply:
    """Adopt a view of all ranks."""
    decoder: Decoder = ranks.decoder  # type: ignore[attr-defined]
    decoder.adopt(View(epoch, decoder.setting.ep_size, tuple(Member(**m) for m in members)))
    return {}


def begin(ranks: RankProcess, batch: int) -> Reply:
    """Prefill a batch."""
    decoder: Decoder = ranks.decoder  # type: ignore[attr-defined]
    return {"seconds": decoder.fill(batch), "context": decoder.context}


def steps(ranks: RankProcess, count: int) -> Reply:
    """Milliseconds a step, after one in which ranks find each other."""
    decoder: Decoder = ranks.decoder  # type: ignore[attr-defined]
    decoder.steps(1)
    return {"ms": 1e3 * decoder.steps(count)}


def end(ranks: RankProcess) -> Reply:
    """No request is left."""
    ranks.decoder.clear()  # type: ignore[attr-defined]
    return {}


# -- torch's -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """What a rank of torch's keeps between commands. graphs: by batch."""

    model: LibraryModel
    chains: Chains
    graphs: dict[int, Replayed]


class Replayed:
    """A captured step of the library's model for one batch; on a CPU it is run as it is."""

    def __init__(self, model: LibraryModel, batch: int, pool: Any) -> None:
        device = model.weights.embed.device
        self._tokens = torch.randint(0, model.config.vocab_size, (batch,), device=device)
        self._positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self._on_device = device.type == "cuda"
        self._host = torch.empty(batch, dtype=torch.int64, pin_memory=self._on_device)

        def step() -> None:
            self._tokens.copy_(model.logits(self._tokens, self._positions).argmax(1))
            self._positions.add_(1)
            self._host.copy_(self._tokens, non_blocking=True)

        self._run: Callable[[], object] = step
        step()  # compiles
        if self._on_device:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
            self._run, self.pool = graph.replay, graph.pool()

    def begin(self, context: int) -> None:
        """The next token of every sequence is one at this position."""
        self._positions.fill_(context)

    def step(self) -> list[int]:
        """The next token of every sequence. COLLECTIVE."""
        self._run()
        if self._on_device:
            torch.cuda.current_stream().synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


def library_make(ranks: RankProcess, init: str, compiled: bool, **setting: Any) -> Reply:
    """The library's model and its graphs; operation by operation where the compiler fails."""
    torch.set_grad_enabled(False)
    began = time.perf_counter()
    alike = Setting(**setting, board="")
    place, config = alike.torch_device, alike.model
    on_device = place.type == "cuda"
    if on_device:
        torch.cuda.set_device(place)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast, which not every host allows
    dist.init_process_group(
        "nccl" if on_device else "gloo", init_method=init, rank=alike.rank, world_size=alike.ep_size,
        device_id=place if on_device else None,
    )  # fmt: skip
    layers, S, D, width = alike.layers, config.num_experts // alike.ep_size, config.hidden, config.expert_width
    w13 = torch.empty(layers, S, 2 * width, D, dtype=torch.bfloat16, device=place)
    w2 = torch.empty(layers, S, D, width, dtype=torch.bfloat16, device=place)
    for part in (w13, w2):
        for layer in part:
            layer.normal_(0, 0.03)
    weights = random_weights(config, place)

    def built(chains: Chains) -> Library:
        model = LibraryModel(
            config, weights, w13, w2, rank=alike.rank, rows=max(alike.batches), places=alike.longest,
            exchange=Exchange(), chains=chains,
        )  # fmt: skip
        graphs: dict[int, Replayed] = {}
        pool: Any = None
        for batch in sorted(alike.batches, reverse=True):
            graphs[batch] = Replayed(model, batch, pool)
            pool = graphs[batch].pool if on_device else None
        return Library(model, chains, graphs)

    how = "small operations compiled" if compiled else "operation by operation"
    try:
        made = built(Chains.compiled() if compiled else Chains.plain())
    except torch._dynamo.exc.TorchDynamoException as error:
        how = f"operation by operation, for the compiler failed: {str(error).strip().splitlines()[0]}"
        made = built(Chains.plain())
    ranks.library = made  # type: ignore[attr-defined]
    return {
        "seconds": time.perf_counter() - began, "how": how, "attention": made.model.attention.__name__,
        "gb": torch.cuda.memory_allocated() / 1e9 if on_device else 0.0,
    }  # fmt: skip


def library_begin(ranks: RankProcess, batch: int, context: int) -> Reply:
    """Go on from contexts of this length."""
    ranks.library.graphs[batch].begin(context)  # type: ignore[attr-defined]
    return {}


def library_steps(ranks: RankProcess, batch: int, count: int) -> Reply:
    """Milliseconds a step, after one in which ranks find each other."""
    graph: Replayed = ranks.library.graphs[batch]  # type: ignore[attr-defined]
    graph.step()
    began = time.perf_counter()
    for _ in range(count):
        graph.step()
    return {"ms": 1e3 * (time.perf_counter() - began) / count}


def library_kernels(ranks: RankProcess, ep_size: int) -> Reply:
    """Lines of the table of kernels; on one rank. LOCAL."""
    library: Library = ranks.library  # type: ignore[attr-defined]
    place, tiny = library.model.weights.embed.device, library.model.weights.embed.device.type == "cpu"
    config = replace(library.model.config, num_layers=LAYERS)
    rows = [
        *experts(config, ep_size, library.chains, place, TINY_TOKENS if tiny else TOKENS),
        *attention(config, library.chains, place, TINY_CONTEXTS if tiny else CONTEXTS),
    ]
    return {"rows": [str(row) for row in rows]}


COMMANDS = {
    "make": make, "serve": serve, "begin": begin, "steps": steps, "end": end, "library_make": library_make,
    "library_begin": library_begin, "library_steps": library_steps, "library_kernels": library_kernels,
}  # fmt: skip

# -- both --------------------------------------------------------------------------------------------------------------


def started(ours: Party, theirs: Party, init: str, alike: dict[str, Any], compiled: bool) -> None:
    """Everything made, all at once."""
    for m in ours.ranks.values():
        m.send("make", rank=m.rank, ep_size=2, device=m.device, board=ours.board.address, **alike)
    for m in theirs.ranks.values():
        m.send("library_make", rank=m.rank, ep_size=2, device=m.device, init=init, compiled=compiled, **alike)
    for m in ours.ranks.values():
        m.address = m.reply()["address"]
    ours.all("serve", epoch=1, members=[m.member() for m in ours.ranks.values()])
    said = {rank: m.reply() for rank, m in theirs.ranks.items()}[0]
    print(
        f"torch's step: {said['how']}; attention: {said['attention']}; made in {said['seconds']:.1f} s, "
        f"{said['gb']:.1f} GB",
        flush=True,
    )


def race(ours: Party, theirs: Party, batch: int, rounds: int, count: int) -> str:
    """A line of the table."""
    began = ours.all("begin", batch=batch)[0]
    theirs.all("library_begin", batch=batch, context=round(began["context"]))
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for turn in range(rounds + 1):
        for name in ("ours", "torch") if turn % 2 else ("torch", "ours"):
            if name == "ours":
                answers = ours.all("steps", count=count)
            else:
                answers = theirs.all("library_steps", batch=batch, count=count)
            times[name].append(max(a["ms"] for a in answers.values()))
    ours.all("end")
    mine, its = times["ours"][1:], times["torch"][1:]
    found = ratio(mine, its)
    return (
        f"{batch:4d} sequences a rank: ours {statistics.median(mine):6.2f} ms, torch {statistics.median(its):6.2f} ms, "
        f"ratio {found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode steps: ours and one made of torch's parts, in turns.")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batches", help="sequences a rank", default=",".join(map(str, BATCHES)))
    parser.add_argument("--no-compile", action="store_true", help="torch's small operations one by one")
    parser.add_argument("--no-kernels", action="store_true", help="decode steps alone")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU: whether it runs")
    options = parser.parse_args()
    tiny = options.interpret
    if not tiny and torch.cuda.device_count() < 2:
        print("baseline_gpu: skipped, it needs two CUDA devices")
        return 0
    watchdog(6 * LIMIT_S if tiny else LIMIT_S)
    rounds, count = (1, 1) if tiny else (ROUNDS, STEPS)
    batches = tuple(int(batch) for batch in options.batches.split(","))
    prompt = 6 if tiny else PROMPT
    most = longest(batches, prompt, (rounds + 2) * (count + 1), tiny=tiny)
    alike = {"layers": options.layers, "batches": batches, "prompt": prompt, "longest": most, "tiny": tiny}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder, party(SCRIPT, 2, 2) as ours, party(SCRIPT, 2, 2) as theirs:
        started(ours, theirs, f"file://{folder}/store", alike, not options.no_compile)
        for batch in batches:
            lines.append(race(ours, theirs, batch, rounds, count))
            print(lines[-1], flush=True)
        if not options.no_kernels:
            lines += theirs.all("library_kernels", only=[0], ep_size=2)[0]["rows"]
    device = "CPU" if tiny else torch.cuda.get_device_properties(0).name
    print(
        f"2 x {device}, torch {torch.__version__}; Qwen3-30B-A3B's shape, {options.layers} layers; medians of {rounds} "
        f"turns of {count} steps, the slower rank; ratios with 95 %; kernels: us a layer, one device"
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank-process"]:
        RankProcess(COMMANDS).run()
    else:
        sys.exit(main())
