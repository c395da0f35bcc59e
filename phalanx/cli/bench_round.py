"""One round of a benchmark of failures: streams, a blow to some ranks in mid-stream, and what the clients felt of it.

`unfailed_run` is what every stream is compared with; `one_round` runs the same streams, strikes, waits until the
service has dealt with it (and, where it brings its ranks back, until all victims are back), and reads from the service
what its recovery cost by phase. `phalanx bench recovery` strikes ranks, benchmarks/two_hosts.py a whole host.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from phalanx.cli.bench_return import Return
from phalanx.cli.bench_return import figures as return_figures
from phalanx.cli.bench_return import rows as return_rows
from phalanx.cli.chaos import inject
from phalanx.cli.errors import ServiceError, headers, talking_to
from phalanx.cli.figures import cells, percentiles, prompts
from phalanx.testing.streams import Hurt, Stream, client, run_and_hurt, run_streams

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


@dataclass(frozen=True)
class Blow:
    """Which ranks fall together, and what makes them; with nothing left to look up when it is called."""

    victims: tuple[int, ...]
    strike: Callable[[], Awaitable[None]]


@dataclass
class Watch:
    """What the status showed from a blow on. Times are this process's."""

    failures: list[dict[str, Any]] = field(default_factory=list)
    """The recoveries from it: one, if all victims were found dead together."""
    back_s: float | None = None
    """When all victims were seen to be healthy again."""


@dataclass(frozen=True)
class Round:
    """One blow. Seconds; `stalls_s` has an entry for each stream that was not over when the victims fell. recovery: if
    there were several, all of them together. back: the victims' return, an entry for each time that some were let in;
    none where nobody comes back."""

    victims: tuple[int, ...]
    hurt_s: float
    streams: list[Stream]
    stalls_s: list[float]
    failed: int
    different: int
    recovery: dict[str, Any]
    back: list[Return]

    def as_json(self) -> dict[str, Any]:
        """Without the streams' own tokens and times."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("streams", "hurt_s")}
        return kept | {"errors": sorted({stream.error for stream in self.streams if stream.error})}


class Target:
    """A service that is to be hurt: reached over HTTP alone, or also ours to signal."""

    def __init__(self, url: str, api_key: str, service: Service | None = None, patience_s: float = _PATIENCE_S) -> None:
        """patience_s: how long the service may take to deal with a blow."""
        self.patience_s = patience_s
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

    def prepare(self, kind: str, *ranks: int) -> Callable[[], Awaitable[None]]:
        """What hurts `ranks` at once, with nothing left to look up: a signal where the processes are ours, else POST
        /chaos."""
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}.get(kind)
        if self.service is None or number is None:
            return lambda: asyncio.to_thread(self._inject, kind, ranks)
        pids = [entry["pid"] for entry in self.status()["ranks"] if entry["rank"] in ranks]

        async def send() -> None:
            for pid in pids:
                os.kill(pid, number)

        return send

    def _inject(self, kind: str, ranks: Sequence[int]) -> None:
        with talking_to(self.url):
            for rank in ranks:
                inject(self._http, kind, rank)

    def wait_for(self, what: str, satisfied: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status that satisfies; ServiceError when none does in time."""
        deadline = time.monotonic() + self.patience_s
        while not satisfied(state := self.status()):
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.url}: {what} did not happen in {self.patience_s:.0f} s")
            time.sleep(_LOOK_EVERY_S)
        return state

    def close(self) -> None:
        self._http.close()


def unfailed_run(target: Target, load: Load, model: str) -> list[Stream]:
    """The streams without a blow. ServiceError when one of them fails."""

    async def run() -> list[Stream]:
        async with client(target.url, target.api_key) as http:
            return await run_streams(http, "/v1/completions", load.bodies(model))

    streams = asyncio.run(run())
    if broken := [stream for stream in streams if stream.error]:
        raise ServiceError(f"{len(broken)} of {len(streams)} requests fail without any failure: {broken[0].error}")
    return streams


def count_healthy(state: dict[str, Any]) -> int:
    """How many ranks serve. LOCAL."""
    return sum(rank["state"] == "healthy" for rank in state["ranks"])


def is_healthy(state: dict[str, Any], rank: int) -> bool:
    """Whether a rank serves. LOCAL."""
    return any(entry["rank"] == rank and entry["state"] == "healthy" for entry in state["ranks"])


