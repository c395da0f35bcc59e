"""`phalanx plan`: place experts on ranks without a cluster, and see what deaths would cost."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import get_args

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from phalanx.cli.plan_load import KINDS, Floats, read_load, synthetic
from phalanx.cli.plan_report import Stage, table_rows
from phalanx.elastic.replan import Priority, replan
from phalanx.errors import BadConfig, TooFewSlots
from phalanx.world import EMPTY, IntArray, Member, Placement, View

MOST_EXPERTS = 8192
"""Experts in a layer; exchanges look at all pairs of two ranks' slots."""

MOST_CELLS = 1 << 27
"""Layers x experts x ranks: as many bytes, several times over, and so many steps to count what two deaths lose."""


@click.command()
@click.option(
    "--load", "load_file", type=click.Path(path_type=Path), help="npz, csv or json: tokens a layer and expert."
)
@click.option("--synthetic", "kind", type=click.Choice(KINDS), default="lognormal", show_default=True)
@click.option("--layers", type=click.IntRange(1, 1024), default=61, show_default=True, help="Of a synthetic load.")
@click.option(
    "--experts", type=click.IntRange(1, MOST_EXPERTS), default=256, show_default=True, help="Of a synthetic load."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--ranks", type=click.IntRange(1, 4096), default=32, show_default=True)
@click.option("--hosts", type=click.IntRange(1), default=4, show_default=True, help="Ranks are split evenly, in order.")
@click.option("--slots", default="", help="Slots a rank and layer; several, with commas: one number a rank.")
@click.option("--redundant", type=click.IntRange(0), help="Fill experts + this many slots a layer; default: all.")
@click.option("--dead", default="", help="Ranks that die, with commas.")
@click.option("--groups", type=click.IntRange(1), default=1, show_default=True, help="Groups of experts (DeepSeek).")
@click.option("--priority", type=click.Choice(get_args(Priority)), default="even", show_default=True,
              help="What comes first with fewer than two slots an expert: docs/planner.md.")  # fmt: skip
@click.option("--expert-mb", type=click.FloatRange(0, min_open=True), default=44.0, show_default=True, help="MB, 10^6.")
@click.option("--rate", "rates", multiple=True, default=("peer=40", "vault=9", "disk=2"), show_default=True,
              help="SOURCE=GB/s a rank, to restore from; may be repeated.")  # fmt: skip
@click.option("--png", type=click.Path(path_type=Path), help="Write a picture (needs phalanx[plot]).")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def plan(
    load_file: Path | None, kind: str, layers: int, experts: int, seed: int, ranks: int, hosts: int, slots: str,
    redundant: int | None, dead: str, groups: int, priority: str, expert_mb: float, rates: tuple[str, ...],
    png: Path | None, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Place experts on ranks and see what their deaths would cost.

    Plans on one window of the load and scores on the next. With --dead it shows the plan at once after the deaths (only
    what is missing moves) and the one that balances again. Without, it compares with experts laid out in order.
    """
    if png is not None:
        from phalanx.cli.plan_picture import require_matplotlib

        require_matplotlib()
    if load_file:
        windows = read_load(load_file)
        layers, experts = windows.shape[1:]
    _check_size(layers, experts, ranks)
    if not load_file:
        windows = synthetic(kind, layers, experts, seed=seed)
    if experts % groups:
        raise BadConfig(f"--groups {groups}: {experts} experts are not so many equal groups")
    if not math.isfinite(expert_mb):
        raise BadConfig(f"--expert-mb {expert_mb}: expected a number of megabytes")
    slots_R = _slots(slots, ranks, experts, redundant)
    if hosts > ranks:
        raise BadConfig(f"--hosts {hosts} is more than --ranks {ranks}")
    gone = _numbers("--dead", dead)
    if any(not 0 <= r < ranks for r in gone):
        raise BadConfig(f"--dead {dead}: ranks go from 0 to {ranks - 1}")
    speeds = _rates(rates)
    expert_bytes = round(expert_mb * 1e6)
    settings = dict(
        num_experts=experts, slots_per_rank=max(slots_R), rank_slots=slots_R, num_groups=groups, priority=priority,
        num_replicas=None if redundant is None else experts + redundant,
    )  # fmt: skip
    try:
        stages = _stages(windows, _view(ranks, hosts), set(gone), settings)
    except TooFewSlots as error:
        fewer = " or let fewer ranks die (--dead)" if gone else ""
        raise BadConfig(f"{error}: give each rank more --slots{fewer}") from None
    figures = [s.figures(expert_bytes, speeds) for s in stages]
    planned = stages[-1] if gone else stages[1]
    lines = [f"{s.name}: {s.verdict(slots_R)}" for s in stages]
    title = (
        f"{windows.shape[1]} layers, {experts} experts on {ranks} ranks of {hosts} hosts, {_said(slots_R)} slots a rank"
    )
    if as_json:
        answer = {
            "title": title,
            "stages": {s.name: f for s, f in zip(stages, figures, strict=True)},
            "capacity": lines,
        }
        click.echo(json.dumps(answer, indent=2))
    else:
        _print(title, stages, table_rows(figures, speeds), lines)
    if png is not None:
        from phalanx.cli.plan_picture import draw

        draw(png, title, stages[0], planned)
    if html is not None:
        from phalanx.cli.plan_page import write

        write(html, title, stages, table_rows(figures, speeds), lines)


def _stages(windows: Floats, view: View, gone: set[int], settings: dict[str, object]) -> list[Stage]:
    """In order, then planned; with deaths: planned, at once after them, rebalanced."""
    known, scored = windows[max(0, len(windows) - 2)], windows[-1]

    def timed(name: str, on: View, held: IntArray | None, least: bool) -> Stage:
        start = time.perf_counter()
        placement = replan(known, on, held_LP=held, min_moves=least, **settings)  # type: ignore[arg-type]
        return Stage(name, placement, on, scored, held, (time.perf_counter() - start) * 1e3)

    first = timed("planned", view, None, False)
    if not gone:
        return [Stage("in order", _in_order(first.placement, view), view, scored, None, 0.0), first]
    survivors = View(2, view.ep_size, tuple(m for m in view.members if m.rank not in gone))
    if not survivors.members:
        raise BadConfig("--dead: somebody must live")
    held = np.where(np.repeat(survivors.mask_R == 1, first.placement.slots_per_rank), first.placement.slots_LP, EMPTY)
    least = timed("after the deaths", survivors, held.astype(np.int32), True)
    return [first, least, timed("rebalanced", survivors, least.placement.slots_LP, False)]


def _in_order(planned: Placement, view: View) -> Placement:
    """Experts laid out one after another over the slots that the plan fills, starting anew at the end: no planner."""
    used = planned.slots_LP[0] != EMPTY
    row = np.full(used.size, EMPTY, np.int32)
    row[used] = np.arange(int(used.sum())) % planned.num_experts
    return Placement(np.tile(row, (planned.num_layers, 1)), planned.num_experts, planned.slots_per_rank)


def _check_size(layers: int, experts: int, ranks: int) -> None:
    """Refuse what would take minutes, and memory for each layer, expert and rank, though nobody builds it."""
    if experts > MOST_EXPERTS:
        raise BadConfig(f"--load: has {experts} experts a layer; at most {MOST_EXPERTS} can be planned for")
    if layers * experts * ranks > MOST_CELLS:
        raise BadConfig(
            f"{layers} layers x {experts} experts x {ranks} ranks are too many to look at, at most {MOST_CELLS} cells: "
            "layers are planned alike, so take fewer of them (--layers, or rows of --load)"
        )


def _view(ranks: int, hosts: int) -> View:
    return View(1, ranks, tuple(Member(r, 0, host=f"host{r * hosts // ranks}") for r in range(ranks)))


def _slots(text: str, ranks: int, experts: int, redundant: int | None) -> list[int]:
    """Slots of each rank: as told, or as many as experts and redundant ones (default: an eighth, or one a rank) need.
    Never more than there are experts, as a rank has no use for a second copy."""
    if not text:
        extra = redundant if redundant is not None else max(ranks, experts // 8)
        return [min(-(-(experts + extra) // ranks), experts)] * ranks
    numbers = _numbers("--slots", text)
    if len(numbers) == 1:
        numbers *= ranks
    if len(numbers) != ranks or min(numbers) < 0 or max(numbers) < 1:
        raise BadConfig(f"--slots {text}: give one positive number, or one for each of the {ranks} ranks")
    return [min(number, experts) for number in numbers]


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise BadConfig(f"{flag} {text}: expected whole numbers with commas between") from None


def _rates(texts: tuple[str, ...]) -> dict[str, float]:
    """Bytes/s by source."""
    out = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in out:
            raise BadConfig(f"--rate {text}: {name} has a rate already")
        try:
            out[name] = float(value) * 1e9
        except ValueError:
            out[name] = 0.0
        if not name or not 0 < out[name] < float("inf"):
            raise BadConfig(f"--rate {text}: expected SOURCE=GB/s, such as peer=40")
    return out


def _said(slots_R: list[int]) -> str:
    return str(slots_R[0]) if len(set(slots_R)) == 1 else f"{min(slots_R)} to {max(slots_R)}"


def _print(title: str, stages: list[Stage], rows: list[list[str]], lines: list[str]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width: no need to break lines
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
