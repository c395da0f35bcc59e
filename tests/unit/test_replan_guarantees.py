"""The planner's guarantees, in their order, for any mix of dead ranks, hosts, slots and loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx.elastic.replan import Priority, at_risk, balancedness, diff, replan
from phalanx.errors import TooFewSlots
from phalanx.world import EMPTY, Member, Placement, View

PRIORITIES: list[Priority] = ["safety", "even", "balance"]


@dataclass(frozen=True)
class Case:
    load: npt.NDArray[np.float64]
    view: View
    slots_per_rank: int
    rank_slots: tuple[int, ...] | None
    num_replicas: int | None
    priority: Priority
    num_groups: int
    held: npt.NDArray[np.int32] = field(repr=False)

    @property
    def experts(self) -> int:
        return int(self.load.shape[1])

    @property
    def slots_of(self) -> list[int]:
        """Slots of each living rank that can serve: a rank has no use for more than one of each expert."""
        limit = self.rank_slots or (self.slots_per_rank,) * self.view.ep_size
        return [min(limit[r], self.experts) for r in self.view.ranks]

    @property
    def total(self) -> int:
        return min(sum(self.slots_of), self.num_replicas or sum(self.slots_of))

    def plan(self, **changes: object) -> Placement:
        given_ = dict(
            num_experts=self.experts,
            slots_per_rank=self.slots_per_rank,
            rank_slots=self.rank_slots,
            num_replicas=self.num_replicas,
            priority=self.priority,
            num_groups=self.num_groups,
        )
        return replan(self.load, self.view, **{**given_, **changes})  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn, even: bool = False) -> Case:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    ranks, width = draw(st.integers(1, 8)), draw(st.integers(1, 7))
    alive = sorted(draw(st.sets(st.integers(0, ranks - 1), min_size=1)))
    hosts = draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))
    if even:
        alive = list(range(ranks))
        num_hosts = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
        hosts = [r * num_hosts // ranks for r in range(ranks)]
    members = tuple(Member(r, 0, host=f"host{hosts[r]}") for r in alive)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["lognormal", "zero", "few", "alike"]))
    load = {
        "lognormal": rng.lognormal(0, 1.5, (layers, experts)),
        "zero": np.zeros((layers, experts)),
        "few": rng.integers(0, 3, (layers, experts)).astype(float),
        "alike": np.ones((layers, experts)),
    }[kind]
    uneven = None if even else draw(st.none() | st.lists(st.integers(0, width), min_size=ranks, max_size=ranks))
    return Case(
        load=load,
        view=View(1, ranks, members),
        slots_per_rank=width,
        rank_slots=None if uneven is None else tuple(uneven),
        num_replicas=None if even else draw(st.none() | st.integers(experts, 3 * experts)),
        priority=draw(st.sampled_from(PRIORITIES)),
        num_groups=draw(st.sampled_from([1, 2, 4])),
        held=rng.integers(-1, experts, (layers, ranks * width)).astype(np.int32),
    )


def on_rank(case: Case, placement: Placement) -> npt.NDArray[np.bool_]:
    """[L, R, E]: which rank has which expert."""
    slots = placement.slots_LP.reshape(placement.num_layers, -1, case.slots_per_rank)
    return (slots[..., None] == np.arange(case.experts)).any(axis=2)


many = settings(
    max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@many
@given(cases())
def test_every_expert_has_a_live_slot_or_too_few_slots_names_the_numbers(case: Case) -> None:
    for held, least in ((None, False), (case.held, False), (case.held, True)):
        if case.total < case.experts:
            with pytest.raises(TooFewSlots) as error:
                case.plan(held_LP=held, min_moves=least)
            assert (error.value.slots, error.value.experts) == (case.total, case.experts)
        else:
            assert case.plan(held_LP=held, min_moves=least).missing == ()


@many
@given(cases())
def test_slots_of_dead_ranks_and_beyond_a_ranks_limit_stay_empty(case: Case) -> None:
    if case.total < case.experts:
        return
    limit = case.rank_slots or (case.slots_per_rank,) * case.view.ep_size
    for held, least in ((None, False), (case.held, False), (case.held, True)):
        placement = case.plan(held_LP=held, min_moves=least)
        for rank in range(case.view.ep_size):
            may = limit[rank] if rank in case.view.ranks else 0
            assert (placement.of_rank(rank)[:, may:] == EMPTY).all()


@many
@given(cases())
def test_a_full_plan_fills_exactly_its_budget_and_no_rank_has_an_expert_twice(case: Case) -> None:
    if case.total < case.experts:
        return
    for held in (None, case.held):
        placement = case.plan(held_LP=held)
        filled = (placement.slots_LP != EMPTY).sum(axis=1)
        assert (filled == case.total).all()
        assert (on_rank(case, placement).sum(axis=(1, 2)) == case.total).all()


@many
@given(cases())
def test_with_two_slots_for_each_expert_every_expert_is_on_two_ranks(case: Case) -> None:
    if case.total < 2 * case.experts or sum(s > 0 for s in case.slots_of) < 2:
        return
    for held in (None, case.held):
        assert on_rank(case, case.plan(held_LP=held)).sum(axis=1).min() >= 2


@many
@given(cases(even=True))
def test_on_even_hosts_with_two_slots_for_each_expert_every_expert_is_on_two_hosts(case: Case) -> None:
    names = [m.host for m in case.view.members]
    hosts = sorted(set(names))
    if case.total < 2 * case.experts or len(hosts) < 2:
        return
    for held in (None, case.held):
        has = on_rank(case, case.plan(held_LP=held))
        by_host = np.stack([has[:, [n == h for n in names]].any(axis=1) for h in hosts], axis=1)
        assert by_host.sum(axis=1).min() >= 2


@pytest.mark.parametrize(
    ("ranks", "hosts", "width", "experts"),
    [(4, 2, 3, 6), (6, 3, 3, 9), (6, 2, 4, 8), (8, 2, 8, 32), (16, 4, 6, 48), (12, 3, 6, 30)],
)
@pytest.mark.parametrize("skew", [0.8, 2.0])
def test_evening_out_brings_no_expert_back_to_a_single_host(
    ranks: int, hosts: int, width: int, experts: int, skew: float
) -> None:
    rng = np.random.default_rng(ranks * 100 + experts)
    alive = view(ranks, hosts)
    host_R = np.arange(ranks) * hosts // ranks
    held = None
    for _ in range(4):
        load = rng.lognormal(0, skew, (12, experts))
        plan = replan(load, alive, num_experts=experts, slots_per_rank=width, held_LP=held)
        held = plan.slots_LP
        by_rank = held.reshape(12, ranks, width)
        on_host = np.stack([(by_rank[:, host_R == h].reshape(12, -1, 1) == np.arange(experts)).any(axis=1)
                            for h in range(hosts)])  # fmt: skip
        assert on_host.sum(axis=0).min() >= 2


@many
@given(cases())
def test_the_least_plan_touches_only_what_it_must(case: Case) -> None:
    if case.total < case.experts:
        return
    first = case.plan(priority="balance")
    lost = [r for r in case.view.ranks[1:]][: len(case.view.ranks) // 3]
    survivors = View(2, case.view.ep_size, tuple(m for m in case.view.members if m.rank not in lost))
    held = first.slots_LP.copy()
    for rank in lost:
        held[:, rank * case.slots_per_rank : (rank + 1) * case.slots_per_rank] = EMPTY
    after = Case(**{**case.__dict__, "view": survivors})
    if after.total < case.experts:
        return
    placement = after.plan(held_LP=held, min_moves=True)
    assert placement.missing == (), "nothing is filled in at the cost of another expert's last replica"
    present = (held[:, :, None] == np.arange(case.experts)).any(axis=1)
    moves = [m for r in survivors.ranks for m in diff(held, placement, r)]
    assert len(moves) == (~present).sum()
    assert {(m.layer, m.expert) for m in moves} == {(int(a), int(b)) for a, b in np.argwhere(~present)}
    gone = (held != EMPTY) & (placement.slots_LP != held)
    assert gone.sum() <= len(moves)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_the_least_plan_takes_every_surplus_replica_before_the_last_one_of_any_expert(priority: Priority) -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (20, 24))
    sizes: dict[str, Any] = {"num_experts": 24, "slots_per_rank": 8, "priority": priority}
    before = replan(load, view(4), **sizes)
    after = replan(load, view(4, dead=(2,)), held_LP=before.slots_LP, min_moves=True, **sizes)
    assert after.missing == (), "three ranks have just as many slots as there are experts"


@many
@given(cases(even=True))
def test_a_plan_that_starts_from_what_is_held_exposes_no_more_ranks_than_one_from_scratch(case: Case) -> None:
    if case.total < case.experts or case.priority == "balance":
        return
    scratch, kept = case.plan(), case.plan(held_LP=case.held)
    assert ((at_risk(kept, case.view) > 0).sum(axis=1) <= (at_risk(scratch, case.view) > 0).sum(axis=1)).all()


@many
@given(cases())
def test_planning_again_for_the_same_load_moves_nothing(case: Case) -> None:
    if case.total < case.experts:
        return
    first = case.plan()
    again = case.plan(held_LP=first.slots_LP)
    assert again == case.plan(held_LP=first.slots_LP)
    moved = int(((again.slots_LP != first.slots_LP) & (again.slots_LP != EMPTY)).sum())
    assert moved == 0


def view(ranks: int, hosts: int = 1, dead: tuple[int, ...] = ()) -> View:
    members = tuple(Member(r, 0, host=f"host{r * hosts // ranks}") for r in range(ranks) if r not in dead)
    return View(1, ranks, members)


def test_with_fewer_slots_as_few_ranks_as_can_be_are_exposed_and_the_hottest_are_protected() -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (5, 256))
    placement = replan(load, view(32, 4), num_experts=256, slots_per_rank=9, priority="safety")
    exposed = (at_risk(placement, view(32, 4)) > 0).sum(axis=1)
    # 32 spare slots double 32 experts at most; the other 224 need 25 ranks of 9.
    assert exposed.tolist() == [25] * 5
    doubled = placement.count_LE > 1
    for layer in range(5):
        assert load[layer, doubled[layer]].min() > load[layer, ~doubled[layer]].max()


def test_even_priority_exposes_no_more_ranks_and_is_better_balanced() -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (5, 256))
    safe = replan(load, view(32, 4), num_experts=256, slots_per_rank=9, priority="safety")
    even = replan(load, view(32, 4), num_experts=256, slots_per_rank=9)
    assert (at_risk(even, view(32, 4)) > 0).sum() == (at_risk(safe, view(32, 4)) > 0).sum()
    assert balancedness(load, safe, view(32, 4)) < 0.6 < 0.95 < balancedness(load, even, view(32, 4))


def test_a_hot_expert_gets_what_is_left_over_when_every_rank_that_can_be_is_safe() -> None:
    load = np.tile(1.0 / np.arange(1, 257), (3, 1))
    placement = replan(load, view(32, 4), num_experts=256, slots_per_rank=9)
    assert (at_risk(placement, view(32, 4)) > 0).sum(axis=1).tolist() == [25] * 3
    assert placement.count_LE[:, 0].tolist() == [3] * 3, "31 others need two replicas, so one is left"
    # A third of it on a rank is the most that such a plan can do about it.
    bound = load.sum(axis=1) / 32 / (load[:, 0] / 3)
    assert balancedness(load, placement, view(32, 4)) > 0.9 * bound.mean()


def test_ranks_with_very_many_slots_are_evened_out_in_parts() -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (2, 6000))
    placement = replan(load, view(2), num_experts=6000, slots_per_rank=4600)
    assert placement.missing == ()
    assert balancedness(load, placement, view(2)) > 0.99


@pytest.mark.parametrize("magnitude", [1e-300, 1e-9, 1e9, 1e300])
def test_only_ratios_of_loads_count(magnitude: float) -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (3, 32))
    plans = [replan(load * m, view(8), num_experts=32, slots_per_rank=5) for m in (1.0, magnitude)]
    assert abs(balancedness(load, plans[0], view(8)) - balancedness(load, plans[1], view(8))) < 0.02


@pytest.mark.parametrize("dead", [(), (0,), (31,), (0, 8, 16, 24), tuple(range(1, 31)), tuple(range(31))])
def test_dead_ranks_anywhere_leave_a_plan_on_the_others(dead: tuple[int, ...]) -> None:
    load = np.random.default_rng(1).lognormal(0, 1, (4, 64))
    living = view(32, 4, dead)
    placement = replan(load, living, num_experts=64, slots_per_rank=64)
    assert placement.missing == ()
    assert (placement.count_LE == len(living.ranks)).all()


def test_ranks_that_joined_later_may_have_more_slots() -> None:
    load = np.random.default_rng(1).lognormal(0, 1, (4, 32))
    limit = [8, 8, 8, 8, 16, 16]
    placement = replan(load, view(6), num_experts=32, slots_per_rank=16, rank_slots=limit)
    assert [(placement.of_rank(r) != EMPTY).sum() // 4 for r in range(6)] == limit
    assert placement.count_LE.min() >= 2


def test_held_may_be_narrower_than_the_grown_view() -> None:
    load = np.random.default_rng(1).lognormal(0, 1, (4, 32))
    before = replan(load, view(4), num_experts=32, slots_per_rank=12)
    after = replan(load, view(6), num_experts=32, slots_per_rank=12, held_LP=before.slots_LP)
    assert after.missing == ()
    assert after.ep_size == 6


def test_bad_inputs_are_refused_by_name() -> None:
    load = np.ones((2, 8))
    with pytest.raises(ValueError, match="load must be"):
        replan(load, view(2), num_experts=9, slots_per_rank=8)
    with pytest.raises(ValueError, match="not negative"):
        replan(-load, view(2), num_experts=8, slots_per_rank=8)
    with pytest.raises(ValueError, match="held must be"):
        replan(load, view(2), num_experts=8, slots_per_rank=8, held_LP=np.zeros((2, 5), np.int32))
    with pytest.raises(ValueError, match="outside"):
        replan(load, view(2), num_experts=8, slots_per_rank=8, held_LP=np.full((2, 16), 8, np.int32))
    with pytest.raises(ValueError, match="whole numbers"):
        replan(load, view(2), num_experts=8, slots_per_rank=8, held_LP=np.full((2, 16), 0.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in sum too"):
        replan(np.full((2, 8), 1e308), view(2), num_experts=8, slots_per_rank=8)
    with pytest.raises(ValueError, match="num_experts"):
        replan(np.ones((2, 0)), view(2), num_experts=0, slots_per_rank=8)


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        ("priority", {"priority": "speed"}),
        ("num_groups", {"num_groups": 0}),
        ("num_replicas", {"num_replicas": -1}),
        ("rank_slots", {"rank_slots": [8]}),
        ("rank_slots", {"rank_slots": [8, -1]}),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(said: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        replan(np.ones((2, 8)), view(2), num_experts=8, slots_per_rank=8, **setting)


def test_no_layers_make_an_empty_plan_and_no_living_rank_makes_none() -> None:
    assert replan(np.ones((0, 8)), view(2), num_experts=8, slots_per_rank=8).slots_LP.shape == (0, 16)
    with pytest.raises(TooFewSlots):
        replan(np.ones((2, 8)), view(2, dead=(0, 1)), num_experts=8, slots_per_rank=8)


def test_diff_lists_experts_that_nobody_holds_first() -> None:
    load = np.ones((2, 4))
    held = np.array([[0, 1, EMPTY, EMPTY], [2, 3, EMPTY, EMPTY]], np.int32)
    target = Placement(np.array([[0, 1, 1, 2], [2, 3, 0, 3]], np.int32), 4, 2)
    assert [tuple(m) for m in diff(held, target, 1)] == [(0, 1, 2), (1, 0, 0), (0, 0, 1), (1, 1, 3)]
    assert diff(held, target, 0) == ()
    assert load.shape == (2, 4)
