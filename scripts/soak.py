"""A soak: a real service is hurt again and again under load, and must lose nothing, leak nothing, and always come back.

    make soak                                   # 10 minutes
    make soak SOAK_SECONDS=120 SOAK_SEED=7      # which ordeals, in which order, follows from the seed

Clients stream without a pause and compare every token with what the service said before anybody hurt it. Meanwhile
ordeals (phalanx/testing/ordeals.py) follow each other, each when the service is at full strength again. After a warm-up
and at the end the clients are calmed, and processes, memory, open files, threads, store keys and files of the two
moments are compared. Exit code 0: all is well; 1: it is not, and the table says what; 2: it could not begin.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from phalanx.cli.figures import percentiles
from phalanx.cli.serve import serve
from phalanx.testing.census import Census, listening_ports, take_census
from phalanx.testing.crowd import Crowd, calls
from phalanx.testing.ordeals import Deed, Ground, Ordeal, OrdealFailed, ordeals_for
from phalanx.testing.service import Service, ServiceEnded, ends_on_sigterm, flags_of
from phalanx.testing.tiny import make_tiny

WARM_UP = 0.25
"""The part of the time after which things are counted for the first time."""

CALM_S = 120.0
PEER_TIMEOUT_S, ROLL_CALL_S = 2.0, 4.0
FLAGS = {
    "max_restarts": 100000, "num_redundant_experts": 4, "enable_eplb": True, "eplb_interval": 300, "eplb_window": 100,
    "num_kv_blocks": 256, "max_num_batched_tokens": 64, "peer_timeout": PEER_TIMEOUT_S,
    "roll_call_timeout": ROLL_CALL_S, "enable_chaos": True,
}  # fmt: skip
"""Few KV blocks: all of their memory is in use soon, so that what grows afterwards is a leak."""

MB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One look at the service under way. at_s: since the soak began; tokens: all that clients ever got."""

    at_s: float
    healthy: int
    tokens: int
    fds: int
    pss_mb: dict[str, float]


@dataclass(frozen=True)
class Rest:
    """What there is when nobody asks for anything. store_keys: None when the store cannot be asked; each epoch leaves
    one for good, the chain of Worlds."""

    epoch: int
    census: Census
    store_keys: int | None
    files: int


@dataclass(frozen=True)
class Growth:
    """One thing that must not grow by more than `allowed`."""

    name: str
    before: float
    after: float
    allowed: float

    @property
    def fine(self) -> bool:
        return self.after - self.before <= self.allowed


@dataclass(frozen=True)
class Event:
    """An ordeal that was carried out, and when; back_s: how long until the service was at full strength again."""

    name: str
    what: str
    at_s: float
    back_s: float


