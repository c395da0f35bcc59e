"""The checks of the CUDA communicator that scripts/gpu_check runs: what a launcher does, seen from its side.

Ranks share the devices when there are more ranks than devices: such runs show correctness, not speed. The ranks' side
is in `comm_commands`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comm_commands import LAYERS, WAYS
from ranks import Party, Rank, Reply, kill, party
from stage_runs import Stage

COMMANDS = str(Path(__file__).resolve().with_name("comm_commands.py"))
SMALL = {"max_tokens": 32, "hidden": 512, "top_k": 4, "slots_per_rank": 12}
LARGE = {"max_tokens": 128, "hidden": 7168, "top_k": 8, "slots_per_rank": 144}
LIMIT_S = 120.0


def devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def expect(answer: Reply, **wanted: object) -> None:
    """These fields of an answer, all at once."""
    got = {name: answer[name] for name in wanted}
    assert got == wanted, f"{got}, not {wanted}, in {answer}"


def opened(p: Party, **config: object) -> None:
    """Communicators in all places, and a first view of them."""
    began = time.monotonic()
    p.open(list(p.ranks.values()), **config)
    p.adopt(list(p.ranks.values()))
    print(f"    {p.ep_size} ranks met after {time.monotonic() - began:.1f} s", flush=True)


def grid(p: Party, counts: list[list[int]], seed: int = 1) -> None:
    """Exchanges with these tokens a rank, then with each rank in turn masked by the others, then all again."""
    everyone = list(range(p.ep_size))
    for i, tokens in enumerate(counts):
        p.all("exchange", seed=seed + i, tokens=tokens, alive=everyone)
    for masked in everyone if p.ep_size <= 2 else (0, p.ep_size - 1):
        others = [r for r in everyone if r != masked]
        p.all("mask", only=others, rank=masked, alive=False)
        for i, tokens in enumerate(counts[:3]):
            p.all("exchange", only=others, seed=seed + 50 + i, tokens=tokens, alive=others)
        answers = p.all("status", only=others)
        assert all(a["lost"] == [masked] and a["causes"] == {str(masked): "operator"} for a in answers.values()), (
            answers
        )
        p.adopt(list(p.ranks.values()))  # sequence numbers start again together
    p.all("exchange", seed=seed + 99, tokens=counts[0], alive=everyone)
    answers = p.all("status")
    for a in answers.values():
        expect(a, lost=[], interrupted=0)
    rows = p.all("gather", row=[7, -5])
    assert all(a["rows"] == [[7, -5]] * p.ep_size for a in rows.values()), rows


def token_counts(ranks: int, most: int) -> list[list[int]]:
    """None, all, one, and mixtures."""
    g = np.random.default_rng(ranks)
    return [
        [most] * ranks, [0] * ranks, [1] * ranks, [most if r == 0 else 0 for r in range(ranks)],
        [0 if r == 0 else 3 for r in range(ranks)], *(g.integers(0, most + 1, ranks).tolist() for _ in range(4)),
    ]  # fmt: skip


def check_exchange(ranks: int, config: dict[str, int], **options: object) -> None:
    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **config, peer_timeout_s=30.0, **options)
        grid(p, token_counts(ranks, config["max_tokens"]))
        if options.get("mode") != "fast" and not options.get("fp8") and not options.get("interpret"):
            p.all("same_bits", seed=3, tokens=config["max_tokens"], trials=4)


def check_half(
    ranks: int, config: dict[str, int], normed: bool = False, in_place: bool = False, **options: Any
) -> None:
    """A rank dies between a dispatch and its combine: the others' combine ends, with all that they made themselves."""
    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **config, peer_timeout_s=30.0, **options)
        last, everyone = ranks - 1, list(p.ranks.values())
        for m in everyone:
            alive = list(range(last))
            m.send(
                "half_exchange", seed=7, tokens=config["max_tokens"], alive=alive, combines=m.rank != last,
                normed=normed, in_place=in_place,
            )  # fmt: skip
        expect(p.ranks[last].reply(), lost=[])
        kill(p.ranks[last])
        for m in everyone[:last]:
            expect(m.reply(), lost=[last], causes={str(last): "notice"})


