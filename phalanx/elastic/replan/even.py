"""Exchanges of replicas between heavy and light ranks, all layers at once, until the load is even."""

from __future__ import annotations

import numpy as np

from phalanx.elastic.replan.order import Bools, Floats, Ints, ascending
from phalanx.elastic.replan.place import Deal

TOLERANCE = 0.004
"""A layer whose heaviest rank is within this fraction of the best that can be is left alone."""


def even_out(out: Deal, rounds: int) -> None:
    """Exchange replicas between heavy and light ranks until no exchange helps or `rounds` are over.

    Where only some ranks are safe, those and the others are evened out apart: little may cross between them.
    """
    if out.packed:
        _even_among(out, np.nonzero(out.safe_N)[0], rounds, np.zeros(out.shape[0]))
        floor = out.load_LN[:, out.safe_N].max(axis=1)
        _even_among(out, np.nonzero(~out.safe_N)[0], rounds, floor)
    else:
        _even_among(out, np.arange(out.shape[1]), rounds, np.zeros(out.shape[0]))


def _even_among(out: Deal, among: Ints, rounds: int, floor_L: Floats) -> None:
    """In most rounds the i-th heaviest rank of every layer meets one of the lightest, each time another, and makes the
    one exchange that brings the two closest. In the others the heaviest rank alone may choose among many."""
    ranks = among.size
    if ranks < 2:
        return
    goal = np.maximum(floor_L, _least(out, among)) * (1 + TOLERANCE)
    busy = out.load_LN[:, among].max(axis=1) > goal
    pairs = max(1, min(ranks // 2, 8 + ranks // 16))
    before = np.full(busy.size, np.inf)
    for number in range(rounds):
        rows = np.nonzero(busy)[0]
        if not rows.size:
            return
        order = among[ascending(out.load_LN[rows[:, None], among])]
        alone = number % 3 == 2
        if alone:
            # With few slots a rank, one that is not light may still have the light replica that is wanted.
            light = order[:, : ranks - 1 if out.shape[2] <= 4 else max(1, ranks // 2)]
            heavy = np.repeat(order[:, -1:], light.shape[1], axis=1)
        else:
            heavy = order[:, ::-1][:, :pairs]
            light = np.roll(order[:, :pairs], -number, axis=1)
        gained = _exchange_pairs(out, rows, heavy, light, alone)
        now = out.load_LN[rows[:, None], among].max(axis=1)
        busy[rows] = now > goal[rows]
        if alone:
            # The heaviest rank had its choice: when nothing helped, hardly any exchange will; when three rounds
            # brought next to nothing, more are not worth their time.
            busy[rows] &= gained & (now < before[rows] * (1 - TOLERANCE / 2))
            before[rows] = now


def _least(out: Deal, among: Ints) -> Floats:
    """[L]: what the heaviest rank must carry: the mean, or the hottest replica with the lightest ones beside it."""
    fill = out.ground.fill_N[among]
    part = out.part_LNM[:, among].reshape(out.shape[0], -1)
    part = np.sort(part, axis=1)
    empty = int((out.shape[2] - fill).sum())
    beside = part[:, empty : empty + int(fill.min()) - 1].sum(axis=1)
    least: Floats = np.maximum(out.load_LN[:, among].mean(axis=1), part[:, -1] + beside)
    return least


def _exchange_pairs(out: Deal, rows: Ints, heavy: Ints, light: Ints, alone: bool) -> Bools:
    """One exchange for each pair of ranks at most, or one for each row. Returns for each row whether its heaviest rank
    gained. rows: [r] layers; heavy, light: [r, q] ranks."""
    _, ranks, width, _ = out.shape
    at = rows[:, None]
    cell_a, cell_b = at * ranks + heavy, at * ranks + light
    a = out.expert_LNM.reshape(-1, width).take(cell_a, axis=0)
    b = out.expert_LNM.reshape(-1, width).take(cell_b, axis=0)
    part = out.part_LNM.reshape(-1, width)
    load_a, load_b = out.load_LN.take(cell_a), out.load_LN.take(cell_b)
    # Distances from the exchange that would make both equal; what must not cross is moved far away.
    far_a, far_b = _forbidden(out, at, heavy, light, a, b)
    half = (load_a - load_b) / 2
    left = (part.take(cell_a, axis=0) - half[..., None]).astype(np.float32)
    right = part.take(cell_b, axis=0).astype(np.float32)
    left[far_a] = np.inf
    right[far_b] = -np.inf
    distance = left[..., :, None] - right[..., None, :]
    np.abs(distance, out=distance)
    flat = distance.reshape(*heavy.shape, width * width)
    best = flat.argmin(axis=-1)
    value = flat.reshape(-1, width * width)[np.arange(best.size), best.ravel()].reshape(best.shape)
    gain = value < half * (1 - 1e-5)
    if alone:
        after = np.where(gain, (load_a + load_b) / 2 + value, np.inf)
        gain &= np.arange(heavy.shape[1]) == after.argmin(axis=1)[:, None]
    slot, place = np.divmod(best, width)
    return _apply(out, rows, heavy, light, slot, place, gain, alone)


def _forbidden(out: Deal, at: Ints, heavy: Ints, light: Ints, a: Ints, b: Ints) -> tuple[Bools, Bools]:
    """Replicas that must not cross: onto a rank that has the expert, singles onto safe ranks, the last copy off other
    hosts; and slots that do not exist."""
    _, ranks, _, experts = out.shape
    holds = out.holds_LNE.reshape(-1)
    far_a = holds.take((at * ranks + light)[..., None] * experts + a, mode="wrap")
    far_b = holds.take((at * ranks + heavy)[..., None] * experts + b, mode="wrap")
    if out.ragged:
        far_a |= a < 0
        far_b |= b < 0
    key_a, key_b = at[..., None] * experts + a, at[..., None] * experts + b
    if out.packed:
        single = out.single_LE.reshape(-1)
        far_a |= single.take(key_a, mode="wrap") & out.safe_N[light][..., None]
        far_b |= single.take(key_b, mode="wrap") & out.safe_N[heavy][..., None]
    if out.ground.host_matters:
        hosts, on_host = out.ground.num_hosts, out.on_host_LEH.reshape(-1)
        host_a, host_b = out.ground.host_N[heavy][..., None], out.ground.host_N[light][..., None]
        cross = host_a != host_b
        count_a, count_b = out.count_LE.take(key_a, mode="wrap"), out.count_LE.take(key_b, mode="wrap")
        far_a |= cross & (count_a > 1) & (count_a - on_host.take(key_a * hosts + host_b, mode="wrap") <= 1)
        far_b |= cross & (count_b > 1) & (count_b - on_host.take(key_b * hosts + host_a, mode="wrap") <= 1)
    return far_a, far_b


def _apply(out: Deal, rows: Ints, heavy: Ints, light: Ints, slot: Ints, place: Ints, gain: Bools, alone: bool) -> Bools:
    """Carry out the chosen exchanges. Of those that would carry one expert between hosts twice at once, none."""
    row, pair = np.nonzero(gain)
    layer, here, there = rows[row], heavy[row, pair], light[row, pair]
    i, j = slot[row, pair], place[row, pair]
    if out.ground.host_matters and not alone and row.size:
        cross = out.ground.host_N[here] != out.ground.host_N[there]
        key_a = layer * out.shape[3] + out.expert_LNM[layer, here, i]
        key_b = layer * out.shape[3] + out.expert_LNM[layer, there, j]
        times = np.bincount(np.concatenate([key_a, key_b]))
        keep = ~(cross & ((times[key_a] > 1) | (times[key_b] > 1)))
        row, pair, layer, here, there = row[keep], pair[keep], layer[keep], here[keep], there[keep]
        i, j = i[keep], j[keep]
    out.swap(layer, here, i, there, j)
    gained = np.zeros(rows.size, bool)
    gained[row if alone else row[pair == 0]] = True
    return gained
