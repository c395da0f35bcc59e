"""A plain implementation of DeepSeek's published expert load balancing, from its description, to compare with.

The description (README of github.com/deepseek-ai/EPLB and the DeepSeek-V3 report): replicate by always giving the next
replica to the expert whose replicas carry most; pack by always giving the next heaviest item to the lightest pack that
has room. Hierarchical: pack groups of experts to nodes, replicate within nodes, pack replicas to the GPUs of a node.
Global: the same with one node and one group. It knows of no dead ranks, and of no replicas that must lie apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def pack(weight: Floats, packs: int) -> list[list[int]]:
    """Items to packs, equally many each: heaviest first, to the lightest pack that has room."""
    room = weight.size // packs
    load, out = [0.0] * packs, [[] for _ in range(packs)]  # type: ignore[var-annotated]
    for item in np.argsort(-weight, kind="stable").tolist():
        best = min((p for p in range(packs) if len(out[p]) < room), key=load.__getitem__)
        out[best].append(item)
        load[best] += float(weight[item])
    return out


def replicate(weight: Floats, slots: int) -> Ints:
    """Replicas of each expert."""
    count = np.ones(weight.size, np.int64)
    for _ in range(slots - weight.size):
        count[np.argmax(weight / count)] += 1
    return count


def eplb(weight_LE: Floats, slots: int, groups: int, nodes: int, gpus: int) -> Ints:
    """[L, P] which expert each slot holds."""
    if groups % nodes:
        groups = nodes = 1
    layers, experts = weight_LE.shape
    out = np.empty((layers, slots), np.int64)
    for layer in range(layers):
        weight, row = weight_LE[layer], []
        for node in pack(weight.reshape(groups, -1).sum(axis=1), nodes):
            mine = np.concatenate([np.arange(g * experts // groups, (g + 1) * experts // groups) for g in node])
            count = replicate(weight[mine], slots // nodes)
            item = np.repeat(np.arange(mine.size), count)
            for gpu in pack((weight[mine] / count)[item], gpus // nodes):
                row.extend(mine[item[gpu]].tolist())
        out[layer] = row
    return out
