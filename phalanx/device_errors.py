"""What an error of a CUDA device is called, and how a process ends that has met one.

After most of them the process's CUDA context is of no use: every later call fails with the same error, and what tidies
up (destructors of graphs and tensors, exit handlers) may complain at length, or wait for a device that never answers.
So nothing is tidied up: the process says what happened in one line and is gone, and the system takes its context down.

Errors are known by what they say, so this imports no torch and works for torch, Triton and cuda-bindings alike.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import PurePath
from typing import NoReturn

from phalanx.errors import PhalanxError

_NAMED = (
    ("illegal memory access", re.compile(r"illegal memory access|ErrorIllegalAddress|ERROR_ILLEGAL_ADDRESS")),
    ("device-side assert", re.compile(r"device-side assert|cudaErrorAssert|CUDA_ERROR_ASSERT")),
    (
        "out of memory",
        re.compile(r"CUDA out of memory|CUDA error: out of memory|ErrorMemoryAllocation|ERROR_OUT_OF_MEM"),
    ),
)
_OTHER = re.compile(
    r"CUDA error: (?P<cuda>[^\n]+)|Triton Error \[CUDA\]: (?P<triton>[^\n]+)|(?P<name>cudaError[A-Z]\w+)"
)
_TRIED = re.compile(r"Tried to allocate (?P<size>[\d.]+ \w+)\.")
_PACKAGE = str(PurePath(__file__).parent)


def said_of_device(error: BaseException) -> str:
    """What happened on the device, in a few words; "" when this is no error of a device, or one of our own that says
    what to do about it. LOCAL.

    Kernels run behind the host, so the place that it names is the one where the host found out."""
    if isinstance(error, PhalanxError):
        return ""
    found: BaseException | None = error
    while found is not None and not (what := _what(str(found))):
        found = found.__cause__
    if found is None:
        return ""
    return f"{what} on the device, found in {_where(found) or _where(error) or 'no code of ours'}"


def leave_at_once(code: int) -> NoReturn:
    """End this process with an exit code. Nothing is unwound and nothing tidied up, so nothing waits for a device.
    LOCAL."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _what(text: str) -> str:
    for name, pattern in _NAMED:
        if pattern.search(text):
            tried = _TRIED.search(text)
            return f"{name} ({tried['size']} asked for)" if tried else name
    other = _OTHER.search(text)
    return next(f"CUDA error ({words.strip()})" for words in other.groups() if words) if other else ""


def _where(error: BaseException) -> str:
    """The innermost line of ours that an error passed, as FILE:LINE (FUNCTION)."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_PACKAGE + os.sep):
            return f"{PurePath(frame.filename).relative_to(_PACKAGE)}:{frame.lineno} ({frame.name})"
    return ""
