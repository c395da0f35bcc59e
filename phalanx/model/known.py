"""A checkpoint that was found good when the service started, and may be gone by now.

Whoever is started later, a rank that comes back or the vault's next process, takes the weights from memory. So it gets
the model's description along, and touches the directory only when something has to be read from it after all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from phalanx.config import ServeConfig
from phalanx.errors import BadCheckpoint, BadConfig
from phalanx.model.config import ModelConfig
from phalanx.model.dummy import draw
from phalanx.model.loader import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from phalanx.model.layers import DenseWeights


def open_model(config: ServeConfig) -> Checkpoint:
    """The weights that a service with this config serves: what its model directory holds, or random ones of its shape
    (`--load-format`), the experts made into what `--quantization` says. Raises BadCheckpoint, BadConfig. LOCAL."""
    found = draw(config.model) if config.load_format == "dummy" else Checkpoint.open(config.model)
    return found.served_as(_quantized(config, found.config))


def described(config: ServeConfig) -> bytes:
    """What `KnownCheckpoint` is made from: the shape of what is served. Raises BadCheckpoint, BadConfig. LOCAL."""
    return msgspec.msgpack.encode(_quantized(config, ModelConfig.read(config.model)))


def _quantized(config: ServeConfig, model: ModelConfig) -> ModelConfig:
    if config.quantization == "none":
        return model
    if model.expert_format != "plain":
        raise BadConfig(
            f"--quantization {config.quantization}: the experts of {config.model} are {model.expert_format} already "
            "(config.json, quantization_config): leave the flag out"
        )
    return replace(model, expert_format=config.quantization)


class KnownCheckpoint:
    """What `Checkpoint` offers to a rank and to the vault; each reading method opens the files first, when they are
    not open yet, and raises BadCheckpoint when they are gone or hold another model."""

    def __init__(self, config: ServeConfig, description: bytes) -> None:
        """description: from `described`; empty: what is found when something is first read counts. LOCAL, reads
        nothing."""
        self.path = Path(config.model)
        self._served, self._description = config, description

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shapes, as they were at the start."""
        if not self._description:
            return self._found.config
        return msgspec.msgpack.decode(self._description, type=ModelConfig)

    def read_expert(self, layer: int, expert: int, out: npt.NDArray[np.uint8], dtype: torch.dtype) -> None:
        """See `Checkpoint.read_expert`. LOCAL."""
        self._found.read_expert(layer, expert, out, dtype)

    def dense_weights(self, dtype: torch.dtype) -> DenseWeights:
        """See `Checkpoint.dense_weights`. LOCAL."""
        return self._found.dense_weights(dtype)

    def dense_parts(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `Checkpoint.dense_parts`. LOCAL."""
        return self._found.dense_parts(dtype)

    @cached_property
    def _found(self) -> Checkpoint:
        found = open_model(self._served)
        if self._description and found.config != self.config:
            raise BadCheckpoint(
                f"{self.path} holds another model than when the service started: put back the one that was served"
            )
        return found
