"""What load balancing costs the streams: counting alone, moving experts beside them, and the switch itself.

    python benchmarks/rebalance.py MODEL [--ep-size 4] [--streams 8] [--tokens 200] [--rounds 6] [--json]

Three services of one model stay up for the whole run and get the same streams in turns, so that whatever else the
machine does falls on all: `off` (no --enable-eplb), `counting` (with --eplb-interval 0: nothing is planned) and
`moving` (plans every few steps for whatever they gain, so that experts move nearly all the time). A stream's gaps are
the times between its tokens; the median gap of a turn is a step. Ratios are of one turn to `off` in the same turn.

    counting   median step of `counting` / of `off`
    moving     median step of `moving` / of `off`, and how many rebalances and moved experts there were
    stall      the longest gap of any stream in a turn, in median steps of that turn, of `off` and of `moving`: what the
               switch costs is the difference
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from pathlib import Path

import click
import httpx
from rich.progress import track

from phalanx.testing.service import Service, ends_on_sigterm


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> list[float]:
    """The gaps between the tokens of one stream, in seconds."""
    times = []
    async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


async def burst(url: str, model: str, streams: int, tokens: int) -> list[float]:
    """The gaps of `streams` streams at once. The prompts repeat one letter each: they ask few experts."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=streams)) as client:
        bodies = [
            {
                "model": model,
                "prompt": "abcdefgh"[i % 8] * 24,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for i in range(streams)
        ]
        gaps = await asyncio.gather(*(stream(client, url, body) for body in bodies))
    # The first gaps are of the other streams' prompts.
    return [gap for one in gaps for gap in one[streams:]]


def counters(url: str) -> tuple[float, float]:
    """Rebalances and experts moved so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    switches = 'phalanx_recoveries_total{outcome="complete",trigger="rebalance"}'
    return tuple(  # type: ignore[return-value]
        sum(float(line.split()[-1]) for line in lines if line.startswith(name))
        for name in (switches, "phalanx_expert_moves_total")
    )


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True))
@click.option("--ep-size", default=4, help="Ranks of each service.")
@click.option("--streams", default=8, help="Streams at once.")
@click.option("--tokens", default=200, help="Tokens of each.")
@click.option("--rounds", default=6, help="Turns that count; one more warms up.")
@click.option("--interval", default=32, help="Steps between plans of the service that moves experts.")
@click.option("--redundant", default=4, help="Redundant experts of each service.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    model: str, ep_size: int, streams: int, tokens: int, rounds: int, interval: int, redundant: int, as_json: bool
) -> None:
    """Measure what load balancing costs the streams of MODEL."""
    same = ("--ep-size", str(ep_size), "--heartbeat-interval", "600", "--num-redundant-experts", str(redundant))
    often = ("--eplb-interval", str(interval), "--eplb-window", str(interval), "--eplb-min-gain", "0")
    name = Path(model).name
    with (
        ends_on_sigterm(),
        Service(model, *same) as off,
        Service(model, *same, "--enable-eplb", "--eplb-interval", "0") as counting,
        Service(model, *same, "--enable-eplb", *often) as moving,
    ):
        services = {"off": off, "counting": counting, "moving": moving}
        steps: dict[str, list[float]] = {key: [] for key in services}
        longest: dict[str, list[float]] = {key: [] for key in services}
        begun = (0.0, 0.0)
        for turn in track(range(rounds + 1), description="turns", disable=as_json):
            if turn == 1:
                begun = counters(moving.url)
            keys = list(services)
            for key in keys[turn % 3 :] + keys[: turn % 3]:
                gaps = asyncio.run(burst(services[key].url, name, streams, tokens))
                steps[key].append(statistics.median(gaps))
                longest[key].append(max(gaps) / statistics.median(gaps))
        ended = counters(moving.url)
    report = {
        "step_ms": {key: 1e3 * statistics.median(values[1:]) for key, values in steps.items()},
        "counting_ratio": statistics.median(
            a / b for a, b in zip(steps["counting"][1:], steps["off"][1:], strict=True)
        ),
        "moving_ratio": statistics.median(a / b for a, b in zip(steps["moving"][1:], steps["off"][1:], strict=True)),
        "rebalances": ended[0] - begun[0],
        "moves": ended[1] - begun[1],
        "longest_gap_steps": {key: statistics.median(values[1:]) for key, values in longest.items()},
        "rounds": rounds,
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    for key, ms in report["step_ms"].items():  # type: ignore[attr-defined]
        click.echo(
            f"{key}: median step {ms:.2f} ms, longest gap of a turn {report['longest_gap_steps'][key]:.1f} steps"
        )  # type: ignore[index]
    click.echo(f"counting / off: {report['counting_ratio']:.4f}   moving / off: {report['moving_ratio']:.4f}")
    click.echo(f"{report['rebalances']:.0f} rebalances, {report['moves']:.0f} experts moved")


if __name__ == "__main__":
    main()
