"""Placement by groups of experts: first copies stay on their group's host, to spare links between hosts."""

from __future__ import annotations

import numpy as np

from phalanx.elastic.replan.counts import replica_counts
from phalanx.elastic.replan.even import even_out
from phalanx.elastic.replan.ground import Ground
from phalanx.elastic.replan.order import Floats, Ints, ascending, descending
from phalanx.elastic.replan.place import deal, repair


def fits_groups(ground: Ground, num_experts: int, num_groups: int) -> bool:
    """Whether groups can be dealt to hosts evenly: hosts and ranks alike, whole groups and equal slots a host."""
    hosts = ground.num_hosts
    return (
        num_groups > 1
        and ground.host_matters
        and ground.regular
        and num_groups % hosts == 0
        and num_experts % num_groups == 0
        and ground.total % hosts == 0
        and int(ground.fill_N[0]) * hosts <= 2 * num_experts
        and ground.total <= num_experts * (ground.size // hosts + 1)
    )


def by_groups(ground: Ground, w_LE: Floats, low: int, num_groups: int, rounds: int) -> tuple[Ints, Floats, Ints]:
    """Expert [L, N, M], load [L, N] and replica counts [L, E] of a plan in which each host is the home of some groups.

    The first replica of an expert is on its home host, all others on one other host, the next one: so a host's death
    loses nothing that has two replicas, and each host's part is a plan of its own. low: replicas of each at least.
    """
    layers, experts = w_LE.shape
    hosts, ranks = ground.num_hosts, ground.size // ground.num_hosts
    home = np.repeat(_homes(w_LE.reshape(layers, num_groups, -1).sum(axis=2), hosts), experts // num_groups, axis=1)
    members = ascending(home.astype(np.float64)).reshape(layers * hosts, experts // hosts)
    layer = np.repeat(np.arange(layers), hosts)[:, None]
    w = w_LE[layer, members]
    bound = np.full(w.shape, low)
    count = replica_counts(w, bound, np.full(w.shape, ranks + 1), ground.total // hosts)
    # What stands on a host: one of each of its own experts, and the further replicas of the previous host's.
    row = np.arange(layers * hosts)[:, None]
    after = (row // hosts) * hosts + (row + 1) % hosts
    part = np.zeros((layers * hosts, experts))
    here = np.zeros((layers * hosts, experts), np.int64)
    part[row, members] = part[after, members] = w / count
    here[row, members] += 1
    here[after, members] += count - 1
    fill = ground.fill_N[:ranks]
    one = Ground(np.arange(ranks), np.zeros(ranks, np.int64), fill, fill)
    out = deal(one, part, here, here == 1, np.zeros(ranks, bool))
    repair(out)
    even_out(out, rounds)
    where = np.argsort(ground.host_N, kind="stable")
    expert = np.empty((layers, ground.size, out.shape[2]), np.int64)
    load = np.empty((layers, ground.size))
    expert[:, where] = out.expert_LNM.reshape(layers, ground.size, -1)
    load[:, where] = out.load_LN.reshape(layers, ground.size)
    counts = np.zeros((layers, experts), np.int64)
    counts[layer, members] = count
    return expert, load, counts


def _homes(w_LG: Floats, hosts: int) -> Ints:
    """[L, G]: a host for each group, equally many on each: heaviest first to the lightest host, in rounds."""
    layers, groups = w_LG.shape
    order = descending(w_LG)
    load = np.zeros((layers, hosts))
    home = np.empty((layers, groups), np.int64)
    row = np.arange(layers)[:, None]
    for start in range(0, groups, hosts):
        chunk = order[:, start : start + hosts]
        lightest = ascending(load)
        home[row, chunk] = lightest
        load[row, lightest] += w_LG[row, chunk]
    return home
