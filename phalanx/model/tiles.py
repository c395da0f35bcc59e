"""How the attention of prefills is cut into pieces that a fixed number of programs walks over.

A tile is some tokens of one sequence that follow one another; they look at the same keys, which are loaded once for
all of them. A tile's keys are cut into parts when there are too few tiles to fill the device: a short prompt behind a
long prefix, say. Parts are put together as the splits of a decode are. Pieces stand in the order of their length, the
longest first, so that programs which take one after the other end at about the same time.

Numbers in, numbers out; no tensor of a device here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PIECE_WORDS = 5
"""Words a piece: first row, tokens, first and end of its KV positions, first entry of its partial sums or -1."""

MERGE_WORDS = 4
"""Words a row that is put together: row, its first entry, entries from one to the next, how many."""


@dataclass(frozen=True)
class Cut:
    """tokens: of a tile. block: KV positions that a kernel takes at once. part: the fewest positions that a tile is cut
    to. shares: pieces that fill the device. window: how far back a token sees; 0: to the start."""

    tokens: int
    block: int = 64
    part: int = 512
    shares: int = 1
    window: int = 0

    @property
    def max_parts(self) -> int:
        """Pieces of tiles that are cut, at most: tiles longer than a share are fewer than the shares."""
        return 2 * self.shares

    @property
    def max_entries(self) -> int:
        """Rows of partial sums, at most."""
        return self.max_parts * self.tokens


@dataclass(frozen=True)
class Pieces:
    """pieces: [P, PIECE_WORDS]; merges: [N, MERGE_WORDS], the rows of those that are parts."""

    pieces: Ints
    merges: Ints


def pieces(cut: Cut, starts: Ints, lengths: Ints, contexts: Ints, first_entry: int) -> Pieces:
    """The pieces of these slices, all of them longer than one token. LOCAL, pure.

    starts: first rows; contexts: tokens before them. first_entry: where there is room for partial sums."""
    if not len(lengths):
        return Pieces(np.zeros((0, PIECE_WORDS), np.int64), np.zeros((0, MERGE_WORDS), np.int64))
    which, nth = _each(-(-lengths // cut.tokens))
    row, begin = starts[which] + nth * cut.tokens, contexts[which] + nth * cut.tokens
    tokens = np.minimum(cut.tokens, lengths[which] - nth * cut.tokens)
    upper = begin + tokens
    lower = np.maximum(0, (begin - cut.window + 1) // cut.block * cut.block) if cut.window else np.zeros_like(begin)
    length = upper - lower
    part = max(cut.part, -(-int(length.sum()) // cut.shares // cut.block) * cut.block)
    size = -(-length // -(-length // part) // cut.block) * cut.block  # parts of a tile are about equal
    parts = -(-length // size)

    tile, k = _each(parts)
    low = lower[tile] + k * size[tile]
    high = np.minimum(upper[tile], low + size[tile])
    entries = np.where(parts > 1, tokens * parts, 0)
    first = first_entry + np.cumsum(entries) - entries
    place = np.where(parts[tile] > 1, first[tile] + k * tokens[tile], -1)
    table = np.stack([row[tile], tokens[tile], low, high, place], axis=1)
    order = np.argsort(low - high, kind="stable")

    cut_tiles = np.flatnonzero(parts > 1)
    which, j = _each(tokens[cut_tiles])
    tile = cut_tiles[which]
    merges = np.stack([row[tile] + j, first[tile] + j, tokens[tile], parts[tile]], axis=1)
    return Pieces(table[order], merges)


def _each(counts: Ints) -> tuple[Ints, Ints]:
    """For counts (2, 3): whose (0, 0, 1, 1, 1), and which of them (0, 1, 0, 1, 2)."""
    whose = np.repeat(np.arange(len(counts)), counts)
    return whose, np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
