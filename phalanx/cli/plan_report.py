"""What `phalanx plan` finds out about a placement, as plain values for a table, a picture, a page or JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan import at_risk, at_risk_pairs, balancedness, diff, endurance, restore_seconds
from phalanx.world import EMPTY, IntArray, Placement, View


@dataclass(frozen=True)
class Stage:
    """One placement on the way: before the deaths, at once after them, or rebalanced.

    load_LE: what it is scored on. held_LP: what the slots held before it; None when there was nothing to move from.
    plan_ms: how long planning took here.
    """

    name: str
    placement: Placement
    view: View
    load_LE: npt.NDArray[np.float64]
    held_LP: IntArray | None
    plan_ms: float

    def figures(self, expert_bytes: int, rates: dict[str, float]) -> dict[str, object]:
        """The numbers of the table. rates: bytes/s a rank, by source."""
        alone = at_risk(self.placement, self.view)
        pairs = at_risk_pairs(self.placement, self.view)
        off = pairs[~np.eye(len(pairs), dtype=bool)]
        single = alone.sum(axis=0)
        out: dict[str, object] = {
            "ranks": len(self.view.ranks),
            "hosts": len({m.host for m in self.view.members}),
            "slots_filled_per_layer": int((self.placement.slots_LP != EMPTY).sum(axis=1).max()),
            "balancedness": round(balancedness(self.load_LE, self.placement, self.view), 4),
            "balancedness_routed": round(balancedness(self.load_LE, self.placement, self.view, routed=True), 4),
            "experts_with_one_replica_per_layer": round(float((self.placement.count_LE == 1).sum(axis=1).mean()), 2),
            "exposed_ranks_per_layer": round(float((alone > 0).sum(axis=1).mean()), 2),
            "experts_lost_by_one_death": {"mean": round(float(single.mean()), 2), "worst": int(single.max())},
            "experts_lost_by_two_deaths": {
                "mean": round(float(off.mean()), 2) if off.size else 0.0,
                "worst": int(off.max()) if off.size else 0,
            },
            "plan_ms": round(self.plan_ms, 2),
        }
        if self.held_LP is not None:
            moves = np.array([len(diff(self.held_LP, self.placement, r)) for r in self.view.ranks])
            out["experts_moved"] = int(moves.sum())
            out["bytes_moved"] = int(moves.sum()) * expert_bytes
            out["restore_seconds"] = {k: round(restore_seconds(moves, expert_bytes, v), 3) for k, v in rates.items()}
        return out

    def verdict(self, slots_R: list[int]) -> str:
        """The sizing answer in a sentence."""
        e = endurance(self.placement, self.view, slots_R)
        least = _few(e.at_once, "rank")
        hosts = f", {_few(e.hosts_at_once, 'whole host')}" if len({m.host for m in self.view.members}) > 1 else ""
        return f"survives {least}{hosts} at once; with restore {_few(e.with_restore, 'rank')}"


def _few(number: int, what: str) -> str:
    return f"no {what}" if number <= 0 else f"any {number} {what}{'s' * (number > 1)}"


ROWS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("living ranks / hosts", lambda f: f"{f['ranks']} / {f['hosts']}"),
    ("slots filled a layer", lambda f: f"{f['slots_filled_per_layer']}"),
    ("balancedness, equal shares", lambda f: f"{f['balancedness']:.3f}"),
    ("balancedness, router's shares", lambda f: f"{f['balancedness_routed']:.3f}"),
    ("experts with one replica, a layer", lambda f: f"{f['experts_with_one_replica_per_layer']:g}"),
    ("ranks whose death loses some, a layer", lambda f: f"{f['exposed_ranks_per_layer']:g}"),
    ("experts lost by one death, mean / worst", lambda f: _both(f["experts_lost_by_one_death"])),
    ("experts lost by two deaths, mean / worst", lambda f: _both(f["experts_lost_by_two_deaths"])),
    ("experts to move", lambda f: f"{f['experts_moved']}" if "experts_moved" in f else "-"),
    ("GiB to move", lambda f: f"{f['bytes_moved'] / 2**30:.1f}" if "bytes_moved" in f else "-"),
    ("planned in, ms", lambda f: f"{f['plan_ms']:.1f}"),
)
"""Label and text of each row of the table, from a stage's figures. Restore rows follow, one a rate."""


def _both(value: dict[str, float]) -> str:
    return f"{value['mean']:g} / {value['worst']}"


def table_rows(figures: list[dict[str, object]], rates: dict[str, float]) -> list[list[str]]:
    """Rows of text: the label, then each stage's figure."""
    rows = [[label, *(text(f) for f in figures)] for label, text in ROWS]
    for name, rate in rates.items():
        cells = []
        for f in figures:
            seconds = f.get("restore_seconds")
            cells.append(f"{seconds[name]:.2f}" if isinstance(seconds, dict) else "-")
        rows.append([f"seconds to restore at {rate / 1e9:g} GB/s a rank ({name})", *cells])
    return rows
