"""What of the CUDA communicator can be checked without a device or Triton: where things lie, and what it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phalanx.comm.launch import LaunchShape
from phalanx.comm.peer_memory import BufferLayout, lines


def layout(ep_size: int, tokens: int, hidden: int, top_k: int, x_itemsize: int, fast: bool = False) -> BufferLayout:
    shape = LaunchShape.of(hidden)
    chunks = shape.chunks(hidden)
    return BufferLayout(
        ep_size, tokens, hidden, top_k, x_itemsize, 2, chunks * shape.dispatch_groups, chunks * shape.combine_groups,
        fast,
    )  # fmt: skip


GEOMETRIES = [(2, 128, 7168, 8, 1), (8, 128, 7168, 8, 2), (4, 1, 128, 1, 2), (3, 37, 1000, 5, 2), (16, 512, 2048, 4, 1)]


def test_the_module_imports_where_neither_triton_nor_cuda_bindings_are_installed() -> None:
    hide = "import sys; sys.modules.update({'triton': None, 'cuda': None})"
    code = f"{hide}; import phalanx.comm.cuda as c; print(c.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "phalanx.comm.cuda", done.stderr


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_parts_of_a_buffer_start_on_cache_lines_in_order(geometry: tuple[int, int, int, int, int]) -> None:
    starts = list(layout(*geometry).offsets.values())
    assert starts == sorted(starts)
    assert all(start % 128 == 0 for start in starts)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_part_of_a_buffer_has_the_room_that_its_kernel_addresses(
    geometry: tuple[int, int, int, int, int],
) -> None:
    ep_size, tokens, hidden, top_k, x_itemsize = geometry
    at = layout(*geometry).offsets
    ends = dict(zip(at, list(at.values())[1:], strict=False))
    pairs = 2 * ep_size * tokens * top_k
    assert ends["meta"] - at["meta"] >= 4 * pairs
    assert ends["weights"] - at["weights"] >= 4 * pairs
    assert ends["x"] - at["x"] >= 2 * ep_size * tokens * hidden * x_itemsize
    assert ends["results"] - at["results"] >= 2 * top_k * tokens * hidden * 2
    assert ends["y"] - at["y"] >= ep_size * tokens * top_k * hidden * 2
    assert ends["words"] - at["words"] >= 8 * pairs
    if x_itemsize == 1:
        assert ends["scales"] - at["scales"] >= 2 * ep_size * tokens * (hidden // 128) * 4
    sums = layout(*geometry, fast=True).offsets
    assert sums["end"] - sums["sums"] >= 2 * ep_size * tokens * lines(hidden, 2) * 128


def test_the_documented_size_for_the_benchmark_shape_holds() -> None:
    assert round(layout(2, 128, 7168, 8, 1).nbytes / 1e6, 1) == 62.6
    assert round(layout(8, 128, 7168, 8, 1).nbytes / 1e6, 1) == 162.2
    assert round(layout(2, 128, 7168, 8, 1, fast=True).nbytes / 1e6, 1) == 41.1


def test_a_buffer_grows_with_tokens_a_rank_not_with_experts() -> None:
    small, large = layout(2, 64, 2048, 8, 2), layout(2, 128, 2048, 8, 2)
    assert 1.9 < large.nbytes / small.nbytes < 2.0


@pytest.mark.parametrize(("hidden", "x_itemsize"), [(1001, 2), (1000, 1)])
def test_widths_that_the_kernels_cannot_move_are_refused(hidden: int, x_itemsize: int) -> None:
    with pytest.raises(AssertionError, match=str(hidden)):
        layout(2, 4, hidden, 2, x_itemsize)


@pytest.mark.parametrize("hidden", [128, 512, 1000, 2048, 2880, 7168])
def test_a_launch_shape_covers_every_column_with_grids_that_an_h200_holds_at_once(hidden: int) -> None:
    shape = LaunchShape.of(hidden)
    assert shape.chunk & (shape.chunk - 1) == 0
    assert shape.chunks(hidden) * shape.chunk >= hidden > (shape.chunks(hidden) - 1) * shape.chunk
    assert shape.chunks(hidden) * shape.dispatch_groups <= 132
    assert shape.chunks(hidden) * shape.combine_groups <= 3 * 132


@pytest.mark.parametrize("hidden", [60, 64, 2048, 7168])
def test_a_row_of_results_fills_no_more_lines_than_its_bytes_and_their_numbers_need(hidden: int) -> None:
    assert lines(hidden, 2) * 120 >= hidden * 2 > (lines(hidden, 2) - 1) * 120


def test_a_launch_shape_whose_threads_would_share_words_of_a_line_is_refused() -> None:
    with pytest.raises(AssertionError, match="a word of its own"):
        LaunchShape(line_tile=2, line_warps=2)


@pytest.mark.parametrize(("hidden", "peers"), [(2048, 1), (2048, 2), (64, 8), (960, 5), (2400, 0)])
def test_a_combine_norms_rows_that_registers_hold_with_all_that_is_under_way(hidden: int, peers: int) -> None:
    shape = LaunchShape.of(hidden)
    assert shape.norms(lines(hidden, 2), peers) == shape.row_receivers


@pytest.mark.parametrize(("hidden", "peers"), [(2048, 3), (2048, 7), (64, 11), (960, 6), (2408, 0), (4096, 1)])
def test_wider_rows_and_more_peers_are_left_to_the_norms_own_kernel(hidden: int, peers: int) -> None:
    assert LaunchShape.of(hidden).norms(lines(hidden, 2), peers) == 0


def test_results_that_words_cannot_name_are_sent_instead_of_read_in_place() -> None:
    within, beyond = layout(8, 65536, 64, 8, 2), layout(8, 65537, 64, 8, 2)
    assert within.in_place
    assert within.offsets["sums"] - within.offsets["y"] == 8 * 65536 * 8 * 64 * 2
    assert not beyond.in_place
    assert beyond.offsets["sums"] == beyond.offsets["y"]
    assert not layout(2, 128, 64, 8, 2, fast=True).in_place
