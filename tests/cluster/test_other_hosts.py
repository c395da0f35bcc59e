"""Restoring from other hosts for real: processes that serve vaults, over TCP, killed, stopped, lying and coming back."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import torch
from other_hosts import EXPERTS, LAYERS, TOKEN, Host, agreed, content
from torch.distributed import TCPStore

from phalanx import wire
from phalanx.elastic.agree import Agreed
from phalanx.elastic.mooncake import MooncakeTransport
from phalanx.elastic.remote import Remote
from phalanx.elastic.replan import diff
from phalanx.elastic.restore import Restore
from phalanx.elastic.store import TcpStore
from phalanx.elastic.transport import Gate, Greeting, Piece, Stall, TcpTransport, Transport, send_request, stall_key
from phalanx.elastic.transport import Request
from phalanx.moe.experts import SlotBank, digest
from phalanx.testing.damage import damage_vault
from phalanx.wire import Refused
from phalanx.world import Member

pytestmark = pytest.mark.cluster

HAS_MOONCAKE = importlib.util.find_spec("mooncake") is not None
BOTH = pytest.mark.parametrize(
    "kind",
    ["tcp", pytest.param("mooncake", marks=pytest.mark.skipif(
        not HAS_MOONCAKE, reason="the Transfer Engine is not installed (pip install 'phalanx[mooncake]')"))],
)  # fmt: skip

WIDTH = 64
SIZE = 3 * WIDTH * WIDTH * 4
MANY = range(LAYERS * EXPERTS)


class Disk:
    """The last source; counts what it was asked."""

    name = "disk"

    def __init__(self, *, broken: bool = False) -> None:
        self.reads = 0
        self._broken = broken

    def adopt(self, agreed: Agreed) -> None: ...

    def copies(self, layer: int, expert: int) -> tuple[Callable[[np.ndarray], None], ...]:
        if self._broken:
            return ()

        def fetch(out: np.ndarray) -> None:
            self.reads += 1
            out[:] = content(layer, expert, out.nbytes)

        return (fetch,)


class Cluster:
    """Host 0, where an empty rank is to be filled, and others that serve their vaults."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.hosts: list[Host] = []
        self.bank = SlotBank(LAYERS, EXPERTS, WIDTH, WIDTH, torch.float32)
        self.me = Member(0, 0, "127.0.0.1", os.getpid(), "", self.bank.address)
        self.disk = Disk()
        self.patience_s = 20.0
        self.wanted = np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1))

    def add(self, *nodes: int, nnodes: int, copies: int = 2, kind: str = "tcp", empty: bool = False) -> None:
        for node_rank in nodes:
            host = Host(node_rank, self.store, SIZE, nnodes, copies, empty=empty, transport=kind)
            self.hosts.append(host.start(by_mooncake=kind == "mooncake"))

    def remote(self, kind: str = "tcp", nnodes: int = 2) -> Remote:
        ways: list[Transport] = [TcpTransport(TOKEN)]
        if kind == "mooncake":
            ways.insert(0, MooncakeTransport("127.0.0.1", "tcp", ""))
        return Remote(self.me, 0, nnodes, TcpStore("127.0.0.1", self.store.port), ways, self.patience_s)

    def job(self, remote: Remote, *others: Member, known: bool = True) -> Restore:
        held = np.concatenate([self.bank.held_LS, *(self.wanted for _ in others)], axis=1)
        wanted = np.concatenate([self.wanted] * (1 + len(others)), axis=1)
        say = agreed((self.me, *others), held, wanted, SIZE if known else 0)
        return Restore(diff(held, say.placement, 0), say, self.bank, (remote, self.disk))

    def restore(self, remote: Remote, *others: Member, known: bool = True) -> Restore:
        job = self.job(remote, *others, known=known)
        job.advance(lambda: True)
        return job

    def assert_right(self, job: Restore) -> None:
        assert job.remaining == 0
        assert job.lost == []
        assert (self.bank.held_LS == self.wanted).all()
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            where = self.bank.weights(layer, expert)[0].data_ptr()
            assert where, "it has a place"
            data = torch.cat([part.reshape(-1) for part in self.bank.weights(layer, expert)]).view(torch.uint8).numpy()
            assert (data == content(layer, expert, SIZE)).all(), (layer, expert)

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        self.bank.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def count(job: Restore) -> dict[str, int]:
    return {source: size // SIZE for source, size in job.bytes_by_source.items()}


@BOTH
@pytest.mark.parametrize("known", [True, False], ids=["digests known", "digests not known"])
def test_all_experts_come_from_another_hosts_vault_and_none_from_disk(cluster: Cluster, kind: str, known: bool) -> None:
    cluster.add(1, nnodes=2, kind=kind)
    job = cluster.restore(cluster.remote(kind), known=known)
    cluster.assert_right(job)
    assert count(job) == {"vault_remote": len(MANY)}
    assert job.seconds_by_source["vault_remote"] > 0
    assert job.learned == (0 if known else len(MANY))


def test_several_hosts_give_their_shares_and_a_host_that_is_lost_is_made_up_for(cluster: Cluster) -> None:
    cluster.add(1, 2, 3, nnodes=4)
    cluster.hosts[1].signal(signal.SIGKILL)
    job = cluster.restore(cluster.remote(nnodes=4))
    cluster.assert_right(job)
    on_0_and_2 = count(job).get("disk", 0)
    assert count(job)["vault_remote"] == len(MANY) - on_0_and_2
    assert on_0_and_2 <= len(MANY) // 4, "only what this host and the lost one had, which has no vault here"


@BOTH
def test_a_host_that_is_killed_in_mid_transfer_costs_no_more_than_the_next_source(cluster: Cluster, kind: str) -> None:
    cluster.add(1, nnodes=2, kind=kind)
    remote = cluster.remote(kind)
    job = cluster.job(remote)
    first = iter([True])
    job.advance(lambda: next(first, False))  # all is asked for
    cluster.hosts[0].signal(signal.SIGKILL)
    job.advance(lambda: True)
    cluster.assert_right(job)


@BOTH
def test_a_host_that_hangs_is_waited_for_no_longer_than_its_patience(cluster: Cluster, kind: str) -> None:
    cluster.add(1, nnodes=2, kind=kind)
    cluster.patience_s = 0.3
    cluster.hosts[0].signal(signal.SIGSTOP)
    remote = cluster.remote(kind)
    job = cluster.restore(remote)
    cluster.assert_right(job)
    assert count(job) == {"disk": len(MANY)}
    cluster.hosts[0].signal(signal.SIGCONT)


def test_a_host_that_comes_back_on_the_same_address_is_read_from_again(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2)
    remote = cluster.remote()
    assert count(cluster.restore(remote)) == {"vault_remote": len(MANY)}
    (host,) = cluster.hosts
    host.signal(signal.SIGKILL)
    cluster.bank.clear(0, 0)
    assert count(cluster.restore(remote)) == {"disk": 1}
    host.start()
    for slot in range(EXPERTS):
        cluster.bank.clear(1, slot)
    job = cluster.restore(remote)
    cluster.assert_right(job)
    assert count(job) == {"vault_remote": EXPERTS}
