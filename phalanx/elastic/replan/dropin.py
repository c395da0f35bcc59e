"""The planner with the signature that expert-parallel engines know: torch in, torch out."""

from __future__ import annotations

import operator
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
    and ValueError, naming the argument, for sizes that contradict each other, loads that are negative or not finite,
    and what is no number or no tensor of them.
    """
    import torch

    num_replicas, num_groups = _whole("num_replicas", num_replicas), _whole("num_groups", num_groups)
    num_nodes, num_gpus = _whole("num_nodes", num_nodes), _whole("num_gpus", num_gpus)
    if num_gpus < 1 or num_replicas % num_gpus:
        raise ValueError(f"num_replicas ({num_replicas}) must be a multiple of num_gpus ({num_gpus})")
    if num_nodes < 1 or num_gpus % num_nodes:
        raise ValueError(f"num_gpus ({num_gpus}) must be a multiple of num_nodes ({num_nodes})")
    if num_groups < 1 or num_replicas < 1:
        raise ValueError(f"num_groups ({num_groups}) and num_replicas ({num_replicas}) must be positive")
    load = _numbers("weight", weight)
    if load.ndim != 2 or not load.shape[1]:
        raise ValueError(f"weight must be [layers, experts], it is {list(load.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        if not (np.isfinite(load.sum(axis=1)).all() and load.min(initial=0.0) >= 0):
            raise ValueError("weight must be finite, in sum over a layer too, and not negative")
    alive = (
        np.ones(num_gpus, bool) if active_ranks is None else _alive(_numbers("active_ranks", active_ranks), num_gpus)
    )
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


def _whole(name: str, number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, it is {number!r}") from None


def _numbers(name: str, given: Tensor) -> npt.NDArray[np.float64]:
    """A tensor, or what can become one, of real numbers, as float64 on the CPU."""
    import torch

    try:
        tensor = torch.as_tensor(given)
        if tensor.is_complex():
            raise TypeError(f"they are {tensor.dtype}")
        return np.asarray(tensor.detach().to("cpu", torch.float64).numpy(), np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # torch has a kind of error for each kind of oddity
        said = str(error).partition("\n")[0]
        raise ValueError(f"{name} must be a tensor of real numbers, and cannot be read as one: {said}") from None


def _alive(mask: npt.NDArray[np.float64], num_gpus: int) -> npt.NDArray[np.bool_]:
    if mask.shape != (num_gpus,) or not np.isin(mask, (0, 1)).all():
        said = f"{list(mask.shape)}: {mask.tolist()}" if mask.size <= 64 else f"{list(mask.shape)}"
        raise ValueError(f"active_ranks must be [{num_gpus}] of 0 and 1, it is {said}")
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