async def one_round(target: Target, load: Load, model: str, blow: Blow, unfailed: Sequence[Stream]) -> Round:
    """Run the streams, strike, and wait for what is awaited. ServiceError when that does not happen in time, or when
    the streams are over before."""
    bodies = load.bodies(model)
    streams = [Stream(str(number)) for number in range(len(bodies))]
    threshold = max(1, int(load.share * load.output_len * len(bodies)))
    state = await asyncio.to_thread(target.status)
    returns = target.service is not None and await asyncio.to_thread(target.brings_back)
    seen, log_line = Watch(), target.service.lines if target.service else 0
    before = {rank: _incarnation(state, rank) for rank in blow.victims}
    async with client(target.url, target.api_key) as http:
        watching: list[asyncio.Task[None]] = []

        async def hurt() -> None:
            await blow.strike()
            watching.append(asyncio.create_task(_watch(http, seen, state["epoch"], before, returns, target.patience_s)))

        done = await run_and_hurt(http, "/v1/completions", bodies, streams=streams, after_tokens=threshold, hurt=hurt)
        await asyncio.gather(*watching)
    unfinished = [stream for stream in streams if stream.name not in done.over]
    if not unfinished:
        raise ServiceError(
            "the streams were over before the failure: ask for a longer --output-len or a smaller --share"
        )
    if not seen.failures or (returns and seen.back_s is None):
        did_not = "return" if seen.failures else "fall"
        raise ServiceError(f"{target.url}: ranks {list(blow.victims)} did not {did_not} in time")
    return Round(
        victims=blow.victims,
        hurt_s=done.at_s,
        streams=streams,
        stalls_s=[silence[1] for stream in unfinished if (silence := stream.silence(done.at_s))],
        failed=sum(bool(stream.error) for stream in streams),
        different=sum(mine.different_tokens(theirs) for mine, theirs in zip(streams, unfailed, strict=True)),
        recovery=_together(seen.failures),
        back=_returns(target, seen, done, streams, before, log_line) if returns else [],
    )


async def _watch(
    http: httpx.AsyncClient, seen: Watch, epoch: int, before: dict[int, int], returns: bool, patience_s: float
) -> None:
    """Follow the status until the failure is dealt with and, if they return, all victims are back. before: the
    incarnation of each victim."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        state = (await http.get("/fault_tolerance/status")).raise_for_status().json()
        last = state["last_recovery"]
        if last is not None and last["epoch"] > epoch and not before.keys().isdisjoint(last["lost"]):
            epoch = last["epoch"]
            seen.failures.append(last)
        alive = [rank for rank in before if is_healthy(state, rank)]
        if not returns and before.keys() <= {rank for each in seen.failures for rank in each["lost"]}:
            return
        if len(alive) == len(before) and all(_incarnation(state, rank) > before[rank] for rank in alive):
            seen.back_s = seen.back_s or time.monotonic()
            if last is not None and before.keys().isdisjoint(last["lost"]):
                seen.failures = seen.failures or [last]
                if time.monotonic() > seen.back_s + _REPORTS_S:
                    return
        await asyncio.sleep(_WATCH_EVERY_S)


def _returns(
    target: Target, seen: Watch, hurt: Hurt, streams: list[Stream], before: dict[int, int], log_line: int
) -> list[Return]:
    assert seen.back_s is not None
    assert target.service is not None
    newcomers = [(rank, incarnation + 1) for rank, incarnation in before.items()]
    return Return.seen(target.service, streams, newcomers, (hurt.at_s, seen.back_s), log_line)


def _together(recoveries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several recoveries as one: who was lost in any, and the sums of what is counted."""
    whole = dict(recoveries[-1])
    whole["lost"] = sorted({rank for each in recoveries for rank in each["lost"]})
    whole["requests_moved"] = sum(int(each["requests_moved"]) for each in recoveries)
    for name in ("seconds", "bytes_restored", "seconds_restored"):
        parts = [each.get(name, {}) for each in recoveries]
        whole[name] = {key: sum(part.get(key, 0) for part in parts) for key in dict.fromkeys(itertools.chain(*parts))}
    return whole


def _incarnation(state: dict[str, Any], rank: int) -> int:
    return int(next(entry["incarnation"] for entry in state["ranks"] if entry["rank"] == rank))


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
        "return": return_figures([one.back for one in rounds]),
        "gap_unfailed_s": percentiles(list(itertools.chain.from_iterable(stream.gaps_s for stream in unfailed))),
        "requests_moved": sum(int(one.recovery["requests_moved"]) for one in rounds),
        "each": [one.as_json() for one in rounds],
    }


def show(figures: dict[str, Any], kind: str, title: str = "") -> None:
    """Print a `summary` as a table. kind: what happened to the victims, in a word. LOCAL."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or f"{figures['rounds']} rounds of {kind}, {figures['requests']} requests")
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
