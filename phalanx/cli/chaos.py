"""`phalanx chaos`: make a rank fail on purpose, through the service's public fault injector."""

from __future__ import annotations

from collections.abc import Mapping

import click
import httpx

from phalanx.cli.errors import ServiceError, headers, message_of, talking_to
from phalanx.errors import BadConfig
from phalanx.testing.faults import DEVICE_KINDS, POINTS

KINDS = ("kill", "stop", "cont", "raise", *DEVICE_KINDS)


def _table(rows: Mapping[str, str], width: int) -> str:
    """Lines that click leaves as they are."""
    return "\b\n" + "\n".join(f"{name:{width}} {text}" for name, text in rows.items())


_EPILOG = f"On CUDA devices only:\n\n{_table(DEVICE_KINDS, 14)}\n\nPoints:\n\n{_table(POINTS, 12)}"


@click.command(epilog=_EPILOG)
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--rank", type=click.IntRange(min=0), required=True, help="The rank that is to fail.")
@click.option("--at-step", type=click.IntRange(min=0), help="Not before this step.")
@click.option("--where", type=click.Choice(list(POINTS)), help="The point in the code; without it, at once.")
@click.option("--url", envvar="PHALANX_URL", default="http://127.0.0.1:8000", show_default=True, help="The service.")
@click.option("--api-key", envvar="PHALANX_API_KEY", default="", help="Key to send.")
def chaos(kind: str, rank: int, at_step: int | None, where: str | None, url: str, api_key: str) -> None:
    """Kill, stop or continue a rank's process, raise an exception in it, or make its CUDA device fail.

    The service must have been started with --enable-chaos. Without --at-step and --where, kill and stop come from
    outside, as a signal at any instruction; with one of them the rank does it to itself at that point. All other kinds
    happen at the beginning of its next step."""
    if kind == "cont" and (at_step is not None or where):
        raise BadConfig("cont works at once: a stopped process reaches no point (drop --at-step and --where)")
    with httpx.Client(base_url=url, headers=headers(api_key), timeout=10) as client, talking_to(url):
        inject(client, kind, rank, at_step, where)
    when = f" at {where or 'step'}" if where or at_step is not None else ""
    when += f" from step {at_step} on" if at_step is not None else ""
    click.echo(f"{kind}: rank {rank}{when}")


def inject(client: httpx.Client, kind: str, rank: int, at_step: int | None = None, where: str | None = None) -> None:
    """POST /chaos. Raises ServiceError when the service refuses, httpx's errors when it is not there."""
    body = {"kind": kind, "rank": rank, "at_step": at_step, "where": where}
    response = client.post("/chaos", json={name: value for name, value in body.items() if value is not None})
    if response.status_code == httpx.codes.FORBIDDEN:
        raise ServiceError(
            f"the service refuses to be hurt ({message_of(response)}): start it with `phalanx serve ... --enable-chaos`"
        )
    response.raise_for_status()
