"""The launcher of a further host, with the test itself in the place of the first host."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx import messages as m
from phalanx import wire
from phalanx.hosts.muster import TOKENLESS
from phalanx.hosts.talk import Channel, End, Halted, Hello, Register, StartWorker, ToFirst, Welcome
from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

PATIENCE_S = 60.0
RESET = struct.pack("ii", 1, 0)
"""Closing then breaks a connection, as the death of a machine does when it is up again."""


class First:
    """The first host's side of one connection."""

    def __init__(self, listener: socket.socket) -> None:
        while True:
            self.connection, _ = listener.accept()
            if wire.welcome(self.connection, TOKENLESS, Hello, PATIENCE_S).purpose == "launcher":
                break
            self.connection.close()
        self._channel = Channel(self.connection, ToFirst)
        self.send = self._channel.send

    def hear(self, kind: type[Any]) -> Any:
        """The next message of a kind; others are passed over."""
        while True:
            assert select.select([self.connection], [], [], PATIENCE_S)[0], f"no {kind.__name__} comes"
            for message in self._channel.receive():
                if isinstance(message, kind):
                    return message


@pytest.fixture
def agent(tiny: Path) -> Iterator[tuple[Service, socket.socket]]:
    with wire.listen("127.0.0.1") as listener:
        service = Service(
            str(tiny), "--ep-size", "2", "--nnodes", "2", "--node-rank", "1",
            "--dist-init-addr", wire.address_of(listener), "--peer-timeout", "300", "--roll-call-timeout", "400",
        ).launch()  # fmt: skip
        listener.settimeout(PATIENCE_S)
        yield service, listener
        service.stop()


def test_a_launcher_whose_first_host_hangs_up_asks_again_tells_who_is_stopped_and_ends_cleanly_though_nobody_hears(
    agent: tuple[Service, socket.socket],
) -> None:
    service, listener = agent
    listener.accept()[0].close()  # it was just ending, say: that is no question of tokens
    service.wait_for_line("waiting for the first host at .* hung up at once")
    first = First(listener)
    assert first.hear(Register).node_rank == 1
    first.send(Welcome(cluster="the cluster", session=1, dead=[]))
    first.send(StartWorker(rank=1, incarnation=0))
    worker = first.hear(m.Spawned).pid
    os.kill(worker, signal.SIGSTOP)
    assert (halted := first.hear(Halted)) == Halted(rank=1, incarnation=0, seconds=0.0), halted
    assert first.hear(Halted).seconds > 0, "and so on, for as long as it is stopped"
    first.send(End(reason="it is enough"))
    first.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    first.connection.close()
    assert service.process.wait(PATIENCE_S) == 0
    service.wait_for_line("the service ends: it is enough")
    service.wait_for_line(r"rank 1\.0 .* ended: ")
    assert "Traceback" not in service.whole_log
    assert not os.path.exists(f"/proc/{worker}")
