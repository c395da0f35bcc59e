"""A step as a transaction: what fails leaves nothing behind, and every text is the same whatever happened to it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_doubles import EOS, Bench, limits, reference, submit, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx.engine import sampler
from phalanx.engine.batch import StepBatch
from phalanx.engine.runner import Flight, Runner
from phalanx.messages import Abort, Pause, Resume, Stop, Submit, TokenOut
from phalanx.testing.faults import FaultInjector, InjectedFault

SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.2}


def outputs(*requests: Submit, bench: Bench | None = None) -> dict[str, list[int]]:
    bench = bench or Bench(limits())
    bench.accept(*requests)
    return bench.run()


def test_a_request_yields_what_the_model_says_token_by_token() -> None:
    request = submit("a", [3, 4, 5])
    bench = Bench(limits())
    assert outputs(request, bench=bench) == {"a": reference(request)}
    assert [token.index for token in bench.outputs["a"]] == list(range(8))
    assert [token.finish_reason for token in bench.outputs["a"]] == [None] * 7 + ["length"]


@pytest.mark.parametrize("params", [{}, {**SEEDED, "seed": 5}], ids=["greedy", "seeded"])
def test_chunks_company_preemption_and_moves_do_not_change_a_token(params: dict[str, Any]) -> None:
    requests = [submit(name, range(i, i + 11), max_tokens=14, **params) for i, name in enumerate("abcd")]
    expected = {request.request_id: reference(request) for request in requests}
    for each in requests:
        assert outputs(each) == {each.request_id: expected[each.request_id]}
    assert outputs(*requests) == expected
    assert outputs(*requests, bench=Bench(limits(max_num_batched_tokens=1))) == expected
    assert outputs(*requests, bench=Bench(limits(max_num_batched_tokens=64))) == expected
    tight = Bench(limits(num_blocks=8, max_num_batched_tokens=16))
    assert outputs(*requests, bench=tight) == expected
    assert tight.engine.load().preemptions > 0
    for taken in (1, 6, 13):
        moved = [
            submit(r.request_id, r.prompt_ids, 14, output_ids=expected[r.request_id][:taken], attempt=1, **params)
            for r in requests
        ]
        bench = Bench(limits())
        assert outputs(*moved, bench=bench) == {name: tokens[taken:] for name, tokens in expected.items()}
        assert [token.index for token in bench.outputs["a"]] == list(range(taken, 14))


def test_penalties_and_minimum_and_maximum_count_the_tokens_from_before_a_move() -> None:
    params: dict[str, Any] = {"frequency_penalty": 1.5, "min_tokens": 6, "ignore_eos": False, "stop_token_ids": (2, 3)}
    whole = submit("a", [9, 9, 4], max_tokens=12, **params)
    expected = reference(whole)
    assert len(expected) >= 6
    moved = submit("a", [9, 9, 4], max_tokens=12, output_ids=expected[:4], attempt=2, **params)
    assert outputs(whole)["a"] == expected
    assert outputs(moved)["a"] == expected[4:]


def test_a_stop_token_ends_the_text_and_is_marked() -> None:
    tokens = reference(submit("a", [3, 4, 5]))
    bench = Bench(limits())
    bench.accept(submit("a", [3, 4, 5], stop_token_ids=(tokens[3],)))
    assert bench.run()["a"] == tokens[: tokens.index(tokens[3]) + 1]
    assert (bench.outputs["a"][-1].finish_reason, bench.outputs["a"][-1].stop_token) == ("stop", True)
    assert bench.engine.load().kv_blocks_used == 0


def test_the_models_own_end_of_text_ends_it_unless_it_is_ignored() -> None:
    bias = {EOS: 50.0}
    assert outputs(submit("a", [3], ignore_eos=False, logit_bias=bias)) == {"a": [EOS]}
    assert outputs(submit("a", [3], logit_bias=bias)) == {"a": [EOS] * 8}


@pytest.mark.parametrize("how", ["header", "forward"])
def test_a_failed_step_commits_nothing_and_its_replay_gives_the_same_tokens(how: str) -> None:
    requests = [submit("a", range(3, 14), seed=4, **SEEDED), submit("b", range(7)), submit("c", [5])]
    clear = Bench(limits())
    expected = outputs(*requests, bench=clear)
    mood = random.Random(1)
    stormy = Bench(limits(), lambda: how if mood.random() < 0.6 else "clear")
    assert outputs(*requests, bench=stormy) == expected
    assert stormy.weather.failures > 5
    assert stormy.engine.steps == clear.engine.steps
    assert stormy.engine.load() == clear.engine.load()


def test_while_a_step_fails_again_and_again_nothing_moves() -> None:
    forecast = iter(["clear"] * 4)
    bench = Bench(limits(), lambda: next(forecast, "forward"))
    bench.accept(submit("a", range(9)), submit("b", range(5)))
    for _ in range(4):
        bench.step()
    load, steps = bench.engine.load(), bench.engine.steps
    for _ in range(5):
        assert bench.step() is None
    assert (bench.engine.load(), bench.engine.steps) == (load, steps)


@pytest.mark.parametrize("at", range(14))
def test_a_request_that_goes_while_its_step_is_replayed_takes_nothing_along(at: int) -> None:
    # At one of these steps b is preempted for a. When that step fails and a is aborted, b goes on where it was.
    requests = submit("z", [20], max_tokens=4), submit("a", range(7), max_tokens=9), submit("b", range(11, 18), 9)
    fails = [False]
    bench = Bench(limits(num_blocks=5), lambda: "forward" if fails[0] else "clear")
    bench.accept(*requests)
    for _ in range(at):
        bench.step()
    fails[0] = True
    for _ in range(3):
        bench.step()
    fails[0] = False
    bench.accept(Abort(request_id="a"))
    assert bench.run()["b"] == reference(requests[2])


def test_a_failed_step_does_not_spoil_what_the_prefix_cache_remembers() -> None:
    first, again = submit("a", range(12), max_tokens=1), submit("c", range(12), max_tokens=5)
    fails = [False]
    bench = Bench(limits(num_blocks=14), lambda: "forward" if fails[0] else "clear")
    outputs(first, bench=bench)
    bench.accept(submit("b", range(4, 20), max_tokens=9))
    fails[0] = True
    for _ in range(3):
        assert bench.step() is None
    fails[0] = False
    bench.accept(Abort(request_id="b"), again)
    assert bench.run()["c"] == reference(again)
    assert bench.engine.load().prefix_hits > 0


def test_known_prefixes_are_not_computed_again() -> None:
    bench = Bench(limits(num_blocks=64))
    bench.accept(submit("a", range(16), max_tokens=4))
    bench.run()
    before = bench.model.computed
    request = submit("b", [*range(16), 5], max_tokens=4)
    bench.accept(request)
    assert bench.run()["b"] == reference(request)
    assert bench.model.computed - before == 1 + 3


def test_an_abort_ends_a_request_with_a_mark_and_frees_its_blocks() -> None:
    bench = Bench(limits())
    bench.accept(submit("a", range(5)), submit("b", range(6)))
    bench.step()
    bench.step()
    bench.accept(Abort(request_id="a"), Abort(request_id="never heard of"))
    bench.run()
    assert bench.outputs["a"][-1] == TokenOut("a", 0, len(token_ids(bench.outputs["a"])), -1, "abort")
    assert token_ids(bench.outputs["b"]) == reference(submit("b", range(6)))
    assert bench.engine.load().kv_blocks_used == 0


def test_a_higher_attempt_replaces_a_request_and_a_lower_or_equal_one_is_ignored() -> None:
    bench = Bench(limits())
    expected = reference(submit("a", range(5)))
    bench.accept(submit("a", range(5), attempt=3))
    bench.step()
    bench.accept(submit("a", range(9), attempt=3), submit("a", range(9), attempt=1))
    bench.accept(submit("a", range(5), output_ids=expected[:2], attempt=4))
    bench.accept(submit("a", range(9), attempt=3))
    bench.run()
    assert [(t.attempt, t.index, t.token_id) for t in bench.outputs["a"] if t.attempt == 4] == [
        (4, i, expected[i]) for i in range(2, 8)
    ]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (submit("a", []), "no tokens"),
        (submit("a", range(8), max_tokens=57), "maximum length of 64"),
        (submit("a", range(8), max_tokens=34), "11 KV blocks, and there are 10"),
        (submit("a", [22, 23]), "outside the vocabulary of 23"),
        (submit("a", [1], logit_bias={23: 1.0}), "logit_bias"),
        (submit("a", [1], max_tokens=2, output_ids=[4, 5]), "there already"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(request_: Submit, words: str) -> None:
    bench = Bench(limits(num_blocks=10))
    bench.accept(request_)
    assert bench.engine.has_work
    result = bench.step()
    assert result is not None
    assert result.idle
    assert words in result.rejected[0].reason
    assert not bench.engine.has_work


def test_what_just_fits_is_run() -> None:
    request = submit("a", range(8), max_tokens=33)
    assert outputs(request, bench=Bench(limits(num_blocks=10))) == {"a": reference(request)}


def test_a_pause_runs_no_request_but_takes_them_in() -> None:
    bench = Bench(limits())
    bench.accept(submit("a", range(5)))
    bench.step()
    told = len(bench.outputs.get("a", []))
    bench.accept(Pause(), submit("b", range(4)), Stop())
    result = bench.step()
    assert result is not None
    assert result.idle
    assert len(bench.outputs.get("a", [])) == told
    assert not bench.engine.has_work
    bench.accept(Resume())
    assert bench.run() == {"a": reference(submit("a", range(5))), "b": reference(submit("b", range(4)))}


def peer_row(
    tokens: int = 0, proposal: int = 0, ready: int = 0, epoch: int = 1, wants: int = 0, step: int = 1
) -> list[int]:
    return [tokens, proposal, ready, epoch, wants, step]


def test_a_rank_without_work_runs_an_empty_batch_when_a_peer_has_tokens() -> None:
    bench = Bench(limits(), ep_size=2)
    bench.comm.peer_rows = [peer_row(tokens=3, wants=1, step=41)]
    result = bench.step()
    assert result is not None
    assert not result.idle
    assert [len(batch.token_ids_T) for batch in bench.model.batches] == [0]
    assert result.step == bench.engine.steps == 41  # the number of a step is the same on all ranks


class Listening(Runner):
    """A runner that keeps what it is told of each step's size."""

    step_tokens: list[int]

    def launch(self, batch: StepBatch) -> Flight:
        self.step_tokens.append(batch.step_tokens)
        return super().launch(batch)


