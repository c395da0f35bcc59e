"""Two hosts, each a network namespace with its own address: whole hosts die, cables are pulled, strangers knock."""

from __future__ import annotations

import os
import re
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from asking import becomes, eventually, get, instruct, post, states
from two_hosts import TwoHosts, Unfailed, check, exit_of

from phalanx.testing import netns
from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

CUT_OFF = "(hang-up|a connection to it broke)"
"""Whichever of a dead host's connections is seen to end first."""

MUTES = 140
"""More than a listener takes into a handshake at once."""


def test_a_whole_host_dies_and_comes_back_without_an_expert_from_disk(two_hosts: TwoHosts, unfailed: Unfailed) -> None:
    both, addresses = two_hosts, [two_hosts.address(host) for host in (0, 0, 1, 1)]
    for service in (both.first, both.other):
        service.wait_for_line("the vault is full", 90)
    before, status, at_start = both.incarnations(), both.first.status(), restored(both)
    assert [rank["host"] for rank in status["ranks"]] == addresses
    assert [(host["state"], host["ranks"]) for host in status["hosts"]] == [("alive", [0, 1]), ("alive", [2, 3])]

    seen, running = both.first.lines, both.both_kinds()
    both.other.process.kill()
    both.first.wait_for_line(rf"lost host 1 \(ranks \[2, 3\]\): {CUT_OFF}", after=seen)
    both.first.wait_for_line(r"recovered: lost ranks \[[^]]*\b3\b", 90, after=seen)
    check(running, unfailed)
    both.hear(1, "lost")
    assert re.match(CUT_OFF, both.first.status()["hosts"][1]["reason"])
    assert restored(both)["vault_remote"] == at_start["vault_remote"], "all is in the vault of the host that is left"

    seen, running = both.first.lines, both.both_kinds()
    both.other = both.start(1, elastic_ep_rejoin=True)
    both.back(2, 3, after=seen)
    check(running, unfailed)
    assert both.incarnations() == [*before[:2], *(n + 1 for n in before[2:])]
    assert restored(both)["disk"] == at_start["disk"]
    line = both.other.wait_for_line(r"the vault is full: .*", 90)
    assert "from other hosts" in line.group()
    assert get(both.first, "/server_info").json()["vault_transport"] == "tcp"

    seen, running = both.first.lines, both.both_kinds()
    assert both.other.stop() == 0
    both.first.wait_for_line(r"lost host 1 .*: it was asked to stop", after=seen)
    check(running, unfailed)


def test_when_the_cable_is_pulled_the_side_with_the_store_goes_on_and_the_other_returns(
    two_hosts: TwoHosts, unfailed: Unfailed
) -> None:
    both, before = two_hosts, two_hosts.incarnations()
    running = both.both_kinds()
    for _ in range(5):  # a loose contact is no cut
        both.hosts.cut(1)
        both.hosts.heal(1)
    check(running, unfailed)
    assert both.incarnations() == before

    seen, other_seen, running = both.first.lines, both.other.lines, both.both_kinds()
    workers = [both.first.pid(rank) for rank in (2, 3)]
    both.hosts.cut(1)
    both.first.wait_for_line(r"lost host 1 \(ranks \[2, 3\]\): silent for more than", after=seen)
    both.other.wait_for_line(
        r"lost the first host: silent for more than 3 s; the ranks \[2, 3\] .* stop serving", after=other_seen
    )
    check(running, unfailed)
    for rank in (2, 3):
        both.other.wait_for_line(rf"rank {rank}\.{before[rank]} .* ended: killed by SIGKILL", after=other_seen)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    running = both.both_kinds()
    both.hosts.heal(1)
    both.other.wait_for_line(r"host 1 .* is in again", after=other_seen)
    both.back(2, 3, after=seen)
    check(running, unfailed)
    assert both.incarnations() == [*before[:2], *(n + 1 for n in before[2:])]


def test_a_rank_returns_and_wrong_hosts_are_told_why_while_strangers_shout_and_others_hold_every_place_in_silence(
    two_hosts: TwoHosts, unfailed: Unfailed, tmp_path: Path
) -> None:
    both, before = two_hosts, two_hosts.incarnations()
    wrong = tmp_path / "wrong"
    wrong.write_text("another secret of other people")
    seen, running = both.first.lines, both.both_kinds()
    with ExitStack() as stack:
        for host in (0, 1):
            ports = open_ports(both.hosts, host)
            assert len(ports) == 4, "each host has a gate, a stall and two ranks"
            for port in ports:
                shout_at(both.address(host), port)
                for _ in range(MUTES):
                    stack.enter_context(socket.create_connection((both.address(host), port), 10))
        os.kill(both.first.pid(3), signal.SIGKILL)
        late = [
            (both.start(1, cluster_token_file=wrong), "another cluster token"),
            (both.start(1), "--node-rank 1 is taken by a living host"),
            (both.start(1, elastic_ep_rejoin=True), "--node-rank 1 is taken by a living host"),
        ]
        both.back(3, after=seen)
        for service, said in late:
            assert exit_of(service) == 2
            service.wait_for_line(rf"phalanx serve: .*{said}")
    both.first.wait_for_line("refused at .*: .* is no Phalanx", after=seen)
    check(running, unfailed)
    assert both.incarnations() == [*before[:3], before[3] + 1]


