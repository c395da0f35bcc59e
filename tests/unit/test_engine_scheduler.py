"""The scheduler and its blocks: who runs, who waits, who is preempted, what the prefix cache finds."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.engine.kv_cache import BlockPool
from phalanx.engine.request import Request
from phalanx.engine.scheduler import Limits, Plan, Scheduler
from phalanx.messages import SamplingParams, Submit


def limits(**changes: Any) -> Limits:
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 24}
    return Limits(**{"max_model_len": 64, **small, **changes})


def request(name: str, prompt: range | list[int], max_tokens: int = 20, **changes: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **changes)
    submit = Submit(request_id=name, attempt=0, prompt_ids=list(prompt), sampling=sampling)
    return Request.of(submit, frozenset({999}), 4)


def scheduler_with(*requests: Request, **changes: Any) -> Scheduler:
    scheduler = Scheduler(limits(**changes))
    for each in requests:
        scheduler.add(each)
    return scheduler


def commit(scheduler: Scheduler, plan: Plan, token: int = 7) -> None:
    scheduler.commit(plan, {chunk.request.request_id: token for chunk in plan.chunks if chunk.samples})
    scheduler.check()


def shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.request.request_id, chunk.start, chunk.length) for chunk in plan.chunks]


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_after_the_last() -> None:
    scheduler = scheduler_with(request("a", range(18)))
    seen = []
    for _ in range(4):
        plan = scheduler.schedule()
        seen.append((shape(plan)[0][1:], plan.chunks[0].samples))
        commit(scheduler, plan)
    assert seen == [((0, 8), False), ((8, 8), False), ((16, 2), True), ((18, 1), True)]


def test_decodes_come_before_prompts_and_share_the_budget() -> None:
    scheduler = scheduler_with(request("a", range(3)), request("b", range(100, 112)))
    commit(scheduler, scheduler.schedule())
    assert shape(scheduler.schedule()) == [("a", 3, 1), ("b", 5, 7)]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = scheduler_with(*(request(name, [i]) for i, name in enumerate("abc")), max_num_seqs=2)
    commit(scheduler, scheduler.schedule())
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a", "b"]
    assert (scheduler.load().running, scheduler.load().waiting) == (2, 1)


def test_a_plan_changes_nothing_until_it_is_committed() -> None:
    scheduler = scheduler_with(request("a", range(10)), request("b", range(5)))
    before = scheduler.load()
    assert scheduler.schedule() == scheduler.schedule()
    assert scheduler.load() == before
    scheduler.check()


def test_the_oldest_takes_the_blocks_of_the_youngest_but_only_from_the_next_step_on() -> None:
    scheduler = scheduler_with(request("a", range(7)), request("b", range(100, 107)), num_blocks=4)
    for _ in range(2):
        commit(scheduler, scheduler.schedule())
    assert [len(each.blocks) for each in scheduler.requests.values()] == [2, 2]
    plan = scheduler.schedule()
    assert [victim.request_id for victim in plan.preempted] == ["b"]
    assert "b" not in [name for name, _, _ in shape(plan)]
    held_by_b = set(scheduler.requests["b"].blocks)
    assert not held_by_b & {block for chunk in plan.chunks for block in chunk.new}
    commit(scheduler, plan)
    assert scheduler.requests["b"].blocks == []
    assert scheduler.load().preemptions == 1
    assert ("a", 8, 1) in shape(scheduler.schedule())


def test_a_request_that_cannot_have_all_its_blocks_waits_and_those_behind_it_too() -> None:
    scheduler = scheduler_with(request("a", range(9)), request("b", range(100, 108)), request("c", [5]), num_blocks=4)
    commit(scheduler, scheduler.schedule())
    commit(scheduler, scheduler.schedule())
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a"]


def test_a_finished_request_gives_its_blocks_back() -> None:
    scheduler = scheduler_with(request("a", range(5), max_tokens=1))
    endings = scheduler.commit(scheduler.schedule(), {"a": 7})
    assert endings["a"].reason == "length"
    assert scheduler.requests == {}
    assert scheduler.load().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_token"),
    [
        ({}, 7, None, False),
        ({}, 999, "stop", True),
        ({"ignore_eos": True}, 999, None, False),
        ({"stop_token_ids": (7,)}, 7, "stop", True),
        ({"stop_token_ids": (7,), "ignore_eos": True}, 7, "stop", True),
        ({"max_tokens": 1}, 7, "length", False),
        ({"max_tokens": 1}, 999, "stop", True),
    ],
)
def test_a_request_ends_by_its_stop_tokens_or_its_length(
    params: dict[str, Any], token: int, reason: str | None, stop_token: bool
) -> None:
    ending = request("a", [1, 2], **params).ending(token, max_model_len=64)
    assert (ending.reason, ending.stop_token) == (reason, stop_token)


def test_a_request_ends_at_the_models_length() -> None:
    assert request("a", range(63)).ending(7, max_model_len=64).reason == "length"


def test_a_prompt_that_begins_like_an_earlier_one_starts_from_its_blocks() -> None:
    scheduler = scheduler_with(request("a", range(8), max_tokens=1), num_blocks=40)
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", [*range(8), 50, 51]))
    plan = scheduler.schedule()
    assert shape(plan) == [("b", 8, 2)]
    commit(scheduler, plan)
    assert (scheduler.load().prefix_hits, scheduler.load().prefix_queries) == (8, 18)


def test_the_last_token_of_a_known_prompt_is_computed_all_the_same() -> None:
    scheduler = scheduler_with(request("a", range(8), max_tokens=1), num_blocks=40)
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", range(8)))
    assert shape(scheduler.schedule()) == [("b", 4, 4)]


def test_two_running_requests_share_a_prefix_and_each_frees_it_once() -> None:
    scheduler = scheduler_with(request("a", range(8)), num_blocks=40)
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", [*range(8), 50]))
    commit(scheduler, scheduler.schedule())
    a, b = scheduler.requests["a"], scheduler.requests["b"]
    assert a.blocks[:2] == b.blocks[:2]
    assert scheduler.load().kv_blocks_used == 4
    scheduler.remove("a")
    scheduler.check()
    assert scheduler.load().kv_blocks_used == 3
    scheduler.remove("b")
    scheduler.check()
    assert scheduler.load().kv_blocks_used == 0


def test_another_beginning_is_no_hit_even_when_later_blocks_agree() -> None:
    scheduler = scheduler_with(request("a", range(8), max_tokens=1), num_blocks=40)
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", [9, 9, 9, 9, 4, 5, 6, 7, 8]))
    assert shape(scheduler.schedule()) == [("b", 0, 8)]


def test_prompt_logprobs_need_every_position_so_they_take_no_hit() -> None:
    scheduler = scheduler_with(request("a", range(8), max_tokens=1), num_blocks=40)
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", [*range(8), 50], prompt_logprobs=0))
    assert shape(scheduler.schedule()) == [("b", 0, 8)]


def test_without_prefix_caching_nothing_is_found_again() -> None:
    scheduler = scheduler_with(request("a", range(8), max_tokens=1), num_blocks=40, prefix_caching=False)
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", range(8)))
    assert shape(scheduler.schedule()) == [("b", 0, 8)]


def test_the_pool_forgets_the_least_recently_used_prefix_and_of_that_the_end_first() -> None:
    pool = BlockPool(num_blocks=6, reserve=2)
    for names in ([b"a0", b"a1"], [b"b0", b"b1"]):
        blocks = pool.next_clean(2)
        pool.take(blocks)
        for block, name in zip(blocks, names, strict=True):
            pool.name(block, name)
        pool.release(blocks)
        pool.settle()
    a, b = pool.lookup([b"a0", b"a1"]), pool.lookup([b"b0", b"b1"])
    assert (len(a), len(b)) == (2, 2)
    pool.take(pool.next_clean(1))
    pool.settle()
    assert pool.lookup([b"a0", b"a1"]) == a[:1]
    assert pool.lookup([b"b0", b"b1"]) == b


def test_a_block_that_is_still_known_is_never_handed_out_as_clean() -> None:
    pool = BlockPool(num_blocks=4, reserve=2)
    blocks = pool.next_clean(4)
    pool.take(blocks)
    for i, block in enumerate(blocks):
        pool.name(block, bytes([i]))
    pool.release(blocks)
    pool.settle()
    known = pool.lookup([bytes([i]) for i in range(4)])
    assert known == blocks[:2]
    assert set(pool.next_clean(2)) == set(blocks[2:])
    pool.check([])


def test_blocks_of_a_launched_step_are_in_no_other_plan_and_come_back_when_it_is_dropped() -> None:
    scheduler = scheduler_with(request("a", range(4)), request("b", range(10, 14)))
    first = scheduler.schedule()
    scheduler.depart(first)
    second = scheduler.follow(first)
    assert second is not None
    assert shape(second) == [("a", 4, 1), ("b", 4, 1)]
    scheduler.depart(second)
    scheduler.check()
    taken = [block for plan in (first, second) for chunk in plan.chunks for block in chunk.new]
    assert len(taken) == len(set(taken)) == 4
    assert not set(taken) & set(scheduler.pool.next_clean(2))
    scheduler.drop(second)
    scheduler.drop(first)
    assert scheduler.schedule() == first
    scheduler.check()


def test_what_follows_leaves_out_who_ends_for_certain_and_says_nothing_when_more_may_happen() -> None:
    scheduler = scheduler_with(request("a", [1, 2], max_tokens=1), request("b", [3, 4]))
    plan = scheduler.schedule()
    scheduler.depart(plan)
    following = scheduler.follow(plan)
    assert following is not None
    assert shape(following) == [("b", 2, 1)]
    scheduler.add(request("c", [5]))
    assert scheduler.follow(plan) is None, "c could be let in"
    commit(scheduler, plan)
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["b", "c"]
