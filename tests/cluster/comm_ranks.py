"""Ranks for tests of the communicator: forked processes that the test, as their launcher, talks to over sockets."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

from phalanx.comm.cpu import CpuCommunicator
from phalanx.comm.notices import NoticeBoard
from phalanx.wire import Site
from phalanx.world import Member, View

PATIENCE_S = 60.0
"""No test waits longer than this for an event that should come."""

PEER_TIMEOUT_S = 20.0
"""Of ranks that are not told otherwise: longer than anything takes, so that nobody is suspected for being slow."""

HIDDEN, TOP_K, SLOTS, MAX_TOKENS = 24, 3, 4, 17

SHAPE = {"hidden": HIDDEN, "top_k": TOP_K, "slots_per_rank": SLOTS, "max_tokens": MAX_TOKENS}

TOKEN = b"what only the ranks of this test know"

Hosts = Callable[[int], str]
"""The name of the host that a rank pretends to be on."""


class Channel:
    """Whole JSON values in both directions."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("r")

    def tell(self, value: Any) -> None:
        self.sock.sendall(json.dumps(value).encode() + b"\n")

    def hear(self) -> Any:
        self.sock.settimeout(PATIENCE_S)
        line = self._file.readline()
        assert line, "the other side ended without a word"
        return json.loads(line)

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing comes within that time."""
        return not select.select([self.sock], [], [], seconds)[0]


class Node:
    """What a rank's body gets: its communicator and the channel to the test."""

    def __init__(self, rank: int, incarnation: int, comm: CpuCommunicator, channel: Channel) -> None:
        self.rank, self.incarnation, self.comm, self.channel = rank, incarnation, comm, channel
        self.tell, self.hear = channel.tell, channel.hear

    def adopt(self) -> None:
        """Adopt the view that the test sends next."""
        epoch, members = self.hear()
        ep_size = self.comm.ep_size
        self.comm.adopt(View(epoch, ep_size, tuple(Member(r, i, host, comm_address=a) for r, i, host, a in members)))

    def tell_status(self) -> None:
        status = self.comm.status()
        self.tell(
            {
                "lost": sorted(status.lost),
                "interrupted": status.interrupted,
                "causes": dict(status.causes),
                "detect_s": dict(status.detect_s),
            }
        )


CLEAN = {"lost": [], "interrupted": 0, "causes": {}, "detect_s": {}}

Body = Callable[[Node], None]


def masks_rank_0(node: Node) -> None:
    """Send to rank 0, mask it in mid-round, and go on alone for as many collectives as reuse every buffer."""
    node.adopt()
    slots = torch.zeros(1, TOP_K, dtype=torch.int32)
    with node.comm.patience(PATIENCE_S):
        node.comm.dispatch(torch.ones(1, HIDDEN, dtype=node.comm.dtype), slots)
    node.comm.update_mask(0, False)
    for _ in range(3):
        node.comm.barrier()
    node.tell_status()
    node.hear()


class Ranks:
    """The test's side. Use as a context manager: it kills what still runs, by pid."""

    def __init__(
        self,
        ep_size: int,
        *,
        peer_timeout_s: float = PEER_TIMEOUT_S,
        elastic: bool = True,
        board: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        hosts: Hosts | None = None,
        shape: dict[str, int] = SHAPE,
    ) -> None:
        """hosts: None: all ranks know of one host only. shape: of what they exchange."""
        self.ep_size, self.dtype, self._hosts = ep_size, dtype, hosts
        self._options: dict[str, Any] = {"peer_timeout_s": peer_timeout_s, "elastic": elastic, **shape}
        if hosts:
            self._options["site"] = Site(node_rank=0, host="127.0.0.1", token=TOKEN)
        self.board = NoticeBoard.create(ep_size) if board else None
        self._board_address = self.board.address if self.board else ""
        self.pids: dict[int, int] = {}
        self.channels: dict[int, Channel] = {}
        self.members: dict[int, Member] = {}
        self._all_pids: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._all_pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if self.board:
            self.board.close()

    def spawn(
        self, rank: int, body: Body, *, incarnation: int = 0, fault_point: Callable[[Channel, str], None] | None = None
    ) -> None:
        """Fork a rank that runs `body`, and take its address."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._run(rank, incarnation, body, Channel(theirs), fault_point)
        theirs.close()
        self._all_pids.append(pid)
        self.pids[rank], self.channels[rank] = pid, Channel(ours)
        host = self._hosts(rank) if self._hosts else "localhost"
        self.members[rank] = Member(rank, incarnation, host, pid, self.channels[rank].hear())

    def _run(self, rank: int, incarnation: int, body: Body, channel: Channel, fault_point: Any) -> None:
        try:
            # As ranks do; what the test computed before may have left threads that a fork lacks.
            torch.set_num_threads(1)
            board = NoticeBoard.open(self._board_address) if self.board else None
            comm = CpuCommunicator(
                rank,
                self.ep_size,
                incarnation=incarnation,
                dtype=self.dtype,
                notices=board,
                fault_point=(lambda name: fault_point(channel, name)) if fault_point else None,
                **self._options,
            )
            channel.tell(comm.address)
            body(Node(rank, incarnation, comm, channel))
            os._exit(0)
        except BaseException:
            channel.tell({"error": traceback.format_exc()})
            os._exit(1)

    def start(self, *bodies: Body) -> None:
        """Fork every rank, with its own body or all with the one that there is, and send them the first view."""
        for rank in range(self.ep_size):
            self.spawn(rank, bodies[rank % len(bodies)])
        self.meet(1)

    def meet(self, epoch: int, ranks: list[int] | None = None, tell: list[int] | None = None) -> None:
        """Send `ranks` (or only those in `tell`) the view of all of them."""
        ranks = sorted(self.members) if ranks is None else ranks
        members = [(m.rank, m.incarnation, m.host, m.comm_address) for m in (self.members[r] for r in ranks)]
        for rank in ranks if tell is None else tell:
            self.channels[rank].tell([epoch, members])

    def hear(self, rank: int) -> Any:
        value = self.channels[rank].hear()
        assert not (isinstance(value, dict) and "error" in value), value["error"]
        return value

    def tell(self, rank: int, value: Any = None) -> None:
        self.channels[rank].tell(value)

    def kill(self, rank: int, *, notice: bool = True) -> None:
        """SIGKILL, and a notice as soon as the process has ended."""
        os.kill(self.pids[rank], signal.SIGKILL)
        self.bury(rank, notice=notice)

    def bury(self, rank: int, *, notice: bool = True) -> None:
        """Wait until the process has ended, without reaping it, and put up the notice."""
        os.waitid(os.P_PID, self.pids[rank], os.WEXITED | os.WNOWAIT)
        if notice and self.board:
            self.board.declare_dead(rank, self.members[rank].incarnation, "signal")

    @contextmanager
    def stopped(self, rank: int) -> Iterator[None]:
        """The rank is stopped within the block."""
        os.kill(self.pids[rank], signal.SIGSTOP)
        os.waitid(os.P_PID, self.pids[rank], os.WSTOPPED)
        yield
        os.kill(self.pids[rank], signal.SIGCONT)
