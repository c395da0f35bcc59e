#!/usr/bin/env python3
"""What it costs a running kernel to read host memory: why a wait does it rarely, and one program at a time.

    benchmarks/host_reads.py

Time of one read of a pinned word by every warp of a grid, against the same read of device memory: the slope between
20 and 40 dependent reads, median of 5 launches.
"""

from __future__ import annotations

import statistics
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("host_reads: skipped, it needs a CUDA device")

import triton
import triton.language as tl


@triton.jit
def chain(words, out, reads):
    """`reads` volatile reads, each at an address that depends on the one before."""
    value = tl.full((), 0, tl.int64)
    for _ in range(reads):
        value += tl.load(words + value, volatile=True)
    tl.store(out + tl.program_id(0), value)


def microseconds(words: torch.Tensor, out: torch.Tensor, reads: int, programs: int, warps: int) -> float:
    samples = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        chain[(programs,)](words, out, reads, num_warps=warps)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3)
    return statistics.median(samples[1:])


def main() -> None:
    pinned = torch.zeros(16, dtype=torch.int64, pin_memory=True)
    device = torch.zeros(16, dtype=torch.int64, device="cuda")
    out = torch.zeros(1024, dtype=torch.int64, device="cuda")
    print(f"{torch.cuda.get_device_name()}: us for one read by every warp")
    for programs, warps in ((1, 1), (2, 4), (126, 1), (126, 4)):
        times = []
        for words in (pinned, device):
            long, short = (microseconds(words, out, n, programs, warps) for n in (40, 20))
            times.append((long - short) / 20)
        print(f"  {programs:3d} programs of {warps} warps: host {times[0]:7.2f}, device {times[1]:5.2f}")


if __name__ == "__main__":
    main()
