"""Which kernels of our own the small products and the attention of decodes come from, by rows.

The numbers are measured (docs/cuda-engine.md, "A decode's small kernels"). None of this changes what is computed, but
in which order sums are taken, so `--deterministic` goes without.
"""

from __future__ import annotations

from dataclasses import dataclass

KEYS = 16
"""Keys that a warp of a decode's attention takes at once: the least that its products take."""

_WARPS = 8
_BUFFER = 24 << 10
_MOST_SUMS = 4096


def can_place(group: int, head_dim: int, block_size: int, split: int) -> bool:
    """Whether attention can place the new keys itself (`placed_kernels`): with so many query heads a KV head, of this
    size, KV blocks of so many positions, and so many positions an item. LOCAL, pure.

    A warp keeps its sums in registers, of all query heads of a KV head: 64 of 128 values would pass through memory."""
    heads_fit = head_dim >= KEYS and head_dim & (head_dim - 1) == 0
    sums = max(8, 1 << max(0, group - 1).bit_length()) * head_dim
    return heads_fit and sums <= _MOST_SUMS and block_size % KEYS == 0 and split % block_size == 0


@dataclass(frozen=True)
class DecodeCut:
    """How a decode's attention is cut. warps: of a program, each with KEYS keys at a time. stages: blocks that a warp
    has before it, and the one it works on. programs: a multiprocessor."""

    warps: int
    stages: int
    programs: int

    @classmethod
    def of(cls, heads: int, head_dim: int, processors: int) -> DecodeCut:
        """The cut for a batch with so many rows times KV heads. LOCAL, pure.

        A multiprocessor has 8 warps in all, which is as many bytes under way as it takes: four warps share an item
        while each multiprocessor has one at most, and beyond that each warp has items of its own, since warps that
        share one wait for each other."""
        programs = 2 if heads <= processors else _WARPS
        buffers = _BUFFER // (KEYS * head_dim * 2 * 2)
        return cls(_WARPS // programs, 1 + min(max(buffers, 1), 4), programs)


@dataclass(frozen=True)
class DecodeOptions:
    """out, router: the rows up to which these products come from `moe.thin`, not from the library. placed: the decodes
    up to which attention places the new keys itself (`placed_kernels`). cut: how, instead of what suits the batch.
    summed: the rows up to which the experts' combine adds its sums to the residual and norms it, where it can
    (`comm.received.RowNorm`)."""

    out: int = 0
    router: int = 0
    placed: int = 0
    cut: DecodeCut | None = None
    summed: int = 0

    @classmethod
    def best(cls, *, exact: bool) -> DecodeOptions:
        """What serving takes. exact: a row's bits must not depend on its batch. LOCAL, pure."""
        return cls() if exact else cls(out=64, router=256, placed=256, summed=256)
