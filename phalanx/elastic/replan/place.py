"""Where the replicas go: dealt in rounds, then conflicts repaired. All layers at once; `even` improves the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from phalanx.elastic.replan.counts import protected_room
from phalanx.elastic.replan.ground import Ground
from phalanx.elastic.replan.order import Bools, Floats, Ints, along, ascending, descending, nth

MANY = 1 << 14
"""More replicas than an expert ever has."""

PAIRINGS = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))
"""The three ways to make pairs of four."""


@dataclass(eq=False)
class Deal:
    """What lies where while a plan is made. N living ranks, M slots of the fullest of them, H hosts.

    expert_LNM: -1 where a rank has fewer slots. part_LNM: the load each replica carries. load_LN: their sums.
    single_LE: experts that have one replica only. safe_N: ranks that must hold no such expert (where only some are).
    room_LHE: where hosts matter, how many more replicas of an expert may come to a host: 0 when all others are there
    but one, -1 when all are there, MANY or so for single ones.
    doubled: (layer, rank, slot) of replicas that came to lie on a rank which already had one, [3, conflicts].
    """

    ground: Ground
    expert_LNM: Ints
    part_LNM: Floats
    load_LN: Floats
    count_LE: Ints
    single_LE: Bools
    safe_N: Bools
    room_LHE: npt.NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    doubled: list[Ints] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Written through flat views.
        assert all(x.flags.c_contiguous for x in (self.expert_LNM, self.part_LNM, self.load_LN))

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """L, N, M, E."""
        layers, ranks, width = self.expert_LNM.shape
        return layers, ranks, width, int(self.count_LE.shape[1])

    @cached_property
    def ragged(self) -> bool:
        return bool((self.ground.fill_N != self.expert_LNM.shape[2]).any())

    @cached_property
    def packed(self) -> bool:
        """Whether some ranks are to be safe and others not."""
        return bool(self.safe_N.any() and not self.safe_N.all())

    @cached_property
    def host_row_LN(self) -> Ints:
        """Where the row of each rank's host begins in a flat room_LHE."""
        layers, _, _, experts = self.shape
        return (np.arange(layers)[:, None] * self.ground.num_hosts + self.ground.host_N) * experts

    def count_hosts(self) -> None:
        """Make room_LHE; `swap` keeps it."""
        key = self.host_row_LN[:, :, None] + self.expert_LNM
        key = key[self.expert_LNM >= 0] if self.ragged else key.reshape(-1)
        room = np.where(self.count_LE > 1, self.count_LE - 1, MANY).astype(np.int16)
        self.room_LHE = np.repeat(room[:, None, :], self.ground.num_hosts, axis=1)
        np.subtract.at(self.room_LHE.reshape(-1), key, np.int16(1))  # a plain 1 takes a hundred times as long

    def swap(self, cell: Ints, slot: Ints, other: Ints, place: Ints) -> None:
        """Exchange replicas pairwise: arrays of equal length; cell, other: layer * N + rank. None of them may occur
        twice, nor may an expert of a layer that crosses between hosts."""
        # Flat indices: numpy takes by one index several times as fast as by three.
        width = self.shape[2]
        expert, part, load = self.expert_LNM.reshape(-1), self.part_LNM.reshape(-1), self.load_LN.reshape(-1)
        at, to = cell * width + slot, other * width + place
        a, b, part_a, part_b = expert.take(at), expert.take(to), part.take(at), part.take(to)
        expert[at], expert[to], part[at], part[to] = b, a, part_b, part_a
        more = part_a - part_b
        load[cell] -= more
        load[other] += more
        if self.ground.host_matters:
            # Within a host nothing changes; between hosts no expert of a layer may cross twice.
            here, there = self.host_row_LN.take(cell), self.host_row_LN.take(other)
            cross = np.nonzero(here != there)[0]
            here, there, a, b = here[cross], there[cross], a[cross], b[cross]
            room = self.room_LHE.reshape(-1)
            room[np.concatenate([here + a, there + b])] += 1
            room[np.concatenate([there + a, here + b])] -= 1


