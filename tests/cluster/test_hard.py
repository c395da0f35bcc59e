"""Hard ends: whatever is killed, and whenever, nothing is left behind and nobody is shown a traceback."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster


def children(pid: int) -> dict[int, str]:
    """The living children of a process and their command lines."""
    found: dict[int, str] = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def child(pid: int, name: str, timeout_s: float = 60) -> int:
    """The child whose command line holds `name`, as soon as there is one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for number, command in children(pid).items():
            if name in command:
                return number
        os.sched_yield()
    raise TimeoutError(f"process {pid} has no child {name}")


def ended(pidfd: int, timeout_s: float = 60) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


@pytest.fixture
def starting(tiny: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A service of two ranks that was told to start a moment ago; its temporary files lie in tmp_path."""
    command = [sys.executable, "-m", "phalanx", "serve", str(tiny), "--port", "0", "--ep-size", "2"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("moment", ["phalanx.server", "phalanx.nursery"])
def test_a_launcher_killed_while_it_starts_leaves_nothing_behind(
    starting: subprocess.Popen[str], tmp_path: Path, moment: str
) -> None:
    server = os.pidfd_open(child(starting.pid, "phalanx.server"))
    child(starting.pid, moment)
    starting.kill()
    try:
        assert ended(server)
    except BaseException:
        signal.pidfd_send_signal(server, signal.SIGKILL)
        raise
    finally:
        os.close(server)
    assert list(tmp_path.glob("phalanx-*")) == []


def test_ctrl_c_while_it_starts_ends_it_without_a_traceback(starting: subprocess.Popen[str], tmp_path: Path) -> None:
    child(starting.pid, "phalanx.nursery")
    os.killpg(starting.pid, signal.SIGINT)
    output, _ = starting.communicate(timeout=60)
    assert starting.returncode == 0, output
    assert "Traceback" not in output
    assert list(tmp_path.glob("phalanx-*")) == []
