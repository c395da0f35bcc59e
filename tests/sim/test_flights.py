"""Engines whose devices run a step while their hosts launch the next one: every stream is right whoever fails when."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from engine_doubles import submit
from sim_flights import Fleet, at_random, launches

TRIALS = int(os.environ.get("PHALANX_SIM_TRIALS", "48"))
FIRST_SEED = int(os.environ.get("PHALANX_SIM_SEED", "0"))
SHARDS = 4


@dataclass
class Tally:
    flights: int = 0
    failures: int = 0
    boundaries: int = 0
    epochs: int = 0


def trial(seed: int, tally: Tally) -> None:
    fleet = Fleet(seed)
    sim, rng = fleet.sim, fleet.sim.rng
    fleet.due = rng.randint(3, 10)
    for number in range(fleet.due):
        request = submit(
            f"r{number}", [rng.randrange(3) for _ in range(rng.randint(1, 12))], rng.randint(1, 24),
            temperature=rng.choice([0.0, 0.9]), seed=number, ignore_eos=rng.random() < 0.6,
            presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
        )  # fmt: skip
        sim.after(0.02 * rng.random() if number else 0.0, lambda request=request: fleet.submit(request))

    def freeze() -> None:
        """One task alone: a host whose device runs on, or a device whose host waits for it."""
        sim.freeze(rng.choice(rng.choice(fleet.ranks).tasks), rng.choice([0.004, 0.05]))

    def strike() -> None:
        alive = [rank for rank in fleet.ranks if rank.alive]
        if len(alive) > 1:
            fleet.kill(rng.choice(alive))

    def abort() -> None:
        if running := sorted(fleet.requests.keys() - fleet.over - fleet.aborted):
            fleet.abort(rng.choice(running))

    def propose() -> None:
        fleet.wanted = max(rank.epoch for rank in fleet.ranks) + 1

    at_random(fleet, rng.randint(0, 3), 0.06, freeze)
    at_random(fleet, rng.choice([0, 0, 1, 1, 2]), 0.06, strike)
    at_random(fleet, rng.randint(0, 2), 0.05, abort)
    at_random(fleet, rng.randint(0, 2), 0.06, propose)
    sim.run()
    fleet.check()
    tally.flights += launches(fleet.ranks)
    tally.failures += fleet.failures
    tally.boundaries += sum(rank.boundaries for rank in fleet.ranks)
    tally.epochs += len(fleet.views)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_streams_are_exact_whichever_host_or_device_stops_or_dies_in_whichever_flight(shard: int) -> None:
    tally = Tally()
    for seed in range(FIRST_SEED + shard, FIRST_SEED + TRIALS, SHARDS):
        try:
            trial(seed, tally)
        except BaseException as error:
            error.add_note(f"PHALANX_SIM_SEED={seed} PHALANX_SIM_TRIALS=1 shows it alone")
            raise
    print(tally)
    if TRIALS >= 40:
        assert tally.flights > 10 * tally.epochs
        assert tally.failures > tally.epochs / 4, "the trials must be about failures"
        assert tally.boundaries, "some trials must be about boundaries"
