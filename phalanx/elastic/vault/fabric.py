"""What this host has to read other hosts' memory with. No torch here: the server says it, too."""

from __future__ import annotations

import importlib.util
import os
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
