"""`phalanx bench recovery`: kill ranks under load, and measure what the clients felt.

First one unfailed run, which is what every stream is compared with afterwards. Then round by round: start the same
streams, hurt one rank in mid-stream, let the streams end, compare them token by token, and read from the service what
its recovery cost by phase. Where the service brings its ranks back, the round also waits for the victim's return, and
measures how long that took and what the streams felt of it; all rounds then run in one service. With
`--serve-flags "--max-restarts 0"` nobody returns, and each round has a fresh service.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx

from phalanx.cli.bench_return import Return
from phalanx.cli.bench_return import figures as return_figures
from phalanx.cli.bench_return import rows as return_rows
from phalanx.cli.chaos import inject
from phalanx.cli.errors import ServiceError, headers, talking_to
from phalanx.cli.figures import cells, machine, percentiles, prompts, served_model
from phalanx.errors import BadConfig
from phalanx.testing.streams import Stream, client, run_and_hurt, run_streams

if TYPE_CHECKING:
    from phalanx.testing.service import Service

PHASES = ("detect", "agree", "mask", "replan", "restore", "replay", "total")
CONTROL_PHASES = ("detect", "agree", "mask", "replan")
"""The phases that decide, as against those that move bytes and compute again."""
_PATIENCE_S = 60.0
_LOOK_EVERY_S = 0.05
_WATCH_EVERY_S = 0.02
_REPORTS_S = 0.3
"""How long the ranks' reports of a return are waited for."""


@dataclass(frozen=True)
class Load:
    """The streams of every round. Lengths in tokens; the victim falls when `share` of all tokens have come."""

    streams: int
    input_len: int
    output_len: int
    temperature: float
    seed: int
    share: float

    def bodies(self, model: str) -> list[dict[str, Any]]:
        """One /v1/completions body for each stream, the same in every round. Token ids are asked for as vLLM does."""
        return [
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": self.output_len,
                "temperature": self.temperature,
                "seed": self.seed + number,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            for number, prompt in enumerate(prompts(self.streams, self.input_len, self.seed))
        ]


@dataclass
class Watch:
    """What the status showed from a failure on. Times are this process's."""

    failure: dict[str, Any] | None = None
    """The recovery from it."""
    join: dict[str, Any] | None = None
    """The recovery that let the victim in again."""
    back_s: float | None = None
    """When the victim was seen to be healthy again."""