def test_the_runner_is_told_how_many_tokens_all_ranks_have_in_the_step() -> None:
    bench = Bench(limits(), ep_size=3, runner=Listening)
    assert isinstance(bench.runner, Listening)
    bench.runner.step_tokens = []
    bench.accept(submit("a", range(5), max_tokens=3))
    for tokens in (2048, 7, 0):
        bench.comm.peer_rows = [peer_row(tokens=tokens, wants=1), [0] * 6]
        assert bench.step() is not None
    assert bench.runner.step_tokens == [5 + 2048, 1 + 7, 1]


def test_all_are_idle_only_when_nobody_wants_the_step() -> None:
    bench = Bench(limits(), ep_size=2)
    bench.comm.peer_rows = [peer_row()]
    result = bench.step()
    assert result is not None
    assert result.idle
    bench.comm.peer_rows = [peer_row(wants=1)]  # a peer that only preempts: nothing is computed, nobody sleeps
    result = bench.step()
    assert result is not None
    assert not result.idle
    assert bench.model.batches == []


def test_a_step_ends_at_its_boundary_when_all_ranks_are_ready_for_what_one_proposes() -> None:
    bench = Bench(limits(), ep_size=2)
    bench.accept(submit("a", range(5)))
    bench.comm.peer_rows = [peer_row(proposal=6, ready=1)]
    result = bench.step()
    assert result is not None
    assert (result.proposal, result.boundary) == (6, False), "this rank has heard of it only now"
    ran = len(bench.model.batches)
    assert ran == 1
    result = bench.engine.step(proposal=4, ready=True)
    assert (result.proposal, result.boundary) == (6, True)
    assert len(bench.model.batches) == ran, "nothing is computed"
    bench.comm.peer_rows = [peer_row(proposal=6)]
    result = bench.engine.step(proposal=6, ready=True)
    assert not result.boundary, "the other one is not ready"
    told = [out.token_id for out in (*bench.outputs["a"], *result.tokens)]
    assert told == reference(submit("a", range(5)))[:2], "no token is lost at the boundary"


