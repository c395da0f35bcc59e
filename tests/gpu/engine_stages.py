"""The stages of `scripts/gpu_check engine`: each in a process of its own, with its own time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stage_runs import Stage

SERVICE_NEEDS = ("zmq", "msgspec", "fastapi", "uvicorn", "pydantic")


def stages(interpret: bool) -> dict[str, Stage]:
    """Name -> stage, in the order of running."""
    import block_checks
    import engine_checks as checks
    from engine_flights import check_flights
    from engine_pair import check_pair
    from engine_price import price
    from engine_skew import skew
    from hub_checks import check_hub_logits

    count = torch.cuda.device_count() if not interpret else 0
    device = torch.device("cpu") if interpret else torch.device("cuda", 0)
    large = not interpret
    table = {
        "attention": Stage(lambda: checks.check_attention(device, large), 100 if large else 280, 1),
        "experts": Stage(lambda: checks.check_experts(device, large), 100 if large else 280, 2),
        "experts-fp8": Stage(lambda: block_checks.check_blocks(device, large), 120 if large else 280, 4),
        "sampler": Stage(lambda: checks.check_sampler(device, large), 60 if large else 280, 2),
        "engine-one": Stage(lambda: checks.check_engine(device, large), 120 if large else 280, 3),
        "flights": Stage(lambda: check_flights(device, large), 120 if large else 280, 3),
        "pair": Stage(lambda: check_pair(count, interpret=interpret), 110 if large else 280, 1),
        "logits": Stage(lambda: check_hub_logits(device, large), 120 if large else 280, 5),
    }
    if interpret:
        return {
            **table,
            "price": Stage(lambda: price(0, layers=1, batches=(2,), rounds=1, steps=2, tiny=True), 280),
            "skew": Stage(lambda: skew(0, layers=1, rounds=1, tiny=True), 280),
        }
    import engine_failures
    from engine_ladder import ladder

    return {
        **table,
        "serve": Stage(serve_and_kill, 120, 5),
        "four": Stage(engine_failures.four_ranks_on_two_devices, 120, 2),
        "ladder": Stage(lambda: ladder(count, layers=48), 100),
        "price": Stage(lambda: price(count, layers=48), 115),
        "skew": Stage(lambda: skew(count, layers=48), 75),
        "kill64": Stage(kill_under_64_streams, 75),
        "rejoin64": Stage(engine_failures.returns_under_64_streams, 105),
        "rejoin64-large": Stage(engine_failures.returns_at_a_known_shape, 120),
        "failures": Stage(engine_failures.every_failure, 120),
        "vault": Stage(engine_failures.restore_from_the_vault, 120),
        "ladder-fp8": Stage(lambda: ladder(count, layers=48, quantization="fp8", batches=(1, 64, 256)), 75),
        "ladder-exact": Stage(lambda: ladder(count, layers=48, deterministic=True, batches=(1, 64, 256)), 75),
    }  # fmt: skip


def kill_under_64_streams() -> None:
    """What a kill costs 64 streams of 128 tokens whose survivor holds every expert; every token as unfailed."""
    figures = bench_recovery("--output-len", "128", "--serve-flags", _serve_flags(512, max_restarts=0))
    if figures:
        _show_kill(figures)


def _serve_flags(longest: int, **options: object) -> str:
    """Two ranks on two devices, each with room for every expert and every stream."""
    from phalanx.testing.service import flags_of

    flags = flags_of(
        device="cuda", deterministic=True, max_model_len=longest, max_num_seqs=64, cuda_graph_max_bs=64,
        num_kv_blocks=64 * -(-longest // 16) + 64, warmup_timeout=60, expert_backup="dram", **options,
    )  # fmt: skip
    return " ".join(flags)


def bench_recovery(*arguments: str) -> dict[str, Any]:
    """The figures of `phalanx bench recovery` with 64 greedy streams and one kill of rank 1; empty: it cannot run."""
    if lacks((*SERVICE_NEEDS, "rich")):
        return {}
    from phalanx.cli.bench_recovery import recovery

    with small_model() as model, contextlib.redirect_stdout(io.StringIO()) as said:
        command = [model, "--ep-size", "2", "--streams", "64", "--input-len", "32", "--rounds", "1", "--ranks", "1"]
        with contextlib.suppress(SystemExit):  # its code says what the figures say, too
            recovery.main([*command, *arguments, "--json"], standalone_mode=False)
    figures: dict[str, Any] = json.loads(said.getvalue())
    assert not figures["failed"], f"{figures['failed']} requests failed: {figures['each'][0]['errors']}"
    assert not figures["different"], f"{figures['different']} tokens differ from the unfailed run"
    return figures


def _show_kill(figures: dict[str, Any]) -> None:
    def ms(what: dict[str, float]) -> str:
        return ", ".join(f"{name} {what[name] * 1e3:.1f}" for name in ("p50", "p99", "max"))

    print(
        f"    {figures['requests']} streams, {figures['failed']} failed, {figures['different']} tokens different "
        f"(compared by {figures['compared_by']}), {figures['requests_moved']} moved\n"
        f"    kill to next token, ms: {ms(figures['kill_to_next_token_s'])}\n"
        f"    any gap without a failure, ms: {ms(figures['gap_unfailed_s'])}; longest of each stream: "
        f"{ms(figures['longest_gap_unfailed_s'])}\n"
        f"    phases, s: {figures['each'][0]['recovery']['seconds']}",
        flush=True,
    )


def lacks(modules: tuple[str, ...]) -> bool:
    """Whether some of these are not installed; says so."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"    skipped: the service needs {', '.join(missing)}, which are not installed here")
    return bool(missing)


