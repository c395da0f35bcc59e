"""A picture of two placements: who holds what, what each rank carries, what deaths would lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phalanx.cli.plan_report import Stage
from phalanx.elastic.replan import at_risk, at_risk_pairs, balancedness, rank_loads
from phalanx.errors import BadConfig
from phalanx.world import EMPTY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROTECTED, ALONE = "Blues", "Reds"


def require_matplotlib() -> None:
    """Raise BadConfig before any work is done. LOCAL."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadConfig("--png needs matplotlib: run `pip install 'phalanx[plot]'`") from None


def draw(path: Path, title: str, before: Stage, after: Stage, layer: int = 0) -> None:
    """Write a png with one row for each of the two stages. LOCAL. `layer` is the one whose heat map is shown."""
    from matplotlib.figure import Figure

    ranks = before.view.ep_size
    height = min(0.075 * ranks + 2.2, 8.0)
    figure = Figure(figsize=(15, 2 * height + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(2, 3, width_ratios=[6.2, 1.5, 2.4])
    most = max(float((s.load_LE[layer] / np.maximum(s.placement.count_LE[layer], 1)).max()) for s in (before, after))
    worst = max(int(at_risk_pairs(s.placement, s.view).max()) for s in (before, after))
    for row, stage in enumerate((before, after)):
        heat, bars, risk = (figure.add_subplot(grid[row, i]) for i in range(3))
        _heat(heat, stage, layer, most)
        _bars(bars, stage, layer)
        image = _risk(risk, stage, worst)
        figure.colorbar(image, ax=risk, shrink=0.8, label="experts lost, all layers")
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise BadConfig(f"--png {path}: cannot be written: {error.strerror}") from None


def _heat(axes: Axes, stage: Stage, layer: int, most: float) -> None:
    """Ranks x experts, hottest expert left: how much load each replica carries; blue where another rank has it too."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    placement, view = stage.placement, stage.view
    count, load = placement.count_LE[layer], stage.load_LE[layer]
    part = load / np.maximum(count, 1)
    column = np.empty(load.size, np.int64)
    column[np.argsort(-load, kind="stable")] = np.arange(load.size)
    picture = np.ones((view.ep_size, load.size, 4))
    picture[[r for r in range(view.ep_size) if r not in view.ranks]] = (0.86, 0.86, 0.86, 1.0)
    for rank in view.ranks:
        for expert in placement.of_rank(rank)[layer]:
            if expert != EMPTY:
                shade = 0.35 + 0.65 * float(part[expert] / most) ** 0.4
                picture[rank, column[expert]] = colormaps[PROTECTED if count[expert] > 1 else ALONE](shade)
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set_xlabel("experts, hottest first", loc="left")
    axes.set_ylabel("rank")
    exposed = int((at_risk(placement, view)[layer] > 0).sum())
    axes.set_title(
        f"{stage.name}, layer {layer}: death of {exposed} of {len(view.ranks)} ranks loses an expert",
        loc="left",
        fontsize=10,
    )
    axes.legend(
        handles=[
            Patch(color=colormaps[PROTECTED](0.8), label="another rank has it too"),
            Patch(color=colormaps[ALONE](0.7), label="nobody else has it"),
            Patch(color="0.86", label="dead rank"),
        ][: 2 + (len(view.ranks) < view.ep_size)],
        loc="upper right", bbox_to_anchor=(1.0, -0.05), ncols=3, fontsize=8, frameon=False, borderaxespad=0.2,
    )  # fmt: skip
    _host_lines(axes, stage)


def _bars(axes: Axes, stage: Stage, layer: int) -> None:
    """Load of each rank as a multiple of the mean: this layer, and all layers as a thin line."""
    loads = rank_loads(stage.load_LE, stage.placement, stage.view)
    mean = np.maximum(loads.mean(axis=1, keepdims=True), 1e-300)
    relative = (loads / mean)[layer]
    colors = ["tab:red" if v > 1.05 else "tab:blue" for v in relative]
    axes.barh(stage.view.ranks, relative, height=0.8, color=colors)
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    axes.set_ylim(stage.view.ep_size - 0.5, -0.5)
    axes.set_xlim(0, max(1.5, float(relative.max()) * 1.08))
    axes.set_xlabel("load / mean")
    axes.tick_params(labelleft=False)
    even = balancedness(stage.load_LE, stage.placement, stage.view)
    axes.set_title(f"balancedness {even:.3f}\nover all layers", loc="left", fontsize=10)


def _risk(axes: Axes, stage: Stage, worst: int) -> Any:
    """Ranks x ranks: experts lost when both die; the diagonal is one death."""
    pairs = at_risk_pairs(stage.placement, stage.view)
    full = np.full((stage.view.ep_size, stage.view.ep_size), np.nan)
    full[np.ix_(stage.view.ranks, stage.view.ranks)] = pairs
    image = axes.imshow(full, cmap="YlOrRd", vmin=0, vmax=max(worst, 1), interpolation="nearest")
    axes.set_facecolor("0.86")
    axes.set_xlabel("rank that dies")
    axes.set_ylabel("with rank")
    single = np.diag(pairs)
    axes.set_title(
        f"lost by one death: {single.mean():.1f} (worst {single.max()})\n"
        f"by two: {(pairs.sum() - single.sum()) / max(1, pairs.size - len(pairs)):.1f} (worst {pairs.max()})",
        loc="left", fontsize=10,
    )  # fmt: skip
    return image


def _host_lines(axes: Axes, stage: Stage) -> None:
    names = {m.rank: m.host for m in stage.view.members}
    before = None
    for rank in range(stage.view.ep_size):
        name = names.get(rank, before)
        if before is not None and name != before:
            axes.axhline(rank - 0.5, color="0.4", linewidth=0.7)
        before = name