def deal(ground: Ground, part: Floats, count_LE: Ints, single_LE: Bools, safe_N: Bools) -> Deal:
    """Deal the replicas out in rounds, one a rank and round: the lightest rank takes the heaviest. LOCAL.

    The replicas of one expert are neighbours in the row that is dealt, and neighbours go to different ranks and, where
    hosts differ, to different hosts, so that they need not be searched for. Protected experts come first where ranks
    are to be safe. Rounds do not go down the row strictly: after the first, each takes a quarter of its replicas from
    the light end, which gives the ranks with the hottest experts something light beside them.

    part: [L, E] the load of one replica of each expert. count_LE: how many of each; each layer has ground.total.
    """
    layers, experts = part.shape
    packed = bool(safe_N.any() and not safe_N.all())
    order = along(descending(np.where(single_LE, part, part + 2 * part.max()) if packed else part))
    shape = (layers, ground.size, int(ground.fill_N.max()))
    ragged = bool((ground.fill_N < shape[2]).any())
    out = Deal(
        ground=ground,
        expert_LNM=np.full(shape, -1) if ragged else np.empty(shape, np.int64),
        part_LNM=np.zeros(shape) if ragged else np.empty(shape),
        load_LN=np.zeros(shape[:2]),
        count_LE=count_LE,
        single_LE=single_LE,
        safe_N=safe_N,
    )
    none = np.zeros(ground.size, np.int64)
    singles = int(single_LE[0].sum()) if packed else 0
    first_fill = protected_room(ground, safe_N, ground.total - singles) if singles else ground.fill_N
    first = order[:, : experts - singles].ravel()
    item = np.repeat(first, count_LE.take(first)).reshape(layers, -1)
    _rounds(out, item, part.take(item), none, first_fill, copies=True)
    if singles:
        item = order[:, experts - singles :]
        _rounds(out, item, part.take(item), first_fill, ground.fill_N, copies=False)
    if ground.host_matters:
        out.count_hosts()
    return out


def _rounds(out: Deal, item: Ints, part: Floats, from_N: Ints, to_N: Ints, copies: bool) -> None:
    """Deal replicas, [L, n], into the places from_N..to_N of the ranks. item: layer * E + expert of each. part: its
    load. copies: whether an expert may occur twice."""
    layers, ranks, width, experts = out.shape
    depth_N = to_N - from_N
    sizes = (depth_N > np.arange(int(depth_N.max(initial=0)))[:, None]).sum(axis=1)
    if sizes.size > 2 and item.shape[1] >= 1.5 * experts:
        column = _mixed(sizes)
        item, part = item[:, column], part[:, column]
    rank = np.empty(item.shape, np.int64)
    rows = np.arange(0, layers * ranks, ranks)[:, None]
    level = 0 if copies else _in_bulk(out, part, rank, from_N, depth_N)
    host_matters = copies and out.ground.host_matters
    again = np.zeros(item.shape, bool)
    if copies:
        np.equal(item[:, 1:], item[:, :-1], out=again[:, 1:])
    last_domain = np.full(layers, -1)
    scale = 0.5 / max(float(part.sum(axis=1).max(initial=0.0)), 1e-300)
    end = int(sizes[:level].sum())
    for deepest in sorted(set(depth_N[depth_N > level].tolist())):
        # The same ranks take part in all rounds up to here.
        open_ = np.nonzero(depth_N >= deepest)[0]
        host = out.ground.host_N[open_] if host_matters else open_
        turn_in_host = nth(np.bincount(host)) if host_matters else None
        pairings = [_pairing(open_.size, kind) for kind in PAIRINGS]
        for number in range(level, deepest):
            start, end = end, end + open_.size
            load = out.load_LN.take(open_, axis=1)
            turn = ascending(load) if turn_in_host is None else _host_by_host(load * scale, host, turn_in_host)
            if copies:
                turn = turn.take(pairings[number % len(PAIRINGS)], axis=1)
                last_domain = _part_neighbours(turn, host, again[:, start:end], last_domain)
            rank[:, start:end] = mine = open_.take(turn)
            out.load_LN.reshape(-1)[rows + mine] += part[:, start:end]
        level = deepest
    first_N = np.arange(0, ranks * width, width) + from_N
    place = first_N.take(rank) + (rows * width + np.repeat(np.arange(sizes.size), sizes))
    out.expert_LNM.reshape(-1)[place] = item - np.arange(0, layers * experts, experts)[:, None]
    out.part_LNM.reshape(-1)[place] = part
    if copies:
        _note_doubles(out, rank * experts + item, place, sizes)


