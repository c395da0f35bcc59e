"""Two hosts, each a network namespace with its own address: whole hosts die, cables are pulled, strangers knock."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from streams import PROMPTS, SAMPLING, Streams

from phalanx.testing import netns
from phalanx.testing.service import Service, flags_of

REASON = netns.why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(REASON), reason=REASON)]

MEET = 25555
Unfailed = dict[str, list[Any]]


class Cluster:
    """Two hosts of one service, and what it takes to start either."""

    def __init__(self, stack: ExitStack, hosts: netns.Hosts, model: Path, token: Path, **options: Any) -> None:
        self.hosts, self._stack, self._model, self._token = hosts, stack, str(model), token
        usual = {"ep_size": 4, "max_num_batched_tokens": 64, "max_restarts": 3, "peer_timeout": 4}
        self._options = {**usual, "roll_call_timeout": 10, **options}
        self.first = self.start(0)
        self.other = self.start(1)

    def start(self, node_rank: int, token: Path | None = None, **options: Any) -> Service:
        """A host's launcher, started and not waited for."""
        address = self.hosts.address(0)
        options = {
            **self._options, "nnodes": 2, "node_rank": node_rank, "dist_init_addr": f"{address}:{MEET}",
            "cluster_token_file": token or self._token, "host": address, **options,
        }  # fmt: skip
        service = Service(self._model, *flags_of(**options), within=self.hosts.within(node_rank))
        self._stack.callback(service.stop)
        return service.launch()

    def ready(self) -> Cluster:
        """Wait until all four ranks serve."""
        self.first.find_url()
        self.first.wait_for_line(r"ready: .* on 4 ranks")
        return self

    def both_kinds(self) -> dict[str, Streams]:
        running = {kind: Streams(self.first.url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}
        for streams in running.values():
            streams.wait_for_chunks(4)
        return running

    def status(self) -> dict[str, Any]:
        return self.first.status()

    def incarnations(self) -> list[int]:
        """Of all ranks, when all are healthy."""
        ranks = self.status()["ranks"]
        assert {rank["state"] for rank in ranks} == {"healthy"}, ranks
        return [rank["incarnation"] for rank in ranks]

    def back(self, *ranks: int, after: int) -> None:
        for rank in ranks:
            self.first.wait_for_line(rf"recovered:.* ranks \[[^]]*\b{rank}\b[^]]*\] rejoined", 90, after=after)


@pytest.fixture
def cluster(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    token = tmp_path / "token"
    token.write_text("the secret of a cluster of tests")
    with netns.Hosts(2) as hosts, ExitStack() as stack:
        yield lambda **options: Cluster(stack, hosts, tiny, token, **options)


def check(running: dict[str, Streams], unfailed: Unfailed) -> None:
    for kind, streams in running.items():
        assert streams.join() == unfailed[kind]


def exit_of(service: Service, timeout_s: float = 60) -> int:
    """The exit code of a launcher that ends by itself."""
    return service.process.wait(timeout_s)


def test_two_hosts_serve_as_one_and_a_rank_and_a_whole_host_come_back(
    cluster: Callable[..., Cluster], unfailed: Unfailed
) -> None:
    both = cluster().ready()
    status = both.status()
    assert [rank["host"] for rank in status["ranks"]] == [both.hosts.address(host) for host in (0, 0, 1, 1)]
    assert [(host["state"], host["ranks"]) for host in status["hosts"]] == [("alive", [0, 1]), ("alive", [2, 3])]

    seen, running = both.first.lines, both.both_kinds()
    os.kill(both.first.pid(3), signal.SIGKILL)
    both.back(3, after=seen)
    check(running, unfailed)
    assert both.incarnations() == [0, 0, 0, 1]

    seen, running = both.first.lines, both.both_kinds()
    both.other.process.kill()
    both.first.wait_for_line(r"lost host 1 \(ranks \[2, 3\]\): hang-up", after=seen)
    check(running, unfailed)
    host = both.status()["hosts"][1]
    assert (host["state"], host["reason"][:7]) == ("lost", "hang-up")

    seen, running = both.first.lines, both.both_kinds()
    both.other = both.start(1, elastic_ep_rejoin=True)
    both.back(2, 3, after=seen)
    check(running, unfailed)
    assert both.incarnations() == [0, 0, 1, 2]

    seen, running = both.first.lines, both.both_kinds()
    assert both.other.stop() == 0
    both.first.wait_for_line(r"lost host 1 .*: it was asked to stop", after=seen)
    check(running, unfailed)
    assert both.first.stop() == 0


def test_when_the_cable_is_pulled_the_side_with_the_store_goes_on_and_the_other_returns(
    cluster: Callable[..., Cluster], unfailed: Unfailed
) -> None:
    both = cluster().ready()
    running = both.both_kinds()
    seen = both.first.lines
    workers = [both.first.pid(rank) for rank in (2, 3)]
    both.hosts.cut(1)
    both.first.wait_for_line(r"lost host 1 \(ranks \[2, 3\]\): silent for more than", after=seen)
    both.other.wait_for_line(r"lost the first host: silent for more than 4 s; the ranks \[2, 3\] .* stop serving")
    check(running, unfailed)
    for _ in workers:
        both.other.wait_for_line(r"rank [23]\.0 .* ended: killed by SIGKILL")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    running = both.both_kinds()
    both.hosts.heal(1)
    both.other.wait_for_line(r"host 1 .* is in again")
    both.back(2, 3, after=seen)
    check(running, unfailed)
    assert both.incarnations() == [0, 0, 1, 1]
    assert both.first.stop() == 0
    assert exit_of(both.other) == 0, "the end of the first host is the end of all"


def test_a_service_shrinks_to_either_host_and_grows_again_over_both(
    cluster: Callable[..., Cluster], unfailed: Unfailed
) -> None:
    both = cluster().ready()

    def scale(size: int) -> httpx.Response:
        body = {"new_ep_size": size, "drain_timeout": 0}
        return httpx.post(f"{both.first.url}/scale_elastic_ep", json=body, timeout=180)

    seen, running = both.first.lines, both.both_kinds()
    assert scale(2).json()["ranks"] == [0, 1]
    both.first.wait_for_line("rank 3 is out of use", after=seen)
    assert scale(4).status_code == 200
    check(running, unfailed)
    assert both.incarnations() == [0, 0, 1, 1]

    assert scale(2).status_code == 200
    seen = both.first.lines
    both.other.process.kill()
    both.first.wait_for_line("lost host 1", after=seen)
    answer = scale(4)
    assert (answer.status_code, "rank 2 cannot be started: its host 1 is lost" in answer.text) == (409, True)
    both.other = both.start(1)
    both.first.wait_for_line("host 1 at .* is in", after=seen)
    assert scale(4).status_code == 200

    seen, running = both.first.lines, both.both_kinds()
    body = {"instruction": "scale_down", "params": {"ranks": [0, 1], "drain_timeout": 0}}
    assert httpx.post(f"{both.first.url}/fault_tolerance/apply", json=body, timeout=60).status_code == 202
    both.first.wait_for_line("scaled from 4 to 2 ranks", after=seen)
    check(running, unfailed)
    assert [rank["rank"] for rank in both.status()["ranks"]] == [2, 3]
    for rank in (0, 1):
        both.first.wait_for_line(rf"rank {rank} is out of use", after=seen)
    assert (both.first.stop(), exit_of(both.other)) == (0, 0), "a first host without a rank ends like any other"


def test_strangers_second_claims_and_wrong_tokens_are_refused_and_harm_nothing(
    cluster: Callable[..., Cluster], unfailed: Unfailed, tmp_path: Path
) -> None:
    both = cluster().ready()
    running = both.both_kinds()
    for host in (0, 1):
        ports = open_ports(both.hosts, host)
        assert ports, "each host has a gate"
        for port in ports:
            with (
                socket.create_connection((both.hosts.address(host), port), 10) as stranger,
                suppress(ConnectionError),  # refused before it has said it all
            ):
                stranger.sendall(b"\xff" * 100_000)
            socket.create_connection((both.hosts.address(host), port), 10).close()
    both.first.wait_for_line("refused at .*: .* is no Phalanx")

    wrong = tmp_path / "wrong"
    wrong.write_text("another secret of other people")
    for options, said in [
        ({"token": wrong}, "another cluster token"),
        ({}, "--node-rank 1 is taken by a living host"),
        ({"elastic_ep_rejoin": True}, "--node-rank 1 is taken by a living host"),
    ]:
        late = both.start(1, **options)
        assert exit_of(late) == 2
        late.wait_for_line(rf"phalanx serve: .*{said}")
    check(running, unfailed)
    assert both.incarnations() == [0, 0, 0, 0]


def test_what_cannot_become_a_host_of_the_cluster_is_told_why(tiny: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the secret of a cluster of tests")
    with netns.Hosts(2) as hosts, ExitStack() as stack:
        lonely = Service(
            str(tiny), "--ep-size", "2", "--nnodes", "2", "--node-rank", "1", "--elastic-ep-rejoin",
            "--cluster-token-file", str(token), "--dist-init-addr", f"{hosts.address(0)}:{MEET}",
            within=hosts.within(1),
        )  # fmt: skip
        stack.callback(lonely.stop)
        assert exit_of(lonely.launch()) == 2
        lonely.wait_for_line(r"phalanx serve: --elastic-ep-rejoin: no cluster answers at --dist-init-addr")


def test_a_host_that_was_stopped_returns_and_one_that_lost_the_first_waits_for_the_next_first(tiny: Path) -> None:
    with ExitStack() as stack:

        def start(node_rank: int) -> Service:
            service = Service(
                str(tiny), "--ep-size", "2", "--nnodes", "2", "--node-rank", str(node_rank), "--peer-timeout", "4",
                "--dist-init-addr", f"127.0.0.1:{port}", "--roll-call-timeout", "10",
            )  # fmt: skip
            stack.callback(service.stop)
            return service.launch()

        def ready_first() -> Service:
            first = start(0).find_url()
            first.wait_for_line(r"ready: .* on 2 ranks", 120)
            return first

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        other = start(1)  # the order does not matter
        other.wait_for_line("waiting for the first host at")
        first = ready_first()
        first.wait_for_line("NO --cluster-token-file: whoever reaches --dist-init-addr can join")
        seen = first.lines
        other.process.send_signal(signal.SIGSTOP)
        first.wait_for_line(r"lost host 1 \(ranks \[1\]\): silent for more than", after=seen)
        other.process.send_signal(signal.SIGCONT)
        first.wait_for_line(r"recovered: ranks \[1\] rejoined", 90, after=seen)
        seen = other.lines
        first.process.kill()
        other.wait_for_line(r"lost the first host: hang-up; the ranks \[1\] of this host stop serving", after=seen)
        first = ready_first()
        other.wait_for_line("the first host was started anew", after=seen)
        assert [(rank["incarnation"], rank["state"]) for rank in first.status()["ranks"]] == [(0, "healthy")] * 2
        assert first.stop() == 0, first.log
        assert exit_of(other) == 0, other.log


def open_ports(hosts: netns.Hosts, host: int) -> list[int]:
    """Of a host's TCP listeners, those that others can reach and that are not HTTP."""
    listed = subprocess.run(
        [*hosts.within(host), "cat", "/proc/net/tcp"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    here = "".join(f"{int(part):02X}" for part in reversed(hosts.address(host).split(".")))
    ports = [int(port, 16) for port in re.findall(rf"{here}:([0-9A-F]{{4}}) 00000000:0000 0A", listed)]
    return [port for port in ports if not speaks_http(hosts.address(host), port)]


def speaks_http(address: str, port: int) -> bool:
    try:
        return httpx.get(f"http://{address}:{port}/health", timeout=20).status_code == 200
    except httpx.HTTPError:
        return False