def test_a_service_shrinks_to_either_host_and_grows_again_over_both(two_hosts: TwoHosts, unfailed: Unfailed) -> None:
    """The last of its service: it ends with it."""
    both, before = two_hosts, two_hosts.incarnations()

    def scale(size: int) -> httpx.Response:
        return post(both.first, "/scale_elastic_ep", {"new_ep_size": size, "drain_timeout": 0}, timeout_s=180)

    seen, running = both.first.lines, both.both_kinds()
    assert scale(2).json()["ranks"] == [0, 1]
    both.first.wait_for_line("rank 3 is out of use", after=seen)
    assert scale(4).status_code == 200
    check(running, unfailed)
    assert both.incarnations() == [*before[:2], *(n + 1 for n in before[2:])]

    assert scale(2).status_code == 200
    seen = both.first.lines
    both.other.process.kill()
    both.first.wait_for_line("lost host 1", after=seen)
    both.hear(1, "lost")
    answer = scale(4)
    assert (answer.status_code, "rank 2 cannot be started: its host 1 is lost" in answer.text) == (409, True)
    both.other = both.start(1)
    both.first.wait_for_line("host 1 at .* is in", after=seen)
    both.hear(1, "alive")
    assert scale(4).status_code == 200

    seen, running = both.first.lines, both.both_kinds()
    assert instruct(both.first, "scale_down", ranks=[0, 1], drain_timeout=0).status_code == 202
    both.first.wait_for_line("scaled from 4 to 2 ranks", after=seen)
    check(running, unfailed)
    becomes(lambda: sorted(states(both.first)), [2, 3])
    for rank in (0, 1):
        both.first.wait_for_line(rf"rank {rank} is out of use", after=seen)
    assert (both.first.stop(), exit_of(both.other)) == (0, 0), "a first host without a rank ends like any other"


def test_a_host_that_is_to_come_back_says_when_there_is_no_cluster(tiny: Path) -> None:
    lonely = Service(
        str(tiny), "--ep-size", "2", "--nnodes", "2", "--node-rank", "1", "--elastic-ep-rejoin",
        "--dist-init-addr", "127.0.0.1:1",
    ).launch()  # fmt: skip
    assert exit_of(lonely) == 2
    lonely.wait_for_line(r"phalanx serve: --elastic-ep-rejoin: no cluster answers at --dist-init-addr")


def test_a_first_host_that_is_left_without_a_rank_before_any_world_ends(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHALANX_FAULTS", "stop@start:rank=0,stop@start:rank=1")
    pair = TwoHosts(tiny, 2, enable_chaos=True)
    try:
        first, other = pair.start(0).find_url(), pair.start(1)
        first.wait_for_line(r"host 1 at .* is in")
        eventually(lambda: first.pid(0) > 0)
        first.signal(0, signal.SIGKILL)
        first.wait_for_line(r"rank 0\.0 .* ended: killed by SIGKILL")
        other.process.kill()
        assert exit_of(first) == 1
        first.wait_for_line("no rank lived to the first meeting: stopping the service")
    finally:
        pair.end()


def test_an_expert_that_no_vault_of_the_host_has_comes_from_the_other_hosts_and_none_from_disk(
    neighbours: TwoHosts, unfailed: Unfailed
) -> None:
    for service in (neighbours.first, neighbours.other):
        service.wait_for_line("the vault is full", 90)
    before = restored(neighbours)
    seen, running = neighbours.first.lines, neighbours.both_kinds()
    os.kill(neighbours.first.pid(1), signal.SIGKILL)
    neighbours.back(1, after=seen)
    check(running, unfailed)
    found = restored(neighbours)
    assert found["vault_remote"] > before["vault_remote"]
    assert found["disk"] == before["disk"]


def test_a_host_that_was_stopped_returns_and_one_that_lost_the_first_waits_for_the_next_first(
    neighbours: TwoHosts,
) -> None:
    both = neighbours
    both.first.wait_for_line("NO --cluster-token-file: whoever reaches --dist-init-addr can join")
    seen = both.first.lines
    both.other.process.send_signal(signal.SIGSTOP)
    both.first.wait_for_line(r"lost host 1 \(ranks \[1\]\): silent for more than", after=seen)
    both.other.process.send_signal(signal.SIGCONT)
    both.back(1, after=seen)
    seen = both.other.lines
    both.first.process.kill()
    both.other.wait_for_line(
        rf"lost the first host: {CUT_OFF}.*; the ranks \[1\] of this host stop serving", after=seen
    )
    both.other.wait_for_line("waiting for the first host at", after=seen)
    both.other.process.send_signal(signal.SIGSTOP)

    def come_late() -> None:
        both.first.wait_for_line(r"rank 0\.0: waiting for ranks 1\.0 to meet for World 1; ")
        both.other.process.send_signal(signal.SIGCONT)

    both.start_first(meanwhile=come_late)
    both.other.wait_for_line("the first host was started anew", after=seen)
    assert both.incarnations() == [0, 0]
    assert both.first.stop() == 0, both.first.log
    assert exit_of(both.other) == 0, both.other.log


SOURCES = ("peer", "vault", "peer_remote", "vault_remote", "disk")


def restored(both: TwoHosts) -> dict[str, int]:
    """Bytes, by source."""
    text = get(both.first, "/metrics").text
    rows = re.findall(r'^phalanx_expert_bytes_restored_total\{source="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {**dict.fromkeys(SOURCES, 0), **{source: int(float(count)) for source, count in rows}}


def shout_at(address: str, port: int) -> None:
    with socket.create_connection((address, port), 10) as stranger, suppress(ConnectionError):  # refused half-way
        stranger.sendall(b"\xff" * 100_000)
    socket.create_connection((address, port), 10).close()


def open_ports(hosts: netns.Hosts, host: int) -> list[int]:
    """Of a host's TCP listeners, those that others can reach and that are not HTTP."""
    return [port for port in hosts.ports(host) if not speaks_http(hosts.address(host), port)]


def speaks_http(address: str, port: int) -> bool:
    try:
        return httpx.get(f"http://{address}:{port}/health", timeout=20).status_code == 200
    except httpx.HTTPError:
        return False