def _note_doubles(out: Deal, held: Ints, place: Ints, sizes: Ints) -> None:
    """Note the replicas, [L, n], that were dealt to a rank which had one from an earlier round. held: a number for
    rank and expert. place: that of the slot. sizes: of each round."""
    n = held.shape[1]
    keys = held * n + np.arange(n)
    keys.sort(axis=1)
    held = keys // n
    layer, at = np.nonzero(held[:, 1:] == held[:, :-1])
    if layer.size:
        column = keys[layer, at + 1] % n
        order = np.lexsort((column, layer, np.searchsorted(np.cumsum(sizes), column, side="right")))
        layer, column = layer[order], column[order]
        rank, slot = np.divmod(place[layer, column], out.shape[2])
        out.doubled.append(np.stack([layer, rank % out.shape[1], slot]))


def _mixed(sizes: Ints) -> Ints:
    """In which order the columns are dealt when each round but the first takes a quarter from the light end."""
    top, bottom, columns = 0, int(sizes.sum()), []
    for level, size in enumerate(sizes.tolist()):
        light = size // 8 * 2 if level else 0
        columns += [np.arange(top, top + size - light), np.arange(bottom - light, bottom)]
        top, bottom = top + size - light, bottom - light
    return np.concatenate(columns)


def _in_bulk(out: Deal, part: Floats, rank: Ints, from_N: Ints, depth_N: Ints) -> int:
    """Deal all but the last few rounds in two goes where all ranks that take part are alike. Singles need no other
    care, and the last rounds make the loads even. Fills in `rank`, [L, n]. Returns how many rounds that were.

    The first two rounds go to and fro. In the others the ranks keep their order, the lightest first: what is dealt then
    is too light to change it much."""
    open_ = np.nonzero(depth_N > 0)[0]
    rounds, n = int(depth_N.max()) - 3, open_.size
    alike = (from_N[open_] == from_N[open_[0]]).all() and (depth_N[open_] == depth_N[open_[0]]).all()
    if rounds < 2 or not alike:
        return 0
    layers, ranks, _, _ = out.shape
    parts = part[:, : rounds * n].reshape(layers, rounds, n)
    first_two = parts[:, 0] + parts[:, 1, ::-1]
    turn = ascending(first_two)
    lightest_first = open_.take(turn)
    rank[:, :n], rank[:, n : 2 * n] = open_, open_[::-1]
    rank[:, 2 * n : rounds * n] = np.tile(lightest_first, rounds - 2)
    cell = np.arange(0, layers * ranks, ranks)[:, None] + lightest_first
    out.load_LN.reshape(-1)[cell] += first_two.take(along(turn)) + parts[:, 2:].sum(axis=1)
    return rounds


def _host_by_host(load: Floats, host: Ints, turn_in_host: Ints) -> Ints:
    """[L, n]: in which order n ranks take their turns in a round: first the lightest rank of every host, then the
    second of every host and so on, each time the lightest first, so that two neighbours are on different hosts except
    where one such group ends and the next begins. load: below 1. turn_in_host: [n] 0, 1, .. for each host in turn."""
    by_host = ascending(host + load)
    return by_host.take(along(ascending(turn_in_host + load.take(along(by_host)))))


