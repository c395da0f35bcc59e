"""What paired measurements say: the median of their ratios, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Median:
    """A median, and an interval that holds the true one with 95 %, whatever the distribution."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """Of a ratio: how far it lies above 1."""
        value, low, high = (100 * (x - 1) for x in (self.value, self.low, self.high))
        return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"


def median(values: Sequence[float]) -> Median:
    """The interval's ends are two of the values: the k-th from either end, where fewer than k of n fair coins fall on
    one side in 2.5 % of all cases at most. With fewer than 6 values that is impossible, and the ends are the extremes.
    Pure."""
    ordered, n = sorted(values), len(values)
    k, below = 0, 0.0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(1, k)
    return Median(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def ratio(over: Sequence[float], under: Sequence[float]) -> Median:
    """Of values measured in pairs, one beside the other. Pure."""
    return median([a / b for a, b in zip(over, under, strict=True)])
