"""Stages of `scripts/gpu_check engine` in which ranks on devices fail in every way, under streams that are compared.

Each runs one service with a rank or two a device, strikes a rank in mid-stream, and awaits that every stream ends with
the tokens of the unfailed run and that the rank is back. Figures are printed, goals beside them; what is wrong raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from engine_stages import SERVICE_NEEDS, lacks, small_model

if TYPE_CHECKING:
    from phalanx.cli.bench_return import Return
    from phalanx.cli.bench_round import Load, Round, Target
    from phalanx.testing.service import Service
    from phalanx.testing.streams import Stream

NEEDS = (*SERVICE_NEEDS, "rich")
OWN_LINE = re.compile(r"^\d\d:\d\d:\d\d\.\d{3} ")
"""How every line begins that a process of ours wrote."""

_ACCESS = re.compile(r'"(GET|POST) [^"]*" \d{3}$')
"""How a line ends that says of a request that it was answered."""

KILLED = r"killing rank {} .*: it was evicted and does not end"
FAILURES = {
    "kill": r"rank {} \(pid \d+\) ended: killed by SIGKILL",
    "illegal-access": r"rank {} \(pid \d+\) ended: illegal memory access on the device",
    "device-assert": r"rank {} \(pid \d+\) ended: device-side assert on the device",
    "out-of-memory": r"rank {} \(pid \d+\) ended: out of memory \(.*\) on the device",
    "stop": KILLED,
    "hung-kernel": KILLED,
}
"""What is done to a rank, and what the log must say of it."""

PEER_TIMEOUT_S, ROLL_CALL_S = 0.5, 1.5


class Trial:
    """One service, the streams of its rounds, and what they are without a failure."""

    def __init__(self, service: Service, load: Load) -> None:
        from phalanx.cli.bench_round import Target, unfailed_run
        from phalanx.cli.figures import served_model

        self.service = service
        self.target: Target = Target(service.url, "", service, patience_s=40)
        self.load = load
        self.model = served_model(service.url, "")
        began = time.monotonic()
        self.unfailed: list[Stream] = unfailed_run(self.target, load, self.model)
        print(f"    {load.streams} streams of {load.output_len} tokens unfailed: {time.monotonic() - began:.1f} s")

    def round(self, kind: str, victim: int) -> Round:
        """Strike one rank in mid-stream. Raises when a token differs, a request fails, or something is not logged."""
        from phalanx.cli.bench_round import Blow, one_round

        line = self.service.lines
        incarnation = next(r["incarnation"] for r in self.service.status()["ranks"] if r["rank"] == victim)
        blow = Blow((victim,), self.target.prepare(kind, victim))
        done = asyncio.run(one_round(self.target, self.load, self.model, blow, self.unfailed))
        assert not done.failed, f"{kind}: {done.failed} requests failed: {done.as_json()['errors']}"
        assert not done.different, f"{kind}: {done.different} tokens differ from the unfailed run"
        if pattern := FAILURES.get(kind):
            self.service.wait_for_line(pattern.format(rf"{victim}\.{incarnation}"), 5, after=line)
        return done

    def strange_lines(self, since: int) -> list[str]:
        """Lines of the log from line `since` on that no process of ours wrote: what libraries and drivers say."""
        return [line for line in self.service.whole_log.splitlines()[since:] if not OWN_LINE.match(line)]

    def returns(self, since: int) -> list[str]:
        """What the log says of ranks that were let in."""
        lines = self.service.whole_log.splitlines()[since:]
        return [line for line in lines if " rejoined," in line or " came in " in line]


@contextlib.contextmanager
def trial(model: str, load: Load, **options: object) -> Iterator[Trial]:
    """A service on devices; its log is shown when something goes wrong."""
    from phalanx.testing.service import Service, flags_of

    usual = {
        "device": "cuda", "deterministic": True, "enable_chaos": True, "max_restarts": 100, "warmup_timeout": 60,
        "expert_backup": "dram", "max_model_len": load.output_len + 256, "max_num_seqs": load.streams,
        "cuda_graph_max_bs": load.streams, "num_kv_blocks": load.streams * -(-(load.output_len + 256) // 16) + 64,
    }  # fmt: skip
    began = time.monotonic()
    with Service(model, *flags_of(**{**usual, **options})) as service:
        print(f"    ready after {time.monotonic() - began:.1f} s", flush=True)
        try:
            yield Trial(service, load)
        except BaseException:
            lines = [line for line in service.whole_log.splitlines() if not _ACCESS.search(line)]
            print("\n".join(lines[-60:]), flush=True)
            raise


def streams(count: int, tokens: int, share: float) -> Load:
    """Greedy streams; a rank is struck when this share of all tokens has come."""
    from phalanx.cli.bench_round import Load

    return Load(streams=count, input_len=32, output_len=tokens, temperature=0.0, seed=0, share=share)


def every_failure() -> None:
    """Two ranks on two devices, each with every expert: every failure there is, on either rank in turn."""
    if lacks(NEEDS):
        return
    with small_model() as model, trial(
        model, streams(16, 700, 0.15), ep_size=2, num_redundant_experts=16, peer_timeout=PEER_TIMEOUT_S,
        roll_call_timeout=ROLL_CALL_S,
    ) as on:  # fmt: skip
        print(f"    peer time-out {PEER_TIMEOUT_S} s, roll call {ROLL_CALL_S} s; seconds:")
        print(
            "    failure         next token p50, max   recovery (detect, agree)   full strength   alone: load, warm-up"
        )
        for number, kind in enumerate(FAILURES):
            line = on.service.lines
            done = on.round(kind, number % 2)
            seconds, back = done.recovery["seconds"], done.back[-1]
            print(
                f"    {kind:15} {statistics.median(done.stalls_s):10.3f}, {max(done.stalls_s):.3f}   "
                f"{seconds['total']:9.3f} ({seconds['detect']:.3f}, {seconds['agree']:.3f})   {back.after_s:13.2f}   "
                f"{back.prepared_s.get('load', 0):9.2f}, {back.prepared_s.get('warm_up', 0):.2f}",
                flush=True,
            )
            rejoined = next(text for text in on.returns(line) if " rejoined," in text)
            assert re.search(r"bytes from (vault|peer|disk)", rejoined), f"where did the weights come from? {rejoined}"
            for strange in on.strange_lines(line)[:4]:
                print(f"        not ours: {strange[:150]}", flush=True)
        print(f"    {rejoined[13:]}", flush=True)


def four_ranks_on_two_devices() -> None:
    """Two ranks a device, each with every expert: one killed, and back; every token as unfailed."""
    if lacks(NEEDS):
        return
    with (
        small_model() as model,
        trial(
            model, streams(8, 96, 0.15), ep_size=4, num_redundant_experts=48, peer_timeout=3, roll_call_timeout=8
        ) as on,
    ):
        done = on.round("kill", 2)
        back = done.back[-1]
        print(
            f"    {on.load.streams} streams, rank 2 of 4 killed: next token {max(done.stalls_s):.2f} s at most, "
            f"recovery {done.recovery['seconds']['total']:.3f} s, full strength after {back.after_s:.1f} s",
            flush=True,
        )


RETURN_TOKENS = 3200
"""So many that a round outlasts a return several times over, and that a newcomer lives long enough not to be made to
wait when it is killed in the next round."""

LARGE_RETURN_TOKENS = 1600
"""The same for steps of some 3 ms."""


def returns_under_64_streams() -> None:
    """Four kills of a rank under 64 streams, and four returns: what the healthy rank, and its streams, felt of them."""
    if lacks(NEEDS):
        return
    with small_model() as model, trial(model, streams(64, RETURN_TOKENS, 0.05), ep_size=2, peer_timeout=2) as on:
        _returns(on, 4)


def returns_at_a_known_shape() -> None:
    """The same at Qwen3-30B-A3B's shape with 12 layers and random weights, whose steps are several times as long."""
    if lacks(NEEDS):
        return
    with large_model() as model, trial(
        model, streams(64, LARGE_RETURN_TOKENS, 0.05), ep_size=2, peer_timeout=2, load_format="dummy",
        warmup_timeout=100,
    ) as on:  # fmt: skip
        _returns(on, 2)


