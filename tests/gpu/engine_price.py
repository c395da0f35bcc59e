"""What elasticity and exactness cost a decode step: engines that differ in that alone, step by step in turns.

All engines stand in the same rank processes, on the same weights and the same prompts. They take turns of a few steps,
in an order that changes, so that whatever else a machine does falls on all of them alike; a turn of all gives one ratio
a pair. Medians of ratios count, with an interval that holds the true median with 95 %.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decoders import PROMPT, Decoder, Setting, Variant, longest
from ranks import Party, RankProcess, Reply, party
from ratios import Median, ratio

from phalanx.world import Member, View

BATCHES = (1, 16, 64, 256)
VARIANTS = {
    "on": Variant(),
    "unguarded": Variant(guard=False),
    "off": Variant(guard=False, header=False),
    "exact": Variant(mode="exact"),
    "deterministic": Variant(deterministic=True),
}
"""on: what serves without `--deterministic`. off: no masks, time-outs, notices and header. exact: only combine."""

PAIRS = {
    "elasticity": ("on", "off"),
    "masks, time-outs": ("on", "unguarded"),
    "header": ("unguarded", "off"),
    "combine exact": ("exact", "on"),
    "--deterministic": ("deterministic", "on"),
}
BAR = 1.01

Rows = list[tuple[int, dict[str, list[float]]]]
"""Batch, and the milliseconds of each engine."""


def make(ranks: RankProcess, **setting: Any) -> Reply:
    """Every engine of this rank."""
    began = time.perf_counter()
    torch.set_grad_enabled(False)
    alike = Setting(**setting)
    if not alike.tiny:
        torch.cuda.set_device(alike.torch_device)
    made: dict[str, Decoder] = {}
    for name, variant in VARIANTS.items():
        made[name] = Decoder.make(alike, variant, made.get("on"))
    ranks.decoders = made  # type: ignore[attr-defined]
    ranks.comm = made["on"].parts.comm
    return {
        "addresses": {name: decoder.parts.comm.address for name, decoder in made.items()},
        "seconds": time.perf_counter() - began,
        "memory_gb": 0.0 if alike.tiny else torch.cuda.memory_allocated() / 1e9,
    }


def serve(ranks: RankProcess, epoch: int, members: dict[str, list[dict[str, Any]]]) -> Reply:
    """All engines adopt a view of all ranks; the unguarded ones warm up, together with their peers."""
    for name, decoder in ranks.decoders.items():  # type: ignore[attr-defined]
        decoder.adopt(View(epoch, decoder.setting.ep_size, tuple(Member(**m) for m in members[name])))
    return {}


def race(ranks: RankProcess, batch: int, rounds: int, steps: int) -> Reply:
    """Milliseconds a step of each engine in each round. COLLECTIVE."""
    decoders: dict[str, Decoder] = ranks.decoders  # type: ignore[attr-defined]
    filled = sum(decoder.fill(batch) for decoder in decoders.values())
    times: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    for turn in range(rounds + 1):
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn % 2 else reversed(order):
            times[name].append(1e3 * decoders[name].steps(steps))
    for decoder in decoders.values():
        decoder.clear()
    return {"ms": {name: values[1:] for name, values in times.items()}, "fill_s": filled}


COMMANDS = {"make": make, "serve": serve, "race": race}


def price(
    devices: int, *, layers: int, batches: tuple[int, ...] = BATCHES, rounds: int = 30, steps: int = 4,
    tiny: bool = False,
) -> None:  # fmt: skip
    """Build, measure batch by batch, and print the table last. tiny: in Triton's interpreter, to check this code."""
    ep_size = 2 if devices > 1 or tiny else 1
    prompt = 6 if tiny else PROMPT
    most = longest(batches, prompt, (rounds + 1) * steps, tiny=tiny)
    with party(str(Path(__file__).resolve()), ep_size, devices) as p:
        _open(p, layers=layers, batches=batches, prompt=prompt, longest=most, tiny=tiny)
        rows: Rows = []
        try:
            for batch in batches:
                rows.append((batch, _race(p, batch, rounds, steps)))
        finally:
            print(f"    {layers} layers, {ep_size} ranks, {rounds} rounds of {steps} steps; ratios, medians (95 %)")
            _table(rows)


def _race(p: Party, batch: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds a step of each engine in each round, of all ranks the slowest."""
    began = time.perf_counter()
    answers = list(p.all("race", batch=batch, rounds=rounds, steps=steps).values())
    slower = {name: [max(each) for each in zip(*(a["ms"][name] for a in answers), strict=True)] for name in VARIANTS}
    figures = ", ".join(f"{name} {statistics.median(ms):.2f}" for name, ms in slower.items())
    print(
        f"    batch {batch:3d} a rank, ms a step: {figures} (prefills {answers[0]['fill_s']:.1f} s, all "
        f"{time.perf_counter() - began:.1f} s)",
        flush=True,
    )
    return slower


def _table(rows: Rows) -> None:
    for what, (over, under) in PAIRS.items():
        for batch, ms in rows:
            found = ratio(ms[over], ms[under])
            verdict = f", at most {100 * (BAR - 1):.0f} %: {_verdict(found)}" if what == "elasticity" else ""
            print(f"    {what:17s} batch {batch:3d}: {found.percent()}{verdict}", flush=True)


def _verdict(found: Median) -> str:
    if found.high <= BAR:
        return "met"
    return "missed" if found.low > BAR else "met, not for sure" if found.value <= BAR else "missed, not for sure"


def _open(p: Party, **setting: Any) -> None:
    for m in p.ranks.values():
        m.send("make", rank=m.rank, ep_size=p.ep_size, device=m.device, board=p.board.address, **setting)
    answers = {m.rank: m.reply() for m in p.ranks.values()}
    print(
        f"    Qwen3-30B-A3B shape, {setting['layers']} layers, {p.ep_size} ranks, {len(VARIANTS)} engines a rank, one "
        f"set of weights: {answers[0]['memory_gb']:.1f} GB a rank, made in {answers[0]['seconds']:.1f} s",
        flush=True,
    )
    p.epoch += 1
    began = time.perf_counter()
    members = {
        name: [{**m.member(), "comm_address": answers[m.rank]["addresses"][name]} for m in p.ranks.values()]
        for name in VARIANTS
    }
    p.all("serve", epoch=p.epoch, members=members)
    print(f"    met, unguarded engines warmed up: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    RankProcess(COMMANDS).run()
