"""`phalanx plan`: figures, files in, pictures out, and one clear line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from phalanx.cli import main

SMALL = ["--layers", "3", "--experts", "32", "--ranks", "8", "--hosts", "2"]


def plan(*args: str) -> Result:
    return CliRunner().invoke(main, ["plan", *args])


def test_the_table_shows_both_plans_and_the_capacity() -> None:
    result = plan(*SMALL, "--slots", "8")
    assert result.exit_code == 0, result.output
    assert "balancedness" in result.output
    assert "planned: survives any 1 rank, any 1 whole host at once; with restore any 4 ranks" in result.output


def test_deaths_move_only_what_is_missing_and_then_balance_again() -> None:
    result = plan(*SMALL, "--slots", "6", "--dead", "1,6", "--expert-mb", "10", "--rate", "disk=2", "--json")
    assert result.exit_code == 0, result.output
    stages = json.loads(result.output)["stages"]
    assert list(stages) == ["planned", "after the deaths", "rebalanced"]
    after = stages["after the deaths"]
    assert after["ranks"] == 6
    assert after["bytes_moved"] == after["experts_moved"] * 10_000_000
    planned = stages["planned"]["experts_lost_by_two_deaths"]
    assert 0 < after["experts_moved"] <= planned["worst"]
    assert stages["rebalanced"]["balancedness"] > after["balancedness"]
    assert set(after["restore_seconds"]) == {"disk"}


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".json"])
def test_load_files_of_each_kind_say_the_same(tmp_path: Path, suffix: str) -> None:
    load = np.round(np.random.default_rng(0).lognormal(0, 1, (3, 16)), 3)
    path = tmp_path / f"load{suffix}"
    if suffix == ".npz":
        np.savez(path, load=load)
    elif suffix == ".csv":
        np.savetxt(path, load, delimiter=",", fmt="%.3f")
    else:
        path.write_text(json.dumps({"load": load.tolist()}))
    result = plan("--load", str(path), "--ranks", "4", "--hosts", "2", "--slots", "8", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["title"] == "3 layers, 16 experts on 4 ranks of 2 hosts, 8 slots a rank"
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps(load.tolist()))
    again = json.loads(plan("--load", str(reference), "--ranks", "4", "--hosts", "2", "--slots", "8", "--json").output)
    for stage in ("in order", "planned"):
        del answer["stages"][stage]["plan_ms"], again["stages"][stage]["plan_ms"]
    assert answer == again


def _bad(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


BAD_FILES = [
    ("load.npz", b"not an archive"),
    ("load.csv", b"1,2\n3"),
    ("load.csv", b"a,b\n1,2\n"),
    ("load.json", b"{"),
    ("load.json", b'{"weight": [[1]]}'),
    ("load.json", b"[[1, 2], [3]]"),
    ("load.json", b"[[1, -2]]"),
    ("load.json", b"[1, 2]"),
    ("load.json", b"[]"),
    ("load.txt", b"1"),
    ("load.json", b"[" * 100_000),
    ("load.json", b"[[1" + b"0" * 400 + b"]]"),
    ("load.json", b'[["1"]]'),
    ("load.json", b"[[true]]"),
    ("load.json", b"[[1e308, 1e308]]"),
    ("load.json", b"null"),
    ("load.csv", b""),
    ("load.csv", b"1,nan\n"),
    ("load.npz", b""),
    ("load.npz", b"PK\x03\x04"),
]

BAD_ARRAYS = [np.full((2, 4), np.nan), np.ones((2, 4), complex), np.array([["a"]]), np.ones((1, 2, 3, 4)), np.ones(3)]
BAD_ARRAYS += [np.full((1, 2), np.finfo(np.longdouble).max), np.ones((1, 2), "M8[s]"), np.ones((0, 4))]


@pytest.mark.parametrize("array", BAD_ARRAYS, ids=lambda a: f"{a.dtype.name}{a.ndim}")
def test_an_array_that_is_no_load_is_one_clear_line(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "load.npz"
    np.savez(path, load=array)
    result = plan("--load", str(path))
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert str(path) in result.output


def test_an_archive_of_one_array_without_a_name_says_how_to_write_one(tmp_path: Path) -> None:
    with (tmp_path / "load.npz").open("wb") as file:
        np.save(file, np.ones((2, 4)))
    result = plan("--load", str(tmp_path / "load.npz"))
    assert result.exit_code == 2
    assert "numpy.savez" in result.output


@pytest.mark.parametrize(("name", "content"), BAD_FILES)
def test_a_bad_file_is_one_clear_line_and_exit_2(tmp_path: Path, name: str, content: bytes) -> None:
    path = _bad(tmp_path, name, content)
    result = plan("--load", path)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert path in result.output


BAD_FLAGS = [
    (["--dead", "99"], "--dead"),
    (["--dead", "a"], "--dead"),
    (["--dead", "0,1,2,3,4,5,6,7"], "somebody must live"),
    (["--slots", "0"], "--slots"),
    (["--slots", "8,8"], "--slots"),
    (["--slots", "3"], "24 live slots a layer cannot hold 32 experts"),
    (
        ["--slots", "5", "--dead", "0,1"],
        "30 live slots a layer cannot hold 32 experts: give each rank more --slots or let",
    ),
    (["--groups", "3"], "--groups 3"),
    (["--expert-mb", "nan"], "--expert-mb"),
    (["--expert-mb", "inf"], "--expert-mb"),
    (["--ranks", "4096", "--layers", "1024", "--experts", "8192"], "too many"),
    (["--hosts", "9"], "--hosts"),
    (["--rate", "disk"], "--rate"),
    (["--rate", "disk=1", "--rate", "disk=2"], "--rate disk=2"),
    (["--load", "/nonexistent/load.npz"], "no such file"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_FLAGS)
def test_a_flag_that_cannot_be_honoured_is_one_clear_line_and_exit_2(flags: list[str], said: str) -> None:
    result = plan(*SMALL, *flags)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert said in result.output


@pytest.mark.parametrize("flags", [["--slots", "99999999999999999999"], ["--redundant", "999999999999"]])
def test_more_slots_than_experts_are_as_good_as_one_for_each(flags: list[str]) -> None:
    result = plan(*SMALL, *flags, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["stages"]["planned"]["slots_filled_per_layer"] == 8 * 32


def test_pictures_are_written_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    png, page = tmp_path / "plan.png", tmp_path / "plan.html"
    result = plan(*SMALL, "--slots", "5", "--dead", "1", "--png", str(png), "--html", str(page))
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "http" not in text
    start = text.index('type="application/json">') + len('type="application/json">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert [s["name"] for s in data["stages"]] == ["planned", "after the deaths", "rebalanced"]
    assert len(data["stages"][0]["slots"]) == 3


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    for flag in ("--png", "--html"):
        result = plan(*SMALL, "--slots", "8", "--json", flag, str(tmp_path / "missing" / "plan.out"))
        assert result.exit_code == 2
        assert f"{flag} " in result.output.splitlines()[-1]


def test_one_number_of_slots_for_each_rank() -> None:
    result = plan("--layers", "2", "--experts", "16", "--ranks", "4", "--hosts", "1", "--slots", "4,4,8,16", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["stages"]["planned"]["slots_filled_per_layer"] == 32
    assert "4 to 16 slots a rank" in answer["title"]
