"""The stages of `scripts/gpu_check engine`: each in a process of its own, with its own time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

GRACE_S = 15.0
SERVICE_NEEDS = ("zmq", "msgspec", "fastapi", "uvicorn", "pydantic")


@dataclass(frozen=True)
class Stage:
    """limit_s: it is ended then. lane: stages of one lane run one after the other, lanes beside each other."""

    run: Callable[[], None]
    limit_s: float
    lane: int = 0


def stages(interpret: bool) -> dict[str, Stage]:
    """Name -> stage, in the order of running."""
    import engine_checks as checks

    count = torch.cuda.device_count() if not interpret else 0
    device = torch.device("cpu") if interpret else torch.device("cuda", 0)
    large = not interpret
    table = {
        "attention": Stage(lambda: checks.check_attention(device, large), 60 if large else 280, 1),
        "experts": Stage(lambda: checks.check_experts(device, large), 60 if large else 280, 2),
        "sampler": Stage(lambda: checks.check_sampler(device, large), 40 if large else 280, 2),
        "engine-one": Stage(lambda: checks.check_engine(device, large), 80 if large else 280, 3),
    }
    if interpret:
        return table
    from engine_ladder import ladder

    return {
        **table,
        "serve": Stage(serve_and_kill, 110, 4),
        "ladder": Stage(lambda: ladder(count, layers=48), 100),
        "ladder-exact": Stage(
            lambda: ladder(count, layers=48, deterministic=True, batches=(1, 64, 256)), 75
        ),
    }  # fmt: skip


def serve_and_kill() -> None:
    """`phalanx serve --device cuda --deterministic` with 2 ranks: SIGKILL in mid-stream, every text as unfailed."""
    missing = [name for name in SERVICE_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"    skipped: the service needs {', '.join(missing)}, which are not installed here")
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
    from streams import PROMPTS, Streams

    from phalanx.testing import tiny
    from phalanx.testing.service import Service, flags_of

    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "tiny")
        tiny.make_tiny(model, "qwen3-moe", layers=6, experts=16, top_k=4, hidden=512, heads=8, kv_heads=2, head_dim=64,
                       expert_width=256)  # fmt: skip
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


def end_before(limit_s: float) -> None:
    """Raise TimeoutError in this process in time for it to end, before it is ended, what it started."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done in {limit_s - GRACE_S:.0f} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s - GRACE_S)


def run_all(script: str, names: list[str], table: dict[str, Stage], arguments: list[str]) -> list[str]:
    """Run these stages, each as `script engine --stage NAME`; those with a lane first, lanes beside each other.
    Returns the names of those that failed."""
    lanes: dict[int, list[str]] = {}
    for name in names:
        if table[name].lane:
            lanes.setdefault(table[name].lane, []).append(name)

    def run_lane(queue: list[str]) -> list[str]:
        return [name for name in queue if not _in_lane(script, name, table[name], arguments)]

    failed: list[str] = []
    if lanes:
        with ThreadPoolExecutor(len(lanes)) as pool:
            failed += [name for part in pool.map(run_lane, lanes.values()) for name in part]
    alone = [name for name in names if not table[name].lane]
    return failed + [name for name in alone if not _alone(script, name, table[name], arguments)]


def _start(script: str, name: str, arguments: list[str], log: IO[str] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, script, "engine", "--stage", name, *arguments], stdout=log,
        stderr=None if log is None else subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def _finish(process: subprocess.Popen[bytes], began: float, limit_s: float) -> str:
    """What a stage came to, in a line; nothing of it is left behind."""
    code = process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    seconds = time.monotonic() - began
    if code == 0:
        return f"    passed in {seconds:.1f} s"
    return f"    FAILED after {seconds:.1f} s: " + ("not done in time" if code is None else f"exit code {code}")


def _in_lane(script: str, name: str, stage: Stage, arguments: list[str]) -> bool:
    """Run a stage beside others, and say all that it said when it has ended."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        process = _start(script, name, arguments, log)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stage.limit_s)
        verdict = _finish(process, began, stage.limit_s)
        log.seek(0)
        print(f"{name}:\n{log.read()[-3000:].rstrip()}\n{verdict}", flush=True)
    return "passed" in verdict


def _alone(script: str, name: str, stage: Stage, arguments: list[str]) -> bool:
    """Run a stage with the machine to itself; what it says is seen at once."""
    print(f"{name}:", flush=True)
    began = time.monotonic()
    process = _start(script, name, arguments, None)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(stage.limit_s)
    verdict = _finish(process, began, stage.limit_s)
    print(verdict, flush=True)
    return "passed" in verdict
