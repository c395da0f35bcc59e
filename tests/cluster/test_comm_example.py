"""The example of a program that wants only the communicator does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

EXAMPLE = Path(__file__).parents[2] / "examples" / "communicator.py"


def test_the_example_loses_one_rank_and_its_others_go_on_masked() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=60, check=True)
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
