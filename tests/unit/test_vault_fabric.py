"""Which engine other hosts' vaults are read with, and on which devices: what can be known at the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.config import ServeConfig
from phalanx.elastic.vault.fabric import check_devices, chosen, engine_devices
from phalanx.errors import BadConfig

THERE = ["mlx5_0", "mlx5_1"]


@pytest.fixture
def with_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the Transfer Engine's package can be found."""
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))


def config(ib_device: str, vault_transport: str = "mooncake", nnodes: int = 2) -> ServeConfig:
    return ServeConfig(model="m", ib_device=ib_device, vault_transport=vault_transport, nnodes=nnodes, ep_size=2)  # type: ignore[arg-type]


@pytest.mark.usefixtures("with_engine")
@pytest.mark.parametrize(
    ("named", "there", "said"),
    [
        ("mlx5_7", THERE, "--ib-device mlx5_7: this host has no such RDMA device: name some of mlx5_0, mlx5_1"),
        ("mlx5_0,mlx5_7, ib9", THERE, "--ib-device mlx5_7,ib9: this host has no such"),
        ("MLX5_0", THERE, "--ib-device MLX5_0"),
        ("mlx5_0;mlx5_1", THERE, "--ib-device mlx5_0;mlx5_1"),
        (" , ", THERE, "--ib-device ' , ' names no device: name some of mlx5_0, mlx5_1"),
        ("mlx5_0", [], "it has none, so leave the flag out"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(named: str, there: list[str], said: str) -> None:
    with pytest.raises(BadConfig) as refused:
        check_devices(config(named), there)
    assert said in str(refused.value)


@pytest.mark.usefixtures("with_engine")
@pytest.mark.parametrize("named", ["", "mlx5_1", "mlx5_0,mlx5_1", " mlx5_1 , mlx5_0,", "mlx5_0,mlx5_0"])
def test_devices_that_are_there_may_be_named_in_any_order(named: str) -> None:
    check_devices(config(named), THERE)


@pytest.mark.usefixtures("with_engine")
def test_a_device_that_nobody_uses_may_have_any_name() -> None:
    check_devices(config("mlx5_7", nnodes=1), THERE)
    check_devices(config("mlx5_7", "tcp"), THERE)
    check_devices(config(""), [])


def test_without_the_engine_a_device_is_used_by_nobody_and_asking_for_the_engine_is_an_error() -> None:
    if chosen(config("", "auto")) == "mooncake":
        pytest.skip("the Transfer Engine is installed here")
    check_devices(config("mlx5_7", "auto"), THERE)
    with pytest.raises(BadConfig, match=r"phalanx\[mooncake\]"):
        check_devices(config("mlx5_7"), THERE)


def test_the_engine_is_told_each_device_once_and_without_blanks() -> None:
    assert engine_devices(config(" mlx5_1, mlx5_0,mlx5_1 ,"))[1] == "mlx5_1,mlx5_0"
    assert engine_devices(config(""))[1] == ""
