"""What tests ask of a real service over HTTP, and how they wait for the answer.

What the service says of itself is told to its server by its other processes, each by a message of its own: after a line
in the log, or the end of a stream, some of them may still be on their way. So a test waits for what it is to find.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from phalanx.testing.service import Service

PATIENCE_S = 60.0
"""For one answer, and for what is to become true: far beyond what a loaded machine needs."""

T = TypeVar("T")


def eventually(holds: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Until what the service is asked for holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"it does not hold after {timeout_s} s"


def becomes(ask: Callable[[], T], wanted: T, timeout_s: float = PATIENCE_S) -> None:
    """Until the answer is the one that is wanted."""
    deadline = time.monotonic() + timeout_s
    while (found := ask()) != wanted:
        assert time.monotonic() < deadline, f"after {timeout_s} s it is {found}, not {wanted}"


def state_of(pid: int) -> str:
    """One letter: T for a process that is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def get(service: Service, path: str) -> httpx.Response:
    return httpx.get(f"{service.url}{path}", timeout=PATIENCE_S)


def post(service: Service, path: str, body: Mapping[str, Any], timeout_s: float = PATIENCE_S) -> httpx.Response:
    return httpx.post(f"{service.url}{path}", json=body, timeout=timeout_s)


def states(service: Service) -> dict[int, str]:
    """By rank."""
    return {rank["rank"]: rank["state"] for rank in service.status()["ranks"]}


def healthy(service: Service) -> set[int]:
    return {rank for rank, state in states(service).items() if state == "healthy"}


def problem(service: Service, rank: int) -> str:
    """Why a rank does not serve; empty when nothing is known."""
    return str(get(service, "/server_info").json()["rank_problems"].get(str(rank), ""))


def metric(service: Service, name: str, label: str = "") -> float:
    """The sum of the samples whose line begins with `name` and has `label`."""
    lines = get(service, "/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line)


def restored(service: Service) -> dict[str, int]:
    """Bytes by source since the service became ready."""
    name = "phalanx_expert_bytes_restored_total"
    return {source: int(metric(service, name, f'source="{source}"')) for source in ("peer", "vault", "disk")}


def instruct(service: Service, instruction: str, **params: object) -> httpx.Response:
    """An operator's instruction."""
    return post(service, "/fault_tolerance/apply", {"instruction": instruction, "params": params})


def chaos(service: Service, kind: str, rank: int, **where: Any) -> None:
    """Have a rank fail; with `where` or `at_step` it does it to itself, there."""
    post(service, "/chaos", {"kind": kind, "rank": rank, **where}).raise_for_status()
