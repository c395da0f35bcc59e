from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from comm_ranks import Hosts
from standing import Standing
from streams import PROMPTS, SAMPLING, Streams
from two_hosts import TwoHosts

from phalanx.testing import netns
from phalanx.testing.service import Service, ends_on_sigterm, flags_of
from phalanx.testing.tiny import make_tiny

Result = tuple[str, str | None, str, bool]

LINKS: dict[str, Hosts | None] = {
    "shm": None,
    "tcp": lambda rank: f"host {rank}",
    "mixed": lambda rank: f"host {rank // 2}",
}


@pytest.fixture(params=LINKS)
def hosts(request: pytest.FixtureRequest) -> Hosts | None:
    """Which ranks share a host: all; none does, so that all links are TCP; each two."""
    return LINKS[request.param]


@pytest.fixture(params=["shm", "tcp"])
def pair_hosts(request: pytest.FixtureRequest) -> Hosts | None:
    """The same for two ranks."""
    return LINKS[request.param]


@pytest.fixture(scope="session", autouse=True)
def end_services_when_asked_to_end() -> Iterator[None]:
    """A test run that is told to end (by `timeout`, say) ends the services that stand, too."""
    with ends_on_sigterm():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE checkpoint whose text depends on every expert: 16, so that each survivor restores some."""
    return Path(make_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen3-moe", layers=3, experts=16))


@pytest.fixture
def serve(tiny: Path) -> Iterator[Callable[..., Service]]:
    """Starts services, and ends them after the test. Unless told otherwise four ranks, chaos enabled, and the dead stay
    dead. A test whose dead may come back uses one of the standing services, which cost no start."""
    with ExitStack() as stack:

        def start(faults: str = "", model: Path = tiny, **options: Any) -> Service:
            usual = {"ep_size": 4, "enable_chaos": True, "max_num_batched_tokens": 64, "max_restarts": 0}
            options = {**usual, **options}
            flags = flags_of(**{name: value for name, value in options.items() if value is not False})
            return stack.enter_context(Service(str(model), *flags, env={"PHALANX_FAULTS": faults}))

        yield start


@pytest.fixture(scope="session")
def standing(tiny: Path) -> Iterator[Standing]:
    """With the time-outs that everybody has."""
    service = Standing(tiny)
    yield service
    service.end()


@pytest.fixture(scope="session")
def quick(tiny: Path) -> Iterator[Standing]:
    """With short time-outs: ranks that are stopped are evicted soon."""
    service = Standing(tiny, peer_timeout=1, roll_call_timeout=2, heartbeat_interval=0.5)
    yield service
    service.end()


@pytest.fixture(scope="session")
def patient(tiny: Path) -> Iterator[Standing]:
    """With long time-outs: ranks may be stopped for a while and stay in, and idle ones look for each other rarely."""
    service = Standing(tiny, peer_timeout=60, roll_call_timeout=120, heartbeat_interval=120)
    yield service
    service.end()


@pytest.fixture(scope="session")
def alone(tiny: Path) -> Iterator[Service]:
    """A service of one rank, which nothing ever happens to."""
    with Service(str(tiny), "--ep-size", "1") as service:
        yield service


@pytest.fixture(scope="session")
def unfailed(alone: Service) -> dict[str, list[Result]]:
    """What an unfailed service of one rank streams for PROMPTS, by kind of sampling."""
    return {kind: Streams(alone.url, PROMPTS, **options).start().join() for kind, options in SAMPLING.items()}


@pytest.fixture(scope="session")
def standing_hosts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Four ranks on two hosts, each a network namespace with its own address."""
    if reason := netns.why_not():
        pytest.skip(reason)
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("the secret of a cluster of tests")
    with netns.Hosts(2) as hosts:
        pair = TwoHosts(tiny, 4, hosts, cluster_token_file=token)
        yield pair
        pair.end()


@pytest.fixture
def two_hosts(standing_hosts: TwoHosts) -> TwoHosts:
    """The same, with all ranks healthy."""
    return standing_hosts.mended()


@pytest.fixture(scope="session")
def standing_neighbours(tiny: Path) -> Iterator[TwoHosts]:
    """Two ranks, each on a host of its own, that share this machine's address, and know no token; each expert is in the
    vault of one of them."""
    pair = TwoHosts(tiny, 2, vault_copies=1)
    yield pair
    pair.end()


@pytest.fixture
def neighbours(standing_neighbours: TwoHosts) -> TwoHosts:
    """The same, with both ranks healthy."""
    return standing_neighbours.mended()
