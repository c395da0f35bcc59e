"""How fast a rank's slots are filled from the vault, from a peer, from another host's vault and from disk, against a
plain memory copy and a plain socket.

    python benchmarks/restore.py [MODEL] [--turns 5] [--json]

All of it in one run, in turns, on the same experts: a copy of their bytes within memory, all resident; then the
restore that a recovery runs (`elastic.restore`, the check of every digest included) with one source at a time. Without
MODEL a checkpoint is made in a temporary directory, with experts of Qwen3-30B-A3B's size (9.4 MB).

Cold means that the page cache was told to drop the files (posix_fadvise) after they were closed; how many bytes the
kernel then read from the device is shown beside it.

The other host is a process on this one that serves a vault at 127.0.0.2, so both ends share these cores, and there is
no network between them: what is measured is what our part costs. Beside it stands a raw copy through one TCP socket:
another process sends as many bytes from its memory, this one receives them into slots. As both ends want the same
cores, the processor time of both together is shown too; for the other host's vault it includes the mapping of the
slots' pages, which goes on when the restore is done already and which the raw copy does as it goes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import click
import msgspec
import numpy as np
import torch
from torch.distributed import TCPStore

from phalanx import wire
from phalanx.config import ServeConfig
from phalanx.elastic.agree import Agreed
from phalanx.elastic.replan import Move
from phalanx.elastic.restore import DiskSource, PeerSource, Restore, Source, VaultSource
from phalanx.elastic.store import TcpStore
from phalanx.elastic.vault.memory import Follower, Vault, VaultMemory, VaultShape
from phalanx.elastic.vault.mooncake import MooncakeTransport
from phalanx.elastic.vault.remote import Remote
from phalanx.elastic.vault.shares import Share
from phalanx.elastic.vault.stall import serve
from phalanx.elastic.vault.transport import Stall, TcpTransport, Transport, stall_key
from phalanx.model.loader import Checkpoint
from phalanx.moe.experts import SlotBank, digest
from phalanx.process import VaultSpec
from phalanx.testing.tiny import make_tiny
from phalanx.wire import Site
from phalanx.world import Member, Placement, View

DTYPE = torch.bfloat16
TOKEN = b"a token for this run"
KINDS = ("memcpy", "vault", "peer", "socket", "vault, tcp", "vault, mooncake", "disk, warm", "disk, cold")


class Rig:
    """A rank with empty slots, a peer that holds every expert, a full vault, and the checkpoint."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        model = Checkpoint.open(path).config
        self.moves = [
            Move(layer, expert, expert) for layer in range(model.num_moe_layers) for expert in range(model.num_experts)
        ][:limit]
        shape = model.num_moe_layers, model.num_experts, model.hidden, model.expert_width
        self.bank, self._peer = (SlotBank(*shape, DTYPE, model.expert_format) for _ in range(2))
        self.size = len(self.moves) * self.bank.expert_bytes
        memory = VaultMemory(VaultShape(*shape[:2], self.bank.expert_bytes, 0, 1, Share(1, 2, 2)))
        keeper = Vault.open_for_writing(memory.address)
        self._vault = Vault.open(memory.address)
        digest_LE = np.zeros(shape[:2], np.uint64)
        checkpoint = Checkpoint.open(path)
        for layer, slot, expert in self.moves:
            out = self._peer.slot_bytes(layer, slot)
            checkpoint.read_expert(layer, expert, out, DTYPE)
            digest_LE[layer, expert] = found = digest(out.data)
            self._peer.mark(layer, slot, expert, found)
            keeper.write(keeper.shape.expert_start(layer, expert), out)
            keeper.publish(layer, expert, found)
        keeper.publish_dense([])
        follower = Follower(self._vault, interval_s=0.01)
        follower.start()
        if len(self.moves) == digest_LE.size:
            follower.join()
        self._me = Member(0, 0, "here", os.getpid(), "", self.bank.address)
        other = Member(1, 0, "here", os.getpid(), "", self._peer.address)
        held_LP = np.concatenate([self.bank.held_LS, self._peer.held_LS], axis=1)
        wanted_LP = np.concatenate([self._peer.held_LS, self._peer.held_LS], axis=1)
        self._agreed = Agreed(
            View(1, 2, (self._me, other)), Placement(wanted_LP, shape[1], shape[1]), held_LP, digest_LE,
            np.zeros(shape[:2], np.int64), "failure", 0, 0.0,
        )  # fmt: skip
        self._there = OtherHost(memory, len(self.moves) == digest_LE.size)
        self._from, self._to = (np.ones(self.bank.expert_bytes * 16, np.uint8) for _ in range(2))

    @property
    def has_mooncake(self) -> bool:
        """Whether the Transfer Engine is installed; it is offered only for a vault that is full."""
        return self._there.has_mooncake

    def memcpy(self) -> float:
        """Seconds to copy as many bytes as the experts have, in pieces of their size, all of it resident."""
        step = self.bank.expert_bytes
        began = time.perf_counter()
        for i in range(len(self.moves)):
            at = i % 16 * step
            np.copyto(self._to[at : at + step], self._from[at : at + step])
        return time.perf_counter() - began

    def restore(self, source: Source | Remote, name: str = "") -> float:
        """Seconds to restore every expert into empty slots."""
        for layer, slot, _ in self.moves:
            self.bank.clear(layer, slot)
        job = Restore(self.moves, self._agreed, self.bank, (source,))
        began = time.perf_counter()
        job.advance(lambda: True)
        seconds = time.perf_counter() - began
        assert not job.lost
        assert job.bytes_by_source == {name or getattr(source, "name", ""): self.size}
        return seconds

    def vault(self) -> float:
        return self.restore(VaultSource(self._vault))

    def peer(self) -> float:
        source = PeerSource(self._me)
        try:
            return self.restore(source)
        finally:
            source.close()

    def disk(self) -> float:
        return self.restore(DiskSource(Checkpoint.open(self._path), DTYPE))

    def socket(self) -> float:
        """Seconds to receive as many bytes as the experts have from one socket, into empty slots."""
        for layer, slot, _ in self.moves:
            self.bank.clear(layer, slot)
        connection = socket.create_connection(self._there.raw)
        began = time.perf_counter()
        connection.sendall(len(self.moves).to_bytes(8, "little"))
        for layer, slot, _ in self.moves:
            out = self.bank.slot_bytes(layer, slot).data
            at = 0
            while at < len(out):
                at += connection.recv_into(out[at : at + (1 << 20)])
        seconds = time.perf_counter() - began
        connection.close()
        return seconds

    def remote(self, transport: Transport) -> float:
        """Seconds to restore every expert from the other host's vault."""
        source = Remote(self._me, 0, 2, self._there.store, [transport], patience_s=30.0)
        return self.restore(source, "vault_remote")

    def processor_s(self) -> float:
        """Processor time so far of this process and of those that send to it, once nothing is under way."""
        for thread in threading.enumerate():
            if thread.name == "remote":
                thread.join()
        return time.process_time() + self._there.processor_s()

    def forget(self) -> None:
        """Drop the checkpoint's files from the page cache. Nobody has them open now."""
        for file in self._path.glob("*.safetensors"):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class OtherHost:
    """A process that serves the vault as another host would, and one that sends bytes as a raw socket copy does."""

    def __init__(self, memory: VaultMemory, full: bool) -> None:
        self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.store = TcpStore("127.0.0.1", self._server.port)
        self.has_mooncake = importlib.util.find_spec("mooncake") is not None and full
        spec = VaultSpec(
            config=ServeConfig(model="", vault_transport="mooncake" if self.has_mooncake else "tcp"), run_dir="",
            store_host="127.0.0.1", store_port=self._server.port, notices="", launcher_pid=os.getpid(),
            vault=memory.address, site=Site(node_rank=1, host="127.0.0.2", token=TOKEN, nnodes=2),
        )  # fmt: skip
        fork = get_context("fork")
        stall = fork.Process(target=serve, args=(spec, wire.listen("127.0.0.2")), daemon=True)
        stall.start()
        while not self._is_there():
            time.sleep(0.05)
        listener = wire.listen("127.0.0.2")
        self.raw: tuple[str, int] = listener.getsockname()[:2]
        raw = fork.Process(target=send_raw, args=(listener, memory.shape.expert_bytes), daemon=True)
        raw.start()
        self._pids = [process.pid for process in (stall, raw) if process.pid is not None]

    def processor_s(self) -> float:
        """Processor time of both processes so far."""
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self._pids)  # how Linux names another process's clock

    def _is_there(self) -> bool:
        value = self.store.get(stall_key(1))
        if not value:
            return False
        return not self.has_mooncake or bool(msgspec.msgpack.decode(value, type=Stall).mooncake)


