"""The tools against a real service: the demo, the recovery benchmark, chaos and status, as an operator runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import becomes, states

from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"
SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, check=False)


def test_the_demo_ends_well_on_any_model(tiny: Path) -> None:
    ended = run(
        str(DEMO), "--model", str(tiny), "--ep-size", "3", "--chats", "3", "--kill-rank", "1", "--max-tokens", "120"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SIGKILL to rank 1" in ended.stdout
    assert ended.stdout.count("the same │") == 3
    assert "2 ranks go on answering" in ended.stdout


def test_the_demo_fails_when_the_service_cannot_come_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ended = run(str(DEMO), "--model", str(tmp_path), "--ep-size", "2")
    assert ended.returncode == 1
    assert "demo: " in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_bench_recovery_starts_a_service_kills_a_rank_and_compares(tiny: Path) -> None:
    ended = run(
        "-m", "phalanx", "bench", "recovery", str(tiny), "--ep-size", "2", "--rounds", "1", "--ranks", "1",
        "--streams", "4", "--output-len", "128", "--share", "0.1", "--json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(ended.stdout)
    assert (figures["failed"], figures["different"], figures["requests"]) == (0, 0, 4)
    assert figures["compared_by"] == "token ids"
    assert figures["kill_to_next_token_s"]["n"] == 4
    assert figures["phases_s"]["total"]["max"] > 0
    assert figures["each"][0]["recovery"]["lost"] == [1]


def test_chaos_kills_the_rank_it_names_and_status_shows_it(serve: Callable[..., Service]) -> None:
    service = serve(ep_size=2)
    killed = run("-m", "phalanx", "chaos", "kill", "--rank", "1", "--url", service.url)
    assert killed.returncode == 0, killed.stderr
    service.wait_for_line(r"recovered: lost ranks \[1\]")
    becomes(lambda: states(service), {0: "healthy", 1: "dead"})
    seen = run("-m", "phalanx", "status", "--url", service.url, "--json")
    assert seen.returncode == 0, seen.stderr
    state = json.loads(seen.stdout)["fault_tolerance"]
    assert [rank["state"] for rank in state["ranks"]] == ["healthy", "dead"]
    assert state["last_recovery"]["lost"] == [1]
    again = run("-m", "phalanx", "chaos", "kill", "--rank", "1", "--url", service.url)
    assert again.returncode == 2
    assert "not alive" in again.stderr


def test_a_short_soak_ends_well_and_leaves_its_figures(tiny: Path, tmp_path: Path) -> None:
    ended = run(
        str(SOAK), "--seconds", "2", "--only", "raise in a step", "--ep-size", "3", "--streams", "4",
        "--model", str(tiny), "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "nothing lost, nothing doubled, all flat" in ended.stdout
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["passed"]
    assert figures["clients"]["requests"] > 0
    assert figures["story"]["events"]
    assert (tmp_path / "soak.png").stat().st_size > 0
    assert "InjectedFault" in (tmp_path / "service.log").read_text()
