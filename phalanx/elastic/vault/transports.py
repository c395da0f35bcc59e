"""Which engines a process reads other hosts' memory with."""

from __future__ import annotations

from phalanx.config import ServeConfig
from phalanx.elastic.vault.fabric import chosen, engine_devices
from phalanx.elastic.vault.mooncake import MooncakeTransport
from phalanx.elastic.vault.transport import TcpTransport, Transport
from phalanx.wire import Site


def transports(config: ServeConfig, site: Site) -> list[Transport]:
    """The transports of a process of this host, the fastest first; TCP is always the last. LOCAL."""
    found: list[Transport] = [TcpTransport(site.token)]
    if chosen(config) == "mooncake":
        found.insert(0, MooncakeTransport(site.host, *engine_devices(config)))
    return found
