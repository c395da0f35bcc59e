"""Logs for people and for machines, and the file of events."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.observe.events import PHASES, EventLog, Recovery, by_kind
from phalanx.observe.log import QuietProbes, set_up_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The logging of the test run itself is put back."""
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = before


def test_text_lines_name_the_process_and_the_level() -> None:
    out = io.StringIO()
    set_up_logging("info", "text", "rank 2.0", out)
    logging.getLogger("phalanx.worker").warning("slow by %d ms", 5)
    logging.getLogger("phalanx.worker").debug("not shown")
    assert out.getvalue().endswith("WARNING rank 2.0: slow by 5 ms\n")


def test_json_lines_hold_message_extras_and_traceback() -> None:
    out = io.StringIO()
    set_up_logging("debug", "json", "server", out)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("phalanx.http").exception("it failed", extra={"epoch": 3, "what": {1}})
    line = json.loads(out.getvalue())
    assert (line["level"], line["process"], line["logger"]) == ("error", "server", "phalanx.http")
    assert (line["message"], line["epoch"]) == ("it failed", 3)
    assert "ValueError: broken" in line["traceback"]
    assert line["time"].endswith("Z")


def test_setting_up_twice_writes_each_line_once() -> None:
    out = io.StringIO()
    set_up_logging("info", "text", "a", out)
    set_up_logging("info", "text", "b", out)
    logging.getLogger("x").info("once")
    assert out.getvalue().count("once") == 1


def test_probes_are_kept_out_of_the_access_log() -> None:
    def record(path: str) -> logging.LogRecord:
        args = ("127.0.0.1:1", "GET", path, "1.1", 200)
        return logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)

    quiet = QuietProbes()
    assert not quiet.filter(record("/metrics"))
    assert not quiet.filter(record("/ready?verbose=1"))
    assert quiet.filter(record("/v1/completions"))


def test_events_are_appended_one_json_line_each(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in range(2):
        events = EventLog(str(path))
        events.append("recovery", epoch=number)
        events.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["epoch"]) for line in lines] == [("recovery", 0), ("recovery", 1)]
    assert all(line["time"] > 1.7e9 for line in lines)


def test_no_path_keeps_no_events_and_a_full_disk_stops_nothing() -> None:
    EventLog("").append("recovery")
    full = EventLog("/dev/full")
    full.append("recovery")
    full.append("recovery")


def test_a_recovery_reads_as_one_line() -> None:
    recovery = Recovery(
        trigger="failure", lost=[2], joined=[], epoch=4, previous_epoch=3, requests_moved=5, steps_replayed=1,
        seconds={"detect": 0.001, "agree": 0.01, "mask": 0.0, "replan": 0.002, "restore": 0.05, "replay": 0.018,
                 "total": 0.081},
        bytes_restored={"peer": 10**9, "vault": 0, "disk": 24}, seconds_restored={"peer": 0.5, "vault": 0.0},
        causes={2: "notice"}, outcome="complete",
    )  # fmt: skip
    assert recovery.summary() == (
        "recovered: lost ranks [2], epoch 3 -> 4, total 0.081 s (detect 0.001, agree 0.010, mask 0.000, replan 0.002, "
        "restore 0.050, replay 0.018), 5 requests moved, 1000000000 bytes from peer at 2.00 GB/s a rank, 24 bytes "
        "from disk restored"
    )


def test_bytes_from_another_host_are_told_apart_in_the_line_and_added_in_the_status() -> None:
    found = {"peer": 1, "vault": 2, "peer_remote": 10, "vault_remote": 20, "disk": 0}
    recovery = Recovery(
        trigger="failure", lost=[2], joined=[], epoch=4, previous_epoch=3, requests_moved=0, steps_replayed=0,
        seconds=dict.fromkeys(PHASES, 0.0), bytes_restored=found, seconds_restored={"vault_remote": 1e-8},
        causes={}, outcome="complete",
    )  # fmt: skip
    assert "20 bytes from vault of another host at 2.00 GB/s a rank" in recovery.summary()
    assert "10 bytes from peer of another host" in recovery.summary()
    assert by_kind(found) == {"peer": 11, "vault": 22, "disk": 0}


def test_a_pipe_that_nobody_reads_loses_lines_and_stops_nobody() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as far, os.fdopen(writer, "w") as near:
        set_up_logging("info", "text", "rank 0.0", near)
        log = logging.getLogger("phalanx.test")
        for number in range(3000):  # a pipe holds 64 KiB
            log.info("line %d %s", number, "x" * 60)
        held = far.read(1 << 20)
        log.info("there is room again")
        rest = far.read(1 << 20).decode()
    lines = held.decode().splitlines()
    assert all(f"line {number} " in line for number, line in enumerate(lines)), "whole lines, from the first on"
    assert len(lines) < 3000
    assert f"{3000 - len(lines)} lines were lost" in rest
    assert rest.endswith("there is room again\n")
