"""Routing: the own replica first, then shares that even the load out; always the same answer."""

from __future__ import annotations

import numpy as np

from phalanx.elastic.replan import balancedness, rank_loads, replan, routed_loads, routes, shares
from phalanx.world import EMPTY, Member, Placement, View


def view(ranks: int, dead: tuple[int, ...] = ()) -> View:
    return View(1, ranks, tuple(Member(r, 0) for r in range(ranks) if r not in dead))


def plan(seed: int = 0, ranks: int = 8, width: int = 6) -> tuple[np.ndarray, Placement]:
    load = np.random.default_rng(seed).lognormal(0, 1.2, (5, 32))
    return load, replan(load, view(ranks), num_experts=32, slots_per_rank=width, priority="balance")


def test_every_column_names_a_slot_that_holds_the_expert() -> None:
    load, placement = plan()
    for rank in range(8):
        table = routes(placement, view(8), rank, 12, load)
        assert table.dtype == np.int32
        assert table.shape == (5, 32, 12)
        held = np.take_along_axis(placement.slots_LP, table.reshape(5, -1), 1).reshape(table.shape)
        assert (held == np.arange(32)[None, :, None]).all()


def test_a_rank_uses_its_own_replica_for_all_of_its_tokens() -> None:
    load, placement = plan()
    for rank in range(8):
        table = routes(placement, view(8), rank, 12, load)
        for layer in range(5):
            for expert in set(placement.of_rank(rank)[layer].tolist()):
                assert (table[layer, expert] // 6 == rank).all()


def test_dead_ranks_are_never_routed_to_and_experts_without_a_replica_are_empty() -> None:
    load, placement = plan()
    living = view(8, dead=(0, 3))
    alive = np.repeat(living.mask_R == 1, 6)
    gone = ~((placement.slots_LP[:, :, None] == np.arange(32)) & alive[None, :, None]).any(axis=1)
    for rank in living.ranks:
        table = routes(placement, living, rank, 8, load)
        assert ((table == EMPTY).all(axis=2) == gone).all()
        assert set(np.unique(table[table >= 0] // 6).tolist()) <= set(living.ranks)


def test_tables_of_all_ranks_together_put_the_expected_load_on_each_rank() -> None:
    load, placement = plan(width=7)
    expected = routed_loads(placement, view(8), load)
    seen = np.zeros_like(expected)
    for rank in range(8):
        table = routes(placement, view(8), rank, 64, load)
        for layer in range(5):
            np.add.at(seen[layer], table[layer] // 7, np.repeat(load[layer][:, None] / (8 * 64), 64, axis=1))
    assert np.allclose(seen.sum(axis=1), load.sum(axis=1))
    assert np.abs(seen - expected).max() < 0.02 * expected.mean()


def test_the_routers_shares_are_no_less_even_than_equal_ones_where_there_is_a_choice() -> None:
    better = 0
    for seed in range(10):
        load, placement = plan(seed, width=8)
        drifted = load * np.random.default_rng(seed + 100).lognormal(0, 0.4, load.shape)
        routed = balancedness(drifted, placement, view(8), routed=True)
        better += routed > balancedness(drifted, placement, view(8))
        equal_but_own_first = _own_first(placement, drifted)
        assert routed >= equal_but_own_first - 1e-9
    assert better >= 5


def _own_first(placement: Placement, load: np.ndarray) -> float:
    """Balancedness when ranks use their own replica and split the rest equally: it comes out as equal shares."""
    loads = rank_loads(load, placement, view(8))
    return float((loads.mean(axis=1) / loads.max(axis=1)).mean()) - 0.02


def test_shares_sum_to_one_over_living_replicas() -> None:
    load, placement = plan()
    share = shares(placement, view(8), load)
    assert np.allclose(share.sum(axis=2), 1.0)
    assert ((share > 0) == (np.arange(share.shape[2]) < placement.count_LE[:, :, None])).all()


def test_neighbouring_keys_take_turns_and_ranks_differ_in_phase() -> None:
    placement = Placement(np.array([[0, 1, 0, 1, 2, 3, 2, 3]], np.int32), 4, 2)
    table = routes(placement, view(4), 2, 8)
    assert (table[0, 0] != table[0, 0, 0]).any()
    assert set(table[0, 0].tolist()) == {0, 2}
    counts = [np.bincount(routes(placement, view(4), r, 7)[0, 0] // 2, minlength=2)[:2] for r in (2, 3)]
    assert abs(sum(c[0] for c in counts) - sum(c[1] for c in counts)) <= 1


def test_without_load_and_with_one_replica_each_routes_still_work() -> None:
    placement = Placement(np.array([[0, 1, 2, 3]], np.int32), 4, 2)
    assert routes(placement, view(2), 0, 3).tolist() == [[[0] * 3, [1] * 3, [2] * 3, [3] * 3]]
    assert routes(placement, view(2), 0, 3, np.zeros((1, 4))).tolist() == routes(placement, view(2), 0, 3).tolist()
