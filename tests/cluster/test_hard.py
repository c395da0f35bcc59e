"""Hard ends: whatever is killed, and whenever, nothing is left behind and nobody is shown a traceback."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from asking import becomes, chaos, get, instruct, metric, post
from streams import PROMPTS, SAMPLING, Streams

from phalanx.process import SpareSpec
from phalanx.testing.damage import vault_of
from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

Serve = Callable[..., Service]


def children(pid: int) -> dict[int, str]:
    """The living children of a process and their command lines."""
    found: dict[int, str] = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def child(pid: int, name: str, timeout_s: float = 60) -> int:
    """The child whose command line holds `name`, as soon as there is one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for number, command in children(pid).items():
            if name in command:
                return number
        os.sched_yield()
    raise TimeoutError(f"process {pid} has no child {name}")


def ended(pidfd: int, timeout_s: float = 60) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


@pytest.fixture
def starting(tiny: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A service of two ranks that was told to start a moment ago; its temporary files lie in tmp_path."""
    command = [sys.executable, "-m", "phalanx", "serve", str(tiny), "--port", "0", "--ep-size", "2"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("moment", ["phalanx.server", "phalanx.nursery"])
def test_a_launcher_killed_while_it_starts_leaves_nothing_behind(
    starting: subprocess.Popen[str], tmp_path: Path, moment: str
) -> None:
    server = os.pidfd_open(child(starting.pid, "phalanx.server"))
    child(starting.pid, moment)
    starting.kill()
    try:
        assert ended(server)
    except BaseException:
        signal.pidfd_send_signal(server, signal.SIGKILL)
        raise
    finally:
        os.close(server)
    assert list(tmp_path.glob("phalanx-*")) == []


def test_ctrl_c_while_it_starts_ends_it_without_a_traceback(starting: subprocess.Popen[str], tmp_path: Path) -> None:
    child(starting.pid, "phalanx.nursery")
    os.killpg(starting.pid, signal.SIGINT)
    output, _ = starting.communicate(timeout=60)
    assert starting.returncode == 0, output
    assert "Traceback" not in output
    assert list(tmp_path.glob("phalanx-*")) == []


def test_a_nursery_whose_answer_nobody_reads_ends_without_a_traceback() -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    spare, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "phalanx.nursery", str(theirs.fileno()), str(os.getpid())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as nursery:
        order = msgspec.msgpack.encode(SpareSpec(launcher_pid=os.getpid()))
        socket.send_fds(mine, [order], [its.fileno()])
        theirs.close()
        its.close()
        assert select.select([mine], [], [], 120)[0], "nobody was born"
        mine.close()
        spare.close()
        _, said = nursery.communicate(timeout=60)
    assert (nursery.returncode, said) == (0, "")


def test_without_elasticity_a_death_ends_the_service_at_once_and_in_plain_words(serve: Serve) -> None:
    service = serve(ep_size=3, no_elastic=True, drain_timeout=300)
    streams = Streams(service.url, PROMPTS, max_tokens=512, temperature=0).start()
    streams.wait_for_chunks(3)
    service.signal(1, signal.SIGKILL)
    assert all("no rank is alive" in error for _, _, error, _ in streams.join())
    assert service.process.wait(60) == 1
    service.wait_for_line("--no-elastic is set")
    service.stop()
    assert "Traceback" not in service.log


def test_a_rank_that_dies_while_streams_are_finished_for_a_stop_changes_none(
    serve: Serve, unfailed: dict[str, list[Any]]
) -> None:
    service = serve(ep_size=3, drain_timeout=120)
    chaos(service, "kill", 1, at_step=30)
    streams = Streams(service.url, PROMPTS, **SAMPLING["greedy"]).start()
    streams.wait_for_chunks(3)
    service.process.send_signal(signal.SIGTERM)
    assert streams.join() == unfailed["greedy"]
    assert service.process.wait(60) == 0
    service.wait_for_line(r"rank 1\.0 .* ended: killed by SIGKILL")


def test_experts_that_no_slot_can_hold_stop_serving_but_not_the_service_and_who_asks_twice_ends_it(
    serve: Serve,
) -> None:
    service = serve(ep_size=2, slots_per_rank=8, drain_timeout=300)
    streams = Streams(service.url, PROMPTS, max_tokens=256, temperature=0).start()
    streams.wait_for_chunks(3)
    service.signal(0, signal.SIGKILL)
    service.wait_for_line("cannot serve.*8 live slots a layer cannot hold 16 experts")
    assert get(service, "/ready").status_code == 503
    assert get(service, "/health").status_code == 200
    service.signal(1, signal.SIGSTOP)  # no stream can end, and this one hears nothing
    service.process.send_signal(signal.SIGINT)
    service.wait_for_line("asked to stop: finishing streams")
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    assert not any(reason for _, reason, _, _ in streams.join()), "none came to its end"


def spoil_experts(model: Path) -> dict[Path, bytes]:
    """Overwrite every expert in a checkpoint's files with zeros, in place; returns what the files held."""
    before = {file: file.read_bytes() for file in model.glob("*.safetensors")}
    for file, content in before.items():
        size = int.from_bytes(content[:8], "little")
        with file.open("r+b") as out:
            for name, entry in json.loads(content[8 : 8 + size]).items():
                if ".experts." in name:
                    start, end = entry["data_offsets"]
                    out.seek(8 + size + start)
                    out.write(bytes(end - start))
    return before


def test_streams_outlive_a_spoilt_disk_once_it_is_mended(
    serve: Serve, tiny: Path, tmp_path: Path, unfailed: dict[str, list[Any]]
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    service = serve("kill@decode:rank=1:n=5", model=model, ep_size=2, expert_backup="disk")
    before = spoil_experts(model)
    instruct(service, "pause").raise_for_status()  # one that comes after the death would be refused
    streams = Streams(service.url, PROMPTS, **SAMPLING["greedy"]).start()
    becomes(lambda: get(service, "/server_info").json()["requests_in_flight"], len(PROMPTS))
    instruct(service, "retry").raise_for_status()
    service.wait_for_line("rank 0.0 cannot serve: cannot restore layer 0 expert")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    assert post(service, "/v1/completions", body).status_code == 503
    seen = service.lines
    instruct(service, "retry").raise_for_status()
    service.wait_for_line("rank 0.0 cannot serve: cannot restore layer 0 expert", after=seen)
    for file, content in before.items():
        with file.open("r+b") as out:
            out.write(content)
    instruct(service, "retry").raise_for_status()
    assert streams.join() == unfailed["greedy"]
    service.wait_for_line("recovered: lost ranks", after=seen)
    recovery = service.status()["last_recovery"]
    assert (recovery["trigger"], recovery["lost"]) == ("operator", [1])
    seconds = recovery["seconds"]
    assert seconds["total"] >= sum(seconds.values()) - seconds["total"]
    assert metric(service, "phalanx_steps_replayed_total") == 1
    assert recovery["bytes_restored"]["disk"] > 0
    assert recovery["bytes_restored"].get("vault", 0) == 0
    becomes(lambda: service.status()["vault"]["state"], "off")
    with pytest.raises(LookupError):
        vault_of(service.process.pid)
