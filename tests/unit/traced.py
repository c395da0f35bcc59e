"""A process under a debugger that says nothing: while that is attached, the process's end is the debugger's to hear."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ATTACH = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
PTRACE_SEIZE = 0x4206
print(ctypes.get_errno() if libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None) else 0, flush=True)
sys.stdin.read()
"""


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """The process is traced within the block. Skips the test where nobody may do that."""
    command = [sys.executable, "-c", ATTACH, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as debugger:
        assert debugger.stdin is not None
        assert debugger.stdout is not None
        try:
            if (error := int(debugger.stdout.readline())) != 0:
                pytest.skip(f"no process may be traced here (error {error})")
            yield
        finally:
            debugger.stdin.close()
