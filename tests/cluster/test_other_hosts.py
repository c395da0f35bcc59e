"""Restoring from other hosts for real: processes that serve vaults over TCP are killed, stopped, lie and come back."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from other_hosts import EXPERTS, LAYERS, PATIENCE_S, TOKEN, Host, agreed, content
from torch.distributed import TCPStore

from phalanx import wire
from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.custodian import Custodian
from phalanx.elastic.agree import Agreed
from phalanx.elastic.replan import diff
from phalanx.elastic.restore import Restore
from phalanx.elastic.store import TcpStore
from phalanx.elastic.vault import keeper
from phalanx.elastic.vault.memory import Vault
from phalanx.elastic.vault.mooncake import MooncakeTransport
from phalanx.elastic.vault.remote import Remote
from phalanx.elastic.vault.room import room_for
from phalanx.elastic.vault.shares import Share
from phalanx.elastic.vault.transport import (
    Gate,
    Greeting,
    Piece,
    Request,
    Stall,
    TcpTransport,
    Transport,
    send_request,
    stall_key,
)
from phalanx.model.loader import Checkpoint
from phalanx.moe.experts import SlotBank, digest
from phalanx.process import VaultSpec
from phalanx.testing.damage import damage_vault
from phalanx.testing.tiny import make_tiny
from phalanx.wire import Site
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
        self.client = TcpStore("127.0.0.1", self.store.port)
        self.hosts: list[Host] = []
        self.bank = SlotBank(LAYERS, EXPERTS, WIDTH, WIDTH, torch.float32)
        self.me = Member(0, 0, "127.0.0.1", os.getpid(), "", self.bank.address)
        self.disk = Disk()
        self.patience_s = 20.0
        self.token = TOKEN
        self.wanted = np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1))

    def add(self, *nodes: int, nnodes: int, copies: int = 2, kind: str = "tcp", empty: bool = False) -> None:
        for node_rank in nodes:
            host = Host(node_rank, self.store, SIZE, nnodes, copies, empty=empty, transport=kind)
            self.hosts.append(host.start(by_mooncake=kind == "mooncake"))

    def stall(self, node_rank: int) -> Stall:
        value = self.client.get(stall_key(node_rank))
        assert value
        return msgspec.msgpack.decode(value, type=Stall)

    def remote(self, kind: str = "tcp", nnodes: int = 2) -> Remote:
        way: Transport = TcpTransport(self.token) if kind == "tcp" else MooncakeTransport("127.0.0.1", "tcp", "")
        return Remote(self.me, 0, nnodes, TcpStore("127.0.0.1", self.store.port), [way], self.patience_s)

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


def test_without_the_clusters_token_nothing_is_given_and_nothing_is_taken(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2)
    cluster.token = b"the token of another cluster"
    job = cluster.restore(cluster.remote())
    cluster.assert_right(job)
    assert count(job) == {"disk": len(MANY)}


def test_a_request_that_makes_no_sense_ends_its_connection_and_no_other(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2)
    stall = cluster.stall(1)
    end = cluster.hosts[0].vault.shape.total_bytes
    no_slots = "/proc/1/fd/1:1:1:64:00"
    for request in (
        Request([(end - 10, 11)]), Request([(-1, 1)]), Request([(0, 1)], slots="/etc/passwd:1:1:1:00"),
        Request([(0, 1)], slots=no_slots), Request([(0, 1)], slots="?"),
    ):  # fmt: skip
        caller = wire.connect(stall.tcp, TOKEN, Greeting(stall.memory), 20)
        send_request(caller, request)
        assert caller.recv(1) == b"", request
        caller.close()
    another = wire.connect(stall.tcp, TOKEN, Greeting("of a vault that was here before"), 20)
    assert another.recv(1) == b""
    cluster.assert_right(cluster.restore(cluster.remote()))


@BOTH
def test_a_damaged_expert_comes_from_the_next_host_that_has_it(cluster: Cluster, kind: str) -> None:
    cluster.add(1, 2, nnodes=3, copies=3, kind=kind)
    damaged = damage_vault(cluster.hosts[0].memory.address, layer=1)
    assert damaged == EXPERTS
    job = cluster.restore(cluster.remote(kind, nnodes=3))
    cluster.assert_right(job)
    assert count(job) == {"vault_remote": len(MANY)}
    damage_vault(cluster.hosts[1].memory.address, layer=1)
    for slot in range(EXPERTS):
        cluster.bank.clear(1, slot)
    job = cluster.restore(cluster.remote(kind, nnodes=3))
    cluster.assert_right(job)
    assert count(job) == {"disk": EXPERTS}, "damaged on both"


class Liar(threading.Thread):
    """Stands where a host's stall stood, knows the token, and gives the true bytes up to a point. Then it hangs up, or
    gives a byte now and then."""

    def __init__(self, cluster: Cluster, image: bytes, honest: int, *, drips: bool = False) -> None:
        super().__init__(daemon=True)
        self._image, self._honest, self._drips = image, honest, drips
        self._listener = wire.listen("127.0.0.1")
        found = msgspec.structs.replace(cluster.stall(1), tcp=wire.address_of(self._listener), life="a liar's")
        cluster.store.set(stall_key(1), msgspec.msgpack.encode(found))
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            wire.welcome(connection, TOKEN, Greeting, 20)
            while head := connection.recv(4, socket.MSG_WAITALL):
                body = connection.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL)
                for start, size in msgspec.msgpack.decode(body, type=Request).ranges:
                    data = self._image[start : start + size]
                    part, self._honest = data[: max(0, self._honest)], self._honest - len(data)
                    connection.sendall(part)
                    if len(part) < len(data):
                        while self._drips and not self.done.wait(0.02):
                            connection.sendall(b"!")
                        return
        except OSError:
            pass
        finally:
            connection.close()


@pytest.mark.parametrize("drips", [False, True], ids=["short", "too slow"])
def test_what_came_whole_is_kept_and_what_came_short_is_taken_from_the_next_source(
    cluster: Cluster, drips: bool
) -> None:
    cluster.add(1, nnodes=2)
    cluster.patience_s = 2.0
    shape = cluster.hosts[0].vault.shape
    image = cluster.hosts[0].vault.everything.tobytes()
    liar = Liar(cluster, image, honest=shape.index_bytes + 3 * SIZE + 100, drips=drips)
    liar.start()
    job = cluster.restore(cluster.remote())
    cluster.assert_right(job)
    assert count(job) == {"vault_remote": 3, "disk": len(MANY) - 3}
    liar.done.set()


def test_live_replicas_on_another_hosts_ranks_are_read_where_no_vault_has_them(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2, empty=True)
    peer = SlotBank(LAYERS, EXPERTS, WIDTH, WIDTH, torch.float32)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        data = content(layer, expert, SIZE)
        if (layer, expert) == (1, 3):
            peer.borrow(layer, expert, expert, digest(data.data), data)
            continue
        peer.slot_bytes(layer, expert)[:] = data
        peer.mark(layer, expert, expert, digest(data.data))
    there = Member(1, 0, "127.0.0.2", os.getpid(), "", peer.address)
    job = cluster.restore(cluster.remote(), there)
    cluster.assert_right(job)
    assert count(job) == {"peer_remote": len(MANY) - 1, "disk": 1}, "the one that it borrows is not in its slot"
    peer.close()


def test_a_restore_that_is_given_up_leaves_slots_alone_however_late_the_bytes_come(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2)
    remote = cluster.remote()
    cluster.hosts[0].signal(signal.SIGSTOP)
    first = cluster.job(remote)
    first.advance(lambda: True, wait_s=0)
    assert first.remaining == len(MANY), "all is asked for, nothing comes"
    second = cluster.job(Remote(cluster.me, 0, 1, TcpStore("127.0.0.1", cluster.store.port), [], 1.0))
    remote.adopt(agreed((cluster.me,), cluster.wanted, cluster.wanted))
    second.advance(lambda: True)
    cluster.hosts[0].signal(signal.SIGCONT)
    cluster.assert_right(second)
    assert remote.poll(0.3) is None
    cluster.assert_right(second)


def test_a_restore_in_the_background_never_waits_for_another_host(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2)
    cluster.hosts[0].signal(signal.SIGSTOP)
    job = cluster.job(cluster.remote())
    passes = 0
    while passes < 100:
        job.advance(lambda: True, wait_s=0)
        passes += 1
    assert job.remaining == len(MANY)
    cluster.hosts[0].signal(signal.SIGCONT)
    while job.remaining:
        job.advance(lambda: True, wait_s=0)
    cluster.assert_right(job)
    assert count(job) == {"vault_remote": len(MANY)}


def test_a_pool_of_streams_is_used_again_and_given_up_with_its_host(cluster: Cluster) -> None:
    cluster.add(1, nnodes=2)
    transport = TcpTransport(TOKEN)
    transport.register(cluster.stall(1))
    vault = cluster.hosts[0].vault
    for _ in range(3):
        pieces = [Piece(vault.shape.expert_start(0, e), np.zeros(SIZE, np.uint8)) for e in range(EXPERTS)]
        came: list[int] = []
        transport.read(1, pieces, 20.0, came.append, Gate())
        assert came == list(range(EXPERTS))
        assert all((piece.out == content(0, e, SIZE)).all() for e, piece in enumerate(pieces))
    transport.drop(1)
    transport.read(1, pieces, 20.0, lambda i: pytest.fail("who gave that?"), Gate())
    transport.close()


@pytest.fixture
def filling(cluster: Cluster, tmp_path: Path) -> Iterator[tuple[Cluster, Custodian]]:
    """Host 1 has a full vault of a small model; host 0 has just been started, without ranks, and its checkpoint has
    been overwritten with zeros meanwhile."""
    model = make_tiny(tmp_path / "model", "qwen3-moe", layers=LAYERS, experts=EXPERTS)
    config = ServeConfig(model=str(model), dtype="float32", warmup_timeout_s=0.05, kv_cache_memory_mb=1)
    checkpoint = Checkpoint.open(model)
    shape = room_for(config, checkpoint, share=Share(1, 2, 2)).shape
    host = Host(1, cluster.store, shape.expert_bytes, nnodes=2, copies=2, empty=True)
    cluster.hosts.append(host)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        out = np.empty(shape.expert_bytes, np.uint8)
        checkpoint.read_expert(layer, expert, out, torch.float32)
        host.vault.write(host.vault.shape.expert_start(layer, expert), out)
        host.vault.publish(layer, expert, digest(out.data))
    del checkpoint
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:start] + bytes(len(data) - start))
    host.start()
    notices = NoticeBoard.create(1)
    site = Site(node_rank=0, host="127.0.0.1", token=TOKEN, nnodes=2)
    custodian = Custodian(config, lambda state: None, site)
    spec = VaultSpec(
        config=config, run_dir=str(tmp_path), store_host="127.0.0.1", store_port=cluster.store.port,
        notices=notices.address, launcher_pid=os.getpid(), vault=custodian.address, site=site,
    )  # fmt: skip

    def ask(spec: VaultSpec) -> None:
        process = get_context("fork").Process(target=keeper.run, args=(spec,), daemon=True)
        process.start()
        assert process.pid is not None
        custodian.born(process.pid, os.pidfd_open(process.pid))

    custodian.start(spec, ask)
    yield cluster, custodian
    custodian.close()
    notices.close()


def test_a_new_hosts_vault_is_filled_from_another_one_and_served_at_once(filling: tuple[Cluster, Custodian]) -> None:
    cluster, custodian = filling
    assert cluster.client.wait(stall_key(0), PATIENCE_S), "it is served while it fills"
    vault, there = Vault.open(custodian.address), cluster.hosts[0].vault
    poller = select.poll()
    poller.register(custodian.pidfd, select.POLLIN)
    while not vault.is_full:
        assert not poller.poll(10), "the keeper ended"
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        mine, theirs = vault.expert(layer, expert), there.expert(layer, expert)
        assert mine is not None
        assert theirs is not None
        assert mine[1] == theirs[1]
        assert (mine[0] == theirs[0]).all(), "not the zeros of the checkpoint"
    vault.close()


def test_a_keeper_that_serves_other_hosts_too_is_asked_to_check_and_mends(filling: tuple[Cluster, Custodian]) -> None:
    _, custodian = filling
    pid, vault = custodian.pid, Vault.open(custodian.address)
    poller = select.poll()
    poller.register(custodian.pidfd, select.POLLIN)
    while not vault.is_full:
        assert not poller.poll(10), "the keeper ended"
    assert damage_vault(custodian.address, layer=1, expert=3) == 1
    os.kill(pid, signal.SIGUSR1)
    while (found := vault.expert(1, 3)) is None or digest(found[0].data) != found[1]:
        assert not poller.poll(10), "the keeper ended"
    del found
    vault.close()


def test_the_process_that_serves_a_vault_is_started_again_where_it_was(filling: tuple[Cluster, Custodian]) -> None:
    cluster, _ = filling
    assert cluster.client.wait(stall_key(0), PATIENCE_S)
    before = after = cluster.stall(0)
    os.kill(int(before.life.split(".")[1]), signal.SIGKILL)
    while after.life == before.life:
        after = cluster.stall(0)
    assert after.tcp == before.tcp
    wire.connect(after.tcp, TOKEN, Greeting(after.memory), PATIENCE_S).close()
