"""A page about a plan that needs nothing but a browser: the table, and every layer's heat map, drawn from the data."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment

from phalanx.cli.plan_report import Stage
from phalanx.elastic.replan import at_risk_pairs, rank_loads
from phalanx.errors import BadConfig


def write(path: Path, title: str, stages: list[Stage], rows: list[list[str]], lines: list[str]) -> None:
    """Write the page. LOCAL. Raises BadConfig when it cannot be written."""
    data = {"stages": [_data(s) for s in stages]}
    source = files("phalanx.cli").joinpath("plan_page.html.jinja").read_text()
    page = Environment(autoescape=True).from_string(source)
    text = page.render(
        title=title,
        stages=stages,
        rows=rows,
        lines=lines,
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )
    try:
        path.write_text(text)
    except OSError as error:
        raise BadConfig(f"--html {path}: cannot be written: {error.strerror}") from None


def _data(stage: Stage) -> dict[str, object]:
    """What the page draws from. Loads are parts of their layer's sum, in millionths."""
    placement, view = stage.placement, stage.view
    load = stage.load_LE / np.maximum(stage.load_LE.sum(axis=1, keepdims=True), 1e-300)
    return {
        "name": stage.name,
        "ranks": view.ep_size,
        "alive": list(view.ranks),
        "hosts": [m.host for m in view.members],
        "width": placement.slots_per_rank,
        "slots": placement.slots_LP.tolist(),
        "load": np.rint(load * 1e6).astype(int).tolist(),
        "carried": np.rint(rank_loads(load, placement, view) * 1e6).astype(int).tolist(),
        "pairs": at_risk_pairs(placement, view).tolist(),
    }
