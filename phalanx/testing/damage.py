"""Damaging what the vault of a running service holds, as a fault of the memory would."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np

from phalanx.elastic.vault.memory import NAME, Vault, address_at


def vault_of(launcher_pid: int) -> str:
    """The address of the vault that a launcher of this user holds; LookupError when it holds none. LOCAL."""
    directory = f"/proc/{launcher_pid}/fd"
    for name in os.listdir(directory):
        with suppress(OSError):
            if os.readlink(f"{directory}/{name}").startswith(f"/memfd:{NAME} "):
                return address_at(f"{directory}/{name}")
    raise LookupError(f"process {launcher_pid} holds no vault")


def damage_vault(address: str, layer: int | None = None, expert: int | None = None) -> int:
    """Flip one bit in every expert of the vault (of one layer; of one number), and say nothing; how many. LOCAL."""
    vault = Vault.open_for_writing(address)
    filled = np.argwhere(vault.filled_LE).tolist()
    hit = [(at, e) for at, e in filled if layer in (None, at) and expert in (None, e)]
    for place in hit:
        data = vault.expert_bytes(*place)
        data[len(data) // 3] ^= 4
        del data
    vault.close()
    return len(hit)
