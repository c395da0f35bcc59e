"""What the benchmarks share: the same prompts for everybody, percentiles, and what must stand beside a figure."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from phalanx import __version__
from phalanx.cli.errors import ServiceError, headers, talking_to


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """`count` different prompts of `length` token ids. LOCAL.

    The ids are those of printable bytes in a byte vocabulary: every tokenizer has so many tokens."""
    generator = random.Random(seed)
    return [generator.choices(range(32, 127), k=length) for _ in range(count)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """n, mean, p50, p99 and max of the values, interpolated linearly; only n when there are none. LOCAL."""
    if not values:
        return {"n": 0}
    ordered = sorted(values)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return {"n": len(ordered), "mean": sum(ordered) / len(ordered), "p50": at(0.5), "p99": at(0.99), "max": ordered[-1]}


def cells(figures: Mapping[str, float], *names: str) -> list[str]:
    """Figures in seconds as table cells in milliseconds; "-" for one that there is not."""
    return [f"{1000 * figures[name]:.1f} ms" if name in figures else "-" for name in names]


def served_model(url: str, api_key: str) -> str:
    """The name of the first model that the service lists. Raises ServiceError."""
    with httpx.Client(base_url=url, headers=headers(api_key), timeout=10) as client, talking_to(url):
        models = client.get("/v1/models").raise_for_status().json().get("data")
    if not models:
        raise ServiceError(f"{url} lists no models")
    return str(models[0]["id"])


def machine() -> dict[str, Any]:
    """The hardware and the version that a figure was measured with. LOCAL."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "phalanx": __version__}
