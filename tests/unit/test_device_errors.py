"""What errors of a CUDA device are called, and that a process which met one waits for nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from phalanx.comm.peer_memory import PeerMemoryError
from phalanx.config import ServeConfig
from phalanx.device_errors import said_of_device
from phalanx.moe.cuda import DeviceMemoryShort
from phalanx.process import EXIT_FAILED, WorkerSpec, last_words
from phalanx.testing.faults import Fault, FaultInjector

TORCH = """CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/cuda-runtime-api/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1"""
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 279.44 GiB. GPU 1 has a total capacity of 139.72 GiB of which 90.11 GiB is "
    "free. Including non-PyTorch memory, this process has 49.60 GiB memory in use."
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TORCH, "illegal memory access"),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "illegal memory access"),
        ("CUDA error: cudaErrorIllegalAddress in the copy of an expert to the device", "illegal memory access"),
        ("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`", "device-side assert"),
        (OUT_OF_MEMORY, "out of memory (279.44 GiB asked for)"),
        ("CUDA error: out of memory\nmore", "out of memory"),
        ("CUDA error: unspecified launch failure\nmore", "CUDA error (unspecified launch failure)"),
        ("Triton Error [CUDA]: misaligned address", "CUDA error (misaligned address)"),
        ("cudaMalloc failed: cudaErrorECCUncorrectable", "CUDA error (cudaErrorECCUncorrectable)"),
    ],
)
def test_an_error_of_a_device_is_named_in_a_few_words_on_one_line(text: str, said: str) -> None:
    assert said_of_device(RuntimeError(text)) == f"{said} on the device, found in no code of ours"


def test_an_error_of_a_device_says_where_the_host_found_out() -> None:
    def fail(kind: str) -> None:
        raise RuntimeError(TORCH)

    with pytest.raises(RuntimeError) as caught:
        FaultInjector(Fault("illegal-access", "decode"), on_device=fail).point("decode")
    assert re.fullmatch(
        r"illegal memory access on the device, found in testing/faults\.py:\d+ \(\w+\)", said_of_device(caught.value)
    )


def test_what_an_error_was_caused_by_counts_too() -> None:
    error = RuntimeError("the step failed")
    error.__cause__ = RuntimeError(TORCH)
    assert said_of_device(error).startswith("illegal memory access")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("CUDA is a word"), KeyError("cuda:0")])
def test_other_errors_are_none_of_a_device(error: Exception) -> None:
    assert said_of_device(error) == ""


@pytest.mark.parametrize("kind", [DeviceMemoryShort, PeerMemoryError])
def test_an_error_that_says_itself_what_to_do_is_left_as_it_is(kind: type[Exception]) -> None:
    error = kind("lower --slots-per-rank")
    error.__cause__ = RuntimeError(OUT_OF_MEMORY)
    assert said_of_device(error) == ""


PROGRAM = """
import atexit, time
from phalanx.device_errors import leave_at_once

class Held:
    def __del__(self):
        time.sleep(3600)

def fail():
    held = Held()
    raise RuntimeError("CUDA error")

atexit.register(time.sleep, 3600)
try:
    fail()
except RuntimeError as error:
    print("last words")
    leave_at_once(3)
"""


def test_a_process_that_leaves_at_once_waits_for_no_destructor_and_no_exit_handler() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "last words\n", "")


WORKER = """
import atexit, sys, time
import msgspec
from phalanx import worker
from phalanx.process import WorkerSpec

atexit.register(time.sleep, 3600)
worker.run(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WorkerSpec))
raise SystemExit("it came back")
"""


def test_a_worker_on_a_device_that_fails_says_why_and_is_gone(tmp_path: Path) -> None:
    spec = WorkerSpec(
        config=ServeConfig(model="m", device="cuda", enable_chaos=True), rank=1, incarnation=2, run_dir=str(tmp_path),
        store_host="", store_port=0, notices="", launcher_pid=0, model=b"", faults="raise@start",
    )  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", WORKER], input=msgspec.msgpack.encode(spec), capture_output=True, timeout=120
    )
    assert ended.returncode == EXIT_FAILED, ended.stderr.decode()
    assert b"it came back" not in ended.stderr
    words = Path(last_words(str(tmp_path), 1, 2)).read_text()
    assert words == "InjectedFault: injected at start in step 0"