def after_start(p: Party, victim: int, act: Callable[[Rank], Any]) -> tuple[Any, dict[int, Reply]]:
    """All serve; once they run, `act` happens to the victim. Returns when, and what the survivors say."""
    everyone = list(p.ranks)
    for m in p.ranks.values():
        m.send("serve", steps=1_000_000, alive=everyone, announce=20)
    for m in p.ranks.values():
        assert m.reply() == {"running": True}
    at = act(p.ranks[victim])
    return at, {r: m.reply() for r, m in p.ranks.items() if r != victim}


def goes_on(p: Party, survivors: list[Rank], steps: int) -> None:
    """A view of the survivors, and the same graphs with it: right results, clean status."""
    p.adopt(survivors)
    answers = p.all("serve", steps=steps, alive=[m.rank for m in survivors])
    for a in answers.values():
        expect(a, steps=steps, wrong=0, lost=[])


def rejoins(p: Party, place: int, config: dict[str, object], steps: int) -> None:
    """A new incarnation captures alone and is let in: the survivors' graphs go on with a new pointer in the table."""
    newcomer = p.spawn(place, 1)
    try:
        p.open([newcomer], **config)
        newcomer.send("capture", seed=5, tokens=16)
        newcomer.reply()
        coming = sorted([*p.ranks.values(), newcomer], key=lambda m: m.rank)
        mapped = p.all("expect", epoch=p.epoch + 1, members=[m.member() for m in coming], steps=20)
        survivors = list(p.ranks)
        took = p.adopt(coming)
        print(
            f"    a newcomer mapped in {max(a['seconds'] for a in mapped.values()) * 1e3:.2f} ms, in which the longest "
            f"step took {max(a['worst_step_s'] for a in mapped.values()) * 1e3:.2f} ms; adopted in "
            f"{max(took[r] for r in survivors) * 1e3:.2f} ms"
        )
    except BaseException:
        newcomer.end()
        raise
    answers = p.all("serve", steps=steps, alive=list(range(p.ep_size)))
    for a in answers.values():
        expect(a, steps=steps, wrong=0, lost=[])
    step_us = {r: round(a["step_us"]) for r, a in answers.items()}
    print(f"    rejoined; {steps} steps of {LAYERS} layers, median {step_us} us a step")


def check_kill(ranks: int, steps: int) -> None:
    """SIGKILL of a peer within a replay; the launcher's notice ends the wait; rejoin by a table write."""
    config = {**SMALL, "peer_timeout_s": 20.0}
    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **config)
        p.all("capture", seed=5, tokens=16)
        victim = ranks - 1
        dead = p.ranks[victim]
        at, answers = after_start(p, victim, kill)
        for a in answers.values():
            expect(a, lost=[victim], causes={str(victim): "notice"}, wrong=0)
        hung_up, reaped = (at.hung_up_ns - at.killed_ns) / 1e6, (at.reaped_ns - at.killed_ns) / 1e6
        ms = max(a["ended_ns"] - at.killed_ns for a in answers.values()) / 1e6
        print(f"    SIGKILL: pipe hung up after {hung_up:.1f} ms (noticed), process reaped after {reaped:.1f} ms,")
        print(f"    survivors' kernels ended after {ms:.1f} ms")
        survivors = [m for r, m in p.ranks.items() if r != victim]
        goes_on(p, survivors, steps)
        dead.end()
        rejoins(p, victim, config, steps)


def sending(number: signal.Signals) -> Callable[[Rank], int]:
    """What sends this signal to a victim and returns when."""

    def act(victim: Rank) -> int:
        at = time.monotonic_ns()
        victim.signal(number)
        return at

    return act


