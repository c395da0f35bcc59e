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
    bound = _bound(out)
    stuck, before = np.zeros(now.shape, bool), np.full(now.shape, np.inf)
    for number in range(rounds):
        most = np.maximum(now.max(axis=1), goal)[:, None]
        busy = (now > goal[:, None]) & (now >= most * NEARLY)
        busy &= ~(stuck & (now >= most)).any(axis=1)[:, None] & ~stuck
        work = [(g, among, np.nonzero(busy[:, g])[0]) for g, among in enumerate(sets) if busy[:, g].any()]
        if not work:
            return
        if number % 3 < 2:
            _exchange(out, bound, [_pairs(out, rows, among, number, goal) for _, among, rows in work])
            now = _heaviest(out, everyone, starts)
            continue
        # The heaviest rank has its choice: when nothing helps, hardly any exchange will; when three rounds brought
        # next to nothing, more are not worth their time.
        meetings = [_choices(out, rows, among) for _, among, rows in work]
        done = _exchange(out, bound, meetings, choose=True)
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


def _exchange(out: Deal, bound_LEH: Bools, meetings: list[Meetings], choose: bool = False) -> list[Bools]:
    """Make the exchange in each meeting that brings the two ranks closest, if any does; choose: only the best one of
    each heavy rank. Returns which were made; choose: for each list of meetings."""
    _, ranks, width, _ = out.shape
    layer, heavy, light = (np.concatenate([m[k] for m in meetings]) for k in range(3))
    cell_a, cell_b = layer * ranks + heavy, layer * ranks + light
    a = out.expert_LNM.reshape(-1, width).take(cell_a, axis=0)
    b = out.expert_LNM.reshape(-1, width).take(cell_b, axis=0)
    part = out.part_LNM.reshape(-1, width)
    load_a, load_b = out.load_LN.take(cell_a), out.load_LN.take(cell_b)
    far_a, far_b = _forbidden(out, bound_LEH, layer, heavy, light, a, b)
    half = (load_a - load_b) / 2
    left = (part.take(cell_a, axis=0) - half[:, None]).astype(np.float32)
    right = part.take(cell_b, axis=0).astype(np.float32)
    # Distances from the exchange that would make both equal; what must not cross is moved far away.
    left[far_a] = np.inf
    right[far_b] = -np.inf
    best, value = _closest(left, right)
    gain = value < half * (1 - 1e-5)
    if not choose:
        return [_apply(out, bound_LEH, layer, heavy, light, best, gain, several=True)]
    ends = np.cumsum([m[0].size for m in meetings]).tolist()
    parts = [slice(end - m[0].size, end) for m, end in zip(meetings, ends, strict=True)]
    after = np.where(gain, (load_a + load_b) / 2 + value, np.inf)
    for mine, (*_, many) in zip(parts, meetings, strict=True):
        first = after[mine].reshape(-1, many).argmin(axis=1)
        gain[mine] &= (np.arange(many) == first[:, None]).ravel()
    done = _apply(out, bound_LEH, layer, heavy, light, best, gain, several=len(meetings) > 1)
    return [done[mine] for mine in parts]


def _closest(left_QM: Singles, right_QM: Singles) -> tuple[Ints, Singles]:
    """[Q]: for each meeting the pair of slots, as one number, that are closest to each other, and their distance."""
    meetings, width = left_QM.shape
    many = max(1, DISTANCES // (width * width))
    if meetings > many:
        parts = [_closest(left_QM[i : i + many], right_QM[i : i + many]) for i in range(0, meetings, many)]
        return np.concatenate([best for best, _ in parts]), np.concatenate([value for _, value in parts])
    distance = left_QM[:, :, None] - right_QM[:, None, :]
    flat = np.abs(distance, out=distance).reshape(meetings, width * width)
    best = flat.argmin(axis=1)
    return best, flat[np.arange(meetings), best]


def _bound(out: Deal) -> Bools:
    """[L, E, H]: experts of which no replica may come to a host from another one: all the others are there."""
    if not out.ground.host_matters:
        return np.zeros(0, bool)
    count = out.count_LE[:, :, None]
    return (count > 1) & (out.on_host_LEH >= count - 1)


def _forbidden(
    out: Deal, bound_LEH: Bools, layer: Ints, heavy: Ints, light: Ints, a: Ints, b: Ints
) -> tuple[Bools, Bools]:
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
        hosts, bound = out.ground.num_hosts, bound_LEH.reshape(-1)
        host_a, host_b = out.ground.host_N.take(heavy), out.ground.host_N.take(light)
        cross, row = (host_a != host_b)[:, None], layer * (experts * hosts)
        far_a |= cross & bound.take((row + host_b)[:, None] + a * hosts, mode="wrap")
        far_b |= cross & bound.take((row + host_a)[:, None] + b * hosts, mode="wrap")
    return far_a, far_b


def _apply(
    out: Deal, bound_LEH: Bools, layer: Ints, heavy: Ints, light: Ints, best: Ints, gain: Bools, several: bool
) -> Bools:
    """Carry out the chosen exchanges. several: a layer may have more than one; of those that would carry one expert
    between hosts twice at once, none. Returns which were."""
    at = np.nonzero(gain)[0]
    i, j = np.divmod(best[at], out.shape[2])
    layer, here, there = layer[at], heavy[at], light[at]
    done = np.zeros(gain.size, bool)
    if not out.ground.host_matters:
        out.swap(layer, here, i, there, j)
        done[at] = True
        return done
    a, b = out.expert_LNM[layer, here, i], out.expert_LNM[layer, there, j]
    cross = out.ground.host_N[here] != out.ground.host_N[there]
    if several:
        key_a, key_b = layer * out.shape[3] + a, layer * out.shape[3] + b
        times = np.bincount(np.concatenate([key_a, key_b]))
        keep = ~(cross & ((times[key_a] > 1) | (times[key_b] > 1)))
        at, layer, here, there, i, j = at[keep], layer[keep], here[keep], there[keep], i[keep], j[keep]
        a, b, cross = a[keep], b[keep], cross[keep]
    out.swap(layer, here, i, there, j)
    done[at] = True
    changed, one = np.tile(layer[cross], 2), np.concatenate([a[cross], b[cross]])
    count = out.count_LE[changed, one][:, None]
    bound_LEH[changed, one] = (count > 1) & (out.on_host_LEH[changed, one] >= count - 1)
    return done