@dataclass
class Story:
    """All that is known at the end."""

    events: list[Event] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Soak:
    """One soak of one service."""

    def __init__(self, service: Service, files: Path, options: dict[str, Any], console: Console) -> None:
        self._service, self._files, self._options, self._console = service, files, options, console
        self._rng = random.Random(options["seed"])
        made = calls(Path(options["model"]).name, 24, self._rng)
        self.crowd = Crowd(service.url, made, options["streams"], options["seed"])
        self.story = Story()
        self._deck: list[str] = []
        self._ranks = options["ep_size"]
        self._store: Any = None
        self._began_s = 0.0

    async def run(self) -> None:
        """Hurt the service until the time is over; what came of it is in `story` and `crowd.tally`."""
        async with httpx.AsyncClient(base_url=self._service.url, timeout=60) as http:
            ground = Ground(http, self._service.process.pid, self._rng, PEER_TIMEOUT_S / 2)
            known = await ordeals_for(http)
            if unknown := set(self._options["only"]) - known.keys():
                raise click.UsageError(f"--only {unknown.pop()!r} is none of {', '.join(known)}")
            names = [name for name in known if not self._options["only"] or name in self._options["only"]]
            tokens = await self.crowd.learn()
            self._console.print(f"{tokens} tokens to compare with; ordeals: {', '.join(names)}")
            self._began_s, seconds = time.monotonic(), self._options["seconds"]
            sampling = asyncio.create_task(self._sample(ground))
            try:
                before = await self._stretch(ground, known, names, WARM_UP * seconds)
                after = await self._stretch(ground, known, names, (1 - WARM_UP) * seconds)
            finally:
                sampling.cancel()
            self.story.growths = compare(before, after, self._ranks)
            if lingering := before.census.zombies | after.census.zombies:
                self.story.problems.append(f"{len(lingering)} processes ended and were not waited for")
            await self._check_idle(http)

    async def _stretch(self, ground: Ground, known: dict[str, Ordeal], names: list[str], seconds: float) -> Rest:
        """Ordeals under load for a while, then rest."""
        until_s = self._now_s + seconds
        self.crowd.start()
        with self._progress() as bar:
            task = bar.add_task("", total=until_s, completed=int(self._now_s))
            while self._now_s < until_s:
                name = self._next(names)
                bar.update(task, completed=self._now_s, description=f"{name}; {self._so_far()}")
                await self._go_through(ground, name, known[name])
                await asyncio.sleep(self._rng.uniform(0.0, 1.0))
                bar.update(task, completed=min(until_s, self._now_s))
        await self.crowd.calm(CALM_S)
        return await self._rest(ground)

    async def _go_through(self, ground: Ground, name: str, ordeal: Ordeal) -> None:
        begin = time.monotonic()
        try:
            deed: Deed = await ordeal(ground)
            await ground.full_strength(self._ranks, deed.fallen)
        except OrdealFailed as failure:
            self.story.problems.append(f"{name}: {failure}")
            raise
        back_s = time.monotonic() - begin
        self.story.events.append(Event(name, deed.what, begin - self._began_s, back_s))
        self._console.print(f"{self._now_s:7.1f} s  {deed.what}: all is back after {back_s:.2f} s", highlight=False)

    def _next(self, names: list[str]) -> str:
        """Every ordeal comes once before any comes twice."""
        if not self._deck:
            self._deck = self._rng.sample(names, len(names))
        return self._deck.pop()

    async def _sample(self, ground: Ground) -> None:
        while True:
            with suppress(httpx.HTTPError, ValueError):
                status = await ground.status()
                census = await asyncio.to_thread(take_census, ground.launcher, roles(status))
                pss = {role: census.total("pss", role) / MB for role in census.roles}
                healthy = sum(rank["state"] == "healthy" for rank in status["ranks"])
                tokens = self.crowd.tally.tokens
                self.story.samples.append(Sample(self._now_s, healthy, tokens, census.total("fds"), pss))
            await asyncio.sleep(1.0)

    async def _rest(self, ground: Ground) -> Rest:
        """Count when the vault is full, and what ended was waited for; a plan under way is a process of its own."""
        status = await ground.until("a full vault", lambda status: status["vault"]["state"] == "full")
        keys = await asyncio.to_thread(self._store_keys, ground.launcher)  # first: it connects, which is a file
        expected = {"launcher": 1, "server": 1, "nursery": 2, "keeper": 1, "rank": self._ranks}
        deadline = time.monotonic() + 30
        while True:
            census = await asyncio.to_thread(take_census, ground.launcher, roles(await ground.status()))
            if Counter(process.role for process in census.processes) == expected and not census.zombies:
                break
            if time.monotonic() > deadline:
                found = ", ".join(f"{process.role} {process.pid}" for process in census.processes)
                self.story.problems.append(f"not the processes that there should be: {found}")
                break
            await asyncio.sleep(0.2)
        return Rest(status["epoch"], census, keys, sum(1 for path in self._files.rglob("*") if not path.is_dir()))

    def _store_keys(self, launcher: int) -> int | None:
        """How many keys the store has, when it can be asked."""
        from datetime import timedelta

        from torch._C._distributed_c10d import TCPStore

        if self._store is None:
            ports = listening_ports(launcher)
            if len(ports) != 1:
                return None
            self._store = TCPStore(
                "127.0.0.1", ports[0], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
            )
        return int(self._store.num_keys())

    async def _check_idle(self, http: httpx.AsyncClient) -> None:
        info = (await http.get("/server_info")).json()
        if info["requests_in_flight"] or info["requests_held"]:
            self.story.problems.append(f"{info['requests_in_flight']} requests are in flight that nobody waits for")

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _so_far(self) -> str:
        tally = self.crowd.tally
        return f"{tally.requests} requests, {tally.tokens} tokens, {len(tally.failed) + len(tally.different)} wrong"

    def _progress(self) -> Progress:
        columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        return Progress(*columns, console=self._console, transient=True)