def check_kill_unseen(ranks: int) -> None:
    """SIGKILL and no notice: the time-out masks the peer."""
    timeout_s = 0.5 if ranks <= 2 else 4.0

    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **SMALL, peer_timeout_s=timeout_s)
        p.all("capture", seed=5, tokens=16)
        dead = p.ranks[0]
        at, answers = after_start(p, 0, sending(signal.SIGKILL))
        for a in answers.values():
            expect(a, wrong=0)
            assert a["causes"].get("0") == "timeout", a
        ms = max(a["ended_ns"] - at for a in answers.values()) / 1e6
        print(f"    SIGKILL without a notice, time-out {timeout_s} s: kernels ended {ms:.1f} ms after the kill")
        goes_on(p, [m for r, m in p.ranks.items() if r != 0], 20)
        dead.end()


def check_stop(ranks: int) -> None:
    """SIGSTOP longer than the time-out; the others go on; the zombie wakes, harms nothing, learns that it is out."""
    timeout_s = 0.5 if ranks <= 2 else 4.0

    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **SMALL, peer_timeout_s=timeout_s)
        p.all("capture", seed=5, tokens=16)
        victim = ranks - 1
        zombie = p.ranks[victim]
        try:
            at, answers = after_start(p, victim, sending(signal.SIGSTOP))
            for a in answers.values():
                expect(a, lost=[victim], causes={str(victim): "timeout"}, wrong=0)
            ms = max(a["ended_ns"] - at for a in answers.values()) / 1e6
            survivors = [m for r, m in p.ranks.items() if r != victim]
            p.adopt(survivors)
            woken = time.monotonic_ns()
            zombie.signal(signal.SIGCONT)
            steps = 400 if ranks <= 2 else 20
            answers = p.all("serve", steps=steps, alive=[m.rank for m in survivors])
            for a in answers.values():
                expect(a, steps=steps, wrong=0, lost=[])
            said = zombie.reply()
            assert said["lost"] or said["interrupted"], said
            out_ms = (said["ended_ns"] - woken) / 1e6
            print(f"    SIGSTOP, time-out {timeout_s} s: survivors' kernels ended after {ms:.1f} ms; woken, the zombie")
            print(f"    knew after {out_ms:.1f} ms that it is out (lost {said['lost']}, {said['causes']})")
        finally:
            zombie.end()


def check_waits(ranks: int) -> None:
    """An operator's mask, our own roll call and a peer's end a kernel that is spinning; a ring ends a sleep."""
    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **SMALL, peer_timeout_s=30.0)
        masked = p.all("wait_for_peers", only=[0], act="mask", rank=1, epoch=0)[0]
        expect(masked, lost=[1], causes={"1": "operator"})
        assert masked["seconds"] < 5, masked
        p.adopt(list(p.ranks.values()))
        own = p.all("wait_for_peers", only=[0], act="interrupt", rank=1, epoch=p.epoch + 1)[0]
        expect(own, interrupted=p.epoch + 1, lost=[])
        assert own["seconds"] < 5, own
        p.adopt(list(p.ranks.values()))
        p.ranks[0].send("wait_for_peers", act="nothing", rank=1, epoch=0)
        said = p.all("interrupt", only=[1], epoch=p.epoch + 1)[1]["said_ns"]
        heard = p.ranks[0].reply()
        expect(heard, interrupted=p.epoch + 1, lost=[])
        ms = (heard["ended_ns"] - said) / 1e6
        p.adopt(list(p.ranks.values()))
        p.ranks[0].send("sleep", seconds=60)
        p.ranks[0].reply()
        p.all("ring", only=[1])
        assert p.ranks[0].reply()["woken"]
        rows = p.all("gather", row=[1])
        assert all(a["rows"] == [[1]] * ranks for a in rows.values()), rows
        print(f"    notices: {'copied by a thread' if p.relayed else 'read from the board'}; buffer {p.nbytes} bytes")
        print(f"    a mask ended the wait after {masked['seconds'] * 1e3:.2f} ms, an own roll call after")
        print(f"    {own['seconds'] * 1e3:.2f} ms, a peer's (from its call to our host) after {ms:.2f} ms")


