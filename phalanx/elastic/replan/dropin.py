"""The planner with the signature that expert-parallel engines know: torch in, torch out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import descending
from phalanx.elastic.replan.plan import replan
from phalanx.world import EMPTY, Member, Placement, View

if TYPE_CHECKING:
    from torch import Tensor


def rebalance_experts(
    weight: Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    active_ranks: Tensor | None = None,
    enable_hierarchical: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place experts on GPUs, in place of DeepSeek's EPLB `rebalance_experts` or SGLang's elasticity-aware one. LOCAL.

    weight: [L, E] load of each expert. num_replicas: P, physical slots a layer, a multiple of num_gpus; GPU g has the
    slots from g * P / num_gpus on, node n the GPUs from n * num_gpus / num_nodes on. active_ranks: int32 [num_gpus],
    1 = alive; None: all are. enable_hierarchical: keep groups of experts on one node where that costs no balance.

    Returns int64 tensors on the CPU: phy2log [L, P], which expert each slot holds; log2phy [L, E, X], the slots of each
    expert, then -1; logcnt [L, E], how many those are, at least 1. Slots of dead ranks are labelled in phy2log, never
    referenced by log2phy, not counted in logcnt. With P >= 2 E living slots every expert has slots on two GPUs (and on
    two nodes), with fewer the load decides where replicas go. Raises TooFewSlots with fewer living slots than experts,
    and ValueError for sizes that contradict each other and loads that are negative or not finite.
    """
    import torch

    if num_gpus < 1 or num_replicas % num_gpus:
        raise ValueError(f"num_replicas ({num_replicas}) must be a multiple of num_gpus ({num_gpus})")
    if num_nodes < 1 or num_gpus % num_nodes:
        raise ValueError(f"num_gpus ({num_gpus}) must be a multiple of num_nodes ({num_nodes})")
    if num_groups < 1 or num_replicas < 1:
        raise ValueError(f"num_groups ({num_groups}) and num_replicas ({num_replicas}) must be positive")
    given = torch.as_tensor(weight)
    if given.ndim != 2 or given.is_complex():
        raise ValueError(
            f"weight must be [layers, experts] of real numbers, it is {list(given.shape)} of {given.dtype}"
        )
    load = given.detach().to("cpu", torch.float64).numpy()
    alive = _alive(torch.ones(num_gpus) if active_ranks is None else torch.as_tensor(active_ranks), num_gpus)
    width, per_node = num_replicas // num_gpus, num_gpus // num_nodes
    members = tuple(Member(g, 0, host=f"node{g // per_node}") for g in range(num_gpus) if alive[g])
    placement = replan(
        load,
        View(0, num_gpus, members),
        num_experts=load.shape[1],
        slots_per_rank=width,
        num_groups=num_groups if enable_hierarchical else 1,
        priority="balance",
    )
    labels = _label(placement.slots_LP, load)
    living = np.where(np.repeat(alive, width), labels, EMPTY)
    table = Placement(living, load.shape[1], width)
    return (
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(table.slots_LEX.astype(np.int64)),
        torch.from_numpy(table.count_LE.astype(np.int64)),
    )


def _alive(active_ranks: Tensor, num_gpus: int) -> npt.NDArray[np.bool_]:
    mask = active_ranks.detach().cpu().numpy()
    if mask.shape != (num_gpus,) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"active_ranks must be [{num_gpus}] of 0 and 1, it is {list(mask.shape)}: {mask.tolist()}")
    return mask.astype(bool)


def _label(slots_LP: np.ndarray, load_LE: np.ndarray) -> np.ndarray:
    """Name an expert for every slot: callers know no empty ones. The hottest, in turn: on a living rank that already
    has every expert (or replicas of it everywhere) a second copy does no harm."""
    out = slots_LP.copy()
    empty = out == EMPTY
    turn = np.maximum(np.cumsum(empty, axis=1) - 1, 0) % load_LE.shape[1]
    hottest = descending(load_LE)
    out[empty] = np.take_along_axis(hottest, turn, 1)[empty]
    return out
