"""The examples of programs that want only the communicator do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLES / example], capture_output=True, text=True, timeout=60, check=True)


def test_the_example_loses_one_rank_and_its_others_go_on_masked() -> None:
    done = run("communicator.py")
    said = re.findall(
        r"rank (\d), round (\d): (\d) tokens came, (\d) of 8 answers; Status\(lost=frozenset\((.*?)\)", done.stdout
    )
    rounds = {(int(rank), int(round_)): (int(came), int(answers), lost) for rank, round_, came, answers, lost in said}
    for rank in range(4):
        for round_ in range(6):
            if rank == 2 and round_ >= 3:
                assert (rank, round_) not in rounds, "the dead rank spoke"
            elif round_ < 3:
                assert rounds[rank, round_] == (8, 8, ""), (rank, round_)
            else:
                assert rounds[rank, round_] == (6, 6, "{2}"), (rank, round_)


def test_code_written_for_deepep_loses_one_rank_and_its_others_go_on_masked() -> None:
    came = {0: ([6, 6], [4, 4]), 1: ([3, 3], [2, 2]), 2: ([3, 3], None)}
    expected = set()
    for rank, (before, after) in came.items():
        doubled = 2.0 * (1 + rank)
        for round_ in range(4):
            if round_ < 2:
                expected.add(f"rank {rank}, round {round_}: came {before}, answers {[doubled] * 4}, mask [0, 0, 0]")
            elif after:
                answers = [doubled, doubled, 0.0, doubled]  # token 2 wanted both experts of the dead
                expected.add(f"rank {rank}, round {round_}: came {after}, answers {answers}, mask [0, 0, 1]")
    assert set(run("deep_ep.py").stdout.splitlines()) == expected
