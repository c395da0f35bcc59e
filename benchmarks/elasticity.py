"""The price of elasticity when nothing fails: decode throughput with it, against the same service without it.

    python benchmarks/elasticity.py MODEL [--ep-size 4] [--streams 16] [--tokens 64] [--rounds 20] [--json]

Both services (`--elastic` and `--no-elastic`: no masks, notices, life locks or overtaking checks in the communicator)
stay up for the whole run, and get the same burst of completions in turns, so that whatever else the machine does falls
on both. Each turn gives one ratio; the median and the quartiles of the ratios count.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import httpx
from rich.progress import track

from phalanx.testing.service import Service, ends_on_sigterm


def burst(client: httpx.Client, url: str, model: str, streams: int, tokens: int) -> float:
    """Generated tokens a second of one burst of `streams` completions of `tokens` tokens each."""
    prompts = [f"Stream number {i} tells the story of the rank that fell, and of" for i in range(streams)]
    body = {"model": model, "prompt": prompts, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    answer = client.post(f"{url}/v1/completions", json=body).raise_for_status().json()
    seconds = time.perf_counter() - began
    assert answer["usage"]["completion_tokens"] == streams * tokens, answer["usage"]
    return streams * tokens / seconds


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True))
@click.option("--ep-size", default=4, help="Ranks of each service.")
@click.option("--streams", default=16, help="Completions at once.")
@click.option("--tokens", default=64, help="Tokens of each.")
@click.option("--rounds", default=20, help="Turns that count; one more warms up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(model: str, ep_size: int, streams: int, tokens: int, rounds: int, as_json: bool) -> None:
    """Compare the throughput of MODEL with and without elasticity."""
    flags = ("--ep-size", str(ep_size), "--heartbeat-interval", "600")
    name = Path(model).name
    with (
        ends_on_sigterm(),
        Service(model, *flags) as on,
        Service(model, *flags, "--no-elastic") as off,
        httpx.Client(timeout=600) as client,
    ):
        pairs = []
        for turn in track(range(rounds + 1), description="turns", disable=as_json):
            order = [on, off] if turn % 2 else [off, on]
            rates = {service: burst(client, service.url, name, streams, tokens) for service in order}
            pairs.append((rates[on], rates[off]))
    pairs = pairs[1:]
    ratios = sorted(with_it / without for with_it, without in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    report = {
        "elastic_tokens_per_s": statistics.median(rate for rate, _ in pairs),
        "rigid_tokens_per_s": statistics.median(rate for _, rate in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "rounds": rounds,
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"elastic {report['elastic_tokens_per_s']:.1f} tokens/s, rigid {report['rigid_tokens_per_s']:.1f}")
    click.echo(
        f"elastic / rigid: median {statistics.median(ratios):.4f}, quartiles {quartiles[0]:.4f} {quartiles[2]:.4f}"
    )


if __name__ == "__main__":
    main()