def roles(status: dict[str, Any]) -> dict[int, str]:
    """Which process is what, as the service says. LOCAL."""
    return {rank["pid"]: "rank" for rank in status["ranks"] if rank["pid"]} | {status["vault"]["pid"]: "keeper"}


def compare(before: Rest, after: Rest, ranks: int) -> list[Growth]:
    """What must not have grown between two rests. LOCAL."""
    allowed_mb = {"launcher": 8.0, "server": 16.0, "nursery": 8.0, "keeper": 8.0, "rank": 16.0 * ranks}
    sizes = {role: [rest.census.total("rss", role) / MB for rest in (before, after)] for role in allowed_mb}
    found = [Growth(f"memory of {role}, MB", *sizes[role], mb) for role, mb in allowed_mb.items()]
    for role in allowed_mb:
        found += [
            Growth(f"{what} of {role}", before.census.total(what, role), after.census.total(what, role), 2)
            for what in ("fds", "threads")
        ]
    found.append(Growth("processes", before.census.count(), after.census.count(), 0))
    found.append(Growth("files", before.files, after.files, 2))
    if before.store_keys is not None and after.store_keys is not None:
        found.append(Growth("store keys", before.store_keys, after.store_keys, after.epoch - before.epoch + 8))
    return found


# --- the report


def report(console: Console, story: Story, crowd: Crowd, finished: bool) -> bool:
    """Say what came of it; whether all is well. finished: it was not broken off. LOCAL."""
    console.print(_ordeals_table(story.events))
    growths = Table(title="At rest, after the warm-up and at the end")
    for column in ("", "before", "after", "allowed growth", ""):
        growths.add_column(column, justify="left" if not column else "right")
    for each in story.growths:
        verdict = "[green]flat" if each.fine else "[bold red]grows"
        growths.add_row(each.name, f"{each.before:.1f}", f"{each.after:.1f}", f"{each.allowed:.0f}", verdict)
    console.print(growths)
    tally = crowd.tally
    console.print(
        f"{tally.requests} requests ({tally.left} abandoned by their clients), {tally.tokens} tokens; "
        f"longest silence in a stream {tally.longest_s:.2f} s"
    )
    wrong = [f"failed: {line}" for line in tally.failed] + [f"different: {line}" for line in tally.different]
    wrong += [
        f"{each.name} grows from {each.before:.1f} to {each.after:.1f}" for each in story.growths if not each.fine
    ]
    wrong += story.problems
    if not finished:
        wrong.append("the soak was broken off before its end")
    for line in wrong[:20]:
        console.print(f"[red]{escape(line[:600])}", soft_wrap=True)
    verdict = (
        f"[bold red]{len(wrong)} things are wrong" if wrong else "[bold green]nothing lost, nothing doubled, all flat"
    )
    console.print(verdict)
    return not wrong


def _ordeals_table(events: Iterable[Event]) -> Table:
    table = Table(title="Seconds from an ordeal's begin to full strength")
    for column in ("ordeal", "times", "p50", "max"):
        table.add_column(column, justify="left" if column == "ordeal" else "right")
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.back_s)
    for name, seconds in sorted(by_name.items()):
        figures = percentiles(seconds)
        table.add_row(name, str(len(seconds)), f"{figures['p50']:.2f}", f"{figures['max']:.2f}")
    return table


