"""Thousands of deaths at random points. More: PHALANX_SIM_TRIALS=2000 PHALANX_SIM_SEED=7 pytest tests/sim"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from sim_chaos import Tally, Trial

TRIALS = int(os.environ.get("PHALANX_SIM_TRIALS", "200"))
FIRST_SEED = int(os.environ.get("PHALANX_SIM_SEED", "0"))
SHARDS = 8


@pytest.mark.parametrize("shard", range(SHARDS))
def test_streams_are_exact_and_nobody_is_evicted_wrongly_whoever_dies_wherever(shard: int) -> None:
    tally = Tally()
    for seed in range(FIRST_SEED + shard, FIRST_SEED + TRIALS, SHARDS):
        try:
            Trial(seed, tally).run()
        except BaseException as error:
            error.add_note(f"PHALANX_SIM_SEED={seed} PHALANX_SIM_TRIALS=1 shows it alone")
            raise
    print(tally)
    if TRIALS >= 100:
        assert tally.deaths > tally.trials, "the trials must be about deaths"
        assert tally.left + tally.scaled_up > 3, "some trials must be about ranks that leave or are added"
        assert tally.cannot_serve, "some trials must be about ranks that are too few"
        for kind in ("kill", "freeze short", "freeze long"):
            assert tally.kinds[kind], f"no trial had a {kind}"


def test_the_same_seed_tells_the_same_story() -> None:
    stories = []
    for _ in range(2):
        trial = Trial(3, Tally())
        trial.run()
        stories.append((trial.sim.time_s, Counter(str(m) for m, _ in trial.cluster.adoptions)))
    assert stories[0] == stories[1]
