"""Exchanges of replicas between heavy and light ranks, all layers at once, until the load is even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import Bools, Floats, Ints, ascending
from phalanx.elastic.replan.place import Deal

TOLERANCE = 0.004
"""A layer whose heaviest rank is within this fraction of the best that can be is left alone."""

NEARLY = 0.98
"""Ranks that carry less than this part of a layer's heaviest rank can wait."""

DISTANCES = 1 << 24
"""Distances that are looked at at once: what bounds the memory where ranks have very many slots."""

Singles = npt.NDArray[np.float32]

Meetings = tuple[Ints, Ints, Ints, int]
"""Who meets whom: layers, heavy ranks and light ones, [q] each, and how many of these in a row one heavy rank has."""


def even_out(out: Deal, rounds: int) -> None:
    """Exchange replicas between heavy and light ranks until no exchange helps or `rounds` are over.

    Where only some ranks are safe, those and the others are evened out apart, as little may cross between them: in a
    round, those of a layer that have its heaviest rank.

    In most rounds the i-th heaviest rank of every layer meets one of the lightest, each time another, and makes the
    one exchange that brings the two closest. In the others the heaviest rank alone may choose among many."""
    sets = [np.nonzero(out.safe_N)[0], np.nonzero(~out.safe_N)[0]] if out.packed else [np.arange(out.shape[1])]
    goal = np.max([_least(out, among) for among in sets], axis=0) * (1 + TOLERANCE)
    sets = [among for among in sets if among.size > 1]
    if not sets:
        return
    everyone, starts = np.concatenate(sets), np.cumsum([0] + [among.size for among in sets[:-1]])
    now = _heaviest(out, everyone, starts)
    stuck, before = np.zeros(now.shape, bool), np.full(now.shape, np.inf)
    for number in range(rounds):
        most = np.maximum(now.max(axis=1), goal)[:, None]
        busy = (now > goal[:, None]) & (now >= most * NEARLY)
        busy &= ~(stuck & (now >= most)).any(axis=1)[:, None] & ~stuck
        work = [(g, among, np.nonzero(busy[:, g])[0]) for g, among in enumerate(sets) if busy[:, g].any()]
        if not work:
            return
        if number % 3 < 2:
            _exchange(out, [_pairs(out, rows, among, number, goal) for _, among, rows in work])
            now = _heaviest(out, everyone, starts)
            continue
        # The heaviest rank has its choice: when nothing helps, hardly any exchange will; when three rounds brought
        # next to nothing, more are not worth their time.
        meetings = [_choices(out, rows, among) for _, among, rows in work]
        done = _exchange(out, meetings, choose=True)
        now = _heaviest(out, everyone, starts)
        for (g, _, rows), (_, _, _, many), mine in zip(work, meetings, done, strict=True):
            better = mine.reshape(-1, many).any(axis=1)
            stuck[rows, g] = ~better | (now[rows, g] >= before[rows, g] * (1 - TOLERANCE / 2))
            before[rows, g] = now[rows, g]


def _heaviest(out: Deal, everyone: Ints, starts: Ints) -> Floats:
    """[L, sets]: the load of the heaviest rank of each set; these follow each other in `everyone`."""
    return np.maximum.reduceat(out.load_LN[:, everyone], starts, axis=1)


