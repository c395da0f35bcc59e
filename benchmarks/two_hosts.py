"""What clients feel when a whole host dies and comes back, against two ranks of four that die on one host.

    sudo python benchmarks/two_hosts.py [MODEL] [--rounds 10] [--json]

Two hosts, each a network namespace with its own address, serve with two ranks each under streams. In each round every
process of the second host (launcher, nursery, ranks, keeper and stall) gets SIGKILL in one moment, and the host is
started again at once, by the command that started it. The round ends when the streams are over, all ranks are healthy
and the new host's vault is full. Then one host with four ranks, of which the same two are killed at once, with the same
streams. Each service's tokens are compared with its own unfailed run, and the two unfailed runs with each other.

A host that comes back is new processes all through: it imports everything, fills a vault, and its ranks are forked from
a nursery that has just been started. A rank alone is forked from one that is ready. Without MODEL a small checkpoint is
made.

Needs root, for the namespaces, and iproute2.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from phalanx.cli.bench_round import Blow, Load, Target, count_healthy, one_round, show, summary, unfailed_run
from phalanx.cli.errors import ServiceError
from phalanx.cli.figures import cells, machine, percentiles, served_model
from phalanx.testing import netns
from phalanx.testing.service import Service, ServiceEnded, ends_on_sigterm, flags_of
from phalanx.testing.streams import Stream
from phalanx.testing.tiny import make_tiny

RANKS, OTHERS = 4, (2, 3)
"""All ranks, and those of the host that dies."""
MEET = 25555
PATIENCE_S = 300.0
CLOSED_WITHIN_S, LOOK_EVERY_S = 10.0, 0.01
SOURCES = ("vault", "peer", "vault_remote", "peer_remote", "disk")
READY = re.compile(rf"ready: .* on {RANKS} ranks")
VAULT_FULL = re.compile(r"the vault is full: .*\((?P<parts>.*)\)")
HOST_PHASES = {
    "ports_closed_s": "kill until every port of the dead host is closed",
    "noticed_s": "kill until the first host has noticed",
    "in_s": "start of the host until it is in: imports, address, token, place",
    "vault_full_s": "start of the host until its vault is full",
}


@dataclass(frozen=True)
class HostTimes:
    """How long a host took for what, beside what its ranks took. Seconds, see HOST_PHASES. filled_from: where the
    experts and dense weights of its new vault came from, in the log's words."""

    ports_closed_s: float
    noticed_s: float
    in_s: float
    vault_full_s: float
    filled_from: str