def _pairing(size: int, kind: tuple[int, ...]) -> Ints:
    """An order of turns in which each of every four meets another of them as its neighbour, changing with the round.

    Two ranks that got the two replicas of an expert carry the same, so they would be neighbours in the next round too
    and end up as mirrors of each other: then a death would double one rank's load instead of raising many a little."""
    order = np.arange(size)
    whole = size // 4 * 4
    order[:whole] = order[:whole].reshape(-1, 4)[:, kind].ravel()
    return order


def _part_neighbours(turn: Ints, domain: Ints, again: Bools, last_domain: Ints) -> Ints:
    """Where neighbours are replicas of one expert in one domain (a host, or else a rank), let the second one change
    places with the one after it: their loads are nearly equal, and a group of turns has each domain once only.

    turn: [L, n] who takes the replicas, changed in place. domain: of each who can. again: [L, n] whether a replica is
    of the same expert as the one before. last_domain: [L] where the one before these went. Returns the next one."""
    where = domain.take(turn)
    same = again.copy()
    same[:, 0] &= where[:, 0] == last_domain
    same[:, 1:] &= where[:, 1:] == where[:, :-1]
    if same.any():
        same[:, 1:] &= ~same[:, :-1]  # one exchange at a time: `repair` sees to the rest
        layer, at = np.nonzero(same[:, :-1])
        turn[layer, at], turn[layer, at + 1] = turn[layer, at + 1], turn[layer, at]
    last: Ints = domain.take(turn[:, -1])
    return last


def repair(out: Deal) -> None:
    """Make every rank's experts different, then bring replicas off a host that has all of an expert's, by the cheapest
    exchanges. Dealing leaves few such conflicts: where an expert's replicas span two rounds."""
    if out.doubled:
        layer, rank, slot = np.concatenate(out.doubled, axis=1)
        _one_a_layer(out, layer, rank, slot, off_host=False)
    if not out.ground.host_matters:
        return
    for _ in range(out.shape[1]):
        layer, one = np.nonzero(on_one_host(out))
        if not layer.size:
            return
        mine = (out.expert_LNM[layer] == one[:, None, None]).reshape(layer.size, -1)
        rank, slot = np.divmod(mine.argmax(axis=1), out.shape[2])
        if not _one_a_layer(out, layer, rank, slot, off_host=True):
            break
    for layer_, one_ in np.argwhere(on_one_host(out)).tolist():
        _cover(out, layer_, one_)


def on_one_host(out: Deal) -> Bools:
    """[L, E]: experts that have several replicas, all on one host."""
    lone: Bools = np.any(out.room_LHE < 0, axis=1)
    return lone


def _one_a_layer(out: Deal, layer: Ints, rank: Ints, slot: Ints, off_host: bool) -> bool:
    """Exchange each of these replicas away, one of each layer at a time. Whether any could be."""
    any_moved = False
    while layer.size:
        if not off_host:  # an earlier exchange may have seen to it
            expert = out.expert_LNM[layer, rank]
            still = (expert == expert[np.arange(layer.size), slot][:, None]).sum(axis=1) > 1
            layer, rank, slot = layer[still], rank[still], slot[still]
            if not layer.size:
                break
        _, first = np.unique(layer, return_index=True)
        moved = _exchange(out, layer[first], rank[first], slot[first], off_host)
        any_moved |= bool(moved.any())
        if not off_host:
            for i in first[~moved].tolist():
                _replace(out, int(layer[i]), int(rank[i]), int(slot[i]))
        rest = np.ones(layer.size, bool)
        rest[first] = False
        layer, rank, slot = layer[rest], rank[rest], slot[rest]
    return any_moved


