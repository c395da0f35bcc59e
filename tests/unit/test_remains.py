"""What the dead leave behind is cleared away, and nothing that somebody still needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from traced import traced

from phalanx.endings import has_ended, wait_status
from phalanx.process import last_words, worker_endpoint
from phalanx.remains import reap_strangers, remove_files, stale_keys

KEYS = {
    "world/1": False, "world/9": False, "latest": False, "joiners": False, "coming/2": False,
    "entry/7/1.0": True, "entry/8/1.0": False, "entry/10/1.0": False,
    "ahead/7/1.0": True, "ahead/11/1.0": False, "standing/7/1.2": True, "standing/10/1.2": False,
    "plan/7/0.0": True, "plan/8/0.0": False, "open/7": True, "open/11": False,
    "balance/3/load/1.0": True, "balance/10/plan/4": False,
    "wish/2.3": True, "wish/2.4": False, "wish/2.5": False, "wish/1.0": False,
    "digests/2.2": True, "digests/2.3": False, "digests/2.4": False, "digests/1.0": False,
    "somebody/else/7": False,
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_old_epochs_and_of_dead_identities_are_stale(key: str) -> None:
    assert bool(stale_keys([key], epoch=10, newest={0: 0, 1: 0, 2: 4})) == KEYS[key]


def ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.returncode = 0  # subprocess is not to wait for it
    return process.pid


def test_strangers_are_waited_for_and_known_ones_are_not() -> None:
    stranger, known = ended(), ended()
    reap_strangers({known})
    reap_strangers(set())
    for pid in (stranger, known):
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    known = ended()
    reap_strangers({known})
    assert os.waitpid(known, 0) == (known, 0)
    reap_strangers(set())  # nobody is left


def test_a_child_that_a_debugger_holds_makes_nobody_wait_and_is_waited_for_when_that_lets_go() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        assert not has_ended(pidfd)
        with traced(process.pid):
            process.kill()
            assert has_ended(pidfd, 60)
            assert wait_status(process.pid) is None
        reap_strangers(set())
        assert wait_status(process.pid) is None, "it was waited for"
        os.close(pidfd)
        process.returncode = -signal.SIGKILL


def test_the_end_of_a_child_is_told_once() -> None:
    pid = ended()
    assert [wait_status(pid), wait_status(pid)] == [0, None]


def test_the_files_of_a_worker_go_and_those_of_its_successor_stay(tmp_path: Path) -> None:
    run_dir = str(tmp_path)
    for incarnation in (0, 1):
        Path(worker_endpoint(run_dir, 2, incarnation).removeprefix("ipc://")).touch()
        Path(last_words(run_dir, 2, incarnation)).touch()
    remove_files(run_dir, 2, 0)
    remove_files(run_dir, 2, 0)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"worker-2-1.sock", "worker-2-1.error"}
