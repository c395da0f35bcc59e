"""What a layer costs on its device: a graph of all layers, replayed, and the events around each replay."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

SKIPPED = 2
"""Replays whose times do not count: the first one brings the graph to the device."""


def layer_us(run: Callable[[int], object], layers: int, replays: int) -> float:
    """Microseconds of `run(layer)`: of `replays` replays the median, each waited for. Everything has run once before,
    so nothing is compiled in the graph. LOCAL, waits."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    samples = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / layers)
    return statistics.median(samples[SKIPPED:])