def _exchange(out: Deal, layer: Ints, rank: Ints, slot: Ints, off_host: bool) -> Bools:
    """Exchange each of these replicas, [C], with another rank's (off_host: another host's) so that no new conflict
    arises, where the loads come out most even. No layer may occur twice. Returns which of them found a place."""
    ground, width = out.ground, out.shape[2]
    expert, part, load = out.expert_LNM[layer], out.part_LNM[layer], out.load_LN[layer]
    c = np.arange(layer.size)
    mine = expert[c, rank, slot]
    at = c[:, None, None]
    beside = np.zeros((layer.size, out.shape[3] + 1), bool)  # the last column is for places that do not exist
    beside[c[:, None], expert[c, rank]] = True
    good = (expert >= 0) & ~(expert == mine[:, None, None]).any(axis=2, keepdims=True) & ~beside[at, expert]
    if out.packed:
        single = out.single_LE[layer]
        good &= ~(single[at, expert] & out.safe_N[rank][:, None, None])
        good &= ~(single[c, mine][:, None, None] & out.safe_N[:, None])
    if ground.host_matters:
        here = ground.host_N[rank]
        away = (ground.host_N[None, :] != here[:, None])[:, :, None]
        room = out.room_LHE[layer]
        good &= ~away | (room[at, here[:, None, None], expert] > 0)
        good &= away if off_host else ~away | (room[c, :, mine][:, ground.host_N] > 0)[:, :, None]
    delta = part[c, rank, slot][:, None, None] - part
    worst = np.maximum(load[c, rank][:, None, None] - delta, load[:, :, None] + delta)
    worst = np.where(good, worst, np.inf).reshape(layer.size, -1)
    best = worst.argmin(axis=1)
    found: Bools = np.isfinite(worst[c, best])
    other, place = np.divmod(best[found], width)
    row = layer[found] * out.shape[1]
    out.swap(row + rank[found], slot[found], row + other, place)
    return found


def _replace(out: Deal, layer: int, rank: int, slot: int) -> None:
    """The last resort, for very uneven slots a rank: a second replica on one rank gives way to the expert whose
    replicas carry most of those that the rank does not hold."""
    carried = _totals(out, layer) / np.maximum(out.count_LE[layer], 1)
    held = out.expert_LNM[layer, rank]
    carried[held[held >= 0]] = -1.0
    _put(out, layer, rank, slot, int(carried.argmax()))


def _cover(out: Deal, layer: int, one: int) -> None:
    """Likewise when no exchange takes an expert off its only host: it gets one more replica on another host, in place
    of one of three or more of another expert that keeps two hosts without it."""
    room, expert, count = out.room_LHE[layer], out.expert_LNM[layer], out.count_LE[layer]
    host = out.ground.host_N[:, None]
    spare = (count[expert] > 2) & (room[host, expert] >= 0) & (room[:, one] >= 0)[host] & (expert >= 0)
    if spare.any():
        rank, slot = divmod(int(np.argmin(np.where(spare, out.part_LNM[layer], np.inf))), expert.shape[1])
        _put(out, layer, rank, slot, one)


def _totals(out: Deal, layer: int) -> Floats:
    """[E]: each expert's load."""
    experts = out.shape[3]
    total = np.bincount(out.expert_LNM[layer].ravel() + 1, out.part_LNM[layer].ravel(), experts + 1)[1:]
    return np.asarray(total, np.float64)


def _put(out: Deal, layer: int, rank: int, slot: int, new: int) -> None:
    """Let a slot hold another expert, which changes how many replicas the two have and what each carries."""
    total, count, expert = _totals(out, layer), out.count_LE[layer], out.expert_LNM[layer]
    old = int(expert[rank, slot])
    expert[rank, slot] = new
    count[old] -= 1
    count[new] += 1
    out.single_LE[layer, [old, new]] = count[[old, new]] == 1
    out.part_LNM[layer] = np.where(expert >= 0, (total / np.maximum(count, 1))[expert], 0.0)
    out.load_LN[layer] = out.part_LNM[layer].sum(axis=1)
    if out.ground.host_matters:
        for one in (old, new):
            there = np.bincount(out.ground.host_N[np.nonzero(expert == one)[0]], minlength=out.ground.num_hosts)
            out.room_LHE[layer, :, one] = (count[one] - 1 if count[one] > 1 else MANY) - there