@dataclass(frozen=True)
class Round:
    """One failure. Seconds; `stalls_s` has an entry for each stream that was not over when the victim fell."""

    victim: int
    hurt_s: float
    streams: list[Stream]
    stalls_s: list[float]
    failed: int
    different: int
    recovery: dict[str, Any]
    back: Return | None

    def as_json(self) -> dict[str, Any]:
        """Without the streams' own tokens and times."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("streams", "hurt_s")}
        return kept | {"errors": sorted({stream.error for stream in self.streams if stream.error})}


class Target:
    """A service that is to be hurt: reached over HTTP alone, or also ours to signal."""

    def __init__(self, url: str, api_key: str, service: Service | None = None) -> None:
        self.url, self.api_key, self.service = url, api_key, service
        self._http = httpx.Client(base_url=url, headers=headers(api_key), timeout=30)

    def status(self) -> dict[str, Any]:
        """GET /fault_tolerance/status."""
        with talking_to(self.url):
            state: dict[str, Any] = self._http.get("/fault_tolerance/status").raise_for_status().json()
            return state

    def brings_back(self) -> bool:
        """Whether the service starts dead ranks again; a service that does not say so is taken at its operator's
        word: ranks come back."""
        with talking_to(self.url):
            config = self._http.get("/server_info").raise_for_status().json().get("config", {})
        return bool(config.get("max_restarts", 1)) and bool(config.get("elastic", True))

    def prepare(self, kind: str, rank: int) -> Callable[[], Awaitable[None]]:
        """What hurts `rank`, with nothing left to look up: a signal where the process is ours, else POST /chaos."""
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}.get(kind)
        if self.service is None or number is None:
            return lambda: asyncio.to_thread(self._inject, kind, rank)
        pid = next(entry["pid"] for entry in self.status()["ranks"] if entry["rank"] == rank)

        async def send() -> None:
            os.kill(pid, number)

        return send

    def _inject(self, kind: str, rank: int) -> None:
        with talking_to(self.url):
            inject(self._http, kind, rank)

    def wait_for(self, what: str, satisfied: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status that satisfies; ServiceError when none does in time."""
        deadline = time.monotonic() + _PATIENCE_S
        while not satisfied(state := self.status()):
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.url}: {what} did not happen in {_PATIENCE_S:.0f} s")
            time.sleep(_LOOK_EVERY_S)
        return state

    def close(self) -> None:
        self._http.close()


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(), required=False)
@click.option("--url", default="", help="A running service with chaos enabled whose ranks come back.")
@click.option("--api-key", envvar="PHALANX_API_KEY", default="", help="Key to send.", show_default=False)
@click.option("--ep-size", type=click.IntRange(min=1), default=4, help="Ranks of the services that are started.")
@click.option("--serve-flags", default="", help="More flags for `phalanx serve`, in one string.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, help="Failures in all.")
@click.option(
    "--rounds-per-service",
    type=click.IntRange(min=0),
    default=0,
    help="Failures before a fresh service (0: one service for all, if its ranks come back).",
)
@click.option("--ranks", default="", help="Victims in turn, such as 0,1,2,3; by default every rank.")
@click.option("--kind", type=click.Choice(["kill", "stop", "raise"]), default="kill", help="What happens to them.")
@click.option("--streams", type=click.IntRange(min=1), default=16, help="Streams at once.")
@click.option("--input-len", type=click.IntRange(min=1), default=32, help="Tokens a prompt.")
@click.option("--output-len", type=click.IntRange(min=2), default=128, help="Tokens an answer.")
@click.option("--temperature", type=float, default=0.0, help="0 is greedy; else sampled, each stream with its seed.")
@click.option("--seed", type=int, default=0, help="Of the prompts and of sampling.")
@click.option("--share", type=click.FloatRange(0, 0.95), default=0.3, help="Share of all tokens before the failure.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the worst round's streams into this png.")
def recovery(
    model: str | None,
    url: str,
    api_key: str,
    ep_size: int,
    serve_flags: str,
    rounds: int,
    rounds_per_service: int,
    ranks: str,
    kind: str,
    as_json: bool,
    picture: Path | None,
    **load: Any,
) -> None:
    """Hurt ranks in mid-stream, of services started for MODEL or of the one at --url, and measure what clients felt.

    Exit 0 only if no request failed and no token differed from the unfailed run."""
    if bool(model) == bool(url):
        raise BadConfig("name either a MODEL to serve or the --url of a running service")
    if picture is not None:
        from phalanx.cli.picture import require_matplotlib

        require_matplotlib()
    victims = _victims(ranks)
    if model:
        usual = ["--ep-size", str(ep_size), "--enable-chaos", "--max-restarts", str(10 * rounds)]
        flags = [*usual, *shlex.split(serve_flags)]

        def fresh() -> AbstractContextManager[Target]:
            return _own_service(model, flags, api_key)
    else:
        rounds_per_service = rounds
        served_model(url, api_key)  # is anybody there?

        def fresh() -> AbstractContextManager[Target]:
            return nullcontext(Target(url, api_key))

    unfailed, done = _run(fresh, Load(**load), kind, victims, rounds, rounds_per_service)
    figures = summary(unfailed, done)
    if picture is not None:
        from phalanx.cli.picture import draw

        worst = max(done, key=lambda one: max(one.stalls_s, default=0.0))
        draw(picture, worst.streams, worst.hurt_s, f"rank {worst.victim}: {kind}")
    if as_json:
        command = shlex.join(["phalanx", *sys.argv[1:]])
        settings = {"command": command, "kind": kind, **load}
        click.echo(json.dumps(settings | machine() | figures, indent=2))
    else:
        _show(figures, kind)
    if figures["failed"] or figures["different"]:
        sys.exit(1)


def _victims(ranks: str) -> list[int]:
    try:
        victims = [int(rank) for rank in ranks.split(",") if rank.strip()]
    except ValueError:
        raise BadConfig(f"--ranks takes numbers, such as 0,1,2: not {ranks!r}") from None
    if any(rank < 0 for rank in victims):
        raise BadConfig(f"--ranks takes ranks from 0 on, not {ranks!r}")
    return victims


@contextmanager
def _own_service(model: str, flags: Sequence[str], api_key: str) -> Iterator[Target]:
    from phalanx.testing.service import Service, ServiceEnded

    keyed = ["--api-key", api_key] if api_key else []
    try:
        with Service(model, *flags, *keyed) as service:
            target = Target(service.url, api_key, service)
            try:
                yield target
            finally:
                target.close()
    except (ServiceEnded, TimeoutError) as error:
        raise ServiceError(f"the service did not come up: {error}") from None


def _run(
    fresh: Callable[[], AbstractContextManager[Target]],
    load: Load,
    kind: str,
    victims: list[int],
    rounds: int,
    rounds_per_service: int,
) -> tuple[list[Stream], list[Round]]:
    """The unfailed run and all rounds, with progress on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    unfailed: list[Stream] = []
    done: list[Round] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("unfailed run", total=rounds + 1)
        while len(done) < rounds:
            with fresh() as target:
                model = served_model(target.url, target.api_key)
                if not unfailed:
                    unfailed = _unfailed_run(target, load, model)
                    bar.advance(task)
                in_this_service = rounds_per_service or (rounds if target.brings_back() else 1)
                for _ in range(min(in_this_service, rounds - len(done))):
                    victim = _next_victim(target, victims, len(done))
                    bar.update(task, description=f"round {len(done) + 1}: {kind} rank {victim}")
                    done.append(asyncio.run(_round(target, load, model, kind, victim, unfailed)))
                    bar.advance(task)
    return unfailed, done


def _unfailed_run(target: Target, load: Load, model: str) -> list[Stream]:
    async def run() -> list[Stream]:
        async with client(target.url, target.api_key) as http:
            return await run_streams(http, "/v1/completions", load.bodies(model))

    streams = asyncio.run(run())
    if broken := [stream for stream in streams if stream.error]:
        raise ServiceError(f"{len(broken)} of {len(streams)} requests fail without any failure: {broken[0].error}")
    return streams


def _next_victim(target: Target, victims: list[int], number: int) -> int:
    """The rank whose turn it is. In a service that brings ranks back, its return is awaited; in one of ours, where
    nobody comes back, the next living one takes the turn. ServiceError when no two ranks live."""
    state = target.wait_for("that two ranks are healthy", lambda state: _count_healthy(state) > 1)
    in_turn = victims or list(range(state["ep_size"]))
    if not set(in_turn) <= set(range(state["ep_size"])):
        raise BadConfig(f"--ranks {in_turn}: the service has the ranks 0 to {state['ep_size'] - 1}")
    turned = [in_turn[(number + offset) % len(in_turn)] for offset in range(len(in_turn))]
    if target.service is None or target.brings_back():
        target.wait_for(f"the return of rank {turned[0]}", lambda state: _is_healthy(state, turned[0]))
        return turned[0]
    living = [rank for rank in turned if _is_healthy(state, rank)]
    if not living:
        raise ServiceError(f"none of --ranks {in_turn} is left to fail: lower --rounds-per-service")
    return living[0]


def _count_healthy(state: dict[str, Any]) -> int:
    return sum(rank["state"] == "healthy" for rank in state["ranks"])


def _is_healthy(state: dict[str, Any], rank: int) -> bool:
    return any(entry["rank"] == rank and entry["state"] == "healthy" for entry in state["ranks"])


async def _round(target: Target, load: Load, model: str, kind: str, victim: int, unfailed: list[Stream]) -> Round:
    bodies = load.bodies(model)
    streams = [Stream(str(number)) for number in range(len(bodies))]
    threshold = max(1, int(load.share * load.output_len * len(bodies)))
    state = target.status()
    returns = target.brings_back() and target.service is not None
    seen, log_line = Watch(), target.service.lines if target.service else 0
    incarnation = _incarnation(state, victim)
    prepared = target.prepare(kind, victim)
    async with client(target.url, target.api_key) as http:
        watching: list[asyncio.Task[None]] = []

        async def hurt() -> None:
            await prepared()
            watching.append(asyncio.create_task(_watch(http, seen, state["epoch"], victim, incarnation, returns)))

        done = await run_and_hurt(http, "/v1/completions", bodies, streams=streams, after_tokens=threshold, hurt=hurt)
        await asyncio.gather(*watching)
    unfinished = [stream for stream in streams if stream.name not in done.over]
    if not unfinished:
        raise ServiceError(
            "the streams were over before the failure: ask for a longer --output-len or a smaller --share"
        )
    if seen.failure is None or (returns and seen.back_s is None):
        raise ServiceError(f"{target.url}: rank {victim} did not {'return' if seen.failure else 'fall'} in time")
    if kind == "stop" and not returns:
        await target.prepare("cont", victim)()
    return Round(
        victim=victim,
        hurt_s=done.at_s,
        streams=streams,
        stalls_s=[silence[1] for stream in unfinished if (silence := stream.silence(done.at_s))],
        failed=sum(bool(stream.error) for stream in streams),
        different=sum(mine.different_tokens(theirs) for mine, theirs in zip(streams, unfailed, strict=True)),
        recovery=seen.failure,
        back=_return(target, seen, done.at_s, streams, (victim, incarnation + 1), log_line) if returns else None,
    )


async def _watch(
    http: httpx.AsyncClient, seen: Watch, epoch: int, victim: int, incarnation: int, returns: bool
) -> None:
    """Follow the status until the failure is dealt with and, if it `returns`, the victim is back."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        state = (await http.get("/fault_tolerance/status")).raise_for_status().json()
        last = state["last_recovery"]
        if seen.failure is None and _recovered(state, epoch, victim):
            seen.failure = last
        if seen.failure is not None and not returns:
            return
        if _is_healthy(state, victim) and _incarnation(state, victim) > incarnation:
            if seen.back_s is None:
                seen.back_s = time.monotonic()
            if last is not None and victim not in last["lost"]:
                seen.failure, seen.join = seen.failure or last, last
                if time.monotonic() > seen.back_s + _REPORTS_S:
                    return
        await asyncio.sleep(_WATCH_EVERY_S)


def _return(
    target: Target, seen: Watch, hurt_s: float, streams: list[Stream], newcomer: tuple[int, int], log_line: int
) -> Return:
    assert seen.back_s is not None
    assert target.service is not None
    return Return.seen(target.service, streams, newcomer, (hurt_s, seen.back_s), log_line)


def _incarnation(state: dict[str, Any], rank: int) -> int:
    return int(next(entry["incarnation"] for entry in state["ranks"] if entry["rank"] == rank))


def _recovered(state: dict[str, Any], epoch: int, victim: int) -> bool:
    last = state["last_recovery"]
    return last is not None and last["epoch"] > epoch and victim in last["lost"]


def summary(unfailed: Sequence[Stream], rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures of all rounds. LOCAL.

    kill_to_next_token_s: over all streams of all rounds that were not over when the victim fell. control: detect +
    agree + mask + replan. longest_gap_s: the longest silence of each stream in the unfailed run, after its first
    token: what a client feels without any failure. return: only where ranks came back. gap_unfailed_s: all gaps
    between two pieces of a stream in the unfailed run."""
    seconds = [one.recovery["seconds"] for one in rounds]
    phases = {phase: percentiles([float(each.get(phase, 0.0)) for each in seconds]) for phase in PHASES}
    phases["control"] = percentiles([sum(float(each.get(phase, 0.0)) for phase in CONTROL_PHASES) for each in seconds])
    compared_by = "token ids" if any(stream.ids for stream in unfailed) else "text"
    return {
        "rounds": len(rounds),
        "requests": sum(len(one.streams) for one in rounds),
        "failed": sum(one.failed for one in rounds),
        "different": sum(one.different for one in rounds),
        "compared_by": compared_by,
        "kill_to_next_token_s": percentiles(list(itertools.chain.from_iterable(one.stalls_s for one in rounds))),
        "longest_gap_unfailed_s": percentiles([max(stream.gaps_s) for stream in unfailed if stream.gaps_s]),
        "phases_s": phases,
        "return": return_figures([one.back for one in rounds if one.back is not None]),
        "gap_unfailed_s": percentiles(list(itertools.chain.from_iterable(stream.gaps_s for stream in unfailed))),
        "requests_moved": sum(int(one.recovery["requests_moved"]) for one in rounds),
        "each": [one.as_json() for one in rounds],
    }


def _show(figures: dict[str, Any], kind: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{figures['rounds']} rounds of {kind}, {figures['requests']} requests")
    for column in ("", "p50", "p99", "max"):
        table.add_column(column, justify="right" if column else "left")
    names = ("p50", "p99", "max")
    table.add_row(f"{kind} to next token, as clients saw it", *cells(figures["kill_to_next_token_s"], *names))
    table.add_row("longest gap without a failure", *cells(figures["longest_gap_unfailed_s"], *names))
    table.add_section()
    for phase in (*PHASES[:-1], "control", "total"):
        title = "detect + agree + mask + replan" if phase == "control" else phase
        table.add_row(title, *cells(figures["phases_s"][phase], *names))
    if figures["return"]:
        table.add_section()
        for row in return_rows(kind, figures["return"], names):
            table.add_row(*row)
        table.add_row("any gap without a failure", *cells(figures["gap_unfailed_s"], *names))
    console = Console()
    console.print(table)
    colour = "red" if figures["failed"] or figures["different"] else "green"
    console.print(
        f"[{colour}]{figures['failed']} requests failed, {figures['different']} tokens different[/] "
        f"(compared by {figures['compared_by']}), {figures['requests_moved']} requests moved"
    )
