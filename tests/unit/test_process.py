"""What every process of a service does for itself."""

from __future__ import annotations

import subprocess
import sys

from phalanx.process import EXIT_FAILED

CHILD = "import sys; from phalanx.process import die_with_parent; die_with_parent(int(sys.argv[1]), 3600)"


def test_a_child_whose_parent_was_gone_before_they_met_ends_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)
    assert subprocess.run([sys.executable, "-c", CHILD, str(gone.pid)], timeout=60).returncode == EXIT_FAILED
