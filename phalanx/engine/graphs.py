"""Which captured graph serves which batch: sizes, padding, tiles, and one capture each. Knows no device.

A graph is captured for a number of rows, in warm-up and never again: what changes (tables, routes, slots, masks, peers'
addresses) are words at fixed addresses that it reads when it is replayed. So a view change needs nothing here.

How the experts cut their work is part of a graph, chosen for as many rows at every rank. Where a peer has many more
than this rank, that would be wrong: every rank's experts get their share of all ranks' tokens. `find` then takes a
larger graph than the rows need, whose tiles suit the step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class Tiled(Protocol):
    """What is replayed."""

    @property
    def tile(self) -> int:
        """Rows of the experts' tiles."""


Replay = TypeVar("Replay")
TiledReplay = TypeVar("TiledReplay", bound=Tiled)

_SMALL = (1, 2, 4, 8)
_STEP, _LARGE_STEP, _LARGE = 8, 16, 128
_FEWEST_TOKENS = 64


def ladder(largest: int) -> tuple[int, ...]:
    """Sizes up to `largest`, which is one of them; none for 0. Finer where a row more costs more of the step. LOCAL."""
    sizes = [*_SMALL, *range(_SMALL[-1] + _STEP, _LARGE, _STEP), *range(_LARGE, largest, _LARGE_STEP), largest]
    return tuple(sorted({size for size in sizes if 0 < size <= largest}))


def token_ladder(largest: int) -> tuple[int, ...]:
    """Sizes for steps with prefills, in tokens, up to `largest`, which is one of them; none for 0. LOCAL.

    Each is twice the one before, for each takes a capture in every warm-up, and a row that pads costs little: it has no
    attention and no expert. A long prompt fills the largest in every step but its last."""
    sizes, size = {largest} if largest > 0 else set(), _FEWEST_TOKENS
    while size < largest:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


class Graphs(Generic[Replay]):
    """One replay a size of the ladder."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        assert list(sizes) == sorted(set(sizes)), f"sizes grow: {sizes}"
        self.sizes = sizes
        self._replays: dict[int, Replay] = {}

    def capture(self, make: Callable[[int], Replay]) -> None:
        """Make them all, the largest first, so that the smaller ones fit into its memory. Once. LOCAL."""
        assert not self._replays, "a graph is captured once"
        for size in reversed(self.sizes):
            self._replays[size] = make(size)

    def size_for(self, rows: int) -> int | None:
        """The smallest size that holds `rows` (none at all counts as one); None: run eagerly. LOCAL."""
        at = bisect_left(self.sizes, max(1, rows))
        return self.sizes[at] if at < len(self.sizes) else None

    def holding(self, rows: int) -> Iterator[tuple[int, Replay]]:
        """Every size that holds `rows` and is captured, with its replay, the smallest first. LOCAL."""
        for size in self.sizes[bisect_left(self.sizes, max(1, rows)) :]:
            if size in self._replays:
                yield size, self._replays[size]

    def clear(self) -> None:
        """Let go of all. LOCAL."""
        self._replays.clear()


def find(ladders: Sequence[Graphs[TiledReplay]], rows: int, tile: int) -> tuple[int, TiledReplay] | None:
    """Of the first ladder that has one: the smallest size that holds `rows`, with tiles of `tile` rows at least, and
    its replay. Where no tiles are so tall, the largest size; where none holds the rows, None. LOCAL.

    The rank with the most rows of all has such tiles in the graph that its rows need anyway, so a graph that is larger
    than another rank's rows need keeps nobody waiting."""
    found: tuple[int, TiledReplay] | None = None
    for graphs in ladders:
        for found in graphs.holding(rows):
            if found[1].tile >= tile:
                return found
    return found
