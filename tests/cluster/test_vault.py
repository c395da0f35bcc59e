"""The vault in a real service: nothing is read from disk once it is full, and it may itself be hurt at any time."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asking import becomes, chaos, eventually, get, metric, restored, state_of
from standing import Standing
from streams import PROMPTS, SAMPLING, Streams

from phalanx.elastic.vault.room import available_bytes
from phalanx.testing.damage import damage_vault, vault_of
from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

Unfailed = dict[str, list[Any]]
Serve = Callable[..., Service]

FULL = r"the vault is full"


def both_kinds(url: str) -> dict[str, Streams]:
    return {kind: Streams(url, PROMPTS, **options).start() for kind, options in SAMPLING.items()}


def kill_in_mid_stream(service: Service, unfailed: Unfailed, *ranks: int) -> None:
    seen = service.lines
    streams = both_kinds(service.url)
    for so_far, rank in enumerate(ranks):
        for running in streams.values():
            running.wait_for_chunks(4 * (so_far + 1))
        service.signal(rank, signal.SIGKILL)
    for kind, running in streams.items():
        assert running.join() == unfailed[kind]
    service.wait_for_line(rf"recovered: lost ranks \[[^]]*\b{ranks[-1]}\b", after=seen)


def keeper_of(service: Service) -> int:
    """The vault's process; the server may still know none, or the one before."""
    while not ((pid := service.status()["vault"]["pid"]) and Path(f"/proc/{pid}").exists()):
        assert service.process.poll() is None, service.log
    return int(pid)


