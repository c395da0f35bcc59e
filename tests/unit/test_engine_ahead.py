"""Batches made while the step before them runs: used only when they are what would have been planned."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property

import numpy as np
import pytest
from engine_doubles import Bench, limits, reference, submit

from phalanx.engine import device_sampler
from phalanx.engine.batch import StepBatch, build
from phalanx.engine.runner import Ran, Runner, nothing
from phalanx.messages import Abort, Submit
from phalanx.model import device_tables
from phalanx.model.device_tables import TableShape

SHAPE = TableShape(
    rows=8, sequences=8, max_blocks=16, block_size=4, split=16, tile=4, alike=False, spare_block=1000
)  # fmt: skip


class BusyDevice(Runner):
    """A runner that lays out the next batch while it works, and compares it with one made from what is committed."""

    bench: Bench
    used = made = 0
    following: StepBatch | None = None

    @cached_property
    def ahead(self) -> list[bool]:
        """Of each run, whether its batch was made ahead."""
        return []

    def run(self, batch: StepBatch, ahead: Callable[[], StepBatch | None] = nothing) -> Ran:
        made_ahead = batch is self.following
        self.ahead.append(made_ahead)
        if made_ahead:
            self.used += 1
            self._compare(batch)
        ran = super().run(batch)
        self.following = ahead()
        if self.following is not None:
            self.made += 1
            self.tables = _tables(self.following, later=1)
        return ran

    def _compare(self, batch: StepBatch) -> None:
        anew = build(self.bench.engine.next_plan())
        assert batch.samples == anew.samples
        assert batch.forward.token_ids_T.tolist() == anew.forward.token_ids_T.tolist()
        words, told = self.tables
        device_tables.write_tokens(words, SHAPE, batch.forward)
        want_words, want_told = _tables(anew, later=0)
        assert np.array_equal(words, want_words)
        assert np.array_equal(told, want_told)


def _tables(batch: StepBatch, later: int) -> tuple[device_tables.Words, device_sampler.Words]:
    words = np.zeros(SHAPE.size, np.int32)
    device_tables.write(words, SHAPE, batch.forward, SHAPE.rows)
    told = np.zeros(device_sampler.offsets(SHAPE.rows)["end"], np.int32)
    device_sampler.write(told, SHAPE.rows, batch.samples, later=later)
    return words, told


def busy(forecast: Callable[[], str] = lambda: "clear", **changes: int) -> tuple[Bench, BusyDevice]:
    bench = Bench(limits(**changes), forecast, runner=BusyDevice)
    assert isinstance(bench.runner, BusyDevice)
    bench.runner.bench = bench
    return bench, bench.runner


def test_decodes_that_go_on_are_all_made_ahead() -> None:
    bench, device = busy(num_blocks=40)
    asked = [submit(name, [i, 2], max_tokens=20, temperature=0.8, seed=i) for i, name in enumerate("abc")]
    bench.accept(*asked)
    assert bench.run() == {each.request_id: reference(each) for each in asked}
    assert device.used == 19


def test_a_request_that_comes_is_let_in_at_once_although_a_batch_was_ready() -> None:
    bench, device = busy(num_blocks=40)
    bench.accept(submit("a", [1, 2], max_tokens=30))
    for _ in range(4):
        bench.step()
    used = device.used
    bench.accept(submit("b", [3], max_tokens=2))
    result = bench.step()
    assert result is not None
    assert {token.request_id for token in result.tokens} == {"a", "b"}
    assert device.used == used


def test_a_step_that_fails_leaves_no_batch_behind() -> None:
    weather = iter(["clear"] * 5 + ["forward", "header", "forward"])
    bench, device = busy(lambda: next(weather, "clear"), num_blocks=40)
    asked = submit("a", [1, 2], max_tokens=20)
    bench.accept(asked)
    assert bench.run() == {"a": reference(asked)}
    assert bench.weather.failures == 3
    assert device.ahead[4:9] == [True, True, False, False, True], "of the fifth step, two that fail, and two more"


@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_and_goes_a_batch_made_ahead_is_the_one_that_would_be_planned(seed: int) -> None:
    chance = random.Random(seed)
    bench, device = busy(lambda: "forward" if chance.random() < 0.03 else "clear", num_blocks=14)
    asked: dict[str, Submit] = {}
    aborted: set[str] = set()
    for number in range(200):
        if chance.random() < 0.08:
            one = submit(
                f"r{number}", [chance.randrange(3) for _ in range(chance.randint(1, 14))], chance.randint(1, 20),
                ignore_eos=chance.random() < 0.7, temperature=chance.choice([0.0, 0.9]), seed=number,
            )  # fmt: skip
            asked[one.request_id] = one
            bench.accept(one)
        if asked and chance.random() < 0.03:
            name = chance.choice(list(asked))
            aborted.add(name)
            bench.accept(Abort(name))
        bench.step()
    outputs = bench.run()
    assert {name: outputs.get(name) for name in asked.keys() - aborted} == {
        name: reference(asked[name]) for name in asked.keys() - aborted
    }
    assert 0 < device.used <= device.made
