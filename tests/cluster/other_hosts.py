"""Hosts for tests, all on this one: each has an address of its own, a vault, and a real process that serves it."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import msgspec
import numpy as np
from torch.distributed import TCPStore

from phalanx.config import ServeConfig
from phalanx.elastic.agree import Agreed
from phalanx.elastic.store import TcpStore
from phalanx.elastic.vault.memory import Vault, VaultMemory, VaultShape
from phalanx.elastic.vault.shares import Share
from phalanx.elastic.vault.stall import serve
from phalanx.elastic.vault.transport import Stall, stall_key
from phalanx.moe.experts import digest
from phalanx.process import VaultSpec
from phalanx.wire import Site, listen
from phalanx.world import Member, Placement, View

TOKEN = b"the token of this cluster"
LAYERS, EXPERTS = 2, 8
PATIENCE_S = 120.0


def content(layer: int, expert: int, size: int) -> np.ndarray:
    return np.random.default_rng((layer, expert)).integers(0, 256, size, np.uint8)


class Host:
    """One host's vault, full unless `empty`, and its stall."""

    def __init__(
        self, node_rank: int, store: TCPStore, size: int, nnodes: int, copies: int, *, empty: bool = False,
        transport: str = "tcp",
    ) -> None:  # fmt: skip
        self.site = Site(node_rank=node_rank, host=f"127.0.0.{node_rank + 1}", token=TOKEN, nnodes=nnodes)
        shape = VaultShape(LAYERS, EXPERTS, size, 0, 1, Share(node_rank, nnodes, copies))
        self.memory = VaultMemory(shape)
        self.vault = Vault.open_for_writing(self.memory.address)
        self.vault.publish_dense([])
        for layer, expert in [] if empty else np.argwhere(shape.share_LE).tolist():
            self.fill(layer, expert)
        self._store = TcpStore("127.0.0.1", store.port)
        self._listener = listen(self.site.host)
        self._spec = VaultSpec(
            config=ServeConfig(model="", vault_transport=transport), run_dir="", store_host="127.0.0.1",
            store_port=store.port, notices="", launcher_pid=os.getpid(), vault=self.memory.address, site=self.site,
        )  # fmt: skip
        self.process: BaseProcess | None = None

    def fill(self, layer: int, expert: int) -> None:
        data = content(layer, expert, self.vault.shape.expert_bytes)
        self.vault.write(self.vault.shape.expert_start(layer, expert), data)
        self.vault.publish(layer, expert, digest(data.data))

    def start(self, *, by_mooncake: bool = False) -> Host:
        """Start the process that serves; again: on the same address."""
        key = stall_key(self.site.node_rank)
        self._store.delete(key)
        self.process = get_context("fork").Process(target=serve, args=(self._spec, self._listener), daemon=True)
        self.process.start()
        value = self._store.wait(key, PATIENCE_S)
        while by_mooncake and not (value and msgspec.msgpack.decode(value, type=Stall).mooncake):
            assert self.process.is_alive()
            value = self._store.wait(key, PATIENCE_S)
        assert value, "the stall does not say where it is"
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self._listener.close()
        self.vault.close()
        self.memory.close()


def agreed(members: tuple[Member, ...], held_LP: np.ndarray, wanted_LP: np.ndarray, size: int = 0) -> Agreed:
    """What all agree on, with the true digests of experts of `size` bytes; 0: they are not known."""
    digest_LE = np.zeros((LAYERS, EXPERTS), np.uint64)
    for place in np.ndindex(LAYERS, EXPERTS) if size else ():
        digest_LE[place] = digest(content(*place, size).data)
    view = View(1, wanted_LP.shape[1] // EXPERTS, members)
    zeros = np.zeros((LAYERS, EXPERTS), np.int64)
    return Agreed(view, Placement(wanted_LP, EXPERTS, EXPERTS), held_LP, digest_LE, zeros, "failure", 0, 0.0)
