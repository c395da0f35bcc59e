"""Fixtures: a small model directory, and servers over fake ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_cluster import Cluster, running, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="session")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One healthy service that many tests share."""
    with running(Cluster(model, tmp_path_factory.mktemp("run"))) as service:
        yield service


@pytest.fixture
def make_cluster(model: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Services for one test, ended with it."""
    with ExitStack() as stack:

        def make(**options: object) -> Cluster:
            return stack.enter_context(running(Cluster(model, tmp_path, **options)))  # type: ignore[arg-type]

        yield make
