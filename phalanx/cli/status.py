"""`phalanx status`: a service's ranks, and what its last recovery cost."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click
import httpx

from phalanx.cli.errors import ServiceError, headers, talking_to

if TYPE_CHECKING:
    from rich.console import RenderableType

PHASES = ("detect", "agree", "mask", "replan", "restore", "replay", "total")
_COLOURS = {
    "healthy": "green",
    "suspected": "yellow",
    "dead": "red",
    "recovering": "yellow",
    "rejoining": "cyan",
    "paused": "blue",
    "leaving": "yellow",
}


@click.command()
@click.option("--url", envvar="PHALANX_URL", default="http://127.0.0.1:8000", show_default=True, help="The service.")
@click.option("--api-key", envvar="PHALANX_API_KEY", default="", help="Key to send.")
@click.option("--json", "as_json", is_flag=True, help="Print what the service answers, for programs.")
@click.option("--watch", is_flag=True, help="Go on showing it, until interrupted.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
def status(url: str, api_key: str, as_json: bool, watch: bool, interval: float) -> None:
    """Show the ranks of the service at --url and its last recovery."""
    from rich.console import Console

    with httpx.Client(base_url=url, headers=headers(api_key), timeout=10) as client:
        if watch:
            _watch(client, url, interval, as_json)
        elif as_json:
            click.echo(json.dumps(look(client, url)))
        else:
            Console().print(picture(look(client, url)))


def look(client: httpx.Client, url: str) -> dict[str, Any]:
    """{"ready", "fault_tolerance", "server_info"} as the service answers now. Raises ServiceError."""
    with talking_to(url):
        state = client.get("/fault_tolerance/status").raise_for_status().json()
        info = client.get("/server_info").raise_for_status().json()
        ready = client.get("/ready").status_code == httpx.codes.OK
    if not (isinstance(state, dict) and {"epoch", "ep_size", "ranks"} <= state.keys()):
        raise ServiceError(f"{url} is no Phalanx service: it does not say which ranks it has")
    return {"ready": ready, "fault_tolerance": state, "server_info": info}


def picture(seen: dict[str, Any]) -> RenderableType:
    """What `look` saw, as tables."""
    from rich.console import Group

    state = seen["fault_tolerance"]
    model = _named(seen["server_info"], "served_model_name", "model") or "service"
    last = state.get("last_recovery")
    return Group(ranks_table(state, model, seen["ready"]), recovery_table(last) if last else "no recovery yet")


def ranks_table(state: dict[str, Any], model: str, ready: bool) -> RenderableType:
    """The ranks of a /fault_tolerance/status answer, one a row."""
    from rich.table import Table

    word = "[green]ready[/]" if ready else "[red]not ready[/]"
    size = str(state["ep_size"])
    if state.get("max_ep_size", state["ep_size"]) > state["ep_size"]:
        size += f" of at most {state['max_ep_size']}"
    size += ", scaling" if state.get("scaling") else ""
    ranks = Table(title=f"{model}: {word}, epoch {state['epoch']}, ep_size {size}")
    for column in ("rank", "incarnation", "state", "pid", "host", "device"):
        ranks.add_column(column, justify="right" if column in ("rank", "incarnation", "pid") else "left")
    for rank in state["ranks"]:
        colour = _COLOURS.get(rank["state"], "white")
        ranks.add_row(
            str(rank["rank"]),
            str(rank["incarnation"]),
            f"[{colour}]{rank['state']}[/]",
            str(rank["pid"]),
            str(rank["host"]),
            str(rank["device"]),
        )
    return ranks


def recovery_table(last: dict[str, Any]) -> RenderableType:
    """One recovery: who was lost, milliseconds by phase, bytes restored by source."""
    from rich.table import Table

    who = (("lost", last["lost"]), ("joined", last.get("joined")), ("left", last.get("left")))
    ranks = "".join(f", {word} ranks {found}" for word, found in who if found)
    table = Table(title=f"last recovery: {last['trigger']}{ranks}, epoch {last['epoch']}", caption=_restored(last))
    for phase in PHASES:
        table.add_column(phase, justify="right")
    table.add_row(*(f"{1000 * last['seconds'].get(phase, 0.0):.1f} ms" for phase in PHASES))
    return table


def _restored(last: dict[str, Any]) -> str:
    restored = ", ".join(f"{count:,} from {source}" for source, count in last["bytes_restored"].items() if count)
    return f"bytes restored: {restored or 'none'}; requests moved: {last['requests_moved']}"


def _named(info: object, *names: str) -> str:
    """The first of `names` that a nested answer holds as text: what /server_info holds beside it may grow."""
    if not isinstance(info, dict):
        return ""
    for name in names:
        if isinstance(info.get(name), str) and info[name]:
            return str(info[name])
    return next((found for value in info.values() if (found := _named(value, *names))), "")


def _watch(client: httpx.Client, url: str, interval: float, as_json: bool) -> None:
    from rich.live import Live

    if as_json:
        while True:
            click.echo(json.dumps(look(client, url)))
            time.sleep(interval)
    with Live(picture(look(client, url)), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                live.update(picture(look(client, url)), refresh=True)
            except ServiceError as error:
                live.update(f"[red]{error}[/]", refresh=True)
