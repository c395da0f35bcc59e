"""Rank processes for checks and benchmarks of the CUDA communicator: a parent that plays the launcher, and its ranks.

The parent holds the notice board, spawns one process a rank, and drives them with one JSON line a command. No torch
process group, no shared Python state: what ranks know of each other goes through views, as in the service.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from phalanx.comm.cuda import CudaCommunicator  # noqa: E402
from phalanx.comm.launch import LaunchShape  # noqa: E402
from phalanx.comm.notices import NoticeBoard  # noqa: E402
from phalanx.comm.peer_memory import BufferLayout, PeerMemory, PeerMemoryError  # noqa: E402
from phalanx.world import Member, View  # noqa: E402

Reply = dict[str, Any]


class HostSharedMemory(PeerMemory):
    """Peers' buffers in memory files of the host, for kernels that Triton's interpreter runs."""

    def __init__(self, nbytes: int, maps_host: bool) -> None:
        """maps_host: whether kernels can read other processes' host memory; without, a thread copies the notices."""
        self._maps_host = maps_host
        self._fd = os.memfd_create("phalanx-gpu-test")
        os.ftruncate(self._fd, nbytes)
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._nbytes = nbytes
        self.buffer = torch.from_numpy(self._map(self._fd))

    def _map(self, fd: int) -> np.ndarray:
        mapped = mmap.mmap(fd, self._nbytes)
        array = np.frombuffer(mapped, np.uint8)
        self._maps[array.ctypes.data] = (mapped, array)
        return array

    def handle(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def open(self, handle: str) -> int:
        try:
            fd = os.open(handle, os.O_RDWR)
        except OSError as error:
            raise PeerMemoryError(f"{handle}: {error}") from error
        try:
            return int(self._map(fd).ctypes.data)
        finally:
            os.close(fd)

    def unmap(self, pointer: int) -> None:
        del self._maps[pointer]

    def host_words(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def map_readonly(self, words: np.ndarray) -> int | None:
        return int(words.ctypes.data) if self._maps_host else None

    def mark(self) -> None:
        return None

    def passed(self, mark: None) -> bool:
        return True

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait(self) -> None:
        return

    def close(self) -> None:
        os.close(self._fd)


class Rank:
    """The parent's end of one rank process."""

    def __init__(self, rank: int, incarnation: int, device: int, script: str, board: NoticeBoard) -> None:
        self.rank, self.incarnation, self.device = rank, incarnation, device
        self.process = subprocess.Popen(
            [sys.executable, script, "--rank-process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.address = ""
        self.board = board

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def reply(self) -> Reply:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"rank {self.rank}.{self.incarnation} ended with {self.process.wait()}"
        answer: Reply = json.loads(line)
        assert "error" not in answer, f"rank {self.rank}.{self.incarnation}: {answer['error']}"
        return answer

    def member(self) -> dict[str, Any]:
        return {"rank": self.rank, "incarnation": self.incarnation, "comm_address": self.address}

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Party:
    """A set of ranks, in the places 0..R-1, and the launcher's board."""

    def __init__(self, script: str, ep_size: int, devices: int) -> None:
        self.script, self.ep_size, self.devices = script, ep_size, devices
        self.board = NoticeBoard.create(ep_size)
        self.ranks: dict[int, Rank] = {}
        self.epoch = 0
        self.relayed = False
        self.nbytes = 0

    def spawn(self, rank: int, incarnation: int = 0) -> Rank:
        """Start a process for a place; it is no member yet."""
        return Rank(rank, incarnation, rank % max(1, self.devices), self.script, self.board)

    def open(self, members: list[Rank], **config: Any) -> None:
        """Make a communicator in each of the processes."""
        for m in members:
            m.send(
                "open", rank=m.rank, incarnation=m.incarnation, ep_size=self.ep_size, device=m.device,
                board=self.board.address, **config,
            )  # fmt: skip
        for m in members:
            answer = m.reply()
            m.address = answer["address"]
            self.relayed, self.nbytes = answer["relay"], answer["nbytes"]

    def adopt(self, members: list[Rank]) -> dict[int, float]:
        """A new epoch, in which these are in; the seconds that it took each."""
        self.epoch += 1
        self.ranks = {m.rank: m for m in sorted(members, key=lambda m: m.rank)}
        described = [m.member() for m in self.ranks.values()]
        return {rank: a["seconds"] for rank, a in self.all("adopt", epoch=self.epoch, members=described).items()}

    def all(self, do: str, only: list[int] | None = None, **arguments: Any) -> dict[int, Reply]:
        """One command to several ranks at once; their answers."""
        asked = [m for r, m in self.ranks.items() if only is None or r in only]
        for m in asked:
            m.send(do, **arguments)
        return {m.rank: m.reply() for m in asked}

    def close(self) -> None:
        for m in self.ranks.values():
            m.end()
        self.board.close()


@contextlib.contextmanager
def party(script: str, ep_size: int, devices: int) -> Iterator[Party]:
    """`ep_size` processes, ended at the end."""
    p = Party(script, ep_size, devices)
    try:
        p.ranks = {r: p.spawn(r) for r in range(ep_size)}
        yield p
    finally:
        p.close()


class RankProcess:
    """The rank's end: one communicator at a time, commands by name."""

    def __init__(self, commands: dict[str, Callable[..., Reply]] | None = None) -> None:
        self.comm: CudaCommunicator
        self.commands: dict[str, Callable[..., Reply]] = {
            "open": self.open, "adopt": self.adopt, "status": self.status, "close": self.close,
            "mask": self.mask, "gather": self.gather,
        }  # fmt: skip
        self._commands_of = commands or {}

    def run(self) -> None:
        """Until the parent closes its end."""
        for line in sys.stdin:
            said = json.loads(line)
            do = said.pop("do")
            try:
                own = self._commands_of.get(do)
                answer = own(self, **said) if own else self.commands[do](**said)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{do}: {type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)

    def open(
        self, rank: int, incarnation: int, ep_size: int, device: int, board: str, max_tokens: int, hidden: int,
        top_k: int, slots_per_rank: int, interpret: bool = False, maps_host: bool = True,
        shape: dict[str, int] | None = None, **options: Any,
    ) -> Reply:  # fmt: skip
        """The communicator. `shape`: fields of LaunchShape that are not as for any communicator of this width."""
        self.top_k, self.hidden, self.slots_per_rank = top_k, hidden, slots_per_rank
        launch = replace(LaunchShape.of(hidden, pairs=ep_size * max_tokens * top_k), **(shape or {}))
        memory: PeerMemory | None = None
        if interpret:
            itemsize = 1 if options.get("fp8") else 2
            layout = BufferLayout(
                ep_size, max_tokens, hidden, top_k, itemsize, 2, launch.chunks(hidden) * launch.dispatch_groups,
                launch.chunks(hidden) * launch.combine_groups, options.get("mode") == "fast",
            )  # fmt: skip
            memory = HostSharedMemory(layout.nbytes, maps_host)
            self.device = torch.device("cpu")
        else:
            self.device = torch.device("cuda", device)
            torch.cuda.set_device(self.device)
        self.options = options
        self.incarnation = incarnation
        self.comm = CudaCommunicator(
            rank, ep_size, incarnation=incarnation, max_tokens=max_tokens, hidden=hidden, top_k=top_k,
            slots_per_rank=slots_per_rank, notices=NoticeBoard.open(board), memory=memory, shape=launch,
            device=self.device, **options,
        )  # fmt: skip
        return {"address": self.comm.address, "relay": self.comm.relayed, "nbytes": self.comm.layout.nbytes}

    def adopt(self, epoch: int, members: list[dict[str, Any]]) -> Reply:
        view = View(epoch, self.comm.ep_size, tuple(Member(**m) for m in members))
        began = time.monotonic()
        self.comm.adopt(view)
        return {"seconds": time.monotonic() - began}

    def status(self) -> Reply:
        status = self.comm.status()
        return {
            "lost": sorted(status.lost), "interrupted": status.interrupted, "causes": dict(status.causes),
            "detect_s": dict(status.detect_s), "mask": self.comm.query_mask().tolist(),
        }  # fmt: skip

    def mask(self, rank: int, alive: bool) -> Reply:
        self.comm.update_mask(rank, alive)
        return {}

    def gather(self, row: list[int]) -> Reply:
        return {"rows": self.comm.all_gather(torch.tensor(row, dtype=torch.int64)).tolist()}

    def close(self) -> Reply:
        self.comm.close()
        return {}


@dataclass(frozen=True)
class Death:
    """A SIGKILL as the launcher sees it, in monotonic nanoseconds: a pipe hangs up, later the process is reaped."""

    killed_ns: int
    hung_up_ns: int
    reaped_ns: int


def kill(rank: Rank) -> Death:
    """SIGKILL; the notice goes out at the first sign, the hang-up of a pipe that the process opened before CUDA."""
    assert rank.process.stdout is not None
    killed = time.monotonic_ns()
    rank.signal(signal.SIGKILL)
    while os.read(rank.process.stdout.fileno(), 4096):
        pass
    hung_up = time.monotonic_ns()
    rank.board.declare_dead(rank.rank, rank.incarnation, "signal")
    rank.process.wait()
    return Death(killed, hung_up, time.monotonic_ns())


def watchdog(seconds: float) -> None:
    """End this process, and by their closed pipes its ranks, when a check hangs."""

    def expire() -> None:
        print(f"FAILED: not done after {seconds:.0f} s", flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
