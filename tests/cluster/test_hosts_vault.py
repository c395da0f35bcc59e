"""Experts of a host that is lost, and of a rank whose host lacks them, come out of another host's memory."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

import httpx
from test_hosts import Cluster, Unfailed, check, cluster, pytestmark  # noqa: F401

SOURCES = ("peer", "vault", "peer_remote", "vault_remote", "disk")


def restored(both: Cluster) -> dict[str, int]:
    text = httpx.get(f"{both.first.url}/metrics").text
    rows = re.findall(r'^phalanx_expert_bytes_restored_total\{source="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {**dict.fromkeys(SOURCES, 0), **{source: int(float(count)) for source, count in rows}}


def test_with_one_copy_of_each_expert_a_recovery_reads_other_hosts_vaults_and_no_disk(
    cluster: Callable[..., Cluster],  # noqa: F811
    unfailed: Unfailed,
) -> None:
    both = cluster(vault_copies=1).ready()
    for service in (both.first, both.other):
        service.wait_for_line("the vault is full", 90)
    seen, running = both.first.lines, both.both_kinds()
    os.kill(both.first.pid(3), signal.SIGKILL)
    both.back(3, after=seen)
    check(running, unfailed)
    found = restored(both)
    assert found["vault_remote"] > 0
    assert found["disk"] == 0


def test_a_whole_host_dies_and_comes_back_without_an_expert_from_disk(
    cluster: Callable[..., Cluster],  # noqa: F811
    unfailed: Unfailed,
) -> None:
    both = cluster().ready()
    for service in (both.first, both.other):
        service.wait_for_line("the vault is full", 90)
    at_start = restored(both)["disk"]
    seen, running = both.first.lines, both.both_kinds()
    both.other.process.kill()
    both.first.wait_for_line(r"recovered: lost ranks \[[^]]*\b3\b", 90, after=seen)
    check(running, unfailed)
    assert restored(both)["vault_remote"] == 0, "every expert is in the vault of the host that is left"
    seen, running = both.first.lines, both.both_kinds()
    both.other = both.start(1, elastic_ep_rejoin=True)
    both.back(2, 3, after=seen)
    check(running, unfailed)
    found = restored(both)
    assert found["vault_remote"] > 0, "what the newcomers took in before they asked"
    assert found["disk"] == at_start
    line = both.other.wait_for_line(r"the vault is full: .*", 90)
    assert "from other hosts" in line.group()
    assert httpx.get(f"{both.first.url}/server_info").json()["vault_transport"] == "tcp"
