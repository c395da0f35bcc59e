"""A child process for a test that needs one, and nothing that the test has not imported already."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 120.0


def in_a_fork(work: Callable[[], T]) -> T:
    """What `work` returns in a fork of this process; AssertionError when it does not return."""
    ours, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_work, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE_S), "the child does not answer"
        result: T = ours.recv()
    except EOFError:
        raise AssertionError("the child died") from None
    finally:
        ours.close()
        process.kill()
        process.join()
    return result


def _work(work: Callable[[], T], out: Connection) -> None:
    out.send(work())


def script(path: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and the standard output of a Python script that is run in a fork of this process."""

    def run() -> tuple[int, str]:
        said, sys.argv, code = io.StringIO(), [str(path), *arguments], 0
        os.environ["OMP_NUM_THREADS"] = "1"
        with contextlib.redirect_stdout(said):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return code, said.getvalue()

    return in_a_fork(run)
