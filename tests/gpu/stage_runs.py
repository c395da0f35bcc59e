"""Runs the stages of scripts/gpu_check: some beside one another, some with the machine to themselves, none for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

GRACE_S = 15.0
SHOWN = 3000
"""Characters of what a stage in a lane said, from its end."""


@dataclass(frozen=True)
class Stage:
    """limit_s: it is ended then. lane: stages of one lane run one by one, lanes beside each other; 0: alone."""

    run: Callable[[], None]
    limit_s: float
    lane: int = 0


@dataclass(frozen=True)
class Ended:
    """What became of a stage. why: empty when it passed."""

    name: str
    seconds: float
    why: str = ""

    def __str__(self) -> str:
        return f"{'FAILED' if self.why else 'passed'} {'after' if self.why else 'in'} {self.seconds:.1f} s" + (
            f": {self.why}" if self.why else ""
        )


def run_all(
    command: Sequence[str], names: Sequence[str], table: dict[str, Stage], *, here: bool, timeout_s: float = 3600.0
) -> int:
    """Run these stages, first those with a lane, and end with a table of all. Returns how many failed.

    A stage runs as `command --stage NAME`; with `here`, those that are alone run in this process, whose main thread
    this is. What has not begun after `timeout_s` is left out, and counts as failed."""
    began = time.monotonic()
    lanes: dict[int, list[str]] = {}
    for name in names:
        lanes.setdefault(table[name].lane, []).append(name)
    alone = lanes.pop(0, [])

    def begin(name: str, run: Callable[[str, Stage], Ended]) -> Ended:
        left = timeout_s - (time.monotonic() - began)
        return run(name, table[name]) if left > 0 else Ended(name, 0.0, f"left out, {timeout_s:.0f} s were over")

    environment = _share(len(lanes))

    def run_lane(queue: list[str]) -> list[Ended]:
        return [begin(name, lambda n, stage: _in_lane(command, n, stage, environment)) for name in queue]

    ended: list[Ended] = []
    if lanes:
        with ThreadPoolExecutor(len(lanes)) as pool:
            ended += [each for part in pool.map(run_lane, lanes.values()) for each in part]
    for name in alone:
        ended.append(begin(name, _here if here else lambda n, stage: _alone(command, n, stage)))
    failed = [each for each in ended if each.why]
    print(f"{len(ended)} stages in {time.monotonic() - began:.1f} s, {len(failed)} failed")
    for each in sorted(ended, key=lambda each: bool(each.why)):
        print(f"    {each.name:20s} {each}", flush=True)
    return len(failed)


def end_before(limit_s: float, grace_s: float = GRACE_S) -> None:
    """Raise TimeoutError in this process in time for it to end, before it is ended, what it started."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done in {limit_s - grace_s:.0f} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s - grace_s)


def _here(name: str, stage: Stage) -> Ended:
    """Run a stage in this process."""
    print(f"{name}:", flush=True)
    began, why = time.monotonic(), ""
    end_before(stage.limit_s, 0.0)
    try:
        stage.run()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _told(Ended(name, time.monotonic() - began, why))


def _share(lanes: int) -> dict[str, str]:
    """The environment of stages beside each other: threads for each lane's share of the CPUs, or as many as are said.

    Every process would otherwise have a thread a CPU, and threads that spin for each other would take the others'."""
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, lanes))
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _in_lane(command: Sequence[str], name: str, stage: Stage, environment: dict[str, str]) -> Ended:
    """Run a stage beside others, and say all that it said when it has ended."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--stage", name], stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        ended = _wait(process, name, stage.limit_s)
        log.seek(0)
        print(f"{name}:\n{log.read()[-SHOWN:].rstrip()}\n    {ended}", flush=True)
    return ended


def _alone(command: Sequence[str], name: str, stage: Stage) -> Ended:
    """Run a stage with the machine to itself; what it says is seen at once."""
    print(f"{name}:", flush=True)
    process = subprocess.Popen([*command, "--stage", name], start_new_session=True)
    return _told(_wait(process, name, stage.limit_s))


def _wait(process: subprocess.Popen[bytes], name: str, limit_s: float) -> Ended:
    """Until it ends or its time is over; nothing of it is left behind."""
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit_s)
    code = process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    why = "" if code == 0 else "not done in time" if code is None else f"exit code {code}"
    return Ended(name, time.monotonic() - began, why)


def _told(ended: Ended) -> Ended:
    print(f"    {ended}", flush=True)
    return ended
