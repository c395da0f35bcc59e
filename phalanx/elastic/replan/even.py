"""Exchanges of replicas between heavy and light ranks, all layers at once, until the load is even."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.order import Bools, Floats, Ints, along, ascending, nth
from phalanx.elastic.replan.place import Deal

TOLERANCE = 0.004
"""A layer whose heaviest rank is within this fraction of the best that can be is left alone."""

NEARLY = 0.98
"""Ranks that carry less than this part of a layer's heaviest rank can wait."""

DISTANCES = 1 << 24
"""Distances that are looked at at once: what bounds the memory where ranks have very many slots."""

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sets:
    """Ranks that are evened out apart from each other: one set or two, each of two ranks at least.

    everyone: the ranks, set by set. starts, sizes: where each set lies in it. [G] for G sets."""

    everyone: Ints
    starts: Ints
    sizes: Ints

    def heaviest(self, out: Deal) -> Floats:
        """[L, G]: the load of the heaviest rank of each."""
        return np.maximum.reduceat(out.load_LN.take(self.everyone, axis=1), self.starts, axis=1)

    def lightest_first(self, out: Deal, rows: Ints) -> Ints:
        """[rows, N]: the ranks in order of their load, set by set, as cells: layer * N + rank."""
        cell = (rows * out.shape[1])[:, None] + self.everyone
        return cell.take(along(ascending(out.load_LN.take(cell), ahead=int(self.starts[-1]))))

    @cached_property
    def pairs(self) -> tuple[Ints, Ints, Ints, Ints]:
        """The ranks that meet others in a round, in each set as many: the set of each, its number there, how many
        these are, and where the set begins."""
        pairs = np.minimum(self.sizes // 2, 8 + self.sizes // 16)
        group = np.repeat(np.arange(pairs.size), pairs)
        return group, nth(pairs), pairs[group], self.starts[group]


def even_out(out: Deal, rounds: int) -> None:
    """Exchange replicas between heavy and light ranks until no exchange helps or `rounds` are over.

    Where only some ranks are safe, those and the others are evened out apart, as little may cross between them: in a
    round, those of a layer that have its heaviest rank.

    In most rounds the i-th heaviest rank of every layer meets one of the lightest, each time another, and makes the
    one exchange that brings the two closest. In the others the heaviest rank alone may choose among many."""
    among = [np.nonzero(out.safe_N)[0], np.nonzero(~out.safe_N)[0]] if out.packed else [np.arange(out.shape[1])]
    goal = np.max([_least(out, ranks) for ranks in among], axis=0) * (1 + TOLERANCE)
    among = [ranks for ranks in among if ranks.size > 1]
    if not among:
        return
    sizes = np.array([ranks.size for ranks in among])
    sets = Sets(np.concatenate(among), np.cumsum(sizes) - sizes, sizes)
    now = sets.heaviest(out)
    stuck, before = np.zeros(now.shape, bool), np.full(now.shape, np.inf)
    for number in range(rounds):
        most = np.maximum(now.max(axis=1), goal)[:, None]
        busy = (now > goal[:, None]) & (now >= most * NEARLY)
        if stuck.any():
            busy &= ~(stuck & (now >= most)).any(axis=1)[:, None] & ~stuck
        rows = np.nonzero(busy.any(axis=1))[0]
        if not rows.size:
            return
        if number % 3 < 2:
            _meet(out, sets, rows, busy[rows], number, goal)
            now = sets.heaviest(out)
            continue
        # The heaviest rank has its choice: when nothing helps, hardly any exchange will; when three rounds brought
        # next to nothing, more are not worth their time.
        better = np.zeros(now.shape, bool)
        better[rows] = _choose(out, sets, rows, busy[rows])
        now = sets.heaviest(out)
        stuck |= busy & (~better | (now >= before * (1 - TOLERANCE / 2)))
        before = np.where(busy, now, before)


def _meet(out: Deal, sets: Sets, rows: Ints, busy: Bools, number: int, goal_L: Floats) -> None:
    """The ranks that carry more than the goal meet the lightest ones, in each round others. busy: [rows, G]."""
    group, k, pairs, start = sets.pairs
    order = sets.lightest_first(out, rows)
    heavy = order.take(start + sets.sizes[group] - 1 - k, axis=1)
    light = order.take(start + (k + number) % pairs, axis=1)
    meet = (out.load_LN.take(heavy) > goal_L[rows, None]) & busy[:, group]
    meetings = _meetings(out, heavy[meet], light[meet])
    _exchange(out, meetings, meetings.helps)


def _choose(out: Deal, sets: Sets, rows: Ints, busy: Bools) -> Bools:
    """The heaviest rank of each set meets many and makes the best exchange of all: with few slots a rank, one that is
    not light may still have the light replica that is wanted. Returns whether there was one, [rows, G]."""
    many = sets.sizes - 1 if out.shape[2] <= 4 else sets.sizes // 2
    many = np.where(busy.any(axis=0), many, 0)
    group, k = np.repeat(np.arange(many.size), many), nth(many)
    order = sets.lightest_first(out, rows)
    heavy = order.take((sets.starts + sets.sizes - 1)[group], axis=1)
    light = order.take(sets.starts[group] + k, axis=1)
    meetings = _meetings(out, heavy.ravel(), light.ravel())
    helps = meetings.helps.reshape(heavy.shape) & busy[:, group]
    after = np.where(helps, (meetings.load_light + meetings.half + meetings.distance).reshape(heavy.shape), np.inf)
    best, better = np.zeros(helps.shape, bool), np.zeros(busy.shape, bool)
    for start, end in zip((np.cumsum(many) - many).tolist(), np.cumsum(many).tolist(), strict=True):
        if start < end:
            best[np.arange(rows.size), start + after[:, start:end].argmin(axis=1)] = True
    at = _exchange(out, meetings, (helps & best).ravel())
    better[at // group.size, group[at % group.size]] = True
    return better


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


@dataclass(frozen=True, eq=False)
class Meetings:
    """Heavy ranks that meet light ones, [Q], to make the exchange each that brings the two closest.

    heavy, light: layer * N + rank. load_light: what the light one carries. half: half of what the heavy one carries
    more. left, right: [M, Q] their replicas' loads, so that the difference of two is how far their exchange is from
    making the ranks equal; infinite where a replica must not cross. closest: [M, Q] for each slot of the heavy rank
    the least such distance.

    Meetings come last here, so that numpy works along them and not along a few slots."""

    heavy: Ints
    light: Ints
    load_light: Floats
    half: Floats
    left: Singles
    right: Singles
    closest: Singles

    @cached_property
    def distance(self) -> Singles:
        """[Q]: how far from equal the best exchange leaves the two, in load of each."""
        least: Singles = self.closest.min(axis=0)
        return least

    @cached_property
    def helps(self) -> Bools:
        return self.distance < self.half * (1 - 1e-5)

    def slots(self, at: Ints) -> tuple[Ints, Ints]:
        """Which slots the best exchange of these meetings is of, the heavy rank's and the light one's."""
        i = self.closest.take(at, axis=1).argmin(axis=0)
        wanted = self.left.take(i * self.heavy.size + at)
        return i, np.abs(wanted - self.right.take(at, axis=1)).argmin(axis=0)


def _meetings(out: Deal, heavy: Ints, light: Ints) -> Meetings:
    width = out.shape[2]
    load_light = out.load_LN.take(light)
    half = (out.load_LN.take(heavy) - load_light) / 2
    many = max(1, DISTANCES // (width * width))
    blocks = [slice(i, i + many) for i in range(0, max(1, heavy.size), many)]
    parts = [_distances(out, heavy[q], light[q], half[q]) for q in blocks]
    left, right, closest = (np.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    return Meetings(heavy, light, load_light, half, left, right, closest)


def _distances(out: Deal, heavy: Ints, light: Ints, half: Floats) -> tuple[Singles, Singles, Singles]:
    """left, right and closest of some meetings."""
    part = out.part_LNM.reshape(-1, out.shape[2])
    left = (part.take(heavy, axis=0).T - half).astype(np.float32, order="C")
    right = part.take(light, axis=0).T.astype(np.float32, order="C")
    far_a, far_b = _forbidden(out, heavy, light)
    np.putmask(left, far_a, np.inf)
    np.putmask(right, far_b, -np.inf)
    distance = left[:, None, :] - right[None, :, :]
    return left, right, np.abs(distance, out=distance).min(axis=1)


def _forbidden(out: Deal, heavy: Ints, light: Ints) -> tuple[Bools, Bools]:
    """[M, Q] of both ranks: replicas that must not cross: onto a rank that has the expert, the last copy off other
    hosts; and slots that do not exist. (Singles never meet a safe rank.)"""
    expert = out.expert_LNM.reshape(-1, out.shape[2])
    a = expert.take(heavy, axis=0).T.astype(np.int32, order="C")
    b = expert.take(light, axis=0).T.astype(np.int32, order="C")
    both = a[:, None, :] == b[None, :, :]
    far_a, far_b = both.any(axis=1), both.any(axis=0)
    if out.ragged:
        far_a |= a < 0
        far_b |= b < 0
    if out.ground.host_matters:
        full = (out.room_LHE <= 0).reshape(-1)
        here, there = out.host_row_LN.take(heavy), out.host_row_LN.take(light)
        cross = here != there
        far_a |= cross & full.take(there + a, mode="wrap")
        far_b |= cross & full.take(here + b, mode="wrap")
    return far_a, far_b


def _exchange(out: Deal, meetings: Meetings, which: Bools) -> Ints:
    """Carry out the best exchange of these meetings, [Q]; of those in one layer that would carry one expert between
    hosts twice at once, none. Returns the numbers of those that were."""
    _, ranks, width, experts = out.shape
    at = np.nonzero(which)[0]
    i, j = meetings.slots(at)
    here, there = meetings.heavy.take(at), meetings.light.take(at)
    if out.ground.host_matters:
        row = here // ranks * experts
        key_a, key_b = row + out.expert_LNM.take(here * width + i), row + out.expert_LNM.take(there * width + j)
        times = np.bincount(np.concatenate([key_a, key_b]))
        twice = (times.take(key_a) > 1) | (times.take(key_b) > 1)
        keep = ~twice | (out.host_row_LN.take(here) == out.host_row_LN.take(there))
        at, here, i, there, j = at[keep], here[keep], i[keep], there[keep], j[keep]
    out.swap(here, i, there, j)
    return at
