"""The checks of scripts/gpu_check as tests: on devices, or in Triton's interpreter where it is installed.

Decode times are no test: `scripts/gpu_check engine --only ladder,price,skew` measures them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import script

GPU_CHECK = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check"
ON_DEVICES = (
    "deep-ep", "deep-ep-fp8", "edges", "half", "half-in-place", "half-fast", "half-norm", "exchange-large",
    "exchange-bf16", "exchange-fp8", "exchange-fast", "exchange-large-fast", "four-exchange", "eight-exchange", "kill",
    "kill-unseen", "stop", "waits", "meet", "four-kill", "four-stop", "eight-kill",
)  # fmt: skip
ENGINE = ("attention", "experts", "experts-fp8", "sampler", "engine-one", "flights", "pair", "logits")
ENGINE_ON_DEVICES = (*ENGINE, "serve", "four", "kill64", "rejoin64", "rejoin64-large", "failures", "vault")
ENGINE_INTERPRETED = (*ENGINE, "price", "skew")
INTERPRETED = (
    "exchange-bf16", "exchange-fast", "exchange-fp8", "exchange-sizes", "three-ranks", "three-ranks-fast", "half",
    "half-in-place", "half-fast", "half-norm", "meet", "edges", "edges-relayed", "deep-ep", "deep-ep-fp8",
    "deep-ep-lists",
)  # fmt: skip


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(GPU_CHECK), *arguments], capture_output=True, text=True, env=environment, timeout=280
    )


def why_not_interpreted() -> str:
    """Empty when Triton's interpreter can run our kernels here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: the kernels cannot be interpreted"
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"Triton 3.6's interpreter needs numpy below 2.4 for loops, this is {np.__version__}"
    return ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("name", ON_DEVICES)
def test_ranks_on_devices_agree_with_the_dense_reference_and_outlive_each_other(name: str) -> None:
    done = gpu_check("--only", name, "--timeout", "120")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_agree_with_the_dense_reference(name: str) -> None:
    done = gpu_check("--interpret", "--only", name, "--timeout", "270")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("name", ENGINE_ON_DEVICES)
def test_the_engine_on_a_device_agrees_with_the_cpu_and_outlives_a_rank(name: str) -> None:
    done = gpu_check("engine", "--only", name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
@pytest.mark.parametrize("name", ENGINE_INTERPRETED)
def test_the_engines_interpreted_kernels_agree_with_plain_torch_and_transformers(name: str) -> None:
    done = gpu_check("engine", "--interpret", "--only", name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_machine_without_devices_is_told_that_nothing_was_checked() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for arguments in ([], ["engine"]):
        code, said = script(GPU_CHECK, *arguments)
        assert code == 0
        assert "skipped, this machine has no CUDA device" in said


def test_every_check_of_the_script_is_a_test_here() -> None:
    for arguments, names in (
        (["--list"], ON_DEVICES),
        (["--list", "--interpret"], INTERPRETED),
        (["engine", "--list", "--interpret"], ENGINE_INTERPRETED),
    ):
        code, said = script(GPU_CHECK, *arguments)
        assert (code, tuple(said.split())) == (0, names)