def test_the_header_of_a_masked_rank_counts_for_nothing() -> None:
    bench = Bench(limits(), ep_size=2)
    bench.comm.peer_rows = [[0] * 6]
    result = bench.step()
    assert result is not None
    assert result.idle


def test_a_peer_of_another_epoch_is_a_bug_that_is_caught() -> None:
    bench = Bench(limits(), ep_size=2)
    bench.comm.peer_rows = [peer_row(epoch=2)]
    with pytest.raises(AssertionError, match="epochs"):
        bench.engine.step()


@pytest.mark.parametrize("where", ["step", "schedule", "prefill", "commit"])
def test_an_injected_fault_leaves_the_engine_as_it_was(where: str) -> None:
    faults = FaultInjector()
    bench = Bench(limits(), faults=faults)
    faults.arm("raise", where=where)
    bench.accept(submit("a", range(5)))
    load = bench.engine.load()
    with pytest.raises(InjectedFault):
        bench.engine.step()
    assert bench.engine.load() == load
    assert bench.run() == {"a": reference(submit("a", range(5)))}


def test_logprobs_are_of_the_models_raw_distribution() -> None:
    request = submit("a", [3, 4], logprobs=2, **SEEDED)
    bench = Bench(limits())
    bench.accept(request)
    bench.run()
    tokens = [3, 4]
    for out in bench.outputs["a"]:
        assert out.logprobs == sampler.logprobs(bench.model.logits_after(tokens), out.token_id, 2)
        tokens.append(out.token_id)