@contextlib.contextmanager
def large_model() -> Iterator[str]:
    """Qwen3-30B-A3B's shape with 12 layers, for weights at random."""
    from phalanx.testing.shapes import SHAPES
    from phalanx.testing.tiny import write_random

    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "q30")
        write_random(model, replace(SHAPES["qwen3-30b-a3b"], layers=LAYERS), weights=False)
        yield model


def _returns(on: Trial, times: int) -> None:
    """Kills and returns; prints what the pauses were, against the goal."""
    from phalanx.cli.bench_round import summary

    paused: list[float] = []
    rounds = []
    for _ in range(times):
        line = on.service.lines
        rounds.append(on.round("kill", 1))
        paused.append(_show_return(on, rounds[-1].back[-1], line))
    figures = summary(on.unfailed, rounds)
    kill, back = figures["kill_to_next_token_s"], figures["return"]
    print(f"    kill to next token, ms: p50 {kill['p50'] * 1e3:.0f}, max {kill['max'] * 1e3:.0f}")
    for name, value in back.items():
        if name != "prepared_s" and value["n"]:
            print(f"    {name}: p50 {value['p50']:.4f}, max {value['max']:.4f}")
    steps = statistics.median(paused)
    print(f"    a pause of {steps:.2f} steps in the median; goal 1.5: {_verdict(steps <= 1.5)}", flush=True)
    assert back["gap_around_the_return_s"]["n"], "the streams were over before the rank was back"