def send_raw(listener: socket.socket, size: int) -> None:
    """Send as many times `size` bytes as each caller asks for."""
    data = np.ones(size, np.uint8).data
    while True:
        connection, _ = listener.accept()
        for _ in range(int.from_bytes(connection.recv(8), "little")):
            connection.sendall(data)
        connection.close()


def device_bytes() -> int:
    """What this process has had the kernel read from devices so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@contextmanager
def checkpoint_at(model: str | None, experts: int) -> Iterator[Path]:
    if model:
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield make_tiny(
            Path(directory) / "model", "qwen3-moe", layers=2, experts=experts // 2, hidden=2048, expert_width=768,
            shards=4,
        )  # fmt: skip


@click.command()
@click.argument("model", required=False)
@click.option("--turns", default=5, show_default=True)
@click.option("--experts", default=64, show_default=True, help="How many experts to restore in a turn.")
@click.option("--json", "as_json", is_flag=True)
def main(model: str | None, turns: int, experts: int, as_json: bool) -> None:
    """Time each source, in turns."""
    torch.set_num_threads(1)
    with checkpoint_at(model, experts) as path:
        rig = Rig(path, experts)
        tcp, mooncake = TcpTransport(TOKEN), MooncakeTransport("127.0.0.1", "tcp", "")
        from_device: list[int] = []
        runs: dict[str, Callable[[], float]] = dict(
            zip(
                KINDS,
                (
                    rig.memcpy, rig.vault, rig.peer, rig.socket, lambda: rig.remote(tcp), lambda: rig.remote(mooncake),
                    rig.disk, rig.disk,
                ),
                strict=True,
            )
        )  # fmt: skip
        if not rig.has_mooncake:
            del runs["vault, mooncake"]
        rates: dict[str, list[float]] = {kind: [] for kind in runs}
        spent: dict[str, list[float]] = {kind: [] for kind in runs}
        rig.memcpy()
        for _ in range(turns):
            for kind, run in runs.items():
                if kind == "disk, cold":
                    rig.forget()
                for layer, slot, _ in rig.moves:
                    rig.bank.clear(layer, slot)
                before, began = device_bytes(), rig.processor_s()
                rates[kind].append(rig.size / run() / 1e9)
                spent[kind].append((rig.processor_s() - began) / rig.size * 1e9)
                if kind == "disk, cold":
                    from_device.append(device_bytes() - before)
        report(rig, rates, spent, from_device, as_json)


def over(these: list[float], those: list[float]) -> float:
    """The median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def report(
    rig: Rig, rates: dict[str, list[float]], spent: dict[str, list[float]], from_device: list[int], as_json: bool
) -> None:
    ratios = {kind: over(rates["vault"], rates[kind]) for kind in rates}
    over_socket = {kind: over(rates[kind], rates["socket"]) for kind in rates if kind.startswith("vault, ")}
    result = {
        "machine": platform.processor() or platform.machine(), "kernel": platform.release(),
        "experts": len(rig.moves), "bytes": rig.size, "expert_bytes": rig.bank.expert_bytes,
        "gb_per_s": {kind: statistics.median(values) for kind, values in rates.items()},
        "processor_s_per_gb": {kind: statistics.median(values) for kind, values in spent.items()},
        "vault_over": ratios, "over_socket": over_socket, "cold_bytes_from_device": statistics.median(from_device),
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{len(rig.moves)} experts of {rig.bank.expert_bytes} bytes, {rig.size / 1e9:.2f} GB a turn")
    click.echo(
        f"{'source':15} {'GB/s':>8} {'lowest':>8} {'highest':>8} {'CPU s/GB':>9}   vault is so many times as fast"
    )
    for kind, values in rates.items():
        click.echo(
            f"{kind:15} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f} "
            f"{statistics.median(spent[kind]):9.2f}   {ratios[kind]:.2f}"
        )
    for kind, ratio in over_socket.items():
        click.echo(
            f"{kind} over a raw socket: {ratio:.2f}, {over(spent[kind], spent['socket']):.2f} of its processor time"
        )
    click.echo(f"cold: {statistics.median(from_device) / rig.size:.2f} of the bytes came from the device")


if __name__ == "__main__":
    main()