def check_meet(**options: Any) -> None:
    """Hosts meet while a kernel of one waits for its peers; they hear of a death, which then ends that kernel, too."""
    early = not options.get("interpret")
    with party(COMMANDS, 2, devices()) as p:
        opened(p, **SMALL, peer_timeout_s=30.0, **options)
        times = 200
        for m in p.ranks.values():
            m.send("meet", rows=[[m.rank, i] for i in range(times)], early=early and m.rank == 0)
        for answer in [m.reply() for m in p.ranks.values()]:
            expect(answer, lost=[], lost_by_host=[], gathered=[[0, times - 1], [1, times - 1]])
            assert answer["rows"] == [[[0, i], [1, i]] for i in range(times)], answer["rows"][:3]
        took = answer["seconds"] / times
        p.ranks[0].send("meet", rows=[[5]], early=early)
        kill(p.ranks[1])
        dead = p.ranks[0].reply()
        why = {"1": "notice"}
        expect(dead, lost=[1], lost_by_host=[1], causes_by_host=why, causes=why, last=[[5], [0]])
        assert dead["seconds"] < 5, dead
        print(f"    {took * 1e6:.0f} us a meeting; a death was known after {dead['detect_s']['1'] * 1e3:.1f} ms")
    if not early:
        return
    with party(COMMANDS, 2, devices()) as p:
        opened(p, **SMALL, peer_timeout_s=30.0, **options)
        p.ranks[0].send("watch")
        p.ranks[1].signal(signal.SIGKILL)  # nobody announces it
        ended = p.ranks[0].reply()
        expect(ended, lost=[1], causes=why)
        assert ended["seconds"] < 5, ended
        print(
            f"    a kernel that waited for a peer which was killed unseen ended after {ended['seconds'] * 1e3:.1f} ms"
        )


def check_edges(**options: Any) -> None:
    """A member that died before it was adopted is masked; who is not in the view is evicted; --no-elastic raises."""
    with party(COMMANDS, 3, devices()) as p:
        p.open(list(p.ranks.values()), **SMALL, peer_timeout_s=30.0, elastic=False, **options)
        p.all("expect", epoch=1, members=[m.member() for m in p.ranks.values()])
        p.adopt(list(p.ranks.values()))
        assert p.relayed == (not options.get("maps_host", True)), "who reads the launcher's board"
        described = [m.member() for m in p.ranks.values()]
        evicted = p.all("raises", only=[1], what="adopt", epoch=p.epoch + 1, members=[described[0], described[2]])[1]
        expect(evicted, raised="Evicted")
        kill(p.ranks[2])
        survivors = {r: p.ranks[r] for r in (0, 1)}
        everyone, p.ranks, p.epoch = list(p.ranks.values()), survivors, p.epoch + 1
        p.all("adopt", epoch=p.epoch, members=[m.member() for m in everyone])
        for a in p.all("raises", what="status").values():
            expect(a, raised="PeerDied")
        rows = p.all("gather", row=[4])
        assert all(a["rows"] == [[4], [4], [0]] for a in rows.values()), rows
        p.ranks = {0: survivors[0]}
        p.ranks[0].send("gather", row=[5])
        kill(survivors[1])
        expect(p.ranks[0].reply(), rows=[[5], [0], [0]])
        expect(p.all("raises", what="status")[0], raised="PeerDied")


