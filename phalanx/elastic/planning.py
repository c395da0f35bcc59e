"""Planning beside the service: in a process of its own, at the lowest priority, so that no step waits for a plan.

A thread would not do: a plan takes tens of milliseconds of Python and numpy, and the rank that plans would hold up
every other one whenever its engine wants the interpreter back.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import suppress
from typing import Protocol

import msgspec

from phalanx.elastic.rounds import Outcome, Problem, solve
from phalanx.process import die_with_parent

log = logging.getLogger("phalanx.planning")

_CHILD = """
import os, sys
os.nice(19)
from phalanx.process import PLANNER, call_myself
call_myself(PLANNER)
from phalanx.elastic.planning import main
main(*map(int, sys.argv[1:]))
"""
"""The child steps back before it imports anything, and takes a name of its own. Its launcher buries it if need be."""


class Planner(Protocol):
    """Somebody who plans while others serve. One problem at a time."""

    def start(self, problem: Problem) -> None:
        """Begin, and forget what was begun before. Does not wait. LOCAL."""

    def poll(self) -> Outcome | None:
        """The outcome once it is there, and only once. Does not wait. LOCAL."""

    def cancel(self) -> None:
        """The problem is no longer of interest. LOCAL."""


class PlanHere:
    """Plans at once, where it stands: for simulations."""

    def __init__(self) -> None:
        self._outcome: Outcome | None = None

    def start(self, problem: Problem) -> None:
        self._outcome = solve(problem)

    def poll(self) -> Outcome | None:
        outcome, self._outcome = self._outcome, None
        return outcome

    def cancel(self) -> None:
        self._outcome = None


class PlanProcess:
    """Plans in a child process that lives for one plan. Problem and outcome travel in memory files: nobody waits for a
    pipe. A child that fails leaves the service as it is."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._answer = -1

    def start(self, problem: Problem) -> None:
        self.cancel()
        question, self._answer = (os.memfd_create(f"phalanx-{name}", os.MFD_CLOEXEC) for name in ("problem", "plan"))
        os.pwrite(question, msgspec.msgpack.encode(problem), 0)
        names = [str(number) for number in (question, self._answer, os.getpid())]
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *names], pass_fds=(question, self._answer),
            stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        os.close(question)

    def poll(self) -> Outcome | None:
        if self._child is None or (code := self._child.poll()) is None:
            return None
        answer = os.pread(self._answer, os.fstat(self._answer).st_size, 0)
        self._close()
        if code != 0:
            log.warning("planning failed (exit code %d): the placement stays as it is", code)
            return Outcome()
        return msgspec.msgpack.decode(answer, type=Outcome)

    def wait(self, timeout_s: float) -> None:
        """Until the outcome is there, or the time is over. LOCAL, blocks."""
        if self._child is not None:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout_s)

    def cancel(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._close()

    def _close(self) -> None:
        os.close(self._answer)
        self._child, self._answer = None, -1


def main(question: int, answer: int, parent: int) -> None:
    """The child's whole life: read, plan, write. LOCAL."""
    die_with_parent(parent)
    problem = msgspec.msgpack.decode(os.pread(question, os.fstat(question).st_size, 0), type=Problem)
    os.pwrite(answer, msgspec.msgpack.encode(solve(problem)), 0)
