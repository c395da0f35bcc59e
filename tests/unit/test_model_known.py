"""A checkpoint that was found good at the start, and what can be said of it once it is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from phalanx.config import ServeConfig
from phalanx.errors import BadCheckpoint
from phalanx.model.known import KnownCheckpoint, described
from phalanx.model.loader import Checkpoint
from phalanx.testing.tiny import make_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(make_tiny(tmp_path / "model", "mixtral", layers=2, experts=4))


def served(model: Path) -> ServeConfig:
    return ServeConfig(model=str(model))


def expert_of(checkpoint: Checkpoint | KnownCheckpoint) -> bytes:
    config = checkpoint.config
    out = np.empty(3 * config.hidden * config.expert_width * 2, np.uint8)
    checkpoint.read_expert(1, 3, out, torch.bfloat16)
    return out.tobytes()


def test_it_reads_what_the_checkpoint_itself_reads(model: Path) -> None:
    known, opened = KnownCheckpoint(served(model), described(served(model))), Checkpoint.open(model)
    assert known.config == opened.config
    assert expert_of(known) == expert_of(opened)
    dense, theirs = dict(known.dense_parts(torch.bfloat16)), dict(opened.dense_parts(torch.bfloat16))
    assert dense.keys() == theirs.keys()
    assert all(torch.equal(dense[name], theirs[name]) for name in dense)


def test_when_it_is_gone_its_shapes_are_known_and_reading_says_so_until_it_is_back(model: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(model)
    known, config, wanted = KnownCheckpoint(served(model), described(served(model))), opened.config, expert_of(opened)
    away = tmp_path / "away"
    shutil.move(model, away)
    assert known.config == config
    with pytest.raises(BadCheckpoint, match="is not a directory"):
        known.dense_weights(torch.bfloat16)
    with pytest.raises(BadCheckpoint, match="is not a directory"):
        expert_of(known)
    shutil.move(away, model)
    assert expert_of(known) == wanted


def test_another_model_in_its_place_is_refused(model: Path) -> None:
    known = KnownCheckpoint(served(model), described(served(model)))
    shutil.rmtree(model)
    make_tiny(model, "mixtral", layers=2, experts=8)
    with pytest.raises(BadCheckpoint, match="holds another model than when the service started"):
        expert_of(known)