def _show_return(on: Trial, back: Return, line: int) -> float:
    """Print what a return cost; the healthy rank's pause in steps as it took them right before, by its own word."""
    last = on.service.status()["last_recovery"]
    assert last["joined"], f"the last change was no return: {last}"
    seconds = last["seconds"]
    phases = ", ".join(f"{name} {seconds[name] * 1e3:.2f}" for name in ("agree", "mask", "replan", "restore", "replay"))
    assert last["pace"], "the healthy rank took too few steps before the return"
    steps = float(seconds["total"]) / float(last["pace"])
    gaps = sorted(back.stalls_s)
    felt = f"{statistics.median(gaps) * 1e3:.1f}, {gaps[-1] * 1e3:.1f} ms" if gaps else "none running"
    came_in = next(text for text in on.returns(line) if " came in " in text)
    print(
        f"    pause {seconds['total'] * 1e3:.2f} ms = {steps:.2f} steps of {last['pace'] * 1e3:.2f} ms ({phases}); "
        f"a token took {back.step_s * 1e3:.2f} ms before the kill; "
        f"streams' gap p50, max {felt}; full strength after {back.after_s:.2f} s\n"
        f"        {came_in[came_in.index('(') :]}",
        flush=True,
    )
    for rank, took in sorted(last["first_step"].items()):
        laps = ", ".join(f"{name} {lap * 1e3:.2f}" for name, lap in took.items())
        print(f"        the first step of rank {rank}, ms: {sum(took.values()) * 1e3:.2f} ({laps})", flush=True)
    return steps


LAYERS, EXPERTS, HIDDEN, WIDTH = 12, 128, 2048, 768


def restore_from_the_vault() -> None:
    """Qwen3-30B-A3B's shape with 12 layers, no expert held twice: a rank dies, the other takes in half of them."""
    if lacks(NEEDS):
        return
    with large_model() as model, trial(
        model, streams(64, 160, 0.3), ep_size=2, load_format="dummy", slots_per_rank=EXPERTS, max_restarts=0,
        warmup_timeout=100,
    ) as on:  # fmt: skip
        for rank in (0, 1):
            on.service.wait_for_line(rf"rank {rank}\.0: .*(experts in the vault are pinned|cannot be pinned)", 60)
        for text in on.service.whole_log.splitlines():
            if "pinned" in text or "vault" in text.lower():
                print(f"    {text[13:160]}", flush=True)
        done = on.round("kill", 1)
    recovery = done.recovery
    seconds, size = recovery["seconds"], sum(recovery["bytes_restored"].values())
    assert size == LAYERS * EXPERTS // 2 * 3 * HIDDEN * WIDTH * 2, recovery["bytes_restored"]
    rate = size / seconds["restore"] / 1e9
    print(
        f"    kill to next token, s: p50 {statistics.median(done.stalls_s):.3f}, max {max(done.stalls_s):.3f}; "
        f"goal 1 s: {_verdict(max(done.stalls_s) <= 1)}\n"
        f"    restored {recovery['bytes_restored']}; phases, s: {seconds}\n"
        f"    {size / 1e9:.2f} GB at {rate:.1f} GB/s, by the ranks' own count in {recovery['seconds_restored']} s",
        flush=True,
    )
    pinned = copy_rates()
    print(f"    restore at {rate / pinned:.0%} of the pinned rate, {pinned:.1f} GB/s: goal 85 % "
          + _verdict(rate >= 0.85 * pinned), flush=True)  # fmt: skip


