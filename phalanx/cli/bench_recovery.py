"""`phalanx bench recovery`: kill ranks under load, and measure what the clients felt.

First one unfailed run, which is what every stream is compared with afterwards. Then round by round: start the same
streams, hurt one rank in mid-stream, let the streams end, compare them token by token, and read from the service what
its recovery cost by phase. Where the service brings its ranks back, the round also waits for the victim's return, and
measures how long that took and what the streams felt of it; all rounds then run in one service. With
`--serve-flags "--max-restarts 0"` nobody returns, and each round has a fresh service.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from phalanx.cli.bench_round import (
    Blow,
    Load,
    Round,
    Target,
    count_healthy,
    is_healthy,
    one_round,
    show,
    summary,
    unfailed_run,
)
from phalanx.cli.errors import ServiceError
from phalanx.cli.figures import machine, served_model
from phalanx.errors import BadConfig
from phalanx.testing.streams import Stream


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
        draw(picture, worst.streams, worst.hurt_s, f"rank {worst.victims[0]}: {kind}")
    if as_json:
        command = shlex.join(["phalanx", *sys.argv[1:]])
        settings = {"command": command, "kind": kind, **load}
        click.echo(json.dumps(settings | machine() | figures, indent=2))
    else:
        show(figures, kind)
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
    from phalanx.testing.service import Service, ServiceEnded, ends_on_sigterm

    keyed = ["--api-key", api_key] if api_key else []
    try:
        with ends_on_sigterm(), Service(model, *flags, *keyed) as service:
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
                    unfailed = unfailed_run(target, load, model)
                    bar.advance(task)
                in_this_service = rounds_per_service or (rounds if target.brings_back() else 1)
                for _ in range(min(in_this_service, rounds - len(done))):
                    victim = _next_victim(target, victims, len(done))
                    bar.update(task, description=f"round {len(done) + 1}: {kind} rank {victim}")
                    done.append(asyncio.run(_round(target, load, model, kind, victim, unfailed)))
                    bar.advance(task)
    return unfailed, done


async def _round(target: Target, load: Load, model: str, kind: str, victim: int, unfailed: list[Stream]) -> Round:
    blow = Blow((victim,), target.prepare(kind, victim))
    done = await one_round(target, load, model, blow, unfailed)
    if kind == "stop" and not done.back:
        await target.prepare("cont", victim)()
    return done


def _next_victim(target: Target, victims: list[int], number: int) -> int:
    """The rank whose turn it is. In a service that brings ranks back, its return is awaited; in one of ours, where
    nobody comes back, the next living one takes the turn. ServiceError when no two ranks live."""
    state = target.wait_for("that two ranks are healthy", lambda state: count_healthy(state) > 1)
    in_turn = victims or list(range(state["ep_size"]))
    if not set(in_turn) <= set(range(state["ep_size"])):
        raise BadConfig(f"--ranks {in_turn}: the service has the ranks 0 to {state['ep_size'] - 1}")
    turned = [in_turn[(number + offset) % len(in_turn)] for offset in range(len(in_turn))]
    if target.service is None or target.brings_back():
        target.wait_for(f"the return of rank {turned[0]}", lambda state: is_healthy(state, turned[0]))
        return turned[0]
    living = [rank for rank in turned if is_healthy(state, rank)]
    if not living:
        raise ServiceError(f"none of --ranks {in_turn} is left to fail: lower --rounds-per-service")
    return living[0]
