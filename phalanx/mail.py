"""A worker's mail: the sockets between it and the server, and its knock at the members' doors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import zmq

from phalanx import messages as m
from phalanx.process import WorkerSpec, server_endpoint, worker_endpoint
from phalanx.world import Member, View

MAIL_BOUND = 100_000
"""Messages that may wait in either direction; far beyond what the router lets a rank have."""

KNOCK_LINGER_MS = 1000
"""How long a knock may take to be delivered."""


class Mail:
    """The sockets between this worker and the server."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._run_dir = spec.run_dir
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, MAIL_BOUND)
        self._inbox.bind(worker_endpoint(spec.run_dir, spec.rank, spec.incarnation))
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.setsockopt(zmq.SNDHWM, MAIL_BOUND)
        self._outbox.connect(server_endpoint(spec.run_dir))

    def send(self, message: m.ToServer) -> None:
        """Hand a message to the server. A full queue, with a server that has not read 100,000 messages, is an error:
        no token may be dropped, and no step may wait. LOCAL."""
        self._outbox.send(m.encode(message), zmq.NOBLOCK)

    def drain(self) -> Iterator[m.ToWorker]:
        """What has come in since the last call. LOCAL."""
        with contextlib.suppress(zmq.Again):
            while True:
                yield m.to_worker_decoder.decode(self._inbox.recv(zmq.NOBLOCK))

    def knock(self, view: View, me: Member) -> None:
        """Tell the members of a view that `me` asks to be let in, by way of the server those whose launcher is another.
        LOCAL: who is not there does not hear it."""
        knock = m.Knock(rank=me.rank, incarnation=me.incarnation)
        elsewhere = False
        for member in view.members:
            endpoint = worker_endpoint(self._run_dir, member.rank, member.incarnation)
            if not os.path.exists(endpoint.removeprefix("ipc://")):
                elsewhere = True
                continue
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, KNOCK_LINGER_MS)
            socket.connect(endpoint)
            with contextlib.suppress(zmq.Again):
                socket.send(m.encode(knock), zmq.NOBLOCK)
            socket.close()
        if elsewhere:
            self.send(knock)

    @property
    def wake_fd(self) -> int:
        """Readable when mail came since the last `drain`, which must have gone to its end. LOCAL."""
        return int(self._inbox.getsockopt(zmq.FD))
