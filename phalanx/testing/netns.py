"""Hosts for tests, without machines: network namespaces of this kernel, each with its own address, on one switch.

A process that runs `within` a host has no other network than that host's, so what it cannot reach over the link it
cannot reach at all; pids and files are shared. `cut` takes a host's link down, as a pulled cable does: nothing tells
the others. The test's own namespace stands on the same switch, so that its clients reach every host.

Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN) and iproute2; `why_not` says what is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from types import TracebackType

PREFIX = 24
CLIENT = 254
"""The last part of the address under which the test itself stands on the switch."""


def why_not() -> str:
    """Why there can be no namespaces here; "" when there can. LOCAL."""
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"phalanx-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "probe", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return ""


class Hosts:
    """So many hosts on one switch. A context manager: leaving it removes them, whatever still runs there."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._name = f"phx{os.getpid() % 100_000}"
        self._subnet = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"

    def address(self, host: int) -> str:
        """A host's address."""
        return f"{self._subnet}.{host + 1}"

    def within(self, host: int) -> list[str]:
        """What to put before a command to run it on a host. The process keeps its pid: nothing stands between."""
        return ["ip", "netns", "exec", self._of(host)]

    def pids(self, host: int) -> list[int]:
        """The processes that run on a host."""
        return [int(pid) for pid in _ip("netns", "pids", self._of(host)).split()]

    def ports(self, host: int) -> list[int]:
        """The TCP ports on which processes listen at a host's address."""
        table = subprocess.run([*self.within(host), "cat", "/proc/net/tcp"], check=True, capture_output=True, text=True)
        here = "".join(f"{part:02X}" for part in reversed(socket.inet_aton(self.address(host))))
        return [int(port, 16) for port in re.findall(rf"{here}:([0-9A-F]{{4}}) 00000000:0000 0A", table.stdout)]

    def cut(self, host: int) -> None:
        """Pull the cable."""
        _ip("-n", self._of(host), "link", "set", "link0", "down")

    def heal(self, host: int) -> None:
        """Put it back."""
        _ip("-n", self._of(host), "link", "set", "link0", "up")

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _of(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _build(self) -> None:
        switch = f"{self._name}-s"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for host in range(self.count):
            _ip("netns", "add", self._of(host))
            _ip("-n", self._of(host), "link", "set", "lo", "up")
            _ip("-n", self._of(host), "link", "add", "link0", "type", "veth", "peer", "name", f"port{host}",
                "netns", switch)  # fmt: skip
            self._plug(switch, f"port{host}")
            _ip("-n", self._of(host), "address", "add", f"{self.address(host)}/{PREFIX}", "dev", "link0")
            _ip("-n", self._of(host), "link", "set", "link0", "up")
        _ip("link", "add", self._name, "type", "veth", "peer", "name", "client", "netns", switch)
        self._plug(switch, "client")
        _ip("address", "add", f"{self._subnet}.{CLIENT}/{PREFIX}", "dev", self._name)
        _ip("link", "set", self._name, "up")

    def _plug(self, switch: str, port: str) -> None:
        _ip("-n", switch, "link", "set", port, "master", "switch")
        _ip("-n", switch, "link", "set", port, "up")

    def _remove(self) -> None:
        subprocess.run(["ip", "link", "delete", self._name], capture_output=True, check=False)
        for name in [*(self._of(host) for host in range(self.count)), f"{self._name}-s"]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
