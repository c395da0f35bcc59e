"""`phalanx bench serve`: time to first token, time between tokens and throughput of any OpenAI-compatible service."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from phalanx.cli.errors import ServiceError
from phalanx.cli.figures import cells, machine, percentiles, prompts, served_model
from phalanx.testing.streams import Stream, client, run_streams


@dataclass(frozen=True)
class Traffic:
    """What is sent. Lengths in tokens; `concurrency` streams at once."""

    num_prompts: int
    concurrency: int
    input_len: int
    output_len: int
    temperature: float
    seed: int
    ignore_eos: bool
    text: bool

    def bodies(self, model: str) -> list[dict[str, Any]]:
        """One /v1/completions body for each prompt. With vLLM's field `ignore_eos` every answer has its full length."""
        sent = prompts(self.num_prompts, self.input_len, self.seed)
        extra = {"ignore_eos": True} if self.ignore_eos else {}
        return [
            {
                "model": model,
                "prompt": "".join(map(chr, prompt)) if self.text else prompt,
                "max_tokens": self.output_len,
                "temperature": self.temperature,
                "seed": self.seed + number,
                "stream_options": {"include_usage": True},
            }
            | extra
            for number, prompt in enumerate(sent)
        ]


@click.command(context_settings={"show_default": True})
@click.option("--url", envvar="PHALANX_URL", default="http://127.0.0.1:8000", help="Any OpenAI-compatible service.")
@click.option("--api-key", envvar="PHALANX_API_KEY", default="", help="Key to send.", show_default=False)
@click.option("--model", default="", help="Model name; by default the first that the service lists.")
@click.option("--concurrency", type=click.IntRange(min=1), default=16, help="Streams at once.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, help="Requests in all.")
@click.option("--input-len", type=click.IntRange(min=1), default=128, help="Tokens a prompt.")
@click.option("--output-len", type=click.IntRange(min=1), default=64, help="Tokens an answer.")
@click.option("--temperature", type=float, default=0.0, help="0 is greedy.")
@click.option("--seed", type=int, default=0, help="Of the prompts and of sampling.")
@click.option("--ignore-eos/--respect-eos", default=True, help="Whether every answer has its full length.")
@click.option("--text", is_flag=True, help="Send prompts as text, for services that take no token ids.")
@click.option("--warmup", type=click.IntRange(min=0), default=2, help="Requests before the measured ones.")
@click.option("--timeout", type=float, default=300.0, help="The longest silence of a stream, in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def serve(url: str, api_key: str, model: str, warmup: int, timeout: float, as_json: bool, **traffic: Any) -> None:
    """Send completions to the service at --url and measure what comes back."""
    sent = Traffic(**traffic)
    model = model or served_model(url, api_key)
    streams, seconds = asyncio.run(_measure(url, api_key, timeout, sent, model, warmup))
    figures = summary(streams, seconds)
    if not figures["completed"]:
        raise ServiceError(f"no request of {len(streams)} succeeded; the first said: {streams[0].error}")
    if as_json:
        command = shlex.join(["phalanx", *sys.argv[1:]])
        click.echo(json.dumps({"command": command, "url": url, "model": model} | machine() | figures, indent=2))
    else:
        _show(figures, model)
    if figures["failed"]:
        click.echo(f"phalanx bench: {figures['failed']} requests failed: {figures['errors'][0]}", err=True)
        sys.exit(1)


async def _measure(
    url: str, api_key: str, timeout_s: float, sent: Traffic, model: str, warmup: int
) -> tuple[list[Stream], float]:
    bodies = sent.bodies(model)
    async with client(url, api_key, timeout_s) as http:
        await run_streams(http, "/v1/completions", bodies[:warmup], concurrency=sent.concurrency)
        start = time.monotonic()
        streams = await run_streams(http, "/v1/completions", bodies, concurrency=sent.concurrency)
        return streams, time.monotonic() - start


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, Any]:
    """The figures of a run that took `seconds`. LOCAL.

    ttft: request to first token. itl: between one piece of the stream and the next. tpot: a stream's mean seconds a
    token after the first. e2e: request to last token. Tokens as the service counts them, else the pieces."""
    good = [stream for stream in streams if not stream.error and stream.arrivals_s]
    tokens = {id(stream): stream.completion_tokens or stream.tokens for stream in good}
    output = sum(tokens.values())
    spans = [(stream.arrivals_s[-1] - stream.arrivals_s[0], tokens[id(stream)] - 1) for stream in good]
    return {
        "completed": len(good),
        "failed": len(streams) - len(good),
        "errors": sorted({stream.error or "no token came" for stream in streams if stream not in good}),
        "seconds": seconds,
        "input_tokens": sum(stream.prompt_tokens for stream in good),
        "output_tokens": output,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": output / seconds,
        "ttft_s": percentiles([stream.ttft_s for stream in good]),
        "itl_s": percentiles([gap for stream in good for gap in stream.gaps_s]),
        "tpot_s": percentiles([span / count for span, count in spans if count > 0]),
        "e2e_s": percentiles([stream.arrivals_s[-1] - stream.sent_s for stream in good]),
    }


def _show(figures: dict[str, Any], model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {figures['completed']} requests in {figures['seconds']:.2f} s")
    for column in ("", "mean", "p50", "p99", "max"):
        table.add_column(column, justify="right" if column else "left")
    for name, title in (
        ("ttft_s", "time to first token"),
        ("itl_s", "between tokens"),
        ("tpot_s", "a token after the first"),
        ("e2e_s", "whole request"),
    ):
        table.add_row(title, *cells(figures[name], "mean", "p50", "p99", "max"))
    console = Console()
    console.print(table)
    console.print(
        f"throughput: {figures['output_tokens_per_s']:.1f} tokens/s, {figures['requests_per_s']:.2f} requests/s "
        f"({figures['input_tokens']} tokens in, {figures['output_tokens']} out)"
    )