class Pair:
    """Two hosts that serve together, of which the second can be killed and started again. A context manager: leaving
    it stops both."""

    def __init__(self, model: str, hosts: netns.Hosts, token: Path) -> None:
        self._model, self._hosts = model, hosts
        address = hosts.address(0)
        self._options = {
            "ep_size": RANKS, "nnodes": 2, "dist_init_addr": f"{address}:{MEET}", "host": address,
            "cluster_token_file": token,
        }  # fmt: skip
        self._running: list[Service] = []
        self._moments = (0.0, 0.0, 0.0, 0)
        self.times: list[HostTimes] = []

    def __enter__(self) -> Pair:
        try:
            self._other, self.first = self._launch(1), self._launch(0)
            self.first.find_url()
            for service, line in ((self.first, READY), (self.first, VAULT_FULL), (self._other, VAULT_FULL)):
                service.wait_for_line(line, PATIENCE_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for service in self._running:
            service.stop()

    def _launch(self, node_rank: int) -> Service:
        flags = flags_of(**self._options, node_rank=node_rank)
        self._running.append(Service(self._model, *flags, within=self._hosts.within(node_rank)).launch())
        return self._running[-1]

    def prepare(self) -> Blow:
        """Kill the second host, all at once, and start it again."""
        pids, ports = self._hosts.pids(1), self._hosts.ports(1)
        dead, log_line = self._other, self.first.lines

        async def strike() -> None:
            killed_s = time.monotonic()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            closed = asyncio.create_task(asyncio.to_thread(self._wait_until_closed, ports))
            await asyncio.to_thread(dead.process.wait)
            started_s = time.monotonic()
            self._other = await asyncio.to_thread(self._launch, 1)
            self._moments = killed_s, await closed, started_s, log_line

        return Blow(OTHERS, strike)

    def _wait_until_closed(self, ports: Sequence[int]) -> float:
        """When the last of the ports refused a connection; the new host may have taken one of them again."""
        end = time.monotonic() + CLOSED_WITHIN_S
        for port in ports:
            with suppress(OSError):
                while time.monotonic() < end:
                    socket.create_connection((self._hosts.address(1), port), CLOSED_WITHIN_S).close()
                    time.sleep(LOOK_EVERY_S)  # nobody takes these connections in: too many would fill the backlog
        return time.monotonic()

    def settle(self) -> None:
        """Wait until the new host has all that the dead one had, and note how long that took."""
        killed_s, closed_s, started_s, line = self._moments
        _, noticed_s = self.first.line_at(r"lost host 1 ", PATIENCE_S, after=line)
        _, in_s = self.first.line_at(r"host 1 at \S+ is in", PATIENCE_S, after=line)
        full, full_s = self._other.line_at(VAULT_FULL, PATIENCE_S)
        self.times.append(
            HostTimes(closed_s - killed_s, noticed_s - killed_s, in_s - started_s, full_s - started_s, full["parts"])
        )


def restored(url: str) -> dict[str, int]:
    """Expert bytes restored so far, by source."""
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    found = dict.fromkeys(SOURCES, 0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "phalanx_expert_bytes_restored_total":
                found[sample.labels["source"]] = int(sample.value)
    return found


class Case:
    """All rounds with one service. figures: of `bench recovery`, and the bytes that the rounds restored by source."""

    def __init__(self, service: Service, load: Load, rounds: int, turn: Callable[[], object]) -> None:
        """turn: called after the unfailed run and after each round, for the progress."""
        self._target = Target(service.url, "", service, PATIENCE_S)
        self._load, self._rounds, self._turn = load, rounds, turn
        self._model = served_model(service.url, "")
        self.unfailed: list[Stream] = []
        self.figures: dict[str, Any] = {}

    def run(self, prepare: Callable[[], Blow], settle: Callable[[], None] = lambda: None) -> None:
        """prepare: the blow of the next round. settle: wait for what is not seen in the ranks."""
        target, done = self._target, []
        self.unfailed = unfailed_run(target, self._load, self._model)
        self._turn()
        before = restored(target.url)
        for _ in range(self._rounds):
            target.wait_for("that all ranks are healthy", lambda state: count_healthy(state) == RANKS)
            done.append(asyncio.run(one_round(target, self._load, self._model, prepare(), self.unfailed)))
            settle()
            self._turn()
        spent = {source: count - before[source] for source, count in restored(target.url).items()}
        self.figures = summary(self.unfailed, done) | {"bytes_restored": spent}
        target.close()

    def prepare(self) -> Blow:
        """The ranks that the second host would have had, on one host."""
        return Blow(OTHERS, self._target.prepare("kill", *OTHERS))


@contextmanager
def checkpoint_at(model: str | None) -> Iterator[str]:
    if model:
        yield model
        return
    with tempfile.TemporaryDirectory() as directory:
        yield str(make_tiny(Path(directory) / "model", "qwen3-moe", layers=3, experts=8))


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True), required=False)
@click.option("--rounds", type=click.IntRange(min=1), default=10, help="Deaths of the host, and of the two ranks.")
@click.option("--streams", type=click.IntRange(min=1), default=16, help="Streams at once.")
@click.option("--input-len", type=click.IntRange(min=1), default=32, help="Tokens a prompt.")
@click.option("--output-len", type=click.IntRange(min=2), default=512, help="Tokens an answer.")
@click.option("--temperature", type=float, default=0.0, help="0 is greedy; else sampled, each stream with its seed.")
@click.option("--seed", type=int, default=0, help="Of the prompts and of sampling.")
@click.option("--share", type=click.FloatRange(0, 0.95), default=0.1, help="Share of all tokens before the failure.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(model: str | None, rounds: int, as_json: bool, **load: Any) -> None:
    """Kill a whole host of two under streams and bring it back, and two ranks of four on one host.

    Exit 0 only if no request failed, no token differed, and no expert came from disk."""
    if reason := netns.why_not():
        raise click.ClickException(f"two hosts are two network namespaces, for which this must run as root: {reason}")
    try:
        with ends_on_sigterm():
            result = measure(model, rounds, Load(**load))
    except (ServiceError, ServiceEnded, TimeoutError) as error:
        raise click.ClickException(str(error)) from None
    result = {"rounds": rounds, **load, "load_average": os.getloadavg()[0], **machine(), **result}
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        report(result)
    both = result["two_hosts"], result["one_host"]
    if result["unfailed_different"] or any(
        one["failed"] or one["different"] or one["bytes_restored"]["disk"] for one in both
    ):
        sys.exit(1)


def measure(model: str | None, rounds: int, load: Load) -> dict[str, Any]:
    """Both services, one after the other, with progress on standard error."""
    with ExitStack() as stack:
        path = stack.enter_context(checkpoint_at(model))
        bar = stack.enter_context(Progress(console=Console(stderr=True)))
        token = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "token"
        token.write_text(secrets.token_hex(32))
        task = bar.add_task("two hosts", total=2 * (rounds + 1))
        hosts = stack.enter_context(netns.Hosts(2))
        with Pair(path, hosts, token) as pair:
            two = Case(pair.first, load, rounds, lambda: bar.advance(task))
            two.run(pair.prepare, pair.settle)
        bar.update(task, description="one host")
        flags = flags_of(ep_size=RANKS, max_restarts=10 * rounds)
        with Service(path, *flags) as service:
            service.wait_for_line(VAULT_FULL, PATIENCE_S)
            one = Case(service, load, rounds, lambda: bar.advance(task))
            one.run(one.prepare)
    times = {name: percentiles([getattr(each, name) for each in pair.times]) for name in HOST_PHASES}
    filled = [each.filled_from for each in pair.times]
    return {
        "two_hosts": two.figures | {"host_s": times, "vault_filled_from": filled},
        "one_host": one.figures,
        "unfailed_different": sum(a.different_tokens(b) for a, b in zip(two.unfailed, one.unfailed, strict=True)),
    }


def report(result: dict[str, Any]) -> None:
    """Tables for people."""
    two, one, names = result["two_hosts"], result["one_host"], ("p50", "p99", "max")
    show(two, "kill", f"{two['rounds']} times the second host of two, {two['requests']} requests")
    table = Table(title="the host itself")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    for name, words in HOST_PHASES.items():
        table.add_row(words, *cells(two["host_s"][name], *names))
    Console().print(table)
    click.echo(f"its vault, the last time: {two['vault_filled_from'][-1]}")
    show(one, "kill", f"{one['rounds']} times two ranks of four on one host, {one['requests']} requests")
    for words, figures in (("two hosts", two), ("one host", one)):
        parts = ", ".join(f"{count} from {source}" for source, count in figures["bytes_restored"].items())
        click.echo(f"expert bytes restored, {words}: {parts}")
    click.echo(f"{result['unfailed_different']} tokens differ between the two services without a failure")
    click.echo(f"load average {result['load_average']:.1f}")


if __name__ == "__main__":
    main()
