"""A newcomer takes its first steps for nobody: all the way of a request, whatever its limits allow."""

from __future__ import annotations

import pytest
from engine_doubles import Bench, Device, limits, reference, submit

from phalanx.engine.rehearsal import rehearse
from phalanx.engine.runner import Runner
from phalanx.engine.scheduler import Limits


@pytest.mark.parametrize("runner", [Runner, Device])
def test_a_rehearsal_prefills_and_decodes_and_leaves_no_trace_in_what_is_served_then(runner: type[Runner]) -> None:
    bench = Bench(limits(), runner=runner)
    assert rehearse(bench.limits, bench.runner, bench.comm) > 6
    if isinstance(bench.runner, Device):
        assert not bench.runner.queue
        assert any(bench.runner.launches), "no step was launched behind another one"
    requests = [submit(name, [0] * 16, max_tokens=9) for name in "abcd"]  # the same prompts
    bench.accept(*requests)
    assert bench.run() == {request.request_id: reference(request) for request in requests}


@pytest.mark.parametrize(
    "tight",
    [
        limits(max_model_len=2),
        limits(max_model_len=1),
        limits(num_blocks=1),
        limits(num_blocks=1, block_size=1),
        limits(max_num_seqs=1, max_num_batched_tokens=1),
    ],
)
def test_a_rehearsal_fits_into_the_tightest_limits(tight: Limits) -> None:
    bench = Bench(tight)
    rehearse(tight, bench.runner, bench.comm)
    assert not bench.engine.has_work


def test_a_step_says_what_it_spent_its_time_on() -> None:
    bench = Bench(limits(), runner=Device)
    bench.accept(submit("a", [1, 2], max_tokens=6))
    bench.run()
    first = bench.results[0].seconds
    assert min(first.meet, first.launch, first.meet_next, first.launch_next, first.wait, first.commit) > 0
    later = bench.results[1].seconds
    assert later.meet == later.launch == 0, "it was launched by the call before"
    assert later.wait > 0
