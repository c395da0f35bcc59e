"""Random weights of a model's shape, for benchmarks (`--load-format dummy`): a directory with a config.json is enough.

Every element of every tensor is a function of its name and place alone, so whoever needs an expert makes the same
bytes: any rank in any slot, whatever it computes on, the vault's process, a restore, the next start. The bytes come by
copying, at the speed of memory: all tensors are windows of one pool of random numbers. The pool's length is a prime, so
no two rows of a tensor are alike, and windows start at different places. Values are uniform and symmetric, scaled by
the number of inputs, so that activations keep their size; norms are ones, biases zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phalanx.model.config import ModelConfig
from phalanx.model.loader import Checkpoint, Names, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POOL = 4_194_301
"""Elements of the pool, a prime: 2^22 - 3."""

_KEY = 0x5EED
_STRIDE = 2_592_221
"""From one tensor's window to the next, in elements: the golden ratio's part of the pool, so that starts spread."""


def draw(path: str | Path) -> Checkpoint:
    """A model with the shape that `path`/config.json says, and random weights. Raises BadCheckpoint. LOCAL, draws
    nothing yet, and imports no torch."""
    directory = Path(path)
    config = ModelConfig.read(directory)
    names = Names(config, fused=False)
    return Checkpoint(directory, config, names, Drawn(dict(names.expected())))


class Drawn:
    """The tensors of these names and shapes, drawn when they are asked for."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        assert len(shapes) < POOL, "two windows would be the same"
        self._shapes = shapes
        self._starts = {name: i * _STRIDE % POOL for i, name in enumerate(shapes)}
        self._scaled: dict[tuple[float, torch.dtype], Tensor] = {}
        self._blocks: dict[float, tuple[Tensor, float]] = {}

    def read(self, name: str) -> Tensor:
        """See `loader.Tensors`. In bfloat16, whatever the run's type: a checkpoint is stored in one type, too."""
        import torch

        out = torch.empty(self._shapes[name], dtype=torch.bfloat16)
        self.fill(name, out)
        return out

    def fill(self, name: str, out: Tensor, index: int | None = None) -> None:
        """See `loader.Tensors`; there are no stacks."""
        assert index is None, f"{name} is no stack"
        shape = self._shapes[name]
        assert tuple(out.shape) == shape, (name, out.shape, shape)
        if len(shape) == 1:
            out.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        pool = self._pool(1.0 if "embed_tokens" in name else shape[-1] ** -0.5, out.dtype)
        self._copy(name, pool, out)

    def fill_blocks(self, name: str, weight: Tensor, scales: Tensor) -> None:
        """See `loader.Tensors`. All blocks have one scale, that of the largest number in the pool."""
        import torch

        from phalanx.moe.blocks import scales_of

        deviation = self._shapes[name][-1] ** -0.5
        if deviation not in self._blocks:
            pool = self._pool(deviation, torch.bfloat16)
            scale = float(scales_of(pool.abs().max().view(1, 1)))
            self._blocks[deviation] = (pool.float() / scale).to(weight.dtype), scale
        bits, scale = self._blocks[deviation]
        self._copy(name, bits, weight)
        scales.fill_(scale)

    def _copy(self, name: str, pool: Tensor, out: Tensor) -> None:
        """The window of a tensor."""
        flat, at, begin = out.view(-1), 0, self._starts[name]
        while at < len(flat):
            size = min(len(flat) - at, POOL - begin)
            flat[at : at + size] = pool[begin : begin + size]
            at, begin = at + size, 0

    def close(self) -> None:
        """See `loader.Tensors`."""
        self._scaled.clear()
        self._blocks.clear()

    def _pool(self, deviation: float, dtype: torch.dtype) -> Tensor:
        """[POOL] with this standard deviation, rounded to bfloat16 first, so that every type has the same values."""
        import torch

        key = deviation, dtype
        if key not in self._scaled:
            # Only the raw bits of a generator are the same in every version of the library.
            words = np.random.Philox(key=_KEY).random_raw(-(-POOL // 4)).view("<i2")[:POOL]
            values = (words.astype(np.float32) + 0.5) * np.float32(deviation * 12**0.5 / 65536)
            self._scaled[key] = torch.from_numpy(values).to(torch.bfloat16).to(dtype)
        return self._scaled[key]
