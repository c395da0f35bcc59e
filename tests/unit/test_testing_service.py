"""What a service that was started by a program needs when the program itself is told to end."""

from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import signal, sys
from phalanx.testing.service import ends_on_sigterm
with ends_on_sigterm():
    try:
        print("started", flush=True)
        sys.stdin.read()
    finally:
        print("ended", flush=True)
"""


def test_a_program_that_is_asked_to_end_ends_what_it_started() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "started\n"
        program.send_signal(signal.SIGTERM)
        assert program.stdout.read() == "ended\n"
    assert program.returncode != 0