@pytest.mark.parametrize("num_batched", [2, 8, 64])
@pytest.mark.parametrize("forecast", ["clear", "forward"])
def test_prompt_logprobs_come_once_and_whole_before_the_first_token(num_batched: int, forecast: str) -> None:
    mood = random.Random(2)
    bench = Bench(
        limits(max_num_batched_tokens=num_batched), lambda: forecast if mood.random() < 0.3 else "clear"
    )  # fmt: skip
    prompt = [7, 3, 3, 9, 2, 11, 4, 8, 1, 5, 6]
    bench.accept(submit("warm", prompt, max_tokens=1))
    bench.run()
    bench.accept(submit("other", range(9)), submit("a", prompt, max_tokens=3, prompt_logprobs=1))
    bench.run()
    told = [
        (p, [t.index for t in r.tokens if t.request_id == "a"]) for r in bench.results for p in r.prompt_logprobs
    ]  # fmt: skip
    assert [(p.request_id, indices) for p, indices in told] == [("a", [0])]
    assert told[0][0].entries == [
        sampler.logprobs(bench.model.logits_after(prompt[:i]), prompt[i], 1) for i in range(1, len(prompt))
    ]


def test_prompt_logprobs_survive_a_preemption_and_are_not_told_again_after_a_move() -> None:
    prompt = list(range(11, 18))
    requests = submit("a", range(7), max_tokens=9), submit("b", prompt, max_tokens=9, prompt_logprobs=0)
    bench = Bench(limits(num_blocks=4))
    assert outputs(*requests, bench=bench) == {r.request_id: reference(r) for r in requests}
    assert bench.engine.load().preemptions > 0
    assert [len(p.entries) for r in bench.results for p in r.prompt_logprobs] == [6]
    moved = Bench(limits())
    tokens = reference(requests[1])
    outputs(submit("b", prompt, max_tokens=9, prompt_logprobs=0, output_ids=tokens[:3]), bench=moved)
    assert [p for r in moved.results for p in r.prompt_logprobs] == []


