"""A service on two hosts for tests: started when it is first wanted, hurt, and mended for whoever wants it next."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asking import becomes
from standing import incarnations
from streams import PROMPTS, SAMPLING, Streams

from phalanx.testing import netns
from phalanx.testing.service import Service, ServiceEnded, flags_of

Unfailed = dict[str, list[Any]]

MEET = 25555
"""Where hosts that have addresses of their own meet."""


class TwoHosts:
    """The two launchers of one service, and what it takes to start, hurt and mend either."""

    first: Service
    other: Service

    def __init__(self, model: Path, ranks: int, hosts: netns.Hosts | None = None, **options: Any) -> None:
        """hosts: None when both are to share the address of this machine."""
        self._model, self._ranks, self._hosts = str(model), ranks, hosts
        self._running: list[Service] = []
        address = self.address(0)
        usual = {"max_num_batched_tokens": 64, "max_restarts": 1000, "peer_timeout": 3, "roll_call_timeout": 8}
        self._options = {
            **usual, "ep_size": ranks, "nnodes": 2, "dist_init_addr": f"{address}:{MEET if hosts else free_port()}",
            "host": address, **options,
        }  # fmt: skip

    @property
    def hosts(self) -> netns.Hosts:
        """With addresses and cables of their own."""
        assert self._hosts
        return self._hosts

    def address(self, host: int) -> str:
        return self._hosts.address(host) if self._hosts else "127.0.0.1"

    def start(self, node_rank: int, **options: Any) -> Service:
        """A host's launcher, started and not waited for."""
        within = self._hosts.within(node_rank) if self._hosts else ()
        flags = flags_of(**{**self._options, "node_rank": node_rank, **options})
        service = Service(self._model, *flags, within=within).launch()
        self._running.append(service)
        return service

    def start_first(self, *, meanwhile: Callable[[], object] = lambda: None) -> None:
        """The first host, until it serves with all ranks. meanwhile: called once it listens."""
        self.first = self.start(0).find_url()
        meanwhile()
        try:
            self.first.wait_for_line(rf"ready: .* on {self._ranks} ranks", 120)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\nand that of the other host:\n{self.other.log}") from None

    def mended(self) -> TwoHosts:
        """With all ranks healthy, whatever the one before did to them."""
        try:
            self._mend()
        except (ServiceEnded, TimeoutError, OSError):
            self.end()
            self._mend()
        return self

    def _mend(self) -> None:
        if not self._running or self.first.process.poll() is not None:
            self.end()
            self.other = self.start(1)
            self.start_first()
        for host in (0, 1) if self._hosts else ():
            self.hosts.heal(host)
        if self.other.process.poll() is not None:
            self.other = self.start(1)
        incarnations(self.first)

    def end(self) -> None:
        """Stop whatever was started."""
        for service in self._running:
            service.stop()
        self._running = []

    def incarnations(self) -> list[int]:
        """Of all ranks, as soon as all are healthy."""
        return incarnations(self.first)

    def hear(self, host: int, state: str) -> None:
        """Wait until the first host's server has heard that a host is in, or lost."""
        becomes(lambda: self.first.status()["hosts"][host]["state"], state)

    def both_kinds(self) -> dict[str, Streams]:
        """Streams of each kind of sampling, all of them under way."""
        running = {kind: Streams(self.first.url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}
        for streams in running.values():
            streams.wait_for_chunks(4)
        return running

    def back(self, *ranks: int, after: int) -> None:
        """Wait until ranks are let in again, from a line of the first host's log on."""
        for rank in ranks:
            self.first.wait_for_line(rf"recovered:.* ranks \[[^]]*\b{rank}\b[^]]*\] rejoined", 90, after=after)


def check(running: dict[str, Streams], unfailed: Unfailed) -> None:
    """Nothing that clients see differs from a service that never failed."""
    for kind, streams in running.items():
        assert streams.join() == unfailed[kind]


def exit_of(service: Service, timeout_s: float = 120) -> int:
    """The exit code of a launcher that ends by itself."""
    return service.process.wait(timeout_s)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