@contextlib.contextmanager
def small_model() -> Iterator[str]:
    """A checkpoint that is small, but whose kernels have something to do."""
    from phalanx.testing import tiny

    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "tiny")
        tiny.make_tiny(model, "qwen3-moe", layers=6, experts=16, top_k=4, hidden=512, heads=8, kv_heads=2, head_dim=64,
                       expert_width=256)  # fmt: skip
        yield model


def serve_and_kill() -> None:
    """`phalanx serve --device cuda --deterministic` with 2 ranks: SIGKILL in mid-stream, every text as unfailed."""
    if lacks(SERVICE_NEEDS):
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
    from streams import PROMPTS, Streams

    from phalanx.testing.service import Service, flags_of

    with small_model() as model:
        flags = flags_of(
            device="cuda", ep_size=2, deterministic=True, max_model_len=1024, max_num_seqs=16, cuda_graph_max_bs=16,
            warmup_timeout=100, expert_backup="dram", log_level="info",
        )  # fmt: skip
        with Service(model, *flags) as service:
            options = {"temperature": [0.0, 0.8] * 4, "top_p": 0.9, "seed": list(range(8)), "max_tokens": 200}
            try:
                began = time.monotonic()
                unfailed = Streams(service.url, PROMPTS, **options).start().join(60)
                whole = time.monotonic() - began
                assert all(end == ("length", "", True) for _, *end_ in unfailed for end in [tuple(end_)]), unfailed
                running = Streams(service.url, PROMPTS, **options).start()
                running.wait_for_chunks(20)
                service.signal(1, signal.SIGKILL)
                failed = running.join(60)
                different = sum(a != b for a, b in zip(failed, unfailed, strict=True))
                assert not different, f"{different} of {len(failed)} streams differ from the unfailed run"
                recovery = service.status()["last_recovery"]
            except BaseException:
                print(service.log, flush=True)
                raise
        print(
            f"    8 streams of 200 tokens in {whole:.1f} s; a rank killed: all alike, longest gap "
            f"{running.longest_gap_s() * 1e3:.0f} ms; recovery {recovery['seconds']}",
            flush=True,
        )