def test_every_request_finishes_in_bounded_time_when_blocks_are_always_short() -> None:
    requests = [submit(f"r{i}", range(i, i + 7), max_tokens=12) for i in range(8)]
    bench = Bench(limits(num_blocks=5, max_num_batched_tokens=16))
    bench.accept(*requests)
    # The oldest gets on in at least every second step.
    assert bench.run(max_steps=2 * sum(7 + 12 for _ in requests)) == {r.request_id: reference(r) for r in requests}


EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 3), st.integers(1, 20), st.integers(1, 16), st.booleans()),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.sampled_from(["clear", "clear", "header", "forward"])),
    st.tuples(st.just("move"), st.integers(0, 30)),
    st.tuples(st.just("pause"), st.booleans()),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(EVENTS, max_size=60), st.integers(9, 30), st.integers(1, 24), st.integers(1, 6), st.booleans(),
    st.integers(0, 2**16),
)  # fmt: skip
def test_whatever_comes_goes_or_fails_every_text_is_right_and_no_block_is_lost(
    events: list[tuple[Any, ...]], num_blocks: int, budget: int, seqs: int, caching: bool, seed: int
) -> None:
    weather = {"today": "clear"}
    mood = random.Random(seed)
    bench = Bench(
        limits(num_blocks=num_blocks, max_num_batched_tokens=budget, max_num_seqs=seqs, prefix_caching=caching),
        lambda: weather["today"],
    )
    requests: dict[str, Submit] = {}
    aborted: set[str] = set()
    for event in events:
        match event:
            case ("submit", family, length, max_tokens, seeded):
                prompt = [(family * 5 + i // 2) % 23 for i in range(length)]  # prompts of a family share beginnings
                params = {**SEEDED, "seed": len(requests)} if seeded else {}
                request = submit(f"r{len(requests)}", prompt, max_tokens, **params)
                requests[request.request_id] = request
                bench.accept(request)
            case ("abort", which) if requests:
                name = f"r{which % len(requests)}"
                aborted.add(name)
                bench.accept(Abort(request_id=name))
            case ("move", which) if requests:
                name = f"r{which % len(requests)}"
                done = token_ids(bench.outputs.get(name, []))
                old = requests[name]
                if name not in aborted and len(done) < old.sampling.max_tokens:
                    requests[name] = Submit(request_id=name, attempt=old.attempt + 1, prompt_ids=old.prompt_ids,
                                            sampling=old.sampling, output_ids=done)  # fmt: skip
                    bench.accept(requests[name])
            case ("pause", on):
                bench.accept(Pause() if on else Resume())
            case ("step", today):
                weather["today"] = today
                bench.step()
    weather["today"] = "clear"
    bench.accept(Resume())
    bench.weather.reforecast(lambda: mood.choice(["clear", "clear", "forward", "header"]))
    bench.run(max_steps=20 * (2 + sum(len(r.prompt_ids) + r.sampling.max_tokens for r in requests.values())))
    for name, request in requests.items():
        whole = reference(Submit(request_id=name, attempt=0, prompt_ids=request.prompt_ids, sampling=request.sampling))
        told = [token for token in bench.outputs.get(name, []) if token.token_id >= 0]
        assert [token.index for token in told] == list(range(len(told)))
        if name in aborted:
            assert [token.token_id for token in told] == whole[: len(told)]
        else:
            assert [token.token_id for token in told] == whole
    assert bench.engine.load().kv_blocks_used == 0
    assert (bench.engine.load().running, bench.engine.load().waiting) == (0, 0)