def _pairs(out: Deal, rows: Ints, among: Ints, number: int, goal_L: Floats) -> Meetings:
    """The ranks that carry more than the goal meet the lightest ones, in each round others."""
    pairs = min(among.size // 2, 8 + among.size // 16)
    load = out.load_LN[rows[:, None], among]
    order = ascending(load)
    heavy, light = order[:, ::-1][:, :pairs], order[:, (np.arange(pairs) + number) % pairs]
    row, pair = np.nonzero(np.take_along_axis(load, heavy, 1) > goal_L[rows, None])
    return rows[row], among[heavy[row, pair]], among[light[row, pair]], 1


def _choices(out: Deal, rows: Ints, among: Ints) -> Meetings:
    """The heaviest rank of each layer meets many: with few slots a rank, one that is not light may still have the light
    replica that is wanted."""
    order = among[ascending(out.load_LN[rows[:, None], among])]
    light = order[:, : among.size - 1 if out.shape[2] <= 4 else among.size // 2]
    many = light.shape[1]
    return np.repeat(rows, many), np.repeat(order[:, -1], many), light.ravel(), many


def _least(out: Deal, among: Ints) -> Floats:
    """[L]: what the heaviest rank must carry: the mean, or the hottest replica with the lightest ones beside it."""
    fill = out.ground.fill_N[among]
    part = out.part_LNM[:, among].reshape(out.shape[0], -1)
    empty = int((out.shape[2] - fill).sum())
    beside = empty + int(fill.min()) - 1
    hottest = part.max(axis=1)
    if 0 < beside < part.shape[1]:
        part = np.partition(part, beside - 1, axis=1)
    # Empty places count as replicas without load, so they are the first of the lightest.
    least: Floats = np.maximum(out.load_LN[:, among].mean(axis=1), hottest + part[:, :beside].sum(axis=1))
    return least


def _exchange(out: Deal, meetings: list[Meetings], choose: bool = False) -> list[Bools]:
    """Make the exchange in each meeting that brings the two ranks closest, if any does; choose: only the best one of
    each heavy rank. Returns which were made; choose: for each list of meetings."""
    _, ranks, width, _ = out.shape
    layer, heavy, light = (np.concatenate([m[k] for m in meetings]) for k in range(3))
    cell_a, cell_b = layer * ranks + heavy, layer * ranks + light
    a = out.expert_LNM.reshape(-1, width).take(cell_a, axis=0)
    b = out.expert_LNM.reshape(-1, width).take(cell_b, axis=0)
    part = out.part_LNM.reshape(-1, width)
    load_a, load_b = out.load_LN.take(cell_a), out.load_LN.take(cell_b)
    half = (load_a - load_b) / 2
    # How far two replicas, one of each rank, are from the exchange that would make the ranks equal: left - right.
    left, right = part.take(cell_a, axis=0) - half[:, None], part.take(cell_b, axis=0)
    far_a, far_b = _forbidden(out, layer, heavy, light, a, b)
    left[far_a], right[far_b] = np.inf, -np.inf
    # Meetings come last from here on, so that numpy works along them and not along a few slots.
    left_MQ, right_MQ = np.ascontiguousarray(left.T, np.float32), np.ascontiguousarray(right.T, np.float32)
    closest_MQ = _closest(left_MQ, right_MQ)
    value = closest_MQ.min(axis=0)
    gain = value < half * (1 - 1e-5)
    parts = []
    if choose:
        ends = np.cumsum([m[0].size for m in meetings]).tolist()
        parts = [slice(end - m[0].size, end) for m, end in zip(meetings, ends, strict=True)]
        after = np.where(gain, (load_a + load_b) / 2 + value, np.inf)
        for mine, (*_, many) in zip(parts, meetings, strict=True):
            first = after[mine].reshape(-1, many).argmin(axis=1)
            gain[mine] &= (np.arange(many) == first[:, None]).ravel()
    at = np.nonzero(gain)[0]
    i = closest_MQ[:, at].argmin(axis=0)
    j = np.abs(left_MQ[i, at] - right_MQ[:, at]).argmin(axis=0)
    several = not choose or len(meetings) > 1
    done = np.zeros(gain.size, bool)
    done[_apply(out, at, (layer[at], heavy[at], i, light[at], j), several)] = True
    return [done[mine] for mine in parts] if choose else [done]


def _closest(left_MQ: Singles, right_MQ: Singles) -> Singles:
    """[M, Q]: for each meeting and slot of the heavy rank the distance to the closest slot of the light one."""
    width, meetings = left_MQ.shape
    many = max(1, DISTANCES // (width * width))
    if meetings > many:
        blocks = [slice(i, i + many) for i in range(0, meetings, many)]
        return np.concatenate([_closest(left_MQ[:, block], right_MQ[:, block]) for block in blocks], axis=1)
    distance = left_MQ[:, None, :] - right_MQ[None, :, :]
    closest: Singles = np.abs(distance, out=distance).min(axis=1)
    return closest


def _forbidden(out: Deal, layer: Ints, heavy: Ints, light: Ints, a: Ints, b: Ints) -> tuple[Bools, Bools]:
    """Replicas that must not cross: onto a rank that has the expert, the last copy off other hosts; and slots that do
    not exist. (Singles never meet a safe rank.)"""
    _, ranks, _, experts = out.shape
    holds = out.holds_LNE.reshape(-1)
    far_a = holds.take(((layer * ranks + light) * experts)[:, None] + a, mode="wrap")
    far_b = holds.take(((layer * ranks + heavy) * experts)[:, None] + b, mode="wrap")
    if out.ragged:
        far_a |= a < 0
        far_b |= b < 0
    if out.ground.host_matters:
        # None may come to a host where all the other replicas of its expert are.
        here, there = out.ground.host_N.take(heavy), out.ground.host_N.take(light)
        cross = (here != there)[:, None]
        far_a |= cross & _others_there(out, layer, there, a)
        far_b |= cross & _others_there(out, layer, here, b)
    return far_a, far_b


def _others_there(out: Deal, layer: Ints, host: Ints, expert: Ints) -> Bools:
    """[Q, M]: which of the experts have several replicas, all but at most one on that host."""
    experts = out.shape[3]
    count = out.count_LE.take((layer * experts)[:, None] + expert, mode="wrap")
    there = out.on_host_LHE.take(((layer * out.ground.num_hosts + host) * experts)[:, None] + expert, mode="wrap")
    return (count > 1) & (there >= count - 1)


def _apply(out: Deal, at: Ints, exchanges: tuple[Ints, Ints, Ints, Ints, Ints], several: bool) -> Ints:
    """Carry out exchanges: layer, rank, slot, other rank, its slot. several: a layer may have more than one; of those
    that would carry one expert between hosts twice at once, none. Returns those of `at` that were."""
    layer, here, i, there, j = exchanges
    if several and out.ground.host_matters:
        _, ranks, width, experts = out.shape
        key_a = layer * experts + out.expert_LNM.take((layer * ranks + here) * width + i)
        key_b = layer * experts + out.expert_LNM.take((layer * ranks + there) * width + j)
        times = np.bincount(np.concatenate([key_a, key_b]))
        cross = out.ground.host_N.take(here) != out.ground.host_N.take(there)
        keep = ~(cross & ((times.take(key_a) > 1) | (times.take(key_b) > 1)))
        at, layer, here, i, there, j = at[keep], layer[keep], here[keep], i[keep], there[keep], j[keep]
    out.swap(layer, here, i, there, j)
    return at