def check_deep_ep(ranks: int, config: dict[str, int], **options: Any) -> None:
    """DeepEP's interface: every way to call it, a rank masked through it, one that is killed, and a graph."""
    with party(COMMANDS, ranks, devices()) as p:
        opened(p, **config, peer_timeout_s=30.0, **options)
        everyone, every_way = list(range(ranks)), list(range(len(WAYS)))
        for i, tokens in enumerate(token_counts(ranks, config["max_tokens"])):
            ways = every_way if i == 0 or not options.get("interpret") else [i % len(WAYS)]
            answers = p.all("deep_ep", seed=20 + i, tokens=tokens, alive=everyone, ways=ways)
            assert all(a["masked"] == [] for a in answers.values()), answers
        few = config["max_tokens"] - 1
        p.all("deep_ep", seed=30, tokens=[few if r else 1 for r in everyone], alive=everyone, ways=[0], room=few)
        others, full = everyone[:-1], [config["max_tokens"]] * ranks
        answers = p.all("deep_ep", only=others, seed=40, tokens=full, alive=others, ways=[1], mask=ranks - 1)
        assert all(a["masked"] == [ranks - 1] for a in answers.values()), answers
        graph = not options.get("interpret")
        if graph:
            p.all("deep_ep_capture", seed=5, tokens=config["max_tokens"] // 2)
        p.adopt(list(p.ranks.values()))
        if graph:
            for a in p.all("deep_ep_replay", steps=20).values():
                expect(a, lost=[])
        for m in others:
            p.ranks[m].send("deep_ep", seed=41, tokens=full, alive=others, ways=[0, 3])
        kill(p.ranks[ranks - 1])
        for m in others:
            expect(p.ranks[m].reply(), masked=[ranks - 1])


def check_broken_lists() -> None:
    """DeepEP's counts of lists that a broken-off dispatch left: within 0 and an expert's room, and what follows the
    tensors untouched."""
    from phalanx.comm import deep_ep_kernels

    experts, ranks, tokens, top_k, hidden = 4, 2, 3, 2, 128
    capacity, pairs = ranks * tokens, ranks * tokens * top_k
    first = torch.tensor([0, pairs, 2, 1, pairs], dtype=torch.int32)
    counts, stats = torch.tensor([tokens, tokens, 0], dtype=torch.int32), torch.full((experts,), 5, dtype=torch.int32)
    x = torch.ones(2 * ranks * tokens, hidden, dtype=torch.bfloat16)
    packed = torch.zeros(experts * capacity + 1, hidden, dtype=torch.bfloat16)
    places, count = torch.full((pairs,), -7, dtype=torch.int32), torch.full((experts,), -7, dtype=torch.int32)
    src_info = torch.full((experts * capacity + 1,), -7, dtype=torch.int32)
    deep_ep_kernels.pack_kernel[(3,)](
        x, count, torch.arange(pairs, dtype=torch.int32), torch.zeros(pairs, dtype=torch.int64), first, counts, packed,
        count, places, count, src_info, torch.zeros(experts, ranks, dtype=torch.int64), stats, capacity, 1, 0,
        R=ranks, P=ranks, S=experts, E=experts, K=top_k, KP=top_k, D=hidden, T_MAX=tokens, CHUNK=hidden, CHUNKS=1,
        LISTS=1, LANES=4, EXPERTS=4, HOW=deep_ep_kernels.COPY.value,
    )  # fmt: skip
    assert count.tolist() == [capacity, 0, 0, capacity], count
    assert stats.tolist() == [5 + n for n in count.tolist()], stats
    assert ((places >= -1) & (places < experts * capacity)).all(), places
    assert src_info[-1] == -7, "what follows the experts' lists was written over"
    assert not packed[-1].any(), "what follows the experts' rows was written over"


def checks() -> dict[str, Stage]:
    """Name -> check. Those that show correctness alone come first, several at once, the newest of them at the head of
    their lanes; those that measure have the machine to themselves, and find their kernels compiled."""

    def beside(lane: int, check: Callable[..., None], *arguments: Any, **options: Any) -> Stage:
        return Stage(partial(check, *arguments, **options), LIMIT_S, lane)

    def alone(check: Callable[..., None], *arguments: Any) -> Stage:
        return Stage(partial(check, *arguments), LIMIT_S)

    return {
        "deep-ep": beside(1, check_deep_ep, 2, SMALL),
        "deep-ep-fp8": beside(2, check_deep_ep, 2, SMALL, fp8=True),
        "edges": beside(3, check_edges),
        "half": beside(1, check_half, 2, SMALL),
        "half-in-place": beside(3, check_half, 2, SMALL, in_place=True),
        "half-fast": beside(2, check_half, 4, {**SMALL, "slots_per_rank": 6}, mode="fast"),
        "half-norm": beside(3, check_half, 4, {**SMALL, "slots_per_rank": 6}, normed=True, mode="fast"),
        "exchange-large": beside(4, check_exchange, 2, LARGE, fp8=True),
        "exchange-bf16": beside(1, check_exchange, 2, SMALL),
        "exchange-fp8": beside(2, check_exchange, 2, SMALL, fp8=True),
        "exchange-fast": beside(3, check_exchange, 2, SMALL, mode="fast"),
        "exchange-large-fast": beside(4, check_exchange, 2, LARGE, fp8=True, mode="fast"),
        "four-exchange": beside(3, check_exchange, 4, {**SMALL, "slots_per_rank": 6}),
        "eight-exchange": beside(1, check_exchange, 8, {**SMALL, "slots_per_rank": 4}, fp8=True),
        "kill": alone(check_kill, 2, 200),
        "kill-unseen": alone(check_kill_unseen, 2),
        "stop": alone(check_stop, 2),
        "waits": alone(check_waits, 2),
        "meet": alone(check_meet),
        "four-kill": alone(check_kill, 4, 20),
        "four-stop": alone(check_stop, 4),
        "eight-kill": alone(check_kill, 8, 10),
    }


def interpreted() -> dict[str, Stage]:
    """What Triton's interpreter can run, one after the other."""
    small = {"max_tokens": 4, "hidden": 256, "top_k": 2, "slots_per_rank": 3}
    shape = {
        "chunk": 128, "dispatch_groups": 2, "dispatch_tile": 2, "combine_groups": 2, "combine_rows": 4,
        "line_tile": 2, "line_warps": 1, "line_senders": 3, "line_receivers": 2, "row_warps": 1, "pull_chunk": 128,
        "pull_warps": 1, "pull_programs": 3,
    }  # fmt: skip

    def alone(check: Callable[..., None], *arguments: Any, **options: Any) -> Stage:
        return Stage(partial(check, *arguments, **{"interpret": True, "shape": shape, **options}), 280.0)

    # Room for few pairs: what comes is sorted in registers of the one size or the other, or in blocks.
    long, sizes = {**small, "max_tokens": 9}, {**shape, "few_pairs": 8, "many_pairs": 16, "most_pairs": 16}

    return {
        "exchange-bf16": alone(check_exchange, 2, small),
        "exchange-fast": alone(check_exchange, 2, small, mode="fast"),
        "exchange-fp8": alone(check_exchange, 2, small, fp8=True),
        "exchange-sizes": alone(check_exchange, 2, long, shape=sizes),
        "three-ranks": alone(check_exchange, 3, small),
        "three-ranks-fast": alone(check_exchange, 3, small, mode="fast"),
        "half": alone(check_half, 2, small),
        "half-in-place": alone(check_half, 3, small, in_place=True),
        "half-fast": alone(check_half, 3, small, mode="fast"),
        "half-norm": alone(check_half, 3, small, normed=True, mode="fast"),
        "meet": alone(check_meet),
        "edges": alone(check_edges),
        "edges-relayed": alone(check_edges, maps_host=False),
        "deep-ep": alone(check_deep_ep, 2, small),
        "deep-ep-fp8": alone(check_deep_ep, 2, small, fp8=True),
        "deep-ep-lists": Stage(check_broken_lists, 280.0),
    }
