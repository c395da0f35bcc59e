"""The public fault injector: what is armed happens at its point, in its step, once, and only with chaos enabled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from phalanx.errors import BadConfig
from phalanx.testing.faults import (
    DEVICE_KINDS,
    NO_FAULTS,
    POINTS,
    Fault,
    FaultInjector,
    InjectedFault,
    armed,
    from_environment,
)


def test_an_unarmed_injector_passes_every_point() -> None:
    faults = FaultInjector()
    for name in POINTS:
        faults.point(name)
        NO_FAULTS.point(name, step=3)


def test_a_fault_happens_at_its_point_and_only_once() -> None:
    faults = FaultInjector()
    faults.arm("raise", where="commit")
    faults.point("step", step=1)
    faults.point("dispatch")
    with pytest.raises(InjectedFault, match="commit in step 1"):
        faults.point("commit")
    faults.point("commit")
    assert faults.planned == ()


def test_a_fault_waits_for_its_step_also_at_points_that_know_no_step() -> None:
    faults = FaultInjector()
    faults.arm("raise", at_step=5, where="combine")
    for step in (3, 4):
        faults.point("step", step=step)
        faults.point("combine")
    faults.point("step", step=5)
    with pytest.raises(InjectedFault, match="combine in step 5"):
        faults.point("combine")


def test_a_step_that_is_already_past_means_the_next_pass() -> None:
    faults = FaultInjector()
    faults.point("step", step=90)
    faults.arm("raise", at_step=5)
    with pytest.raises(InjectedFault):
        faults.point("step", step=91)


def test_a_count_of_three_lets_two_passes_go() -> None:
    faults = FaultInjector()
    faults.arm("raise", where="restore", count=3)
    faults.point("restore")
    faults.point("restore")
    with pytest.raises(InjectedFault):
        faults.point("restore")


def test_two_faults_at_one_point_happen_one_after_the_other() -> None:
    faults = FaultInjector(Fault("raise", "step"), Fault("raise", "step"))
    for _ in range(2):
        with pytest.raises(InjectedFault):
            faults.point("step", step=0)
    faults.point("step", step=0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"kind": "explode"}, ("explode", "kill")),
        ({"kind": "kill", "where": "lunch"}, ("lunch", "restore")),
        ({"kind": "kill", "count": 0}, ("count", "0")),
    ],
)
def test_what_cannot_be_armed_is_refused_by_name(arguments: dict[str, object], names: tuple[str, ...]) -> None:
    with pytest.raises(BadConfig) as error:
        FaultInjector().arm(**arguments)  # type: ignore[arg-type]
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_a_device_fails_in_the_way_that_was_asked_for_at_its_point(kind: str) -> None:
    seen: list[str] = []
    faults = FaultInjector(on_device=seen.append)
    faults.arm(kind, at_step=2, where="decode")  # type: ignore[arg-type]
    faults.point("step", 1)
    faults.point("decode")
    assert seen == []
    faults.point("step", 2)
    faults.point("decode")
    faults.point("decode")
    assert seen == [kind]


def test_a_process_without_a_device_cannot_have_it_fail() -> None:
    with pytest.raises(BadConfig, match="hung-kernel needs --device cuda"):
        FaultInjector(Fault("hung-kernel")).point("step", 1)


@pytest.mark.parametrize("where", ["start", "vault_fill"])
def test_a_failure_of_a_device_is_refused_where_none_is_in_hand(where: str) -> None:
    with pytest.raises(BadConfig, match=f"at {where} none is in hand"):
        Fault("illegal-access", where)


@pytest.mark.parametrize(
    ("text", "device", "said"),
    [
        ("hung-kernel:rank=1", "cpu", "PHALANX_FAULTS: hung-kernel is a failure of a CUDA device, .* --device cpu"),
        ("kill@combine", "cuda", "PHALANX_FAULTS: combine lies within a kernel .* choose decode, prefill or commit"),
    ],
)
def test_an_environment_that_asks_for_what_cannot_happen_is_refused(text: str, device: str, said: str) -> None:
    assert from_environment({"PHALANX_FAULTS": text}) == text
    with pytest.raises(BadConfig, match=said):
        from_environment({"PHALANX_FAULTS": text}, device=device)


def test_production_cannot_be_armed() -> None:
    with pytest.raises(BadConfig, match="--enable-chaos"):
        NO_FAULTS.arm("kill")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("kill", (Fault("kill"),)),
        ("kill@restore:rank=1:n=2", (Fault("kill", "restore", None, 2),)),
        ("kill@restore:rank=2", ()),
        ("stop@dispatch:step=7, raise@commit:rank=1:incarnation=3", (Fault("stop", "dispatch", 7),)),
        ("raise@join:incarnation=0", (Fault("raise", "join"),)),
        ('{"kind": "kill", "where": "publish", "rank": 1, "at_step": 4}', (Fault("kill", "publish", 4),)),
        ('[{"kind": "kill"}, {"kind": "stop", "rank": 0}]', (Fault("kill"),)),
    ],
)
def test_a_starting_process_is_armed_by_its_environment(text: str, expected: tuple[Fault, ...]) -> None:
    assert armed(from_environment({"PHALANX_FAULTS": text}), rank=1, incarnation=0).planned == expected


def test_an_environment_without_faults_plans_nothing() -> None:
    assert from_environment({}) == ""
    assert armed("", rank=0, incarnation=0).planned == ()


@pytest.mark.parametrize(
    "text",
    [
        "kill@lunch",
        "explode",
        "kill:rank=one",
        "kill:colour=2",
        "kill:n=0",
        "[1]",
        "{",
        '{"kind": "kill", "colour": 2}',
        '{"kind": ["kill"]}',
        '{"kind": "kill", "where": 3}',
        '{"kind": "kill", "rank": "1"}',
        '{"kind": "kill", "at_step": "3"}',
        '{"kind": "kill", "at_step": true}',
        '{"kind": "kill", "count": null}',
    ],
)
def test_an_unreadable_environment_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(BadConfig, match=r"^PHALANX_FAULTS: "):
        from_environment({"PHALANX_FAULTS": text})


def test_an_environment_that_names_a_rank_which_the_service_never_has_is_refused() -> None:
    environ = {"PHALANX_FAULTS": "kill:rank=1, kill:rank=4"}
    assert from_environment(environ, places=5) == environ["PHALANX_FAULTS"]
    with pytest.raises(BadConfig, match="PHALANX_FAULTS: there is no rank 4: this service has 4 places"):
        from_environment(environ, places=4)


PROGRAM = """
import sys
from phalanx.testing.faults import FaultInjector
faults = FaultInjector()
faults.arm(sys.argv[1], at_step=2)
for step in range(4):
    faults.point("step", step=step)
    print(step, flush=True)
"""


def test_kill_ends_the_process_by_sigkill_at_its_step() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, "kill"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.split() == ["0", "1"]


def test_stop_stops_the_process_until_it_is_continued() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "stop"], stdout=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.kill(process.pid, signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output.split() == ["0", "1", "2", "3"]
    finally:
        process.kill()
        process.wait()


def test_importing_the_injector_imports_nothing_heavy() -> None:
    program = "import sys, phalanx.testing.faults; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in modules if name.startswith("phalanx")}
    assert ours == {"phalanx", "phalanx.errors", "phalanx.testing", "phalanx.testing.faults"}
    assert not {"torch", "numpy", "msgspec"} & set(modules)
