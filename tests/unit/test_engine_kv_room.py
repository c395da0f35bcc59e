"""How many KV blocks a device has room for, and what is said when it has none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from phalanx.config import ServeConfig
from phalanx.engine.kv_room import MOST_BLOCKS, DeviceMemory, blocks_that_fit, check_fit
from phalanx.errors import BadConfig
from phalanx.model.attention import KVStore
from phalanx.model.config import ModelConfig
from phalanx.moe.cuda import DeviceMemoryShort
from phalanx.testing.tiny import make_tiny

GB = 10**9
BLOCK = 1_572_864  # 16 tokens of 48 layers with 4 KV heads of 128 in bfloat16


def test_the_kv_cache_takes_what_is_free_but_for_the_part_of_the_device_that_is_kept() -> None:
    """60 GB of weights on 140 GB: a tenth of the device stays free, whatever the weights take."""
    blocks = blocks_that_fit(DeviceMemory(80 * GB, 140 * GB, "cuda:0"), 0.9, BLOCK, 16)
    assert blocks == 66 * GB // BLOCK - 1
    taken = (blocks + 1) * BLOCK  # one block is for padding
    assert 80 * GB - taken >= 14 * GB > 80 * GB - taken - BLOCK


@pytest.mark.parametrize(("fraction", "gigabytes"), [(0.5, 10), (0.8, 52), (0.95, 73)])
def test_a_larger_fraction_of_the_device_goes_to_the_kv_cache_alone(fraction: float, gigabytes: int) -> None:
    blocks = blocks_that_fit(DeviceMemory(80 * GB, 140 * GB, "cuda:0"), fraction, BLOCK, 16)
    assert blocks == gigabytes * GB // BLOCK - 1


def test_a_line_says_how_many_tokens_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "phalanx.engine"):
        blocks_that_fit(DeviceMemory(80 * GB, 140 * GB, "cuda:3"), 0.9, BLOCK, 16)
    (record,) = caplog.records
    assert record.getMessage() == (
        "671360 tokens fit into the KV cache: 41960 blocks, 66.0 GB; 14.0 of 140.0 GB of cuda:3 stay free for graphs "
        "and batches"
    )


@pytest.mark.parametrize("free", [0, 13 * GB, 14 * GB, 14 * GB + 2 * BLOCK - 1])
def test_a_device_whose_weights_leave_nothing_is_refused_with_the_flags_that_help(free: int) -> None:
    with pytest.raises(DeviceMemoryShort) as caught:
        blocks_that_fit(DeviceMemory(free, 140 * GB, "cuda:0"), 0.9, BLOCK, 16)
    said = str(caught.value)
    assert "\n" not in said
    for part in ("cuda:0", "140.0 GB", "--mem-fraction-static 0.9", "14.0 GB", "--slots-per-rank", "--min-ranks"):
        assert part in said


def test_one_block_is_enough_and_more_than_a_million_are_too_many() -> None:
    assert blocks_that_fit(DeviceMemory(14 * GB + 2 * BLOCK, 140 * GB, "cuda:0"), 0.9, BLOCK, 16) == 1
    assert blocks_that_fit(DeviceMemory(139 * GB, 140 * GB, "cuda:0"), 0.9, 64, 16) == MOST_BLOCKS


def test_a_kv_cache_that_was_asked_for_and_does_not_fit_is_refused_before_it_is_made() -> None:
    memory = DeviceMemory(100 * BLOCK, 140 * GB, "cuda:0")
    check_fit(memory, 99, BLOCK)
    with pytest.raises(DeviceMemoryShort, match=r"KV cache of 100 blocks .*--num-kv-blocks or --kv-cache-memory-mb"):
        check_fit(memory, 100, BLOCK)


def test_what_an_operator_says_of_the_kv_cache_counts_more_than_what_is_free() -> None:
    said_nothing = ServeConfig(model="m")
    assert said_nothing.kv_is_unsaid
    assert said_nothing.kv_blocks(1 << 20) == 512
    for said, blocks in (
        (ServeConfig(model="m", num_kv_blocks=7), 7),
        (ServeConfig(model="m", kv_cache_memory_mb=9), 9),
    ):
        assert not said.kv_is_unsaid
        assert said.kv_blocks(1 << 20) == blocks


@pytest.mark.parametrize("blocks", [1 << 36, 1 << 62])
def test_a_kv_cache_beyond_a_host_s_address_space_is_refused_by_its_flag(tmp_path: Path, blocks: int) -> None:
    model = ModelConfig.read(make_tiny(tmp_path / "model", "qwen3-moe"))
    with pytest.raises(BadConfig, match="which this host does not give: lower --num-kv-blocks"):
        KVStore(model, blocks, 16, torch.bfloat16)
