"""Which kernels of our own the small products and the attention of decodes come from, by rows.

The numbers are measured (docs/cuda-engine.md, "A decode's small kernels"). None of this changes what is computed, but
in which order sums are taken, so `--deterministic` goes without.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeOptions:
    """out, router: the rows up to which these products come from `moe.thin`, not from the library. placed: the decodes
    up to which attention places the new keys itself (`placed_kernels`). summed: the rows up to which the experts'
    combine adds its sums to the residual and norms it, where it can (`comm.received.RowNorm`)."""

    out: int = 0
    router: int = 0
    placed: int = 0
    summed: int = 0

    @classmethod
    def best(cls, *, exact: bool) -> DecodeOptions:
        """What serving takes. exact: a row's bits must not depend on its batch. LOCAL, pure."""
        return cls() if exact else cls(out=64, router=256, placed=256, summed=256)