def copy_rates() -> float:
    """The rate of copies of experts from a memory file, registered as the vault is, GB/s; and what bounds a restore."""
    from cuda.bindings import runtime

    from phalanx.elastic.digests import threads_for
    from phalanx.moe.cuda import DeviceBank
    from phalanx.moe.experts import digest

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    attribute = runtime.cudaDeviceAttr.cudaDevAttrHostRegisterReadOnlySupported
    print(f"    read-only registration supported: {runtime.cudaDeviceGetAttribute(attribute, 0)[1]}")
    bank = DeviceBank(LAYERS, EXPERTS // 2, HIDDEN, WIDTH, torch.bfloat16, device)
    size, count = bank.expert_bytes, 256
    fd = os.memfd_create("copies")
    os.ftruncate(fd, size * count)
    for number in range(count):
        os.pwrite(fd, np.random.default_rng(number).bytes(1 << 16) * (size >> 16), number * size)
    rates: dict[str, float] = {}
    maps = {
        "private": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
        "shared": (mmap.MAP_SHARED, mmap.PROT_READ),
    }
    for name, (flags, access) in maps.items():
        memory = mmap.mmap(fd, size * count, flags=flags, prot=access)
        whole = np.frombuffer(memory, np.uint8)
        parts = [whole[number * size : (number + 1) * size] for number in range(count)]
        before, began = _own_bytes(), time.monotonic()
        pinned = sum(bank.pin(part) for part in parts)
        took = time.monotonic() - began
        rates[name] = _best(bank, parts)
        print(
            f"    {name} mapping: {pinned} of {count} registered in {took * 1e3 / count:.2f} ms each, "
            f"{(_own_bytes() - before) / 1e9:.2f} GB copied for it, then {rates[name]:.1f} GB/s",
            flush=True,
        )
    own = torch.empty(count, size, dtype=torch.uint8, pin_memory=True).fill_(1).numpy()
    rates["cudaHostAlloc"] = _best(bank, list(own))
    line = [f"{rates['cudaHostAlloc']:.1f} GB/s from cudaHostAlloc"]
    for threads in (1, 4, 8, 12, 16):
        with ThreadPoolExecutor(threads) as pool:
            began = time.monotonic()
            list(pool.map(lambda part: digest(part.data), parts))
            line.append(f"digests by {threads}: {count * size / (time.monotonic() - began) / 1e9:.1f}")
    cpus = len(os.sched_getaffinity(0))
    print(f"    {', '.join(line)} GB/s; {cpus} CPUs, a rank of 2 digests with {threads_for(cpus, 2)}", flush=True)
    return rates["shared"]


def _best(bank: Any, parts: list[Any]) -> float:
    """The best of three fillings of all slots, GB/s."""
    best = 0.0
    for _ in range(3):
        began = time.monotonic()
        for number in range(bank.num_layers * bank.slots_per_rank):
            layer, slot = divmod(number, bank.slots_per_rank)
            bank.borrow(layer, slot, slot, 1, parts[number % len(parts)])
        bank.settle()
        rate = bank.num_layers * bank.slots_per_rank * bank.expert_bytes / (time.monotonic() - began) / 1e9
        best = max(best, rate)
    return best


def _own_bytes() -> int:
    """Anonymous memory of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon:"))


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"