def test_when_the_checkpoint_is_gone_all_that_dies_comes_back_and_what_is_damaged_waits_for_it(
    serve: Serve, unfailed: Unfailed, tiny: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    service = serve(model=model, max_restarts=3)
    service.wait_for_line(FULL)
    shutil.rmtree(model)
    seen = service.lines
    os.kill(keeper_of(service), signal.SIGKILL)
    service.wait_for_line(FULL, after=seen)
    for rank in (0, 2):
        before = restored(service)
        streams = both_kinds(service.url)
        for running in streams.values():
            running.wait_for_chunks(4)
        seen = service.lines
        service.signal(rank, signal.SIGKILL)
        service.wait_for_line(rf"recovered:.* ranks \[{rank}\] rejoined", after=seen)
        for kind, running in streams.items():
            assert running.join() == unfailed[kind]
        found = restored(service)
        assert found["disk"] == 0
        join = service.status()["last_recovery"]
        assert join["trigger"] == "join"
        assert join["bytes_restored"]["vault"] > 0, "what the newcomer took in before it asked"
        assert join["bytes_restored"]["disk"] == 0
        assert found["vault"] - before["vault"] > join["bytes_restored"]["vault"], "and the survivors before that"
    damage_vault(vault_of(service.process.pid), layer=1)
    seen = service.lines
    keeper = keeper_of(service)
    os.kill(keeper, signal.SIGUSR1)
    service.wait_for_line("the vault cannot be filled: .* is not a directory", after=seen)
    eventually(lambda: "cannot be filled" in service.status()["vault"]["reason"])
    vault = service.status()["vault"]
    assert (vault["state"], vault["pid"]) == ("filling", keeper)
    assert 0 < vault["filled_bytes"] < vault["total_bytes"]
    shutil.copytree(tiny, model)
    seen = service.lines
    os.kill(keeper, signal.SIGUSR1)
    service.wait_for_line(FULL, after=seen)
    eventually(lambda: service.status()["vault"]["reason"] == "")
    for kind, running in both_kinds(service.url).items():
        assert running.join() == unfailed[kind], "the newcomers have the right weights"


def test_the_first_load_reads_each_expert_once_and_the_vault_takes_them_from_the_ranks(serve: Serve) -> None:
    service = serve(dtype="float32")
    line = service.wait_for_line(rf"{FULL}: .* MB in .* s \((\S+) MB from ranks, (\S+) MB from disk\)")
    experts = 3 * 16 * 3 * 64 * 64 * 4 / 1e6
    assert float(line.group(1)) == pytest.approx(experts, abs=0.06), "all experts, and they alone"
    eventually(lambda: service.status()["vault"]["state"] == "full")
    vault = service.status()["vault"]
    assert vault["filled_bytes"] == vault["total_bytes"]
    assert vault["filled_bytes"] == pytest.approx(1e6 * (float(line.group(1)) + float(line.group(2))), rel=0.1)


def test_the_vaults_process_killed_while_serving_disturbs_nobody_and_comes_back(
    standing: Standing, unfailed: Unfailed
) -> None:
    with standing.losing() as service:
        service.wait_for_line(FULL)
        keeper, before = keeper_of(service), service.status()
        failures = partial(metric, service, "phalanx_recoveries_total", 'trigger="failure"')
        failed = failures()
        streams = both_kinds(service.url)
        for running in streams.values():
            running.wait_for_chunks(3)
        seen = service.lines
        os.kill(keeper, signal.SIGKILL)
        service.wait_for_line("the vault's process .* ended: killed by SIGKILL", after=seen)
        service.wait_for_line("checked the vault: all 48 experts in it are whole", after=seen)
        service.wait_for_line(FULL, after=seen)
        for kind, running in streams.items():
            assert running.join() == unfailed[kind]
        becomes(lambda: service.status()["vault"]["restarts"], before["vault"]["restarts"] + 1)
        assert failures() == failed
    with standing.losing(1) as service:
        read = restored(service)["disk"]
        kill_in_mid_stream(service, unfailed, 1)
        assert restored(service)["disk"] == read


def test_the_vaults_process_may_be_dead_when_a_rank_dies(standing: Standing, unfailed: Unfailed) -> None:
    with standing.losing(2) as service:
        seen, read = service.lines, restored(service)["disk"]
        streams = both_kinds(service.url)
        for running in streams.values():
            running.wait_for_chunks(5)
        keeper, rank = keeper_of(service), service.pid(2)
        os.kill(keeper, signal.SIGKILL)
        os.kill(rank, signal.SIGKILL)
        for kind, running in streams.items():
            assert running.join() == unfailed[kind]
        service.wait_for_line(r"recovered:.* ranks \[2\] rejoined", after=seen)
        assert restored(service)["disk"] == read, "its memory is not its own"
        service.wait_for_line(FULL, after=seen)


def test_the_vaults_process_killed_in_the_middle_of_a_restore_changes_no_stream(
    patient: Standing, unfailed: Unfailed
) -> None:
    with patient.losing(3) as service:
        service.wait_for_line(FULL)
        chaos(service, "stop", 0, where="restore")
        restoring = service.pid(0)
        streams = both_kinds(service.url)
        for running in streams.values():
            running.wait_for_chunks(3)
        service.signal(3, signal.SIGKILL)
        keeper = keeper_of(service)
        eventually(lambda: state_of(restoring) == "T")
        seen = service.lines
        os.kill(keeper, signal.SIGKILL)
        service.wait_for_line("the vault's process .* ended: killed by SIGKILL", after=seen)
        os.kill(restoring, signal.SIGCONT)
        for kind, running in streams.items():
            assert running.join() == unfailed[kind]
        service.wait_for_line(FULL, after=seen)


def test_a_fill_that_is_cut_off_anywhere_is_finished_by_the_next_process(serve: Serve, unfailed: Unfailed) -> None:
    points = ["vault_dense", "vault_fill", "vault_torn", "vault_publish"]
    service = serve(faults=",".join(f"kill@{point}:incarnation={i}:n=7" for i, point in enumerate(points)))
    service.wait_for_line(FULL)
    becomes(lambda: service.status()["vault"]["restarts"], 4)
    kill_in_mid_stream(service, unfailed, 0)
    assert restored(service)["disk"] == 0


def test_a_vault_whose_process_always_dies_is_given_up_and_the_service_goes_on(
    serve: Serve, unfailed: Unfailed
) -> None:
    service = serve(faults="kill@vault_dense")
    service.wait_for_line("5 processes of the vault ended in a row")
    becomes(lambda: service.status()["vault"]["state"], "given_up")
    kill_in_mid_stream(service, unfailed, 3)
    assert restored(service)["vault"] == 0
    assert restored(service)["disk"] > 0


def test_damaged_experts_are_taken_from_disk_and_then_mended(serve: Serve, unfailed: Unfailed) -> None:
    service = serve()
    service.wait_for_line(FULL)
    assert damage_vault(vault_of(service.process.pid), layer=1) == 16
    kill_in_mid_stream(service, unfailed, 1)
    found = restored(service)
    assert found["disk"] > 0
    assert found["vault"] == 2 * found["disk"], "two layers of three were whole"
    service.wait_for_line("the copy from vault is damaged")
    seen = service.lines
    os.kill(keeper_of(service), signal.SIGUSR1)
    service.wait_for_line("16 entries of the vault are damaged", after=seen)
    service.wait_for_line(FULL, after=seen)
    kill_in_mid_stream(service, unfailed, 2)
    assert restored(service)["disk"] == found["disk"], "nothing more"


def test_a_vault_that_runs_short_of_memory_waits_and_the_service_goes_on_with_disk(
    serve: Serve, unfailed: Unfailed
) -> None:
    service = serve(faults=",".join(["raise@vault_memory:incarnation=0"] * 1000))
    service.wait_for_line(r"only \S+ MB of memory are left: the vault waits")
    becomes(lambda: service.status()["vault"]["state"], "short")
    vault = service.status()["vault"]
    assert "the vault waits" in vault["reason"]
    kill_in_mid_stream(service, unfailed, 2)
    found = restored(service)
    assert (found["vault"], found["disk"] > 0) == (0, True)
    os.kill(vault["pid"], signal.SIGKILL)  # the next one finds memory enough
    service.wait_for_line(FULL)
    kill_in_mid_stream(service, unfailed, 0)
    assert restored(service)["disk"] == found["disk"]


def test_a_vault_that_does_not_fit_is_said_to_and_the_service_goes_on_with_disk(
    serve: Serve, unfailed: Unfailed
) -> None:
    too_much = available_bytes() // 3 >> 20  # of KV cache for each of four ranks: it is never touched
    service = serve(kv_cache_memory_mb=too_much, block_size=1024)
    service.wait_for_line(r"--expert-backup dram does not fit: the vault takes \S+ MB; .* going on with disk")
    becomes(lambda: service.status()["vault"]["state"], "off")
    kill_in_mid_stream(service, unfailed, 1)
    assert restored(service)["disk"] > 0


def test_without_backup_an_expert_whose_only_holder_dies_stops_serving_but_not_the_service(serve: Serve) -> None:
    service = serve(ep_size=2, expert_backup="none")
    service.signal(1, signal.SIGKILL)
    service.wait_for_line("cannot serve: cannot restore layer 0 expert .* no source has an intact copy")
    assert get(service, "/ready").status_code == 503
    assert get(service, "/health").status_code == 200