def draw(path: Path, story: Story, title: str) -> None:
    """Memory, files, ranks and tokens a second over time, the ordeals as grey lines. LOCAL."""
    from matplotlib.figure import Figure

    samples = story.samples
    times = [sample.at_s for sample in samples]
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    names = sorted({role for sample in samples for role in sample.pss_mb})
    axes[0].stackplot(times, [[sample.pss_mb.get(role, 0.0) for sample in samples] for role in names], labels=names)
    axes[0].legend(loc="lower right", ncols=len(names), fontsize="small")
    axes[1].plot(times, [sample.fds for sample in samples])
    axes[2].step(times, [sample.healthy for sample in samples], where="post")
    pairs = itertools.pairwise(samples)
    rates = [(later.tokens - sooner.tokens) / (later.at_s - sooner.at_s) for sooner, later in pairs]
    axes[3].plot(times[1:], rates)
    for panel, label in zip(axes, ("memory, MB", "open files", "healthy ranks", "tokens/s"), strict=True):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        for event in story.events:
            panel.axvline(event.at_s, color="grey", linewidth=0.4, alpha=0.6)
    axes[3].set_xlabel("seconds; a grey line is an ordeal")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)


@click.command(context_settings={"show_default": True})
@click.option("--seconds", envvar="SOAK_SECONDS", type=click.FloatRange(min=1), default=600.0, help="How long.")
@click.option("--seed", envvar="SOAK_SEED", type=int, default=0, help="Which ordeals, and in which order.")
@click.option("--model", default="", help="A model directory; by default a small random one is made.")
@click.option("--ep-size", type=click.IntRange(min=3), default=4, help="Ranks.")
@click.option("--streams", type=click.IntRange(min=1), default=12, help="Clients at once.")
@click.option("--only", multiple=True, help="Only this ordeal (may be given several times).")
@click.option("--out", type=click.Path(path_type=Path), default="build/soak", help="Where log, figures and picture go.")
def main(out: Path, **options: Any) -> None:
    """Hurt a service for a while, and see that it loses and leaks nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    console = Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        options["model"] = options["model"] or str(make_tiny(Path(place) / "tiny", "qwen3-moe", layers=3, experts=16))
        run_dir = Path(place) / "run"
        run_dir.mkdir()
        soak, fine = soaked(console, run_dir, out / "service.log", options)
        if soak is None:
            sys.exit(2)
    fine = report(console, soak.story, soak.crowd, finished=fine)
    figures = {"options": options, "story": asdict(soak.story), "clients": asdict(soak.crowd.tally), "passed": fine}
    (out / "soak.json").write_text(json.dumps(figures, indent=1))
    with suppress(ImportError):
        draw(out / "soak.png", soak.story, f"soak of {options['seconds']:.0f} s, seed {options['seed']}")
    console.print(f"figures, picture and the service's log: {out}")
    sys.exit(0 if fine else 1)


def soaked(console: Console, run_dir: Path, log: Path, options: dict[str, Any]) -> tuple[Soak | None, bool]:
    """Start a service, soak it, end it; whether it could be ended as it should. LOCAL, blocks."""
    service = Service(options["model"], *flags(options), env={"TMPDIR": str(run_dir), "OMP_WAIT_POLICY": "passive"})
    soak, fine = None, True
    try:
        with ends_on_sigterm(), service:
            soak = Soak(service, run_dir, options, console)
            asyncio.run(soak.run())
            family = {process.pid for process in take_census(service.process.pid, {}).processes}
            if (code := service.stop()) != 0:
                soak.story.problems.append(f"asked to stop, the service ended with exit code {code}")
            if left := [pid for pid in family if os.path.exists(f"/proc/{pid}")]:
                soak.story.problems.append(f"processes that outlived the service: {left}")
            if files := sorted(str(path) for path in run_dir.rglob("*")):
                soak.story.problems.append(f"files that outlived the service: {files[:5]}")
    except (OrdealFailed, ServiceEnded, TimeoutError, httpx.HTTPError, ValueError) as error:
        console.print(f"[red]soak: {escape(str(error))}", soft_wrap=True)
        fine = False
    log.write_text(service.whole_log)
    return soak, fine


def flags(options: dict[str, Any]) -> Sequence[str]:
    """What the service is started with; places to grow into where the version has them. LOCAL."""
    chosen = {**FLAGS, "ep_size": options["ep_size"]}
    if "max_ep_size" in {parameter.name for parameter in serve.params}:
        chosen["max_ep_size"] = options["ep_size"] + 1
    return flags_of(**chosen)


if __name__ == "__main__":
    main()
