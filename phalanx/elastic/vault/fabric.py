"""What this host has to read other hosts' memory with. No torch here: the server says it, too."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress

from phalanx.config import ServeConfig
from phalanx.errors import BadConfig

RDMA_DEVICES = "/sys/class/infiniband"


def rdma_devices() -> list[str]:
    """The names of this host's RDMA devices. LOCAL."""
    with suppress(OSError):
        return sorted(os.listdir(RDMA_DEVICES))
    return []


def chosen(config: ServeConfig) -> str:
    """tcp | mooncake: what vaults of other hosts are read by on this host. BadConfig when it cannot be had. LOCAL."""
    if config.vault_transport == "tcp":
        return "tcp"
    installed = importlib.util.find_spec("mooncake") is not None
    if config.vault_transport == "mooncake" and not installed:
        raise BadConfig(
            "--vault-transport mooncake needs the Transfer Engine: pip install 'phalanx[mooncake]', or choose tcp"
        )
    return "mooncake" if installed and (config.vault_transport == "mooncake" or rdma_devices()) else "tcp"


def check_devices(config: ServeConfig, there: Sequence[str]) -> None:
    """Raise BadConfig for an `--ib-device` that is not `there`, among this host's RDMA devices, when it would be used:
    with several hosts, by the Transfer Engine. LOCAL."""
    named = _named(config)
    if config.nnodes == 1 or not config.ib_device or chosen(config) != "mooncake":
        return
    if not named:
        raise BadConfig(f"--ib-device {config.ib_device!r} names no device: {_choice(there)}")
    if unknown := [name for name in named if name not in there]:
        raise BadConfig(f"--ib-device {','.join(unknown)}: this host has no such RDMA device: {_choice(there)}")


def engine_devices(config: ServeConfig) -> tuple[str, str]:
    """rdma | tcp, and the devices for it, as the Transfer Engine wants to be told. LOCAL."""
    return "rdma" if rdma_devices() else "tcp", ",".join(_named(config))


def _named(config: ServeConfig) -> list[str]:
    """What `--ib-device` names, each once."""
    return list(dict.fromkeys(name for part in config.ib_device.split(",") if (name := part.strip())))


def _choice(there: Sequence[str]) -> str:
    if there:
        return f"name some of {', '.join(there)}, or leave the flag out to use all of them"
    return "it has none, so leave the flag out (the Transfer Engine goes by TCP then)"
