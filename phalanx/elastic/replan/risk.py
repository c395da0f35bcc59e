"""What deaths would cost: experts lost by one or two of them, how many the deployment survives, seconds to restore."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import Bools, Ints
from phalanx.world import EMPTY, Placement, View


def _held(placement: Placement, view: View) -> Bools:
    """[L, N, E]: which living rank has which expert."""
    layers, width = placement.num_layers, placement.slots_per_rank
    slots = placement.slots_LP.reshape(layers, -1, width)[:, list(view.ranks)]
    held = np.zeros((layers, slots.shape[1], placement.num_experts), bool)
    layer, rank, slot = np.nonzero(slots != EMPTY)
    held[layer, rank, slots[layer, rank, slot]] = True
    return held


def at_risk(placement: Placement, view: View) -> Ints:
    """int64 [L, N]: experts of a layer that each living rank, in rank order, has alone: what its death would lose."""
    held = _held(placement, view)
    alone: Ints = (held & (held.sum(axis=1, keepdims=True) == 1)).sum(axis=2)
    return alone


def at_risk_pairs(placement: Placement, view: View) -> Ints:
    """int64 [N, N]: experts, over all layers, lost when two ranks die together; on the diagonal when one does."""
    held = _held(placement, view)
    owners = held.sum(axis=1)
    alone = (held & (owners == 1)[:, None, :]).sum(axis=(0, 2))
    two = (held & (owners == 2)[:, None, :]).transpose(1, 0, 2).reshape(held.shape[1], -1).astype(np.float32)
    out: Ints = np.rint(two @ two.T).astype(np.int64) + alone[:, None] + alone[None, :]
    np.fill_diagonal(out, alone)
    return out


@dataclass(frozen=True)
class Endurance:
    """How many deaths a deployment survives, whichever ranks they are.

    at_once: so many at the same moment lose no expert, nothing need be restored. with_restore: so many leave slots for
    every expert, when what is lost is read again from a vault or the checkpoint. hosts_at_once: whole hosts likewise.
    """

    at_once: int
    with_restore: int
    hosts_at_once: int


def endurance(placement: Placement, view: View, limit_R: npt.ArrayLike | None = None) -> Endurance:
    """Count the deaths that this placement survives. limit_R: slots a rank; None: all have slots_per_rank."""
    held = _held(placement, view)
    at_once = int(held.sum(axis=1).min()) - 1
    names = [m.host for m in view.members]
    hosts = list(dict.fromkeys(names))
    by_host = np.stack([held[:, [n == host for n in names]].any(axis=1) for host in hosts], axis=1)
    limit = np.full(view.ep_size, placement.slots_per_rank) if limit_R is None else np.asarray(limit_R)
    slots = np.sort(np.minimum(limit[list(view.ranks)], placement.num_experts))
    with_restore = int((np.cumsum(slots) < placement.num_experts).sum())
    return Endurance(at_once, len(view.ranks) - 1 - with_restore, int(by_host.sum(axis=1).min()) - 1)


def restore_seconds(moves_N: npt.ArrayLike, expert_bytes: int, bytes_per_s: float, parallel: bool = True) -> float:
    """Seconds to fill `moves_N` slots a rank at `bytes_per_s` a rank (parallel), or at that rate for all together."""
    moves = np.asarray(moves_N, np.float64)
    most = moves.max(initial=0.0) if parallel else moves.sum()
    return float(most * expert_bytes / bytes_per_s)
